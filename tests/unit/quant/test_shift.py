"""Weights that make up for errors at their inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.shift import shifted_target

TOKENS, K, N = 200, 24, 6

Array = npt.NDArray[np.float32]
Moments = tuple[Array, Array, Array, npt.NDArray[np.float64], npt.NDArray[np.float64]]


@pytest.fixture
def moments(rng: np.random.Generator) -> Moments:
    """W, G and M of a site that reads x_q and should give y; x_q and y themselves."""
    x = rng.normal(size=(TOKENS, K)) @ rng.normal(size=(K, K))
    low = x + 0.3 * rng.normal(size=x.shape)
    weight = rng.normal(size=(N, K)).astype(np.float32)
    wanted = x @ weight.T.astype(np.float64)
    gram = (low.T @ low / TOKENS).astype(np.float32)
    missing = ((wanted - low @ weight.T).T @ low / TOKENS).astype(np.float32)
    return weight, gram, missing, low, wanted


def test_strength_0_leaves_the_weight(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    np.testing.assert_array_equal(shifted_target(weight, gram, missing, 0.0, 1.0), weight)


def test_nothing_missing_leaves_the_weight(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    found = shifted_target(weight, gram, np.zeros_like(missing), 1.0, 1e-3)
    np.testing.assert_array_equal(found, weight)


def test_all_of_it_without_a_ridge_is_least_squares(moments: Moments) -> None:
    weight, gram, missing, low, wanted = moments
    expected = np.linalg.lstsq(low, wanted, rcond=None)[0].T
    found = shifted_target(weight, gram, missing, 1.0, 1e-9)
    # float32 moments: eps times the condition of the Gram matrix
    bound = np.linalg.cond(gram.astype(np.float64)) * 2.0**-23 * np.abs(expected).max()
    assert bound < 0.05 * np.abs(expected - weight).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_the_ridge_is_relative_to_the_mean_energy(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    ridge = 0.5 * float(np.diagonal(gram).mean())
    wide = gram.astype(np.float64) + ridge * np.eye(K)
    expected = weight + 0.25 * missing.astype(np.float64) @ np.linalg.inv(wide)
    found = shifted_target(weight, gram, missing, 0.25, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    # both moments in other units: the weight is the same
    again = shifted_target(weight, 64 * gram, 64 * missing, 0.25, 0.5)
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_a_larger_ridge_moves_less(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    moves = [
        float(np.abs(shifted_target(weight, gram, missing, 1.0, ridge) - weight).sum())
        for ridge in (1e-6, 1e-2, 1.0, 100.0)
    ]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < moves[0] / 10


def test_activations_that_are_always_zero_leave_the_weight(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    zero = np.zeros_like(gram)
    found = shifted_target(weight, zero, np.zeros_like(missing), 1.0, 1.0)
    np.testing.assert_array_equal(found, weight)


def test_inputs_are_not_written_to(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    copies = [array.copy() for array in (weight, gram, missing)]
    shifted_target(weight, gram, missing, 1.0, 0.1)
    for array, copy in zip((weight, gram, missing), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
