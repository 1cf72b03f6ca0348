"""The graph for WebAssembly: with weights unpacked as model.json says, it is the same function.

The page's own unpack.mjs is tried in tests/e2e/test_web.py.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.graph.weights import read_weight
from faq_onnx.passes import MatMulToNBitsPass
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import quantize_rtn
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.targets import web_unpack
from faq_onnx.targets.web_unpack import UNPACKED_GRAPH, Bytes, PackedWeight, write_unpacked_graph
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

Array = npt.NDArray[Any]
PLAIN = block_format(4, 32, symmetric=False)


def _low_bit(
    folder: Path,
    fmt: BlockFormat = PLAIN,
    spec: TinyLlama = TinyLlama(),  # noqa: B008 - frozen
) -> Path:
    model = tiny_llama_onnx(spec)
    canonicalise(model)
    census = take_census(model, None)
    plans = {site.name: SitePlan(site=site.name, format=fmt) for site in census.sites}
    weights = {site.name: quantize_rtn(read_weight(model, site), fmt) for site in census.sites}
    MatMulToNBitsPass(census.sites, plans, weights)(model)
    save_model(model, folder / "model.onnx", external_data=True)
    return folder / "model.onnx"


def _read(place: Bytes, folder: Path, dtype: str) -> Array:
    if place.base64:
        content = base64.b64decode(place.base64)
    else:
        whole = (folder / place.file).read_bytes()
        content = whole[place.offset : place.offset + place.bytes]
    return np.frombuffer(content, dtype)


def _digits(packed: Array, bits: int) -> Array:
    """Codes of bytes [rows, n], low bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    digits: Array = (packed[:, :, None] >> shifts) & (2**bits - 1)
    return digits.reshape(len(packed), -1)


def _unpack(weight: PackedWeight, folder: Path) -> Array:
    blocks = -(-weight.width // weight.block)
    codes = _digits(_read(weight.codes, folder, "uint8").reshape(weight.rows, -1), weight.bits)
    scales = _read(weight.scales, folder, weight.scale_type).astype(np.float32)
    scales = scales.reshape(weight.rows, blocks, 1)
    if weight.units is not None:
        scales = scales * _read(weight.units, folder, "float32").reshape(-1, 1, 1)
    zeros: Array = np.full((weight.rows, blocks), 2 ** (weight.bits - 1))
    if weight.zeros is not None:
        packed = _read(weight.zeros, folder, "uint8").reshape(weight.rows, -1)
        zeros = _digits(packed, weight.bits)[:, :blocks]
    steps = codes.reshape(weight.rows, blocks, weight.block).astype(np.float32) - zeros[..., None]
    whole = (steps * scales).astype(np.float32).reshape(weight.rows, -1)
    return np.ascontiguousarray(whole[:, : weight.width])


def _logits(path: Path) -> Array:
    session = open_session(path)
    feeds = decoder_feeds(session.get_inputs(), np.arange(9, dtype=np.int64)[None] + 3)
    return run_session(session, feeds, ["logits"])["logits"]


@pytest.mark.parametrize(
    "wish",
    [
        {},
        {"fmt": block_format(2, 32, symmetric=True)},
        {"fmt": block_format(8, 16, symmetric=False)},
        {"fmt": block_format(4, 16, symmetric=True)},
        {"fmt": block_format(2, 128, symmetric=False)},  # K = 64: one padded block
        {"fmt": block_format(4, 32, symmetric=False, block_scales="8-bit")},
        {"fmt": block_format(4, 32, symmetric=True, block_scales="8-bit")},
        {"spec": TinyLlama(qkv_bias=True)},
    ],
)
def test_unpacked_weights_compute_the_same(tmp_path: Path, wish: dict[str, Any]) -> None:
    path = _low_bit(tmp_path, **wish)
    weights = write_unpacked_graph(path)
    model = load_model(path)
    count = sum(node.op_type == "MatMulNBits" for node in model.graph)
    assert len(weights) == count > 10
    for weight in weights:
        _unpack(weight, tmp_path).tofile(tmp_path / weight.file)
    kinds = [node.op_type for node in load_model(tmp_path / UNPACKED_GRAPH).graph]
    assert "MatMulNBits" not in kinds
    assert kinds.count("FusedMatMul") == count
    with exact_twin(path) as exact:
        wanted = _logits(exact)
    # sums of 64 to 128 float32 products in another order
    np.testing.assert_allclose(_logits(tmp_path / UNPACKED_GRAPH), wanted, atol=1e-5, rtol=1e-5)


def test_float_models_and_large_ones_have_no_such_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    save_model(tiny_llama_onnx(TinyLlama()), path, external_data=True)
    assert write_unpacked_graph(path) == ()
    low_bit = _low_bit(tmp_path)
    monkeypatch.setattr(web_unpack, "LARGEST_UNPACKED_BYTES", 1000)
    assert write_unpacked_graph(low_bit) == ()
    assert not (tmp_path / UNPACKED_GRAPH).exists()


def test_what_the_page_cannot_unpack_stays(tmp_path: Path) -> None:
    path = _low_bit(tmp_path)
    model = ir.load(path)
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    zeros = node.inputs[3]
    assert zeros is not None
    zeros.const_value = ir.tensor(np.zeros((node.attributes["N"].as_int(), 2), np.float32))
    ir.save(model, path, external_data="model.onnx.data")
    weights = write_unpacked_graph(path)
    kinds = [node.op_type for node in ir.load(tmp_path / UNPACKED_GRAPH).graph]
    assert kinds.count("MatMulNBits") == 1
    assert kinds.count("FusedMatMul") == len(weights)
