"""Formats from the configuration alone."""

from __future__ import annotations

import pytest

from faq_onnx.artifacts.plan import EmbeddingPlan, SitePlan
from faq_onnx.artifacts.sites import LinearRole, ModelCensus, Tie
from faq_onnx.config import Method, QuantizeConfig, RoundingConfig
from faq_onnx.errors import ConfigError, UnsupportedFormatError
from faq_onnx.planning.formats import plan_embeddings, plan_sites
from faq_onnx.testing import TinyLlama, tiny_llama_census

CENSUS = tiny_llama_census()
TIED = tiny_llama_census(TinyLlama(tie=Tie.SHARED))
Q_PROJ, HEAD = CENSUS.sites[0].name, CENSUS.sites[-1].name


def _sites(config: QuantizeConfig, census: ModelCensus = CENSUS) -> dict[str, SitePlan]:
    plans = plan_sites(census, config)
    assert [plan.site for plan in plans] == [site.name for site in census.sites]
    return {plan.site: plan for plan in plans}


def _table(config: QuantizeConfig, census: ModelCensus) -> EmbeddingPlan:
    (plan,) = plan_embeddings(census, config, plan_sites(census, config))
    return plan


@pytest.mark.parametrize(("bits", "storage"), [(2, 2), (3, 4), (4, 4), (8, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_bits_are_those_asked_for(bits: int, storage: int, symmetric: bool) -> None:
    config = QuantizeConfig.model_validate(
        {"bits": bits, "symmetric": symmetric, "block_size": 64, "lm_head": "same"}
    )
    for plan in _sites(config).values():
        assert plan.format is not None
        assert (plan.format.code_bits, plan.format.storage_bits) == (bits, storage)
        assert (plan.format.block_size, plan.format.symmetric) == (64, symmetric)


@pytest.mark.parametrize(("lm_head", "bits"), [("4", 4), ("8", 8), ("same", 2), ("keep", None)])
def test_the_head_has_its_own_bits(lm_head: str, bits: int | None) -> None:
    plans = _sites(QuantizeConfig.model_validate({"bits": 2, "lm_head": lm_head}))
    head = plans[HEAD].format
    assert (None if head is None else head.code_bits) == bits
    assert bool(plans[HEAD].reason) is (bits is None)
    assert plans[Q_PROJ].format is not None


def test_excluded_sites_stay_float_and_say_why() -> None:
    plans = _sites(QuantizeConfig(exclude=("*/layers.1/*", "*down_proj*")))
    for name, plan in plans.items():
        excluded = "/layers.1/" in name or "down_proj" in name
        assert (plan.format is None) is excluded, name
        assert ("excluded" in plan.reason) is excluded


def test_a_pattern_that_fits_nothing_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match=r"--exclude nothing\*: fits none") as caught:
        plan_sites(CENSUS, QuantizeConfig(exclude=("*q_proj*", "nothing*")))
    assert Q_PROJ in str(caught.value)


def test_nothing_left_to_quantize_is_a_mistake() -> None:
    with pytest.raises(ConfigError, match="nothing to quantize"):
        plan_sites(CENSUS, QuantizeConfig(exclude=("*",)))


@pytest.mark.parametrize("method", [Method.AWQ, Method.FAQ])
def test_what_is_clipped(method: Method) -> None:
    plans = _sites(QuantizeConfig(method=method))
    for site in CENSUS.sites:
        never = site.role in {LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.LM_HEAD}
        assert plans[site.name].grid == ("minmax" if never else "clip"), site.name
        assert plans[site.name].rounding == "nearest"


@pytest.mark.parametrize(
    ("method", "grid", "rounding"),
    [
        (Method.RTN, "minmax", "nearest"),
        (Method.HQQ, "hqq", "nearest"),
        (Method.K_QUANT, "k-quant", "nearest"),
        (Method.GPTQ, "search", "gptq"),
        (Method.FAQ_GPTQ, "search", "gptq"),
        (Method.BEST, "search", "gptq"),
    ],
)
def test_grid_and_rounding_of_a_method(method: Method, grid: str, rounding: str) -> None:
    """The head has 8 bits: there neither pays."""
    for name, plan in _sites(QuantizeConfig(method=method)).items():
        expected = ("minmax", "nearest") if name == HEAD else (grid, rounding)
        assert (plan.grid, plan.rounding) == expected, name


def test_an_axis_set_apart_wins_over_the_method() -> None:
    config = QuantizeConfig(method=Method.GPTQ, rounding=RoundingConfig(grid="clip"))
    plans = _sites(config)
    assert (plans[Q_PROJ].grid, plans[Q_PROJ].rounding) == ("minmax", "gptq")
    down = next(site.name for site in CENSUS.sites if site.role is LinearRole.DOWN_PROJ)
    assert (plans[down].grid, plans[down].rounding) == ("clip", "gptq")


def test_what_lies_in_a_subgraph_is_rounded_without_activations() -> None:
    sites = tuple(site.model_copy(update={"in_subgraph": True}) for site in CENSUS.sites)
    inside = CENSUS.model_copy(update={"sites": sites})
    for method, grid in ((Method.BEST, "minmax"), (Method.AWQ, "minmax"), (Method.HQQ, "hqq")):
        plans = _sites(QuantizeConfig(method=method), inside)
        assert (plans[Q_PROJ].grid, plans[Q_PROJ].rounding) == (grid, "nearest")


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (QuantizeConfig(method=Method.HQQ, symmetric=True), "--method hqq with --symmetric"),
        (
            QuantizeConfig(symmetric=True, rounding=RoundingConfig(grid="hqq")),
            "--grid hqq with --symmetric",
        ),
    ],
)
def test_hqq_needs_zero_points(config: QuantizeConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        plan_sites(CENSUS, config)
    other = config.model_copy(update={"rounding": RoundingConfig(grid="k-quant")})
    assert _sites(other)[Q_PROJ].grid == "k-quant"


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(method=Method.RTN),
        QuantizeConfig(bits=8),
        QuantizeConfig(rounding=RoundingConfig(grid="minmax")),
    ],
    ids=["rtn", "8 bits", "no clip"],
)
def test_when_nothing_is_clipped(config: QuantizeConfig) -> None:
    assert {plan.grid for plan in plan_sites(CENSUS, config)} == {"minmax"}


def test_an_untied_embedding_stays_float_unless_asked() -> None:
    plan = _table(QuantizeConfig(), CENSUS)
    assert (plan.format, plan.shared_with) == (None, None)
    own = _table(QuantizeConfig(embedding="4"), CENSUS)
    assert own.format is not None
    assert (own.format.code_bits, own.shared_with) == (4, None)


@pytest.mark.parametrize("wish", ["auto", "shared"])
@pytest.mark.parametrize("tie", [Tie.SHARED, Tie.DUPLICATE])
def test_a_tied_embedding_shares_the_heads_buffer(wish: str, tie: Tie) -> None:
    census = tiny_llama_census(TinyLlama(tie=tie))
    config = QuantizeConfig.model_validate({"embedding": wish})
    plan = _table(config, census)
    head = plan_sites(census, config)[-1]
    assert plan.shared_with == head.site
    assert plan.format == head.format


def test_a_tied_embedding_next_to_a_float_head_stays_float() -> None:
    plan = _table(QuantizeConfig(lm_head="keep"), TIED)
    assert (plan.format, plan.shared_with) == (None, None)


def test_shared_needs_a_tied_low_bit_head() -> None:
    with pytest.raises(ConfigError, match="has no tied lm_head"):
        _table(QuantizeConfig(embedding="shared"), CENSUS)
    with pytest.raises(ConfigError, match="has a float lm_head"):
        _table(QuantizeConfig(embedding="shared", lm_head="keep"), TIED)


# 576 = 64 * 9, as SmolLM2-135M: a Gather reads whole blocks only
@pytest.mark.parametrize(("asked", "taken"), [(32, 32), (64, 64), (128, 64), (256, 64)])
def test_a_shared_head_takes_blocks_that_divide_its_width(asked: int, taken: int) -> None:
    census = _of_width(TIED, 576)
    config = QuantizeConfig.model_validate({"block_size": asked})
    table = _table(config, census)
    assert table.format is not None
    assert table.format.block_size == taken
    plans = _sites(config, census)
    head = plans[TIED.sites[-1].name].format
    assert head is not None
    assert head.block_size == taken
    other = plans[census.sites[0].name].format
    assert other is not None
    assert other.block_size == asked


def test_a_head_of_its_own_keeps_the_block_size() -> None:
    plan = plan_sites(_of_width(CENSUS, 576), QuantizeConfig(block_size=128))[-1]
    assert plan.format is not None
    assert plan.format.block_size == 128


def test_a_width_that_no_block_divides_is_kept_or_refused() -> None:
    census = _of_width(TIED, 72)
    assert _table(QuantizeConfig(), census).format is None
    with pytest.raises((ConfigError, UnsupportedFormatError), match="72"):
        _table(QuantizeConfig(embedding="shared"), census)


def _of_width(census: ModelCensus, width: int) -> ModelCensus:
    """The same with another hidden size of head and embedding."""
    head = census.sites[-1].model_copy(update={"in_features": width})
    table = census.embeddings[0].model_copy(update={"width": width})
    return census.model_copy(update={"sites": (*census.sites[:-1], head), "embeddings": (table,)})
