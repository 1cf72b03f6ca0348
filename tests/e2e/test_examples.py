"""docs/examples/ run as they stand, with the real tools, on a folder that nobody touches."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

import faq_onnx
from faq_onnx.artifacts.target import Reference
from faq_onnx.runtime.reference import FLOAT_ROUNDING, take_reference, token_agreement
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import write_tiny_llama
from faq_onnx.verify.structure import check_structure

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "faq-onnx"
OLIVE = "olive-ai==0.13.0"
PROMPT = [5, 6, 7, 8]
STEPS = 12


@dataclasses.dataclass(frozen=True)
class Package:
    """An output folder, what it says, and what its files are."""

    folder: Path
    reference: Reference

    def check(self, tokens: list[int]) -> None:
        """Tokens that another runtime made of PROMPT."""
        assert len(tokens) == STEPS
        agreement = token_agreement(self.reference, tokens, FLOAT_ROUNDING)
        assert agreement.passed, agreement.text


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    """A converted decoder, with its attention fused."""
    folder = tmp_path_factory.mktemp("examples")
    source = write_tiny_llama(folder / "source").parent
    config = faq_onnx.QuantizeConfig(
        method=faq_onnx.Method.RTN,
        calibration=faq_onnx.CalibrationConfig(sequence_length=32),
        verify=faq_onnx.VerifyConfig(samples=2, max_kl=9),
    )
    out = folder / "out"
    faq_onnx.convert(str(source), out, config)
    return Package(out, take_reference(open_session(out / "model.onnx"), PROMPT, STEPS))


def _run(*words: str | Path, folder: Path | None = None, **settings: str) -> str:
    """Stdout of a command that works."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", **settings}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_passes_in_a_pass_manager_of_onnx_ir(tmp_path: Path) -> None:
    source = write_tiny_llama(tmp_path / "source")
    output = tmp_path / "low-bit.onnx"
    said = _run(sys.executable, EXAMPLES / "onnx_ir_passes.py", source, output)
    assert said == "14 of 15 products in 4 bits\n"
    assert check_structure(output).nbits_nodes == 14
    graph = ir.load(output).graph
    kinds = [node.op_type for node in graph]
    assert kinds.count("GroupQueryAttention") == 2
    assert all(
        node.metadata_props.get("made_by") == "onnx_ir_passes.py"
        for node in graph
        if node.op_type == "MatMulNBits"
    )
    session = open_session(output)
    assert take_reference(session, PROMPT, 3).tokens


@pytest.mark.slow
def test_optimum(package: Package) -> None:
    if importlib.util.find_spec("optimum.onnxruntime") is None:
        pytest.skip("optimum-onnx is not installed (pip install 'faq-onnx[export]')")
    before = _digests(package.folder)
    script = EXAMPLES / "optimum_generate.py"
    found = json.loads(_run(sys.executable, script, package.folder, "Once upon a time"))
    session = open_session(package.folder / "model.onnx")
    reference = take_reference(session, found["prompt"], len(found["ids"]))
    agreement = token_agreement(reference, found["ids"], FLOAT_ROUNDING)
    assert agreement.passed, agreement.text
    assert _digests(package.folder) == before


@pytest.mark.slow
def test_onnxruntime_node(package: Package) -> None:
    node, npm = _tool("node"), _tool("npm")
    before = _digests(package.folder)
    wanted = (EXAMPLES / "node" / "package.json").read_bytes()
    folder = CACHE / f"node-{hashlib.sha256(wanted).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "node_modules" / "onnxruntime-node").is_dir():
        (folder / "package.json").write_bytes(wanted)
        words = ("install", "--no-audit", "--no-fund", "--ignore-scripts")
        _install(npm, *words, folder=folder, ONNXRUNTIME_NODE_INSTALL="skip")
    shutil.copyfile(EXAMPLES / "node" / "greedy.mjs", folder / "greedy.mjs")
    prompt = ",".join(map(str, PROMPT))
    said = _run(node, folder / "greedy.mjs", package.folder, prompt, str(STEPS))
    package.check(json.loads(said))
    assert _digests(package.folder) == before


@pytest.mark.slow
def test_the_c_api(package: Package, tmp_path: Path) -> None:
    """Against the library of the wheel; its header is a subset, see there."""
    compiler = _tool(sysconfig.get_config_var("CC").split()[0] if os.name == "posix" else "cc")
    libraries = sorted(Path(ort.__file__).parent.glob("capi/libonnxruntime.so.*"))
    if not libraries:
        pytest.skip("this wheel of onnxruntime has no libonnxruntime.so")
    (tmp_path / "libonnxruntime.so").symlink_to(libraries[0])
    (tmp_path / "libonnxruntime.so.1").symlink_to(libraries[0])
    before = _digests(package.folder)
    source, header = EXAMPLES / "c_api" / "greedy.c", Path(__file__).parent / "c_api"
    warnings = ("-std=c11", "-Wall", "-Wextra", "-Werror")
    places = ("-I", header, "-L", tmp_path, "-lonnxruntime", f"-Wl,-rpath,{tmp_path}")
    _run(compiler, *warnings, source, *places, "-o", tmp_path / "greedy")
    prompt = [str(token) for token in PROMPT]
    said = _run(tmp_path / "greedy", package.folder / "model.onnx", str(STEPS), *prompt)
    package.check([int(word) for word in said.split()])
    assert _digests(package.folder) == before


@pytest.mark.slow
def test_olive(tmp_path: Path) -> None:
    """A workflow file with our pass; Olive in an environment of its own."""
    python = _olive_python()
    folder = tmp_path / "work"
    shutil.copytree(EXAMPLES / "olive", folder)
    write_tiny_llama(folder / "model")
    workflow = json.loads((folder / "workflow.json").read_text())
    # random weights: what they say is noise, so any KL will do
    quick = {"verify.max_kl": 9, "verify.samples": 2, "calibration.sequence_length": 32}
    workflow["passes"]["low_bit"]["settings"] |= quick
    (folder / "workflow.json").write_text(json.dumps(workflow))
    words = ("--config", "workflow.json", "--package-config", "package.json")
    _run(python, "-m", "olive", "run", *words, folder=folder, OLIVE_DISABLE_TELEMETRY="1")
    out = folder / "out"
    structure = check_structure(out / "model.onnx")
    # a head, and five for each of two layers: q, k and v are one
    assert (structure.nbits_nodes, structure.slow_nodes) == (11, ())
    assert {"tokenizer.json", "genai_config.json", "package.json", "report.json"} <= {
        path.name for path in out.iterdir()
    }
    report = json.loads((out / "report.json").read_text())
    assert (report["config"]["method"], report["config"]["lm_head"]) == ("faq-gptq", "4")
    logits = take_reference(open_session(out / "model.onnx"), PROMPT, 1).logits
    assert np.isfinite([value for _, value in logits]).all()


def _olive_python() -> Path:
    """The interpreter of an environment with Olive, on top of the one that runs the tests."""
    kind = hashlib.sha256(f"{OLIVE} {sys.prefix} {sys.version}".encode()).hexdigest()[:12]
    folder = CACHE / f"olive-{kind}"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if (folder / ".ready").is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder)
    inner = _run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    outer = sysconfig.get_path("purelib")
    (Path(inner) / "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n")
    _install(python, "-m", "pip", "install", "--quiet", OLIVE, folder=folder)
    (folder / ".ready").touch()
    return python


def _install(*words: str | Path, folder: Path, **settings: str) -> None:
    """What needs a package registry; without one the test cannot be made."""
    environment = {**os.environ, **settings}
    command = [str(word) for word in words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        pytest.skip(f"cannot install: {lines[-1]}")
