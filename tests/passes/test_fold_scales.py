"""Folding keeps the function, changes what it says, and refuses what it must not touch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.plan import ScaleApplication
from faq_onnx.artifacts.sites import ModelCensus, Tie
from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import read_initializer
from faq_onnx.passes import FoldScalesPass, run_passes
from faq_onnx.testing import (
    TinyLlama,
    assert_models_close,
    tiny_feeds,
    tiny_llama_census,
    tiny_llama_onnx,
)

Scales = dict[str, npt.NDArray[np.float32]]
MakeScales = Callable[[ModelCensus, bool], Scales]
MakeFold = Callable[[ModelCensus, Scales, ScaleApplication], FoldScalesPass]

VARIANTS = [
    TinyLlama(),
    TinyLlama(tie=Tie.SHARED),
    TinyLlama(tie=Tie.DUPLICATE, qkv_bias=True),
    TinyLlama(heads=4, kv_heads=1),
]
SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
ATTENTION_INPUT, ATTENTION_OUTPUT = "layers.0.attention_input", "layers.0.attention_output"


def logits_only(model: ir.Model) -> ir.Model:
    """Without the cache, whose values are divided with v_proj's rows by design."""
    del model.graph.outputs[1:]
    return model


def stored(model: ir.Model, name: str) -> npt.NDArray[np.float32]:
    return np.asarray(read_initializer(model, name), np.float32)


def rounding_bound(spec: TinyLlama, magnitude: float) -> float:
    """First-order bound of the change that rounding can make.

    A dot product over K terms is within K eps of exact, relative to the sum of the terms' sizes;
    four of them follow one another in a layer, and the head comes last.
    """
    chain = 4 * spec.layers + 1
    return chain * spec.intermediate * float(np.finfo(np.float32).eps) * magnitude


@pytest.mark.parametrize("application", [ScaleApplication.FOLD, ScaleApplication.MUL])
@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_powers_of_two_change_no_bit(
    spec: TinyLlama,
    application: ScaleApplication,
    make_scales: MakeScales,
    make_fold: MakeFold,
) -> None:
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    result = run_passes(model, [make_fold(census, make_scales(census, True), application)])
    assert result.modified
    expected = logits_only(tiny_llama_onnx(spec))
    assert_models_close(logits_only(model), expected, tiny_feeds(spec), atol=0)


@pytest.mark.parametrize("application", [ScaleApplication.FOLD, ScaleApplication.MUL])
@pytest.mark.parametrize("spec", [VARIANTS[0], VARIANTS[2], VARIANTS[3]], ids=str)
def test_any_scale_keeps_the_function(
    spec: TinyLlama,
    application: ScaleApplication,
    make_scales: MakeScales,
    make_fold: MakeFold,
) -> None:
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    run_passes(model, [make_fold(census, make_scales(census, False), application)])
    expected = logits_only(tiny_llama_onnx(spec))
    bound = rounding_bound(spec, magnitude=12.0)  # no logit of these models is larger
    assert_models_close(logits_only(model), expected, tiny_feeds(spec), atol=bound)


def test_float16_moves_by_single_roundings(make_fold: MakeFold) -> None:
    spec = TinyLlama(dtype="float16")
    census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
    scales = {group.name: np.full(group.in_features, 2, np.float32) for group in census.groups}
    run_passes(model, [make_fold(census, scales, ScaleApplication.FOLD)])
    # halving is exact but for subnormals, which move by 2^-25 at most: what is left is that a
    # rounding on the way may fall to the other side, one spacing of float16 below 16 each
    spacing = float(np.spacing(np.float16(8)))
    expected = logits_only(tiny_llama_onnx(spec))
    assert_models_close(logits_only(model), expected, tiny_feeds(spec), atol=4 * spacing)


def test_weights_take_the_scale_and_producers_its_inverse(
    make_scales: MakeScales, make_fold: MakeFold
) -> None:
    scales = make_scales(CENSUS, True)
    model, source = tiny_llama_onnx(SPEC), tiny_llama_onnx(SPEC)
    only = {ATTENTION_INPUT: scales[ATTENTION_INPUT]}
    run_passes(model, [make_fold(CENSUS, only, ScaleApplication.FOLD)])
    gain = "model.layers.0.input_layernorm.weight"
    scale = scales[ATTENTION_INPUT]
    np.testing.assert_array_equal(stored(model, gain), stored(source, gain) / scale)
    for name in ("onnx::MatMul_701", "onnx::MatMul_702", "onnx::MatMul_703"):
        np.testing.assert_array_equal(stored(model, name), stored(source, name) * scale[:, None])
    untouched = "onnx::MatMul_704"
    np.testing.assert_array_equal(stored(model, untouched), stored(source, untouched))


def test_a_second_run_changes_nothing(make_scales: MakeScales, make_fold: MakeFold) -> None:
    model = tiny_llama_onnx(SPEC)
    fold = make_fold(CENSUS, make_scales(CENSUS, False), ScaleApplication.FOLD)
    assert run_passes(model, [fold]).modified
    before = stored(model, "onnx::MatMul_701")
    assert not run_passes(model, [fold]).modified
    np.testing.assert_array_equal(stored(model, "onnx::MatMul_701"), before)


def test_an_empty_plan_changes_nothing(make_fold: MakeFold) -> None:
    model = tiny_llama_onnx(SPEC)
    assert not run_passes(model, [make_fold(CENSUS, {}, ScaleApplication.FOLD)]).modified
    assert not model.metadata_props


def test_norms_that_share_a_gain_get_their_own(
    make_scales: MakeScales, make_fold: MakeFold
) -> None:
    def shared() -> ir.Model:
        model = tiny_llama_onnx(SPEC)
        gains = [f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)]
        first, second = (model.graph.initializers[gain] for gain in gains)
        second.replace_all_uses_with(first)
        return model

    census = renamed_gain(CENSUS)
    model = shared()
    scales = make_scales(CENSUS, True)
    run_passes(model, [make_fold(census, scales, ScaleApplication.FOLD)])
    feeds = tiny_feeds(SPEC)
    assert_models_close(logits_only(model), logits_only(shared()), feeds, atol=0)


def renamed_gain(census: ModelCensus) -> ModelCensus:
    """The census of a model whose input norms share the gain of layer 0."""
    first = census.groups[0].absorber
    groups = [
        group.model_copy(update={"absorber": first})
        if group.name == "layers.1.attention_input"
        else group
        for group in census.groups
    ]
    return census.model_copy(update={"groups": tuple(groups)})


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A group and a scale that must not be folded, and what the error says."""

    group: str
    scale: npt.NDArray[np.float32]
    message: str


ONES = np.ones(SPEC.hidden, np.float32)
REFUSALS = {
    "shape": Refusal(ATTENTION_INPUT, ONES[:-1], r"shape \[63\], needs \[64\]"),
    "zero": Refusal(ATTENTION_INPUT, ONES * 0, "must be positive and finite"),
    "negative": Refusal(ATTENTION_INPUT, -ONES, "a channel scale is -1.0"),
    "nan": Refusal(ATTENTION_INPUT, ONES * np.float32("nan"), "a channel scale is nan"),
    "heads": Refusal(
        ATTENTION_OUTPUT, np.arange(1, 65, dtype=np.float32), "give the 2 heads one scale"
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_scale_that_does_not_fit_is_refused(case: Refusal, make_fold: MakeFold) -> None:
    model = tiny_llama_onnx(SPEC)
    fold = make_fold(CENSUS, {case.group: case.scale}, ScaleApplication.FOLD)
    with pytest.raises(RewriteError, match=case.message) as caught:
        run_passes(model, [fold])
    assert case.group in str(caught.value)
    assert caught.value.__notes__ == ["in pass fold-scales"]


def test_another_scale_for_a_scaled_group_is_refused(make_fold: MakeFold) -> None:
    model = tiny_llama_onnx(SPEC)
    run_passes(model, [make_fold(CENSUS, {ATTENTION_INPUT: ONES * 2}, ScaleApplication.FOLD)])
    again = make_fold(CENSUS, {ATTENTION_INPUT: ONES * 3}, ScaleApplication.FOLD)
    with pytest.raises(RewriteError, match="already carries another channel scale"):
        run_passes(model, [again])


def test_a_weight_with_another_reader_is_refused(make_fold: MakeFold) -> None:
    model = tiny_llama_onnx(SPEC)
    weight = model.graph.initializers["onnx::MatMul_701"]
    model.graph.append(ir.node("Identity", [weight]))
    stranger = ir.node("Abs", [model.graph.node(len(model.graph) - 1).outputs[0]], name="stranger")
    model.graph.append(stranger)
    fold = make_fold(CENSUS, {ATTENTION_INPUT: ONES * 2}, ScaleApplication.FOLD)
    with pytest.raises(RewriteError, match=r"onnx::MatMul_701' is also read by stranger"):
        run_passes(model, [fold])


def test_an_activation_with_another_reader_is_refused_but_a_mul_serves(
    make_fold: MakeFold,
) -> None:
    def watched() -> ir.Model:
        model = logits_only(tiny_llama_onnx(SPEC))
        normed = next(n for n in model.graph if n.name == "/model/layers.0/input_layernorm/Mul_1")
        node = ir.node("Abs", [normed.outputs[0]], name="stranger")
        node.outputs[0].name, node.outputs[0].dtype = "watched", ir.DataType.FLOAT
        node.outputs[0].shape = normed.outputs[0].shape
        model.graph.append(node)
        model.graph.outputs.append(node.outputs[0])
        return model

    scales = {ATTENTION_INPUT: ONES * 2}
    model = watched()
    with pytest.raises(RewriteError, match="also read by stranger"):
        run_passes(model, [make_fold(CENSUS, scales, ScaleApplication.FOLD)])
    run_passes(model, [make_fold(CENSUS, scales, ScaleApplication.MUL)])
    assert_models_close(model, watched(), tiny_feeds(SPEC), atol=0)


def test_a_group_that_must_not_change_is_refused(make_fold: MakeFold) -> None:
    groups = [group.model_copy(update={"scalable": False}) for group in CENSUS.groups]
    unscalable = CENSUS.model_copy(update={"groups": tuple(groups)})
    planned = make_fold(CENSUS, {ATTENTION_INPUT: ONES * 2}, ScaleApplication.MUL)
    fold = dataclasses.replace(planned, census=unscalable)
    with pytest.raises(RewriteError, match="its weights must not change"):
        run_passes(tiny_llama_onnx(SPEC), [fold])
