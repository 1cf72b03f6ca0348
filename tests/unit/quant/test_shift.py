"""Weights that make up for errors at their inputs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.shift import Miss, correction, damped_correction

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


def _shifted(weight: Array, gram: Array, missing: Array, ridge: float) -> Array:
    shifted: Array = weight + damped_correction(Miss(gram, missing), ridge)
    return shifted


def test_nothing_missing_changes_nothing(moments: Moments) -> None:
    _, gram, missing, *_ = moments
    none = Miss(gram, np.zeros_like(missing))
    assert not damped_correction(none, 1e-3).any()
    assert not correction((none, none)).any()


def test_what_both_halves_ask_for_is_done_in_full(moments: Moments) -> None:
    """Two equal halves: nothing speaks against the smaller ridge and the whole strength."""
    _, gram, missing, *_ = moments
    half = Miss(gram, missing)
    expected = damped_correction(half, 0.1)
    np.testing.assert_array_equal(correction((half, half)), expected)


def test_halves_count_by_their_tokens(moments: Moments) -> None:
    _, gram, missing, *_ = moments
    many, few = Miss(gram, missing, 300), Miss(2 * gram, -missing, 100)
    whole = Miss.mean((many, few))
    np.testing.assert_allclose(whole.gram, 1.25 * gram, rtol=1e-6)
    np.testing.assert_allclose(whole.missing, 0.5 * missing, rtol=1e-6)
    assert whole.tokens == 400


def test_what_the_halves_disagree_on_is_left_alone(moments: Moments) -> None:
    _, gram, missing, *_ = moments
    assert not correction((Miss(gram, missing), Miss(gram, -missing))).any()


def test_noise_gets_less_strength_than_signal(rng: np.random.Generator) -> None:
    """Of errors that x_q does not explain, next to nothing is corrected."""
    low = rng.normal(size=(2, 300, K))
    noise = rng.normal(size=(2, 300, N))
    signal = np.einsum("htk,nk->htn", low, rng.normal(size=(N, K)))
    moved = []
    for missed in (noise, signal):
        halves = [
            Miss((x.T @ x / 300).astype(np.float32), (y.T @ x / 300).astype(np.float32))
            for x, y in zip(low, missed, strict=True)
        ]
        change = correction((halves[0], halves[1]))
        full = damped_correction(halves[0], 0.1)
        moved.append(np.abs(change).sum() / np.abs(full).sum())
    assert moved[0] < 0.3
    assert moved[1] > 0.9


def test_all_of_it_without_a_ridge_is_least_squares(moments: Moments) -> None:
    weight, gram, missing, low, wanted = moments
    expected = np.linalg.lstsq(low, wanted, rcond=None)[0].T
    found = _shifted(weight, gram, missing, 1e-9)
    # float32 moments: eps times the condition of the Gram matrix
    bound = np.linalg.cond(gram.astype(np.float64)) * 2.0**-23 * np.abs(expected).max()
    assert bound < 0.05 * np.abs(expected - weight).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=bound)


def test_the_ridge_is_relative_to_the_mean_energy(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    ridge = 0.5 * float(np.diagonal(gram).mean())
    wide = gram.astype(np.float64) + ridge * np.eye(K)
    expected = weight + missing.astype(np.float64) @ np.linalg.inv(wide)
    found = _shifted(weight, gram, missing, 0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    # both moments in other units: the weight is the same
    again = _shifted(weight, 64 * gram, 64 * missing, 0.5)
    np.testing.assert_allclose(again, found, rtol=1e-5)


def test_a_larger_ridge_moves_less(moments: Moments) -> None:
    _, gram, missing, *_ = moments
    moves = [
        float(np.abs(damped_correction(Miss(gram, missing), ridge)).sum())
        for ridge in (1e-6, 1e-2, 1.0, 100.0)
    ]
    assert moves == sorted(moves, reverse=True)
    assert moves[-1] < moves[0] / 10


def test_activations_that_are_always_zero_leave_the_weight(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    zero = np.zeros_like(gram)
    found = _shifted(weight, zero, np.zeros_like(missing), 1.0)
    np.testing.assert_array_equal(found, weight)


def test_inputs_are_not_written_to(moments: Moments) -> None:
    weight, gram, missing, *_ = moments
    copies = [array.copy() for array in (weight, gram, missing)]
    correction((Miss(gram, missing), Miss(gram, missing)))
    for array, copy in zip((weight, gram, missing), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
