"""Options and limits of the target qnn, and its graphs, without Qualcomm's compiler."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest

from faq_onnx import pipeline
from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.target import ModelOutline, OperatorUse, PlannedWeight
from faq_onnx.errors import ConfigError, UnsupportedModelError
from faq_onnx.graph.io import load_model
from faq_onnx.targets import qnn
from faq_onnx.targets.opening import open_target
from faq_onnx.targets.qnn_graphs import Lengths, write_graphs
from faq_onnx.testing import write_tiny_llama

INPUTS = ("input_ids", "attention_mask", "position_ids")
FORMAT = BlockFormat(code_bits=4, storage_bits=4, block_size=32, symmetric=False)
WEIGHT = PlannedWeight(place="q", kind="linear", rows=8, width=64, dtype="float32", format=FORMAT)


def _refusals(
    *weights: PlannedWeight, inputs: tuple[str, ...] = INPUTS, operator: str = ""
) -> str:
    domain, _, op_type = operator.rpartition("::")
    uses = [OperatorUse(op_type=op_type, domain=domain, first="node", count=3)] if operator else []
    outline = ModelOutline(weights=weights, model_bytes=9, inputs=inputs, operators=tuple(uses))
    return "\n".join(refusal.text for refusal in open_target("qnn").refusals(outline))


def test_what_runs_is_not_refused() -> None:
    table = WEIGHT.model_copy(update={"kind": "embedding", "format": None})
    assert _refusals(WEIGHT, table, operator="MatMul") == ""
    assert _refusals(operator="RotaryEmbedding") == ""


@pytest.mark.parametrize(
    ("changes", "found", "way_out"),
    [
        ({"width": 72}, "K=72", "--exclude 'q'"),
        ({"width": 80}, "K=80", "--block-size 16"),
        ({"kind": "embedding"}, "embedding in 4 bits", "--embedding keep"),
        ({"has_bias": True}, "a bias input", "--target qnn"),
        ({"float_zero_points": True}, "float zero points", "--target qnn"),
    ],
)
def test_forms_of_weights_that_are_refused(
    changes: dict[str, object], found: str, way_out: str
) -> None:
    text = _refusals(WEIGHT.model_copy(update=changes))
    assert found in text
    assert way_out in text


@pytest.mark.parametrize(
    ("operator", "way_out"),
    [
        ("com.microsoft::GroupQueryAttention", "--no-fuse-attention"),
        ("com.microsoft::RotaryEmbedding", "--no-fuse-attention"),
        ("Attention", "optimum"),
        ("DequantizeLinear", "--target qnn"),
        ("If", "not merged"),
    ],
)
def test_operators_that_are_refused(operator: str, way_out: str) -> None:
    text = _refusals(operator=operator)
    assert text.startswith("node (and 2 more): the operator")
    assert way_out in text


def test_a_decoder_that_counts_positions_itself_is_refused() -> None:
    assert "the model: no input position_ids" in _refusals(inputs=INPUTS[:2])


def test_options() -> None:
    assert open_target("qnn", {"arch": "79"}).options == qnn.QnnOptions(arch="v79")
    with pytest.raises(ConfigError, match=r"found 'v68'; v68 \(Snapdragon 888\) has no"):
        open_target("qnn", {"arch": "v68"})
    with pytest.raises(ConfigError, match="allowed v69, v73, v75, v79, v81"):
        open_target("qnn", {"arch": "v99"})
    with pytest.raises(ConfigError, match="must be more than prompt_tokens, which is 64"):
        open_target("qnn", {"context": "64"})


def test_16_bit_activations_need_weights_of_lpbq() -> None:
    target = open_target("qnn", {"activations": "16-bit"})

    def refused(block_scales: str) -> str:
        fmt = FORMAT.model_copy(update={"symmetric": True, "block_scales": block_scales})
        weights = (WEIGHT.model_copy(update={"format": fmt}),)
        outline = ModelOutline(weights=weights, model_bytes=9, inputs=INPUTS)
        return "\n".join(refusal.text for refusal in target.refusals(outline))

    assert refused("lpbq") == ""
    assert "1 weights, none with block scales of lpbq" in refused("8-bit")
    assert "--block-scales lpbq --symmetric" in refused("float")


def test_16_bit_activations_over_16_tokens_are_refused() -> None:
    options = {"activations": "16-bit", "prompt_tokens": "16"}
    with pytest.raises(ConfigError, match="not with prompt_tokens=16, where the compiler"):
        open_target("qnn", options)
    with pytest.raises(ConfigError, match="found '8-bit'"):
        open_target("qnn", {"activations": "8-bit"})


def test_three_graphs_share_one_file_of_weights(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    before = (tmp_path / "model.onnx").stat().st_size
    graphs = write_graphs(tmp_path, tmp_path / "work", Lengths(4, 16))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir() if path.is_file()}
    assert sizes["model.onnx.data"] > before / 2
    assert all(sizes[path.name] < before / 2 for path in graphs.values())
    for name, tokens in (("prefill", 4), ("decode", 1)):
        model = load_model(graphs[name])
        shapes = {value.name: value.shape for value in model.graph.inputs}
        assert shapes["input_ids"] == ir.Shape([1, tokens])
        assert shapes["attention_mask"] == ir.Shape([1, 16])
        assert shapes["past_key_values.0.key"] == ir.Shape([1, 2, 16 - tokens, 16])
        assert "Pow" not in {node.op_type for node in model.graph}


def test_a_cache_of_unknown_width_is_refused(tmp_path: Path) -> None:
    path = write_tiny_llama(tmp_path)
    model = ir.load(path)
    for value in model.graph.inputs:
        if "past" in (value.name or ""):
            value.shape = ir.Shape(["batch", 2, "past", "width"])
    ir.save(model, path)
    with pytest.raises(UnsupportedModelError, match="static numbers of heads and channels"):
        write_graphs(tmp_path, tmp_path / "work", Lengths(4, 16))


def test_without_the_compiler_the_graphs_are_written_and_it_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qnn, "is_here", lambda: False)
    source = write_tiny_llama(tmp_path / "source").parent
    options = {"prompt_tokens": 4, "context": 16}
    out = tmp_path / "out"
    done = pipeline.package(str(source), out, target="qnn", target_options=options)
    assert done == PackageManifest.load(out / "package.json")
    assert "not compiled: onnxruntime-qnn is not here" in done.notes[0]
    assert {check.passed for check in done.proof.checks} == {None}
    assert (out / "decode.onnx").is_file()
    assert not list(out.glob("*_ctx*"))


def test_the_trial_is_a_program_of_ours() -> None:
    assert importlib.util.find_spec("faq_onnx.targets._qnn_trial") is not None
