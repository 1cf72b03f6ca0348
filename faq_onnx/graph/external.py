"""From the external reference in a model to a checked place in a file."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx_ir as ir

from faq_onnx.errors import CorruptModelError
from faq_onnx.graph.wire import INLINE_LOCATION

__all__ = ["ExternalFiles"]


@dataclasses.dataclass(frozen=True)
class ExternalFiles:
    """Resolves the references of one model file.

    Data may lie beside or below the model file. Where the model file itself is a symbolic link
    (a Hugging Face cache), data may also lie beside the file that it points to.
    """

    model_path: Path

    def resolve(self, tensor: ir.ExternalTensor, name: str) -> ir.ExternalTensor:
        """The same tensor with a checked location, offset and length.

        Raises:
            CorruptModelError: The reference leaves the folder, the file is missing or too short,
                or the length does not fit the dims.
        """
        where = f"{self.model_path}: initializer {name!r}"
        if tensor.dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING):
            raise CorruptModelError(
                f"{where} has data type {tensor.dtype.name}, which cannot lie in raw bytes; the "
                "file is damaged: export or download it again"
            )
        path = self._path(str(tensor.location), where)
        expected = tensor.nbytes
        offset = tensor.offset or 0
        length = expected if tensor.length is None else tensor.length
        dims = list(tensor.shape.numpy())
        if length != expected:
            raise CorruptModelError(
                f"{where} has {length} bytes of data, but dims {dims} of {tensor.dtype.name} "
                f"need {expected}; the file is damaged: export or download it again"
            )
        size = path.stat().st_size
        if offset < 0 or offset + length > size:
            raise CorruptModelError(
                f"{where} lies at bytes {offset} to {offset + length} of {path}, which has only "
                f"{size} bytes; the file is truncated: copy or download it again"
            )
        # onnx_ir refuses hard-linked files (package caches make them) unless base_dir is empty.
        linked = path.stat().st_nlink > 1
        return ir.ExternalTensor(
            str(path) if linked else path.name,
            offset,
            length,
            tensor.dtype,
            shape=ir.Shape(dims),
            name=tensor.name or name,
            doc_string=tensor.doc_string,
            base_dir="" if linked else str(path.parent),
        )

    def _path(self, location: str, where: str) -> Path:
        if location == INLINE_LOCATION:
            return self.model_path.resolve()
        self._check_location(location, where)
        folder = self.model_path.parent
        path = (folder / location).resolve()
        roots = (folder.resolve(), self.model_path.resolve().parent)
        if not any(path.is_relative_to(root) for root in roots):
            raise CorruptModelError(
                f"{where}: external data {location!r} is a link to {path}, outside of the model's "
                f"folder {roots[0]}; put the data file itself beside the model"
            )
        if not path.is_file():
            raise CorruptModelError(
                f"{where} has its data in {location!r}, but {folder / location} does not exist; "
                "copy the data file to that place under that name"
            )
        return path

    @staticmethod
    def _check_location(location: str, where: str) -> None:
        parts = PurePosixPath(location).parts
        absolute = PurePosixPath(location).is_absolute() or PureWindowsPath(location).drive
        if not location or "\0" in location or absolute or ".." in parts:
            raise CorruptModelError(
                f"{where}: external data location {location!r} leaves the model's folder; allowed "
                "is a relative path without '..': refusing to read it, save the model again with "
                "its data beside it"
            )
