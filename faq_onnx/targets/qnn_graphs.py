"""Graphs of fixed lengths for Qualcomm's compiler: one for prompts, one for single tokens."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import onnx_ir as ir

from faq_onnx.artifacts.target import Refusal
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.graph.io import load_model, save_model, save_structure
from faq_onnx.passes import FuseNormsPass, StaticShapesPass, run_passes
from faq_onnx.runtime.feeds import InputKind, cache_position

__all__ = ["DECODE", "PREFILL", "Lengths", "graph_refusals", "write_graphs"]

PREFILL, DECODE = "prefill", "decode"
MODEL_NAME = "model.onnx"
# QNN's RmsNorm is exact with channels of any size from here on; over 16 channels of a tensor of
# rank 4 the simulator of onnxruntime-qnn 2.7.0 gives numbers that have nothing to do with it.
NARROWEST_NORM = 64
_NEEDED = (InputKind.TOKENS, InputKind.MASK, InputKind.POSITIONS)
_AGAIN = "export the model with optimum (`faq-onnx export`)"
# Measured with onnxruntime-qnn 2.7.0: these nodes go to the CPU, or fail.
_OPERATORS = {
    "GroupQueryAttention": "convert or package again with --no-fuse-attention",
    "MultiHeadAttention": _AGAIN,
    "Attention": _AGAIN,
    "RotaryEmbedding": _AGAIN,
    "SkipSimplifiedLayerNormalization": _AGAIN,
    "SkipLayerNormalization": _AGAIN,
    "GatherND": _AGAIN,
    "GatherBlockQuantized": "convert again with --embedding keep",
    "DequantizeLinear": "convert the float model with --target qnn",
    "If": "export the decoder without a branch for the first token (optimum: not merged)",
    "Loop": _AGAIN,
    "Scan": _AGAIN,
}
_MICROSOFT_ONLY = {"Attention", "RotaryEmbedding"}  # those of ai.onnx run, without a cache


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What the graphs are compiled for.

    Attributes:
        prompt_tokens: Read at once by the prefill graph.
        context: Cached and new tokens together, in both graphs.
    """

    prompt_tokens: int
    context: int

    def tokens(self, graph: str) -> int:
        """Tokens that a graph reads."""
        return self.prompt_tokens if graph == PREFILL else 1


def graph_refusals(model: ir.Model) -> tuple[Refusal, ...]:
    """What of a graph, its weights apart, does not run on the NPU."""
    found = []
    names = {value.name for value in model.graph.inputs}
    missing = [str(kind) for kind in _NEEDED if kind not in names]
    if missing:
        found.append(
            Refusal(
                place="the model",
                found=f"inputs {', '.join(sorted(str(name) for name in names))}",
                allowed=f"a decoder that also has {', '.join(missing)}: in a graph of fixed "
                "lengths nothing else says which slots of the cache are filled",
                way_out=_AGAIN,
            )
        )
    nodes = [node for node in model.graph.all_nodes() if _is_refused(node)]
    counts = Counter(node.op_type for node in nodes)
    for op_type, count in counts.items():
        first = next(node for node in nodes if node.op_type == op_type)
        more = f" (and {count - 1} more)" if count > 1 else ""
        found.append(
            Refusal(
                place=f"{first.name or first.outputs[0].name}{more}",
                found=f"operator {op_type}",
                allowed="operators that QNN takes",
                way_out=_OPERATORS[op_type],
            )
        )
    return tuple(found)


def write_graphs(folder: Path, work: Path, lengths: Lengths) -> dict[str, Path]:
    """Write both graphs beside `folder / "model.onnx"`; all three share one file of weights.

    Returns:
        Paths by graph.

    Raises:
        UnsupportedModelError: A cache without static numbers of heads and channels.
    """
    path = folder / MODEL_NAME
    if not path.with_name(f"{MODEL_NAME}.data").is_file():
        moved = work / "external"
        moved.mkdir(parents=True, exist_ok=True)
        save_model(load_model(path), moved / MODEL_NAME, external_data=True)
        for each in moved.iterdir():
            shutil.move(each, folder / each.name)
    found = {}
    for name in (PREFILL, DECODE):
        model = load_model(path)
        shapes = _shapes(model, lengths.tokens(name), lengths.context)
        run_passes(model, [FuseNormsPass(NARROWEST_NORM), StaticShapesPass(shapes)])
        found[name] = folder / f"{name}.onnx"
        save_structure(model, found[name])
    return found


def _is_refused(node: ir.Node) -> bool:
    if node.op_type not in _OPERATORS:
        return False
    if node.op_type == "Attention" and len(node.inputs) > 4:
        return True  # with a cache
    return node.op_type not in _MICROSOFT_ONLY or node.domain == "com.microsoft"


def _shapes(model: ir.Model, tokens: int, context: int) -> dict[str, tuple[int, ...]]:
    """Shapes of inputs and outputs, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if cache_position(name) is not None:
            found[name] = _cache_shape(value, context - tokens)
        else:
            found[name] = (1, context if name == InputKind.MASK else tokens)
    heads = {cache_position(name): shape for name, shape in found.items()}
    for value in model.graph.outputs:
        position = cache_position(str(value.name))
        if position is not None:
            _, count, _, width = heads[position]
            found[str(value.name)] = (1, count, context, width)
    return found


def _cache_shape(value: ir.Value, past: int) -> tuple[int, ...]:
    shape = value.shape
    if shape is None or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        raise UnsupportedModelError(
            f"{value.name}: has the shape {shape}; QNN needs [batch, heads, past, channels] with "
            f"static numbers of heads and channels: {_AGAIN}"
        )
    return (1, int(shape[1]), past, int(shape[3]))
