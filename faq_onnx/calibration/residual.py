"""Where the outputs of o_proj and down_proj join the residual stream."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from faq_onnx.graph.cut import Part

__all__ = ["Residual", "find_residual"]

# Fused additions to the residual stream, and what may stand between one and the site.
_SKIP_NORMS = frozenset({"SkipSimplifiedLayerNormalization", "SkipLayerNormalization"})
_KEEPS_ROWS = frozenset({"Reshape", "Cast", "Identity"})


@dataclasses.dataclass(frozen=True)
class Residual:
    """Where a site's output joins the residual stream.

    Attributes:
        before: The stream in front of the addition.
        after: The stream behind it.
    """

    before: str
    after: str


def find_residual(output: ir.Value, part: Part) -> Residual | None:
    """Where `output` is added to a value that is there before the part runs.

    A bias that is added first is looked through, and what keeps the numbers of each token. None
    where something else comes between (a norm behind the site, as in Gemma 3): then what the site
    should add is not known.
    """
    value = output
    while True:
        users = [node for node, _ in value.uses()]
        if len(users) != 1:
            return None
        (node,) = users
        if node.op_type in _SKIP_NORMS:
            operands, total = _skip_sum(node)
        elif node.op_type == "Add":
            operands, total = list(node.inputs), node.outputs[0]
        elif node.op_type in _KEEPS_ROWS and node.inputs[0] is value:
            value = node.outputs[0]
            continue
        else:
            return None
        others = [operand for operand in operands if operand is not value]
        other = others[0] if len(others) == 1 else None
        if other is None or total is None:
            return None
        if other.name in part.inputs and other.name in part.varying and total.name:
            return Residual(other.name, total.name)
        if other.const_value is None:
            return None
        value = total


def _skip_sum(node: ir.Node) -> tuple[list[ir.Value | None], ir.Value | None]:
    """What a fused addition and norm adds, and the sum where it is an output; no bias of its own.

    SkipLayerNormalization: (input, skip, gamma, beta, bias); the simplified one has no beta.
    """
    gains = 1 if node.op_type == "SkipSimplifiedLayerNormalization" else 2
    has_bias = any(value is not None for value in node.inputs[2 + gains :])
    total = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3].name else None
    return list(node.inputs[:2]), None if has_bias else total
