"""Embeddings, roles, families and damaged weights; the census of real exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.analysis import canonicalise, check_finite, take_census
from faq_onnx.artifacts.sites import (
    Absorber,
    AbsorberKind,
    LinearSite,
    ModelCensus,
    Tie,
    WeightLayout,
)
from faq_onnx.errors import NonFiniteError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.graph.weights import transform_initializer

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'
ROWS, WIDTH = 80, 32
EXPORTS = Path(__file__).parents[2] / "fixtures" / "exporters"
FLOAT32_EXPORTS = sorted(path.name for path in EXPORTS.iterdir() if path.name.endswith("fp32"))


def _table() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(ROWS, WIDTH)).astype(np.float32)


def _tied(body: str, **weights: np.ndarray) -> ir.Model:
    tensors = [ir.tensor(value, name=name) for name, value in weights.items()]
    text = f"{HEADER} g (int64[1, 5] input_ids, int64[1, 5] position_ids) => (y) {{ {body} }}"
    return canonicalise(ir.from_onnx_text(text, initializers=tensors))


def test_shared_table_is_tied_and_not_scalable() -> None:
    body = "e = Gather (w, input_ids) t = Transpose <perm = [1, 0]> (w) y = MatMul (e, t)"
    census = take_census(_tied(body, w=_table()), None)
    table = census.embeddings[0]
    assert (table.weight, table.rows, table.width, table.tie) == ("w", ROWS, WIDTH, Tie.SHARED)
    assert table.tied_site == census.sites[0].name
    assert not census.groups[0].scalable


def test_embedding_of_a_transposed_table() -> None:
    body = "t = Transpose <perm = [1, 0]> (w) e = Gather (t, input_ids) y = MatMul (e, w)"
    table = take_census(_tied(body, w=_table().T.copy()), None).embeddings[0]
    assert (table.rows, table.width, table.tie) == (ROWS, WIDTH, Tie.SHARED)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("changed", [False, True])
def test_equal_tables_are_duplicates(*, transposed: bool, changed: bool) -> None:
    head = _table()
    head[-1, -1] += np.float32(changed)
    body = "e = Gather (w, input_ids) y = MatMul (e, v)"
    if transposed:
        body = "e = Gather (w, input_ids) t = Transpose <perm = [1, 0]> (v) y = MatMul (e, t)"
    stored = head if transposed else head.T.copy()
    table = take_census(_tied(body, w=_table(), v=stored), None).embeddings[0]
    assert table.tie is (None if changed else Tie.DUPLICATE)


def test_table_of_positions_is_no_embedding() -> None:
    body = "e = Gather (w, position_ids) y = MatMul (e, v)"
    census = take_census(_tied(body, w=_table(), v=_table().T.copy()), None)
    assert census.embeddings == ()
    assert [weight.weight for weight in census.skipped] == ["w"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_named(value: float) -> None:
    weight = _table().T.copy()
    weight[3, 7:9] = value
    model = _tied("e = Gather (w, input_ids) y = MatMul (e, v)", w=_table(), v=weight)
    with pytest.raises(NonFiniteError, match=r"'v' has 2 values .* index \[3, 7\]"):
        check_finite(model, take_census(model, None))


def _load(name: str) -> tuple[ir.Model, dict[str, object]]:
    config = json.loads((EXPORTS / name / "config.json").read_text())
    return canonicalise(load_model(EXPORTS / name / "model.onnx")), config


@pytest.mark.parametrize("name", FLOAT32_EXPORTS)
def test_topology_alone_gives_the_same_roles(name: str) -> None:
    model, config = _load(name)
    named = take_census(model, config)
    for number, node in enumerate(ir.traversal.RecursiveGraphIterator(model.graph)):
        node.name = f"n{number}"
        node.metadata_props.clear()
    for number, value in enumerate(list(model.graph.initializers.values())):
        value.name = f"w{number}"
    bare = take_census(model, config)
    assert [site.role for site in bare.sites] == [site.role for site in named.sites]
    assert [site.layer_index for site in bare.sites] == [site.layer_index for site in named.sites]
    assert [group.name for group in bare.groups] == [group.name for group in named.groups]
    assert any("read off the graph" in warning for warning in bare.warnings)


@pytest.mark.parametrize("name", FLOAT32_EXPORTS)
def test_family_is_recognised_with_and_without_config(name: str) -> None:
    model, config = _load(name)
    family = name.split("-")[1]
    assert take_census(model, config).family == family
    without = take_census(model, None)
    assert without.family == family
    assert any("assumed" in warning for warning in without.warnings)


def test_unknown_model_type_is_a_warning() -> None:
    model, config = _load("optimum-llama-untied-fp32")
    census = take_census(model, config | {"model_type": "novel"})
    assert census.family == "unknown"
    assert any("'novel'" in warning for warning in census.warnings)
    assert all(group.absorber is not None for group in census.groups)


# --- folding any scale into the absorbers keeps the function -----------------------------------


@pytest.mark.parametrize("name", FLOAT32_EXPORTS)
def test_absorbers_absorb(name: str, tmp_path: Path) -> None:
    model, config = _load(name)
    census = take_census(model, config)
    rng = np.random.default_rng(0)
    folded = 0
    for group in census.groups:
        if group.absorber is None or not group.scalable:
            continue
        # Powers of two: scaling rounds nothing, so only kernels that sum in another order differ.
        scale = np.exp2(rng.integers(-1, 2, group.in_features)).astype(np.float32)
        heads = _per_row(group.absorber, scale)
        scale = _per_channel(group.absorber, heads)
        for site in group.sites:
            _scale_inputs(model, census.site(site), scale)
        _divide(model, census, group.absorber, heads)
        folded += 1
    assert folded >= len(census.groups) - 1  # a tied head cannot be scaled
    save_model(model, tmp_path / "model.onnx")
    expected = _logits(EXPORTS / name / "model.onnx")
    actual = _logits(tmp_path / "model.onnx")
    # float32, at most 128 terms a sum, about 40 operations deep: 2^-24 * sqrt(128) * 40 = 3e-5
    assert np.abs(actual - expected).max() <= 3e-5 * np.abs(expected).max()


def _per_row(absorber: Absorber, scale: np.ndarray) -> np.ndarray:
    if absorber.head_dim is None:
        return scale
    groups = scale.reshape(-1, absorber.repeats, absorber.head_dim)
    return np.ascontiguousarray(groups[:, 0]).ravel()


def _per_channel(absorber: Absorber, rows: np.ndarray) -> np.ndarray:
    if absorber.head_dim is None:
        return rows
    heads = rows.reshape(-1, 1, absorber.head_dim)
    return np.repeat(heads, absorber.repeats, axis=1).ravel()


def _scale_inputs(model: ir.Model, site: LinearSite, scale: np.ndarray) -> None:
    shaped = scale if site.layout is WeightLayout.N_K else scale[:, None]
    transform_initializer(model, site.weight, lambda values: values * shaped)


def _divide(model: ir.Model, census: ModelCensus, absorber: Absorber, scale: np.ndarray) -> None:
    if absorber.kind is AbsorberKind.NORM:
        assert absorber.initializer is not None
        offset = np.float32(absorber.offset)
        transform_initializer(
            model, absorber.initializer, lambda values: (values + offset) / scale - offset
        )
        return
    assert absorber.site is not None
    site = census.site(absorber.site)
    rows = np.ones(site.out_features, np.float32)
    rows[absorber.row_start : absorber.row_start + scale.size] = scale
    shaped = rows[:, None] if site.layout is WeightLayout.N_K else rows
    transform_initializer(model, site.weight, lambda values: values / shaped)
    if site.bias is not None:
        transform_initializer(model, site.bias, lambda values: values / rows)


def _logits(path: Path) -> np.ndarray:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    tokens, past = 6, 3
    feeds: dict[str, np.ndarray] = {}
    for tensor in session.get_inputs():
        if tensor.name == "input_ids":
            feeds[tensor.name] = np.arange(tokens)[None] * 7
        elif "mask" in tensor.name:
            feeds[tensor.name] = np.ones((1, past + tokens), np.int64)
        elif "position" in tensor.name:
            feeds[tensor.name] = np.arange(past, past + tokens)[None]
        else:  # a cache of zeros is the same scaled or not
            feeds[tensor.name] = np.zeros((1, 2, past, 16), np.float32)
    logits: np.ndarray = session.run(["logits"], feeds)[0]
    return logits
