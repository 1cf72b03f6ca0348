"""A conversation with a package through onnxruntime-genai: template, streaming, sampling.

No terminal here; see `faq_onnx.cli.chat`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from faq_onnx.errors import PackageError, UsageError
from faq_onnx.targets.genai_config import CONFIG_NAME

__all__ = ["Chat", "ChatSettings", "Message"]

_TOKENIZER = "tokenizer.json"
_NO_TEMPLATE = "Empty chat template"  # genai 0.18


@dataclasses.dataclass(frozen=True)
class ChatSettings:
    """How answers are made.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 takes the best token; else logits are divided by it and a token is drawn.
        system: Text in front of the conversation, "" for none.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    system: str = ""


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn: `role` is system, user or assistant."""

    role: str
    content: str


class Chat:
    """A loaded package and what was said so far.

    Attributes:
        has_template: The package says how turns are written; without that, a text is continued.
        said: The conversation so far.
        tokens: Tokens of the last answer.

    Raises:
        PackageError: onnxruntime-genai is missing, or the folder is no package for it.
    """

    def __init__(self, folder: Path, settings: ChatSettings) -> None:
        _check_folder(folder)
        self._settings = settings
        self._og = _import_genai()
        try:
            self._model = self._og.Model(str(folder))
            self._tokenizer = self._og.Tokenizer(self._model)
        except Exception as error:  # genai raises RuntimeError and its own kinds
            msg = f"{folder}: onnxruntime-genai cannot load it: {_first_line(error)}"
            raise PackageError(msg) from error
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        self._context = int(config["model"]["context_length"])
        self.said = [Message("system", settings.system)] if settings.system else []
        self.tokens = 0
        self.has_template = self._template([Message("user", "")]) is not None

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yield the answer to the next message, in pieces as they are made.

        What was yielded becomes part of the conversation, also where the caller stops early.

        Raises:
            UsageError: The conversation is longer than the model's context.
            PackageError: onnxruntime-genai gave up.
        """
        turns = [*self.said, Message("user", text)]
        written = self._template(turns) if self.has_template else text
        pieces: list[str] = []
        self.tokens = 0
        try:
            for piece in self._generate(self._encode(written or "")):
                pieces.append(piece)
                yield piece
        finally:
            if self.has_template:
                self.said = [*turns, Message("assistant", "".join(pieces))]

    def _generate(self, prompt: Any) -> Iterator[str]:
        settings = self._settings
        room = self._context - len(prompt)
        if room <= 0:
            msg = (
                f"the conversation has {len(prompt)} tokens, the model reads {self._context}; "
                "begin a new one"
            )
            raise UsageError(msg)
        parameters = self._og.GeneratorParams(self._model)
        parameters.set_search_options(
            max_length=len(prompt) + min(room, settings.max_new_tokens),
            do_sample=settings.temperature > 0,
            temperature=settings.temperature or 1.0,
        )
        stream = self._tokenizer.create_stream()
        try:
            generator = self._og.Generator(self._model, parameters)
            generator.append_tokens(prompt)
            while not generator.is_done():
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if generator.is_done() and token in self._ends:
                    return
                self.tokens += 1
                yield stream.decode(token)
        except RuntimeError as error:
            msg = f"onnxruntime-genai stopped: {_first_line(error)}"
            raise PackageError(msg) from error

    @property
    def _ends(self) -> set[int]:
        return {int(token) for token in self._tokenizer.eos_token_ids}

    def _encode(self, text: str) -> Any:
        return self._tokenizer.encode(text)

    def _template(self, turns: list[Message]) -> str | None:
        """Turns as the model's own template writes them; None where it has none."""
        messages = json.dumps([dataclasses.asdict(turn) for turn in turns])
        try:
            written = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        except RuntimeError as error:
            if _NO_TEMPLATE in str(error):
                return None
            msg = f"onnxruntime-genai cannot use the chat template: {_first_line(error)}"
            raise PackageError(msg) from error
        return str(written)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise PackageError(f"{folder}: no such folder; give the OUT folder of convert or package")
    for name in (CONFIG_NAME, _TOKENIZER):
        if not (folder / name).is_file():
            msg = (
                f"{folder}: has no {name}, so it is no package for onnxruntime-genai; make one of "
                "a model with config.json and tokenizer: faq-onnx package SOURCE -o OUT "
                "--target genai"
            )
            raise PackageError(msg)


def _import_genai() -> Any:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        msg = "chat needs onnxruntime-genai: pip install 'faq-onnx[genai]'"
        raise PackageError(msg)
    import onnxruntime_genai  # type: ignore[import-untyped]  # noqa: PLC0415 - optional

    return onnxruntime_genai


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
