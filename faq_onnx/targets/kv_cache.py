"""An int8 cache for keys and values: how large they become, and what rounding them costs.

Scales are those of `faq_onnx.quant.cache_scales`, from text that the model writes itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.target import FactTable
from faq_onnx.errors import PackageError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import load_model
from faq_onnx.passes import QuantizeCachePass, run_passes
from faq_onnx.progress import Progress
from faq_onnx.quant.cache_scales import CacheRange
from faq_onnx.quant.divergence import ShiftedLogits
from faq_onnx.runtime.feeds import cache_position, decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.targets.own_text import write_texts
from faq_onnx.targets.package import replace_model

__all__ = ["quantize_cache"]

TEXTS = 8
TEXT_TOKENS = 256
HELD_OUT = 2  # texts that no scale has seen
_LOGITS = "logits"


def quantize_cache(
    path: Path, starts: npt.NDArray[np.int64], work: Path, progress: Progress
) -> tuple[int, FactTable]:
    """Replace a model by one whose cache is int8.

    Args:
        path: The model; all its attention is GroupQueryAttention.
        starts: Token ids that texts begin with, int64 [any number].
        work: For the new file, until it is complete.
        progress: Receives a stage.

    Returns:
        Bytes of the new model, and what the cache costs and saves.

    Raises:
        PackageError: There is attention of another kind, or a cache that is no float.
        RewriteError: The graph does something else with its cache.
    """
    model = load_model(path)
    float_type = _check_attention(model, path)
    sizes = {name: table.shape.numpy() for name, table in _tables(model).items()}
    length = min([TEXT_TOKENS, *(int(positions) for positions, _ in sizes.values())])
    with progress.stage("measure the cache", TEXTS * length, "tokens") as advance:
        texts = write_texts(path, starts, TEXTS, length, advance)
        known, held_out = texts[HELD_OUT:], texts[:HELD_OUT]
        pairs = {name: int(count) for name, (_, count) in sizes.items()}
        scales = {name: found.scales for name, found in _ranges(path, known, pairs).items()}
        run_passes(model, [QuantizeCachePass(scales)])
    before = [outputs[_LOGITS][0] for outputs in _read(path, held_out)]
    external = path.with_name(f"{path.name}.data").is_file()
    size = replace_model(model, path, work, external_data=external)
    after = [outputs[_LOGITS][0] for outputs in _read(path, held_out)]
    return size, _costs(before, after, scales, float_type)


def _check_attention(model: ir.Model, path: Path) -> ir.DataType:
    """Type of the cache.

    Raises:
        PackageError: Not all of it belongs to GroupQueryAttention, or it is no float.
    """
    fused = {
        value.name
        for node in model.graph
        if node.op_type == "GroupQueryAttention"
        for value in node.inputs[3:5]
        if value is not None
    }
    past = [v for v in model.graph.inputs if cache_position(v.name or "") is not None]
    other = [value.name for value in past if value.name not in fused]
    if not past or other:
        msg = (
            f"{path}: kv_cache=int8 needs GroupQueryAttention in every layer, and "
            f"{f'{len(other)} of {len(past)} caches belong' if past else 'no cache belongs'} to "
            "one; let attention be fused (`faq-onnx inspect` says what stays and why), or leave "
            "kv_cache=float"
        )
        raise PackageError(msg)
    found = {value.dtype for value in past}
    if len(found) > 1 or not found <= {ir.DataType.FLOAT, ir.DataType.FLOAT16}:
        msg = (
            f"{path}: kv_cache=int8 needs a cache in float32 or float16, found "
            f"{', '.join(sorted(map(str, found)))}; leave kv_cache=float"
        )
        raise PackageError(msg)
    return past[0].dtype or ir.DataType.FLOAT


def _tables(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Cosines [positions, pairs] by the cache output of the keys that are rotated with them.

    The kernels refuse text that is longer than the tables.
    """
    found = {}
    for node in model.graph:
        if node.op_type != "GroupQueryAttention":
            continue
        inside = node.attributes.get_int("do_rotary", 0) == 1
        key = node.inputs[1]
        reader, index = (node, 7) if inside else (key.producer() if key else None, 2)
        if reader is None or (reader is not node and reader.op_type != "RotaryEmbedding"):
            continue
        table = reader.inputs[index]
        if table is not None and table.const_value is not None:
            found[str(node.outputs[1].name)] = table.const_value
    return found


def _read(
    path: Path, texts: npt.NDArray[np.int64]
) -> Iterator[dict[str, npt.NDArray[np.generic]]]:
    """Outputs for each of the texts [B, S], low-bit products in float32."""
    with exact_twin(path) as exact:
        session = open_session(exact)
        for row in texts:
            yield run_session(session, decoder_feeds(session.get_inputs(), row[np.newaxis]))


def _ranges(
    path: Path, texts: npt.NDArray[np.int64], pairs: Mapping[str, int]
) -> dict[str, CacheRange]:
    """By name of the cache output; `pairs` are the rotated ones, where there are any."""
    ranges: dict[str, CacheRange] = {}
    for outputs in _read(path, texts):
        for name, array in outputs.items():
            if cache_position(name) is not None:
                found = CacheRange.of(array[0], pairs.get(name, 0))
                ranges[name] = found.join(ranges.get(name, found))
    return ranges


def _costs(
    before: Sequence[npt.NDArray[np.floating]],
    after: Sequence[npt.NDArray[np.floating]],
    scales: Mapping[str, npt.NDArray[np.float32]],
    float_type: ir.DataType,
) -> FactTable:
    kl, same, count = 0.0, 0, 0
    for one, other in zip(before, after, strict=True):
        p, q = (
            ShiftedLogits.of(logits, whose="the logits", way_out="leave kv_cache=float")
            for logits in (one, other)
        )
        same += int((p.best == q.best).sum())
        count += len(p.best)
        kl += float(p.kl(q).sum())
    channels = sum(scale.size for scale in scales.values())
    name = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16"}[float_type]
    return FactTable(
        title="int8 cache",
        header=(f"bytes a token, {name}", "int8", "KL, nats/token", "top-1", "tokens"),
        rows=(
            (
                float_type.itemsize * channels,
                channels,
                round(kl / count, 5),
                round(same / count, 4),
                count,
            ),
        ),
    )
