"""Symbolic dimensions become numbers, for compilers that want to know every shape.

No decisions here: which value gets which shape is told.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import onnx_ir as ir

from faq_onnx.errors import RewriteError

__all__ = ["StaticShapesPass"]


@dataclasses.dataclass(frozen=True)
class StaticShapesPass(ir.passes.InPlacePass):
    """Give inputs and outputs of the graph the shapes that they will have.

    1. Every input gets a shape without symbols; what is static already must be the same number.
    2. An output that is not named, or not known, keeps what is static of its shape.
    3. Symbols inside of the graph are forgotten: runtimes infer these shapes from the inputs, and
       a stale symbol would contradict them.
    4. Nodes stay as they are. Those that computed with shapes are constant now, and every runtime
       folds them by itself.
    5. A second run changes nothing.

    Attributes:
        shapes: By name of a graph input or output.
    """

    shapes: Mapping[str, tuple[int, ...]]

    def requires(self, model: ir.Model) -> None:
        """Every input has a shape that agrees with what the graph says.

        Raises:
            RewriteError: for the first that has not.
        """
        known = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        strangers = [name for name in self.shapes if name not in known]
        if strangers:
            raise RewriteError(
                f"the graph has no input or output {strangers[0]!r}; it has "
                f"{', '.join(sorted(name for name in known if name))}"
            )
        for value in model.graph.inputs:
            if value.name not in self.shapes and not _is_static(value):
                raise RewriteError(
                    f"input {value.name}: its shape {value.shape} has symbols, and no shape was "
                    "given for it"
                )
        for value in self._named(model):
            _check_agreement(value, self.shapes[value.name or ""])

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Set shapes, forget symbols."""
        modified = False
        for value in self._named(model):
            wanted = ir.Shape(self.shapes[value.name or ""])
            modified = modified or value.shape != wanted
            value.shape = wanted
        for value in _inner_values(model):
            if value.shape is not None and not _is_static(value):
                value.shape = None
                modified = True
        return ir.passes.PassResult(model, modified)

    def ensures(self, model: ir.Model) -> None:
        """Every input is static.

        Raises:
            RewriteError: for the first that is not; a bug in the pass.
        """
        for value in model.graph.inputs:
            if not _is_static(value):
                raise RewriteError(f"input {value.name} kept {value.shape}: a bug in the pass")

    def _named(self, model: ir.Model) -> Iterator[ir.Value]:
        values = (*model.graph.inputs, *model.graph.outputs)
        return (value for value in values if value.name in self.shapes)


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(size, int) for size in value.shape)


def _inner_values(model: ir.Model) -> Iterator[ir.Value]:
    outputs = set(model.graph.outputs)
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from (value for value in node.outputs if value not in outputs)


def _check_agreement(value: ir.Value, wanted: tuple[int, ...]) -> None:
    if value.shape is None:
        return
    found = list(value.shape)
    agree = len(found) == len(wanted) and all(
        not isinstance(size, int) or size == number
        for size, number in zip(found, wanted, strict=True)
    )
    if not agree:
        raise RewriteError(
            f"{value.name}: has the shape {value.shape}, which cannot become {list(wanted)}; "
            "export the model with dynamic lengths"
        )
