"""Metrics of heads against sums over tokens and positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.head_grams import (
    Rotary,
    attended_gram,
    fit_rotary,
    head_covariance,
    is_rotated,
    key_metric,
    query_metric,
    rotate_mean,
)

Doubles = npt.NDArray[np.float64]
TOKENS, HEADS, KV_HEADS, SIZE = 11, 6, 2, 8


def _rotary(channels: int, interleaved: bool, factor: float = 1.0) -> Rotary:
    pairs = channels // 2
    angles = np.outer(np.arange(40), 100.0 ** (-np.arange(pairs) / pairs))
    cos, sin = (factor * table for table in (np.cos(angles), np.sin(angles)))
    return Rotary(cos.astype(np.float32), sin.astype(np.float32), interleaved=interleaved)


def _rotation(rotary: Rotary, position: int) -> Doubles:
    """R_t written out, [SIZE, SIZE]."""
    matrix = np.eye(SIZE)
    pairs = rotary.channels // 2
    for i in range(pairs):
        a, b = (2 * i, 2 * i + 1) if rotary.interleaved else (i, i + pairs)
        cos, sin = float(rotary.cos[position, i]), float(rotary.sin[position, i])
        matrix[a, a] = matrix[b, b] = cos
        matrix[a, b], matrix[b, a] = -sin, sin
    return matrix


def _close(found: Doubles, expected: Doubles) -> None:
    # float64 sums of well-scaled terms
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10 * np.abs(expected).max())


@pytest.mark.parametrize("channels", [8, 4, 2])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1.3])
def test_rotation_is_a_sum_over_positions(
    channels: int, interleaved: bool, factor: float, rng: np.random.Generator
) -> None:
    rotary = _rotary(channels, interleaved, factor)
    covariance = head_covariance(rng.normal(size=(TOKENS, HEADS, SIZE)))
    positions = np.array([0, 1, 2, 3, 3, 17, 39])
    turns = [_rotation(rotary, int(t)) for t in positions]
    expected = np.mean([turn.T @ covariance @ turn for turn in turns], axis=0)
    _close(rotate_mean(covariance, positions, rotary), expected)
    assert rotate_mean(covariance, positions, None) is covariance


@pytest.mark.parametrize("interleaved", [False, True])
def test_query_metric_is_the_mean_squared_score(
    interleaved: bool, rng: np.random.Generator
) -> None:
    """d^T H_out d = mean over t and s of (k_s . R_t d)^2, keys of the query's own kv head."""
    rotary = _rotary(SIZE, interleaved)
    keys = rng.normal(size=(TOKENS, KV_HEADS, SIZE))
    delta = rng.normal(size=(HEADS, SIZE))
    positions = np.arange(TOKENS)
    metric = query_metric(head_covariance(keys), positions, rotary, HEADS)
    for head in range(HEADS):
        turned = np.stack([_rotation(rotary, int(t)) @ delta[head] for t in positions])
        scores = keys[:, head // (HEADS // KV_HEADS)] @ turned.T
        expected = np.square(scores).mean()
        assert delta[head] @ metric[head] @ delta[head] == pytest.approx(expected, rel=1e-10)


def test_key_metric_is_the_mean_over_its_queries(rng: np.random.Generator) -> None:
    rotary = _rotary(SIZE, interleaved=False)
    queries = rng.normal(size=(TOKENS, HEADS, SIZE))
    delta = rng.normal(size=(KV_HEADS, SIZE))
    positions = np.arange(TOKENS)
    metric = key_metric(head_covariance(queries), positions, rotary, KV_HEADS)
    assert metric.shape == (KV_HEADS, SIZE, SIZE)
    for head in range(KV_HEADS):
        readers = queries[:, 3 * head : 3 * head + 3].reshape(-1, SIZE)
        turned = np.stack([_rotation(rotary, int(t)) @ delta[head] for t in positions])
        expected = np.square(readers @ turned.T).mean()
        assert delta[head] @ metric[head] @ delta[head] == pytest.approx(expected, rel=1e-10)


def test_attended_inputs(rng: np.random.Generator) -> None:
    inputs = rng.normal(size=(TOKENS, 5))
    weights = np.tril(rng.random(size=(HEADS, TOKENS, TOKENS)))
    weights /= weights.sum(axis=-1, keepdims=True)
    found = attended_gram(weights, inputs, KV_HEADS)
    for group in range(KV_HEADS):
        mixed = [weights[head] @ inputs for head in range(3 * group, 3 * group + 3)]
        expected = np.mean([m.T @ m / TOKENS for m in mixed], axis=0)
        _close(found[group], expected)


ROTARIES = [(SIZE, False), (SIZE, True), (SIZE // 2, False), (SIZE // 4, True)]


def _turned(before: Doubles, rotary: Rotary) -> Doubles:
    """[sequences, heads, tokens, SIZE], rotated position by position."""
    turns = np.stack([_rotation(rotary, t) for t in range(before.shape[2])])
    turned: Doubles = np.einsum("tij,bhtj->bhti", turns, before)
    return turned


@pytest.mark.parametrize(("channels", "interleaved"), ROTARIES)
@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_a_rotation_is_found_in_what_it_does(
    rng: np.random.Generator, channels: int, interleaved: bool, factor: float
) -> None:
    before = rng.normal(size=(2, HEADS, TOKENS, SIZE))
    rotary = _rotary(channels, interleaved)
    found = fit_rotary(before, factor * _turned(before, rotary))
    assert found is not None
    for position in range(TOKENS):
        np.testing.assert_allclose(
            _rotation(found, position), _rotation(rotary, position), atol=1e-6
        )


def test_keys_are_checked_against_the_rotation_of_queries(rng: np.random.Generator) -> None:
    """One sequence of one head is enough: only a factor is free."""
    rotary = _rotary(SIZE // 2, interleaved=True)
    before = rng.normal(size=(1, 1, TOKENS, SIZE))
    after = 3 * _turned(before, rotary)
    assert is_rotated(before, after, rotary)
    assert not is_rotated(before, after, _rotary(SIZE, interleaved=False))
    assert not is_rotated(before, after / (1 + np.abs(after).max(axis=-1, keepdims=True)), rotary)


def test_no_rotation_at_all_is_one_by_nothing(rng: np.random.Generator) -> None:
    before = rng.normal(size=(2, HEADS, TOKENS, SIZE))
    found = fit_rotary(before, 0.5 * before)
    assert found is not None
    np.testing.assert_allclose(_rotation(found, 3), np.eye(SIZE), atol=1e-6)


def test_what_is_more_than_a_rotation_is_declined(rng: np.random.Generator) -> None:
    before = rng.normal(size=(2, HEADS, TOKENS, SIZE))
    after = _turned(before, _rotary(SIZE, interleaved=False))
    normed = after / np.sqrt((after**2).mean(axis=-1, keepdims=True))
    assert fit_rotary(before, normed) is None  # Qwen3's norms of queries and keys
    assert fit_rotary(before, rng.normal(size=before.shape)) is None
    assert fit_rotary(before, np.zeros_like(before)) is None
    assert fit_rotary(before[:1, :2], after[:1, :2]) is None  # too few to tell
    assert fit_rotary(before, after[:, :3]) is None
