"""What a target refuses before the work, and how it is told its options."""

from __future__ import annotations

import fnmatch

import pytest

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.target import ModelOutline, PlannedWeight
from faq_onnx.errors import ConfigError, UnsupportedFormatError
from faq_onnx.quant.formats import Provider
from faq_onnx.stages.packaging import check_limits
from faq_onnx.targets import TARGETS
from faq_onnx.targets.limits import nearest, provider_refusals
from faq_onnx.targets.opening import open_target, split_options


def _outline(*weights: PlannedWeight) -> ModelOutline:
    return ModelOutline(weights=weights, model_bytes=1000)


def _weight(
    place: str, *, bits: int | None = 4, block: int = 32, **changes: object
) -> PlannedWeight:
    fmt = None
    if bits is not None:
        fmt = BlockFormat(code_bits=bits, storage_bits=bits, block_size=block, symmetric=False)
    weight = PlannedWeight(
        place=place, kind="linear", rows=8, width=64, dtype="float32", format=fmt
    )
    return weight.model_copy(update=changes)


def test_float_weights_and_legal_formats_run_anywhere() -> None:
    outline = _outline(_weight("q"), _weight("norm", bits=None, width=7))
    for provider in Provider:
        assert all(provider_refusals(each, provider) == () for each in outline.weights)


@pytest.mark.parametrize(
    ("weight", "provider", "found", "way_out"),
    [
        (_weight("q", bits=2), Provider.CUDA, "2 bits", "--bits 4"),
        (_weight("q", block=128, width=576), Provider.QNN, "K=576", "--block-size 64"),
        (_weight("q", width=7), Provider.DIRECTML, "K=7", "--exclude 'q'"),
        (
            _weight("e", kind="embedding"),
            Provider.QNN,
            "in 4 bits",
            "--embedding keep",
        ),
        (_weight("e", kind="embedding", width=72), Provider.CPU, "K=72", "--embedding keep"),
        (_weight("q", block=512), Provider.CPU, "blocks of 512", "--block-size 256"),
    ],
)
def test_a_refusal_names_what_was_found_and_the_nearest_choice(
    weight: PlannedWeight, provider: Provider, found: str, way_out: str
) -> None:
    (refusal,) = provider_refusals(weight, provider)
    assert refusal.place == weight.place
    assert found in refusal.found
    assert refusal.way_out == way_out


def test_a_padded_last_block_runs_on_the_cpu() -> None:
    assert provider_refusals(_weight("q", width=65), Provider.CPU) == ()


def test_the_nearest_choice() -> None:
    assert nearest(100, (16, 32, 64, 128, 256)) == 128
    assert nearest(3, (2, 4, 8)) == 2


def test_alike_refusals_are_told_once() -> None:
    bad = [_weight(f"q{number}", block=512) for number in range(5)]
    with pytest.raises(UnsupportedFormatError) as caught:
        check_limits(open_target("genai"), _outline(*bad, _weight("ok")))
    assert str(caught.value) == (
        "5 of 6 weights would not run on genai:\n"
        "  - q0 (and 4 like it): blocks of 512; allowed 16, 32, 64, 128, 256; --block-size 256"
    )


def test_a_ragged_weight_is_excluded_in_all_layers_by_one_pattern() -> None:
    places = [f"/model/layers.{number}/mlp/down_proj/MatMul" for number in range(12)]
    bad = [_weight(place, width=172) for place in places]
    with pytest.raises(UnsupportedFormatError) as caught:
        check_limits(open_target("qnn"), _outline(*bad), finished=True)
    lines = str(caught.value).splitlines()
    pattern = "/model/layers.*/mlp/down_proj/MatMul"
    assert lines[1].startswith(f"  - {places[0]} (and 11 like it): K=172")
    assert lines[1].endswith(f"--exclude {pattern!r}")
    assert lines[-1] == "  - these are options of convert: `faq-onnx convert --target qnn`"
    assert all(fnmatch.fnmatchcase(place, pattern) for place in places)


def test_options_are_words() -> None:
    assert split_options(["a-b=1", "c=x=y"]) == {"a_b": "1", "c": "x=y"}
    with pytest.raises(ConfigError, match="allowed KEY=VALUE"):
        split_options(["fast"])


@pytest.mark.parametrize("name", TARGETS)
def test_every_target_opens_and_refuses_what_it_does_not_know(name: str) -> None:
    target = open_target(name)
    assert target.name == name
    assert open_target(name, target.options.model_dump(mode="json")) == target
    with pytest.raises(
        ConfigError, match=rf"--target-option wings: found 'two'; no such option\n.*{name}"
    ):
        open_target(name, {"wings": "two"})


def test_an_unknown_target() -> None:
    with pytest.raises(ConfigError, match="found 'toaster'; allowed genai"):
        open_target("toaster")
