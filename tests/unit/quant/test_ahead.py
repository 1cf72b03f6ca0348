"""Steps that bring the residual stream back through the weight behind a site."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from faq_onnx.quant.ahead import (
    AheadMoments,
    Seen,
    best_strengths,
    stream_change,
    stream_step,
)

Array = npt.NDArray[np.float32]
TOKENS, INPUTS, OUTPUTS, STREAM = 256, 8, 12, 6

seeds = st.integers(0, 2**32 - 1)


def _seen(seed: int, sites: tuple[str, ...] = ("gate", "up")) -> Seen:
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> Array:
        return rng.normal(size=shape).astype(np.float32)

    slopes = {name: draw(TOKENS, OUTPUTS) for name in sites}
    return Seen(draw(TOKENS, INPUTS), slopes, draw(TOKENS, STREAM), draw(STREAM, OUTPUTS))


def _gram(seen: Seen) -> Array:
    return seen.inputs.T @ seen.inputs / np.float32(len(seen.inputs))


def _moments(*parts: Seen) -> AheadMoments:
    moments = AheadMoments()
    for part in parts:
        moments.add(part)
    return moments


@given(seeds)
def test_change_is_the_derivative_of_what_the_stream_gets(seed: int) -> None:
    """f(D) token by token, as the sums of the formula say it."""
    seen = _seen(seed, ("up",))
    step = np.random.default_rng(seed + 1).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    outputs = np.einsum("tk,nk->tn", seen.inputs.astype(np.float64), step)
    expected = np.einsum("tn,tn,dn->td", outputs, seen.slopes["up"], seen.weight)
    np.testing.assert_allclose(stream_change(seen, step, "up"), expected, rtol=1e-4, atol=1e-4)


@given(seeds)
def test_a_step_goes_downhill(seed: int) -> None:
    """What the tokens ask for lowers their own loss, at a strength that is small enough."""
    seen = _seen(seed)
    steps = stream_step(_moments(seen), _gram(seen), seen.weight)
    for name, step in steps.items():
        change = stream_change(seen, step, name)
        assert np.vdot(change, seen.missing) > 0


@given(seeds)
def test_the_step_finds_a_change_that_was_made(seed: int) -> None:
    """With slopes of independent sign and many tokens the metric is nearly the true one."""
    seen = _seen(seed, ("up",))
    made = np.random.default_rng(seed + 1).normal(size=(OUTPUTS, INPUTS)).astype(np.float32)
    missing = stream_change(seen, made, "up")
    asked = Seen(seen.inputs, seen.slopes, missing, seen.weight)
    step = stream_step(_moments(asked), _gram(asked), asked.weight)["up"]
    cosine = np.vdot(step, made) / np.linalg.norm(step) / np.linalg.norm(made)
    assert cosine > 0.6


@given(seeds, st.integers(0, TOKENS))
def test_moments_do_not_depend_on_how_tokens_come(seed: int, cut: int) -> None:
    seen = _seen(seed)
    whole = _moments(seen)
    parts = _moments(seen.of(slice(cut)), seen.of(slice(cut, TOKENS)))
    summed = _moments(seen.of(slice(cut))).plus(_moments(seen.of(slice(cut, TOKENS))))
    for other in (parts, summed):
        assert other.tokens == whole.tokens
        for name, pull in whole.pull.items():
            np.testing.assert_allclose(other.pull[name], pull, rtol=1e-3, atol=1e-2)
            np.testing.assert_allclose(other.energy[name], whole.energy[name], rtol=1e-4)


@given(seeds, st.integers(1, 3))
def test_strengths_are_the_best_of_a_grid(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(count, count + 1))
    curvature, slope = factor @ factor.T, rng.normal(size=count)
    best = best_strengths(slope, curvature)
    assert ((best >= 0) & (best <= 1)).all()

    def loss(strength: npt.NDArray[np.float64]) -> float:
        return float(strength @ curvature @ strength - 2 * strength @ slope)

    assert loss(best) <= 0
    alone = np.linspace(0, 1, 21)
    for n in range(count):
        for strength in alone:
            one = np.zeros(count)
            one[n] = strength
            assert loss(best) <= loss(one) + 1e-9
