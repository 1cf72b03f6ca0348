"""Metrics of heads against sums over tokens and positions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.head_grams import (
    Rotary,
    attended_gram,
    head_covariance,
    key_metric,
    output_metric,
    query_metric,
    reason_against,
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


def test_output_metric(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(7, HEADS * SIZE)).astype(np.float32)
    found = output_metric(weight, HEADS, KV_HEADS)
    parts = [weight[:, h * SIZE : (h + 1) * SIZE].astype(np.float64) for h in range(HEADS)]
    for group in range(KV_HEADS):
        _close(found[group], np.mean([p.T @ p for p in parts[3 * group : 3 * group + 3]], axis=0))


def test_models_that_the_metrics_do_not_describe() -> None:
    rotary = _rotary(SIZE, interleaved=False)

    def reason(heads: int = HEADS, size: int = SIZE, norm: bool = False) -> str | None:
        return reason_against(
            heads=heads, kv_heads=KV_HEADS, head_dim=size, rotary=rotary, query_key_norm=norm
        )

    assert reason() is None
    assert "norm" in (reason(norm=True) or "")
    assert "5 query heads" in (reason(heads=5) or "")
    assert "a head has 4" in (reason(size=4) or "")
