"""Which groups are scaled and how well; plans on disk."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from faq_onnx.artifacts.plan import GroupPlan, ScaleApplication
from faq_onnx.artifacts.sites import GroupRole, Tie
from faq_onnx.config import FaqConfig, Method, QuantizeConfig, RoundingConfig, ScaleConfig
from faq_onnx.errors import PlanError, StatsMismatchError
from faq_onnx.planning.planner import (
    PlannedModel,
    check_statistics,
    make_plan,
    needs_statistics,
)
from faq_onnx.planning.scales import LEAST_FUTURE_TOKENS
from faq_onnx.progress import Silent
from faq_onnx.quant.channel_scale import awq_scale
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.testing import TinyLlama

Make = Callable[..., Any]
AWQ = QuantizeConfig(
    method=Method.AWQ, scale=ScaleConfig(grid_points=5, share_heads=True), lm_head="4"
)


class Notes(Silent):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def note(self, text: str) -> None:
        """Keep it."""
        self.told.append(text)


def _plan(inputs: Any, config: QuantizeConfig) -> PlannedModel:
    return make_plan(inputs.census, config, inputs.stats, inputs.read)


def _applications(planned: PlannedModel) -> dict[str, ScaleApplication]:
    return {group.group: group.application for group in planned.plan.groups}


def _loss(inputs: Any, group: GroupPlan, scale: np.ndarray) -> float:
    """Output error of a group, worked out again with the packed weights, in float64."""
    found = next(g for g in inputs.census.groups if g.name == group.group)
    gram = inputs.stats.gram(found.name).astype(np.float64)
    total = 0.0
    for name in found.sites:
        weight = inputs.read(inputs.census.site(name))
        packed = quantize_rtn(weight * scale, block_format(4, 32, symmetric=False), np.float32)
        delta = dequantize_weight(packed) / scale.astype(np.float64) - weight
        total += float(np.einsum("ni,ij,nj->", delta, gram, delta))
    return total


@pytest.mark.parametrize("method", [Method.AWQ, Method.FAQ])
def test_a_scale_is_only_taken_if_it_is_better(planned: Make, method: Method) -> None:
    inputs = planned()
    result = _plan(inputs, AWQ.model_copy(update={"method": method}))
    taken = 0
    for group in result.plan.groups:
        assert group.loss is not None
        assert group.loss_identity is not None
        if group.application is ScaleApplication.NONE:
            assert group.group not in result.scales
            assert group.loss == group.loss_identity
            continue
        taken += 1
        scale = result.scales[group.group]
        assert group.loss < group.loss_identity
        # what the search says is what packed weights cost
        assert _loss(inputs, group, scale) == pytest.approx(group.loss, rel=1e-3)
        identity = _loss(inputs, group, np.ones_like(scale))
        assert identity == pytest.approx(group.loss_identity, rel=1e-3)
    assert taken >= 5  # outlier channels make scaling pay almost everywhere


def test_the_best_exponent_is_taken(planned: Make) -> None:
    inputs = planned()
    result = _plan(inputs, AWQ)
    group = next(g for g in result.plan.groups if g.group == "layers.0.attention_input")
    statistic = inputs.stats.mean_abs(group.group)
    losses = {e: _loss(inputs, group, awq_scale(statistic, e)) for e in (0, 0.2, 0.4, 0.6, 0.8)}
    assert group.exponent == pytest.approx(min(losses, key=losses.__getitem__))
    np.testing.assert_array_equal(result.scales[group.group], awq_scale(statistic, group.exponent))


def test_heads_of_one_value_head_share_their_scale(planned: Make) -> None:
    result = _plan(planned(), AWQ)
    scale = result.scales["layers.0.attention_output"].reshape(2, 2, 16)
    np.testing.assert_array_equal(scale[:, 0], scale[:, 1])
    assert len(np.unique(scale)) > 16


def test_without_sharing_heads_o_proj_is_left_alone(planned: Make) -> None:
    config = AWQ.model_copy(update={"scale": ScaleConfig(grid_points=5, share_heads=False)})
    applications = _applications(_plan(planned(), config))
    assert applications["layers.0.attention_output"] is ScaleApplication.NONE
    # heads that nobody shares need no agreement
    alone = _plan(planned(TinyLlama(kv_heads=4)), config)
    assert _applications(alone)["layers.0.attention_output"] is ScaleApplication.FOLD


@pytest.mark.parametrize(("lm_head", "scaled"), [("4", True), ("8", False), ("keep", False)])
def test_an_eight_bit_or_float_head_is_not_scaled(
    planned: Make, lm_head: str, scaled: bool
) -> None:
    config = AWQ.model_copy(update={"lm_head": lm_head})
    found = _applications(_plan(planned(), config))["lm_head_input"]
    assert (found is not ScaleApplication.NONE) is scaled


@pytest.mark.parametrize("tie", [Tie.SHARED, Tie.DUPLICATE])
def test_a_buffer_that_an_embedding_reads_is_not_scaled(planned: Make, tie: Tie) -> None:
    found = _plan(planned(TinyLlama(tie=tie)), AWQ)
    assert _applications(found)["lm_head_input"] is ScaleApplication.NONE
    keeping = _plan(planned(TinyLlama(tie=tie)), AWQ.model_copy(update={"embedding": "keep"}))
    scaled = _applications(keeping)["lm_head_input"] is not ScaleApplication.NONE
    assert scaled is (tie is Tie.DUPLICATE)


def test_a_group_of_excluded_sites_is_left_alone(planned: Make) -> None:
    config = AWQ.model_copy(update={"exclude": ("*down_proj*", "*/layers.1/*/q_proj/*")})
    found = _plan(planned(), config)
    assert _applications(found)["layers.0.mlp_hidden"] is ScaleApplication.NONE
    # k_proj and v_proj still profit; q_proj is scaled with them, in float
    assert _applications(found)["layers.1.attention_input"] is ScaleApplication.FOLD


@pytest.mark.parametrize("insert_mul", [False, True])
def test_without_an_absorber_a_mul_may_serve(planned: Make, insert_mul: bool) -> None:
    inputs = planned()
    groups = [
        group.model_copy(update={"absorber": None, "reason": "test"})
        if group.name == "layers.0.mlp_input"
        else group
        for group in inputs.census.groups
    ]
    census = inputs.census.model_copy(update={"groups": tuple(groups)})
    config = AWQ.model_copy(update={"scale": ScaleConfig(grid_points=5, insert_mul=insert_mul)})
    found = _applications(_plan(dataclasses.replace(inputs, census=census), config))
    expected = ScaleApplication.MUL if insert_mul else ScaleApplication.NONE
    assert found["layers.0.mlp_input"] is expected


def test_faq_with_fusion_one_is_awq_bit_for_bit(planned: Make) -> None:
    inputs = planned(TinyLlama(layers=4))
    awq = _plan(inputs, AWQ)
    config = AWQ.model_copy(update={"method": Method.FAQ, "faq": FaqConfig(fusion=1)})
    faq = _plan(inputs, config)
    assert faq.plan.groups == awq.plan.groups
    assert faq.scales.keys() == awq.scales.keys()
    for name, scale in awq.scales.items():
        assert faq.scales[name].tobytes() == scale.tobytes()


def test_faq_changes_what_looks_ahead_and_only_that(planned: Make) -> None:
    inputs = planned(TinyLlama(layers=3))
    config = AWQ.model_copy(update={"method": Method.FAQ, "faq": FaqConfig(fusion=0.5)})
    awq, faq = _plan(inputs, AWQ), _plan(inputs, config)
    fused = {GroupRole.ATTENTION_INPUT, GroupRole.MLP_INPUT}
    changed = set()
    for group in inputs.census.groups:
        left, right = awq.scales.get(group.name), faq.scales.get(group.name)
        same = (left is None and right is None) or (
            left is not None and right is not None and left.tobytes() == right.tobytes()
        )
        if not same:
            changed.add(group.name)
        if group.role not in fused or group.layer_index == 2:
            assert same, group.name
    assert changed


@pytest.mark.parametrize("method", [Method.RTN, Method.HQQ, Method.K_QUANT])
def test_data_free_methods_need_no_statistics(planned: Make, method: Method) -> None:
    inputs, config = planned(), QuantizeConfig(method=method)
    assert needs_statistics(inputs.census, config) == []
    result = make_plan(inputs.census, config, None, inputs.read)
    assert not result.scales
    assert set(_applications(result).values()) == {ScaleApplication.NONE}


@pytest.mark.parametrize(
    "method", [m for m in Method if m not in {Method.RTN, Method.HQQ, Method.K_QUANT}]
)
def test_other_methods_need_statistics(planned: Make, method: Method) -> None:
    inputs = planned()
    config = QuantizeConfig(method=method)
    with pytest.raises(PlanError, match=f"--method {method} needs calibration statistics"):
        make_plan(inputs.census, config, None, inputs.read)


def test_gptq_needs_statistics_without_scaling_anything(planned: Make) -> None:
    inputs, config = planned(), QuantizeConfig(method=Method.GPTQ)
    names = [group.name for group in inputs.census.groups]
    assert needs_statistics(inputs.census, config) == names[:-1]  # the head has 8 bits
    assert not _plan(inputs, config).scales


def test_scales_can_be_chosen_apart_from_the_method(planned: Make) -> None:
    inputs = planned()
    scaled = ScaleConfig(statistic="awq", grid_points=5, share_heads=True)
    rtn = _plan(inputs, QuantizeConfig(method=Method.RTN, scale=scaled, lm_head="4"))
    awq = _plan(inputs, AWQ)
    assert rtn.plan.groups == awq.plan.groups
    none = AWQ.model_copy(update={"scale": ScaleConfig(statistic="none")})
    assert not _plan(inputs, none).scales


def _with_tokens(inputs: Any, tokens: int) -> Any:
    manifest = inputs.stats.manifest.model_copy(update={"tokens": tokens})
    stats = dataclasses.replace(inputs.stats, manifest=manifest)
    return dataclasses.replace(inputs, stats=stats)


@pytest.mark.parametrize("method", [Method.FAQ_GPTQ, Method.BEST])
def test_a_short_text_does_not_look_ahead(planned: Make, method: Method) -> None:
    """On the low-bit path; the plan keeps the wish and says what was done: scales are AWQ's."""
    inputs = _with_tokens(planned(), LEAST_FUTURE_TOKENS - 1)
    notes = Notes()
    config = QuantizeConfig(method=method)
    short = make_plan(inputs.census, config, inputs.stats, inputs.read, notes)
    named = config.model_copy(update={"scale": ScaleConfig(statistic="awq")})
    awq = _plan(inputs, named).plan
    assert short.plan == awq.model_copy(update={"config": config})
    assert short.plan.channel_scales == "awq"
    assert len(notes.told) == 1
    assert re.search(r"\(AWQ\): 12,287 tokens .* wants 12,288; --scales faq", notes.told[0])

    enough = _with_tokens(inputs, LEAST_FUTURE_TOKENS)
    assert _plan(enough, config).plan.channel_scales == "faq"
    assert any(
        not np.array_equal(scale, short.scales[group])
        for group, scale in _plan(enough, config).scales.items()
    )


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(scale=ScaleConfig(statistic="faq")),
        QuantizeConfig(faq=FaqConfig(window=2)),
        QuantizeConfig(rounding=RoundingConfig(path="float")),
        QuantizeConfig(rounding=RoundingConfig(rounding="nearest")),
        QuantizeConfig(method=Method.FAQ),
        QuantizeConfig(
            method=Method.FAQ, rounding=RoundingConfig(rounding="gptq", path="low-bit")
        ),
        QuantizeConfig(method=Method.RTN),
    ],
    ids=["named", "set", "float path", "nearest", "faq", "faq, walking", "rtn"],
)
def test_other_wishes_are_kept_on_a_short_text(planned: Make, config: QuantizeConfig) -> None:
    inputs = planned()
    notes = Notes()
    made = make_plan(inputs.census, config, inputs.stats, inputs.read, notes)
    assert made.plan.config == config
    assert made.plan.channel_scales == config.axes.scales
    assert notes.told == []


def test_scales_are_judged_by_the_rounding_that_follows(planned: Make) -> None:
    """What GPTQ is expected to leave is another loss, with another choice."""
    inputs = planned()
    scaled = ScaleConfig(statistic="awq", grid_points=5, share_heads=True)
    gptq = _plan(inputs, QuantizeConfig(method=Method.GPTQ, scale=scaled, lm_head="4"))
    for own, nearest in zip(gptq.plan.groups, _plan(inputs, AWQ).plan.groups, strict=True):
        assert own.loss_identity is not None
        assert own.loss is not None
        assert own.loss <= own.loss_identity != nearest.loss_identity


def test_statistics_are_wanted_for_what_is_scaled_or_clipped(planned: Make) -> None:
    census = planned().census
    names = [group.name for group in census.groups]
    assert needs_statistics(census, AWQ) == names
    eight = AWQ.model_copy(update={"lm_head": "8"})
    assert needs_statistics(census, eight) == names[:-1]
    plain = {"scale": ScaleConfig(share_heads=False), "rounding": RoundingConfig(grid="minmax")}
    shares = AWQ.model_copy(update=plain)
    outputs = {"layers.0.attention_output", "layers.1.attention_output"}
    assert set(needs_statistics(census, shares)) == set(names) - outputs
    clips = AWQ.model_copy(update={"scale": ScaleConfig(share_heads=False)})
    assert needs_statistics(census, clips) == names


@pytest.mark.parametrize("method", [Method.AWQ, Method.GPTQ])
def test_grids_and_rounding_are_not_left_without_statistics(planned: Make, method: Method) -> None:
    inputs = planned()
    made = _plan(inputs, QuantizeConfig(method=method)).plan
    check_statistics(made, inputs.census, inputs.stats)
    with pytest.raises(StatsMismatchError, match=r"8 scale groups.*no statistics were given"):
        check_statistics(made, inputs.census, None)
    plain = _plan(inputs, AWQ.model_copy(update={"rounding": RoundingConfig(grid="minmax")})).plan
    check_statistics(plain, inputs.census, None)


def test_a_saved_plan_comes_back(planned: Make, tmp_path: Path) -> None:
    inputs = planned()
    result = _plan(inputs, AWQ)
    result.save(tmp_path / "plan")
    again = PlannedModel.load(tmp_path / "plan", census_fingerprint=inputs.census.fingerprint())
    assert again.plan == result.plan
    assert again.scales.keys() == result.scales.keys()
    for name, scale in result.scales.items():
        np.testing.assert_array_equal(again.scales[name], scale)


def test_a_plan_of_another_model_or_none_is_refused(planned: Make, tmp_path: Path) -> None:
    _plan(planned(), AWQ).save(tmp_path / "plan")
    with pytest.raises(PlanError, match="made for another model"):
        PlannedModel.load(tmp_path / "plan", census_fingerprint="0" * 64)
    with pytest.raises(PlanError, match=r"plan\.json is missing"):
        PlannedModel.load(tmp_path, census_fingerprint="0" * 64)


def test_a_plan_without_scales_can_be_saved(planned: Make, tmp_path: Path) -> None:
    inputs = planned()
    config = QuantizeConfig(method=Method.RTN)
    make_plan(inputs.census, config, None, inputs.read).save(tmp_path)
    again = PlannedModel.load(tmp_path, census_fingerprint=inputs.census.fingerprint())
    assert again.scales == {}
