"""genai_config.json: what onnxruntime-genai wants to know of a model."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from faq_onnx.artifacts.source import SourceModel, context_length
from faq_onnx.errors import PackageError
from faq_onnx.graph.io import load_model
from faq_onnx.progress import Progress
from faq_onnx.runtime.feeds import cache_position

__all__ = ["CONFIG_NAME", "MODEL_NAME", "can_share_cache", "write_genai_config"]

CONFIG_NAME = "genai_config.json"
MODEL_NAME = "model.onnx"
# model.type that genai 0.18 accepts and that equal a config.json's model_type; others are
# refused with "Unsupported model_type", but run as the generic `decoder`.
_TYPES = frozenset(
    {
        *("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral"),
        *("nemotron", "olmo", "phi3", "qwen2", "qwen3", "smollm3"),
    }
)
_GENERIC_TYPE = "decoder"
_SHARE_BUFFER = "past_present_share_buffer"
_NEEDED_KEYS = ("hidden_size", "num_attention_heads", "vocab_size")


@dataclasses.dataclass(frozen=True)
class _Cache:
    """Name patterns ("past_key_values.%d.key") of the KV cache and its sizes."""

    past_key: str
    past_value: str
    present_key: str
    present_value: str
    layers: int
    heads: int | None
    head_size: int | None


def write_genai_config(folder: Path, source: SourceModel, progress: Progress) -> Path | None:
    """Write genai_config.json for `folder / "model.onnx"`, from config.json and the graph.

    A source that has one keeps it, but for the file name and `past_present_share_buffer`: fusing
    attention changes what the graph can do.

    Returns:
        The file, or None where genai cannot run the model (a note says why).

    Raises:
        PackageError: A config of the source that is not JSON.
    """
    given = source.companion(CONFIG_NAME)
    if given is not None:
        content = _read_json(given)
        content["model"]["decoder"]["filename"] = MODEL_NAME
        graph = load_model(folder / MODEL_NAME).graph
        content.setdefault("search", {})[_SHARE_BUFFER] = can_share_cache(graph)
        return _write_json(folder / CONFIG_NAME, content)
    config_path = source.companion("config.json")
    if config_path is None:
        progress.note("no genai_config.json: the source has no config.json")
        return None
    config = _read_json(config_path)
    config = {**config, **config.get("text_config", {})}
    missing = [key for key in _NEEDED_KEYS if config.get(key) is None]
    if missing:
        progress.note(f"no genai_config.json: {config_path} lacks {', '.join(missing)}")
        return None
    model = load_model(folder / MODEL_NAME)
    cache = _find_cache(model.graph)
    names = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
    if cache is None or not {"input_ids", "logits"} <= names:
        progress.note(
            "no genai_config.json: onnxruntime-genai needs input_ids, logits and a KV cache"
        )
        return None
    generation_path = source.companion("generation_config.json")
    generation = {} if generation_path is None else _read_json(generation_path)
    content = {
        "model": _model_section(config, generation, model.graph, cache),
        "search": _search_section(config, generation, share_buffer=can_share_cache(model.graph)),
    }
    return _write_json(folder / CONFIG_NAME, content)


def _model_section(
    config: Mapping[str, Any], generation: Mapping[str, Any], graph: ir.Graph, cache: _Cache
) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    kind = config.get("model_type")
    eos = _first_of((generation, config), "eos_token_id")
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = _first_of((generation, config), "pad_token_id")
    bos = _first_of((generation, config), "bos_token_id")
    tokens = {
        "bos_token_id": first_eos if bos is None else bos,
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
    }
    return {
        # genai reads a missing id as "there is none", and refuses null.
        **{name: token for name, token in tokens.items() if token is not None},
        "context_length": context_length(config),
        "type": kind if kind in _TYPES else _GENERIC_TYPE,
        "vocab_size": config["vocab_size"],
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL_NAME,
            "head_size": cache.head_size
            or config.get("head_dim")
            or config["hidden_size"] // heads,
            "hidden_size": config["hidden_size"],
            "num_attention_heads": heads,
            "num_key_value_heads": cache.heads or config.get("num_key_value_heads") or heads,
            "num_hidden_layers": cache.layers,
            "inputs": _input_names(graph, cache),
            "outputs": {
                "logits": "logits",
                "present_key_names": cache.present_key,
                "present_value_names": cache.present_value,
            },
        },
    }


def _search_section(
    config: Mapping[str, Any], generation: Mapping[str, Any], *, share_buffer: bool
) -> dict[str, Any]:
    return {
        "do_sample": bool(generation.get("do_sample", False)),
        "max_length": context_length(config),
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        # Sharing writes into the past in place; a graph that concatenates cannot.
        _SHARE_BUFFER: share_buffer,
        "repetition_penalty": generation.get("repetition_penalty") or 1.0,
        "temperature": generation.get("temperature") or 1.0,
        "top_k": generation.get("top_k") or 50,
        "top_p": generation.get("top_p") or 1.0,
    }


def _input_names(graph: ir.Graph, cache: _Cache) -> dict[str, str]:
    present = {value.name for value in graph.inputs}
    names = {n: n for n in ("input_ids", "attention_mask", "position_ids") if n in present}
    return names | {"past_key_names": cache.past_key, "past_value_names": cache.past_value}


def _find_cache(graph: ir.Graph) -> _Cache | None:
    past = _patterns(graph.inputs)
    present = _patterns(graph.outputs)
    if past.keys() != {"key", "value"} or present.keys() != {"key", "value"}:
        return None
    keys = [v for v in graph.inputs if _pattern(v.name or "") == past["key"]]
    shape = keys[0].shape
    return _Cache(
        past_key=past["key"],
        past_value=past["value"],
        present_key=present["key"],
        present_value=present["value"],
        layers=len(keys),
        heads=_static(shape, 1),
        head_size=_static(shape, 3),
    )


def _patterns(values: Sequence[ir.Value]) -> dict[str, str]:
    """Patterns of cache values by "key" and "value"; empty where the names are ambiguous."""
    found: dict[str, set[str]] = {}
    for value in values:
        pattern = _pattern(value.name or "")
        if pattern is None:
            continue
        rest = pattern.replace("key_values", "")  # "past_key_values" is in both
        for kind in ("key", "value"):
            if kind in rest:
                found.setdefault(kind, set()).add(pattern)
    return {kind: patterns.pop() for kind, patterns in found.items() if len(patterns) == 1}


def _pattern(name: str) -> str | None:
    """Name with its one number replaced by %d; None without exactly one number."""
    if "%" in name or len(re.findall(r"\d+", name)) != 1:
        return None
    return re.sub(r"\d+", "%d", name)


def _static(shape: ir.Shape | None, axis: int) -> int | None:
    if shape is None or len(shape) != 4:
        return None
    size = shape[axis]
    return size if isinstance(size, int) else None


def can_share_cache(graph: ir.Graph) -> bool:
    """Whether every past key and value goes straight into the operator that can write in place."""
    past = [value for value in graph.inputs if cache_position(value.name or "") is not None]
    readers = {use.node.op_type for value in past for use in value.uses()}
    return readers == {"GroupQueryAttention"}


def _first_of(configs: Sequence[Mapping[str, Any]], key: str) -> Any:
    return next((c[key] for c in configs if c.get(key) is not None), None)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PackageError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise PackageError(f"{path}: expected a JSON object")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
