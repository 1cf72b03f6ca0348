"""The protobuf wire format of ONNX files, as far as tensors in it must be moved in and out.

A model file is mostly tensor bytes. `detach_tensors` makes the small rest (the skeleton) without
reading them, `attach_tensors` is its inverse for writing. Nothing here interprets a model.
"""

from __future__ import annotations

import dataclasses
import mmap
from collections.abc import Callable, Iterator
from enum import Enum

import onnx

__all__ = ["INLINE_LOCATION", "Payload", "WireError", "attach_tensors", "detach_tensors"]

INLINE_LOCATION = "\x7ffaq-onnx-inline"  # never a file name: marks bytes that belong in this file
MIN_DETACHED_BYTES = 1024  # smaller tensors are shapes and axes that every pass wants at hand
_MAX_DEPTH = 100  # protobuf's own limit on nested messages

_LENGTH_DELIMITED = 2
_FIXED_SIZES = {1: 8, 5: 4}
_RAW_DATA = 9
_EXTERNAL_DATA = 13
_DATA_LOCATION = 14

Buffer = bytes | mmap.mmap


class WireError(Exception):
    """The bytes are not a protobuf message; the text says where."""


class _Kind(Enum):
    """Messages on the way to a tensor."""

    MODEL = "model"
    GRAPH = "graph"
    NODE = "node"
    ATTRIBUTE = "attribute"
    FUNCTION = "function"
    TENSOR = "tensor"


# Field numbers of onnx.proto that lead to a TensorProto.
_CHILDREN: dict[_Kind, dict[int, _Kind]] = {
    _Kind.MODEL: {7: _Kind.GRAPH, 25: _Kind.FUNCTION},
    _Kind.GRAPH: {1: _Kind.NODE, 5: _Kind.TENSOR},
    _Kind.NODE: {5: _Kind.ATTRIBUTE},
    _Kind.ATTRIBUTE: {5: _Kind.TENSOR, 6: _Kind.GRAPH, 11: _Kind.GRAPH},
    _Kind.FUNCTION: {7: _Kind.NODE, 11: _Kind.ATTRIBUTE},
    _Kind.TENSOR: {},
}


@dataclasses.dataclass(frozen=True)
class Payload:
    """Stands for `length` bytes of tensor number `index` in a stream of pieces."""

    index: int
    length: int


Piece = bytes | Payload


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a message by byte offsets: tag at `start`, value from `payload` to `end`."""

    number: int
    wire_type: int
    start: int
    payload: int
    end: int


@dataclasses.dataclass(frozen=True)
class _Rewriter:
    """Copies a message, passing every tensor that `holds_tensor` lets through to `edit`."""

    data: Buffer
    holds_tensor: Callable[[int, int], bool]
    edit: Callable[[int, int], list[Piece]]

    def message(self, kind: _Kind, start: int, end: int, depth: int = 0) -> list[Piece]:
        """Copy the message at `start:end`, whose length the caller writes.

        Raises:
            WireError: It is cut short, or nests too deep.
        """
        if depth > _MAX_DEPTH:
            raise WireError(f"messages nest deeper than {_MAX_DEPTH} at byte {start}")
        if kind is _Kind.TENSOR:
            return self.edit(start, end)
        children = _CHILDREN[kind]
        pieces: list[Piece] = []
        copied = start
        for field in _fields(self.data, start, end):
            child = children.get(field.number)
            if child is None or field.wire_type != _LENGTH_DELIMITED:
                continue
            if not self.holds_tensor(field.payload, field.end):
                continue
            body = self.message(child, field.payload, field.end, depth + 1)
            pieces.append(self.data[copied : field.start])
            pieces.append(_header(field.number, sum(map(_length, body))))
            pieces.extend(body)
            copied = field.end
        pieces.append(self.data[copied:end])
        return pieces


def detach_tensors(data: Buffer) -> bytes:
    """Copy a serialized ModelProto without its big raw_data.

    Each raw_data of at least MIN_DETACHED_BYTES becomes an external reference with location
    INLINE_LOCATION and the offset and length of the bytes inside `data`.

    Raises:
        WireError: `data` ends early or is not a message at all.
    """

    def edit(start: int, end: int) -> list[Piece]:
        fields = list(_fields(data, start, end))
        raw = [field for field in fields if field.number == _RAW_DATA]
        if len(raw) != 1 or raw[0].end - raw[0].payload < MIN_DETACHED_BYTES:
            return [data[start:end]]
        # A data_location of the file (DEFAULT, written by some exporters) would win over ours.
        kept = [field for field in fields if field.number not in (_RAW_DATA, _DATA_LOCATION)]
        reference = _external_reference(raw[0].payload, raw[0].end - raw[0].payload)
        return [*(data[field.start : field.end] for field in kept), reference]

    rewriter = _Rewriter(data, lambda start, end: end - start >= MIN_DETACHED_BYTES, edit)
    return b"".join(
        piece for piece in rewriter.message(_Kind.MODEL, 0, len(data)) if isinstance(piece, bytes)
    )


def attach_tensors(skeleton: bytes) -> Iterator[Piece]:
    """Stream the file whose tensors at INLINE_LOCATION are written as raw_data.

    The offset of such a reference is taken as the tensor's number; a `Payload` asks the caller
    to write that tensor's bytes in its place.
    """
    marker = INLINE_LOCATION.encode()

    def edit(start: int, end: int) -> list[Piece]:
        tensor = onnx.TensorProto.FromString(skeleton[start:end])
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") != INLINE_LOCATION:
            return [skeleton[start:end]]
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        length = int(entries["length"])
        head = tensor.SerializeToString(deterministic=True) + _header(_RAW_DATA, length)
        return [head, Payload(int(entries["offset"]), length)]

    rewriter = _Rewriter(skeleton, lambda s, e: skeleton.find(marker, s, e) >= 0, edit)
    yield from rewriter.message(_Kind.MODEL, 0, len(skeleton))


def _fields(data: Buffer, start: int, end: int) -> Iterator[_Field]:
    position = start
    while position < end:
        tag, payload = _read_varint(data, position, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {position}")
        if wire_type == 0:
            field_end = _read_varint(data, payload, end)[1]
        elif wire_type == _LENGTH_DELIMITED:
            length, payload = _read_varint(data, payload, end)
            field_end = payload + length
        elif wire_type in _FIXED_SIZES:
            field_end = payload + _FIXED_SIZES[wire_type]
        else:
            raise WireError(f"wire type {wire_type} at byte {position} does not exist in ONNX")
        if field_end > end:
            raise WireError(
                f"field {number} at byte {position} wants {field_end - payload} bytes, "
                f"but only {end - payload} are left"
            )
        yield _Field(number, wire_type, position, payload, field_end)
        position = field_end


def _read_varint(data: Buffer, position: int, end: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise WireError(f"the data ends at byte {end}, in the middle of a number")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WireError(f"a number longer than 10 bytes ends at byte {position}")


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _header(number: int, length: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _length(piece: Piece) -> int:
    return piece.length if isinstance(piece, Payload) else len(piece)


def _external_reference(offset: int, length: int) -> bytes:
    entries = {"location": INLINE_LOCATION, "offset": str(offset), "length": str(length)}
    encoded = _varint(_DATA_LOCATION << 3) + _varint(onnx.TensorProto.EXTERNAL)
    for key, value in entries.items():
        entry = onnx.StringStringEntryProto(key=key, value=value).SerializeToString()
        encoded += _header(_EXTERNAL_DATA, len(entry)) + entry
    return encoded
