"""Graphs of fixed lengths for Qualcomm's compiler: one for prompts, one for single tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from faq_onnx.errors import UnsupportedModelError
from faq_onnx.graph.io import load_model, save_structure
from faq_onnx.passes import (
    FuseNormsPass,
    LiftMatMulNBitsPass,
    ProductSteps,
    QuantizeActivationsPass,
    StaticShapesPass,
    run_passes,
)
from faq_onnx.runtime.feeds import InputKind, cache_position
from faq_onnx.targets.package import replace_model

__all__ = ["DECODE", "PREFILL", "Lengths", "write_graphs"]

PREFILL, DECODE = "prefill", "decode"
MODEL_NAME = "model.onnx"
# QNN's RmsNorm is exact with channels of any size from here on; over 16 channels of a tensor of
# rank 4 the simulator of onnxruntime-qnn 2.7.0 gives numbers that have nothing to do with it.
NARROWEST_NORM = 64


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


def write_graphs(
    folder: Path, work: Path, lengths: Lengths, steps: Mapping[str, ProductSteps] | None = None
) -> dict[str, Path]:
    """Write both graphs beside `folder / "model.onnx"`; all three share one file of weights.

    Args:
        folder: Has the model.
        work: For what is not kept.
        lengths: What the graphs are for.
        steps: Of products between 16-bit activations, by name of the node.

    Returns:
        Paths by graph.

    Raises:
        UnsupportedModelError: A cache without static numbers of heads and channels.
    """
    path = folder / MODEL_NAME
    if not path.with_name(f"{MODEL_NAME}.data").is_file():
        replace_model(load_model(path), path, work, external_data=True)
    found = {}
    for name in (PREFILL, DECODE):
        model = load_model(path)
        shapes = _shapes(model, lengths.tokens(name), lengths.context)
        passes = [
            FuseNormsPass(NARROWEST_NORM),
            LiftMatMulNBitsPass(),
            QuantizeActivationsPass(steps or {}),
            StaticShapesPass(shapes),
        ]
        run_passes(model, passes)
        found[name] = folder / f"{name}.onnx"
        save_structure(model, found[name])
    return found


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
    sizes = [] if value.shape is None else list(value.shape)
    if len(sizes) == 4:
        heads, width = sizes[1], sizes[3]
        if isinstance(heads, int) and isinstance(width, int):
            return (1, heads, past, width)
    raise UnsupportedModelError(
        f"{value.name}: has the shape {value.shape}; QNN needs [batch, heads, past, channels], "
        "with static numbers of heads and channels: export the model with optimum"
    )
