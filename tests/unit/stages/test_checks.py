"""The verdict on a result, and the proof that folding changed nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.plan import GroupPlan, QuantPlan, ScaleApplication
from faq_onnx.artifacts.trade_off import TradeOff, TradeOffPoint
from faq_onnx.artifacts.verification import (
    KernelCheck,
    LogitMetrics,
    SiteError,
    StructureCheck,
    VerificationReport,
)
from faq_onnx.calibration.collect import Collector
from faq_onnx.config import Method, QuantizeConfig, RoundingConfig, ScaleConfig, VerifyConfig
from faq_onnx.errors import VerificationError
from faq_onnx.graph.weights import read_initializer, transform_initializer
from faq_onnx.passes import FoldScalesPass, run_passes
from faq_onnx.planning.budget import Budget
from faq_onnx.stages.checks import (
    budget_note,
    check_fold,
    fold_error,
    fold_tolerance,
    judge,
    slow_note,
)
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

CONFIG = QuantizeConfig(method=Method.AWQ, verify=VerifyConfig(max_kl=0.5))
SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
IDS = np.random.default_rng(0).integers(0, SPEC.vocabulary, (1, 10))


def _report(
    *, kl: float | None = 0.1, worst: float = 0.5, equal: tuple[bool, ...] = (True, False)
) -> VerificationReport:
    sites = tuple(
        SiteError(site=f"site{i}", sqnr_db=10.0 + i, equals_rtn=same)
        for i, same in enumerate(equal)
    )
    logits = None
    if kl is not None:
        logits = LogitMetrics(
            tokens=9, kl_nats=kl, top1_agreement=0.9, perplexity_float=8, perplexity=9
        )
    return VerificationReport(
        structure=_structure(),
        kernels=KernelCheck(nodes=2, worst=worst, worst_node="/bad/MatMul"),
        logits=logits,
        sites=sites,
    )


def _structure(*slow: str) -> StructureCheck:
    return StructureCheck(
        ir_version=8, opset=18, onnxruntime="1.31.1", nbits_nodes=7, slow_nodes=slow
    )


@pytest.mark.parametrize("force", [False, True])
def test_a_good_result_has_no_complaints(force: bool) -> None:
    assert judge(_report(), CONFIG, force=force) == ()
    assert judge(_report(kl=None), CONFIG, force=force) == ()
    assert judge(_report(kl=0.5, worst=1.0), CONFIG, force=force) == ()


def test_too_much_kl_names_the_worst_sites_and_the_way_out() -> None:
    report = _report(kl=0.51, equal=(False,) * 7)
    with pytest.raises(
        VerificationError, match=r"0\.510 nats/token, more than --max-kl 0\.5"
    ) as e:
        judge(report, CONFIG, force=False)
    assert "Worst sites: site0 (10.0 dB), site1 (11.0 dB)" in str(e.value)
    assert "site5" not in str(e.value)
    assert "--force" in str(e.value)
    assert "--budget same" in str(e.value)
    (note,) = judge(report, CONFIG, force=True)
    assert "0.510 nats/token" in note


def test_a_method_that_changed_nothing_is_a_complaint() -> None:
    report = _report(equal=(True, True))
    with pytest.raises(
        VerificationError, match="--method awq changed nothing: the codes of all 2"
    ):
        judge(report, CONFIG, force=False)
    assert len(judge(report, CONFIG, force=True)) == 1
    assert judge(_report(equal=()), CONFIG, force=False) == ()


@pytest.mark.parametrize(
    ("change", "complains"),
    [
        ({"method": Method.RTN}, False),
        ({"method": Method.RTN, "scale": ScaleConfig(statistic="awq")}, True),
        ({"method": Method.RTN, "rounding": RoundingConfig(path="low-bit")}, False),
        ({"method": Method.HQQ}, True),
        ({"method": Method.FAQ_GPTQ}, True),
        ({"method": Method.AWQ, "bits": 8}, True),
        # at 8 bits grids and rounding are plain by intent
        ({"method": Method.GPTQ, "bits": 8}, False),
        ({"method": Method.K_QUANT, "bits": 8}, False),
    ],
)
def test_equal_to_rtn_is_a_complaint_where_codes_should_move(
    change: dict[str, object], complains: bool
) -> None:
    notes = judge(_report(equal=(True, True)), CONFIG.model_copy(update=change), force=True)
    assert bool(notes) is complains
    for note in notes:
        assert ("text" in note) is (change["method"] is not Method.HQQ)


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (Method.RTN, "--method faq-gptq, or"),
        (Method.FAQ, "--method faq-gptq, or"),
        (Method.FAQ_GPTQ, "--method best, or"),
        (Method.BEST, r"the same bytes\), or"),
    ],
)
def test_too_much_kl_advises_a_better_method(method: Method, advice: str) -> None:
    config = CONFIG.model_copy(update={"method": method})
    with pytest.raises(VerificationError, match=advice):
        judge(_report(kl=0.51), config, force=False)


def test_all_complaints_come_at_once() -> None:
    report = _report(kl=2, equal=(True, True))
    with pytest.raises(VerificationError, match=r"nats/token.*changed nothing"):
        judge(report, CONFIG, force=False)
    assert len(judge(report, CONFIG, force=True)) == 2


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("worst", [1.01, math.inf, math.nan])
def test_wrong_kernels_are_never_accepted(worst: float, force: bool) -> None:
    with pytest.raises(VerificationError, match="/bad/MatMul"):
        judge(_report(worst=worst), CONFIG, force=force)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kl", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_never_accepted(kl: float, force: bool) -> None:
    with pytest.raises(VerificationError, match="not finite"):
        judge(_report(kl=kl), CONFIG, force=force)


def test_slow_nodes_are_told() -> None:
    assert not slow_note(_structure())
    assert "2 of 7 low-bit nodes" in slow_note(_structure("a", "b"))
    assert "(first: a)" in slow_note(_structure("a", "b"))


def _folded(scales: dict[str, np.ndarray]) -> ir.Model:
    model = tiny_llama_onnx(SPEC)
    plan = QuantPlan(
        census_fingerprint=CENSUS.fingerprint(),
        method="awq",
        sites=(),
        groups=tuple(GroupPlan(group=name, application=ScaleApplication.FOLD) for name in scales),
        embeddings=(),
    )
    run_passes(model, [FoldScalesPass(CENSUS, plan, scales)])
    return model


def _error(model: ir.Model, folder: Path) -> float:
    source = Collector(tiny_llama_onnx(SPEC), CENSUS, "float", folder / "float").logits(IDS)
    folded = Collector(model, CENSUS, "folded", folder / "folded").logits(IDS)
    return fold_error(folded, source)


@pytest.fixture
def scales(rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {
        group.name: np.exp2(rng.uniform(-2, 2, group.in_features)).astype(np.float32)
        for group in CENSUS.groups
        if group.absorber is not None and group.absorber.repeats == 1
    }


def test_a_right_fold_passes(scales: dict[str, np.ndarray], tmp_path: Path) -> None:
    error = _error(_folded(scales), tmp_path)
    assert 0 < error < fold_tolerance({"float32"}, SPEC.layers)
    check_fold(error, {"float32"}, SPEC.layers, "folding")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_one_channel_that_was_not_divided_is_seen(
    name: str, scales: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The gain of one channel is 10 % off, as if its scale had been another."""
    model = _folded(scales)
    gain = read_initializer(model, name)
    channel = int(np.abs(gain).argmax())

    def perturb(values: np.ndarray) -> np.ndarray:
        wrong = values.copy()
        wrong[channel] *= np.float32(1.1)
        return wrong

    transform_initializer(model, name, perturb)
    error = _error(model, tmp_path)
    with pytest.raises(VerificationError, match="folding changed"):
        check_fold(error, {"float32"}, SPEC.layers, "folding")


def test_a_fold_that_gives_nan_is_refused() -> None:
    with pytest.raises(VerificationError, match="nan"):
        check_fold(math.nan, {"float32"}, 2, "folding")


def _trade_off(wish: str) -> TradeOff:
    budget = Budget.parse(wish)
    point = TradeOffPoint(bytes=4000, bits_per_weight=3.0, kl=0.04)
    return TradeOff(
        budget=wish,
        kind=budget.kind.value,
        limit=budget.limit,
        fixed_bytes=1000,
        chosen=point,
        curve=(point,),
    )


@pytest.mark.parametrize("wish", ["kl<=0.1", "5kB", "3bpw"])
def test_no_note_on_a_budget_that_was_kept(wish: str) -> None:
    assert not budget_note(_trade_off(wish), _report(kl=0.1).logits, 5000)
    assert not budget_note(_trade_off(wish), None, 5000)
    assert not budget_note(None, _report(kl=0.1).logits, 5000)


def test_a_budget_that_was_not_kept_is_told_with_the_way_out() -> None:
    note = budget_note(_trade_off("kl<=0.05"), _report(kl=0.1).logits, 5000)
    assert "NOT kept" in note
    assert "0.1 nats/token were measured" in note
    assert "--budget 'kl<=0.024'" in note  # half of the wish, with a margin
    note = budget_note(_trade_off("5kB"), None, 5100)
    assert "5100 bytes, --budget 5kB allows 5000" in note
    assert "--budget 0.0049MB" in note


def test_a_budget_may_buy_eight_bits_for_all_where_no_method_changes_codes() -> None:
    """With --bits 8 this is known before; here 4 bits are the default that nothing has."""
    config = QuantizeConfig(method=Method.GPTQ, budget="9bpw")
    assert judge(_report(equal=(True, True)), config, force=False) == ()
    with pytest.raises(VerificationError, match="a larger --budget"):
        judge(_report(kl=2), config, force=False)
