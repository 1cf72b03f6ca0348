"""Errors through a Gram matrix, against explicit activations."""

from __future__ import annotations

import numpy as np
import pytest

from faq_onnx.quant.objective import block_grams, output_energy, scale_gram


def _activations(rng: np.random.Generator, tokens: int, channels: int) -> np.ndarray:
    return rng.normal(size=(tokens, channels)) * np.exp2(rng.normal(size=channels))


def test_energy_is_the_mean_squared_output(rng: np.random.Generator) -> None:
    x, delta = _activations(rng, 50, 12), rng.normal(size=(7, 12))
    gram = (x.T @ x / 50).astype(np.float32)
    expected = np.square(x @ delta.T).sum(axis=1).mean()
    found = output_energy(delta.astype(np.float32), gram)
    # a quadratic form of 12 * 12 positive and negative terms in float32
    bound = 144 * 2.0**-23 * float(np.abs(delta).sum() ** 2 * np.abs(gram).max())
    assert found == pytest.approx(expected, abs=bound)


def test_energy_by_hand() -> None:
    gram = np.array([[2, 1], [1, 3]], np.float32)
    assert output_energy(np.array([[1, 0]], np.float32), gram) == 2
    assert output_energy(np.array([[1, 1], [0, 2]], np.float32), gram) == 7 + 12
    assert output_energy(np.zeros((3, 2), np.float32), gram) == 0


def test_gram_of_scaled_activations(rng: np.random.Generator) -> None:
    x, scale = rng.normal(size=(40, 6)), np.exp2(rng.integers(-2, 3, 6)).astype(np.float32)
    gram = (x.T @ x / 40).astype(np.float32)
    by_hand = gram / scale / scale[:, None]  # powers of two: exact in any order
    np.testing.assert_array_equal(scale_gram(gram, scale), by_hand)


def test_scaling_weight_and_activation_keeps_the_energy(rng: np.random.Generator) -> None:
    scale = np.exp2(rng.integers(-2, 3, 6)).astype(np.float32)
    gram = np.cov(rng.normal(size=(6, 30))).astype(np.float32)
    delta = rng.normal(size=(4, 6)).astype(np.float32)
    plain = output_energy(delta, gram)
    assert output_energy(delta * scale, scale_gram(gram, scale)) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize(("size", "block"), [(8, 4), (10, 4), (3, 16), (16, 16), (17, 16)])
def test_diagonal_blocks(size: int, block: int, rng: np.random.Generator) -> None:
    gram = rng.normal(size=(size, size)).astype(np.float32)
    found = block_grams(gram, block)
    assert found.shape == (-(-size // block), block, block)
    padded = np.zeros((len(found) * block,) * 2, np.float32)
    padded[:size, :size] = gram
    for index, matrix in enumerate(found):
        part = slice(index * block, (index + 1) * block)
        np.testing.assert_array_equal(matrix, padded[part, part])
