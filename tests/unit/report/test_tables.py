"""Tables and the summary page."""

from __future__ import annotations

import dataclasses

import pytest

from faq_onnx.artifacts.plan import GroupPlan, QuantPlan, ScaleApplication
from faq_onnx.artifacts.run import EmbeddingRow, RunReport, SiteRow, StageTime, Totals
from faq_onnx.artifacts.sites import (
    GroupRole,
    LinearRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
    SkippedWeight,
    WeightLayout,
)
from faq_onnx.artifacts.target import ProofCheck, TargetProof
from faq_onnx.artifacts.verification import (
    KernelCheck,
    LogitMetrics,
    StructureCheck,
    VerificationReport,
)
from faq_onnx.config import Method, QuantizeConfig, RoundingConfig, ScaleConfig
from faq_onnx.report.summary import summary_markdown
from faq_onnx.report.tables import (
    census_text,
    format_bits,
    format_bytes,
    format_duration,
    plan_text,
    quant_plan_text,
    render_table,
    result_text,
    worst_sites,
)

USAGE = "open it here"


def _row(site: str = "layers.0.q_proj", **changes: object) -> SiteRow:
    row = SiteRow(
        site=site,
        layer_index=0,
        role="q_proj",
        in_features=576,
        out_features=192,
        code_bits=3,
        storage_bits=4,
        block_size=64,
        symmetric=False,
        size_bytes=62_208,
        channel_scale="fold",
        exponent=0.5,
        sqnr_db=14.25,
        reason="",
    )
    return row.model_copy(update=changes)


FLOAT_ROW = _row(
    "lm_head",
    layer_index=None,
    code_bits=None,
    storage_bits=None,
    block_size=None,
    sqnr_db=None,
    reason="--exclude lm_head",
)
EMBEDDING = EmbeddingRow(
    embedding="embed",
    rows=1000,
    width=576,
    storage_bits=8,
    shared_with="lm_head",
    size_bytes=600_000,
    reason="",
)
TOTALS = Totals(
    source_bytes=538_000_000,
    output_bytes=134_500_000,
    quantized_sites=1,
    float_sites=1,
    bits_per_weight=4.51,
)
VERIFICATION = VerificationReport(
    structure=StructureCheck(
        ir_version=8, opset=18, onnxruntime="1.31.1", nbits_nodes=1, slow_nodes=()
    ),
    kernels=KernelCheck(nodes=1, worst=0.25, worst_node="q"),
    logits=LogitMetrics(
        tokens=2048, kl_nats=0.1234, top1_agreement=0.875, perplexity_float=16.0, perplexity=18.5
    ),
    sites=(),
    proof=TargetProof(
        target="genai",
        checks=(ProofCheck(name="greedy tokens", passed=None, value="not tried"),),
        versions={},
    ),
    notes=("self-made text",),
)


def _report(**changes: object) -> RunReport:
    report = RunReport(
        faq_onnx="0.1.0",
        source="model/",
        family="llama",
        config=QuantizeConfig(bits=3, block_size=64),
        fingerprints={},
        versions={"onnxruntime": "1.31.1"},
        sites=(_row(), FLOAT_ROW),
        embeddings=(EMBEDDING,),
        skipped=(("weight7", "K is not constant"),),
        warnings=("family assumed",),
        totals=TOTALS,
        stages=(StageTime(stage="calibrate", duration_s=75.2),),
        peak_rss_bytes=1_200_000_000,
        verification=VERIFICATION,
    )
    return report.model_copy(update=changes)


@dataclasses.dataclass(frozen=True)
class Case:
    """A number and how it is shown."""

    value: float
    shown: str


@pytest.mark.parametrize(
    "case",
    [Case(0, "0 B"), Case(999, "999 B"), Case(134_500_000, "134.5 MB"), Case(2e12, "2000.0 GB")],
    ids=lambda case: case.shown,
)
def test_bytes(case: Case) -> None:
    assert format_bytes(int(case.value)) == case.shown


@pytest.mark.parametrize(
    "case",
    [Case(0.42, "0.4 s"), Case(12, "12 s"), Case(59.7, "1m 00s"), Case(185, "3m 05s")],
    ids=lambda case: case.shown,
)
def test_duration(case: Case) -> None:
    assert format_duration(case.value) == case.shown


def test_bits_say_when_storage_is_wider() -> None:
    assert format_bits(3, 4) == "3 in 4"
    assert format_bits(4, 4) == "4"
    assert format_bits(None, None) == "float"


def test_table_aligns_numbers_right_and_text_left() -> None:
    text = render_table(("site", "K"), [("a", 5), ("long", 576)])
    assert text.splitlines() == ["site    K", "----  ---", "a       5", "long  576"]


def test_table_without_rows_has_its_header() -> None:
    assert render_table(("site", "K"), []).splitlines() == ["site  K", "----  -"]


def test_plan_shows_what_the_issue_asks_for() -> None:
    text = plan_text((_row(), FLOAT_ROW), (EMBEDDING,), TOTALS)
    columns = "layer role site K N bits block bytes note scale"
    assert " ".join(text.split()[:10]) == columns
    assert "576  192  3 in 4     64" in text
    assert "--exclude lm_head" in text
    assert "that of lm_head" in text
    assert "538.0 MB -> 134.5 MB (4.0 times smaller), 4.51 bits per weight" in text
    assert "3-bit codes in 4-bit storage" in text


def test_dry_run_shows_no_scales_that_nobody_has_chosen() -> None:
    assert "scale" not in plan_text((_row(channel_scale="none"),), (), TOTALS)


def test_plan_of_ordinary_widths_says_nothing_of_storage() -> None:
    assert "storage" not in plan_text((_row(code_bits=4),), (), TOTALS)


def test_census_lists_what_is_left_alone_with_its_reason() -> None:
    site = LinearSite(
        name="q",
        output="q_out",
        op_type="MatMul",
        input="x",
        weight="w",
        layout=WeightLayout.K_N,
        role=LinearRole.Q_PROJ,
        layer_index=0,
        in_features=64,
        out_features=32,
        dtype="float32",
    )
    group = ScaleGroup(
        name="layers.0.attention_input",
        role=GroupRole.ATTENTION_INPUT,
        layer_index=0,
        input="x",
        in_features=64,
        sites=("q",),
        absorber=None,
        reason="the norm has another reader",
    )
    skipped = SkippedWeight(
        node="conv", op_type="Conv", weight="k", shape=(8, 8, 3), reason="not a linear layer"
    )
    census = ModelCensus(
        family="llama",
        layer_count=1,
        sites=(site,),
        groups=(group,),
        embeddings=(),
        skipped=(skipped,),
        warnings=("roles from names",),
    )
    text = census_text(census)
    assert "family llama, 1 layers, 1 linear sites" in text
    assert "nothing: the norm has another reader" in text
    assert "8x8x3  not a linear layer" in text
    assert "warning: roles from names" in text


def test_result_shows_quality() -> None:
    text = result_text(_report())
    assert "KL          0.1234 nats/token over 2048 tokens" in text
    assert "87.5% agreement" in text
    assert "18.500 (source model 16.000)" in text
    assert "none on a slow path" in text
    assert "not tried" in text
    assert "warning: family assumed" in text


def test_slow_and_different_results_stand_out() -> None:
    assert VERIFICATION.structure is not None
    structure = VERIFICATION.structure.model_copy(update={"slow_nodes": ("q",)})
    check = ProofCheck(name="greedy tokens", passed=False, value="DIFFER")
    proof = TargetProof(target="genai", checks=(check,), versions={})
    worse = VERIFICATION.model_copy(update={"structure": structure, "proof": proof})
    text = result_text(_report(verification=worse))
    assert "1 on a SLOW path" in text
    assert "genai       greedy tokens: FAILED: DIFFER" in text


def test_worst_sites_come_first_and_unmeasured_not_at_all() -> None:
    rows = [_row("a", sqnr_db=20.0), _row("b", sqnr_db=-3.0), FLOAT_ROW, _row("c", sqnr_db=0.0)]
    assert [row.site for row in worst_sites(rows, 2)] == ["b", "c"]


def test_quant_plan_shows_the_gain_of_each_scale() -> None:
    group = GroupPlan(
        group="layers.0.mlp_input",
        application=ScaleApplication.FOLD,
        exponent=0.35,
        loss_identity=2.0,
        loss=1.0,
    )
    plan = QuantPlan(
        census_fingerprint="x", method="awq", sites=(), groups=(group,), embeddings=()
    )
    assert "layers.0.mlp_input  fold               0.35       50.0%" in quant_plan_text(plan)


def test_summary_says_what_was_done_how_good_and_how_to_run() -> None:
    text = summary_markdown(_report(), USAGE)
    for words in (
        "# model/, FAQ-GPTQ 3-bit",
        "538.0 MB became 134.5 MB",
        "3-bit codes in 4-bit storage",
        "| KL divergence to the source model | 0.1234 nats/token |",
        "| top-1 agreement | 87.5% |",
        "| `layers.0.q_proj` | 3 in 4 | 14.2 dB |",
        "- `lm_head`: --exclude lm_head",
        "- `weight7`: K is not constant",
        "- family assumed",
        "## Run it\n\nopen it here\n",
        "- calibrate: 1m 15s",
        "self-made text",
        "- Channel scales: from the activations that each layer and later ones read (FAQ)",
        "- FAQ: window preview over 5 layers, fusion 0.85",
        "- Block grids: scale and zero point searched",
        "- Rounding: each weight makes up for the errors of those before it (GPTQ)",
        "model quantized so far (at least 80% of the windows); each site makes up for errors",
    ):
        assert words in text


def test_summary_says_which_statistic_a_short_text_left() -> None:
    text = summary_markdown(_report(channel_scales="awq"), USAGE)
    words = "each layer reads (AWQ); the text is short for `--scales faq`"
    assert f"- Channel scales: from the activations that {words}" in text
    assert "FAQ: window" not in text
    assert "short" not in summary_markdown(_report(channel_scales="faq"), USAGE)


def test_summary_says_how_far_correlations_were_believed() -> None:
    rows = (_row("a", shrinkage=0.15), _row("b", shrinkage=0.325), FLOAT_ROW)
    assert "shrunk by 0.15 to 0.33 (" in summary_markdown(_report(sites=rows), USAGE)
    assert "shrunk by 0.15 (" in summary_markdown(_report(sites=rows[::2]), USAGE)
    assert "shrunk" not in summary_markdown(_report(sites=(FLOAT_ROW,)), USAGE)


def test_summary_is_silent_about_memory_that_is_unknown() -> None:
    assert "Peak memory: 1.2 GB" in summary_markdown(_report(), USAGE)
    assert "Peak memory" not in summary_markdown(_report(peak_rss_bytes=None), USAGE)


def test_summary_without_verification_says_so() -> None:
    assert "Not measured." in summary_markdown(_report(verification=None), USAGE)


@pytest.mark.parametrize("method", [Method.RTN, Method.HQQ, Method.K_QUANT])
def test_summary_of_a_data_free_method_names_no_calibration(method: Method) -> None:
    text = summary_markdown(_report(config=QuantizeConfig(method=method)), USAGE)
    assert "- Channel scales: none" in text
    for word in ("Calibrated", "FAQ: ", "activations"):
        assert word not in text


@pytest.mark.parametrize("method", Method)
def test_summary_tells_methods_apart(method: Method) -> None:
    """By what was done, not only by name: BEST walks more windows than FAQ-GPTQ."""

    def done(of: Method) -> str:
        text = summary_markdown(_report(config=QuantizeConfig(method=of)), USAGE)
        return text.partition("## What was done")[2].partition("## Quality")[0]

    same = [other for other in Method if done(other) == done(method)]
    assert same == [method]


def test_summary_follows_an_axis_that_was_set_apart() -> None:
    config = QuantizeConfig(
        method=Method.AWQ,
        scale=ScaleConfig(statistic="none"),
        rounding=RoundingConfig(rounding="gptq", path="low-bit", path_share=0.25),
    )
    text = summary_markdown(_report(config=config), USAGE)
    for words in (
        "- Channel scales: none",
        "cut where that lowers the output error (AWQ)",
        "(GPTQ)",
        "so far (at least 25% of the windows); each site makes up for errors before it",
    ):
        assert words in text
    float_path = config.model_copy(update={"rounding": RoundingConfig(rounding="gptq")})
    assert "activations of the float model" in summary_markdown(_report(config=float_path), USAGE)


def test_summary_of_eight_bits_claims_no_search() -> None:
    text = summary_markdown(_report(config=QuantizeConfig(bits=8)), USAGE)
    assert "- Channel scales: from" in text
    assert "- Block grids: the range of each block\n" in text
    assert "- Rounding: each weight to its nearest level\n" in text
