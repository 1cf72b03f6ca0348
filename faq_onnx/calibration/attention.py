"""What attention makes of the activation that its values are projected from.

The output of value head g is a sum over query heads h of A_h x W^T: an error dW of the projection
counts through E[(A_h x)^T (A_h x)], and not through E[x^T x] (BoA, arXiv 2406.13474, eq. 11;
algorithms.md 3.1). Attention averages over tokens, so the two are far apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.sites import AbsorberKind, GroupRole, ModelCensus, ScaleGroup
from faq_onnx.quant.head_grams import attended_gram

__all__ = ["ATTENDED_TOKENS", "Attended", "ValueSite", "value_sites"]

ATTENDED_TOKENS = 8192  # attention's products cost as much for these as all others for many more

# What may stand between attention's last product and o_proj.
_KEEPS_NUMBERS = frozenset({"Reshape", "Transpose", "Cast", "Identity"})

Array = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class ValueSite:
    """A projection of values whose attention weights the graph computes.

    Attributes:
        site: Name.
        attention: Value of the attention weights, [B, heads, S, S].
        repeats: Query heads that read one value head.
    """

    site: str
    attention: str
    repeats: int


def value_sites(
    census: ModelCensus, values: Mapping[str, ir.Value], group: ScaleGroup
) -> list[ValueSite]:
    """Those of the group's sites that only project values; none behind a fused attention."""
    found = []
    for reader in census.groups:
        absorber = reader.absorber
        if reader.role is not GroupRole.ATTENTION_OUTPUT or absorber is None:
            continue
        if absorber.kind is not AbsorberKind.LINEAR or absorber.site not in group.sites:
            continue
        rows = reader.in_features // absorber.repeats
        if absorber.row_start or census.site(absorber.site).out_features != rows:
            continue  # packed with queries and keys
        weights = _attention_weights(values[reader.input])
        if weights is not None:
            found.append(ValueSite(absorber.site, weights, absorber.repeats))
    return found


def _attention_weights(value: ir.Value) -> str | None:
    """The left operand of the product in front of o_proj; analysis has proved what it is."""
    node = value.producer()
    while node is not None and node.op_type in _KEEPS_NUMBERS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    if node is None or node.op_type != "MatMul" or node.inputs[0] is None:
        return None
    return node.inputs[0].name


@dataclasses.dataclass
class Attended:
    """Running E[(A_h x)^T (A_h x)] of one projection of values, over whole sequences.

    Attributes:
        repeats: Query heads that read one value head.
    """

    repeats: int
    _total: npt.NDArray[np.float64] | None = None
    _sequences: int = 0

    def add(self, attention: Array, inputs: Array) -> None:
        """Add sequences of one length.

        Args:
            attention: [B, heads, S, S], rows sum to 1.
            inputs: [B, S, K].
        """
        for weights, x in zip(attention, inputs, strict=True):
            gram = attended_gram(weights, x, len(weights) // self.repeats)
            self._total = gram if self._total is None else self._total + gram
            self._sequences += 1

    def mean(self) -> Array:
        """float32 [kv_heads, K, K]."""
        assert self._total is not None
        return (self._total / self._sequences).astype(np.float32)
