"""README, docs and examples say what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from faq_onnx.cli.main import COMMANDS, USAGES, build_parser, main
from faq_onnx.cli.options import GROUPS, settings_markdown
from faq_onnx.recipes import key_paths, load_recipe, recipe_schema
from faq_onnx.targets.opening import options_markdown
from faq_onnx.testing import write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CLI_PAGE = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _commands(text: str) -> list[tuple[str, ...]]:
    lines = [line for block in _blocks(text, "sh") for line in block.splitlines()]
    parsed = [shlex.split(line, comments=True) for line in lines]
    found = {tuple(words[1:]) for words in parsed if words[:1] == ["faq-onnx"]}
    return sorted(words[: words.index(">")] if ">" in words else words for words in found)


def test_schema_is_current() -> None:
    stored = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    assert stored == recipe_schema(), "run `make docs`"


def test_settings_in_the_cli_page_are_current() -> None:
    assert settings_markdown() in CLI_PAGE, "run `make docs`"


def test_options_of_targets_are_current() -> None:
    page = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
    assert options_markdown() in page, "run `make docs`"


def test_every_setting_has_an_option() -> None:
    assert {key for group in GROUPS for key in group.flags} == set(key_paths())


def test_every_command_is_documented() -> None:
    assert set(USAGES) == set(COMMANDS)
    for name in COMMANDS:
        assert f"| `{name}" in CLI_PAGE


@pytest.mark.parametrize("words", _commands(README + CLI_PAGE), ids=" ".join)
def test_documented_command_line_parses(words: tuple[str, ...]) -> None:
    assert build_parser(words).parse_args(words).command == words[0]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.toml")), ids=lambda p: p.stem)
def test_example_recipe_is_valid(path: Path) -> None:
    load_recipe(path)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README + CLI_PAGE))))
def test_link_leads_somewhere(target: str) -> None:
    assert (ROOT / target).exists() or (ROOT / "docs" / target).exists()


def test_make_targets_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", "\n".join(_blocks(README, "sh")), re.MULTILINE):
        assert re.search(rf"^{target}:.*## ", makefile, re.MULTILINE)


def test_ci_calls_the_readme_test_command() -> None:
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.slow
def test_readme_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    (snippet,) = _blocks(README, "python")
    exec(compile(snippet, "README.md", "exec"), {})
    assert (tmp_path / "out" / "model.onnx").is_file()


@pytest.mark.slow
def test_readme_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny_llama(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    # The tiny model has random weights, so its text and its KL mean nothing.
    quick = ["--samples", "4", "--sequence-length", "32", "--verify-samples", "2", "--max-kl", "9"]
    (tmp_path / "mine.txt").write_text("a text that nothing was calibrated on, " * 9, "utf-8")
    for words in _commands(README):
        assert main([*words, *(quick if words[0] == "convert" else ())]) == 0
    assert (tmp_path / "out" / "report.json").is_file()
    assert (tmp_path / "out8" / "report.json").is_file()
