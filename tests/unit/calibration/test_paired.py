"""The paired walk sums what two whole models compute: the float one and the one rounded so far.

Tolerances as in test_walk: a float32 sum over T tokens is within T eps of exact, relative to the
sum of sizes, and activations move by the rounding of the dot products before them, CHAIN K eps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import LinearRole, ModelCensus, ScaleGroup, Tie
from faq_onnx.calibration import batches as batches_module
from faq_onnx.calibration.ahead import LookAhead
from faq_onnx.calibration.paired import PairedWalk, Solve
from faq_onnx.calibration.paired_moments import Halves, PairedMoments
from faq_onnx.errors import CalibrationError, NonFiniteError
from faq_onnx.graph.weights import read_weight, replace_weight
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
GROUPS = [
    f"layers.{layer}.{role}"
    for layer in range(SPEC.layers)
    for role in ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
] + ["lm_head_input"]
LENGTH, WINDOWS = 8, 5
IDS = np.random.default_rng(3).integers(0, SPEC.vocabulary, (WINDOWS, LENGTH))
EPS = 2.0**-23
CHAIN = 4 * SPEC.layers + 1
RELATIVE = (IDS.size + CHAIN * SPEC.intermediate) * EPS

Array = npt.NDArray[np.float32]
Wide = npt.NDArray[np.float64]
Change = Callable[[Array], Array]


@pytest.fixture(autouse=True)
def _several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a run, so that sums go over runs of 2, 2 and 1."""
    monkeypatch.setattr(batches_module, "TOKENS_PER_RUN", 2 * LENGTH)


def _unchanged(weight: Array) -> Array:
    return weight


def _perturbed(weight: Array) -> Array:
    """Off by 5 % of its size; the same for the same weight."""
    rng = np.random.default_rng(int(np.abs(weight).sum()))
    noise = rng.normal(size=weight.shape) * weight.std() * 0.05
    changed: Array = (weight + noise).astype(np.float32)
    return changed


class _Solved:
    """A `Solve` that changes every weight and remembers what it was given."""

    def __init__(self, model: ir.Model, census: ModelCensus, change: Change) -> None:
        self.model, self.census, self.change = model, census, change
        self.moments: dict[str, PairedMoments] = {}

    def __call__(
        self, group: ScaleGroup, halves: Halves, _look: LookAhead | None = None
    ) -> Mapping[str, Array]:
        assert group.name not in self.moments
        assert sum(half.tokens for half in halves) == IDS.size
        self.moments[group.name] = PairedMoments.mean(halves)
        sites = [self.census.site(name) for name in group.sites]
        return {site.name: self.change(read_weight(self.model, site)) for site in sites}


def _walked(
    folder: Path,
    change: Change = _perturbed,
    spec: TinyLlama = SPEC,
    groups: Iterable[str] = GROUPS,
    model: ir.Model | None = None,
) -> dict[str, PairedMoments]:
    model = tiny_llama_onnx(spec) if model is None else model
    solve = _Solved(model, tiny_llama_census(spec), change)
    PairedWalk(model, solve.census, folder).run(IDS, groups, solve)
    return solve.moments


def _activations(spec: TinyLlama, change: Change, sites: Iterable[str]) -> dict[str, Wide]:
    """All values inside of the whole model with the weights of `sites` changed, float64 [T, K]."""
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    for name in sites:
        site = census.site(name)
        replace_weight(model, site, change(read_weight(model, site)))
    wanted = [group.input for group in census.groups]
    for site in census.sites:
        place = _residual_of(model, site.output)
        wanted += [site.output, *place] if place else [site.output]
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    names = list(dict.fromkeys(wanted))
    for name in names:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
    session = open_session(ir.to_proto(model).SerializeToString())
    results = session.run(names, decoder_feeds(session.get_inputs(), IDS))
    return {
        name: np.asarray(array, np.float64).reshape(-1, np.shape(array)[-1])
        for name, array in zip(names, results, strict=True)
    }


def _residual_of(model: ir.Model, output: str) -> tuple[str, str] | None:
    """What is added to a site's output, and the sum, by the names that optimum gives them."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    users = [node for node, _ in values[output].uses()]
    if not users or users[0].op_type != "Add" or "_proj" in str(users[0].name):
        return None
    before = next(v for v in users[0].inputs if v is not None and v.name != output)
    return str(before.name), str(users[0].outputs[0].name)


def _in_layers(census: ModelCensus) -> list[str]:
    """All but the head: nothing comes behind it, and its weight may be the embedding."""
    return [site.name for site in census.sites if site.role is not LinearRole.LM_HEAD]


def _bound(left: Wide, right: Wide) -> float:
    """Of entries of E[left^T right]."""
    return float(4 * RELATIVE * np.sqrt((left**2).mean(0).max() * (right**2).mean(0).max()))


SPECS = {
    "plain": SPEC,
    "bias": TinyLlama(qkv_bias=True),
    "tied": TinyLlama(tie=Tie.SHARED),
    "equal tables": TinyLlama(tie=Tie.DUPLICATE),
    "one layer": TinyLlama(layers=1),
}
each_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


@each_spec
def test_every_group_is_reached_in_the_order_of_the_graph(spec: TinyLlama, tmp_path: Path) -> None:
    expected = GROUPS[: 4 * spec.layers] + GROUPS[-1:]
    assert list(_walked(tmp_path, spec=spec, groups=reversed(expected))) == expected


def test_only_the_groups_that_were_asked_for_are_stopped_at(tmp_path: Path) -> None:
    asked = ["layers.1.mlp_input", "layers.0.mlp_hidden"]
    found = _walked(tmp_path, groups=[*asked, "nothing"])
    assert list(found) == asked[::-1]
    # the others stay float: nothing has changed in front of the first
    first = found["layers.0.mlp_hidden"]
    assert np.abs(first.cross).max() <= 4 * RELATIVE * np.abs(first.gram).max()
    sites = next(g.sites for g in CENSUS.groups if g.name == asked[1])
    x = _activations(SPEC, _perturbed, sites)[_input("layers.1.mlp_input")]
    gram = found["layers.1.mlp_input"].gram
    np.testing.assert_allclose(gram, x.T @ x / len(x), rtol=0, atol=_bound(x, x))


def test_no_groups_no_work(tmp_path: Path) -> None:
    assert _walked(tmp_path, groups=()) == {}
    assert [path.name for path in tmp_path.iterdir()] == []


def _input(group: str) -> str:
    return next(g.input for g in CENSUS.groups if g.name == group)


@each_spec
def test_with_the_float_weights_both_paths_stay_equal(spec: TinyLlama, tmp_path: Path) -> None:
    census = tiny_llama_census(spec)
    expected = _activations(spec, _unchanged, ())
    found = _walked(tmp_path, _unchanged, spec, [group.name for group in census.groups])
    for group in census.groups:
        x, moments = expected[group.input], found[group.name]
        bound = _bound(x, x)
        np.testing.assert_allclose(moments.gram, x.T @ x / len(x), rtol=0, atol=bound)
        assert np.abs(moments.cross).max() <= bound


@each_spec
def test_moments_are_those_of_two_whole_models(spec: TinyLlama, tmp_path: Path) -> None:
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    float_x = _activations(spec, _unchanged, ())
    low_x = _activations(spec, _perturbed, _in_layers(census))
    found = _walked(tmp_path, _perturbed, spec, [group.name for group in census.groups])
    for number, group in enumerate(census.groups):
        x, low, moments = float_x[group.input], low_x[group.input], found[group.name]
        assert moments.gram.dtype == moments.cross.dtype == np.float32
        bound = _bound(low, low)
        np.testing.assert_allclose(moments.gram, low.T @ low / len(low), rtol=0, atol=bound)
        places = {s: _residual_of(model, census.site(s).output) for s in group.sites}
        assert set(moments.residual) == {site for site, place in places.items() if place}
        if not moments.residual:
            cross = (x - low).T @ low / len(low)
            np.testing.assert_allclose(moments.cross, cross, rtol=0, atol=_bound(x, low))
            assert number == 0 or np.abs(cross).max() > 10 * _bound(x, low)
        for site, residual in moments.residual.items():
            before, after = places[site] or ("", "")
            missing = float_x[after] - low_x[before]
            bound = _bound(np.abs(float_x[after]) + np.abs(low_x[before]), low)
            wanted = missing.T @ low / len(low)
            np.testing.assert_allclose(residual, wanted, rtol=0, atol=bound)
            assert np.abs(wanted).max() > 10 * bound


def test_sites_that_add_to_the_residual_stream(tmp_path: Path) -> None:
    """With nothing rounded, what such a site should add is what it adds: W E[x^T x]."""
    found = _walked(tmp_path, _unchanged)
    model, seen = tiny_llama_onnx(SPEC), set()
    for moments in found.values():
        for name, residual in moments.residual.items():
            site = CENSUS.site(name)
            seen.add(site.role)
            expected = read_weight(model, site).astype(np.float64) @ moments.gram
            # the streams are larger than what is added to them
            bound = 100 * RELATIVE * np.abs(expected).max()
            np.testing.assert_allclose(residual, expected, rtol=0, atol=bound)
    assert seen == {LinearRole.O_PROJ, LinearRole.DOWN_PROJ}


def test_a_bias_is_not_what_the_weight_should_add(tmp_path: Path) -> None:
    model, census = tiny_llama_onnx(SPEC), CENSUS
    bias = np.random.default_rng(5).normal(size=SPEC.hidden).astype(np.float32)
    for role in (LinearRole.O_PROJ, LinearRole.DOWN_PROJ):
        for site in [site for site in CENSUS.sites if site.role is role]:
            name = f"{site.name}.bias"
            _add_bias(model, site.output, name, bias)
            told = site.model_copy(update={"bias": name})
            sites = tuple(told if s.name == site.name else s for s in census.sites)
            census = census.model_copy(update={"sites": sites})
    solve = _Solved(model, census, _unchanged)
    PairedWalk(model, census, tmp_path).run(IDS, GROUPS, solve)
    found = {name: r for m in solve.moments.values() for name, r in m.residual.items()}
    assert len(found) == 2 * SPEC.layers
    for group in census.groups:
        for name in set(group.sites) & set(found):
            weight = read_weight(model, census.site(name)).astype(np.float64)
            expected = weight @ solve.moments[group.name].gram
            bound = 100 * RELATIVE * np.abs(expected).max()
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=bound)


def _add_bias(model: ir.Model, output: str, name: str, bias: Array) -> None:
    """An Add behind the MatMul."""
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    value = ir.val(name, const_value=ir.tensor(bias, name=name))
    model.graph.register_initializer(value)
    site = values[output]
    producer = site.producer()
    assert producer is not None
    users = [(node, index) for node, index in site.uses()]
    node = ir.node("Add", [site, value], name=f"{name}/Add")
    model.graph.insert_after(producer, node)
    node.outputs[0].name = f"{output}+bias"
    for user, index in users:
        user.replace_input_with(index, node.outputs[0])


def test_a_site_that_is_not_solved_stays_float(tmp_path: Path) -> None:
    """As one that is excluded."""
    model = tiny_llama_onnx(SPEC)
    solved = _Solved(model, CENSUS, _perturbed)
    kept = {site.name for site in CENSUS.sites if site.role is LinearRole.GATE_PROJ}

    def solve(group: ScaleGroup, halves: Halves, _look: LookAhead | None) -> Mapping[str, Array]:
        weights = solved(group, halves)
        return {name: weight for name, weight in weights.items() if name not in kept}

    PairedWalk(model, CENSUS, tmp_path).run(IDS, GROUPS, solve)
    sites = [site.name for site in CENSUS.sites if site.name not in kept]
    x = _activations(SPEC, _perturbed, sites)[_input("lm_head_input")]
    gram = solved.moments["lm_head_input"].gram
    np.testing.assert_allclose(gram, x.T @ x / len(x), rtol=0, atol=_bound(x, x))


def test_the_model_is_left_alone_and_nothing_is_kept(tmp_path: Path) -> None:
    model = tiny_llama_onnx(SPEC)
    before = ir.to_proto(model).SerializeToString()
    _walked(tmp_path, model=model)
    assert ir.to_proto(model).SerializeToString() == before
    assert not list(tmp_path.rglob("*.npy"))


def test_disk_holds_the_inputs_of_one_part(tmp_path: Path) -> None:
    counts = []

    def solve(_group: ScaleGroup, _halves: Halves, _look: LookAhead | None) -> Mapping[str, Array]:
        counts.append(len(list(tmp_path.rglob("*.run0.npy"))))
        return {}

    PairedWalk(tiny_llama_onnx(SPEC), CENSUS, tmp_path).run(IDS, GROUPS, solve)
    # hidden state, what a group reads, and what comes out of it
    assert max(counts) <= 6


def test_a_walk_again_in_the_same_folder_gives_the_same(tmp_path: Path) -> None:
    """After another one that stopped half way."""

    def stop(group: ScaleGroup, _halves: Halves, _look: LookAhead | None) -> Mapping[str, Array]:
        if group.name == "layers.1.mlp_input":
            raise KeyboardInterrupt
        return {}

    walk = PairedWalk(tiny_llama_onnx(SPEC), CENSUS, tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        walk.run(IDS[:2], GROUPS, stop)
    again, fresh = _walked(tmp_path / "a"), _walked(tmp_path / "b")
    for name, moments in fresh.items():
        np.testing.assert_array_equal(again[name].gram, moments.gram)
        np.testing.assert_array_equal(again[name].cross, moments.cross)
        for site, residual in moments.residual.items():
            np.testing.assert_array_equal(again[name].residual[site], residual)


def test_float16(tmp_path: Path) -> None:
    spec = TinyLlama(dtype="float16")
    census = tiny_llama_census(spec)
    low_x = _activations(spec, _perturbed, _in_layers(census))
    found = _walked(tmp_path, _perturbed, spec)
    for group in census.groups:
        low = low_x[group.input]
        # 11 bits at each of the values that one goes through
        bound = 4 * CHAIN * 2.0**-11 * (low**2).mean(0).max()
        gram = found[group.name].gram
        np.testing.assert_allclose(gram, low.T @ low / len(low), rtol=0, atol=bound)


@pytest.mark.parametrize("number", [np.inf, np.nan, 1e38])
def test_a_low_bit_path_that_overflows_is_named(number: float, tmp_path: Path) -> None:
    def spoiled(weight: Array) -> Array:
        changed = weight.copy()
        changed[3] = number
        return changed

    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp_hidden") as caught:
        _walked(tmp_path, spoiled, groups=["layers.0.mlp_input", "layers.0.mlp_hidden"])
    text = str(caught.value)
    assert _input("layers.0.mlp_hidden") in text
    assert "1 of 128 channels (first: 3)" in text
    assert "--path float" in text


def test_no_windows_at_all_is_an_error(tmp_path: Path) -> None:
    solve: Solve = _Solved(tiny_llama_onnx(SPEC), CENSUS, _unchanged)
    walk = PairedWalk(tiny_llama_onnx(SPEC), CENSUS, tmp_path)
    with pytest.raises(CalibrationError, match="no token windows"):
        walk.run(IDS[:0], GROUPS, solve)
