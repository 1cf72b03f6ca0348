"""model.json: what the page has to know about a decoder, read from its graph and its configs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.source import SourceModel, context_length
from faq_onnx.errors import PackageError, UnsupportedModelError
from faq_onnx.runtime.feeds import CacheSlot, InputKind, cache_position, describe_inputs
from faq_onnx.targets.genai_config import can_share_cache
from faq_onnx.targets.web_unpack import PackedWeight

__all__ = [
    "PAGE_CONFIG",
    "CacheEntry",
    "PageConfig",
    "PageFile",
    "check_decoder",
    "describe_decoder",
    "read_json",
]

PAGE_CONFIG = "model.json"
_LOGITS = "logits"
_ORT_TYPES = {
    ir.DataType.FLOAT: "tensor(float)",
    ir.DataType.FLOAT16: "tensor(float16)",
    ir.DataType.INT32: "tensor(int32)",
    ir.DataType.INT64: "tensor(int64)",
    ir.DataType.BOOL: "tensor(bool)",
}


class PageFile(Record):
    """A file that the page downloads before it can begin.

    Attributes:
        file: Its path in the folder.
        bytes: Size.
        provider: Only there it is needed; "": everywhere.
    """

    file: str
    bytes: int
    provider: str = ""


class CacheEntry(Record):
    """One past key or value and the output that continues it."""

    past: str
    present: str
    heads: int
    width: int
    type: str


class PageConfig(Record):
    """model.json.

    Attributes:
        name: Title of the page.
        version: Of the files: browsers keep them under it.
        model: The .onnx file.
        data: Files with its weights.
        files: All that is downloaded, with sizes: these, the tokenizer, onnxruntime-web itself.
        inputs: Types of the inputs but the cache, by name.
        cache: In graph order.
        context: Most tokens of a conversation.
        ends: Tokens that end an answer.
        template: The chat template; None: texts are continued.
        float16: It computes in float16, which not every graphics processor does.
        largest: Bytes of the largest tensor.
        libraries: Versions, by npm package.
        unpacked_graph: What WebAssembly runs on unpacked weights; "" without.
        unpacked: How to make these.
        shares_cache: The graph can write into the buffers that it reads as its cache.
    """

    name: str
    version: str
    model: str
    data: tuple[str, ...]
    files: tuple[PageFile, ...]
    inputs: dict[str, str]
    cache: tuple[CacheEntry, ...]
    context: int
    ends: tuple[int, ...]
    template: str | None
    float16: bool
    largest: int
    libraries: dict[str, str]
    unpacked_graph: str = ""
    unpacked: tuple[PackedWeight, ...] = ()
    shares_cache: bool = False

    def download_bytes(self, provider: str) -> int:
        """What a browser that computes there downloads."""
        wanted = ("", provider)
        return sum(file.bytes for file in self.files if file.provider in wanted)


@dataclasses.dataclass(frozen=True)
class _Argument:
    """A graph input as onnxruntime would describe it."""

    name: str
    type: str
    shape: list[int | str | None]


@dataclasses.dataclass(frozen=True)
class DecoderFacts:
    """What the graph says.

    Attributes:
        inputs: As in `PageConfig`.
        cache: As there.
        float16: As there.
        largest: As there.
        shares_cache: As there.
    """

    inputs: dict[str, str]
    cache: tuple[CacheEntry, ...]
    float16: bool
    largest: int
    shares_cache: bool


def check_decoder(source: SourceModel, model: ir.Model) -> None:
    """Refuse what the page cannot run, before the work.

    Raises:
        UnsupportedModelError: The graph is no decoder with a cache.
        PackageError: There is no tokenizer.json or config.json.
    """
    describe_decoder(model, source.given)
    for name in ("tokenizer.json", "config.json"):
        if source.companion(name) is None:
            raise PackageError(
                f"{source.given}: has no {name}, which a page needs to chat; put it beside the "
                "model"
            )


def describe_decoder(model: ir.Model, place: str) -> DecoderFacts:
    """Inputs, cache and types of a decoder.

    Raises:
        UnsupportedModelError: It is none, or has no cache.
    """
    decoder = describe_inputs([_argument(value) for value in model.graph.inputs])
    presents = {cache_position(value.name or ""): value.name for value in model.graph.outputs}
    names = {value.name for value in model.graph.outputs}
    lost = [slot.name for slot in decoder.cache if presents.get(slot.position) is None]
    branch = InputKind.BRANCH.value in decoder.plain
    if _LOGITS not in names or not decoder.cache or lost or branch:
        msg = (
            f"{place}: a page needs a decoder with input_ids, logits and a key/value cache "
            "(past_key_values.N.key, present.N.key) and without use_cache_branch; export it with "
            "its cache (optimum: --task text-generation-with-past)"
        )
        raise UnsupportedModelError(msg)
    tensors = [
        value.const_value
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    ]
    return DecoderFacts(
        inputs={name: np.dtype(dtype).name for name, (_, dtype) in decoder.plain.items()},
        cache=tuple(_entry(slot, presents[slot.position] or "") for slot in decoder.cache),
        float16=any(tensor.dtype == ir.DataType.FLOAT16 for tensor in tensors),
        largest=max((tensor.nbytes for tensor in tensors), default=0),
        shares_cache=can_share_cache(model.graph),
    )


def read_json(path: Path | None) -> dict[str, Any]:
    """A JSON object, empty where there is no file.

    Raises:
        PackageError: It is no JSON object.
    """
    if path is None or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PackageError(
            f"{path}: not valid JSON ({error}); copy or download it again"
        ) from error
    if not isinstance(content, dict):
        raise PackageError(f"{path}: holds no JSON object; copy or download it again")
    return content


def text_facts(folder: Path) -> tuple[int, tuple[int, ...], str | None]:
    """Context length, end tokens and chat template, from the configs in a package."""
    config = read_json(folder / "config.json")
    config = {**config, **config.get("text_config", {})}
    generation = read_json(folder / "generation_config.json")
    ends: int | list[int] = next(
        (c["eos_token_id"] for c in (generation, config) if c.get("eos_token_id")), []
    )
    every = ends if isinstance(ends, list) else [ends]
    return context_length(config), tuple(int(token) for token in every), _template(folder)


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = read_json(folder / name).get("chat_template")
        if isinstance(found, list):  # several by name
            named: Mapping[str, str] = {each["name"]: each["template"] for each in found}
            found = named.get("default") or next(iter(named.values()), None)
        if found:
            return str(found)
    return None


def _argument(value: ir.Value) -> _Argument:
    dims = [] if value.shape is None else list(value.shape)
    shape = [dim if isinstance(dim, int) else dim.value for dim in dims]
    return _Argument(value.name or "", _type(value.dtype), shape)


def _type(dtype: ir.DataType | None) -> str:
    return "unknown" if dtype is None else _ORT_TYPES.get(dtype, dtype.name.lower())


def _entry(slot: CacheSlot, present: str) -> CacheEntry:
    return CacheEntry(
        past=slot.name,
        present=present,
        heads=slot.heads,
        width=slot.head_dim,
        type=np.dtype(slot.dtype).name,
    )
