"""Laws of the rate-distortion bound."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faq_onnx.quant.formats import block_format
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.rate_distortion import (
    component_energies,
    gaussian_rate,
    water_level,
)
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn

pytestmark = pytest.mark.property

ENERGIES = st.lists(st.floats(0, 1e4), min_size=1, max_size=40).map(
    lambda values: np.asarray([*values, 1.0])
)
SHARES = st.floats(1e-6, 1.0)


@given(st.integers(1, 30), st.floats(0.01, 12), st.floats(1e-6, 1e6))
def test_one_bit_is_six_decibels_without_correlation(
    size: int, bits: float, variance: float
) -> None:
    energies = component_energies(np.eye(size, dtype=np.float32), variance)
    rate = gaussian_rate(energies, variance * 4.0**-bits)
    assert rate == pytest.approx(bits, rel=1e-9, abs=1e-9)


@given(ENERGIES, SHARES)
def test_the_level_gives_the_distortion_back(
    energies: npt.NDArray[np.float64], share: float
) -> None:
    wished = share * energies.mean()
    level = water_level(energies, wished)
    assert np.minimum(energies, level).mean() == pytest.approx(wished, rel=1e-9)


@given(ENERGIES, SHARES, SHARES)
def test_less_distortion_needs_more_bits(
    energies: npt.NDArray[np.float64], one: float, other: float
) -> None:
    small, large = sorted((one, other))
    mean = energies.mean()
    more, fewer = gaussian_rate(energies, small * mean), gaussian_rate(energies, large * mean)
    assert more >= fewer - 1e-12
    assert fewer >= 0


@given(ENERGIES, SHARES)
def test_correlation_never_needs_more_bits(
    energies: npt.NDArray[np.float64], share: float
) -> None:
    # Jensen: equal energies of the same mean are the hardest source
    mean = float(energies.mean())
    flat = np.full_like(energies, mean)
    assert gaussian_rate(energies, share * mean) <= gaussian_rate(flat, share * mean) + 1e-9


@given(ENERGIES)
def test_nothing_is_needed_for_the_whole_energy(energies: npt.NDArray[np.float64]) -> None:
    assert gaussian_rate(energies, 2 * float(energies.max())) == 0


@given(st.floats(max_value=0))
def test_no_distortion_has_no_rate(distortion: float) -> None:
    with pytest.raises(ValueError, match="endless bits"):
        water_level(np.ones(3), distortion)


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 8]), st.sampled_from([16, 32, 64]))
def test_no_quantizer_beats_the_bound(seed: int, bits: int, block_size: int) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = 128, 64
    weight = rng.standard_normal((rows, columns)).astype(np.float32)
    factor = rng.standard_normal((columns, columns)) * rng.uniform(0.1, 2, columns)
    gram = (factor.T @ factor / columns).astype(np.float32)
    stored = quantize_rtn(weight, block_format(bits, block_size, symmetric=False))
    delta = dequantize_weight(stored) - weight
    distortion = output_energy(delta, gram) / weight.size
    rate = 8 * stored.size_bytes / weight.size
    assert rate > gaussian_rate(component_energies(gram, 1.0), distortion)
