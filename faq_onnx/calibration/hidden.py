"""Values that cross between parts of a model, kept on disk while the walk goes on."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["HiddenStore"]


@dataclasses.dataclass(frozen=True)
class HiddenStore:
    """Arrays by value name and batch number.

    Attributes:
        folder: Where the .npy files lie.
    """

    folder: Path

    def put(self, name: str, batch: str, array: npt.NDArray[np.generic]) -> None:
        """Keep one array."""
        np.save(self._path(name, batch), array, allow_pickle=False)

    def get(self, name: str, batch: str) -> npt.NDArray[np.generic]:
        """Read one array back."""
        array: npt.NDArray[np.generic] = np.load(self._path(name, batch), allow_pickle=False)
        return array

    def kind(self, name: str) -> tuple[np.dtype[np.generic], int]:
        """Type and rank of a value, from any batch."""
        path = next(iter(self.folder.glob(f"{_stem(name)}.*.npy")))
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        return array.dtype, array.ndim

    def drop(self, name: str) -> None:
        """Forget a value in all batches."""
        for path in self.folder.glob(f"{_stem(name)}.*.npy"):
            path.unlink()

    def _path(self, name: str, batch: str) -> Path:
        return self.folder / f"{_stem(name)}.{batch}.npy"


def _stem(name: str) -> str:
    """File name for a value: its name may hold any character."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]
