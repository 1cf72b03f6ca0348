"""From a name and `KEY=VALUE` words to a target."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_origin

from pydantic import ValidationError

from faq_onnx.errors import ConfigError
from faq_onnx.targets import TARGETS
from faq_onnx.targets.protocol import Target, TargetOptions

__all__ = ["open_target", "options_markdown", "split_options"]


def open_target(name: str, options: Mapping[str, object] | None = None) -> Target:
    """The target of a name with its options, which may be texts.

    Raises:
        ConfigError: There is no such target or option, or a value is not allowed; all are listed.
    """
    kind = _target_type(name)
    try:
        parsed = kind.options_type.model_validate(_values(kind.options_type, options or {}))
    except ValidationError as error:
        known = ", ".join(kind.options_type.model_fields) or "none"
        problems = [
            f"--target-option {'.'.join(map(str, each['loc'][:1]))}: found {each['input']!r}; "
            + ("no such option" if each["type"] == "extra_forbidden" else _reason(each["msg"]))
            for each in error.errors()
        ]
        lines = "\n  - ".join([*problems, f"options of the target {name}: {known}"])
        raise ConfigError(lines) from None
    return kind(parsed)


def split_options(words: Iterable[str]) -> dict[str, str]:
    """`KEY=VALUE` words as a mapping.

    Raises:
        ConfigError: A word without `=`.
    """
    found = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key:
            raise ConfigError(f"--target-option: found {word!r}; allowed KEY=VALUE")
        found[key.strip().replace("-", "_")] = value.strip()
    return found


def options_markdown() -> str:
    """Options of all targets as a table for docs/targets.md."""
    lines = ["", "| target | option | default | meaning |", "|---|---|---|---|"]
    for name in TARGETS:
        for key, field in _target_type(name).options_type.model_fields.items():
            default = field.get_default(call_default_factory=True)
            shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{name}` | `{key}` | `{shown}` | {meaning} |")
    return "\n".join([*lines, "", ""])


def _reason(message: str) -> str:
    """What a validator says, to stand behind a semicolon."""
    text = message.removeprefix("Value error, ")
    return text if text is not message else f"{text[:1].lower()}{text[1:]}"


def _target_type(name: str) -> type[Target]:
    if name not in TARGETS:
        raise ConfigError(f"--target: found {name!r}; allowed {', '.join(TARGETS)}")
    module: Any = importlib.import_module(f"faq_onnx.targets.{name.replace('-', '_')}")
    kind: type[Target] = module.TARGET
    return kind


def _values(kind: type[TargetOptions], given: Mapping[str, object]) -> dict[str, object]:
    """Values of tuple fields are written with commas."""
    many = {
        key
        for key, field in kind.model_fields.items()
        if get_origin(field.annotation) is tuple or field.annotation is tuple
    }
    return {key: _items(value) if key in many else value for key, value in given.items()}


def _items(value: object) -> object | Sequence[str]:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value
