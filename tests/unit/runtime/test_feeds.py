"""Feeding decoders of several exporters."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from faq_onnx.errors import UnsupportedModelError
from faq_onnx.runtime.feeds import CachePosition, cache_position, decoder_feeds, describe_inputs


@dataclasses.dataclass(frozen=True)
class Input:
    """Like onnxruntime's NodeArg."""

    name: str
    type: str
    shape: list[int | str | None]


IDS = Input("input_ids", "tensor(int64)", ["batch", "sequence"])
MASK = Input("attention_mask", "tensor(int64)", ["batch", "past + sequence"])
POSITIONS = Input("position_ids", "tensor(int64)", ["batch", "sequence"])


def _cache(dtype: str = "float", past: int | str | None = "past") -> list[Input]:
    return [
        Input(f"past_key_values.{layer}.{part}", f"tensor({dtype})", ["batch", 3, past, 64])
        for layer in range(2)
        for part in ("key", "value")
    ]


TOKENS = np.array([[5, 6, 7], [8, 9, 10]])


def test_an_optimum_decoder_starts_with_an_empty_cache() -> None:
    feeds = decoder_feeds([IDS, MASK, POSITIONS, *_cache()], TOKENS)
    assert np.array_equal(feeds["input_ids"], TOKENS)
    assert feeds["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert feeds["position_ids"].tolist() == [[0, 1, 2], [0, 1, 2]]
    assert feeds["past_key_values.1.value"].shape == (2, 3, 0, 64)
    assert feeds["past_key_values.1.value"].dtype == np.float32


def test_a_running_cache_moves_positions_and_mask() -> None:
    past = {value.name: np.zeros((2, 3, 4, 64), np.float16) for value in _cache()}
    feeds = decoder_feeds([IDS, MASK, POSITIONS, *_cache("float16")], TOKENS[:, :1], past)
    assert feeds["attention_mask"].shape == (2, 5)
    assert feeds["position_ids"].tolist() == [[4], [4]]
    assert feeds["past_key_values.0.key"] is past["past_key_values.0.key"]


def test_element_types_follow_the_graph() -> None:
    inputs = [
        Input("input_ids", "tensor(int32)", [None, None]),
        Input("attention_mask", "tensor(float)", [None, None]),
        *_cache("float16", past=None),
    ]
    feeds = decoder_feeds(inputs, TOKENS)
    assert feeds["input_ids"].dtype == np.int32
    assert feeds["attention_mask"].dtype == np.float32
    assert feeds["past_key_values.0.key"].dtype == np.float16
    assert "position_ids" not in feeds


def test_merged_decoders_are_told_which_branch_to_take() -> None:
    branch = Input("use_cache_branch", "tensor(bool)", [1])
    assert decoder_feeds([IDS, branch], TOKENS)["use_cache_branch"].tolist() == [False]


def test_some_of_the_inputs_are_enough() -> None:
    """The layer walk feeds pieces of a model that do not read the tokens."""
    assert decoder_feeds([POSITIONS], TOKENS).keys() == {"position_ids"}
    assert decoder_feeds([], TOKENS) == {}


def test_all_strange_inputs_are_listed_at_once() -> None:
    inputs = [
        IDS,
        Input("pixel_values", "tensor(float)", ["batch", 3, 224, 224]),
        Input("encoder_hidden_states", "tensor(float)", ["batch", "s", 64]),
        Input("words", "tensor(string)", ["batch"]),
    ]
    with pytest.raises(UnsupportedModelError) as error:
        describe_inputs(inputs)
    for part in ("pixel_values", "encoder_hidden_states", "words tensor(string)", "text decoder"):
        assert part in str(error.value)
    assert "input_ids tensor" not in str(error.value)


@pytest.mark.parametrize(
    "shape",
    [
        ["batch", "heads", "past", 64],
        ["batch", 3, "past", None],
        ["batch", 3, 16, 64],
        ["batch", "past", 192],
        [],
    ],
)
def test_a_cache_of_unknown_shape_is_refused(shape: list[int | str | None]) -> None:
    with pytest.raises(UnsupportedModelError, match="static number of heads"):
        describe_inputs([IDS, Input("past_key_values.0.key", "tensor(float)", shape)])


def test_three_dimensional_positions_are_refused() -> None:
    positions = Input("position_ids", "tensor(int64)", [3, "batch", "sequence"])
    with pytest.raises(UnsupportedModelError, match="positions must be"):
        describe_inputs([IDS, positions])


@pytest.mark.parametrize(
    ("name", "layer", "part"),
    [
        ("past_key_values.0.key", 0, "key"),
        ("past_key_values.11.value", 11, "value"),
        ("present.3.key", 3, "key"),
        ("present_key_values.3.value", 3, "value"),
        ("past_key_2", 2, "key"),
        ("present_value_12", 12, "value"),
        ("past.4.decoder.key", None, ""),
        ("logits", None, ""),
        ("past_sequence_length", None, ""),
    ],
)
def test_cache_names(name: str, layer: int | None, part: str) -> None:
    expected = None if layer is None else CachePosition(layer, part)
    assert cache_position(name) == expected
