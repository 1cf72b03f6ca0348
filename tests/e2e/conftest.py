"""Tiny models, a text to calibrate on, and the command line as a function."""

from __future__ import annotations

import dataclasses
import json
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from faq_onnx.cli.main import main
from faq_onnx.testing import TinyLlama, tiny_llama_onnx, tiny_tokenizer

# What random weights say is noise, so their KL says nothing: only the tests of --max-kl care.
QUICK = ("--samples", "4", "--sequence-length", "32", "--verify-samples", "2", "--max-kl", "9")

TINY = TinyLlama()
MakeSource = Callable[..., Path]


@dataclasses.dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The result of --json."""
        return json.loads(self.out)


@dataclasses.dataclass(frozen=True)
class Cli:
    """Runs commands in this process, calibrated on a small text, quietly."""

    capsys: pytest.CaptureFixture[str]
    text: Path

    def run(self, *words: str | Path) -> Done:
        """Any command line, as it stands."""
        self.capsys.readouterr()
        code = main([str(word) for word in words])
        captured = self.capsys.readouterr()
        return Done(code, captured.out, captured.err)

    def quick(self, command: str, source: Path, *words: str | Path) -> Done:
        """A command that takes settings, with little calibration; `words` win."""
        calibration = ("--calibration", self.text)
        return self.run(command, source, *QUICK, *calibration, "--quiet", *words)


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_reaches_children() -> None:
    """Shells start background jobs with SIGINT ignored, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 4000 tokens, all different enough."""
    lines = (f"{n}: the {n * n} th line on another {n % 7} in {n % 11}" for n in range(160))
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], calibration_text: Path) -> Cli:
    return Cli(capsys, calibration_text)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the place of temporary files, too."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="session")
def make_source(tmp_path_factory: pytest.TempPathFactory) -> MakeSource:
    """Writes a tiny decoder with its tokenizer, but without the config that genai needs.

    So nothing is tried in onnxruntime-genai, which would cost two seconds every time.
    """

    def make(
        spec: TinyLlama = TINY,
        change: Callable[[ir.Model], object] | None = None,
        *,
        external: bool = False,
    ) -> Path:
        folder = tmp_path_factory.mktemp("source")
        model = tiny_llama_onnx(spec)
        if change is not None:
            change(model)
        path = folder / "model.onnx"
        ir.save(model, path, external_data="weights.bin" if external else None)
        tiny_tokenizer().save(str(folder / "tokenizer.json"))
        return path

    return make


@pytest.fixture(scope="session")
def source(make_source: MakeSource) -> Path:
    """The default tiny decoder; never changed by a test."""
    return make_source()
