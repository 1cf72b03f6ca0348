"""Laws of channel scales and of the objective, for any numbers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from faq_onnx.artifacts.plan import SitePlan
from faq_onnx.config import FaqConfig
from faq_onnx.planning import scales as scales_module
from faq_onnx.planning.scales import _Judge, _search
from faq_onnx.quant.channel_scale import (
    awq_scale,
    exponents,
    fuse_statistics,
    future_layers,
    level_scale,
    share_over_heads,
)
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.objective import output_energy, scale_gram
from faq_onnx.quant.site import SiteMoments

pytestmark = pytest.mark.property
FEW = settings(max_examples=60, deadline=None)
EPS = 2.0**-23

Array = npt.NDArray[np.float32]


def _floats(shape: int | tuple[int, int], low: int, high: int) -> st.SearchStrategy[Array]:
    """Thousandths: sizes that activations have, zeros among them."""
    numbers = hnp.arrays(np.int32, shape, elements=st.integers(low, high))
    return numbers.map(lambda array: array.astype(np.float32) / np.float32(1000))


STATISTICS = st.integers(1, 24).flatmap(lambda size: _floats(size, 1, 100_000))
EXPONENTS = st.sampled_from(exponents(20))


@FEW
@given(STATISTICS)
def test_exponent_zero_is_the_identity(statistic: Array) -> None:
    np.testing.assert_array_equal(awq_scale(statistic, 0.0), np.ones_like(statistic))


@FEW
@given(STATISTICS, EXPONENTS, st.sampled_from([0.25, 2.0, 1024.0]))
def test_the_unit_of_the_statistic_does_not_matter(
    statistic: Array, exponent: float, unit: float
) -> None:
    np.testing.assert_allclose(
        awq_scale(statistic * np.float32(unit), exponent),
        awq_scale(statistic, exponent),
        rtol=64 * EPS,  # powf is within a few ulps, at arguments of a few binary orders
    )


@FEW
@given(STATISTICS, EXPONENTS)
def test_scales_are_centred_positive_and_in_the_order_of_the_statistic(
    statistic: Array, exponent: float
) -> None:
    scale = awq_scale(statistic, exponent)
    assert (scale > 0).all()
    assert np.isfinite(scale).all()
    assert float(scale.max()) * float(scale.min()) == pytest.approx(1, rel=8 * EPS)
    order = np.argsort(statistic, kind="stable")
    assert (np.diff(scale[order]) >= -4 * EPS * scale[order][1:]).all()


@FEW
@given(st.integers(0, 9), st.integers(1, 12), st.sampled_from(["layer", "window"]))
def test_the_future_lies_ahead_and_inside(layer: int, window: int, preview: str) -> None:
    config = FaqConfig.model_validate({"preview": preview, "window": window})
    ahead = future_layers(layer, 10, config)
    assert all(layer < other < 10 for other in ahead)
    assert bool(ahead) is (layer < 9)
    assert max(ahead, default=9) == min(layer + window, 9)


@FEW
@given(STATISTICS, st.floats(0, 1), st.sampled_from(["none", "mean", "max"]))
def test_a_future_like_the_present_changes_nothing(
    statistic: Array, fusion: float, normalisation: str
) -> None:
    config = FaqConfig.model_validate({"fusion": fusion, "normalisation": normalisation})
    fused = fuse_statistics(statistic, [statistic, statistic], config)
    np.testing.assert_allclose(fused, statistic, rtol=16 * EPS)
    if normalisation != "none":
        louder = fuse_statistics(statistic, [statistic * np.float32(8)], config)
        np.testing.assert_allclose(louder, statistic, rtol=16 * EPS)


@FEW
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.data())
def test_sharing_heads_keeps_the_mean_and_is_idempotent(
    kv_heads: int, repeats: int, head_dim: int, data: st.DataObject
) -> None:
    statistic = data.draw(_floats(kv_heads * repeats * head_dim, 0, 100_000))
    shared = share_over_heads(statistic, head_dim, repeats)
    heads = shared.reshape(kv_heads, repeats, head_dim)
    assert (heads == heads[:, :1]).all()
    assert shared.mean() == pytest.approx(statistic.mean(), rel=1e-5, abs=1e-7)
    again = share_over_heads(shared, head_dim, repeats)
    np.testing.assert_allclose(again, shared, rtol=8 * EPS)


@FEW
@given(st.integers(1, 6), st.integers(1, 12), st.data())
def test_energy_is_the_mean_squared_output(rows: int, tokens: int, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 10))
    x = data.draw(_floats((tokens, columns), -5000, 5000)).astype(np.float64)
    delta = data.draw(_floats((rows, columns), -1000, 1000))
    gram = (x.T @ x / tokens).astype(np.float32)
    expected = np.square(x @ delta.T.astype(np.float64)).sum(axis=1).mean()
    size = float(np.einsum("ni,ij,nj->", abs(delta), abs(gram), abs(delta)))
    bound = (columns**2 + rows) * EPS * size + 1e-12
    assert output_energy(delta, gram) == pytest.approx(expected, abs=bound)


@FEW
@given(st.integers(1, 8), st.data())
def test_scale_moves_between_weight_and_activation(columns: int, data: st.DataObject) -> None:
    exponent = data.draw(hnp.arrays(np.int32, columns, elements=st.integers(-6, 6)))
    scale = np.exp2(exponent).astype(np.float32)  # exact, so the laws hold to the last bits
    half = data.draw(_floats((columns, columns), -2000, 2000))
    gram, delta = half.T @ half, data.draw(_floats((3, columns), -1000, 1000))
    size = float(np.einsum("ni,ij,nj->", abs(delta), abs(gram), abs(delta)))
    moved = output_energy(delta * scale, scale_gram(gram, scale))
    bound = 2 * (columns**2 + 3) * EPS * size + 1e-12
    assert moved == pytest.approx(output_energy(delta, gram), abs=bound)


@FEW
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([2, 3, 4, 8]),
    st.booleans(),
    st.sampled_from([1, 1, 256]),  # one row is a poor judge of all, and then it must not matter
    st.booleans(),
)
def test_the_chosen_scale_is_never_worse_than_the_identity(
    seed: int, bits: int, symmetric: bool, search_rows: int, gptq: bool
) -> None:
    rng = np.random.default_rng(seed)
    columns = int(rng.integers(3, 50))
    x = rng.standard_t(3, size=(30, columns)) * np.exp2(rng.normal(scale=2, size=columns))
    gram = (x.T @ x / 30).astype(np.float32)
    statistic = np.abs(x).mean(axis=0).astype(np.float32)
    plan = SitePlan(
        site="a", format=block_format(bits, 16, symmetric), rounding="gptq" if gptq else "nearest"
    )
    weights = [
        (rng.normal(size=(rows, columns)).astype(np.float32), plan)
        for rows in rng.integers(1, 40, 2)
    ]
    judge = _Judge(SiteMoments(gram))
    if gptq:
        rms = np.sqrt(np.mean(np.concatenate([w for w, _ in weights]) ** 2, axis=0))
        candidates = [(alpha, level_scale(statistic, rms, alpha)) for alpha in exponents(8)]
    else:
        candidates = [(alpha, awq_scale(statistic, alpha)) for alpha in exponents(8)[1:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales_module, "SEARCH_ROWS", search_rows)
        found = _search(weights, candidates, judge)
    assert found.loss_identity == judge(weights, np.ones(columns, np.float32))
    if found.scale is None:
        assert found.loss == found.loss_identity
    else:
        assert found.exponent in exponents(8)
        assert found.loss == judge(weights, found.scale) < found.loss_identity
