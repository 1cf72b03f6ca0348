"""What attention makes of a projection's input, held against whole models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import GroupRole, LinearRole, LinearSite, ScaleGroup
from faq_onnx.calibration.ahead import LookAhead
from faq_onnx.calibration.attention import attention_sites
from faq_onnx.calibration.paired import PairedWalk
from faq_onnx.calibration.paired_moments import Halves, PairedMoments
from faq_onnx.graph.weights import read_weight, replace_weight
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

IDS = np.random.default_rng(5).integers(0, 288, (3, 12))
SPECS = {
    "grouped": TinyLlama(),
    "one head of values": TinyLlama(kv_heads=1),
    "as many as queries": TinyLlama(kv_heads=4),
    "bias": TinyLlama(qkv_bias=True),
    "tied": TinyLlama(tie=None, seed=3),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]


def _seen(spec: TinyLlama, folder: Path, *, aware: bool = True) -> dict[str, PairedMoments]:
    """Moments of every group, nothing rounded."""
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    found = {}

    def keep(group: ScaleGroup, halves: Halves, _look: LookAhead | None) -> Mapping[str, Array]:
        found[group.name] = PairedMoments.mean(halves)
        return {}

    PairedWalk(model, census, folder, aware).run(IDS, [g.name for g in census.groups], keep)
    return found


def _sites(spec: TinyLlama, role: LinearRole) -> list[LinearSite]:
    return [site for site in tiny_llama_census(spec).sites if site.role is role]


def _value(spec: TinyLlama, name: str, change: tuple[LinearSite, Array] | None = None) -> Wide:
    """One value of the float model, [tokens, width], with one weight changed."""
    model = tiny_llama_onnx(spec)
    if change is not None:
        replace_weight(model, *change)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    model.graph.outputs.append(values[name])
    session = open_session(ir.to_proto(model).SerializeToString())
    (result,) = session.run([name], decoder_feeds(session.get_inputs(), IDS))
    return np.asarray(result, np.float64).reshape(-1, np.shape(result)[-1])


@each_spec
def test_the_metric_is_the_change_of_what_o_proj_reads(spec: TinyLlama, tmp_path: Path) -> None:
    """E|a' - a|^2 = sum over heads of tr(dW_g H_g dW_g^T), for any change of v_proj."""
    rng = np.random.default_rng(7)
    found = _seen(spec, tmp_path)
    readers = _sites(spec, LinearRole.O_PROJ)
    for site, reader in zip(_sites(spec, LinearRole.V_PROJ), readers, strict=True):
        weight = read_weight(tiny_llama_onnx(spec), site)
        delta = (0.1 * weight.std() * rng.normal(size=weight.shape)).astype(np.float32)
        (grams,) = (
            m.attention.inputs[site.name]
            for m in found.values()
            if site.name in m.attention.inputs
        )
        assert grams.shape == (spec.kv_heads, spec.hidden, spec.hidden)
        by_head = delta.astype(np.float64).reshape(spec.kv_heads, -1, spec.hidden)
        repeats = spec.heads // spec.kv_heads
        expected = repeats * float(((by_head @ grams) * by_head).sum())
        moved = _value(spec, reader.input, (site, weight + delta)) - _value(spec, reader.input)
        np.testing.assert_allclose((moved**2).sum(axis=1).mean(), expected, rtol=1e-3)


def test_only_on_request(tmp_path: Path) -> None:
    found = _seen(SPECS["grouped"], tmp_path, aware=False)
    assert not any(moments.attention.inputs for moments in found.values())


def test_fused_attention_hides_its_weights() -> None:
    spec = SPECS["grouped"]
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    group = next(g for g in census.groups if g.role is GroupRole.ATTENTION_INPUT)
    found = attention_sites(census, values, group)
    assert found is not None
    assert found.repeats == 2
    product = next(n for n in model.graph if n.inputs and n.inputs[0] is values[found.weights])
    product.op_type = "GroupQueryAttention"
    assert attention_sites(census, values, group) is None


@each_spec
def test_rows_of_queries_meet_the_keys(spec: TinyLlama, tmp_path: Path) -> None:
    """A rotation keeps lengths: the trace of H_out is E|k|^2, and for k E|q|^2 of its heads."""
    found = _seen(spec, tmp_path)
    for layer, (q, k) in enumerate(
        zip(_sites(spec, LinearRole.Q_PROJ), _sites(spec, LinearRole.K_PROJ), strict=True)
    ):
        (rows,) = (m.attention.rows for m in found.values() if q.name in m.attention.rows)
        size = spec.head_dim
        assert rows[q.name].shape == (spec.heads, size, size)
        assert rows[k.name].shape == (spec.kv_heads, size, size)
        assert np.linalg.eigvalsh(rows[q.name]).min() > -1e-9
        keys = _value(spec, f"present.{layer}.key").reshape(len(IDS), spec.kv_heads, -1, size)
        energy = (keys**2).sum(axis=-1).mean(axis=(0, 2))
        repeats = spec.heads // spec.kv_heads
        found_energy = np.trace(rows[q.name], axis1=1, axis2=2)
        np.testing.assert_allclose(found_energy, np.repeat(energy, repeats), rtol=1e-4)
