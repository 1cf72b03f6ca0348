"""What calibration collected: one statistics file per part of the model, and a manifest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from faq_onnx.artifacts.record import Record
from faq_onnx.errors import StatsMismatchError

__all__ = ["CalibrationStats", "GroupStats", "StatsManifest"]

MANIFEST_NAME = "stats.json"


class GroupStats(Record):
    """Where the statistics of one scale group lie.

    The file holds `<group>/mean_abs` float32 [K], mean over tokens of |x|, and, with
    `gram`, `<group>/gram` float32 [K, K], the mean over tokens of x^T x.
    """

    group: str
    features: int
    file: str
    gram: bool


class StatsManifest(Record):
    """What was calibrated on what; two runs with equal fingerprints have equal statistics."""

    schema_version: int = 1
    model_fingerprint: str
    census_fingerprint: str
    corpus_fingerprint: str
    tokens: int
    groups: tuple[GroupStats, ...]


@dataclasses.dataclass(frozen=True)
class CalibrationStats:
    """Statistics on disk, read one at a time.

    Attributes:
        folder: Holds the manifest and the files.
        manifest: What is there.
    """

    folder: Path
    manifest: StatsManifest

    @classmethod
    def open(cls, folder: Path, *, census_fingerprint: str) -> CalibrationStats:
        """Open saved statistics.

        Raises:
            StatsMismatchError: Nothing there, or collected on another model.
        """
        path = folder / MANIFEST_NAME
        if not path.is_file():
            msg = (
                f"{folder} holds no statistics ({MANIFEST_NAME} is missing); "
                "make them with `faq-onnx calibrate`"
            )
            raise StatsMismatchError(msg)
        manifest = StatsManifest.load(path)
        if manifest.census_fingerprint != census_fingerprint:
            msg = (
                f"{folder}: statistics belong to another model (census "
                f"{manifest.census_fingerprint[:12]}, this model is {census_fingerprint[:12]}); "
                "run `faq-onnx calibrate` on this model"
            )
            raise StatsMismatchError(msg)
        return cls(folder, manifest)

    def save(self) -> None:
        """Write the manifest."""
        self.manifest.save(self.folder / MANIFEST_NAME)

    def mean_abs(self, group: str) -> npt.NDArray[np.float32]:
        """Mean over tokens of |x|, float32 [K]."""
        return self._read(group, "mean_abs")

    def gram(self, group: str) -> npt.NDArray[np.float32]:
        """Mean over tokens of x^T x, float32 [K, K]."""
        return self._read(group, "gram")

    def has(self, group: str) -> bool:
        """Whether anything was collected for this group."""
        return any(entry.group == group for entry in self.manifest.groups)

    def _read(self, group: str, what: str) -> npt.NDArray[np.float32]:
        entry = next((e for e in self.manifest.groups if e.group == group), None)
        if entry is None or (what == "gram" and not entry.gram):
            msg = f"{self.folder}: no {what} statistics for group {group!r}; calibrate again"
            raise StatsMismatchError(msg)
        path = self.folder / entry.file
        try:
            with safe_open(path, framework="numpy") as file:
                array: npt.NDArray[np.float32] = file.get_tensor(f"{group}/{what}")
        except (OSError, SafetensorError) as error:
            msg = f"{path}: cannot be read ({error}); calibrate again"
            raise StatsMismatchError(msg) from error
        return array
