"""Scales of cached keys hold at every position, not only at those that were seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.targets.kv_cache import LARGEST_CODE, _pairs, _scale

HEADS, WIDTH = 2, 8


def rotate(
    keys: npt.NDArray[np.float32], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """RoPE by halves of keys [heads, T, d]."""
    half = WIDTH // 2
    angles = positions[:, np.newaxis] / 10000.0 ** (np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    low, high = keys[..., :half], keys[..., half:]
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
    return turned.astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 100_000))
def test_keys_fit_wherever_the_text_is(seed: int, offset: int) -> None:
    keys = np.random.default_rng(seed).normal(size=(HEADS, 16, WIDTH)).astype(np.float32)
    seen = rotate(keys, np.arange(16))
    largest = np.stack([np.square(seen).max(axis=1), _pairs(seen)])
    scale = _scale(largest, rotated=True).reshape(HEADS, 1, WIDTH)
    later = rotate(keys, np.arange(16) + offset)
    assert (np.abs(later) <= LARGEST_CODE * scale).all()


def test_values_have_the_scale_of_their_channel() -> None:
    values = np.random.default_rng(0).normal(size=(HEADS, 16, WIDTH)).astype(np.float32)
    squares = np.stack([np.square(values).max(axis=1), _pairs(values)])
    scale = _scale(squares, rotated=False)
    largest = np.abs(values).max(axis=1).reshape(-1)
    np.testing.assert_allclose(scale * LARGEST_CODE, 1.05 * largest, rtol=1e-5)
