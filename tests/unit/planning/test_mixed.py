"""Formats under a budget: sizes as promised, bits where the logits need them, shared tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.sensitivity import Sensitivities, Sensitivity
from faq_onnx.artifacts.sites import ModelCensus, Tie
from faq_onnx.artifacts.target import Refusal
from faq_onnx.config import Method, QuantizeConfig
from faq_onnx.errors import PlanError
from faq_onnx.graph.weights import read_initializer
from faq_onnx.planning.budget import Budget, check_size, parse_budget
from faq_onnx.planning.candidates import FormatCandidates, Judge, Weight, run_anywhere
from faq_onnx.planning.mixed import (
    CURVE_POINTS,
    KL_SHARE,
    MixedFormats,
    MixedPlanner,
    describe_trade_off,
)
from faq_onnx.planning.planner import make_plan
from faq_onnx.planning.prediction import CoarseRounding
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn
from faq_onnx.report.rows import embedding_rows, site_rows
from faq_onnx.testing import TinyLlama, tiny_llama_onnx

Make = Callable[..., Any]
RTN = QuantizeConfig(method=Method.RTN)
SPEC = TinyLlama()


def _sensitivities(census: ModelCensus, per_error: Mapping[str, float]) -> Sensitivities:
    """Every weight 1e-3, but what is named."""
    names = [site.name for site in census.sites] + [t.name for t in census.embeddings]
    entries = [Sensitivity(name=n, error=2.0, kl=2 * per_error.get(n, 1e-3)) for n in names]
    return Sensitivities(
        model_fingerprint="model",
        corpus_fingerprint="corpus",
        perturbation="coarse",
        tokens=16,
        entries=tuple(entries),
    )


def _choose(
    inputs: Any,
    budget: str,
    config: QuantizeConfig = RTN,
    per_error: Mapping[str, float] | None = None,
    judge: Judge = run_anywhere,
) -> MixedFormats:
    model = tiny_llama_onnx(inputs.spec)
    planner = MixedPlanner(
        census=inputs.census,
        config=config,
        stats=inputs.stats,
        sensitivities=_sensitivities(inputs.census, per_error or {}),
        read_weight=inputs.read,
        read_table=lambda table: read_initializer(model, table.weight).astype(np.float32),
        judge=judge,
    )
    return planner.choose(parse_budget(budget))


def _formats(found: MixedFormats) -> dict[str, BlockFormat | None]:
    plans = {plan.site: plan.format for plan in found.sites}
    return plans | {p.embedding: p.format for p in found.embeddings if p.shared_with is None}


def _format(found: MixedFormats, name: str) -> BlockFormat:
    fmt = _formats(found)[name]
    assert fmt is not None
    return fmt


@pytest.mark.parametrize("budget", ["3.0bpw", "4.6bpw", "60kB"])
def test_bytes_are_those_of_the_plans_and_within_the_budget(planned: Make, budget: str) -> None:
    inputs = planned()
    found = _choose(inputs, budget)
    table = inputs.census.embeddings[0]
    shapes = {s.name: (s.out_features, s.in_features) for s in inputs.census.sites}
    shapes[table.name] = (table.rows, table.width)
    total = weights = 0
    for name, fmt in _formats(found).items():
        assert fmt is not None
        total += fmt.weight_bytes(*shapes[name])
        weights += shapes[name][0] * shapes[name][1]
    assert total == found.allocation.total.bytes
    assert found.allocation.total.bpw == 8 * total / weights
    limit = Budget.parse(budget)
    assert (total if limit.kind == "bytes" else 8 * total / weights) <= limit.limit
    assert found.fixed_bytes == 0


SAME_AS = [
    {},
    {"bits": 3, "block_size": 64},
    {"bits": 2, "symmetric": True, "lm_head": "same"},
    {"bits": 8, "block_size": 64, "embedding": "8"},
    {"lm_head": "keep", "embedding": "keep", "exclude": ("*o_proj*",)},
    {"block_scales": "8-bit", "lm_head": "4"},
]


@pytest.mark.parametrize("tie", [None, *Tie])
@pytest.mark.parametrize("wish", SAME_AS, ids=lambda wish: "-".join(wish) or "defaults")
def test_same_is_what_the_settings_take_without_a_budget(
    planned: Make, wish: dict[str, object], tie: Tie | None
) -> None:
    inputs = planned(TinyLlama(tie=tie))
    config = RTN.model_copy(update=wish)
    plain = make_plan(inputs.census, config, None, inputs.read).plan
    size = sum(row.size_bytes for row in site_rows(inputs.census, plain, {}))
    size += sum(row.size_bytes for row in embedding_rows(inputs.census, plain))
    shared_float = tie is Tie.SHARED and wish.get("lm_head") == "keep"  # one initializer, two rows
    head = inputs.census.sites[-1]
    size -= 4 * head.in_features * head.out_features if shared_float else 0
    found = _choose(inputs, "same", config)
    assert (found.budget.kind, found.budget.limit) == ("bytes", size)
    assert found.fixed_bytes + found.allocation.total.bytes <= size
    assert describe_trade_off("same", found).limit == size


def test_the_same_size_is_better_spent(planned: Make) -> None:
    """A weight that nothing depends on gives its bits to one that everything does."""
    inputs = planned()
    names = [site.name for site in inputs.census.sites]
    errors = {name: 1e3 if at % 2 else 1e-9 for at, name in enumerate(names)}
    found = _choose(inputs, "same", RTN.model_copy(update={"embedding": "keep"}), errors)
    bits = [_format(found, name).code_bits for name in names]
    assert set(bits[1::2]) == {8}
    assert min(bits[0::2]) == 2


def test_predicted_kl_is_sensitivity_times_output_error(planned: Make) -> None:
    inputs = planned()
    found = _choose(inputs, "3.5bpw")
    site, group = inputs.census.sites[0], inputs.census.groups[0]
    weight, choice = inputs.read(site), found.allocation.choice[site.name]
    delta = dequantize_weight(quantize_rtn(weight, _format(found, site.name))) - weight
    expected = 1e-3 * output_energy(delta, inputs.stats.gram(group.name))
    assert choice.kl == pytest.approx(expected, rel=1e-4)


def test_the_weight_that_the_logits_depend_on_gets_the_bits(planned: Make) -> None:
    inputs = planned()
    name = inputs.census.sites[3].name
    precious = _choose(inputs, "3.6bpw", per_error={name: 1e3})
    worthless = _choose(inputs, "3.6bpw", per_error={name: 0.0})
    assert _format(precious, name).code_bits == 8
    assert _format(worthless, name).code_bits == 2


def test_kl_budget_is_kept_by_the_prediction(planned: Make) -> None:
    inputs = planned()
    curve = _choose(inputs, "3bpw").allocation.curve
    middle = curve[len(curve) // 2].kl
    found = _choose(inputs, f"kl<={middle:.6g}")
    assert found.allocation.total.kl <= middle * (1 + 1e-5)


def test_a_tied_table_is_one_item_that_the_embedding_shares(planned: Make) -> None:
    inputs = planned(TinyLlama(tie=Tie.SHARED))
    head = inputs.census.sites[-1].name
    found = _choose(inputs, "3.6bpw")
    (table,) = found.embeddings
    assert table.format is not None
    assert table.shared_with == head
    assert table.format == found.allocation.choice[head].format
    assert table.format.code_bits in {4, 8}  # what a Gather is asked to read
    assert set(found.allocation.choice) == {site.name for site in inputs.census.sites}
    two_bits = _choose(inputs, "2.6bpw", RTN.model_copy(update={"embedding": "shared"}))
    assert _format(two_bits, head).code_bits == 2
    assert two_bits.embeddings[0].format == _format(two_bits, head)


def test_the_tables_own_sensitivity_counts_for_the_shared_buffer(planned: Make) -> None:
    inputs = planned(TinyLlama(tie=Tie.DUPLICATE))
    head, table = inputs.census.sites[-1].name, inputs.census.embeddings[0].name
    found = _choose(inputs, "4bpw", per_error={table: 1e4, head: 0.0})
    assert _format(found, head).code_bits == 8


def test_what_stays_float_counts_in_sizes_only(planned: Make) -> None:
    inputs = planned()
    config = RTN.model_copy(update={"lm_head": "keep", "embedding": "keep"})
    found = _choose(inputs, "3bpw", config)
    head, table = inputs.census.sites[-1], inputs.census.embeddings[0]
    assert found.fixed_bytes == 4 * (
        head.in_features * head.out_features + table.rows * table.width
    )
    assert _formats(found)[head.name] is None
    assert found.embeddings[0].format is None
    smaller = found.fixed_bytes + found.allocation.total.bytes
    again = _choose(inputs, f"{smaller / 1e3}kB", config)
    assert again.allocation.total.bytes <= found.allocation.total.bytes
    with pytest.raises(PlanError, match="stay as they are"):
        _choose(inputs, "10kB", config)


def test_excluded_and_unmeasured_sites_keep_the_configured_plan(planned: Make) -> None:
    inputs = planned()
    first, second = (site.name for site in inputs.census.sites[:2])
    config = RTN.model_copy(update={"exclude": (first,)})
    model = tiny_llama_onnx(inputs.spec)
    measured = _sensitivities(inputs.census, {})
    kept = tuple(entry for entry in measured.entries if entry.name != second)
    planner = MixedPlanner(
        inputs.census,
        config,
        inputs.stats,
        measured.model_copy(update={"entries": kept}),
        inputs.read,
        lambda table: read_initializer(model, table.weight).astype(np.float32),
    )
    found = planner.choose(parse_budget("3.6bpw"))
    assert _formats(found)[first] is None
    assert (_format(found, second).code_bits, _format(found, second).block_size) == (4, 32)
    assert not {first, second} & set(found.allocation.choice)


def test_formats_without_zero_points_compete_where_the_grid_allows(planned: Make) -> None:
    inputs = planned()

    def kinds(config: QuantizeConfig) -> set[bool]:
        found = _formats(_choose(inputs, "5bpw", config)).values()
        return {fmt.symmetric for fmt in found if fmt is not None}

    assert True in kinds(RTN)
    assert kinds(RTN.model_copy(update={"symmetric": True})) == {True}
    assert kinds(QuantizeConfig(method=Method.HQQ)) == {False}
    plain = _choose(inputs, "5bpw", RTN.model_copy(update={"symmetric": True}))
    assert _choose(inputs, "5bpw").allocation.total.kl <= plain.allocation.total.kl


def test_blocks_that_would_be_padded_do_not_compete(planned: Make) -> None:
    """Every K is at most 128 here, so blocks of 256 save nothing, and are never measured."""
    inputs = planned()
    sizes = {site.name: site.in_features for site in inputs.census.sites}
    curve = [_choose(inputs, wish) for wish in ("3bpw", "4bpw", "5bpw", "7bpw")]
    for found in curve:
        for name, width in sizes.items():
            assert _format(found, name).block_size <= width


def test_the_trade_off_is_a_thinned_curve_with_its_ends(planned: Make) -> None:
    found = _choose(planned(), "4bpw")
    described = describe_trade_off("4bpw", found)
    whole = found.allocation.curve
    assert (described.kind, described.limit) == ("bpw", 4.0)
    assert described.curve[0].bytes == whole[0].bytes + found.fixed_bytes
    assert described.curve[-1].bytes == whole[-1].bytes + found.fixed_bytes
    assert 10 < len(described.curve) <= CURVE_POINTS
    assert described.chosen.kl == found.allocation.total.kl


def test_a_kl_budget_is_aimed_at_with_a_margin(planned: Make) -> None:
    inputs = planned()
    curve = _choose(inputs, "3bpw").allocation.curve
    wish = 2 * curve[len(curve) // 2].kl
    assert _choose(inputs, f"kl<={wish:.6g}").allocation.total.kl <= KL_SHARE * wish * 1.0001
    best = curve[-1].kl  # no margin is left here
    found = _choose(inputs, f"kl<={best * 1.01:.6g}")
    assert found.allocation.total.kl <= best * 1.01
    with pytest.raises(PlanError, match=r"kl<=.* cannot be met: the smallest possible value"):
        _choose(inputs, f"kl<={best * 0.9:.6g}")


def test_a_better_rounding_is_predicted_to_cost_less(planned: Make) -> None:
    inputs = planned()
    gptq = QuantizeConfig(method=Method.GPTQ)
    plain, better = (_choose(inputs, "3.2bpw", config) for config in (RTN, gptq))
    assert better.allocation.total.kl < plain.allocation.total.kl
    for plan in better.sites:
        bits = _format(better, plan.site).code_bits
        assert plan.rounding == ("gptq" if bits < 8 else "nearest")


def test_perturbations_are_coarse_and_know_their_error(planned: Make) -> None:
    inputs = planned()
    model, table = tiny_llama_onnx(SPEC), inputs.census.embeddings[0]
    weight = read_initializer(model, table.weight).astype(np.float32)
    ids = np.array([[5, 7], [5, 9]])
    perturb = CoarseRounding(inputs.census, inputs.stats, inputs.read, lambda _t: weight, ids)
    site = inputs.census.sites[1]
    found = perturb(site)
    delta = found.weight - inputs.read(site)
    gram = inputs.stats.gram(inputs.census.groups[0].name)
    assert found.error == pytest.approx(output_energy(delta, gram))
    assert len(np.unique(found.weight[0, :32])) <= 8
    rows = np.square(perturb(table).weight - weight).sum(axis=1)
    assert perturb(table).error == pytest.approx(rows[ids].mean(), rel=1e-5)


def _no_eights(weight: Weight, fmt: BlockFormat) -> tuple[Refusal, ...]:
    """A runtime that takes 2 and 4 bits, in blocks of 32 only."""
    if fmt.code_bits < 8 and fmt.block_size == 32:
        return ()
    return (Refusal(place=weight.name, found="it", allowed="less", way_out="--bits 4"),)


def test_what_the_judge_refuses_is_not_chosen(planned: Make) -> None:
    inputs = planned()
    formats = _formats(_choose(inputs, "7bpw", judge=_no_eights)).values()
    assert {(f.code_bits, f.block_size) for f in formats if f is not None} == {(4, 32)}
    with pytest.raises(PlanError, match=r"\(3.33 to 5.12 bits per weight compete\)"):
        _choose(inputs, "2.5bpw", judge=_no_eights)


def test_sizes_are_known_before_anything_is_measured(planned: Make) -> None:
    """What is said without sensitivities is what the planner says with them."""
    inputs = planned()
    names = [site.name for site in inputs.census.sites] + [inputs.census.embeddings[0].name]
    for judge in (run_anywhere, _no_eights):
        candidates = FormatCandidates(inputs.census, RTN, frozenset(names), judge=judge)
        found = _choose(inputs, "100bpw", judge=judge)
        assert min(map(len, candidates.sizes.values())) > 1
        assert candidates.fixed_bytes == found.fixed_bytes
        smallest = sum(map(min, candidates.sizes.values()))
        assert smallest == found.allocation.curve[0].bytes
        assert 8 * smallest / candidates.weights == found.allocation.curve[0].bpw
        sizes = tuple(candidates.sizes.values())
        check_size(Budget.parse(f"{smallest / 1e3}kB"), sizes, candidates.weights)
        with pytest.raises(PlanError, match="smallest possible value"):
            check_size(Budget.parse(f"{smallest / 1e3}kB"), sizes, candidates.weights, 1)


def test_a_weight_without_a_legal_format_shows_what_is_refused(planned: Make) -> None:
    inputs = planned()
    first = inputs.census.sites[0].name

    def judge(weight: Weight, fmt: BlockFormat) -> tuple[Refusal, ...]:
        del fmt
        refusal = Refusal(place=weight.name, found="it", allowed="nothing", way_out="--exclude")
        return (refusal,) if weight.name == first else ()

    names = frozenset(site.name for site in inputs.census.sites)
    candidates = FormatCandidates(inputs.census, RTN, names, judge=judge)
    assert first not in candidates.of_sites
    assert {refusal.place for refusal in candidates.refused()} == {first}
    smallest = candidates.smallest()
    assert smallest.keys() == names
    assert candidates.site_plans(smallest)[0].format == smallest[first]
    assert all(plan.format is None for plan in candidates.table_plans(smallest))
