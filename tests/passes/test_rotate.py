"""Rotation keeps the function, flattens what it should, and refuses what it must not touch."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.analysis import canonicalise, find_rotation, take_census
from faq_onnx.artifacts.plan import ScaleApplication
from faq_onnx.artifacts.sites import ModelCensus, Tie
from faq_onnx.errors import RewriteError, UnsupportedModelError
from faq_onnx.graph.weights import read_initializer
from faq_onnx.passes import ROTATED_KEY, FoldScalesPass, RotatePass, run_passes
from faq_onnx.testing import (
    TinyLlama,
    assert_models_close,
    tiny_feeds,
    tiny_llama_config,
    tiny_llama_onnx,
)

Scales = dict[str, npt.NDArray[np.float32]]
MakeScales = Callable[[ModelCensus, bool], Scales]
MakeFold = Callable[[ModelCensus, Scales, ScaleApplication], FoldScalesPass]
LARGEST_LOGIT = 12.0  # of these models

VARIANTS = [
    TinyLlama(),
    TinyLlama(qkv_bias=True),
    TinyLlama(tie=Tie.SHARED),
    TinyLlama(tie=Tie.DUPLICATE, qkv_bias=True),
    TinyLlama(hidden=48, heads=4, kv_heads=1),  # 48 = 16 * 3, heads of 12 = 4 * 3
]


def opened(spec: TinyLlama) -> ir.Model:
    return canonicalise(tiny_llama_onnx(spec))


def rotation(
    model: ir.Model,
    spec: TinyLlama,
    parts: str = "residual+heads",
    *,
    seed: int = 0,
    untie_head: bool = True,
) -> RotatePass:
    census = take_census(model, tiny_llama_config(spec))
    sites = find_rotation(model, census, residual="residual" in parts, heads="heads" in parts)
    return RotatePass(sites, seed=seed, untie_head=untie_head)


def rotated(spec: TinyLlama, parts: str = "residual+heads", *, seed: int = 0) -> ir.Model:
    model = opened(spec)
    assert run_passes(model, [rotation(model, spec, parts, seed=seed)]).modified
    return model


def logits_only(model: ir.Model) -> ir.Model:
    """Without the cache, whose values are rotated with v_proj's rows by design."""
    del model.graph.outputs[1:]
    return model


def bound(spec: TinyLlama) -> float:
    """The change that rounding may make to a logit.

    Four dot products follow one another in a layer, the head is one more. Each makes K roundings
    of its sum's size where it is summed in the weight's type (float16 is summed in float32, one
    rounding is left). Roundings are independent, so their sum grows as the root of their number;
    4 standard deviations.
    """
    chain = 4 * spec.layers + 1
    terms = spec.intermediate if spec.dtype == "float32" else 1
    eps = float(np.finfo(spec.dtype).eps)
    return 4 * float(np.sqrt(chain * terms)) * eps * LARGEST_LOGIT


@pytest.mark.parametrize("parts", ["residual", "heads", "residual+heads"])
@pytest.mark.parametrize("spec", VARIANTS, ids=str)
def test_logits_stay(spec: TinyLlama, parts: str) -> None:
    after, before = logits_only(rotated(spec, parts)), logits_only(tiny_llama_onnx(spec))
    assert_models_close(after, before, tiny_feeds(spec), atol=bound(spec))


def test_it_runs_in_a_pass_manager_of_onnx_ir() -> None:
    spec = TinyLlama()
    model = opened(spec)
    manager = ir.passes.PassManager([rotation(model, spec)], steps=3)
    assert manager(model).modified
    before = logits_only(tiny_llama_onnx(spec))
    assert_models_close(logits_only(model), before, tiny_feeds(spec), atol=bound(spec))


def test_logits_stay_in_float16() -> None:
    spec = TinyLlama(dtype="float16")
    after, before = logits_only(rotated(spec)), logits_only(tiny_llama_onnx(spec))
    assert_models_close(after, before, tiny_feeds(spec), atol=bound(spec))


@pytest.mark.property
@settings(max_examples=8, deadline=None)
@given(
    heads=st.sampled_from([(4, 2), (2, 2), (6, 2), (3, 1)]),
    head_dim=st.sampled_from([8, 12, 16]),
    seed=st.integers(0, 2**32),
    bias=st.booleans(),
    tie=st.sampled_from([None, *Tie]),
)
def test_any_size_and_seed_keeps_the_function(
    heads: tuple[int, int], head_dim: int, seed: int, bias: bool, tie: Tie | None
) -> None:
    query, values = heads
    spec = TinyLlama(
        layers=1,
        hidden=query * head_dim,
        heads=query,
        kv_heads=values,
        qkv_bias=bias,
        tie=tie,
        vocabulary=32,
        intermediate=32,
        seed=seed % 97,
    )
    after = logits_only(rotated(spec, seed=seed))
    feeds = tiny_feeds(spec, batch=1, length=4)
    assert_models_close(after, logits_only(tiny_llama_onnx(spec)), feeds, atol=bound(spec))


def test_keys_of_the_cache_stay_and_values_turn_with_their_heads() -> None:
    spec = TinyLlama()
    model, before = rotated(spec, "heads"), tiny_llama_onnx(spec)
    for each in (model, before):
        del each.graph.outputs[3:]  # logits and the cache of layer 0 stay
        del each.graph.outputs[2]
    assert_models_close(model, before, tiny_feeds(spec), atol=bound(spec))
    weights = [opened(spec), model]
    plain, turned = (np.asarray(read_initializer(m, "onnx::MatMul_703")) for m in weights)
    by_head = (spec.hidden, spec.kv_heads, spec.head_dim)
    lengths = [np.linalg.norm(w.reshape(by_head), axis=2) for w in (plain, turned)]
    np.testing.assert_allclose(lengths[1], lengths[0], rtol=1e-5)
    assert np.abs(plain - turned).max() > 0.1 * np.abs(plain).max()


def test_gains_become_one_and_outlier_channels_flat() -> None:
    spec = TinyLlama()
    plain, turned = opened(spec), rotated(spec, "residual")
    name = "model.layers.1.input_layernorm.weight"
    assert np.ptp(read_initializer(plain, name).astype(np.float32)) > 1
    np.testing.assert_array_equal(read_initializer(turned, name), np.ones(spec.hidden))
    # the outlier gain, now in q_proj [K, N], is spread over all its input channels
    query = np.asarray(read_initializer(turned, "onnx::MatMul_701"), np.float64)
    norms = np.linalg.norm(query, axis=1)
    assert norms.max() < 2.5 * np.median(norms)


def test_a_head_that_shares_the_table_is_untied_only_if_allowed() -> None:
    spec = TinyLlama(tie=Tie.SHARED)
    model = opened(spec)
    with pytest.raises(RewriteError, match=r"73728 bytes more as float32.*--untie-head"):
        run_passes(model, [rotation(model, spec, untie_head=False)])
    assert not model.metadata_props
    run_passes(model, [rotation(model, spec, "heads", untie_head=False)])
    census = take_census(rotated(spec), tiny_llama_config(spec))
    assert census.embeddings[0].tie is None
    head = census.site("/lm_head/MatMul")
    assert head.weight == "lm_head.weight"
    assert next(g for g in census.groups if head.name in g.sites).absorber is not None


def test_a_second_run_changes_nothing_and_parts_may_follow_one_another() -> None:
    spec = TinyLlama()
    model = rotated(spec, "residual", seed=3)
    again = rotation(model, spec, "residual", seed=3)
    assert not run_passes(model, [again]).modified
    assert run_passes(model, [rotation(model, spec, "heads", seed=3)]).modified
    assert json.loads(model.metadata_props[ROTATED_KEY]) == {"heads": 3, "residual": 3}
    assert_models_close(
        logits_only(model), logits_only(tiny_llama_onnx(spec)), tiny_feeds(spec), atol=bound(spec)
    )
    with pytest.raises(RewriteError, match="seed 3 already, not with 4"):
        run_passes(model, [rotation(model, spec, "residual", seed=4)])


def test_the_census_tells_what_is_rotated() -> None:
    spec = TinyLlama()
    prints = {
        take_census(model, tiny_llama_config(spec)).fingerprint()
        for model in (opened(spec), rotated(spec), rotated(spec, seed=1), rotated(spec, "heads"))
    }
    assert len(prints) == 4


def test_scales_are_folded_after_a_rotation_never_before(
    make_scales: MakeScales, make_fold: MakeFold
) -> None:
    spec = TinyLlama()
    model = opened(spec)
    census = take_census(model, tiny_llama_config(spec))
    scales = make_scales(census, True)
    run_passes(model, [make_fold(census, scales, ScaleApplication.FOLD)])
    with pytest.raises(RewriteError, match="rotate first"):
        run_passes(model, [rotation(model, spec)])
    model = rotated(spec)
    census = take_census(model, tiny_llama_config(spec))
    run_passes(model, [make_fold(census, scales, ScaleApplication.FOLD)])
    gain = read_initializer(model, "model.norm.weight")
    np.testing.assert_array_equal(gain, 1 / scales["lm_head_input"])
    before = logits_only(tiny_llama_onnx(spec))
    # powers of two: they round nothing
    assert_models_close(logits_only(model), before, tiny_feeds(spec), atol=bound(spec))


def _break_graph_output(model: ir.Model) -> None:
    hidden = next(n for n in model.graph if n.name == "/model/layers.0/Add_1").outputs[0]
    model.graph.outputs.append(hidden)


def _break_norm_reader(model: ir.Model) -> None:
    norm = next(n for n in model.graph if n.name == "/model/norm/Mul_1")
    extra = ir.node("Relu", [norm.outputs[0]], name="spy")
    extra.outputs[0].name = "spied"
    model.graph.insert_after(norm, extra)


def _break_stream_reader(model: ir.Model) -> None:
    add = next(n for n in model.graph if n.name == "/model/layers.0/Add")
    extra = ir.node("Abs", [add.outputs[0]], name="spy")
    extra.outputs[0].name = "spied"
    model.graph.insert_after(add, extra)


def _put_behind(model: ir.Model, above: str, op_type: str, name: str) -> None:
    """An operator with a constant [64] behind the node `above`, for all its readers."""
    node = next(n for n in model.graph if n.name == above)
    constant = ir.val("extra", const_value=ir.tensor(np.ones(64, np.float32), name="extra"))
    model.graph.register_initializer(constant)
    extra = ir.node(op_type, [node.outputs[0], constant], name=name)
    extra.outputs[0].name = f"{name}_output"
    node.outputs[0].replace_all_uses_with(extra.outputs[0])
    extra.replace_input_with(0, node.outputs[0])
    model.graph.insert_after(node, extra)


def _break_post_norm(model: ir.Model) -> None:
    """A gain behind o_proj, as Gemma 3 has."""
    _put_behind(model, "/model/layers.0/self_attn/o_proj/MatMul", "Mul", "post_norm")


def _break_norm_bias(model: ir.Model) -> None:
    _put_behind(model, "/model/norm/Mul_1", "Add", "norm_bias")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_break_graph_output, "gives '/model/layers.0/Add_1_output_0' out"),
        (_break_norm_reader, "Relu 'spy' reads its norm"),
        (_break_stream_reader, "Abs 'spy' reads '/model/layers.0/Add_output_0'"),
        (_break_post_norm, "Mul 'post_norm' writes to it"),
        (_break_norm_bias, "Add 'norm_bias' reads its norm"),
    ],
)
def test_what_is_not_exact_is_refused(damage: Callable[[ir.Model], None], reason: str) -> None:
    model = opened(TinyLlama())
    damage(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        rotation(model, TinyLlama(), "residual")


def test_a_weight_with_another_reader_is_refused() -> None:
    spec = TinyLlama()
    model = opened(spec)
    found = rotation(model, spec)
    weight = model.graph.initializers["onnx::MatMul_704"]  # o_proj of layer 0
    model.graph.append(ir.node("Abs", [weight], name="spy"))
    with pytest.raises(RewriteError, match="also read by spy"):
        run_passes(model, [found])
