"""Options of the commands, made from the fields of `QuantizeConfig` so that they cannot differ."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from faq_onnx.config import QuantizeConfig
from faq_onnx.recipes import build_config, read_recipe
from faq_onnx.targets import DEFAULT_TARGET, TARGETS

__all__ = [
    "CALIBRATION",
    "GROUPS",
    "QUANTIZATION",
    "ROUNDING",
    "SCALES",
    "VERIFICATION",
    "Group",
    "add_common",
    "add_config",
    "add_force",
    "add_output",
    "add_source",
    "add_target",
    "option_names",
    "read_config",
    "settings_markdown",
]

_DEST = "set:"  # prefix of the attributes that hold settings; the rest is the dotted key


@dataclasses.dataclass(frozen=True)
class Group:
    """Options under one title in --help.

    Attributes:
        title: The title.
        flags: Flag of each dotted key; a boolean key has a second flag that turns it off.
    """

    title: str
    flags: Mapping[str, tuple[str, ...]]


QUANTIZATION = Group(
    "quantization",
    {
        "method": ("--method",),
        "budget": ("--budget",),
        "bits": ("--bits",),
        "block_size": ("--block-size",),
        "symmetric": ("--symmetric", "--asymmetric"),
        "block_scales": ("--block-scales",),
        "lm_head": ("--lm-head",),
        "embedding": ("--embedding",),
        "rotate": ("--rotate",),
        "untie_head": ("--untie-head", "--no-untie-head"),
        "exclude": ("--exclude",),
        "accuracy_level": ("--accuracy-level",),
        "external_data": ("--external-data", "--no-external-data"),
        "fuse_attention": ("--fuse-attention", "--no-fuse-attention"),
    },
)
CALIBRATION = Group(
    "calibration",
    {
        "calibration.source": ("--calibration",),
        "calibration.samples": ("--samples",),
        "calibration.sequence_length": ("--sequence-length",),
        "calibration.seed": ("--seed",),
    },
)
SCALES = Group(
    "FAQ and AWQ settings",
    {
        "faq.preview": ("--faq-preview",),
        "faq.fusion": ("--faq-fusion",),
        "faq.window": ("--faq-window",),
        "faq.roles": ("--faq-role",),
        "faq.normalisation": ("--faq-normalisation",),
        "scale.statistic": ("--scales",),
        "scale.grid_points": ("--grid-points",),
        "scale.share_heads": ("--share-heads", "--no-share-heads"),
        "scale.insert_mul": ("--insert-mul", "--no-insert-mul"),
    },
)
ROUNDING = Group(
    "grids and rounding",
    {
        "rounding.grid": ("--grid",),
        "rounding.rounding": ("--rounding",),
        "rounding.path": ("--path",),
        "rounding.path_share": ("--path-share",),
        "rounding.shrinkage": ("--shrinkage",),
        "rounding.attention_aware": ("--attention-aware", "--no-attention-aware"),
        "rounding.correct": ("--correct", "--no-correct"),
        "rounding.look_ahead": ("--look-ahead", "--no-look-ahead"),
    },
)
VERIFICATION = Group(
    "verification",
    {
        "verify.samples": ("--verify-samples",),
        "verify.max_kl": ("--max-kl",),
    },
)
GROUPS = (QUANTIZATION, CALIBRATION, SCALES, ROUNDING, VERIFICATION)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options that every command has."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON; errors too (key `error`)"
    )
    loudness = parser.add_mutually_exclusive_group()
    loudness.add_argument("-v", "--verbose", action="store_true", help="show the debug log")
    loudness.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def add_source(parser: argparse.ArgumentParser) -> None:
    """The model that comes in."""
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="an .onnx file, a folder with one, a Hugging Face folder or id, or a .gguf file",
    )


def add_output(parser: argparse.ArgumentParser, what: str, *, required: bool = True) -> None:
    """Where the result goes."""
    parser.add_argument(
        "-o", "--output", metavar="OUT", type=Path, required=required, help=f"{what} to write"
    )


def add_force(parser: argparse.ArgumentParser, what: str) -> None:
    """Overwrite and accept."""
    parser.add_argument("--force", action="store_true", help=what)


def add_target(parser: argparse.ArgumentParser, *, default: str | None = DEFAULT_TARGET) -> None:
    """The runtime that a package is for; without a default it has to be said."""
    named = f" (default: {default})" if default else ""
    parser.add_argument(
        "--target",
        choices=tuple(TARGETS),
        default=default,
        required=default is None,
        help=f"the runtime that is to load it{named}",
    )
    parser.add_argument(
        "--target-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a setting of the target, see docs/targets.md; may be repeated",
    )


def add_config(parser: argparse.ArgumentParser, *groups: Group) -> None:
    """Options of the given groups, and --recipe."""
    for group in groups:
        section = parser.add_argument_group(group.title)
        for key, flags in group.flags.items():
            _add_option(section, key, flags)
    parser.add_argument(
        "--recipe",
        metavar="FILE.toml",
        type=Path,
        help="settings from a file; options given here win over it (`faq-onnx recipe` prints one)",
    )


def read_config(args: argparse.Namespace) -> QuantizeConfig:
    """Settings of the command line over those of the recipe over the defaults.

    Raises:
        RecipeError: Wrong keys or values in the recipe.
        ConfigError: Wrong option values; all are listed.
    """
    recipe = {} if args.recipe is None else read_recipe(args.recipe)
    given = {
        name.removeprefix(_DEST): value
        for name, value in vars(args).items()
        if name.startswith(_DEST)
    }
    return build_config(recipe, given, names=option_names())


def option_names() -> dict[str, str]:
    """Flag of each dotted key."""
    return {key: flags[0] for group in GROUPS for key, flags in group.flags.items()}


def settings_markdown() -> str:
    """The settings as tables for docs/cli.md."""
    lines = []
    for group in GROUPS:
        title = group.title[0].upper() + group.title[1:]
        lines += ["", f"### {title}", "", "| option | recipe key | meaning |", "|---|---|---|"]
        for key, flags in group.flags.items():
            field = _field(key)
            many = isinstance(field.default, tuple)
            shown = " ".join(f"`{flag}`" for flag in flags)
            if len(flags) == 1:
                shown = f"`{flags[0]} {_metavar(field, many=many)}`".replace("|", " \\| ")
            text = _help(field, many=many).replace("%%", "%").replace("|", "\\|")
            lines.append(f"| {shown} | `{key}` | {text} |")
    return "\n".join([*lines, "", ""])


def _add_option(section: Any, key: str, flags: tuple[str, ...]) -> None:
    field = _field(key)
    many = isinstance(field.default, tuple)
    dest, text = _DEST + key, _help(field, many=many)
    if len(flags) == 2:
        on, off = flags
        section.add_argument(
            on, dest=dest, action="store_true", default=argparse.SUPPRESS, help=text
        )
        section.add_argument(
            off,
            dest=dest,
            action="store_false",
            default=argparse.SUPPRESS,
            help=f"the opposite of {on}",
        )
        return
    section.add_argument(
        flags[0],
        dest=dest,
        # A repeatable option given here replaces the recipe's list, like any other option.
        action="append" if many else "store",
        default=argparse.SUPPRESS,
        metavar=_metavar(field, many=many),
        # Wrong values stay text: the configuration lists all problems at once, argparse just one.
        type=functools.partial(_parse, numeric=_is_numeric(field)),
        help=text,
    )


def _field(key: str) -> FieldInfo:
    model: type[BaseModel] = QuantizeConfig
    *tables, last = key.split(".")
    for table in tables:
        section = model.model_fields[table].annotation
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        model = section
    return model.model_fields[last]


def _help(field: FieldInfo, *, many: bool) -> str:
    description = " ".join((field.description or "").split()).rstrip(".").replace("%", "%%")
    repeated = "; may be repeated" if many else ""
    if field.default is None and "By default" in description:  # which then says what
        return description
    return f"{description} (default: {_shown(field.default)}){repeated}"


def _shown(default: object) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, tuple):
        return ", ".join(default) or "none"
    return "none" if default is None else str(default)


def _choices(annotation: Any) -> list[str]:
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [str(member.value) for member in annotation]
    if (optional := _optional(annotation)) is not None:
        return _choices(optional)
    inner = get_args(annotation)
    if len(inner) == 2 and inner[1] is Ellipsis:
        return _choices(inner[0])
    return [str(value) for value in inner]


def _metavar(field: FieldInfo, *, many: bool) -> str:
    choices = _choices(field.annotation)
    if choices:
        return "|".join(choices)
    if many:
        return "PATTERN"
    names: dict[object, str] = {int: "N", float: "X", str | None: "same|3.0bpw|80MB|kl<=0.05"}
    return names.get(field.annotation) or names.get(_optional(field.annotation), "WHERE")


def _optional(annotation: Any) -> Any | None:
    """X of `X | None`, without what limits it; None of anything else."""
    kinds = get_args(annotation)
    if len(kinds) != 2 or kinds[1] is not type(None):
        return None
    return kinds[0].__origin__ if get_origin(kinds[0]) is Annotated else kinds[0]


def _is_numeric(field: FieldInfo) -> bool:
    kinds = {int, float}
    return field.annotation in kinds or any(type(v) in kinds for v in get_args(field.annotation))


def _parse(text: str, *, numeric: bool) -> str | int | float:
    if not numeric:
        return text
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
