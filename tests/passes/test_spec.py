"""Text pipelines: what is written is what is read, and what is wrong is said at once."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from faq_onnx.errors import ConfigError
from faq_onnx.opt import optimize
from faq_onnx.passes.spec import (
    SPECS,
    FoldScales,
    ImportedPass,
    MatMulToNBits,
    PassSpec,
    QuantizeEmbedding,
    RemoveUnused,
    format_pipeline,
    parse_pipeline,
)
from faq_onnx.testing import TinyLlama, tiny_llama_onnx


def test_defaults_and_options() -> None:
    text = ' fold-scales{plan="a, b"} , matmul-to-nbits{bits=3,symmetric=true},remove-unused'
    assert parse_pipeline(text) == (
        FoldScales(plan="a, b"),
        MatMulToNBits(bits=3, symmetric=True),
        RemoveUnused(),
    )


def test_passes_of_your_own() -> None:
    assert parse_pipeline("my.module:MyPass{count=3,rate=0.5,name=x,deep=false}") == (
        ImportedPass(
            "my.module:MyPass", (("count", 3), ("rate", 0.5), ("name", "x"), ("deep", False))
        ),
    )


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A pipeline that cannot be read, and what the error says."""

    text: str
    message: str


WRONG = [
    Wrong("", "an empty pipeline"),
    Wrong("fold", "unknown pass 'fold'; passes are fold-scales, "),
    Wrong("matmul-to-nbits{bit=4}", "unknown option bit; options are bits, block_size"),
    Wrong("matmul-to-nbits{bits=four}", "bits=four is not an integer"),
    Wrong("matmul-to-nbits{symmetric=1}", "symmetric=1 is not true or false"),
    Wrong("fold-scales{scale=x}", "scale=x is not a number"),
    Wrong("remove-unused{a=1}", "options are none"),
    Wrong("matmul-to-nbits{bits=4", "cannot read the pipeline at"),
    Wrong("matmul-to-nbits{bits}", "cannot read the options at 'bits'"),
    Wrong("matmul-to-nbits{bits=4,bits=8}", "cannot read the options at"),
]


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.text)
def test_what_is_wrong_is_said(case: Wrong) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pipeline(case.text)
    assert case.message in str(caught.value)


def test_all_problems_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_pipeline("one,two,matmul-to-nbits{three=3}")
    assert len(str(caught.value).splitlines()) == 3


words = st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]))
numbers = st.floats(allow_nan=False, allow_infinity=False)
specs = st.one_of(
    st.builds(FoldScales, plan=words, scale=numbers, application=words),
    st.builds(MatMulToNBits, bits=st.integers(), symmetric=st.booleans(), exclude=words),
    st.builds(QuantizeEmbedding, shared=st.booleans(), block_size=st.integers()),
    st.builds(RemoveUnused),
)


@pytest.mark.property
@given(st.lists(specs, min_size=1).map(tuple))
def test_pipelines_survive_the_way_to_text_and_back(pipeline: tuple[PassSpec, ...]) -> None:
    assert parse_pipeline(format_pipeline(pipeline)) == pipeline


PAST = "past_key_values.0"
SHAPES = (
    f"input_ids:1x2 attention_mask:1x5 position_ids:1x2 {PAST}.key:1x2x3x16 {PAST}.value:1x2x3x16"
)


@pytest.mark.parametrize("name", SPECS)
def test_every_pass_of_the_table_can_be_built(name: str) -> None:
    options = {
        "fold-scales": "{scale=2}",
        "quantize-activations": "{step=1}",
        "quantize-cache": "{scale=1}",
        "static-shapes": f'{{shapes="{SHAPES}"}}',
    }
    model = tiny_llama_onnx(TinyLlama(layers=1))
    result = optimize(model, name + options.get(name, ""))
    nothing_to_do = {
        "lift-matmul-nbits",
        "pack-qkv",
        "quantize-activations",
        "quantize-cache",
        "remove-unused",
    }
    assert result.modified == (name not in nothing_to_do)


def test_a_pass_of_onnx_ir_by_its_import_path() -> None:
    model = tiny_llama_onnx(TinyLlama(layers=1))
    model.graph.append(ir.node("Neg", [model.graph.inputs[0]], name="dead"))
    path = "onnx_ir.passes.common:RemoveUnusedNodesPass"
    assert optimize(model, path).modified
    assert all(node.name != "dead" for node in model.graph)


@dataclasses.dataclass(frozen=True)
class Unbuildable:
    """A pipeline that reads well but fits nothing."""

    text: str
    message: str


UNBUILDABLE = [
    Unbuildable("fold-scales", "needs plan=FOLDER, or scale=NUMBER > 0"),
    Unbuildable("fold-scales{scale=2,application=twist}", "application=twist"),
    Unbuildable("quantize-embedding{shared=true}", "is tied to no head"),
    Unbuildable("static-shapes{shapes=ids}", "found 'ids'; allowed NAME:SIZExSIZE"),
    Unbuildable("no_such_module:Pass", "No module named"),
    Unbuildable("onnx_ir:Model{a=1}", "give module:Class"),
    Unbuildable("builtins:dict", "is no onnx_ir pass"),
]


@pytest.mark.parametrize("case", UNBUILDABLE, ids=lambda case: case.text)
def test_what_cannot_be_built_is_said(case: Unbuildable) -> None:
    with pytest.raises(ConfigError) as caught:
        optimize(tiny_llama_onnx(TinyLlama(layers=1)), case.text)
    assert case.message in str(caught.value)
