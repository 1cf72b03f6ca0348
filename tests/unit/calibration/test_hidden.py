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
    store.get("b", "held0")
    with pytest.raises(FileNotFoundError):
        store.get("a", "held0")
    store.release()
    assert len(list(tmp_path.iterdir())) == 2


def test_files_of_dropped_values_are_written_over(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Ten values that live one after the other, two batches each, another size in between."""
    store = HiddenStore(tmp_path)
    for number in range(10):
        expected = {batch: rng.normal(size=(3, 4)) for batch in ("run0", "run4")}
        odd = rng.normal(size=5)
        for batch, array in expected.items():
            store.put(f"value {number}", batch, array)
        store.put(f"odd {number}", "run0", odd)
        for batch, array in expected.items():
            np.testing.assert_array_equal(store.get(f"value {number}", batch), array)
        np.testing.assert_array_equal(store.get(f"odd {number}", "run0"), odd)
        assert sum(path.is_file() for path in tmp_path.rglob("*")) == 3
        store.drop(f"value {number}")
        store.drop(f"odd {number}")


def test_a_value_may_be_put_again_in_another_shape(tmp_path: Path) -> None:
    store = HiddenStore(tmp_path)
    for array in (np.zeros((7, 9)), np.arange(4), np.asfortranarray(np.eye(3)), np.array(5.0)):
        store.put("a", "run0", array)
        np.testing.assert_array_equal(np.load(next(tmp_path.glob("*.npy"))), array)
        assert store.get("a", "run0").shape == array.shape
