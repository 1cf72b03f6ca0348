"""What a decoder model wants to be fed: tokens, mask, positions, and an empty or running cache."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import UnsupportedModelError

__all__ = [
    "CachePosition",
    "CacheSlot",
    "DecoderInputs",
    "InputKind",
    "cache_position",
    "decoder_feeds",
    "describe_inputs",
]

Array = npt.NDArray[Any]

DTYPES: Mapping[str, npt.DTypeLike] = MappingProxyType(
    {
        "tensor(bool)": np.bool_,
        "tensor(float)": np.float32,
        "tensor(float16)": np.float16,
        "tensor(int8)": np.int8,  # a quantized cache
        "tensor(int32)": np.int32,
        "tensor(int64)": np.int64,
    }
)
# past_key_values.0.key, past.0.value, present.0.key; past_key_0, present_value_0
_CACHE = re.compile(r"^(?:past|present).*?(?:(\d+)\W(key|value)|(key|value)_(\d+))$")


class Argument(Protocol):
    """The part of onnxruntime's NodeArg that is needed here."""

    @property
    def name(self) -> str:
        """Name of the graph input."""

    @property
    def type(self) -> str:
        """Such as "tensor(float)"."""

    @property
    def shape(self) -> list[int | str | None]:
        """Static sizes, names of symbolic ones, None for unnamed ones."""


class InputKind(StrEnum):
    """What an input of a decoder means."""

    TOKENS = "input_ids"
    MASK = "attention_mask"
    POSITIONS = "position_ids"
    BRANCH = "use_cache_branch"  # optimum's merged decoders


@dataclasses.dataclass(frozen=True)
class CachePosition:
    """Which part of the cache a value holds: layer, and "key" or "value"."""

    layer_index: int
    part: str


@dataclasses.dataclass(frozen=True)
class CacheSlot:
    """One past key or value.

    Attributes:
        name: Graph input.
        position: Layer and part; the output of the same position continues it.
        dtype: float32, float16, or int8 where the cache is quantized.
        heads: Key/value heads.
        head_dim: Width of a head.
    """

    name: str
    position: CachePosition
    dtype: npt.DTypeLike
    heads: int
    head_dim: int

    def empty(self, batch: int) -> Array:
        """A past of length 0."""
        return np.zeros((batch, self.heads, 0, self.head_dim), self.dtype)


@dataclasses.dataclass(frozen=True)
class DecoderInputs:
    """All inputs of a decoder, understood: plain ones by name, and the cache in graph order."""

    plain: Mapping[str, tuple[InputKind, npt.DTypeLike]]
    cache: tuple[CacheSlot, ...]

    def plain_feeds(self, input_ids: npt.NDArray[np.int64], past_length: int) -> dict[str, Array]:
        """Feeds other than the cache, for tokens [B, S] behind `past_length` cached ones."""
        batch, length = input_ids.shape
        feeds: dict[str, Array] = {}
        for name, (kind, dtype) in self.plain.items():
            if kind is InputKind.TOKENS:
                feeds[name] = input_ids.astype(dtype)
            elif kind is InputKind.MASK:
                feeds[name] = np.ones((batch, past_length + length), dtype)
            elif kind is InputKind.POSITIONS:
                row = np.arange(past_length, past_length + length).astype(dtype)
                feeds[name] = np.ascontiguousarray(np.broadcast_to(row, (batch, length)))
            else:
                feeds[name] = np.array([past_length > 0])
        return feeds


def decoder_feeds(
    inputs: Iterable[Argument],
    input_ids: npt.NDArray[np.int64],
    past: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Everything that a decoder needs to read `input_ids`.

    Args:
        inputs: `session.get_inputs()`, or those of them that are wanted.
        input_ids: int64 [B, S]; every position counts, there is no padding.
        past: Cache by input name, [B, heads, P, head_dim]; None for an empty one.

    Raises:
        UnsupportedModelError: Lists all inputs that are not understood.
    """
    described = describe_inputs(inputs)
    cache = past or {slot.name: slot.empty(len(input_ids)) for slot in described.cache}
    past_length = next((array.shape[2] for array in cache.values()), 0)
    return {**described.plain_feeds(input_ids, past_length), **cache}


def describe_inputs(inputs: Iterable[Argument]) -> DecoderInputs:
    """Understand the inputs of a decoder.

    Raises:
        UnsupportedModelError: Lists all inputs that are not understood, with the reason.
    """
    plain: dict[str, tuple[InputKind, npt.DTypeLike]] = {}
    cache: list[CacheSlot] = []
    problems: list[str] = []
    kinds = {kind.value: kind for kind in InputKind}
    for argument in inputs:
        position = cache_position(argument.name)
        dtype = DTYPES.get(argument.type)
        if dtype is None:
            problems.append(f"{_show(argument)}: this element type is not fed")
        elif argument.name in kinds:
            plain[argument.name] = (kinds[argument.name], dtype)
            if argument.name == InputKind.POSITIONS and len(argument.shape) != 2:
                problems.append(f"{_show(argument)}: positions must be [batch, sequence]")
        elif position is None:
            problems.append(f"{_show(argument)}: not an input of a text decoder")
        elif (widths := _cache_widths(argument.shape)) is None:
            problems.append(f"{_show(argument)}: needs a static number of heads and head width")
        else:
            cache.append(CacheSlot(argument.name, position, dtype, *widths))
    if problems:
        msg = (
            "the model has inputs that cannot be fed; export it as a text decoder with "
            f"{', '.join(kinds)} and past_key_values.N.key/value, or round the weights of any "
            "graph with `faq-onnx opt`:\n  " + "\n  ".join(problems)
        )
        raise UnsupportedModelError(msg)
    return DecoderInputs(MappingProxyType(plain), tuple(cache))


def cache_position(name: str) -> CachePosition | None:
    """Layer and part of a past or present value by its name; None for other names."""
    match = _CACHE.match(name)
    if match is None:
        return None
    return CachePosition(int(match[1] or match[4]), match[2] or match[3])


def _cache_widths(shape: list[int | str | None]) -> tuple[int, int] | None:
    """Heads and head width of [batch, heads, past, head_dim], if both are static."""
    if len(shape) != 4 or isinstance(shape[2], int):
        return None
    heads, head_dim = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        return None
    return heads, head_dim


def _show(argument: Argument) -> str:
    return f"{argument.name} {argument.type} {list(argument.shape)}"
