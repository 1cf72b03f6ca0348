"""The command line without a model: parsing, precedence, errors, exit codes."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import faq_onnx
from faq_onnx.cli import interrupts, recipe
from faq_onnx.cli.main import COMMANDS, build_parser, main
from faq_onnx.cli.options import read_config
from faq_onnx.config import Axes, Method, QuantizeConfig


def _parse(*words: str) -> argparse.Namespace:
    return build_parser(words).parse_args(words)


def _config(*words: str) -> QuantizeConfig:
    return read_config(_parse("convert", "model.onnx", *words))


def test_no_option_means_the_defaults() -> None:
    assert _config() == QuantizeConfig()


def test_every_option_of_the_issue() -> None:
    config = _config(
        *("--method", "awq", "--bits", "3", "--block-size", "64", "--symmetric"),
        *("--lm-head", "4", "--embedding", "shared", "--exclude", "a*", "--exclude", "b*"),
        *("--accuracy-level", "0", "--calibration", "notes.txt", "--samples", "5"),
        *("--sequence-length", "40", "--seed", "7", "--max-kl", "0.25", "--external-data"),
    )
    assert config.method is Method.AWQ
    assert (config.bits, config.block_size, config.symmetric) == (3, 64, True)
    assert (config.lm_head, config.embedding, config.exclude) == ("4", "shared", ("a*", "b*"))
    assert (config.accuracy_level, config.external_data) == (0, True)
    data = config.calibration
    assert (data.source, data.samples, data.sequence_length) == ("notes.txt", 5, 40)
    assert (data.seed, config.verify.max_kl) == (7, 0.25)


def test_method_settings() -> None:
    config = _config(
        *("--faq-preview", "layer", "--faq-fusion", "1", "--faq-window", "2"),
        *("--faq-role", "mlp_input", "--faq-normalisation", "max"),
        *("--scales", "awq", "--grid-points", "10"),
        *("--grid", "minmax", "--rounding", "gptq", "--path", "low-bit", "--path-share", "0.25"),
        *("--shrinkage", ".02", "--no-correct", "--attention-aware", "--look-ahead"),
        *("--no-share-heads", "--insert-mul", "--verify-samples", "3"),
    )
    assert config.faq.model_dump() == {
        "preview": "layer",
        "fusion": 1.0,
        "window": 2,
        "roles": ("mlp_input",),
        "normalisation": "max",
    }
    assert config.scale.model_dump() == {
        "statistic": "awq",
        "grid_points": 10,
        "share_heads": False,
        "insert_mul": True,
    }
    assert config.rounding.model_dump() == {
        "grid": "minmax",
        "rounding": "gptq",
        "path": "low-bit",
        "path_share": 0.25,
        "shrinkage": 0.02,
        "attention_aware": True,
        "correct": False,
        "look_ahead": True,
    }
    assert config.axes == Axes("awq", "minmax", "gptq", "low-bit")
    assert config.verify.samples == 3


def test_command_line_wins_over_recipe_wins_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('bits = 8\nsymmetric = true\nexclude = ["x"]\n[faq]\nwindow = 5\n')
    config = _config("--recipe", str(path), "--asymmetric", "--exclude", "y", "--faq-fusion", ".5")
    assert (config.bits, config.symmetric, config.exclude) == (8, False, ("y",))
    assert (config.faq.window, config.faq.fusion) == (5, 0.5)


def test_all_wrong_options_are_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", "m.onnx", "-o", "out", "--bits", "5", "--samples", "no", "--max-kl", "-1"]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error: 3 problems",
        "  - --bits: found 5; allowed 2, 3, 4 or 8 (nearest: 4)",
        "  - --samples: found 'no'; allowed a whole number",
        "  - --max-kl: found -1; allowed a number > 0.0",
    ]


def test_json_error_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "--json", "--bits", "5"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["error"] == {
        "type": "ConfigError",
        "exit_code": 2,
        "message": "--bits: found 5; allowed 2, 3, 4 or 8 (nearest: 4)",
        "notes": [],
    }
    assert captured.err.startswith("error: --bits")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required: COMMAND"),
        (["convrt"], "invalid choice: 'convrt'"),
        (["convert", "m.onnx", "-o", "o", "--bit", "4"], "unrecognized arguments: --bit"),
        (["convert", "m.onnx"], "-o OUT is missing"),
        (["inspect"], "required: SOURCE"),
        (["apply", "m.onnx", "-o", "out"], "required: --plan"),
    ],
)
def test_wrong_call_is_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_wrong_recipe_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("bit = 4")
    assert main(["recipe", "--recipe", str(path)]) == 2
    assert "mine.toml: bit: unknown key; did you mean bits?" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: faq-onnx {command}" in text
    assert "examples:" in text
    assert "read on: docs/cli.md" in text


def test_help_shows_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert f"(default: {QuantizeConfig().faq.fusion})" in words
    assert "(default: attention_input, mlp_input)" in words


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"faq-onnx {faq_onnx.__version__}\n"


def test_interrupt_is_one_line_and_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "run", interrupted)
    assert main(["recipe"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"


class _File(io.FileIO):
    """Ctrl-C arrives while numpy asks what this is."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        signal.raise_signal(signal.SIGINT)
        return io.FileIO


@pytest.fixture
def foreground() -> Iterator[None]:
    """Shells start background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("foreground")
def test_an_interrupt_that_numpy_loses_is_still_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def loses(_args: argparse.Namespace) -> None:
        with _File(tmp_path / "array", "w") as file, pytest.raises(TypeError):
            np.zeros(3).tofile(file)
        msg = "numpy's own"
        raise TypeError(msg)

    monkeypatch.setattr(recipe, "run", loses)
    assert main(["recipe"]) == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("foreground")
def test_an_error_behind_an_answered_interrupt_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def goes_on(_args: argparse.Namespace) -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupts.answered()
        raise ZeroDivisionError

    monkeypatch.setattr(recipe, "run", goes_on)
    with pytest.raises(ZeroDivisionError):
        main(["recipe"])


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_args: argparse.Namespace) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(recipe, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["recipe"])


def test_notes_of_an_error_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(_args: argparse.Namespace) -> None:
        error = faq_onnx.VerificationError("KL 3.2 nats/token exceeds --max-kl 1.0")
        error.add_note("worst site: layers.0.q_proj")
        raise error

    monkeypatch.setattr(recipe, "run", refused)
    assert main(["recipe"]) == 7
    expected = "error: KL 3.2 nats/token exceeds --max-kl 1.0\n  worst site: layers.0.q_proj\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("flags", "shown"), [([], False), (["-v"], True)])
def test_log_goes_to_stderr(
    flags: list[str],
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = logging.getLogger("faq_onnx.quant")

    def logging_run(_args: argparse.Namespace) -> None:
        logger.debug("site %s", "q_proj")
        logger.warning("odd")

    monkeypatch.setattr(recipe, "run", logging_run)
    assert main(["recipe", *flags]) == 0
    captured = capsys.readouterr()
    assert ("DEBUG faq_onnx.quant: site q_proj\n" in captured.err) is shown
    assert "WARNING faq_onnx.quant: odd\n" in captured.err
    assert captured.out == ""
    assert not logging.getLogger("faq_onnx").handlers, "the handler is gone again"


def test_recipe_prints_what_recipe_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipe", "--bits", "8"]) == 0
    path = tmp_path / "mine.toml"
    path.write_text(capsys.readouterr().out)
    assert main(["recipe", "--recipe", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits"] == 8


def test_module_runs_and_survives_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "faq_onnx", "recipe", "--schema"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
