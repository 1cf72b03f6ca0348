"""What attention makes of the outputs of q, k and v, as the metrics that BoA rounds by.

BoA (arXiv 2406.13474) eq. 9 and 11; algorithms.md 3.1; formulas in `quant.head_grams`. Attention
is seen where a graph computes it step by step: scores = q k^T, Softmax, weights times values.
What lies between the projections and the scores is not parsed but measured: it must be a rotation
of channel pairs that depends on the position alone, or q and k are declined (norms of q and k).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.sites import AbsorberKind, GroupRole, LinearRole, ModelCensus, ScaleGroup
from faq_onnx.quant.head_grams import (
    Rotary,
    attended_gram,
    fit_rotary,
    head_covariance,
    is_rotated,
    key_metric,
    query_metric,
)

__all__ = ["ATTENDED_TOKENS", "Attended", "AttentionMoments", "AttentionSites", "attention_sites"]

ATTENDED_TOKENS = 8192  # attention's products cost as much for these as all others for many more

# What may stand between attention's last product and o_proj, and between the scores and Softmax.
_KEEPS_NUMBERS = frozenset({"Reshape", "Transpose", "Cast", "Identity"})
_AFTER_SOFTMAX = frozenset({"Where", "Cast", "Identity"})
_SCORE_STEPS = frozenset({"Add", "Where", "Cast", "Identity", "Mul", "Div"})

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class AttentionSites:
    """One attention, from its projections to its weights.

    Attributes:
        v: Site that projects values and nothing else.
        q: Site that projects queries, if k is known too; else both are None.
        k: Site that projects keys.
        outputs: Values behind q and k (and their biases), [B, S, heads * d], or B and S joined.
        operands: The factors of the scores, [B, heads, S, d] and [B, heads, d, S].
        weights: Value of the attention weights, [B, heads, S, S].
        repeats: Query heads that read one value head.
    """

    v: str
    q: str | None
    k: str | None
    outputs: tuple[str, ...]
    operands: tuple[str, ...]
    weights: str
    repeats: int

    @property
    def values(self) -> tuple[str, ...]:
        """All values that have to be computed."""
        return (self.weights, *self.outputs, *self.operands)


@dataclasses.dataclass(frozen=True)
class AttentionMoments:
    """How errors of attention's projections count; by site.

    Attributes:
        inputs: H_in of v: E[(A_h x)^T (A_h x)], float32 [kv_heads, K, K].
        rows: H_out of q and k, float64 [heads, d, d].
    """

    inputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Doubles] = dataclasses.field(default_factory=dict)


def attention_sites(
    census: ModelCensus, values: Mapping[str, ir.Value], group: ScaleGroup
) -> AttentionSites | None:
    """The attention that the group's sites project for; None where it cannot be seen."""
    for reader in census.groups:
        absorber = reader.absorber
        if reader.role is not GroupRole.ATTENTION_OUTPUT or absorber is None:
            continue
        if absorber.kind is not AbsorberKind.LINEAR or absorber.site not in group.sites:
            continue
        rows = reader.in_features // absorber.repeats
        product = _back(values[reader.input], _KEEPS_NUMBERS)
        if absorber.row_start or census.site(absorber.site).out_features != rows or not product:
            return None  # packed with queries and keys, or fused
        weights = product.inputs[0]
        if weights is None or weights.name is None:
            return None
        q, k, outputs, operands = _scores(census, values, group, weights)
        return AttentionSites(
            absorber.site, q, k, outputs, operands, weights.name, absorber.repeats
        )
    return None


_Scores = tuple[str | None, str | None, tuple[str, ...], tuple[str, ...]]


def _scores(
    census: ModelCensus, values: Mapping[str, ir.Value], group: ScaleGroup, weights: ir.Value
) -> _Scores:
    """Sites of q and k, the values behind them, the operands of the scores; empty if unclear."""
    sites = [census.site(name) for name in group.sites]
    found = [
        [site for site in sites if site.role is role]
        for role in (LinearRole.Q_PROJ, LinearRole.K_PROJ)
    ]
    softmax = _find(weights, "Softmax", _AFTER_SOFTMAX)
    before = None if softmax is None else softmax.inputs[0]
    product = None if before is None else _find(before, "MatMul", _SCORE_STEPS)
    if product is None or any(len(own) != 1 for own in found):
        return None, None, (), ()
    operands = tuple(str(value.name) for value in product.inputs if value is not None)
    projections = [own[0] for own in found]
    outputs = tuple(_with_bias(values[site.output], site.bias) for site in projections)
    return projections[0].name, projections[1].name, outputs, operands


def _with_bias(output: ir.Value, bias: str | None) -> str:
    """The value behind a site's bias, where it has one in a node of its own."""
    for user, _ in output.uses():
        if bias is not None and bias in {value.name for value in user.inputs if value is not None}:
            return str(user.outputs[0].name)
    return str(output.name)


def _back(value: ir.Value, steps: frozenset[str]) -> ir.Node | None:
    """The MatMul that makes `value`, over nodes that only change its form."""
    return _find(value, "MatMul", steps)


def _find(value: ir.Value, wanted: str, steps: frozenset[str]) -> ir.Node | None:
    """The nearest `wanted` on the way back over `steps`, along the operand that varies."""
    node = value.producer()
    while node is not None and node.op_type != wanted:
        if node.op_type not in steps:
            return None
        ways = [operand for operand in node.inputs if operand is not None and operand.producer()]
        ahead = [way for way in ways if _leads_to(way, wanted, steps)]
        if len(ahead) != 1:
            return None
        node = ahead[0].producer()
    return node


def _leads_to(value: ir.Value, wanted: str, steps: frozenset[str], depth: int = 8) -> bool:
    node = value.producer()
    if node is None or depth == 0:
        return False
    if node.op_type == wanted:
        return True
    return node.op_type in steps and any(
        operand is not None and _leads_to(operand, wanted, steps, depth - 1)
        for operand in node.inputs
    )


@dataclasses.dataclass
class Attended:
    """Running sums over whole sequences of one length.

    Attributes:
        sites: Of the attention.
    """

    sites: AttentionSites
    _inputs: Doubles | None = None
    _queries: Doubles | None = None
    _keys: Doubles | None = None
    _rotary: Rotary | None = None
    _declined: bool = False
    _sequences: int = 0
    _length: int = 0

    def add(self, seen: Mapping[str, Array], inputs: Array) -> None:
        """Add some sequences.

        Args:
            seen: Values of the float path, `sites.values`.
            inputs: What the projections read, [B, S, K].
        """
        for weights, x in zip(seen[self.sites.weights], inputs, strict=True):
            gram = attended_gram(weights, x, len(weights) // self.sites.repeats)
            self._inputs = gram if self._inputs is None else self._inputs + gram
        self._sequences += len(inputs)
        self._length = inputs.shape[1]
        if self.sites.q is not None and not self._declined:
            self._add_scores(seen)

    def _add_scores(self, seen: Mapping[str, Array]) -> None:
        queries, keys = (seen[name] for name in self.sites.operands)
        keys = keys.transpose(0, 1, 3, 2)[:, :: self.sites.repeats]
        if self._rotary is None:
            self._rotary = self._fit(seen, queries, keys)
            self._declined = self._rotary is None
            if self._declined:
                return
        covariances = [
            len(each) * head_covariance(each.transpose(0, 2, 1, 3).reshape(-1, *each.shape[1::2]))
            for each in (queries, keys)
        ]
        self._queries = covariances[0] + (0 if self._queries is None else self._queries)
        self._keys = covariances[1] + (0 if self._keys is None else self._keys)

    def _fit(self, seen: Mapping[str, Array], queries: Array, keys: Array) -> Rotary | None:
        """What turns q, if a rotation explains both operands."""
        before = [
            seen[name].reshape(*after.shape[::2], after.shape[1], -1).transpose(0, 2, 1, 3)
            for after, name in zip((queries, keys), self.sites.outputs, strict=True)
        ]
        rotary = fit_rotary(before[0], queries)
        if rotary is None or not is_rotated(before[1], keys, rotary):
            return None
        return rotary

    def moments(self) -> AttentionMoments:
        """Means over all sequences."""
        assert self._inputs is not None
        inputs = {self.sites.v: (self._inputs / self._sequences).astype(np.float32)}
        q, k = self.sites.q, self.sites.k
        if self._declined or q is None or k is None or self._queries is None or self._keys is None:
            return AttentionMoments(inputs)
        positions = np.arange(self._length)
        keys, queries = self._keys / self._sequences, self._queries / self._sequences
        rows = {
            q: query_metric(keys, positions, self._rotary, len(queries)),
            k: key_metric(queries, positions, self._rotary, len(keys)),
        }
        return AttentionMoments(inputs, rows)
