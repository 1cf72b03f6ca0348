"""Finished low-bit weights in the byte layout of com.microsoft.MatMulNBits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from faq_onnx.artifacts.plan import BlockFormat

__all__ = ["QuantizedWeight", "WeightStore"]


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight [N, K] as MatMulNBits stores it.

    Attributes:
        out_features: N.
        in_features: K.
        format: Bits, block size, symmetry.
        packed: uint8 [N, k_blocks, block_size * storage_bits / 8], low bits first.
        scales: float32 or float16 [N, k_blocks].
        zero_points: uint8 [N, ceil(k_blocks * storage_bits / 8)] packed, None if symmetric.
    """

    out_features: int
    in_features: int
    format: BlockFormat
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.floating]
    zero_points: npt.NDArray[np.uint8] | None

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points


class WeightStore(Mapping[str, QuantizedWeight]):
    """Quantized weights on disk by name, one safetensors file each, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[str, Path] = {}
        self._in_features: dict[str, int] = {}

    def put(self, name: str, weight: QuantizedWeight) -> None:
        """Write one weight."""
        path = self._folder / f"{len(self._names):05d}.safetensors"
        arrays: dict[str, npt.NDArray[np.generic]] = {
            "packed": weight.packed,
            "scales": weight.scales,
        }
        if weight.zero_points is not None:
            arrays["zero_points"] = weight.zero_points
        save_file(arrays, path, {"format": weight.format.model_dump_json()})
        self._names[name] = path
        self._in_features[name] = weight.in_features

    def __getitem__(self, name: str) -> QuantizedWeight:
        with safe_open(self._names[name], framework="numpy") as file:
            arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            fmt = BlockFormat.model_validate_json(file.metadata()["format"])
        return QuantizedWeight(
            out_features=len(arrays["packed"]),
            in_features=self._in_features[name],
            format=fmt,
            packed=arrays["packed"],
            scales=arrays["scales"],
            zero_points=arrays.get("zero_points"),
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
