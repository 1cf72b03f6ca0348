"""`faq-onnx chat`: one answer, a conversation, and what can be wrong."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.progress import SILENT
from faq_onnx.targets.chat import Chat, ChatSettings
from faq_onnx.targets.genai_config import write_genai_config
from faq_onnx.testing import write_tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
needs_genai = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime_genai") is None, reason="onnxruntime-genai is optional"
)


def make_package(folder: Path, *, template: bool = True) -> Path:
    path = write_tiny_llama(folder)
    if template:
        config_path = folder / "tokenizer_config.json"
        config = json.loads(config_path.read_text())
        config_path.write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    source = SourceModel(given="tiny", onnx_path=path, folder=folder)
    assert write_genai_config(folder, source, SILENT) is not None
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_package(tmp_path_factory.mktemp("package"))


@needs_genai
def test_one_answer_is_greedy_and_bounded(cli: Any, package: Path) -> None:
    words = ("chat", package, "--prompt", "the tin", "--max-new-tokens", "6")
    first, second = (cli.run(*words, "--json") for _ in range(2))
    assert first.code == 0, first.err
    assert first.json["text"] == second.json["text"]
    assert 0 < first.json["tokens"] <= 6
    plain = cli.run(*words)
    assert plain.out == first.json["text"] + "\n"
    assert not plain.err


@needs_genai
def test_a_high_temperature_draws(cli: Any, package: Path) -> None:
    words = ("chat", package, "--prompt", "the", "--temperature", "9", "--max-new-tokens", "12")
    texts = {cli.run(*words).out for _ in range(4)}
    assert len(texts) > 1


@needs_genai
def test_a_conversation_reads_lines_until_stdin_ends(
    cli: Any, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the tin\n\nand on\n"))
    done = cli.run("chat", package, "--max-new-tokens", "4", "--system", "hat")
    assert done.code == 0, done.err
    chat = Chat(package, ChatSettings(max_new_tokens=4, system="hat"))
    answers = ["".join(chat.answer(text)) for text in ("the tin", "and on")]
    assert done.out == "".join(f"{answer}\n" for answer in answers)


@needs_genai
def test_the_conversation_so_far_is_part_of_the_prompt(package: Path) -> None:
    chat = Chat(package, ChatSettings(max_new_tokens=3, system="hat"))
    first = "".join(chat.answer("one"))
    turns = [(turn.role, turn.content) for turn in chat.said]
    assert turns == [("system", "hat"), ("user", "one"), ("assistant", first)]


@needs_genai
def test_an_answer_that_is_stopped_is_remembered_as_far_as_it_went(package: Path) -> None:
    chat = Chat(package, ChatSettings(max_new_tokens=20))
    answer = chat.answer("one")
    piece = next(answer)
    answer.close()
    assert chat.said[-1].content == piece


@needs_genai
def test_without_a_template_texts_are_continued(cli: Any, tmp_path: Path) -> None:
    folder = make_package(tmp_path / "package", template=False)
    done = cli.run("chat", folder, "--prompt", "the tin", "--max-new-tokens", "4")
    assert done.code == 0
    assert "no chat template" in done.err


@needs_genai
def test_a_conversation_longer_than_the_context_is_refused(cli: Any, package: Path) -> None:
    done = cli.run("chat", package, "--prompt", "x" * 600)
    assert done.code == 2
    assert "the model reads 512" in done.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens: found 0"),
        (("--temperature", "-1"), "--temperature: found -1"),
        (("--json",), "give --prompt TEXT"),
    ],
)
def test_wrong_options(cli: Any, package: Path, words: tuple[str, ...], message: str) -> None:
    done = cli.run("chat", package, *words)
    assert done.code == 2
    assert message in done.err


def test_a_folder_that_is_no_package(cli: Any, tmp_path: Path) -> None:
    for folder, message in ((tmp_path, "has no genai_config.json"), (tmp_path / "no", "no such")):
        done = cli.run("chat", folder, "--prompt", "x")
        assert done.code == 8
        assert message in done.err


def test_without_genai_the_extra_is_named(
    cli: Any, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    done = cli.run("chat", package, "--prompt", "x")
    assert done.code == 8
    assert "pip install 'faq-onnx[genai]'" in done.err
