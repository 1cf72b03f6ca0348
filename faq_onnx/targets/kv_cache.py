"""An int8 cache for keys and values: how large they become, and what rounding them costs.

A channel's scale is the largest value that it took in text by the model itself, over 127. Keys are
rotated before they are cached: of a pair (c, c + head_dim / 2) the length stays and the direction
follows the position, so both channels get the largest length of the pair, which holds at every
position.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.target import FactTable
from faq_onnx.errors import PackageError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.passes import QuantizeCachePass, run_passes
from faq_onnx.progress import Progress
from faq_onnx.quant.divergence import ShiftedLogits
from faq_onnx.runtime.feeds import cache_position, decoder_feeds
from faq_onnx.runtime.generate import sample_tokens
from faq_onnx.runtime.session import open_session, run_session

__all__ = ["quantize_cache"]

TEXTS = 8
TEXT_TOKENS = 256
HELD_OUT = 2  # texts that no scale has seen
MARGIN = 1.05  # what other text may go beyond
LARGEST_CODE = 127
_LOGITS = "logits"

Scales = dict[str, npt.NDArray[np.float32]]


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What the model made of some texts: largest values by cache output, and logits [T, V]."""

    largest: Mapping[str, npt.NDArray[np.float32]]
    logits: tuple[npt.NDArray[np.float32], ...]


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
        PackageError: There is attention of another kind, or a cache that is not float32.
        RewriteError: The graph does something else with its cache.
    """
    model = load_model(path)
    _check_attention(model, path)
    length = min(TEXT_TOKENS, _positions(model))
    with progress.stage("measure the cache", TEXTS * length, "tokens") as advance:
        session = open_session(path)
        rng = np.random.default_rng(0)
        prompts = rng.choice(starts, TEXTS).reshape(TEXTS, 1)
        texts = sample_tokens(session, prompts, length, rng, on_step=advance)
        del session
        known, held_out = texts[HELD_OUT:], texts[:HELD_OUT]
        rotated = _rotated(model)
        seen = _read(path, known)
        scales = {
            name: _scale(largest, rotated=name in rotated)
            for name, largest in seen.largest.items()
        }
        run_passes(model, [QuantizeCachePass(scales)])
    before = _read(path, held_out)
    size = _replace(model, path, work)
    after = _read(path, held_out)
    return size, _costs(before, after, scales)


def _check_attention(model: ir.Model, path: Path) -> None:
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
    strange = {str(value.dtype) for value in past} - {str(ir.DataType.FLOAT)}
    if strange:
        msg = (
            f"{path}: kv_cache=int8 needs a float32 cache, found {', '.join(sorted(strange))}; "
            "leave kv_cache=float"
        )
        raise PackageError(msg)


def _rotated(model: ir.Model) -> set[str]:
    """Cache outputs of keys that the operator rotates by halves."""
    return {
        str(node.outputs[1].name)
        for node in model.graph
        if node.op_type == "GroupQueryAttention" and node.attributes.get_int("do_rotary", 0) == 1
    }


def _positions(model: ir.Model) -> int:
    """How many positions the tables of rotation have; the kernel refuses longer text."""
    tables = [
        node.inputs[7]
        for node in model.graph
        if node.op_type == "GroupQueryAttention" and len(node.inputs) > 7
    ]
    sizes = [int(t.shape.numpy()[0]) for t in tables if t is not None and t.shape is not None]
    return min(sizes, default=TEXT_TOKENS)


def _read(path: Path, texts: npt.NDArray[np.int64]) -> _Seen:
    """Read texts [B, S], one after the other, with low-bit products in float32."""
    largest: dict[str, npt.NDArray[np.float32]] = {}
    logits = []
    with exact_twin(path) as exact:
        session = open_session(exact)
        for row in texts:
            outputs = run_session(session, decoder_feeds(session.get_inputs(), row[np.newaxis]))
            logits.append(outputs[_LOGITS][0].astype(np.float32))
            for name, array in outputs.items():
                if cache_position(name) is not None:
                    found = np.square(array[0].astype(np.float32)).max(axis=1)
                    pairs = _pairs(array[0]) if array.dtype != np.int8 else found
                    kept = largest.get(name, np.zeros((2, *found.shape), np.float32))
                    largest[name] = np.maximum(kept, np.stack([found, pairs]))
    return _Seen(largest, tuple(logits))


def _pairs(heads: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
    """Largest squared length of each rotary pair of [heads, T, d], for both: [heads, d]."""
    squares = np.square(heads.astype(np.float32))
    half = squares.shape[2] // 2
    lengths = (squares[:, :, :half] + squares[:, :, half:]).max(axis=1)
    return np.concatenate([lengths, lengths], axis=1)


def _scale(largest: npt.NDArray[np.float32], *, rotated: bool) -> npt.NDArray[np.float32]:
    """Scales [heads * d] from squares [2, heads, d]: of channels, and of pairs."""
    sizes = np.sqrt(largest[int(rotated)]).reshape(-1)
    floor = np.finfo(np.float32).tiny
    scale: npt.NDArray[np.float32] = np.maximum(sizes * (MARGIN / LARGEST_CODE), floor)
    return scale.astype(np.float32)


def _replace(model: ir.Model, path: Path, work: Path) -> int:
    """Write the model in the place of its source; returns its bytes."""
    folder = work / "int8-cache"
    folder.mkdir(parents=True, exist_ok=True)
    external = (path.parent / f"{path.name}.data").is_file()
    size = save_model(model, folder / path.name, external_data=external)
    for file in folder.iterdir():
        shutil.move(file, path.parent / file.name)
    return size


def _costs(before: _Seen, after: _Seen, scales: Scales) -> FactTable:
    kl, same, count = 0.0, 0, 0
    for one, other in zip(before.logits, after.logits, strict=True):
        p, q = (
            ShiftedLogits.of(logits, whose="the logits", way_out="leave kv_cache=float")
            for logits in (one, other)
        )
        same += int((p.best == q.best).sum())
        count += len(p.best)
        kl += float(p.kl(q).sum())
    channels = sum(scale.size for scale in scales.values())
    return FactTable(
        title="int8 cache",
        header=("bytes a token, float32", "int8", "KL, nats/token", "top-1", "tokens"),
        rows=((4 * channels, channels, round(kl / count, 5), round(same / count, 4), count),),
    )
