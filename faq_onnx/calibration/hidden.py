"""Values that cross between parts of a model, kept on disk while the walk goes on.

A walk writes tens of gigabytes, nearly all over values that are dead by then. A file that is
written over keeps its pages in the system's cache, a new one has to be given them first: that
took a tenth of a conversion. So files of dropped values wait to be written over.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["HiddenStore"]


@dataclasses.dataclass(frozen=True)
class HiddenStore:
    """Arrays by value name and batch number.

    Attributes:
        folder: Where the .npy files lie; files to write over in folders `spare/<bytes>`.
    """

    folder: Path

    def put(self, name: str, batch: str, array: npt.NDArray[np.generic]) -> None:
        """Keep one array."""
        path, header = self._path(name, batch), _header(array)
        if not path.exists():
            self._take_spare(path, len(header) + array.nbytes)
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(header)
            file.write(np.asarray(array, order="C").reshape(-1).view(np.uint8).data)
            file.truncate()

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
            spare = self._spare / str(path.stat().st_size)
            spare.mkdir(parents=True, exist_ok=True)
            path.replace(spare / path.name)

    def release(self) -> None:
        """Give the disk back that dropped values took."""
        shutil.rmtree(self._spare, ignore_errors=True)

    @property
    def _spare(self) -> Path:
        return self.folder / "spare"

    def _take_spare(self, path: Path, size: int) -> None:
        """Put a file of that size there, if one waits."""
        try:
            with os.scandir(self._spare / str(size)) as found:
                spare = next(found, None)
        except FileNotFoundError:
            return
        if spare is not None:
            Path(spare.path).replace(path)

    def _path(self, name: str, batch: str) -> Path:
        return self.folder / f"{_stem(name)}.{batch}.npy"


def _stem(name: str) -> str:
    """File name for a value: its name may hold any character."""
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _header(array: npt.NDArray[np.generic]) -> bytes:
    """What stands in front of the numbers in a .npy file, these in C order."""
    fields = np.lib.format.header_data_from_array_1_0(array)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {**fields, "fortran_order": False})
    return header.getvalue()
