"""The writing half of `graph.io`: structure first, then one tensor at a time behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir

from faq_onnx.errors import RewriteError
from faq_onnx.graph.tensors import TensorSlot, tensor_slots
from faq_onnx.graph.wire import INLINE_LOCATION, MIN_DETACHED_BYTES, Payload, attach_tensors

__all__ = [
    "DATA_ALIGNMENT_BYTES",
    "detached_slots",
    "structure_bytes",
    "write_external",
    "write_inline",
]

DATA_ALIGNMENT_BYTES = 4096  # onnxruntime maps external data by pages


def detached_slots(model: ir.Model) -> list[TensorSlot]:
    """Tensors that are written one by one; all others are part of the structure."""
    return [
        slot
        for slot in tensor_slots(model)
        if slot.tensor.dtype != ir.DataType.STRING
        and (
            slot.tensor.nbytes >= MIN_DETACHED_BYTES
            # its reference would be wrong in another folder, however small it is
            or isinstance(slot.tensor, ir.ExternalTensor)
        )
    ]


def structure_bytes(model: ir.Model, slots: Sequence[TensorSlot]) -> int:
    """Size of a file of the model without the data of these tensors."""
    return len(_skeleton(model, slots, _inline_places(slots)))


def write_inline(model: ir.Model, slots: Sequence[TensorSlot], path: Path) -> int:
    """Write one file with everything in it; returns its bytes.

    Raises:
        RewriteError: A lazy tensor gave another number of bytes than its shape needs.
    """
    skeleton = _skeleton(model, slots, _inline_places(slots))
    with path.open("wb") as file:
        for piece in attach_tensors(skeleton):
            if isinstance(piece, Payload):
                _write_tensor(slots[piece.index], file)
            else:
                file.write(piece)
        return file.tell()


def write_external(
    model: ir.Model, slots: Sequence[TensorSlot], path: Path, piece_bytes: int
) -> int:
    """Write the structure, and the tensors into `<path>.data` and further files beside it.

    Args:
        model: The model.
        slots: From `detached_slots`, in the order in which they are written.
        path: The .onnx file.
        piece_bytes: Where a data file would become larger, the next one begins.

    Returns:
        Bytes of all files.

    Raises:
        RewriteError: A lazy tensor gave another number of bytes than its shape needs.
    """
    places = []
    written = 0
    for number, piece in enumerate(_pieces(slots, piece_bytes)):
        data_path = path.with_name(f"{path.name}.data" + (f".{number}" if number else ""))
        with data_path.open("wb") as file:
            for slot in piece:
                file.write(bytes(_padding(file.tell())))
                places.append(_Place(data_path.name, file.tell(), slot.tensor.nbytes))
                _write_tensor(slot, file)
            written += file.tell()
    return path.write_bytes(_skeleton(model, slots, places)) + written


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: file, offset in it (inline: number of the slot), length."""

    location: str
    offset: int
    length: int


def _inline_places(slots: Sequence[TensorSlot]) -> list[_Place]:
    return [_Place(INLINE_LOCATION, at, slot.tensor.nbytes) for at, slot in enumerate(slots)]


def _pieces(slots: Sequence[TensorSlot], piece_bytes: int) -> list[list[TensorSlot]]:
    """Tensors of each data file, in order; one file at least."""
    pieces: list[list[TensorSlot]] = [[]]
    filled = 0
    for slot in slots:
        start = filled + _padding(filled)
        if pieces[-1] and start + slot.tensor.nbytes > piece_bytes:
            pieces.append([])
            start = 0
        pieces[-1].append(slot)
        filled = start + slot.tensor.nbytes
    return pieces


def _padding(offset: int) -> int:
    return -offset % DATA_ALIGNMENT_BYTES


def _skeleton(model: ir.Model, slots: Sequence[TensorSlot], places: Sequence[_Place]) -> bytes:
    tensors = [slot.tensor for slot in slots]
    try:
        for slot, place in zip(slots, places, strict=True):
            tensor = slot.tensor
            slot.tensor = ir.ExternalTensor(
                place.location,
                place.offset,
                place.length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape.numpy()),
                name=slot.name,
                doc_string=tensor.doc_string,
            )
        proto = ir.serde.serialize_model(model)
        skeleton: bytes = proto.SerializeToString(deterministic=True)
        return skeleton
    finally:
        for slot, tensor in zip(slots, tensors, strict=True):
            slot.tensor = tensor


def _write_tensor(slot: TensorSlot, file: BinaryIO) -> None:
    start = file.tell()
    tensor = slot.tensor
    if hasattr(tensor, "tofile"):  # every tensor of onnx_ir, but not part of its protocol
        tensor.tofile(file)
    else:
        file.write(tensor.tobytes())
    file.flush()
    written = file.tell() - start
    if written != slot.tensor.nbytes:
        raise RewriteError(
            f"initializer {slot.name!r} wrote {written} bytes, but dtype and shape "
            f"{slot.tensor.shape} need {slot.tensor.nbytes}: a bug in the pass that made it"
        )
