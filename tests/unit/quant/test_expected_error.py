"""What GPTQ is expected to cost, against what it costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.quant.expected_error import expected_gptq_error
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.gptq import GramFactor, channel_energies, round_gptq, weight_error
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.uniform import minmax_grid, to_blocks

Array = npt.NDArray[np.float32]


def _correlated_gram(rng: np.random.Generator, columns: int) -> Array:
    mixing = np.eye(columns) + rng.normal(scale=0.5 / np.sqrt(columns), size=(columns, columns))
    mixed = rng.normal(size=(4 * columns, columns)) @ mixing
    mixed *= np.exp2(rng.normal(size=columns))
    gram: Array = (mixed.T @ mixed / len(mixed)).astype(np.float32)
    return gram


def test_energies_are_what_later_channels_cannot_explain(rng: np.random.Generator) -> None:
    """The last channel in the order keeps its second moment; the product of all is det G."""
    gram = _correlated_gram(rng, 24)
    energies = channel_energies(gram, damping=0.0)
    last = int(np.argmin(np.diagonal(gram)))
    assert energies[last] == pytest.approx(gram[last, last], rel=1e-6)
    assert (energies <= np.diagonal(gram) * (1 + 1e-6)).all()
    sign, logarithm = np.linalg.slogdet(gram.astype(np.float64))
    assert sign == 1
    assert np.log(energies).sum() == pytest.approx(logarithm, rel=1e-6)


def test_channels_without_activation_cost_nothing(rng: np.random.Generator) -> None:
    gram = _correlated_gram(rng, 12)
    gram[5] = gram[:, 5] = 0
    assert channel_energies(gram)[5] == 0
    weight = rng.normal(size=(3, 12)).astype(np.float32)
    fmt, scale = block_format(4, 16, symmetric=False), np.ones(12, np.float32)
    cost = expected_gptq_error(weight, scale, channel_energies(gram), fmt)
    louder = scale.copy()
    louder[5] = 1e-3
    weight[:, 5] *= 1e3
    assert cost == pytest.approx(
        expected_gptq_error(weight, louder, channel_energies(gram), fmt), rel=1
    )
    assert expected_gptq_error(0 * weight, scale, channel_energies(gram), fmt) == 0


@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (4, True), (8, False), (8, True)])
def test_expected_error_is_that_of_gptq(
    rng: np.random.Generator, bits: int, symmetric: bool
) -> None:
    gram = _correlated_gram(rng, 96)
    weight = rng.normal(size=(256, 96)).astype(np.float32)
    scale = np.exp2(rng.normal(scale=0.3, size=96)).astype(np.float32)
    fmt = block_format(bits, 32, symmetric)
    scaled = gram / np.outer(scale, scale)
    grid = minmax_grid(to_blocks(weight * scale, 32), fmt)
    factor = GramFactor.of(scaled, damping=1e-4)
    codes = round_gptq(weight * scale, grid, fmt, factor)
    found = output_energy(weight_error(weight * scale, codes, grid), scaled)
    energies = channel_energies(gram, damping=1e-4)
    # 24,576 errors, each counted by its energy; what is clipped and another order add a little
    assert found == pytest.approx(expected_gptq_error(weight, scale, energies, fmt), rel=0.15)
