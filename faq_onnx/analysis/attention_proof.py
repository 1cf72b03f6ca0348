"""Prove with numbers that a matched attention is what GroupQueryAttention computes.

The block runs in numpy on random rows, as the graph has it, and is compared with the operator's
definition, written out in `_attention`: causal, over a window, rotated by tables. A different
mask, order of heads, rotation, repetition or scale shows as a difference of the size of the
numbers themselves, a rounding as one of 1e-7 of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.analysis.activation_types import BATCH, LENGTH, PAST, TOTAL, ActivationTypes
from faq_onnx.analysis.attention_heads import Heads
from faq_onnx.analysis.attention_match import AttentionMatch
from faq_onnx.analysis.operands import dims
from faq_onnx.analysis.paths import NoPath
from faq_onnx.graph.evaluate import CannotEvaluateError, evaluate
from faq_onnx.passes.fuse_attention import AttentionBlock, HeadRows, RotaryTable

__all__ = ["AttentionProver"]

Array = npt.NDArray[Any]

# Sums of at most a few dozen products of normal numbers, in another order: errors of a few
# epsilon; a wrong mask, head or angle changes results by their own size.
ROUNDINGS = 256
_EPSILON = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10}
_SEED = 0
HEAD_MULTIPLE = 8  # onnxruntime 1.31 and 1.32: "head_size must be a multiple of 8"
_LONGEST_WINDOW_PREFILL = 64  # the whole prompt over a window, quadratic in its length


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Rows of `lengths` tokens, padded behind, after `past` cached ones."""

    lengths: tuple[int, ...]
    past: int = 0

    @property
    def sizes(self) -> dict[str, int]:
        """Rows, new tokens, cached tokens and both together, under the names of dimensions."""
        length = max(self.lengths)
        total = self.past + length
        return {BATCH: len(self.lengths), LENGTH: length, PAST: self.past, TOTAL: total}

    def feeds(self) -> dict[str, Array]:
        """The plain inputs of a decoder."""
        batch, length, total = (self.sizes[name] for name in (BATCH, LENGTH, TOTAL))
        ends = self.past + np.array(self.lengths)[:, np.newaxis]
        mask = (np.arange(total) < ends).astype(np.int64)
        positions = np.broadcast_to(np.arange(self.past, total), (batch, length))
        return {"attention_mask": mask, "position_ids": positions.astype(np.int64)}


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Sizes of one attention.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Channels of a head.
        dtype: Of the cache.
        rows: Of query, key and value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: ir.DataType
    rows: tuple[ir.DataType, ...]

    @property
    def tolerance(self) -> float:
        """Of the coarsest type in which numbers go in."""
        return ROUNDINGS * max(_EPSILON[dtype] for dtype in (self.dtype, *self.rows))


class _Disproved(Exception):  # noqa: N818 - leaves this module as NoPath
    """The block computes something else."""


class AttentionProver:
    """Proves matches of one model; tables of positions are computed once."""

    def __init__(self, model: ir.Model, positions: int) -> None:
        self._model, self._positions = model, positions
        self._types = ActivationTypes(model)
        self._tables: dict[tuple[ir.Value, ir.Value], RotaryTable] = {}

    def prove(self, match: AttentionMatch, name: str) -> AttentionBlock | NoPath:
        """The block for FuseAttentionPass, or what speaks against it."""
        try:
            widths = self._widths(match)
            window = self._window(match.mask)
            table = self._table(match, widths)
            query, key, value = (
                self._rows(heads, dtype)
                for heads, dtype in zip(match.projected, widths.rows, strict=True)
            )
            block = AttentionBlock(
                name=name,
                query=query,
                key=key,
                value=value,
                past=(str(match.past_key.name), str(match.past_value.name)),
                present=(str(match.present_key.name), str(match.present_value.name)),
                output=str(match.output.name),
                heads=widths.heads,
                kv_heads=widths.kv_heads,
                head_dim=widths.head_dim,
                dtype=widths.dtype,
                scale=match.scale,
                window=window,
                rotary=table,
            )
            for probe in self._probes(window):
                mixed = self._compare(match, block, widths, probe)
                block = dataclasses.replace(block, output_dtype=mixed)
        except (CannotEvaluateError, _Disproved) as error:
            return NoPath(str(error))
        return block

    def _widths(self, match: AttentionMatch) -> _Widths:
        key, value = dims(match.past_key), dims(match.past_value)
        if key is None or len(key) != 4 or value != key:
            raise _Disproved(f"{match.past_key.name!r} and value have shapes {key} and {value}")
        kv_heads, head_dim = key[1], key[3]
        if kv_heads is None or head_dim is None:
            raise _Disproved(f"{match.past_key.name!r} has no static number of heads and width")
        projected = match.query.split.inputs[0]
        assert projected is not None
        shape = self._types.shape(projected) or dims(projected)
        width = None if shape is None else shape[-1]
        if not isinstance(width, int) or width % (head_dim * kv_heads):
            raise _Disproved(f"{projected.name!r} has {width} channels for heads of {head_dim}")
        dtype = match.past_key.dtype
        if dtype is None or dtype not in _EPSILON:
            raise _Disproved(f"onnxruntime's CPU kernel has no {dtype}")
        if head_dim % HEAD_MULTIPLE:
            raise _Disproved(
                f"onnxruntime's kernel takes heads of a multiple of {HEAD_MULTIPLE}, these have "
                f"{head_dim}"
            )
        rows = tuple(self._row_type(heads) for heads in match.projected)
        widths = _Widths(width // head_dim, kv_heads, head_dim, dtype, rows)
        self._types.learn(match.repeated_key, (BATCH, widths.heads, TOTAL, head_dim))
        for present in (match.present_key, match.present_value):
            self._types.learn(present, (BATCH, kv_heads, TOTAL, head_dim))
        return widths

    def _row_type(self, heads: Heads) -> ir.DataType:
        found = self._types.dtype(heads.rows)
        if found is None or found not in _EPSILON:
            raise _Disproved(f"{heads.rows.name!r} has type {found}; expected float32 or float16")
        return found

    def _rows(self, heads: Heads, dtype: ir.DataType) -> HeadRows:
        """Read the projection itself where rows are just split into heads."""
        turned = None if heads.turned is None else str(heads.turned.outputs[0].name)
        source = heads.split.inputs[0]
        assert source is not None
        shape = self._types.shape(source)
        is_plain = heads.rows is heads.split.outputs[0] and shape is not None
        if is_plain and shape is not None and shape[:-1] == (BATCH, LENGTH):
            return HeadRows(str(heads.rows.name), dtype, str(source.name))
        return HeadRows(str(heads.rows.name), dtype, None, turned)

    def _window(self, mask: ir.Value) -> int | None:
        """Keys that the last position of the longest text sees; None for all."""
        probe = _Probe((1,), self._positions - 1)
        (values,) = self._evaluate([mask], probe.feeds(), probe)
        seen = values.reshape(-1) == 0
        if values.size != self._positions:
            raise _Disproved(f"the mask {mask.name!r} has shape {list(values.shape)}")
        if seen.all():
            return None
        window = int(seen[::-1].argmin())
        if window == 0 or seen[: self._positions - window].any():
            raise _Disproved(f"the mask {mask.name!r} is neither causal nor a sliding window")
        return window

    def _table(self, match: AttentionMatch, widths: _Widths) -> RotaryTable | None:
        if match.cos is None or match.sin is None:
            return None
        key = (match.cos, match.sin)
        if key not in self._tables:
            probe = _Probe((self._positions,))
            halves = []
            for value in self._evaluate(key, probe.feeds(), probe):
                rows = value.reshape(-1, value.shape[-1])
                half = rows.shape[1] // 2
                if (
                    len(rows) != self._positions
                    or not 0 < half <= widths.head_dim // 2
                    or not np.array_equal(rows[:, :half], rows[:, half:])
                ):
                    raise _Disproved(f"the rotation {match.cos.name!r} is not one of two halves")
                halves.append(np.ascontiguousarray(rows[:, :half], widths.dtype.numpy()))
            self._tables[key] = RotaryTable(*halves)
        return self._tables[key]

    def _probes(self, window: int | None) -> Iterator[_Probe]:
        longest = self._positions
        probes = [_Probe((1,)), _Probe((9,)), _Probe((4,), 3), _Probe((1, 1), 6), _Probe((6, 4))]
        if window is not None:
            probes += [_Probe((3,), max(window - 2, 0)), _Probe((1,), window + 1)]
            if window <= _LONGEST_WINDOW_PREFILL:
                probes.append(_Probe((window + 3,)))
        yield from (p for p in probes if p.sizes[TOTAL] <= longest)

    def _compare(
        self, match: AttentionMatch, block: AttentionBlock, widths: _Widths, probe: _Probe
    ) -> ir.DataType:
        """Raises _Disproved, or returns the type of the output."""
        rng = np.random.default_rng(_SEED)
        size = probe.sizes

        def normal(dtype: ir.DataType, *shape: int) -> Array:
            return rng.standard_normal(shape).astype(dtype.numpy())

        counts = (widths.heads, widths.kv_heads, widths.kv_heads)
        split = [
            normal(dtype, size[BATCH], size[LENGTH], heads, widths.head_dim)
            for dtype, heads in zip(widths.rows, counts, strict=True)
        ]
        cached = (size[BATCH], widths.kv_heads, size[PAST], widths.head_dim)
        past = [normal(widths.dtype, *cached) for _ in block.past]
        feeds = {**probe.feeds(), **dict(zip(block.past, past, strict=True))}
        for heads, rows in zip(match.projected, split, strict=True):
            turned = rows if heads.turned is None else rows.transpose(0, 2, 1, 3)
            feeds[str(heads.rows.name)] = turned
        targets = (match.output, match.present_key, match.present_value)
        found = self._evaluate(targets, feeds, probe)
        for value, rows in zip(targets[1:], found[1:], strict=True):
            if rows.dtype != widths.dtype.numpy():
                raise _Disproved(
                    f"{value.name!r} has type {rows.dtype}, what is cached before {widths.dtype}"
                )
        expected = _attention(block, split, past)
        for value, have, want in zip(targets, found, expected, strict=True):
            self._check(value, have, want, probe, widths.tolerance)
        return ir.DataType.from_numpy(found[0].dtype)

    @staticmethod
    def _check(value: ir.Value, have: Array, want: Array, probe: _Probe, tolerance: float) -> None:
        if have.shape != want.shape:
            raise _Disproved(f"{value.name!r} has shape {have.shape}, attention {want.shape}")
        axis = 1 if have.ndim == 3 else 2
        for row, length in enumerate(probe.lengths):  # what lies in padding is nobody's matter
            kept = length if axis == 1 else probe.past + length
            index = np.arange(kept)
            difference = np.take(have[row] - want[row], index, axis - 1).astype(np.float64)
            worst = float(np.abs(difference).max(initial=0))
            if not worst <= tolerance * max(1.0, float(np.abs(want).max(initial=0))):
                raise _Disproved(
                    f"{value.name!r} differs by {worst:.2g} from causal attention on "
                    f"{probe.lengths} tokens after {probe.past}: another mask or rotation"
                )

    def _evaluate(
        self, targets: tuple[ir.Value, ...] | list[ir.Value], feeds: Mapping[str, Array], p: _Probe
    ) -> list[Array]:
        sizes = p.sizes
        return evaluate(self._model, targets, feeds, lambda value: self._types.sized(value, sizes))


def _attention(block: AttentionBlock, new: list[Array], past: list[Array]) -> list[Array]:
    """What com.microsoft.GroupQueryAttention computes, float64.

    Args:
        block: Scale, window, tables.
        new: Query [B, S, heads, D], key and value [B, S, kv_heads, D], not rotated.
        past: Keys and values [B, kv_heads, P, D], rotated.

    Returns:
        Output [B, S, heads * D], keys and values [B, kv_heads, P + S, D].
    """
    query, key, value = (rows.transpose(0, 2, 1, 3).astype(np.float64) for rows in new)
    start, length = past[0].shape[2], query.shape[2]
    positions = np.arange(start, start + length)
    if block.rotary is not None:
        query, key = _rotate(query, block.rotary, positions), _rotate(key, block.rotary, positions)
    keys, values = np.concatenate([past[0], key], 2), np.concatenate([past[1], value], 2)
    group = query.shape[1] // keys.shape[1]
    scores = query @ np.repeat(keys, group, 1).transpose(0, 1, 3, 2) * block.scale
    behind = positions[:, np.newaxis] - np.arange(start + length)
    seen = (behind >= 0) & (behind < (block.window or start + length))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = (weights @ np.repeat(values, group, 1)).transpose(0, 2, 1, 3)
    return [mixed.reshape(*mixed.shape[:2], -1), keys, values]


def _rotate(rows: Array, table: RotaryTable, positions: Array) -> Array:
    """Rotate the first channels of rows x [B, heads, S, D]: x cos + rotate_half(x) sin."""
    cos, sin = (part[positions].astype(np.float64) for part in (table.cos, table.sin))
    half = cos.shape[1]
    low, high, rest = np.split(rows, [half, 2 * half], axis=-1)
    return np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], -1)
