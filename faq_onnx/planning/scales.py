"""Choose the channel scale of every group: AWQ's search, on AWQ's or FAQ's statistic."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat, GroupPlan, ScaleApplication
from faq_onnx.artifacts.sites import (
    GroupRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
)
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.config import QuantizeConfig
from faq_onnx.progress import Progress
from faq_onnx.quant.channel_scale import (
    awq_scale,
    exponents,
    fuse_statistics,
    future_layers,
    share_over_heads,
)
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.threads import map_in_threads
from faq_onnx.quant.uniform import fake_quantize, to_blocks

__all__ = ["GroupChoice", "ScalePlanner", "scaled_groups"]

Array = npt.NDArray[np.float32]

# Output channels that stand for a site while exponents are compared: candidates are judged on the
# same rows, so a quarter of them ranks as all do. The winner is confirmed on every row.
SEARCH_ROWS = 256


@dataclasses.dataclass(frozen=True)
class GroupChoice:
    """The decision for one group and its scale, float32 [K] (None = identity)."""

    plan: GroupPlan
    scale: Array | None


def scaled_groups(
    census: ModelCensus,
    config: QuantizeConfig,
    formats: Mapping[str, BlockFormat | None],
    shared: Collection[str] = (),
) -> dict[str, ScaleApplication]:
    """How each group could be scaled, by group name.

    A group is left alone when its weights must not change (`shared`: an embedding reads them,
    too), when nobody can absorb the inverse, or when it is an 8-bit head (nothing to win there).
    """
    return {
        group.name: ScaleApplication.NONE
        if any(site in shared for site in group.sites)
        else _application(group, config, formats)
        for group in census.groups
    }


def _application(
    group: ScaleGroup, config: QuantizeConfig, formats: Mapping[str, BlockFormat | None]
) -> ScaleApplication:
    found = [formats[site] for site in group.sites]
    low_bit = [fmt for fmt in found if fmt is not None]
    if config.axes.scales == "none" or not low_bit or not group.scalable:
        return ScaleApplication.NONE
    if group.role is GroupRole.LM_HEAD_INPUT and min(f.code_bits for f in low_bit) >= 8:
        return ScaleApplication.NONE
    absorber = group.absorber
    if absorber is None:
        return ScaleApplication.MUL if config.scale.insert_mul else ScaleApplication.NONE
    if absorber.repeats > 1 and not config.scale.share_heads:
        return ScaleApplication.NONE
    return ScaleApplication.FOLD


@dataclasses.dataclass(frozen=True)
class ScalePlanner:
    """Searches scales group by group.

    Attributes:
        census: Of the model.
        config: Method and search settings.
        stats: Calibration statistics.
        formats: Block format by site name.
        read_weight: The float weight of a site, float32 [N, K].
    """

    census: ModelCensus
    config: QuantizeConfig
    stats: CalibrationStats
    formats: Mapping[str, BlockFormat | None]
    read_weight: Callable[[LinearSite], Array]

    def choose(
        self, applications: Mapping[str, ScaleApplication], progress: Progress
    ) -> list[GroupChoice]:
        """Decide for every group, in census order; `applications` from `scaled_groups`."""
        cost = {g.name: self._cost(g, applications[g.name]) for g in self.census.groups}
        total = sum(cost.values())
        if not total:
            return [self._choose(group, ScaleApplication.NONE) for group in self.census.groups]
        choices = []
        with progress.stage("choose scales", total, "steps") as advance:
            for group in self.census.groups:
                choices.append(self._choose(group, applications[group.name]))
                advance(cost[group.name])
        return choices

    def statistic(self, group: ScaleGroup) -> Array:
        """What the scale is a power of: mean |x|, fused with later layers under FAQ."""
        current = self.stats.mean_abs(group.name)
        looks_ahead = self.config.axes.scales == "faq"
        if looks_ahead and group.role.value in self.config.faq.roles:
            current = fuse_statistics(current, self._future(group), self.config.faq)
        absorber = group.absorber
        if absorber is not None and absorber.repeats > 1 and absorber.head_dim is not None:
            current = share_over_heads(current, absorber.head_dim, absorber.repeats)
        return current

    def _future(self, group: ScaleGroup) -> list[Array]:
        if group.layer_index is None:
            return []
        ahead = future_layers(group.layer_index, self.census.layer_count, self.config.faq)
        peers = {
            other.layer_index: other
            for other in self.census.groups
            if other.role is group.role and other.in_features == group.in_features
        }
        return [self.stats.mean_abs(peers[i].name) for i in ahead if i in peers]

    def _choose(self, group: ScaleGroup, application: ScaleApplication) -> GroupChoice:
        if application is ScaleApplication.NONE:
            return GroupChoice(GroupPlan(group=group.name, application=application), None)
        statistic = self.statistic(group)
        gram = self.stats.gram(group.name)
        sites = [self.census.site(name) for name in group.sites]
        weights = [(self.read_weight(s), f) for s in sites if (f := self.formats[s.name])]
        exponent, identity, best = _search(
            weights, gram, statistic, exponents(self.config.scale.grid_points)
        )
        if exponent == 0:
            application = ScaleApplication.NONE
        plan = GroupPlan(
            group=group.name,
            application=application,
            exponent=exponent,
            loss_identity=identity,
            loss=best,
        )
        return GroupChoice(plan, awq_scale(statistic, exponent) if exponent else None)

    def _cost(self, group: ScaleGroup, application: ScaleApplication) -> float:
        if application is ScaleApplication.NONE:
            return 0.0
        outputs = sum(self.census.site(name).out_features for name in group.sites)
        return outputs * group.in_features**2 / 1e9


def _search(
    weights: Sequence[tuple[Array, BlockFormat]],
    gram: Array,
    statistic: Array,
    candidates: Sequence[float],
) -> tuple[float, float, float]:
    """The best exponent, the loss of the identity and the loss of the best, over all rows."""
    sample = [(_spread_rows(weight), fmt) for weight, fmt in weights]

    def loss(exponent: float) -> float:
        return _group_loss(sample, gram, awq_scale(statistic, exponent))

    losses = list(map_in_threads(loss, candidates))
    exponent = candidates[int(np.argmin(losses))]
    identity = _group_loss(weights, gram, np.ones_like(statistic))
    if exponent == 0:
        return 0.0, identity, identity
    best = _group_loss(weights, gram, awq_scale(statistic, exponent))
    return (exponent, identity, best) if best < identity else (0.0, identity, identity)


def _spread_rows(weight: Array) -> Array:
    """At most SEARCH_ROWS rows, evenly spaced."""
    if len(weight) <= SEARCH_ROWS:
        return weight
    picked = np.linspace(0, len(weight) - 1, SEARCH_ROWS).round().astype(np.intp)
    return np.ascontiguousarray(weight[picked])


def _group_loss(weights: Sequence[tuple[Array, BlockFormat]], gram: Array, scale: Array) -> float:
    """Sum over the sites of E ||x (Q(W s)/s - W)^T||^2."""
    total = 0.0
    for weight, fmt in weights:
        scaled = weight * scale
        blocks = to_blocks(scaled, fmt.block_size)
        rounded = fake_quantize(blocks, fmt, out=blocks)
        delta = rounded.reshape(len(weight), -1)[:, : weight.shape[1]] / scale
        delta -= weight
        total += output_energy(delta, gram)
    return total
