"""The twin computes in float32 what the model stores, and leaves nothing behind."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.artifacts.plan import SitePlan
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import save_model
from faq_onnx.graph.weights import read_weight, transform_initializer
from faq_onnx.passes import MatMulToNBitsPass, run_passes
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.testing import TinyLlama, tiny_feeds, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama()


@pytest.fixture(params=[(2, 32), (4, 16), (4, 128), (8, 32)], ids=str)
def low_bit(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A low-bit model at accuracy_level 4, and the float model of the same weights."""
    census, model, reference = (
        tiny_llama_census(SPEC),
        tiny_llama_onnx(SPEC),
        tiny_llama_onnx(SPEC),
    )
    bits, block_size = request.param
    fmt = block_format(bits, block_size, symmetric=False)
    weights = {s.name: quantize_rtn(read_weight(model, s), fmt) for s in census.sites}
    for site in census.sites:
        stored = dequantize_weight(weights[site.name]).T
        transform_initializer(reference, site.weight, functools.partial(_instead, stored))
    plans = {name: SitePlan(site=name, format=fmt, accuracy_level=4) for name in weights}
    run_passes(model, [MatMulToNBitsPass(census.sites, plans, weights)])
    save_model(model, tmp_path / "model.onnx")
    save_model(reference, tmp_path / "float.onnx")
    return tmp_path / "model.onnx", tmp_path / "float.onnx"


def test_the_twin_is_exact(low_bit: tuple[Path, Path]) -> None:
    model, reference = low_bit
    expected = run_session(open_session(reference), tiny_feeds(SPEC))["logits"]
    before = sorted(model.parent.iterdir())
    with exact_twin(model) as twin:
        found = run_session(open_session(twin), tiny_feeds(SPEC))["logits"]
    rounded = run_session(open_session(model), tiny_feeds(SPEC))["logits"]
    size = float(np.abs(expected).max())
    # float32 rounding of two layers, against int8 activations: 0.4 % a product
    assert np.abs(found - expected).max() < 1e-5 * size
    assert np.abs(rounded - expected).max() > 1e-4 * size
    assert sorted(model.parent.iterdir()) == before


def test_a_float_model_is_its_own_twin(tmp_path: Path) -> None:
    save_model(tiny_llama_onnx(SPEC), tmp_path / "model.onnx")
    with exact_twin(tmp_path / "model.onnx") as twin:
        assert twin == tmp_path / "model.onnx"


def test_a_folder_that_cannot_be_written(low_bit: tuple[Path, Path]) -> None:
    model, _ = low_bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.mkstemp", _refuse)
        with exact_twin(model) as twin:
            assert twin == model


def _instead(
    array: npt.NDArray[np.float32], _: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    return array


def _refuse(**_: object) -> tuple[int, str]:
    raise PermissionError(13, "Permission denied")
