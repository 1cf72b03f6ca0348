"""Pipelines as text: `fold-scales{scale=2},matmul-to-nbits{bits=4,block_size=32}` and back.

A spec is what a person writes: plain options. A pass is what runs: it holds a census, a plan and
finished weights. Turning one into the other needs analysis and numerics, so that happens above
this room, in `faq_onnx.opt`, by the type of the spec. Here is only text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar

from faq_onnx.errors import ConfigError

__all__ = [
    "SPECS",
    "FoldScales",
    "FuseAttention",
    "FuseNorms",
    "ImportedPass",
    "InsertActivationStats",
    "LiftMatMulNBits",
    "MatMulToNBits",
    "PackQkv",
    "PassSpec",
    "QuantizeActivations",
    "QuantizeCache",
    "QuantizeEmbedding",
    "RemoveUnused",
    "Rotate",
    "StaticShapes",
    "format_pipeline",
    "parse_pipeline",
]

Option = bool | int | float | str


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """One pass of a pipeline; the fields of a subclass are its options."""

    name: ClassVar[str] = ""


@dataclasses.dataclass(frozen=True)
class FoldScales(PassSpec):
    """Fold channel scales: those of a plan folder, or one number for every channel."""

    name = "fold-scales"
    plan: str = ""
    scale: float = 0.0
    application: str = "fold"


@dataclasses.dataclass(frozen=True)
class FuseAttention(PassSpec):
    """Fuse what is proved to be causal attention; `positions` 0 takes config.json's number."""

    name = "fuse-attention"
    positions: int = 0


@dataclasses.dataclass(frozen=True)
class FuseNorms(PassSpec):
    """Fuse decomposed RMS norms over at least `min_width` channels."""

    name = "fuse-norms"
    min_width: int = 2


@dataclasses.dataclass(frozen=True)
class InsertActivationStats(PassSpec):
    """Add the statistics of every scale group's activation as graph outputs."""

    name = "insert-activation-stats"
    sum_abs: bool = True
    gram: bool = False


@dataclasses.dataclass(frozen=True)
class LiftMatMulNBits(PassSpec):
    """Reshape activations [rows, K] of MatMulNBits to [1, rows, K]."""

    name = "lift-matmul-nbits"


@dataclasses.dataclass(frozen=True)
class MatMulToNBits(PassSpec):
    """Round linear sites to nearest and store them in low bits; `exclude` is a shell pattern."""

    name = "matmul-to-nbits"
    bits: int = 4
    block_size: int = 32
    symmetric: bool = False
    accuracy_level: int = 4
    exclude: str = ""


@dataclasses.dataclass(frozen=True)
class PackQkv(PassSpec):
    """Compute query, key and value of GroupQueryAttention in one product."""

    name = "pack-qkv"


@dataclasses.dataclass(frozen=True)
class QuantizeActivations(PassSpec):
    """Round activations around every MatMulNBits to int16, with one step for all."""

    name = "quantize-activations"
    step: float = 0.0


@dataclasses.dataclass(frozen=True)
class QuantizeCache(PassSpec):
    """Keep keys and values of GroupQueryAttention in int8, one scale for every channel."""

    name = "quantize-cache"
    scale: float = 0.0


@dataclasses.dataclass(frozen=True)
class QuantizeEmbedding(PassSpec):
    """Round embeddings to nearest, or let them share the table of a low-bit head."""

    name = "quantize-embedding"
    bits: int = 8
    block_size: int = 32
    symmetric: bool = False
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Rotate(PassSpec):
    """Rotate `parts`: residual, heads, or residual+heads; `untie_head` allows a larger file."""

    name = "rotate"
    parts: str = "residual+heads"
    seed: int = 0
    untie_head: bool = False


@dataclasses.dataclass(frozen=True)
class StaticShapes(PassSpec):
    """Shapes of inputs and outputs, such as shapes="input_ids:1x16 logits:1x16x32000"."""

    name = "static-shapes"
    shapes: str = ""


@dataclasses.dataclass(frozen=True)
class RemoveUnused(PassSpec):
    """Remove nodes and initializers that nothing reads (onnx_ir's pass)."""

    name = "remove-unused"


@dataclasses.dataclass(frozen=True)
class ImportedPass(PassSpec):
    """A pass of yours, `my_module:MyPass{option=1}`; options are its constructor's arguments."""

    target: str
    options: tuple[tuple[str, Option], ...] = ()


SPECS: Mapping[str, type[PassSpec]] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            FoldScales,
            FuseAttention,
            FuseNorms,
            InsertActivationStats,
            LiftMatMulNBits,
            MatMulToNBits,
            PackQkv,
            QuantizeActivations,
            QuantizeCache,
            QuantizeEmbedding,
            RemoveUnused,
            Rotate,
            StaticShapes,
        )
    }
)
"""What a pipeline may name, besides `module:Class`."""

_ITEM = re.compile(r"\s*(?P<name>[\w.:-]+)\s*(\{(?P<options>(\"[^\"]*\"|[^{}\"])*)\})?\s*(,|$)")
_OPTION = re.compile(r"\s*(?P<key>\w+)\s*=\s*(\"(?P<quoted>[^\"]*)\"|(?P<bare>[^\",]*))\s*(,|$)")


def parse_pipeline(text: str) -> tuple[PassSpec, ...]:
    """Specs in the order of the text.

    Raises:
        ConfigError: listing everything that is wrong, with what is allowed.
    """
    specs: list[PassSpec] = []
    problems: list[str] = []
    for name, options in _items(text):
        try:
            specs.append(_parse_item(name, options))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    if not specs:
        raise ConfigError(f"an empty pipeline; passes are {', '.join(SPECS)}")
    return tuple(specs)


def format_pipeline(specs: tuple[PassSpec, ...]) -> str:
    """The text that `parse_pipeline` reads back; options at their defaults are left out."""
    return ",".join(_format_item(spec) for spec in specs)


def _items(text: str) -> Iterator[tuple[str, str]]:
    """Names with the text of their options."""
    position = 0
    while position < len(text):
        match = _ITEM.match(text, position)
        if match is None:
            raise ConfigError(
                f"cannot read the pipeline at {text[position:]!r}; it looks like "
                "'pass{option=value,option=value},pass'"
            )
        yield match["name"], match["options"] or ""
        position = match.end()


def _parse_item(name: str, text: str) -> PassSpec:
    options = _parse_options(name, text)
    if ":" in name:
        return ImportedPass(name, tuple((key, _guess(value)) for key, value in options.items()))
    if name not in SPECS:
        raise ConfigError(f"unknown pass {name!r}; passes are {', '.join(SPECS)}, module:Class")
    fields = {field.name: field for field in dataclasses.fields(SPECS[name])}
    unknown = [key for key in options if key not in fields]
    if unknown:
        allowed = ", ".join(fields) or "none"
        raise ConfigError(f"{name}: unknown option {', '.join(unknown)}; options are {allowed}")
    values = {key: _convert(name, fields[key], value) for key, value in options.items()}
    return SPECS[name](**values)


def _parse_options(name: str, text: str) -> dict[str, str]:
    options: dict[str, str] = {}
    position = 0
    while position < len(text):
        match = _OPTION.match(text, position)
        if match is None or match["key"] in options:
            raise ConfigError(f"{name}: cannot read the options at {text[position:]!r}")
        bare = match["bare"]
        options[match["key"]] = match["quoted"] if bare is None else bare.strip()
        position = match.end()
    return options


def _convert(name: str, field: dataclasses.Field[Option], text: str) -> Option:
    """The text as a value of the field's type."""
    wanted, parse = _KINDS[str(field.type)]
    try:
        return parse(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{name}: {field.name}={text} is not {wanted}") from None


_BOOLEANS = {"true": True, "false": False}
_KINDS: Mapping[str, tuple[str, Callable[[str], Option]]] = MappingProxyType(
    {
        "bool": ("true or false", _BOOLEANS.__getitem__),
        "int": ("an integer", int),
        "float": ("a number", float),
        "str": ("a text", str),
    }
)
"""By the annotation of a field: what its text must be, and how to read it."""


def _guess(text: str) -> Option:
    """The value that a bare word looks like."""
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _format_item(spec: PassSpec) -> str:
    if isinstance(spec, ImportedPass):
        name, options = spec.target, dict(spec.options)
    else:
        fields = dataclasses.fields(spec)
        values = {field.name: (getattr(spec, field.name), field.default) for field in fields}
        name, options = spec.name, {k: v for k, (v, default) in values.items() if v != default}
    if not options:
        return name
    body = ",".join(f"{key}={_format_value(value)}" for key, value in options.items())
    return f"{name}{{{body}}}"


def _format_value(value: Option) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    return repr(value)
