"""Choose the channel scale of every group: AWQ's search, on AWQ's or FAQ's statistic.

What a scale is judged by is the rounding that follows. Nearest rounding is done, as AWQ does it.
GPTQ wants weaker scales, because it makes up for much of what they are there to save. To do it for
every candidate would take long; what it is expected to cost has a formula (`expected_error`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.plan import BlockFormat, GroupPlan, ScaleApplication, SitePlan
from faq_onnx.artifacts.sites import (
    GroupRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
)
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.config import FaqConfig, Method, QuantizeConfig
from faq_onnx.progress import Progress
from faq_onnx.quant.channel_scale import (
    awq_scale,
    exponents,
    fuse_statistics,
    future_layers,
    level_scale,
    share_over_heads,
)
from faq_onnx.quant.expected_error import expected_gptq_error
from faq_onnx.quant.gptq import channel_energies
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.site import SiteMoments
from faq_onnx.quant.threads import map_in_threads
from faq_onnx.quant.uniform import fake_quantize, to_blocks

__all__ = ["GroupChoice", "ScalePlanner", "scaled_groups", "settle_statistic"]

Array = npt.NDArray[np.float32]
Weights = Sequence[tuple[Array, SitePlan]]

# Output channels that stand for a site while exponents are compared: candidates are judged on the
# same rows, so a quarter of them ranks as all do. The winner is confirmed on every row.
SEARCH_ROWS = 256
# Fewest tokens for which scales look at later layers where GPTQ follows the low-bit path. With
# 8,192 FAQ's statistic leaves a little more KL than AWQ's, with 24,576 not (docs/faq.md).
LEAST_FUTURE_TOKENS = 12_288


@dataclasses.dataclass(frozen=True)
class GroupChoice:
    """The decision for one group and its scale, float32 [K] (None = identity)."""

    plan: GroupPlan
    scale: Array | None


def settle_statistic(
    config: QuantizeConfig, stats: CalibrationStats | None, progress: Progress
) -> QuantizeConfig:
    """The wish with AWQ's statistic for FAQ's, where the text is too short for a look ahead.

    This was measured for GPTQ on the low-bit path, so it is done there alone, and not where FAQ
    is asked for by its name, or one of its settings is another than the default.

    Args:
        config: The wish.
        stats: What the scales are chosen on; None changes nothing.
        progress: Told of the change.
    """
    axes = config.axes
    follows = (axes.scales, axes.rounding, axes.path) == ("faq", "gptq", "low-bit")
    named = config.scale.statistic != "method" or config.method is Method.FAQ
    if stats is None or named or config.faq != FaqConfig() or not follows:
        return config
    tokens = stats.manifest.tokens
    if tokens >= LEAST_FUTURE_TOKENS:
        return config
    progress.note(
        f"channel scales from each layer's own activations (AWQ): {tokens:,} tokens are few for "
        f"a look at later layers (FAQ), which wants {LEAST_FUTURE_TOKENS:,}; --scales faq looks "
        "all the same"
    )
    own = config.scale.model_copy(update={"statistic": "awq"})
    return config.model_copy(update={"scale": own})


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
        plans: Format and rounding by site name.
        read_weight: The float weight of a site, float32 [N, K].
    """

    census: ModelCensus
    config: QuantizeConfig
    stats: CalibrationStats
    plans: Mapping[str, SitePlan]
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
        return _absorbable(group, current)

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
        plans = [self.plans[name] for name in group.sites if self.plans[name].format is not None]
        weights = [(self.read_weight(self.census.site(plan.site)), plan) for plan in plans]
        gram, tokens = self.stats.gram(group.name), self.stats.manifest.tokens
        moments = SiteMoments.of_text(gram, tokens, self.config.rounding.shrinkage)
        chosen = _search(weights, self._candidates(group, weights), _Judge(moments))
        if chosen.exponent is None:
            application = ScaleApplication.NONE
        plan = GroupPlan(
            group=group.name,
            application=application,
            exponent=chosen.exponent or 0.0,
            loss_identity=chosen.loss_identity,
            loss=chosen.loss,
        )
        return GroupChoice(plan, chosen.scale)

    def _candidates(self, group: ScaleGroup, weights: Weights) -> list[tuple[float, Array]]:
        """Exponents and their scales, without the identity."""
        statistic = self.statistic(group)
        tried = exponents(self.config.scale.grid_points)
        if all(plan.rounding == "nearest" for _, plan in weights):
            return [(alpha, awq_scale(statistic, alpha)) for alpha in tried if alpha]
        rms = _absorbable(group, _column_rms([weight for weight, _ in weights]))
        return [(alpha, level_scale(statistic, rms, alpha)) for alpha in tried]

    def _cost(self, group: ScaleGroup, application: ScaleApplication) -> float:
        if application is ScaleApplication.NONE:
            return 0.0
        outputs = sum(self.census.site(name).out_features for name in group.sites)
        return outputs * group.in_features**2 / 1e9


@dataclasses.dataclass(frozen=True)
class _Judge:
    """What the rounding of some sites leaves of their outputs' error."""

    moments: SiteMoments

    def __call__(self, weights: Weights, scale: Array) -> float:
        """Sum over the sites of E ||x (Q(W s)/s - W)^T||^2; expected, where Q is GPTQ."""
        return sum(self._of(weight, plan, scale) for weight, plan in weights)

    def _of(self, weight: Array, plan: SitePlan, scale: Array) -> float:
        assert plan.format is not None
        if plan.rounding == "gptq":
            return expected_gptq_error(weight, scale, self._energies, plan.format)
        blocks = to_blocks(weight * scale, plan.format.block_size)
        rounded = fake_quantize(blocks, plan.format, out=blocks)
        delta = rounded.reshape(len(weight), -1)[:, : weight.shape[1]] / scale
        delta -= weight
        return output_energy(delta, self.moments.gram)

    @functools.cached_property
    def _energies(self) -> npt.NDArray[np.floating]:
        return channel_energies(self.moments.shrunk)


@dataclasses.dataclass(frozen=True)
class _Found:
    """What a search found; `exponent` and `scale` are None where the identity is best."""

    exponent: float | None
    scale: Array | None
    loss_identity: float
    loss: float


def _search(weights: Weights, candidates: Sequence[tuple[float, Array]], judge: _Judge) -> _Found:
    """The best candidate on some rows, where it is also better than the identity on all."""
    ones = np.ones(weights[0][0].shape[1], np.float32)
    identity = judge(weights, ones)  # before the threads: what the judge derives is made once
    sample = [(_spread_rows(weight), plan) for weight, plan in weights]
    losses = list(map_in_threads(lambda pair: judge(sample, pair[1]), [(0.0, ones), *candidates]))
    best = int(np.argmin(losses))
    if best > 0:
        exponent, scale = candidates[best - 1]
        loss = judge(weights, scale)
        if loss < identity:
            return _Found(exponent, scale, identity, loss)
    return _Found(None, None, identity, identity)


def _absorbable(group: ScaleGroup, channels: Array) -> Array:
    """The same value for all channels [K] that one row of the group's absorber makes."""
    absorber = group.absorber
    if absorber is None or absorber.repeats == 1 or absorber.head_dim is None:
        return channels
    return share_over_heads(channels, absorber.head_dim, absorber.repeats)


def _column_rms(weights: Sequence[Array]) -> Array:
    """Root mean square of each input channel's weights, over the sites of a group: float32 [K]."""
    energy = sum(np.einsum("nk,nk->k", w, w, dtype=np.float64, optimize=False) for w in weights)
    rows = sum(len(weight) for weight in weights)
    result: Array = np.sqrt(energy / rows).astype(np.float32)
    return result


def _spread_rows(weight: Array) -> Array:
    """At most SEARCH_ROWS rows, evenly spaced."""
    if len(weight) <= SEARCH_ROWS:
        return weight
    picked = np.linspace(0, len(weight) - 1, SEARCH_ROWS).round().astype(np.intp)
    return np.ascontiguousarray(weight[picked])
