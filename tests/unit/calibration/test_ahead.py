"""Looking through down_proj at the residual stream, against the whole model itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import GroupRole, LinearRole, ScaleGroup
from faq_onnx.calibration import batches as batches_module
from faq_onnx.calibration.ahead import Look, LookAhead, find_ahead, measure_slopes, stream_metric
from faq_onnx.calibration.paired import PairedWalk
from faq_onnx.calibration.paired_moments import Halves
from faq_onnx.calibration.residual import Residual
from faq_onnx.graph.weights import read_initializer, read_weight
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
LENGTH, WINDOWS = 16, 16
IDS = np.random.default_rng(3).integers(0, SPEC.vocabulary, (WINDOWS, LENGTH))

Array = npt.NDArray[np.float32]


@pytest.fixture(autouse=True)
def _several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "TOKENS_PER_RUN", LENGTH)


def _groups() -> list[ScaleGroup]:
    return list(CENSUS.groups)


def test_gate_and_up_end_in_what_down_proj_reads() -> None:
    model = tiny_llama_onnx(SPEC)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    place = Residual("before", "after")
    for group in _groups():
        ahead = find_ahead(CENSUS, values, _groups(), group, lambda _site: place)
        if group.role is not GroupRole.MLP_INPUT:
            assert ahead is None, group.name
            continue
        assert ahead is not None
        roles = {CENSUS.site(name).role for name in ahead.outputs}
        assert roles == {LinearRole.GATE_PROJ, LinearRole.UP_PROJ}
        assert CENSUS.site(ahead.site).role is LinearRole.DOWN_PROJ
        assert CENSUS.site(ahead.site).layer_index == group.layer_index
        nearest = [reader.layer_index for reader in ahead.readers]
        last = group.layer_index == SPEC.layers - 1
        assert nearest == ([None] if last else [(group.layer_index or 0) + 1] * 2)


def test_the_metric_is_that_of_the_readers() -> None:
    model = tiny_llama_onnx(SPEC)
    readers = [group for group in _groups() if group.role is GroupRole.ATTENTION_INPUT][:1]
    absorber = readers[0].absorber
    assert absorber is not None
    assert absorber.initializer is not None
    gain = read_initializer(model, absorber.initializer).astype(np.float64) + absorber.offset
    weights = [read_weight(model, CENSUS.site(name)) for name in readers[0].sites]
    stacked = np.concatenate(weights).astype(np.float64) * gain
    expected = np.sqrt(np.diagonal(stacked.T @ stacked))
    found = stream_metric(model, CENSUS, readers)
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-5)


def test_slopes_are_the_derivatives() -> None:
    """Of x sigmoid(x) times up."""
    rng = np.random.default_rng(0)
    gate, up = (rng.normal(size=(1, 5, 7)).astype(np.float32) * 3 for _ in range(2))
    names = ("gate", "up")
    inputs = [
        ir.Value(name=n, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None] * 3))
        for n in names
    ]
    sigmoid = ir.node("Sigmoid", [inputs[0]])
    act = ir.node("Mul", [inputs[0], sigmoid.outputs[0]])
    hidden = ir.node("Mul", [act.outputs[0], inputs[1]])
    hidden.outputs[0].name = "hidden"
    hidden.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        inputs, hidden.outputs, nodes=[sigmoid, act, hidden], opset_imports={"": 20}, name="g"
    )
    session = open_session(ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString())
    slopes = measure_slopes(
        session, "hidden", dict(zip(names, (gate, up), strict=True)), {"g": "gate", "u": "up"}
    )
    share = 1 / (1 + np.exp(-gate.astype(np.float64)))
    np.testing.assert_allclose(slopes["u"], gate * share, rtol=1e-3, atol=1e-3)
    expected = up * (share + gate * share * (1 - share))
    np.testing.assert_allclose(slopes["g"], expected, rtol=2e-3, atol=2e-3)


def _walk(folder: Path, noise: float) -> dict[str, tuple[float, float]]:
    """What the stream is off behind each group that looks ahead, before and after it did."""
    model = tiny_llama_onnx(SPEC)
    energies: dict[str, tuple[float, float]] = {}

    def solve(group: ScaleGroup, _halves: Halves, look: LookAhead | None) -> Mapping[str, Array]:
        weights = {name: read_weight(model, CENSUS.site(name)) for name in group.sites}
        assert (look is not None) == (group.role is GroupRole.MLP_INPUT)
        if look is not None:
            assert isinstance(look, Look)
            moved = look(weights)
            energies[group.name] = (_missing(look, weights), _missing(look, moved))
            return moved
        rng = np.random.default_rng(len(energies))
        return {
            name: (w + noise * w.std() * rng.normal(size=w.shape)).astype(np.float32)
            for name, w in weights.items()
        }

    groups = [group.name for group in _groups()]
    PairedWalk(model, CENSUS, folder, look_ahead=True).run(IDS, groups, solve)
    return energies


def _missing(look: Look, weights: Mapping[str, Array]) -> float:
    see = look.observe(weights)
    return sum(float(np.square(see(number).missing).sum()) for number in range(look.batches))


def test_where_nothing_is_off_nothing_is_missing(tmp_path: Path) -> None:
    for before, after in _walk(tmp_path, 0.0).values():
        assert before < 1e-6 * IDS.size
        assert after < 1e-6 * IDS.size


def test_what_is_off_is_met(tmp_path: Path) -> None:
    """On the whole of the tokens, each half of which chose how far the other's step goes."""
    energies = _walk(tmp_path, 0.2)
    assert len(energies) == SPEC.layers
    for before, after in energies.values():
        assert after <= before
    assert any(after < 0.99 * before for before, after in energies.values())
