"""Recipe files, option values, and the texts of their errors."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from faq_onnx.config import Axes, Method, QuantizeConfig
from faq_onnx.errors import ConfigError, RecipeError
from faq_onnx.recipes import (
    build_config,
    key_paths,
    load_recipe,
    read_recipe,
    recipe_schema,
    recipe_text,
)


def _recipe(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_recipe_becomes_a_config(tmp_path: Path) -> None:
    path = _recipe(
        tmp_path, 'method = "awq"\nbits = 8\n[faq]\nfusion = 1\n[rounding]\ngrid = "minmax"\n'
    )
    config = load_recipe(path)
    assert config.method is Method.AWQ
    assert config.bits == 8
    assert config.faq.fusion == 1.0
    assert config.axes == Axes("awq", "minmax", "nearest")
    assert config.block_size == QuantizeConfig().block_size


def test_all_wrong_keys_are_listed_at_once(tmp_path: Path) -> None:
    path = _recipe(
        tmp_path, "bit = 4\nblock_size = 48\nfusion = 0.5\n[faq]\nwindw = 2\nfusion = 2\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).splitlines() == [
        f"recipe {path}: 5 problems",
        "  - block_size: found 48; allowed 16, 32, 64, 128 or 256 (nearest: 32)",
        "  - faq.fusion: found 2; allowed a number <= 1.0",
        "  - faq.windw: unknown key; did you mean faq.window?",
        "  - bit: unknown key; did you mean bits?",
        "  - fusion: unknown key; did you mean faq.fusion?",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'method = "gguf"',
            "allowed 'rtn', 'hqq', 'k-quant', 'awq', 'faq', 'gptq', 'faq-gptq' or 'best'",
        ),
        (
            '[rounding]\npath = "long"',
            "rounding.path: found 'long'; allowed 'float', 'low-bit' or 'method'",
        ),
        ("[calibration]\nsamples = 0", "calibration.samples: found 0; allowed a number >= 1"),
        ('[calibration]\nsamples = "x"', "calibration.samples: found 'x'; allowed a whole number"),
        ("[verify]\nmax_kl = 0", "verify.max_kl: found 0; allowed a number > 0.0"),
        ('symmetric = "perhaps"', "symmetric: found 'perhaps'; allowed true or false"),
        ("exclude = 3", "exclude: found 3; allowed a list"),
        ("faq = 3", "faq: found 3; allowed a table"),
        ("[faq]\nqqqq = 3", "faq.qqqq: unknown key; allowed faq.preview, faq.fusion"),
        ("bits = ", "not a TOML file"),
    ],
)
def test_error_names_key_value_and_what_is_allowed(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(_recipe(tmp_path, text))
    assert message in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_missing_recipe_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml: cannot be read: No such file"):
        read_recipe(tmp_path / "absent.toml")


def test_file_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\xff\xfe")
    with pytest.raises(RecipeError, match="not a TOML file"):
        load_recipe(path)


def test_single_values_win_over_the_recipe_and_the_recipe_over_defaults() -> None:
    recipe = {"bits": 8, "faq": {"fusion": 0.5, "window": 2}}
    config = build_config(recipe, {"faq.fusion": 0.9})
    assert (config.bits, config.faq.fusion, config.faq.window) == (8, 0.9, 2)
    assert config.faq.preview == QuantizeConfig().faq.preview
    assert recipe == {"bits": 8, "faq": {"fusion": 0.5, "window": 2}}, "the input is not changed"


def test_wrong_single_value_is_told_under_the_users_name() -> None:
    with pytest.raises(ConfigError) as caught:
        build_config({}, {"faq.fusion": 3.0}, names={"faq.fusion": "--faq-fusion"})
    assert str(caught.value) == "--faq-fusion: found 3.0; allowed a number <= 1.0"


def test_printed_recipe_reads_back() -> None:
    config = build_config(
        {},
        {
            "method": "awq",
            "exclude": ("*.o_proj", 'a"b\\c'),
            "faq.roles": ["mlp_input"],
            "bits": 2,
        },
    )
    assert build_config(tomllib.loads(recipe_text(config))) == config


def test_printed_recipe_has_every_key() -> None:
    text = recipe_text(QuantizeConfig())
    assert '# budget = ""' in text  # not set: TOML has no null
    tables = tomllib.loads(text)
    unset = {"budget", "calibration.samples", "rounding.path_share", "rounding.shrinkage"}
    for key in set(key_paths()) - unset:
        place: object = tables
        for part in key.split("."):
            assert isinstance(place, dict)
            place = place[part]


def test_a_budget_survives_the_printed_recipe(tmp_path: Path) -> None:
    config = QuantizeConfig(budget="kl<=0.05")
    assert load_recipe(_recipe(tmp_path, recipe_text(config))) == config


def test_schema_has_every_section_and_forbids_unknown_keys() -> None:
    schema = json.loads(recipe_schema())
    assert set(schema["properties"]) == set(QuantizeConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert all(
        part["additionalProperties"] is False
        for part in schema["$defs"].values()
        if part["type"] == "object"
    )
