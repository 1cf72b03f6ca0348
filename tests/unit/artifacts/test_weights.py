"""Low-bit weights on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faq_onnx.artifacts.weights import WeightStore
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import quantize_rtn

FORMATS = [(2, 16, True), (3, 16, False), (4, 32, False), (8, 64, True)]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_weight_comes_back_bit_for_bit(
    fmt: tuple[int, int, bool], dtype: type[np.floating], tmp_path: Path, rng: np.random.Generator
) -> None:
    weight = rng.normal(size=(5, 70)).astype(np.float32)  # ragged: 70 is no multiple
    packed = quantize_rtn(weight, block_format(*fmt), dtype)
    store = WeightStore(tmp_path)
    store.put("/a/very: odd*name", packed)
    found = store["/a/very: odd*name"]
    assert (found.out_features, found.in_features) == (5, 70)
    assert found.format == packed.format
    assert found.scales.dtype == dtype
    assert found.packed.tobytes() == packed.packed.tobytes()
    assert found.scales.tobytes() == packed.scales.tobytes()
    assert (found.zero_points is None) is fmt[2]
    if found.zero_points is not None:
        assert packed.zero_points is not None
        assert found.zero_points.tobytes() == packed.zero_points.tobytes()
    assert found.size_bytes == packed.size_bytes


def test_a_store_is_a_mapping(tmp_path: Path, rng: np.random.Generator) -> None:
    store = WeightStore(tmp_path)
    fmt = block_format(4, 16, symmetric=True)
    for rows in (1, 2, 3):
        weight = rng.normal(size=(rows, 16)).astype(np.float32)
        store.put(f"site{rows}", quantize_rtn(weight, fmt, np.float32))
    assert list(store) == ["site1", "site2", "site3"]
    assert len(store) == 3
    assert [store[name].out_features for name in store] == [1, 2, 3]
    assert "site4" not in store
    with pytest.raises(KeyError):
        store["site4"]


def test_size_counts_codes_scales_and_zero_points(rng: np.random.Generator) -> None:
    weight = rng.normal(size=(3, 64)).astype(np.float32)
    packed = quantize_rtn(weight, block_format(4, 32, symmetric=False), np.float32)
    # 64 codes of 4 bits, two scales of 4 bytes, two zero points of 4 bits, in each row
    assert packed.size_bytes == 3 * (32 + 8 + 1)
