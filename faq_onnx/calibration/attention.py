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
class ScoreSites:
    """The projections behind the scores.

    Attributes:
        q: Site that projects queries.
        k: Site that projects keys.
        outputs: Values behind q and k (and their biases), [B, S, heads * d], or B and S joined.
        operands: The factors of the scores, [B, heads, S, d] and [B, heads, d, S].
    """

    q: str
    k: str
    outputs: tuple[str, str]
    operands: tuple[str, str]


@dataclasses.dataclass(frozen=True)
class AttentionSites:
    """One attention, from its projections to its weights.

    Attributes:
        v: Site that projects values and nothing else.
        weights: Value of the attention weights, [B, heads, S, S].
        repeats: Query heads that read one value head.
        scores: None where the way to the projections of queries and keys is unclear.
    """

    v: str
    weights: str
    repeats: int
    scores: ScoreSites | None

    @property
    def values(self) -> tuple[str, ...]:
        """All values that have to be computed."""
        if self.scores is None:
            return (self.weights,)
        return (self.weights, *self.scores.outputs, *self.scores.operands)


@dataclasses.dataclass(frozen=True)
class AttentionMoments:
    """How errors of attention's projections count; by site.

    Attributes:
        inputs: H_in of v: E[(A_h x)^T (A_h x)], float32 [kv_heads, K, K].
        rows: H_out of q and k, float64 [heads, d, d].
        tokens: That the means are over.
    """

    inputs: Mapping[str, Array] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, Doubles] = dataclasses.field(default_factory=dict)
    tokens: int = 0


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
        product = _find(values[reader.input], "MatMul", _KEEPS_NUMBERS)
        if absorber.row_start or census.site(absorber.site).out_features != rows or not product:
            return None  # packed with queries and keys, or fused
        weights = product.inputs[0]
        if weights is None or weights.name is None:
            return None
        scores = _scores(census, values, group, weights)
        return AttentionSites(absorber.site, weights.name, absorber.repeats, scores)
    return None


def _scores(
    census: ModelCensus, values: Mapping[str, ir.Value], group: ScaleGroup, weights: ir.Value
) -> ScoreSites | None:
    softmax = _find(weights, "Softmax", _AFTER_SOFTMAX)
    before = None if softmax is None else softmax.inputs[0]
    product = None if before is None else _find(before, "MatMul", _SCORE_STEPS)
    sites = [census.site(name) for name in group.sites]
    queries = [site for site in sites if site.role is LinearRole.Q_PROJ]
    keys = [site for site in sites if site.role is LinearRole.K_PROJ]
    if product is None or len(queries) != 1 or len(keys) != 1:
        return None
    (q,), (k,) = queries, keys
    left, right = (str(value.name) for value in product.inputs if value is not None)
    outputs = (_with_bias(values[q.output], q.bias), _with_bias(values[k.output], k.bias))
    return ScoreSites(q.name, k.name, outputs, (left, right))


def _with_bias(output: ir.Value, bias: str | None) -> str:
    """The value behind a site's bias, where it has one in a node of its own."""
    for user, _ in output.uses():
        if bias is not None and bias in {value.name for value in user.inputs if value is not None}:
            return str(user.outputs[0].name)
    return str(output.name)


def _find(value: ir.Value, wanted: str, steps: frozenset[str], depth: int = 8) -> ir.Node | None:
    """The one `wanted` on the ways back over `steps`; None where there is none, or several."""
    node = value.producer()
    if node is None or node.op_type == wanted:
        return node
    if node.op_type not in steps or depth == 0:
        return None
    ways = [_find(way, wanted, steps, depth - 1) for way in node.inputs if way is not None]
    found = [way for way in ways if way is not None]
    return found[0] if len(found) == 1 else None


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
        is_first = self._sequences == 0
        self._sequences += len(inputs)
        self._length = inputs.shape[1]
        if self.sites.scores is not None:
            self._add_scores(self.sites.scores, seen, is_first=is_first)

    def _add_scores(self, sites: ScoreSites, seen: Mapping[str, Array], *, is_first: bool) -> None:
        queries, keys = (seen[name] for name in sites.operands)
        keys = keys.transpose(0, 1, 3, 2)[:, :: self.sites.repeats]
        if is_first:
            self._rotary = _fit(sites, seen, queries, keys)
        if self._rotary is None:
            return  # declined by the first sequences
        covariances = [
            len(each) * head_covariance(each.transpose(0, 2, 1, 3).reshape(-1, *each.shape[1::2]))
            for each in (queries, keys)
        ]
        self._queries = covariances[0] + (0 if self._queries is None else self._queries)
        self._keys = covariances[1] + (0 if self._keys is None else self._keys)

    def moments(self) -> AttentionMoments:
        """Means over all sequences."""
        assert self._inputs is not None
        inputs = {self.sites.v: (self._inputs / self._sequences).astype(np.float32)}
        scores = self.sites.scores
        tokens = self._sequences * self._length
        if scores is None or self._queries is None or self._keys is None:
            return AttentionMoments(inputs, tokens=tokens)
        positions = np.arange(self._length)
        keys, queries = self._keys / self._sequences, self._queries / self._sequences
        rows = {
            scores.q: query_metric(keys, positions, self._rotary, len(queries)),
            scores.k: key_metric(queries, positions, self._rotary, len(keys)),
        }
        return AttentionMoments(inputs, rows, tokens)


def _fit(
    sites: ScoreSites, seen: Mapping[str, Array], queries: Array, keys: Array
) -> Rotary | None:
    """What turns q, if a rotation explains both operands, [B, heads, S, d]."""
    before = [
        seen[name].reshape(*after.shape[::2], after.shape[1], -1).transpose(0, 2, 1, 3)
        for after, name in zip((queries, keys), sites.outputs, strict=True)
    ]
    rotary = fit_rotary(before[0], queries)
    if rotary is None or not is_rotated(before[1], keys, rotary):
        return None
    return rotary
