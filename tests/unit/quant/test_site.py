"""One weight into its low-bit form."""

from __future__ import annotations

import math

import numpy as np
import pytest

from faq_onnx.quant import site as site_module
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.site import quantize_weight, rtn_digest
from faq_onnx.quant.uniform import dequantize_weight, quantize_rtn

FMT = block_format(4, 16, symmetric=False)


def _gram(rng: np.random.Generator, size: int) -> np.ndarray:
    x = rng.normal(size=(4 * size, size)) * np.exp2(rng.normal(scale=2, size=size))
    gram: np.ndarray = (x.T @ x / len(x)).astype(np.float32)
    return gram


def test_without_clipping_it_is_round_to_nearest(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(6, 40)).astype(np.float32)
    found = quantize_weight(weight, FMT)
    expected = quantize_rtn(weight, FMT, np.float32)
    np.testing.assert_array_equal(found.weight.packed, expected.packed)
    np.testing.assert_array_equal(found.weight.scales, expected.scales)
    assert found.codes_digest == rtn_digest(weight, FMT, np.float32)


def test_clipping_changes_codes_and_lowers_the_output_error(rng: np.random.Generator) -> None:
    weight = rng.standard_t(3, size=(16, 40)).astype(np.float32)
    gram = np.diag(np.diag(_gram(rng, 40)))  # so that the blocks' errors add up to the site's
    plain = quantize_weight(weight, FMT, gram=gram)
    clipped = quantize_weight(weight, FMT, gram=gram, clip=True)
    assert clipped.codes_digest != rtn_digest(weight, FMT, np.float32)
    assert clipped.sqnr_db > plain.sqnr_db


@pytest.mark.parametrize("clip", [False, True])
def test_sqnr_is_that_of_what_was_packed(clip: bool, rng: np.random.Generator) -> None:
    weight = rng.normal(size=(8, 33)).astype(np.float32)
    gram = _gram(rng, 33)
    found = quantize_weight(weight, FMT, gram=gram, clip=clip)
    delta = dequantize_weight(found.weight).astype(np.float64) - weight
    energies = [np.einsum("ni,ij,nj->", m, gram.astype(np.float64), m) for m in (weight, delta)]
    expected = 10 * math.log10(energies[0] / energies[1])
    assert found.sqnr_db == pytest.approx(expected, abs=1e-2)  # sums in float32: 1e-3 of 1


def test_sqnr_without_activations_is_of_the_weight(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(8, 32)).astype(np.float32)
    found = quantize_weight(weight, FMT)
    delta = dequantize_weight(found.weight).astype(np.float64) - weight
    expected = 10 * math.log10(np.square(weight).sum() / np.square(delta).sum())
    assert found.sqnr_db == pytest.approx(expected, abs=1e-3)


def test_rows_at_a_time_give_what_all_at_once_give(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = rng.normal(size=(11, 40)).astype(np.float32), _gram(rng, 40)
    for symmetric in (False, True):
        fmt = block_format(4, 16, symmetric)
        whole = quantize_weight(weight, fmt, gram=gram, clip=True)
        with monkeypatch.context() as patch:
            patch.setattr(site_module, "ROWS_AT_A_TIME", 4)
            pieces = quantize_weight(weight, fmt, gram=gram, clip=True)
        assert pieces.weight.out_features == 11
        np.testing.assert_array_equal(pieces.weight.packed, whole.weight.packed)
        np.testing.assert_array_equal(pieces.weight.scales, whole.weight.scales)
        if symmetric:
            assert pieces.weight.zero_points is None
        else:
            assert pieces.weight.zero_points is not None
            assert whole.weight.zero_points is not None
            np.testing.assert_array_equal(pieces.weight.zero_points, whole.weight.zero_points)
        assert pieces.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-3)


def test_more_bits_cost_less(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(8, 64)).astype(np.float32)
    found = [quantize_weight(weight, block_format(b, 16, False)).sqnr_db for b in (2, 3, 4, 8)]
    assert found == sorted(found)
    assert found[-1] - found[0] > 20  # 6 dB a bit


def test_nothing_lost_and_nothing_there() -> None:
    exact = np.tile(np.arange(16, dtype=np.float32), (2, 2))
    assert quantize_weight(exact, FMT).sqnr_db == math.inf
    assert quantize_weight(np.zeros((2, 32), np.float32), FMT).sqnr_db == 0


def test_float16_scales_are_what_the_codes_were_made_for(rng: np.random.Generator) -> None:
    weight = (rng.normal(size=(8, 32)) * 0.02).astype(np.float16).astype(np.float32)
    found = quantize_weight(weight, FMT, scale_dtype=np.float16)
    assert found.weight.scales.dtype == np.float16
    step = found.weight.scales.astype(np.float32).max()
    assert np.abs(dequantize_weight(found.weight) - weight).max() <= 0.51 * step
