"""Hidden states on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faq_onnx.calibration.hidden import HiddenStore

NAMES = ("/model/layers.0/Add_1_output_0", "a b:c*", "x" * 300)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.bool_])
def test_arrays_come_back_bit_for_bit(
    name: str, dtype: type[np.generic], tmp_path: Path, rng: np.random.Generator
) -> None:
    array = rng.normal(size=(2, 3, 4)).astype(dtype)
    store = HiddenStore(tmp_path)
    store.put(name, "run0", array)
    found = store.get(name, "run0")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)
    assert store.kind(name) == (array.dtype, 3)


def test_values_and_batches_do_not_mix(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    for number, (name, batch) in enumerate((n, b) for n in "ab" for b in ("run0", "run16")):
        store.put(name, batch, np.array([number]))
    found = [store.get(name, batch)[0] for name in "ab" for batch in ("run0", "run16")]
    assert found == [0, 1, 2, 3]


def test_a_dropped_value_is_gone_and_others_stay(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    for name in "ab":
        for batch in ("run0", "held0"):
            store.put(name, batch, np.zeros(1))
    store.drop("a")
    assert len(list(tmp_path.iterdir())) == 2
    store.get("b", "held0")
    with pytest.raises(FileNotFoundError):
        store.get("a", "held0")
