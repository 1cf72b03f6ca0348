"""Finished low-bit weights in the byte layout of com.microsoft.MatMulNBits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from safetensors.numpy import save_file

from faq_onnx.artifacts.plan import BlockFormat

__all__ = ["QuantizedWeight", "WeightStore"]

OPTIONAL = ("zero_points", "scale_unit")


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """One weight [N, K] as MatMulNBits stores it.

    Attributes:
        out_features: N.
        in_features: K.
        format: Bits, block size, symmetry.
        packed: uint8 [N, k_blocks, block_size * storage_bits / 8], low bits first.
        scales: As stored, [N, k_blocks]: float32 or float16; multiples of `scale_unit`, uint8 or
            (symmetric) int8, where the format says so.
        zero_points: uint8 [N, ceil(k_blocks * storage_bits / 8)] packed, None if symmetric.
        scale_unit: float32 or float16 [N, 1], None where scales are floats.
    """

    out_features: int
    in_features: int
    format: BlockFormat
    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[np.uint8] | None
    scale_unit: npt.NDArray[np.floating] | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes in the file."""
        optional = (self.zero_points, self.scale_unit)
        return (
            self.packed.nbytes
            + self.scales.nbytes
            + sum(array.nbytes for array in optional if array is not None)
        )


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
        for key in OPTIONAL:
            array = getattr(weight, key)
            if array is not None:
                arrays[key] = array
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
            **{key: arrays.get(key) for key in OPTIONAL},
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
