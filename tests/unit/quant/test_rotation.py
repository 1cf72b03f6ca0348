"""Rotations are orthogonal, and a weight takes them on either side."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.quant.rotation import HeadRotation, StreamRotation, rotate_weight

EPSILON = float(np.finfo(np.float64).eps)


def matrix_of(rotation: StreamRotation | HeadRotation, width: int) -> np.ndarray:
    return rotation.rotate(np.eye(width))


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 200), seed=st.integers(0, 2**32))
def test_every_width_is_turned_orthogonally(width: int, seed: int) -> None:
    rotation = StreamRotation.random(width, np.random.default_rng(seed))
    turned = matrix_of(rotation, width)
    # entries are sums of `width` products of numbers below 1
    assert np.abs(turned @ turned.T - np.eye(width)).max() <= 4 * width * EPSILON
    assert np.prod([len(factor) for factor in rotation.factors]) == width


def test_one_channel_spreads_over_all_of_a_power_of_two() -> None:
    turned = StreamRotation.random(4096, np.random.default_rng(0)).rotate(np.eye(8, 4096))
    np.testing.assert_allclose(np.abs(turned), 1 / 64, rtol=1e-12)


def test_one_channel_spreads_over_all_of_an_odd_multiple() -> None:
    turned = matrix_of(StreamRotation.random(576, np.random.default_rng(0)), 576)
    assert np.count_nonzero(turned) == turned.size
    assert np.abs(turned).max() <= 1 / 8  # entries of R, at most 1, over those of Hadamard's 64


def test_heads_turn_alone_and_repeated_ones_alike() -> None:
    rng = np.random.default_rng(0)
    values = HeadRotation.random(2, 8, rng)
    rows = rng.normal(size=(5, 3, 2 * 8 + 4))
    turned = HeadRotation(values.matrices, start=4).rotate(rows)
    np.testing.assert_array_equal(turned[..., :4], rows[..., :4])
    first, second = rows[..., 4:12] @ values.matrices[0], rows[..., 12:] @ values.matrices[1]
    np.testing.assert_allclose(turned[..., 4:], np.concatenate((first, second), -1), atol=1e-12)
    queries = rng.normal(size=(5, 2 * 3 * 8))
    attended = HeadRotation(values.matrices, repeats=3).rotate(queries)
    heads = queries.reshape(5, 6, 8)
    expected = [heads[:, head] @ values.matrices[head // 3] for head in range(6)]
    np.testing.assert_allclose(attended, np.concatenate(expected, axis=1), atol=1e-12)


@pytest.mark.parametrize("inputs", [True, False])
@pytest.mark.parametrize("outputs", [True, False])
def test_a_rotated_weight_computes_the_rotated_output(inputs: bool, outputs: bool) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(48, 32)).astype(np.float32)
    gain = rng.uniform(0.5, 4, 32) if inputs else None
    before = StreamRotation.random(32, rng) if inputs else None
    after = StreamRotation.random(48, rng) if outputs else None
    turned = rotate_weight(weight, gain=gain, inputs=before, outputs=after)
    assert turned.dtype == np.float32
    x = rng.normal(size=(7, 32))
    seen = x if before is None else before.rotate(x)
    expected = (x if gain is None else x * gain) @ weight.T
    wanted = expected if after is None else after.rotate(expected)
    # one rounding of each weight; at most 32 * 4 * |x| of them in a sum
    np.testing.assert_allclose(seen @ turned.T, wanted, atol=32 * 4 * 4 * 2.0**-24)


def test_large_weights_are_turned_piece_by_piece() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(9000, 16)).astype(np.float32)
    rotation = StreamRotation.random(16, rng)
    whole = rotation.rotate(weight).astype(np.float32)
    np.testing.assert_allclose(rotate_weight(weight, inputs=rotation), whole, rtol=1e-6, atol=1e-7)
    turned = rotate_weight(weight.T, outputs=rotation)
    np.testing.assert_allclose(turned, whole.T, rtol=1e-6, atol=1e-7)


def test_a_seed_decides() -> None:
    one, same, other = (
        matrix_of(StreamRotation.random(24, np.random.default_rng(seed)), 24) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1
