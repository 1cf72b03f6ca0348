"""A model cut where its layers meet: what crosses, what does not, and that parts stand alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import LinearRole
from faq_onnx.graph.cut import Part, cut_at, cut_model, extract_part
from faq_onnx.graph.names import node_layer_index
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama(layers=3)
HEADER = '<ir_version: 10, opset_import: ["" : 18]>'


def _parts(model: ir.Model, spec: TinyLlama = SPEC) -> list[Part]:
    census = tiny_llama_census(spec)
    layer_of = {s.output: s.layer_index for s in census.sites if s.layer_index is not None}
    return cut_model(
        model, layer_of, [s.output for s in census.sites if s.role is LinearRole.LM_HEAD]
    )


def _bytes(model: ir.Model) -> bytes:
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _dtypes(model: ir.Model) -> dict[str, tuple[ir.DataType, int]]:
    """Type and rank of every value, as onnxruntime computes them."""
    ids = np.zeros((1, 4), np.int64)
    clone = ir.from_proto(ir.to_proto(model))
    inner = [value for node in clone.graph for value in node.outputs if value.name]
    known = {value.name for value in clone.graph.outputs}
    clone.graph.outputs.extend(value for value in inner if value.name not in known)
    session = open_session(_bytes(clone))
    names = [value.name for value in session.get_outputs()]
    results = session.run(names, decoder_feeds(session.get_inputs(), ids))
    return {
        name: (ir.DataType.from_numpy(array.dtype), array.ndim)
        for name, array in zip(names, map(np.asarray, results), strict=True)
    }


def test_there_is_one_part_before_the_layers_one_each_and_one_behind() -> None:
    parts = _parts(tiny_llama_onnx(SPEC))
    assert [part.index for part in parts] == [0, 1, 2, 3, 4]
    assert parts[-1].outputs == ("logits",)


def test_every_site_lies_in_the_part_of_its_layer() -> None:
    parts = {part.index: part for part in _parts(tiny_llama_onnx(SPEC))}
    for site in tiny_llama_census(SPEC).sites:
        index = len(parts) - 1 if site.layer_index is None else site.layer_index + 1
        assert site.output in parts[index].produces, site.name


def test_only_the_hidden_state_depends_on_the_tokens() -> None:
    parts = _parts(tiny_llama_onnx(SPEC))
    hidden = "/model/embed_tokens/Gather_output_0"
    assert parts[1].varying & {*parts[1].inputs} == {hidden}
    for part in parts[1:]:
        assert len(part.varying & {*part.inputs}) == 1
    # the last one needs nothing else: no mask, no rotary table
    assert len(parts[-1].inputs) == 1


def test_what_later_parts_read_is_what_earlier_ones_hand_over() -> None:
    parts = _parts(tiny_llama_onnx(SPEC))
    for part in parts[1:]:
        earlier = {name for other in parts if other.index < part.index for name in other.outputs}
        assert set(part.inputs) <= earlier
    read = {name for part in parts for name in part.inputs}
    assert {name for part in parts for name in part.outputs} == read | {"logits"}


def test_constants_never_cross() -> None:
    model = tiny_llama_onnx(SPEC)
    constant = {
        value.name for node in model.graph if not node.inputs for value in node.outputs
    } | set(model.graph.initializers)
    assert constant
    for part in _parts(model):
        assert not constant & {*part.inputs, *part.outputs}


def _stages(spec: TinyLlama = SPEC) -> dict[str, int]:
    """One stage for each group of sites that read the same."""
    census = tiny_llama_census(spec)
    return {
        census.site(name).output: number
        for number, group in enumerate(census.groups, start=1)
        for name in group.sites
    }


def _parts_at_groups(model: ir.Model) -> list[Part]:
    return cut_at(model, _stages())


def test_cut_at_groups_each_part_begins_with_their_sites() -> None:
    census = tiny_llama_census(SPEC)
    parts = {part.index: part for part in _parts_at_groups(tiny_llama_onnx(SPEC))}
    assert sorted(parts) == list(range(len(census.groups) + 1))
    for number, group in enumerate(census.groups, start=1):
        part = parts[number]
        assert {census.site(name).output for name in group.sites} <= part.produces
        assert group.input in part.inputs  # it crosses: the part ends where the next one reads
        assert group.input in part.varying
        assert group.input in parts[number - 1].outputs or len(part.varying) > 2
    assert parts[len(census.groups)].outputs == ("logits",)


def test_cut_at_groups_every_node_is_in_one_part() -> None:
    model = tiny_llama_onnx(SPEC)
    parts = _parts_at_groups(model)
    produced = [name for part in parts for name in part.produces]
    assert len(produced) == len(set(produced))
    for part in parts[1:]:
        earlier = {name for other in parts if other.index < part.index for name in other.outputs}
        assert set(part.inputs) <= earlier


def test_cut_at_nothing_is_one_part() -> None:
    (part,) = cut_at(tiny_llama_onnx(SPEC), {})
    assert (part.index, part.inputs, part.outputs) == (0, (), ("logits",))


def test_a_stage_does_not_run_before_what_it_reads() -> None:
    """`b` is asked for at 1, but reads `a`, which runs at 2: it moves there."""
    model = ir.from_onnx_text(
        f"""{HEADER} g (float[1, 4] input_ids) => (float[1, 4] y) {{
            a = Neg (input_ids) b = Abs (a) c = Exp (input_ids) y = Add (b, c)
        }}"""
    )
    first, second = cut_at(model, {"a": 2, "b": 1})
    assert (first.index, first.produces) == (0, frozenset({"c"}))
    assert (second.index, second.inputs) == (2, ("c",))
    assert second.produces == {"a", "b", "y"}


@pytest.mark.parametrize("cut", [_parts, _parts_at_groups], ids=["layers", "groups"])
def test_parts_run_one_after_the_other_give_the_logits(
    cut: Callable[[ir.Model], list[Part]],
) -> None:
    model = tiny_llama_onnx(SPEC)
    types = _dtypes(model)
    ids = np.random.default_rng(0).integers(0, SPEC.vocabulary, (2, 9))
    whole = open_session(_bytes(model))
    expected = whole.run(["logits"], decoder_feeds(whole.get_inputs(), ids))[0]
    carried: dict[str, np.ndarray] = {}
    for part in cut(model):
        piece = extract_part(model, {name: types[name] for name in part.inputs}, part.outputs)
        session = open_session(_bytes(piece))
        own = [value for value in session.get_inputs() if value.name not in carried]
        feeds = {**decoder_feeds(own, ids)}
        feeds.update({v.name: carried[v.name] for v in session.get_inputs() if v not in own})
        results = session.run(list(part.outputs), feeds)
        carried.update(zip(part.outputs, map(np.asarray, results), strict=True))
    # Node for node the same kernels on the same numbers. Optimizations may fuse other nodes at a
    # cut, which moves single roundings: K eps of the largest logit, for each dot product.
    bound = (4 * SPEC.layers + 1) * SPEC.intermediate * 2.0**-23 * np.abs(expected).max()
    np.testing.assert_allclose(carried["logits"], expected, rtol=0, atol=bound)


def test_extracting_leaves_the_model_alone() -> None:
    model = tiny_llama_onnx(SPEC)
    before = _bytes(model)
    types = _dtypes(model)
    for part in _parts(model):
        extract_part(model, {name: types[name] for name in part.inputs}, part.outputs)
    assert _bytes(model) == before


def test_a_graph_without_layers_is_one_part() -> None:
    model = ir.from_onnx_text(
        f"{HEADER} g (float[1, 4] x) => (float[1, 4] y) {{ h = Neg (x) y = Abs (h) }}"
    )
    (part,) = cut_model(model, {}, [])
    assert (part.index, part.inputs, part.outputs) == (0, (), ("y",))
    assert part.produces == {"h", "y"}


def test_a_captured_value_crosses_into_the_body_that_reads_it() -> None:
    model = ir.from_onnx_text(
        f"""{HEADER} g (float[1, 4] x, bool c) => (float[1, 4] y) {{
            a = Neg (x) b = Abs (x)
            y = If (c) <then_branch = t () => (float[1, 4] p) {{ p = Identity (a) }},
                        else_branch = e () => (float[1, 4] q) {{ q = Identity (b) }}>
        }}"""
    )
    parts = cut_model(model, {"a": 0, "b": 0, "y": 1}, [])
    last = parts[-1]
    assert last.index == 2
    assert set(last.inputs) == {"a", "b"}


NAMES = {
    "/model/layers.11/self_attn/q_proj/MatMul": 11,
    "/model/layers.2/mlp/experts/layers.5/MatMul": 5,
    "model/layers/7/mlp": 7,
    "transformer.h.3.attn": 3,
    "blocks.4.mlp": 4,
    "/model/norm/Mul": None,
    "/lm_head/MatMul": None,
    "/model/layernorm.1/Mul": None,
}


@pytest.mark.parametrize(("name", "layer"), NAMES.items())
def test_layer_from_a_name(name: str, layer: int | None) -> None:
    assert node_layer_index(ir.node("Identity", [ir.Value(name="x")], name=name)) == layer


def test_layer_from_the_scope_that_torch_records() -> None:
    node = ir.node("Identity", [ir.Value(name="x")], name="node_MatMul_17")
    node.metadata_props["pkg.torch.onnx.name_scopes"] = (
        "['', 'model.layers.9', 'model.layers.9.mlp']"
    )
    assert node_layer_index(node) == 9
