"""Recipe files and option values -> `QuantizeConfig`; all problems are told at once.

A recipe is a TOML file with the keys of `QuantizeConfig`. Precedence: values given on the command
line, then the recipe, then the defaults.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import ConfigError, RecipeError

__all__ = [
    "build_config",
    "key_paths",
    "load_recipe",
    "read_recipe",
    "recipe_schema",
    "recipe_text",
]

Settings = Mapping[str, object]


def load_recipe(path: Path | str) -> QuantizeConfig:
    """Read a recipe file into a configuration.

    Raises:
        RecipeError: The file is missing, is not TOML, or has unknown keys or wrong values.
    """
    return build_config(read_recipe(Path(path)))


def read_recipe(path: Path) -> dict[str, Any]:
    """Read and check a recipe; returns its tables as they stand in the file.

    Raises:
        RecipeError: As for `load_recipe`; every wrong key is listed.
    """
    try:
        text = path.read_text(encoding="utf-8")
        settings = tomllib.loads(text)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from error
    try:
        QuantizeConfig.model_validate(settings)
    except ValidationError as error:
        raise RecipeError(_describe(f"recipe {path}", error, {})) from None
    return settings


def build_config(
    recipe: Settings | None = None,
    overrides: Mapping[str, object] | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> QuantizeConfig:
    """Merge a recipe with single values that win over it.

    Args:
        recipe: Nested tables, as `read_recipe` returns them.
        overrides: Values by dotted key, e.g. {"faq.fusion": 0.9}.
        names: What the user calls a dotted key, e.g. {"faq.fusion": "--faq-fusion"}.

    Raises:
        ConfigError: Unknown keys or values that are not allowed; all are listed.
    """
    settings = _copy(recipe or {})
    for key, value in (overrides or {}).items():
        *tables, last = key.split(".")
        table = settings
        for name in tables:
            table = table.setdefault(name, {})
        table[last] = value
    try:
        return QuantizeConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(_describe("", error, names or {})) from None


def recipe_schema() -> str:
    """JSON schema of recipe files, for editors (`docs/recipe.schema.json`)."""
    schema = QuantizeConfig.model_json_schema()
    schema["title"] = "faq-onnx recipe"
    return json.dumps(schema, indent=2, sort_keys=True) + "\n"


def recipe_text(config: QuantizeConfig) -> str:
    """The configuration as a recipe file; every key has its meaning as a comment."""
    lines = ["# Recipe of faq-onnx: faq-onnx convert SOURCE -o OUT --recipe THIS_FILE"]
    lines += _toml_lines(config)
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            lines += ["", f"[{name}]", *_toml_lines(section)]
    return "\n".join(lines) + "\n"


def key_paths(model: type[BaseModel] = QuantizeConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of all leaf keys, in the order of the declaration."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from key_paths(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _copy(settings: Settings) -> dict[str, Any]:
    return {
        key: _copy(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
    }


def _toml_lines(section: BaseModel) -> list[str]:
    lines = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if not isinstance(value, BaseModel):
            meaning = " ".join((field.description or "").split())
            # JSON's strings, numbers, booleans and flat arrays are TOML too.
            # TOML has no null: what is not set stays a comment.
            setting = f'# {name} = ""' if value is None else f"{name} = {json.dumps(value)}"
            lines += [f"# {meaning}", setting]
    return lines


def _describe(where: str, error: ValidationError, names: Mapping[str, str]) -> str:
    problems = [_problem(detail, names) for detail in error.errors()]
    prefix = f"{where}: " if where else ""
    if len(problems) == 1:
        return f"{prefix}{problems[0]}"
    return "\n  - ".join([f"{prefix}{len(problems)} problems", *problems])


def _problem(detail: ErrorDetails, names: Mapping[str, str]) -> str:
    path = tuple(part for part in detail["loc"] if isinstance(part, str))
    key = ".".join(path)
    shown = names.get(key, key)
    if detail["type"] == "extra_forbidden":
        return _unknown(shown, key)
    return f"{shown}: found {detail['input']!r}; allowed {_allowed(detail)}"


def _unknown(shown: str, key: str) -> str:
    known = list(key_paths())
    # Compare last words too: `fusion` at the top level means `faq.fusion`.
    by_last = {path.rpartition(".")[2]: path for path in known}
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    last = difflib.get_close_matches(key.rpartition(".")[2], list(by_last), n=1, cutoff=0.7)
    guess = close[0] if close else by_last[last[0]] if last else None
    if guess is not None:
        return f"{shown}: unknown key; did you mean {guess}?"
    parent = key.rpartition(".")[0]
    siblings = sorted({path.partition(".")[0] for path in known})
    if parent:
        siblings = [path for path in known if path.startswith(f"{parent}.")]
    return f"{shown}: unknown key; allowed {', '.join(siblings)}"


def _nearest(found: object, expected: str) -> str:
    """The allowed number next to one that is not, "" for other values."""
    numbers = [int(word) for word in re.findall(r"\b\d+\b", expected)]
    if isinstance(found, bool) or not isinstance(found, int | float) or not numbers:
        return ""
    return f" (nearest: {min(numbers, key=lambda number: abs(number - found))})"


def _allowed(detail: ErrorDetails) -> str:
    context = detail.get("ctx", {})
    kind = detail["type"]
    if "expected" in context:
        return f"{context['expected']}{_nearest(detail['input'], str(context['expected']))}"
    bounds = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {context[name]}" for name, sign in bounds.items() if name in context]
    if limits:
        return "a number " + " and ".join(limits)
    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    words |= {"string": "a text", "tuple": "a list", "model": "a table"}
    return words.get(kind.partition("_")[0], detail["msg"])
