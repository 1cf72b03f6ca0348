"""`faq-onnx convert` from end to end: it writes what was asked for, and its report is true.

The package is judged here by other means than the product's own: bytes of the nodes are unpacked
with numpy, and the KL divergence is taken again in float64 from onnxruntime's logits.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx.numpy_helper import to_array  # noqa: TID251 - a second reader, on purpose
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.run import RunReport, SiteRow
from faq_onnx.artifacts.sites import Tie
from faq_onnx.calibration.hidden import HiddenStore
from faq_onnx.config import METHODS, Method
from faq_onnx.graph.io import load_model
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.targets.package import check_free_space
from faq_onnx.testing import TinyLlama, write_tiny_llama

Array = npt.NDArray[np.float32]
MakeSource = Callable[..., Path]
SITES = 15  # 7 in each of 2 layers, and the head
PACKED = "q_proj+k_proj+v_proj"
WINDOW, CALIBRATION, HELD_OUT = 32, 4, 2  # what `cli.quick` asks for


@dataclasses.dataclass(frozen=True)
class LowBit:
    """A MatMulNBits node taken apart."""

    name: str
    bits: int
    block_size: int
    accuracy_level: int
    codes: npt.NDArray[np.uint8]  # [N, blocks, block_size]
    scales: Array  # [N, blocks, 1]
    zero_points: Array  # [N, blocks, 1], or the implied one
    symmetric: bool
    size_bytes: int
    shape: tuple[int, int]

    def weight(self) -> Array:
        """Dequantized [N, K]."""
        values = (self.codes.astype(np.float32) - self.zero_points) * self.scales
        return values.reshape(self.shape[0], -1)[:, : self.shape[1]]

    def parts(self, attention: dict[str, int]) -> list[LowBit]:
        """One for each site: q_proj, k_proj and v_proj of fused attention share a node."""
        if PACKED not in self.name:
            return [self]
        heads, kv_heads = attention["num_heads"], attention["kv_num_heads"]
        width = self.shape[0] // (heads + 2 * kv_heads)
        found, start = [], 0
        for name, count in zip(PACKED.split("+"), (heads, kv_heads, kv_heads), strict=True):
            rows = slice(start, start + count * width)
            part = dataclasses.replace(
                self,
                name=self.name.replace(PACKED, name),
                codes=self.codes[rows],
                scales=self.scales[rows],
                zero_points=self.zero_points[rows],
                size_bytes=self.size_bytes * count * width // self.shape[0],
                shape=(count * width, self.shape[1]),
            )
            found.append(part)
            start = rows.stop
        return found


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes along the last axis, low bits first, as runtime-facts of MatMulNBits say."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1)


def low_bit_sites(model: onnx.ModelProto) -> list[LowBit]:
    """Every site that is stored in low bits."""
    settings = {
        attribute.name: attribute.i
        for node in model.graph.node
        if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute
    }
    return [part for node in low_bit_nodes(model) for part in node.parts(settings)]


def low_bit_nodes(model: onnx.ModelProto) -> list[LowBit]:
    tensors = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    casts = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Cast"}
    products = {
        node.output[0]: (casts[node.input[0]], node.input[1])
        for node in model.graph.node
        if node.op_type == "Mul" and node.input[0] in casts and node.input[1] in tensors
    }
    found = []
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        settings = {attribute.name: attribute.i for attribute in node.attribute}
        arrays = [tensors[name] for name in node.input[1:] if name in tensors]
        size = sum(array.nbytes for array in arrays)
        if node.input[2] in products:  # 8-bit scales
            multiples, unit = (tensors[name] for name in products[node.input[2]])
            arrays.insert(1, multiples.astype(np.float32) * unit)
            size += multiples.nbytes + unit.nbytes
        n, k, bits = settings["N"], settings["K"], settings["bits"]
        blocks = -(-k // settings["block_size"])
        zero_points = np.full((n, blocks), 2 ** (bits - 1), np.uint8)
        if len(arrays) == 3:
            zero_points = unpack(arrays[2].reshape(n, -1), bits)[:, :blocks]
        found.append(
            LowBit(
                name=node.name,
                bits=bits,
                block_size=settings["block_size"],
                accuracy_level=settings["accuracy_level"],
                codes=unpack(arrays[0], bits),
                scales=arrays[1].astype(np.float32).reshape(n, blocks, 1),
                zero_points=zero_points.astype(np.float32).reshape(n, blocks, 1),
                symmetric=len(arrays) == 2,
                size_bytes=size,
                shape=(n, k),
            )
        )
    return found


def check_package(out: Path) -> tuple[RunReport, onnx.ModelProto]:
    """The package loads, and its report tells of exactly the nodes that are in the file."""
    report = RunReport.load(out / "report.json")
    model = onnx.load(out / "model.onnx")
    onnx.checker.check_model(str(out / "model.onnx"))
    rows = {row.site: row for row in report.sites if row.storage_bits is not None}
    nodes = low_bit_sites(model)
    assert len(nodes) == len(rows) == report.totals.quantized_sites
    assert len(report.sites) - len(rows) == report.totals.float_sites
    for node in nodes:
        (row,) = [row for site, row in rows.items() if node.name.startswith(site)]
        _check_row(row, node)
        assert node.accuracy_level == report.config.accuracy_level
    files = [path for path in out.iterdir() if path.name.startswith("model.onnx")]
    assert report.totals.output_bytes == sum(path.stat().st_size for path in files)
    verification = report.verification
    assert verification is not None
    assert verification.structure is not None
    assert verification.kernels is not None
    assert verification.structure.nbits_nodes == len(low_bit_nodes(model))
    assert verification.kernels.nodes >= 1
    assert verification.kernels.worst <= 1
    assert "KL divergence" in (out / "summary.md").read_text(encoding="utf-8")
    return report, model


def _check_row(row: SiteRow, node: LowBit) -> None:
    assert (row.out_features, row.in_features) == node.shape
    stored = (row.storage_bits, row.block_size, row.symmetric, row.size_bytes)
    assert stored == (node.bits, node.block_size, node.symmetric, node.size_bytes), row.site
    assert row.code_bits is not None
    # In a block, codes lie within the levels that the code has, wherever these begin.
    spread = node.codes.max(axis=-1).astype(int) - node.codes.min(axis=-1)
    assert spread.max() <= 2**row.code_bits - 1
    assert len(np.unique(node.codes)) > 2 ** (row.code_bits - 1)


def kl_of(out: Path, source: Path, text: Path) -> float:
    """KL(float || low-bit) in nats/token on the windows behind those of calibration."""
    tokenizer = Tokenizer.from_file(str(source.parent / "tokenizer.json"))
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    ids = [i for line in lines for i in tokenizer.encode(line, add_special_tokens=False).ids]
    windows = np.array(ids[: WINDOW * (CALIBRATION + HELD_OUT)], np.int64).reshape(-1, WINDOW)
    logs = []
    for path in (source, out / "model.onnx"):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feeds = decoder_feeds(session.get_inputs(), windows[CALIBRATION:])
        logits = np.asarray(session.run(["logits"], feeds)[0], np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean())


def kl(report: RunReport) -> float:
    assert report.verification is not None
    assert report.verification.logits is not None
    return report.verification.logits.kl_nats


# --- formats -------------------------------------------------------------------------------

WIDTHS = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]
# Every method, width and symmetry at least once; the rest is slow.
QUICKLY = {
    *(("rtn", 2, True), ("rtn", 3, False), ("rtn", 4, False), ("rtn", 8, True)),
    *(("awq", 4, True), ("awq", 8, False), ("faq", 3, False), ("faq", 2, True)),
    *(("faq-gptq", 4, False), ("faq-gptq", 2, True), ("gptq", 3, False), ("k-quant", 4, True)),
    ("hqq", 3, False),
}
FORMATS = [
    pytest.param(method, width, marks=() if (method, *width) in QUICKLY else pytest.mark.slow)
    for method in Method
    for width in WIDTHS
    if not (method is Method.HQQ and width[1])  # an error, see test_bad_input
]


@pytest.mark.parametrize(("method", "width"), FORMATS)
def test_every_method_width_and_symmetry(
    cli: Any, source: Path, tmp_path: Path, method: Method, width: tuple[int, bool]
) -> None:
    bits, symmetric = width
    scaled = METHODS[method].scales != "none"
    words = ["--method", method, "--bits", str(bits), "--lm-head", "same", "--json"]
    words += ["--symmetric" if symmetric else "--asymmetric"]
    done = cli.quick("convert", source, "-o", tmp_path / "out", *words)
    assert (done.code, done.err) == (0, "")
    report, _ = check_package(tmp_path / "out")
    assert done.json == json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row.code_bits for row in report.sites} == {bits}
    assert {row.symmetric for row in report.sites} == {symmetric}
    assert report.totals.quantized_sites == SITES
    # The kernels see the same int8 activations whatever the number of windows in a run, but
    # their sums may be split otherwise: float32 rounding of logits around 10.
    assert kl(report) == pytest.approx(kl_of(tmp_path / "out", source, cli.text), rel=1e-3)
    assert report.verification is not None
    assert (report.verification.fold_error is not None) == scaled
    changed = [site for site in report.verification.sites if not site.equals_rtn]
    assert bool(changed) == (scaled or (method is not Method.RTN and bits < 8))


def test_round_to_nearest_stays_within_half_a_step(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "rtn", "--bits", "4", "--lm-head", "same")
    assert cli.quick("convert", source, "-o", tmp_path / "out", *words).code == 0
    original = onnx.load(source)
    tensors = {t.name: to_array(t) for t in original.graph.initializer}
    weights = {n.name: tensors.get(n.input[1]) for n in original.graph.node if len(n.input) > 1}
    nodes = low_bit_sites(onnx.load(tmp_path / "out" / "model.onnx"))
    assert len(nodes) == SITES
    for node in nodes:
        stored = weights[node.name.removesuffix("_Q4")]
        assert stored is not None
        step = np.repeat(node.scales[..., 0], node.block_size, axis=1)[:, : node.shape[1]]
        # Half a step by rounding the code, at the ends by rounding the zero point instead;
        # 1 + 1e-5 for the float32 arithmetic in between.
        assert (np.abs(node.weight() - stored.T) <= 0.5 * step * (1 + 1e-5)).all(), node.name


def test_more_bits_are_nearer_to_the_source(cli: Any, source: Path, tmp_path: Path) -> None:
    found = {}
    for bits in (8, 4, 3, 2):
        out = tmp_path / str(bits)
        words = ("--method", "rtn", "--lm-head", "same", "--bits", str(bits))
        # accuracy_level 0: without the error of int8 activations, which is that of 8-bit weights
        assert cli.quick("convert", source, "-o", out, *words, "--accuracy-level", "0").code == 0
        found[bits] = kl(RunReport.load(out / "report.json"))
    # A bit less doubles the step, so the error of the logits doubles and KL, which is quadratic
    # in it, grows four times; half of that is asked for.
    assert found[4] > 2**4 * found[8]
    assert found[3] > 2 * found[4]
    assert found[2] > 2 * found[3]


@pytest.mark.parametrize(
    "block_size",
    [16, pytest.param(64, marks=pytest.mark.slow), 128, pytest.param(256, marks=pytest.mark.slow)],
)
def test_block_sizes(cli: Any, source: Path, tmp_path: Path, block_size: int) -> None:
    """128 and 256 are more than most of the tiny rows have: one padded block."""
    words = ("--method", "awq", "--block-size", str(block_size), "--lm-head", "same")
    done = cli.quick("convert", source, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    report, _ = check_package(tmp_path / "out")
    assert {row.block_size for row in report.sites} == {block_size}


@pytest.mark.parametrize("words", [("--method", "rtn"), ("--symmetric",), ("--budget", "6bpw")])
def test_block_scales_in_8_bits(
    cli: Any, source: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    shape = ("--block-size", "16", "--lm-head", "same", *words)
    reports = {}
    for kind in ("float", "8-bit"):
        done = cli.quick("convert", source, "-o", tmp_path / kind, *shape, "--block-scales", kind)
        assert done.code == 0, done.err
        reports[kind], _ = check_package(tmp_path / kind)
    assert kl(reports["8-bit"]) == pytest.approx(
        kl_of(tmp_path / "8-bit", source, cli.text), rel=1e-3
    )
    if "--budget" in words:
        assert reports["8-bit"].totals.bits_per_weight <= 6
        return
    for plain, small in zip(reports["float"].sites, reports["8-bit"].sites, strict=True):
        # 4 bytes become 1 for each block, and each row has 4 more
        saved = plain.out_features * (3 * -(-plain.in_features // 16) - 4)
        assert plain.size_bytes - small.size_bytes == saved


@pytest.mark.parametrize("words", [(), ("--grid", "clip"), ("--budget", "6bpw")])
def test_block_scales_of_lpbq(
    cli: Any, source: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    wish = ("--block-scales", "lpbq", *words)
    done = cli.quick("convert", source, "-o", tmp_path / "out", "--symmetric", *wish)
    assert done.code == 0, done.err
    model = load_model(tmp_path / "out" / "model.onnx")
    tensors = [
        np.asarray(value.const_value.numpy())
        for name, value in model.graph.initializers.items()
        if name.endswith("_scale_multiples") and value.const_value is not None
    ]
    assert tensors
    assert all(tensor.min() >= 1 and tensor.max() <= 16 for tensor in tensors)


def test_lpbq_has_no_zero_points(cli: Any, source: Path, tmp_path: Path) -> None:
    done = cli.quick("convert", source, "-o", tmp_path / "out", "--block-scales", "lpbq")
    assert done.code == 2
    assert "no zero points; add --symmetric" in done.err


@pytest.mark.parametrize("method", ["faq", "faq-gptq"])
def test_rows_that_no_block_divides(
    cli: Any, make_source: MakeSource, tmp_path: Path, method: str
) -> None:
    """K = 24 and 40 in blocks of 16: an odd number of blocks, and a ragged last one."""
    path = make_source(TinyLlama(hidden=24, heads=4, kv_heads=2, intermediate=40))
    words = ("--method", method, "--block-size", "16", "--lm-head", "same")
    done = cli.quick("convert", path, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    report, _ = check_package(tmp_path / "out")
    assert {row.in_features for row in report.sites} == {24, 40}
    assert kl(report) == pytest.approx(kl_of(tmp_path / "out", path, cli.text), rel=1e-3)


@pytest.mark.parametrize("method", ["rtn", "faq", "faq-gptq"])
def test_float16_model(cli: Any, make_source: MakeSource, tmp_path: Path, method: str) -> None:
    path = make_source(TinyLlama(dtype="float16", qkv_bias=True))
    done = cli.quick("convert", path, "-o", tmp_path / "out", "--method", method)
    assert done.code == 0, done.err
    report, model = check_package(tmp_path / "out")
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    scales = {kinds[n.input[2]] for n in model.graph.node if n.op_type == "MatMulNBits"}
    assert scales == {onnx.TensorProto.FLOAT16}
    assert kl(report) < 1


# --- head and embedding --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "bits"), [("keep", None), ("4", 4), ("8", 8), ("same", 3)], ids=str
)
def test_lm_head(cli: Any, source: Path, tmp_path: Path, head: str, bits: int | None) -> None:
    words = ("--method", "rtn", "--bits", "3", "--lm-head", head)
    assert cli.quick("convert", source, "-o", tmp_path / "out", *words).code == 0
    report, _ = check_package(tmp_path / "out")
    assert {row.code_bits for row in report.sites if row.role == "lm_head"} == {bits}
    assert {row.code_bits for row in report.sites if row.role != "lm_head"} == {3}


EMBEDDINGS = [
    pytest.param(tie, wish, marks=pytest.mark.slow if tie is Tie.DUPLICATE or wish == "4" else ())
    for tie in (None, Tie.SHARED, Tie.DUPLICATE)
    for wish in ("auto", "keep", "4", "8", "shared")
    if (tie, wish) != (None, "shared")  # an error, see test_bad_input
]


@pytest.mark.parametrize(("tie", "embedding"), EMBEDDINGS)
def test_embedding(
    cli: Any, make_source: MakeSource, tmp_path: Path, tie: Tie | None, embedding: str
) -> None:
    path = make_source(TinyLlama(tie=tie))
    words = ("--method", "awq", "--embedding", embedding)
    done = cli.quick("convert", path, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    report, model = check_package(tmp_path / "out")
    (row,) = report.embeddings
    shares = tie is not None and embedding in {"auto", "shared"}
    low_bit = shares or embedding in {"4", "8"}
    gathers = [n for n in model.graph.node if n.op_type == "GatherBlockQuantized"]
    assert len(gathers) == low_bit
    assert (row.shared_with is not None) == shares
    names = {tensor.name for tensor in model.graph.initializer}
    table = "model.embed_tokens.weight"
    assert (table in names) == (not low_bit)
    if low_bit and not shares:
        packed = 288 * 64 * int(embedding) // 8
        assert row.size_bytes == packed + 288 * 2 * 4 + 288 * 2 * int(embedding) // 8
    if shares:
        assert row.size_bytes == 0
        assert gathers[0].input[2] in {
            n.input[2] for n in model.graph.node if n.op_type == "MatMulNBits"
        }
    assert kl(report) == pytest.approx(kl_of(tmp_path / "out", path, cli.text), rel=1e-3)
    assert kl(report) < 0.5


def test_excluded_sites_stay_float(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "faq", "--exclude", "*down_proj*", "--exclude", "*layers.1/*v_proj*")
    assert cli.quick("convert", source, "-o", tmp_path / "out", *words).code == 0
    report, model = check_package(tmp_path / "out")
    kept = sorted(row.site for row in report.sites if row.reason == "excluded by --exclude")
    assert kept == [
        "/model/layers.0/mlp/down_proj/MatMul",
        "/model/layers.1/mlp/down_proj/MatMul",
        "/model/layers.1/self_attn/v_proj/MatMul",
    ]
    assert set(kept) <= {node.name for node in model.graph.node if node.op_type == "MatMul"}


# --- the package ---------------------------------------------------------------------------

FILES = {"model.onnx", "package.json", "report.json", "summary.md", "tokenizer.json"}


def test_external_data(cli: Any, source: Path, tmp_path: Path) -> None:
    inside, beside = tmp_path / "inside", tmp_path / "beside"
    assert cli.quick("convert", source, "-o", inside, "--method", "rtn").code == 0
    words = ("--method", "rtn", "--external-data")
    assert cli.quick("convert", source, "-o", beside, *words).code == 0
    assert {path.name for path in inside.iterdir()} == FILES
    assert {path.name for path in beside.iterdir()} == FILES | {"model.onnx.data"}
    report, _ = check_package(beside)
    assert kl(report) == kl(RunReport.load(inside / "report.json"))
    assert (beside / "model.onnx").stat().st_size < (inside / "model.onnx").stat().st_size // 2


@pytest.mark.slow
def test_source_with_external_data_gives_the_same_bytes(
    cli: Any, source: Path, make_source: MakeSource, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert cli.quick("convert", source, "-o", first, "--method", "awq").code == 0
    path = make_source(external=True)
    assert cli.quick("convert", path, "-o", second, "--method", "awq").code == 0
    assert {path.name for path in second.iterdir()} == FILES
    assert (first / "model.onnx").read_bytes() == (second / "model.onnx").read_bytes()


def test_whole_package_runs_in_genai(cli: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    path = write_tiny_llama(tmp_path / "model")
    done = cli.quick("convert", path.parent, "-o", tmp_path / "out", "--json")
    assert done.code == 0, done.err
    names = {"config.json", "tokenizer_config.json", "genai_config.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | names
    report, _ = check_package(tmp_path / "out")
    assert report.family == "llama"
    assert report.verification is not None
    assert report.verification.proof is not None
    assert [check.passed for check in report.verification.proof.checks] == [True]


@pytest.mark.slow
def test_calibrating_on_the_models_own_text(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--calibration", "self", "--method", "awq")
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        done = cli.quick("convert", source, "-o", tmp_path / name, *words, "--seed", seed)
        assert done.code == 0, done.err
    first, again, other = (_model(tmp_path / name) for name in "abc")
    assert first == again
    assert first != other


def test_dry_run_writes_nothing(cli: Any, source: Path, scratch: Path) -> None:
    """Its table is the one of the conversion."""
    words = ("--dry-run", "--json", "--bits", "3", "--exclude", "*o_proj*")
    done = cli.quick("convert", source, "-o", scratch / "out", *words)
    assert (done.code, list(scratch.iterdir())) == (0, [])
    sites = [row for row in done.json["sites"] if row["role"] != "lm_head"]
    kept = [row for row in sites if row["code_bits"] is None]
    assert {row["role"] for row in kept} == {"o_proj"}
    words = ("--method", "rtn", "--bits", "3", "--exclude", "*o_proj*")
    assert cli.quick("convert", source, "-o", scratch / "out", *words).code == 0
    report, _ = check_package(scratch / "out")
    sizes = {row["site"]: row["size_bytes"] for row in done.json["sites"]}
    assert sizes == {row.site: row.size_bytes for row in report.sites}
    foretold, written = done.json["totals"]["output_bytes"], report.totals.output_bytes
    assert written <= foretold < 1.2 * written  # tables of rotation and the graph count, too


# --- methods and determinism ---------------------------------------------------------------

LOW_BIT = ("--method", "faq-gptq", "--scales", "awq")


def _model(out: Path) -> bytes:
    return (out / "model.onnx").read_bytes()


@pytest.mark.parametrize("method", ["rtn", "faq", "faq-gptq"])
def test_same_input_same_bytes(cli: Any, source: Path, tmp_path: Path, method: str) -> None:
    for name in ("first", "second"):
        assert cli.quick("convert", source, "-o", tmp_path / name, "--method", method).code == 0
    assert _model(tmp_path / "first") == _model(tmp_path / "second")


@pytest.mark.slow
def test_the_number_of_threads_changes_no_byte(
    cli: Any, make_source: MakeSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_source(TinyLlama(hidden=192, intermediate=320))
    for count in (1, 3):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        done = cli.quick("convert", path, "-o", tmp_path / str(count), "--method", "faq-gptq")
        assert done.code == 0, done.err
    assert _model(tmp_path / "1") == _model(tmp_path / "3")


@pytest.mark.parametrize(("awq", "faq"), [(("--method", "awq"), "faq"), (LOW_BIT, "faq-gptq")])
def test_fusion_1_is_awq_bit_for_bit(
    cli: Any, source: Path, tmp_path: Path, awq: tuple[str, ...], faq: str
) -> None:
    runs = {
        "awq": awq,
        "fused": ("--method", faq, "--faq-fusion", "1"),
        "faq": ("--method", faq, "--faq-fusion", "0.5"),
    }
    for name, words in runs.items():
        assert cli.quick("convert", source, "-o", tmp_path / name, *words).code == 0
    assert _model(tmp_path / "awq") == _model(tmp_path / "fused")
    assert _model(tmp_path / "awq") != _model(tmp_path / "faq")


def test_a_short_text_does_not_look_ahead_unless_told(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    """The default takes AWQ's statistic there, and its report says so."""
    runs = {"default": (), "awq": ("--scales", "awq"), "faq": ("--scales", "faq")}
    reports = {}
    for name, words in runs.items():
        done = cli.quick("convert", source, "-o", tmp_path / name, *words)
        assert done.code == 0, done.err
        reports[name] = RunReport.load(tmp_path / name / "report.json")
    assert reports["default"].channel_scales == reports["awq"].channel_scales == "awq"
    assert reports["faq"].channel_scales == "faq"
    assert reports["default"].config.scale.statistic == "method"
    assert _model(tmp_path / "default") == _model(tmp_path / "awq") != _model(tmp_path / "faq")
    assert "the text is short for `--scales faq`" in (tmp_path / "default/summary.md").read_text()


def test_awq_is_nearer_to_the_source_than_rtn(cli: Any, source: Path, tmp_path: Path) -> None:
    """The tiny model has outlier channels 12 times the others: scales must pay off.

    Some are in front of o_proj, which is scaled on request only.
    """
    found = {}
    for method in ("rtn", "awq"):
        out = tmp_path / method
        words = ("--method", method, "--share-heads")
        assert cli.quick("convert", source, "-o", out, *words).code == 0
        found[method] = kl(RunReport.load(out / "report.json"))
    assert found["awq"] < found["rtn"] / 2


def test_scales_and_rounding_bring_it_nearer_to_the_source(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    """On text of the kind that was calibrated on, without the error of int8 activations.

    What the low-bit path gains over the float one shows on models with more layers only.
    """
    steps = {
        "plain": ("--method", "rtn"),
        "scales": ("--method", "rtn", "--scales", "faq"),
        "rounding": ("--method", "faq-gptq", "--path", "float"),
        "path": ("--method", "faq-gptq", "--path-share", "1"),
    }
    found = {}
    for name, words in steps.items():
        out = tmp_path / name
        common = ("--share-heads", "--accuracy-level", "0", "--samples", "24")
        assert cli.quick("convert", source, "-o", out, *common, *words).code == 0
        found[name] = kl(RunReport.load(out / "report.json"))
    assert found["scales"] < found["plain"] / 2, found
    assert found["rounding"] < found["scales"] / 4, found
    assert found["path"] < found["scales"] / 4, found


@pytest.mark.slow
def test_settings_of_the_low_bit_path_change_the_result(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    runs: dict[str, tuple[str, ...]] = {
        "default": (),
        "float path": ("--path", "float"),
        "no correction": ("--no-correct",),
        "attention in view": ("--attention-aware",),
        "looking ahead": ("--look-ahead",),
        "more shrinkage": ("--shrinkage", "0.5"),
        "clipped": ("--grid", "clip"),
        "nearest": ("--rounding", "nearest"),
    }
    models = {}
    for name, words in runs.items():
        done = cli.quick("convert", source, "-o", tmp_path / name, "--lm-head", "4", *words)
        assert done.code == 0, done.err
        models[name] = _model(tmp_path / name)
    assert len(set(models.values())) == len(runs)


@pytest.mark.parametrize("method", ["awq", "faq"])
def test_folding_keeps_the_function(
    cli: Any, make_source: MakeSource, tmp_path: Path, method: str
) -> None:
    """8 bits and float activations: what is left of KL is weight rounding alone."""
    path = make_source(TinyLlama(qkv_bias=True, kv_heads=1, layers=3))
    words = ("--method", method, "--bits", "8", "--accuracy-level", "0", "--insert-mul")
    done = cli.quick("convert", path, "-o", tmp_path / "out", *words)
    assert done.code == 0, done.err
    report, _ = check_package(tmp_path / "out")
    assert report.verification is not None
    assert report.verification.fold_error is not None
    # 3 layers of 7 products of at most 128 float32 terms: a relative error of a few hundred eps
    assert 0 < report.verification.fold_error < 500 * np.finfo(np.float32).eps
    assert kl(report) < 1e-3


@pytest.mark.slow
def test_only_scale_groups_that_are_scaled_say_so(cli: Any, source: Path, tmp_path: Path) -> None:
    words = ("--method", "awq", "--no-share-heads", "--lm-head", "same")
    assert cli.quick("convert", source, "-o", tmp_path / "out", *words).code == 0
    report, _ = check_package(tmp_path / "out")
    scaled = {row.role: row.channel_scale for row in report.sites}
    assert scaled["o_proj"] == "none"
    assert scaled["q_proj"] == scaled["down_proj"] == "fold"
    assert all(row.exponent == 0 for row in report.sites if row.channel_scale == "none")
    assert not math.isnan(kl(report))


@pytest.mark.parametrize(
    "words",
    [
        ("--method", "awq"),
        ("--method", "best"),
        ("--method", "best", "--budget", "5bpw"),
    ],
    ids=["statistics", "low-bit path", "sensitivities"],
)
def test_walks_take_no_more_disk_than_was_asked_for(
    cli: Any,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    """Files of dead values stay until a walk ends: what lies there then is the most it took."""
    work, asked, taken = tmp_path / "work", list[int](), list[int]()
    release = HiddenStore.release

    def asks(folder: Path, room: int) -> None:
        asked.append(room)
        check_free_space(folder, room)

    def releases(store: HiddenStore) -> None:
        taken.append(sum(path.stat().st_size for path in work.rglob("*.npy")))
        release(store)

    monkeypatch.setattr("faq_onnx.stages.conversion.check_free_space", asks)
    monkeypatch.setattr(HiddenStore, "release", releases)
    text = ("--samples", "24", "--sequence-length", "64")
    done = cli.quick("convert", source, "-o", tmp_path / "out", "--work", work, *text, *words)
    assert done.code == 0, done.err
    assert 0.2 * asked[0] < max(taken) <= asked[0]
