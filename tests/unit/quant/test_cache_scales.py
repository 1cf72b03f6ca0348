"""Scales of cached keys hold at every position, not only at those that were seen."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.quant.cache_scales import LARGEST_CODE, MARGIN, CacheRange

HEADS, WIDTH, PAIRS = 2, 12, 4


def rotate(
    keys: npt.NDArray[np.float32], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """RoPE by halves of the first channels of keys [heads, T, d]."""
    angles = positions[:, np.newaxis] / 10000.0 ** (np.arange(PAIRS) / PAIRS)
    cos, sin = np.cos(angles), np.sin(angles)
    low, high, rest = np.split(keys, [PAIRS, 2 * PAIRS], axis=-1)
    turned = np.concatenate([low * cos - high * sin, high * cos + low * sin, rest], axis=-1)
    return turned.astype(np.float32)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 100_000))
def test_keys_fit_wherever_the_text_is(seed: int, offset: int) -> None:
    keys = np.random.default_rng(seed).normal(size=(HEADS, 16, WIDTH)).astype(np.float32)
    seen = rotate(keys, np.arange(16))
    scale = CacheRange.of(seen, PAIRS).scales.reshape(HEADS, 1, WIDTH)
    later = rotate(keys, np.arange(16) + offset)
    assert (np.abs(later) <= LARGEST_CODE * scale).all()


def test_values_have_the_scale_of_their_channel_over_all_texts() -> None:
    values = np.random.default_rng(0).normal(size=(HEADS, 16, WIDTH)).astype(np.float32)
    one, other = CacheRange.of(values[:, :9], 0), CacheRange.of(values[:, 9:], 0)
    scale = one.join(other).scales
    largest = np.abs(values).max(axis=1).reshape(-1)
    np.testing.assert_allclose(scale * LARGEST_CODE, MARGIN * largest, rtol=1e-5)
