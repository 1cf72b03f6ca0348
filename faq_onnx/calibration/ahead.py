"""What a group of sites does to the residual stream through the site behind it.

Of an MLP: gate and up reach the hidden activation through elementwise operators, and the stream
by down_proj's weight. The formulas are those of `quant.ahead`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from faq_onnx.artifacts.sites import Absorber, AbsorberKind, LinearSite, ModelCensus, ScaleGroup
from faq_onnx.calibration.paired_moments import halves_of
from faq_onnx.calibration.residual import Residual
from faq_onnx.graph.weights import read_initializer, read_weight
from faq_onnx.quant.ahead import (
    AheadMoments,
    Seen,
    best_strengths,
    stream_change,
    stream_step,
)

__all__ = ["Ahead", "Look", "LookAhead", "find_ahead", "measure_slopes", "stream_metric"]

Array = npt.NDArray[np.float32]

LookAhead = Callable[[Mapping[str, Array]], Mapping[str, Array]]
"""From the weights that a group's sites are to be rounded to, to better ones."""

# Strengths have one number a site to find: few tokens tell it.
STRENGTH_TOKENS = 16_384
# Groups of readers that say what errors of the stream count: those of the next layer.
READERS_AHEAD = 2
# Half the distance of the outputs by which slopes are found: small for the bends of activation
# functions, large for the last digit of a float16.
STEP = 2.0**-4

# fmt: off
_ELEMENTWISE = frozenset({
    "Add", "BiasGelu", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "FastGelu", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min", "Mish", "Mul", "Neg",
    "Pow", "QuickGelu", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Sub",
    "Swish", "Tanh",
})
# fmt: on


@dataclasses.dataclass(frozen=True)
class Ahead:
    """The one site behind a group, reached through elementwise operators alone.

    Attributes:
        site: Its name.
        hidden: What it reads, [..., N].
        outputs: What sites of the group give, by their names, each [..., N].
        residual: Where the site behind joins the residual stream.
        readers: Groups behind that read the stream through a norm.
    """

    site: str
    hidden: str
    outputs: Mapping[str, str]
    residual: Residual
    readers: tuple[ScaleGroup, ...]


def find_ahead(
    census: ModelCensus,
    values: Mapping[str, ir.Value],
    groups: Sequence[ScaleGroup],
    group: ScaleGroup,
    residual_of: Callable[[LinearSite], Residual | None],
) -> Ahead | None:
    """What lies ahead of a group; None where it is not clear.

    Args:
        census: Of the model.
        values: Of its graph, by name.
        groups: All, in graph order.
        group: One of them.
        residual_of: Where a site joins the residual stream.
    """
    sites = {census.site(name).output: name for name in group.sites}
    for number, behind in enumerate(groups):
        hidden = values[behind.input]
        found = _reached(hidden, sites.keys())
        if behind.name == group.name or not found or len(behind.sites) != 1:
            continue
        outputs = {sites[output]: output for output in sorted(found)}
        if any(census.site(name).out_features != behind.in_features for name in outputs):
            return None
        site = census.site(behind.sites[0])
        residual = residual_of(site)
        if residual is None or hidden.name is None:
            return None
        later = [
            reader
            for reader in groups[number + 1 :]
            if _gain(reader.absorber) and reader.in_features == site.out_features
        ]
        return Ahead(site.name, hidden.name, outputs, residual, tuple(later[:READERS_AHEAD]))
    return None


def _reached(hidden: ir.Value, outputs: Iterable[str]) -> set[str]:
    """Those of `outputs` that `hidden` is an elementwise function of; empty if of more."""
    wanted, found = set(outputs), set[str]()
    waiting, known = [hidden], {hidden}
    while waiting:
        value = waiting.pop()
        if value.name in wanted:
            found.add(value.name)
            continue
        if value.const_value is not None:
            if value.const_value.size > 1 and len(value.const_value.shape) > 1:
                return set()
            continue
        node = value.producer()
        if node is None or (node.op_type != "Constant" and node.op_type not in _ELEMENTWISE):
            return set()
        fresh = {operand for operand in node.inputs if operand is not None} - known
        waiting += fresh
        known |= fresh
    return found


def _gain(absorber: Absorber | None) -> str | None:
    """The initializer that holds a norm's gain."""
    if absorber is None or absorber.kind is not AbsorberKind.NORM:
        return None
    return absorber.initializer


def stream_metric(model: ir.Model, census: ModelCensus, readers: Iterable[ScaleGroup]) -> Array:
    """c: how the readers ahead weigh the channels of the stream, float32 [D]; empty: alike.

    Of a reader W behind a norm with gain g, c^2 is the diagonal of diag(g) W^T W diag(g).
    """
    total = np.zeros(0)
    for group in readers:
        absorber, gain = group.absorber, _gain(group.absorber)
        assert absorber is not None
        assert gain is not None
        gains = read_initializer(model, gain).astype(np.float64) + absorber.offset
        for name in group.sites:
            weight = read_weight(model, census.site(name)).astype(np.float64)
            own = np.square(gains) * np.square(weight).sum(axis=0)
            total = own if total.size == 0 else total + own
    return np.sqrt(total / (total.mean() if total.size else 1)).astype(np.float32)


def measure_slopes(
    session: ort.InferenceSession,
    hidden: str,
    outputs: Mapping[str, npt.NDArray[np.generic]],
    moved: Mapping[str, str],
) -> dict[str, Array]:
    """Derivatives of the hidden activation by outputs of sites, element by element, by site.

    Args:
        session: Computes `hidden` from `outputs`.
        hidden: Value name.
        outputs: What the sites gave, by value name.
        moved: Value names of the outputs whose slopes are wanted, by site.
    """
    slopes = {}
    for site, name in moved.items():
        array = outputs[name]
        step = np.asarray(STEP, array.dtype)
        ends = [session.run([hidden], {**outputs, name: array + way})[0] for way in (step, -step)]
        ahead, back = (np.asarray(end, np.float32) for end in ends)
        slopes[site] = (ahead - back) / np.float32(2 * STEP)
    return slopes


@dataclasses.dataclass(frozen=True)
class Look:
    """Looks ahead of one group.

    Attributes:
        grams: E[x^T x] of the group on two halves of the tokens, float32 [K, K].
        batches: How many there are.
        observe: With weights for the group's sites: what each batch shows, by its number.
    """

    grams: tuple[Array, Array]
    batches: int
    observe: Callable[[Mapping[str, Array]], Callable[[int], Seen]]

    def __call__(self, targets: Mapping[str, Array]) -> dict[str, Array]:
        """The targets, moved to bring the stream back."""
        see = self.observe(targets)
        halves = AheadMoments(), AheadMoments()
        weight = np.zeros((0, 0), np.float32)
        for number in range(self.batches):
            for half, seen in zip(halves, self._by_half(see, number), strict=True):
                half.add(seen)
                weight = seen.weight
        asked = [stream_step(h, g, weight) for h, g in zip(halves, self.grams, strict=True)]
        strengths = self._strengths(see, asked)
        gram = (self.grams[0] + self.grams[1]) / np.float32(2)
        steps = stream_step(halves[0].plus(halves[1]), gram, weight)
        moved = {name: targets[name] + np.float32(strengths[name]) * steps[name] for name in steps}
        return {**targets, **moved}

    def _by_half(self, see: Callable[[int], Seen], number: int) -> tuple[Seen, Seen]:
        """What a batch shows to each half of the tokens."""
        seen = see(number)
        one, other = halves_of(len(seen.inputs), number, self.batches)
        return seen.of(one), seen.of(other)

    def _strengths(
        self, see: Callable[[int], Seen], asked: Sequence[Mapping[str, Array]]
    ) -> dict[str, float]:
        """How far to go along each site's step, by what one half's does for the other half."""
        names = list(asked[0])
        slope, curvature = np.zeros(len(names)), np.zeros((len(names), len(names)))
        tokens = 0
        for number in self._some_batches():
            halves = self._by_half(see, number)
            for seen, steps in zip(halves, reversed(asked), strict=True):
                changes = [stream_change(seen, steps[name], name) for name in names]
                slope += [float(np.vdot(change, seen.missing)) for change in changes]
                curvature += [[float(np.vdot(one, two)) for two in changes] for one in changes]
                tokens += len(seen.inputs)
            if tokens >= STRENGTH_TOKENS:
                break
        return dict(zip(names, best_strengths(slope, curvature), strict=True))

    def _some_batches(self) -> list[int]:
        """All, far ones first: an even spread however many are taken, of both halves in turn."""
        stride = max(1, self.batches // 8) | 1  # odd: halves take turns
        return [n for start in range(stride) for n in range(start, self.batches, stride)]
