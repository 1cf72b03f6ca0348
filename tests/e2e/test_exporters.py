"""What the census must find in the same tiny decoders as four exporters write them.

Expectations come from the architectures (tests/fixtures/exporters/README.md), and weights are
compared by content: the float32 initializers that mobius and genai name after the Hugging Face
modules say what every other file has to give for the same layer and role.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.sites import (
    AbsorberKind,
    GroupRole,
    LinearRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
    Tie,
    WeightLayout,
)
from faq_onnx.calibration.ahead import LookAhead
from faq_onnx.calibration.paired import PairedWalk
from faq_onnx.calibration.paired_moments import Halves, PairedMoments
from faq_onnx.cli.main import main
from faq_onnx.graph.io import load_model
from faq_onnx.graph.weights import read_initializer, read_weight
from faq_onnx.passes import attention_nodes, is_packed

FIXTURES = Path(__file__).parents[1] / "fixtures" / "exporters"
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 64, 96, 160
HEAD_DIM, QUERY_HEADS, KV_HEADS = 16, 4, 2
QUERY_ROWS, KV_ROWS = QUERY_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fixture:
    """A folder name taken apart: EXPORTER-ARCHITECTURE-HEAD[-gemm]-DTYPE."""

    name: str

    @property
    def exporter(self) -> str:
        """Who wrote the file; dynamo carries the opset."""
        return self.name.split("-")[0]

    @property
    def architecture(self) -> str:
        """Name of the architecture."""
        return self.name.split("-")[1]

    @property
    def head(self) -> str:
        """untied, tied (one initializer) or tieddup (two equal ones)."""
        return self.name.split("-")[2]

    @property
    def gemm(self) -> bool:
        """Linear layers are Gemm nodes."""
        return "-gemm-" in self.name

    @property
    def half(self) -> bool:
        """Weights are float16."""
        return self.name.endswith("fp16")

    @property
    def packed(self) -> bool:
        """Query, key and value in one matrix; mobius does so only where no norm follows."""
        no_head_norm = self.architecture in ("llama", "qwen2")
        return self.exporter == "genai" or (self.exporter == "mobiuscpu" and no_head_norm)

    @property
    def shared_head(self) -> bool:
        """The head and the embedding read one initializer."""
        return self.head == "tied"

    @property
    def attention_roles(self) -> tuple[LinearRole, ...]:
        """Roles of what reads the attention input, the value producer last."""
        if self.packed:
            return (LinearRole.QKV_PROJ,)
        return (LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.V_PROJ)

    @property
    def path(self) -> Path:
        """The folder."""
        return FIXTURES / self.name

    def config(self) -> dict[str, object]:
        """The parsed config.json."""
        loaded: dict[str, object] = json.loads((self.path / "config.json").read_text("utf-8"))
        return loaded

    def dtype(self, layer: int | None, role: LinearRole) -> str:
        """Stored type; optimum's float16 files are mixed (see the README)."""
        if not self.half:
            return "float32"
        if self.exporter != "optimum":
            return "float16"
        if self.architecture == "gemma3":
            return "float16" if layer == 0 and role in self.attention_roles else "float32"
        return "float32" if role is LinearRole.O_PROJ else "float16"


ALL = tuple(
    Fixture(folder.name)
    for folder in sorted(FIXTURES.iterdir())
    if (folder / "model.onnx").exists()
)
each_fixture = pytest.mark.parametrize("fixture", ALL, ids=lambda fixture: fixture.name)

SHAPES = {  # [N, K]
    LinearRole.Q_PROJ: (QUERY_ROWS, HIDDEN),
    LinearRole.K_PROJ: (KV_ROWS, HIDDEN),
    LinearRole.V_PROJ: (KV_ROWS, HIDDEN),
    LinearRole.QKV_PROJ: (QUERY_ROWS + 2 * KV_ROWS, HIDDEN),
    LinearRole.O_PROJ: (HIDDEN, QUERY_ROWS),
    LinearRole.GATE_PROJ: (INTERMEDIATE, HIDDEN),
    LinearRole.UP_PROJ: (INTERMEDIATE, HIDDEN),
    LinearRole.DOWN_PROJ: (HIDDEN, INTERMEDIATE),
    LinearRole.LM_HEAD: (VOCABULARY, HIDDEN),
}
ADD_TO_THE_STREAM = (LinearRole.O_PROJ, LinearRole.DOWN_PROJ)
MLP_ROLES = (LinearRole.GATE_PROJ, LinearRole.UP_PROJ, LinearRole.DOWN_PROJ)


@functools.cache
def load(name: str) -> ir.Model:
    return load_model(FIXTURES / name / "model.onnx")


@functools.cache
def census_of(name: str) -> ModelCensus:
    return take_census(load(name), Fixture(name).config())


@functools.cache
def named_initializers(folder: str) -> dict[str, Array]:
    model = ir.load(FIXTURES / folder / "model.onnx")
    return {
        name: value.const_value.numpy().astype(np.float32)
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def true_weight(fixture: Fixture, layer: int | None, role: LinearRole) -> Array:
    """The [N, K] weight in float32, from the initializers that mobius names."""
    named = named_initializers(f"mobius-{fixture.architecture}-untied-fp32")
    if role is LinearRole.LM_HEAD:
        if fixture.head != "untied":
            return named["model.embed_tokens.weight"]
        return named["lm_head.weight_t"].T
    if role is LinearRole.QKV_PROJ:
        parts = (LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.V_PROJ)
        return np.concatenate([true_weight(fixture, layer, part) for part in parts])
    module = "mlp" if role in MLP_ROLES else "self_attn"
    return named[f"model.layers.{layer}.{module}.{role.value}.weight_t"].T


def true_gain(fixture: Fixture, layer: int | None, role: GroupRole) -> Array:
    """The effective gain [K] of the norm in front of a group, as genai writes it."""
    named = named_initializers(f"genai-{fixture.architecture}-untied-fp32")
    if role is GroupRole.LM_HEAD_INPUT:
        return named[f"model.layers.{LAYERS}.final_norm_layernorm.weight"]
    if role is GroupRole.ATTENTION_INPUT:
        return named[f"model.layers.{layer}.input_layernorm.weight"]
    name = "pre_feedforward" if fixture.architecture == "gemma3" else "post_attention"
    return named[f"model.layers.{layer}.{name}_layernorm.weight"]


def site_of(census: ModelCensus, layer: int | None, role: LinearRole) -> LinearSite:
    (site,) = [s for s in census.sites if s.layer_index == layer and s.role is role]
    return site


def group_of(census: ModelCensus, layer: int | None, role: GroupRole) -> ScaleGroup:
    (group,) = [g for g in census.groups if g.layer_index == layer and g.role is role]
    return group


def rounded(fixture: Fixture, weight: Array) -> Array:
    """What is left of a weight: a float32 tensor of a mixed file was float16 once."""
    return weight.astype(np.float16).astype(np.float32) if fixture.half else weight


def test_every_exporter_covers_every_architecture() -> None:
    covered = {(f.exporter.rstrip("0123456789"), f.architecture) for f in ALL}
    for exporter in ("optimum", "dynamo", "genai", "mobius"):
        for architecture in ("llama", "qwen2", "qwen3", "gemma3"):
            assert (exporter, architecture) in covered


@each_fixture
def test_sites_have_the_roles_and_shapes_of_the_architecture(fixture: Fixture) -> None:
    census = census_of(fixture.name)
    layer_roles = (*fixture.attention_roles, LinearRole.O_PROJ, *MLP_ROLES)
    expected: list[tuple[int | None, LinearRole]] = [(None, LinearRole.LM_HEAD)]
    expected += [(layer, role) for layer in range(LAYERS) for role in layer_roles]
    found = [(site.layer_index, site.role) for site in census.sites]
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert census.layer_count == LAYERS
    assert len({site.name for site in census.sites}) == len(census.sites)
    for site in census.sites:
        assert (site.out_features, site.in_features) == SHAPES[site.role], site.name
        assert site.dtype == fixture.dtype(site.layer_index, site.role), site.name
        assert site.op_type == ("Gemm" if fixture.gemm else "MatMul"), site.name
        assert not site.in_subgraph


@each_fixture
def test_sites_come_layer_by_layer_and_the_head_last(fixture: Fixture) -> None:
    *layers, head = [site.layer_index for site in census_of(fixture.name).sites]
    assert head is None
    assert layers == sorted(layers, key=lambda layer: -1 if layer is None else layer)


@each_fixture
def test_layout_says_how_the_initializer_lies(fixture: Fixture) -> None:
    for site in census_of(fixture.name).sites:
        # genai transposes the shared table for the Gather, all others for the head.
        transposes_head = fixture.shared_head and fixture.exporter != "genai"
        behind_transpose = site.role is LinearRole.LM_HEAD and transposes_head
        rows_first = fixture.gemm or behind_transpose
        assert site.layout is (WeightLayout.N_K if rows_first else WeightLayout.K_N), site.name


@each_fixture
def test_weights_are_those_of_the_layer_and_role(fixture: Fixture) -> None:
    model, census = load(fixture.name), census_of(fixture.name)
    for site in census.sites:
        truth = rounded(fixture, true_weight(fixture, site.layer_index, site.role))
        np.testing.assert_array_equal(read_weight(model, site), truth, err_msg=site.name)


@each_fixture
def test_biases_belong_to_query_key_and_value_of_qwen2_only(fixture: Fixture) -> None:
    model, census = load(fixture.name), census_of(fixture.name)
    for site in census.sites:
        if fixture.architecture == "qwen2" and site.role in fixture.attention_roles:
            assert site.bias is not None, site.name
            assert read_initializer(model, site.bias).size == site.out_features
        else:
            assert site.bias is None, site.name


@each_fixture
def test_groups_are_the_sites_that_read_one_activation(fixture: Fixture) -> None:
    census = census_of(fixture.name)
    roles = {
        GroupRole.ATTENTION_INPUT: fixture.attention_roles,
        GroupRole.ATTENTION_OUTPUT: (LinearRole.O_PROJ,),
        GroupRole.MLP_INPUT: (LinearRole.GATE_PROJ, LinearRole.UP_PROJ),
        GroupRole.MLP_HIDDEN: (LinearRole.DOWN_PROJ,),
    }
    assert len(census.groups) == LAYERS * len(roles) + 1
    for layer in range(LAYERS):
        for group_role, site_roles in roles.items():
            group = group_of(census, layer, group_role)
            assert {census.site(name).role for name in group.sites} == set(site_roles)
            assert {census.site(name).layer_index for name in group.sites} == {layer}
            assert {census.site(name).input for name in group.sites} == {group.input}
            assert group.in_features == SHAPES[site_roles[0]][1]
            assert group.scalable, group.name
    head = group_of(census, None, GroupRole.LM_HEAD_INPUT)
    assert [census.site(name).role for name in head.sites] == [LinearRole.LM_HEAD]


@each_fixture
def test_norms_absorb_the_scales_of_what_reads_them(fixture: Fixture) -> None:
    model, census = load(fixture.name), census_of(fixture.name)
    keys: list[tuple[int | None, GroupRole]] = []
    if not fixture.shared_head:
        keys.append((None, GroupRole.LM_HEAD_INPUT))
    for index in range(LAYERS):
        keys += [(index, GroupRole.ATTENTION_INPUT), (index, GroupRole.MLP_INPUT)]
    for layer, role in keys:
        group = group_of(census, layer, role)
        assert group.absorber is not None, f"{group.name}: {group.reason}"
        assert group.absorber.kind is AbsorberKind.NORM
        assert group.absorber.initializer is not None
        stored = read_initializer(model, group.absorber.initializer).astype(np.float32)
        gain = stored + np.float32(group.absorber.offset)
        # float16: the gain was rounded once (relative 2**-11), maybe before 1 was added.
        tolerance = 2.0**-10 if fixture.half else 0.0
        truth = true_gain(fixture, layer, role)
        np.testing.assert_allclose(gain.ravel(), truth, rtol=tolerance, err_msg=group.name)


@each_fixture
def test_value_rows_absorb_the_scale_of_o_proj(fixture: Fixture) -> None:
    census = census_of(fixture.name)
    producer = fixture.attention_roles[-1]
    for layer in range(LAYERS):
        group = group_of(census, layer, GroupRole.ATTENTION_OUTPUT)
        assert group.absorber is not None, f"{group.name}: {group.reason}"
        assert group.absorber.kind is AbsorberKind.LINEAR
        assert group.absorber.site == site_of(census, layer, producer).name
        assert group.absorber.head_dim == HEAD_DIM
        assert group.absorber.repeats == QUERY_HEADS // KV_HEADS
        assert group.absorber.row_start == (QUERY_ROWS + KV_ROWS if fixture.packed else 0)


@each_fixture
def test_up_proj_absorbs_the_scale_of_down_proj(fixture: Fixture) -> None:
    census = census_of(fixture.name)
    for layer in range(LAYERS):
        group = group_of(census, layer, GroupRole.MLP_HIDDEN)
        assert group.absorber is not None, f"{group.name}: {group.reason}"
        assert group.absorber.kind is AbsorberKind.LINEAR
        assert group.absorber.site == site_of(census, layer, LinearRole.UP_PROJ).name
        assert group.absorber.head_dim is None
        assert group.absorber.row_start == 0


@each_fixture
def test_embedding_and_its_tie_to_the_head(fixture: Fixture) -> None:
    census = census_of(fixture.name)
    (embedding,) = census.embeddings
    assert (embedding.rows, embedding.width) == (VOCABULARY, HIDDEN)
    head = site_of(census, None, LinearRole.LM_HEAD)
    tie = {"untied": None, "tied": Tie.SHARED, "tieddup": Tie.DUPLICATE}[fixture.head]
    assert embedding.tie is tie
    assert embedding.tied_site == (None if tie is None else head.name)
    assert (embedding.weight == head.weight) is (tie is Tie.SHARED)
    assert group_of(census, None, GroupRole.LM_HEAD_INPUT).scalable is not fixture.shared_head


@each_fixture
def test_family_comes_from_the_configuration(fixture: Fixture) -> None:
    assert census_of(fixture.name).family.startswith(fixture.architecture)


@each_fixture
def test_sites_and_groups_are_found_without_a_configuration(fixture: Fixture) -> None:
    with_config, without = census_of(fixture.name), take_census(load(fixture.name), None)
    assert without.sites == with_config.sites
    assert [g.sites for g in without.groups] == [g.sites for g in with_config.groups]
    norms = [g.name for g in with_config.groups if _is_norm(g)]
    assert [g.name for g in without.groups if _is_norm(g)] == norms


def _is_norm(group: ScaleGroup) -> bool:
    return group.absorber is not None and group.absorber.kind is AbsorberKind.NORM


CONVERTED = (
    "optimum-llama-untied-fp32",
    "optimum-qwen2-untied-fp16",
    "dynamo20-qwen2-untied-gemm-fp32",
    "dynamo23-gemma3-untied-fp32",
    "genai-qwen2-tied-fp32",
    "genai-llama-untied-fp32",
    "mobius-gemma3-untied-fp32",
    "mobiuscpu-qwen2-untied-fp32",
)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["rtn", "faq"])
@pytest.mark.parametrize("name", CONVERTED)
def test_command_line_converts_every_kind_of_export(
    name: str, method: str, tmp_path: Path
) -> None:
    fixture = Fixture(name)
    arguments = ["convert", str(fixture.path), "-o", str(tmp_path / "out"), "--method", method]
    arguments += ["--bits", "8", "--block-size", "16", "--lm-head", "keep", "--quiet"]
    arguments += ["--samples", "2", "--sequence-length", "16", "--verify-samples", "2"]
    # A relative logit error e at standard deviation 1.7 costs about (1.7 e)**2 / 2 nats. 8-bit
    # codes and int8 activations stay below e = 0.1 (0.015 nats); a scale that is folded into
    # one side only changes logits by their own size (over 1 nat).
    assert main([*arguments, "--embedding", "keep", "--max-kl", "0.02"]) == 0
    model = ir.load(tmp_path / "out" / "model.onnx")
    quantized = [node for node in model.graph if node.op_type == "MatMulNBits"]
    sites = LAYERS * (len(fixture.attention_roles) + 1 + len(MLP_ROLES))
    joined = 0 if fixture.packed else sum(map(is_packed, attention_nodes(model)))
    assert len(quantized) == sites - 2 * joined


@pytest.mark.slow
@pytest.mark.parametrize("name", CONVERTED)
def test_low_bit_path_of_every_kind_of_export(name: str, tmp_path: Path) -> None:
    """At 4 bits, where grids and rounding look at it; nearer to the source than plain rounding."""
    found = {}
    for method in ("rtn", "faq-gptq"):
        out = tmp_path / method
        arguments = ["convert", str(FIXTURES / name), "-o", str(out), "--method", method]
        arguments += ["--bits", "4", "--block-size", "16", "--lm-head", "4", "--quiet"]
        arguments += ["--samples", "16", "--sequence-length", "32", "--verify-samples", "4"]
        arguments += ["--path-share", "1", "--accuracy-level", "0"]
        assert main([*arguments, "--embedding", "keep", "--max-kl", "1"]) == 0
        report = RunReport.load(out / "report.json")
        assert report.verification is not None
        assert report.verification.logits is not None
        found[method] = report.verification.logits.kl_nats
        assert all(site.equals_rtn is (method == "rtn") for site in report.verification.sites)
    assert found["faq-gptq"] < found["rtn"]


@each_fixture
def test_paired_walk_reaches_all_groups_and_sees_attention(
    fixture: Fixture, tmp_path: Path
) -> None:
    """Where a graph computes attention in steps; norms of queries and keys hide theirs."""
    model = canonicalise(load_model(fixture.path / "model.onnx"))
    census = take_census(model, fixture.config())
    rows: set[str] = set()
    inputs: set[str] = set()
    reached: list[str] = []

    def solve(group: ScaleGroup, halves: Halves, _look: LookAhead | None) -> dict[str, Array]:
        reached.append(group.name)
        attention = halves[0].attention
        rows.update(attention.rows)
        inputs.update(attention.inputs)
        return {}

    ids = np.random.default_rng(0).integers(0, 64, (4, 16))
    names = [group.name for group in census.groups]
    PairedWalk(model, census, tmp_path, True).run(ids, names, solve)
    assert reached == names
    by_role = {
        role: {site.name for site in census.sites if site.role is role}
        for role in (LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.V_PROJ)
    }
    in_steps = fixture.name.startswith(("optimum-", "dynamo20-"))
    normed = any(family in fixture.name for family in ("qwen3", "gemma3"))
    scored = by_role[LinearRole.Q_PROJ] | by_role[LinearRole.K_PROJ]
    assert inputs == (by_role[LinearRole.V_PROJ] if in_steps else set())
    assert rows == (scored if in_steps and not normed else set())
    assert not in_steps or inputs


@each_fixture
def test_paired_walk_sees_the_residual_stream(fixture: Fixture, tmp_path: Path) -> None:
    """With nothing rounded, what a site should add is what it adds: W E[x^T x].

    Not behind a norm of its own (gemma3), and not where the last sum stays inside of a fused norm.
    """
    model = canonicalise(load_model(fixture.path / "model.onnx"))
    census = take_census(model, fixture.config())
    walk = PairedWalk(model, census, tmp_path)
    seen: dict[str, float] = {}

    def solve(_group: ScaleGroup, halves: Halves, _look: LookAhead | None) -> dict[str, Array]:
        moments = PairedMoments.mean(halves)
        for name, residual in moments.residual.items():
            expected = read_weight(model, census.site(name)) @ moments.gram
            seen[name] = float(np.abs(residual - expected).max() / np.abs(expected).max())
        return {}

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (4, 16))
    walk.run(ids, [group.name for group in census.groups], solve)
    # differences of streams of up to ten times the size of what is added, rounded to the dtype
    assert max(seen.values(), default=0) < 20 * (2.0**-11 if fixture.half else 2.0**-20)
    expected = {site.name for site in census.sites if site.role in ADD_TO_THE_STREAM}
    if fixture.exporter == "genai":
        expected.remove(site_of(census, LAYERS - 1, LinearRole.DOWN_PROJ).name)
    assert set(seen) == (set() if fixture.architecture == "gemma3" else expected)


@each_fixture
def test_paired_walk_looks_ahead_of_the_mlp(fixture: Fixture, tmp_path: Path) -> None:
    """Where gate and up are weights of their own and down_proj's sum with the stream is seen.

    With nothing rounded nothing is off, so weights stay as they are.
    """
    model = canonicalise(load_model(fixture.path / "model.onnx"))
    census = take_census(model, fixture.config())
    looked: set[str] = set()

    def solve(group: ScaleGroup, _halves: Halves, look: LookAhead | None) -> dict[str, Array]:
        if look is None:
            return {}
        looked.add(group.name)
        weights = {name: read_weight(model, census.site(name)) for name in group.sites}
        for name, moved in look(weights).items():
            largest = np.abs(weights[name]).max()
            assert np.abs(moved - weights[name]).max() < 0.05 * largest, name
        return {}

    ids = np.random.default_rng(0).integers(0, VOCABULARY, (4, 16))
    names = [group.name for group in census.groups]
    PairedWalk(model, census, tmp_path, look_ahead=True).run(ids, names, solve)
    declines = fixture.architecture == "gemma3" or "-gemm-" in fixture.name  # a norm, a Reshape
    seen = 0 if declines else LAYERS - (fixture.exporter == "genai")
    assert looked == {f"layers.{layer}.mlp_input" for layer in range(seen)}
