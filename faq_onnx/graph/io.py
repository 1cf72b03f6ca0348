"""Model files in and out: structure in memory, weights on disk."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from faq_onnx.errors import CorruptModelError, PackageError, RewriteError, UnsupportedModelError
from faq_onnx.graph.external import ExternalFiles
from faq_onnx.graph.tensors import TensorSlot, tensor_slots
from faq_onnx.graph.wire import (
    INLINE_LOCATION,
    MIN_DETACHED_BYTES,
    Payload,
    WireError,
    attach_tensors,
    detach_tensors,
)

__all__ = [
    "INLINE_LIMIT_BYTES",
    "MAX_IR_VERSION",
    "MAX_OPSET",
    "load_model",
    "release_weights",
    "rest_bytes",
    "save_model",
    "save_structure",
]

logger = logging.getLogger(__name__)

# What onnxruntime 1.31.1 loads (measured); newer files are refused before any work is done.
MAX_IR_VERSION = 13
MAX_OPSET = 26
RUNTIME = "onnxruntime 1.31.1"

INLINE_LIMIT_BYTES = 1_000_000_000  # protobuf ends at 2 GiB; leave room for what passes add
DATA_ALIGNMENT_BYTES = 4096  # onnxruntime maps external data by pages


def load_model(path: Path) -> ir.Model:
    """Load the structure of an ONNX file; weights stay on disk as `ir.ExternalTensor`s.

    Tensors below 1 KiB, wherever they lay, and those in typed fields (float_data) are in memory.

    Raises:
        CorruptModelError: The file or its external data is missing, truncated or damaged, or
            refers to a file outside of the folder.
        UnsupportedModelError: IR version or opset are newer than the runtime reads.
    """
    proto = _read_skeleton(path)
    _check_versions(proto, path)
    try:
        model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises whatever its parts raise on damaged input
        raise CorruptModelError(
            f"{path}: the graph is inconsistent ({_root_cause(error)}); export the model again"
        ) from error
    _check_names(model, path)
    _check_edges(model, path)
    files = ExternalFiles(path)
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.tensor = _at_hand_if_small(files.resolve(slot.tensor, slot.name))
        else:
            _check_inline(slot, path)
    logger.debug("loaded %s: IR %s, opset %s", path, model.ir_version, model.opset_imports)
    return model


def save_model(
    model: ir.Model, path: Path, *, external_data: bool = False, piece_bytes: int | None = None
) -> int:
    """Write a model, one tensor at a time; the same model always gives the same bytes.

    Weights go into the file, or into `<path>.data` when `external_data` is set or they come to
    INLINE_LIMIT_BYTES. At no time is more than one tensor in memory.

    Args:
        model: The model.
        path: The .onnx file.
        external_data: Weights beside it.
        piece_bytes: Go on in `<path>.data.1` and so on where a data file would become larger; a
            tensor is never divided.

    Returns:
        Bytes written, data files included.

    Raises:
        PackageError: `path` holds weights that the model still reads, or the disk refused.
        RewriteError: A lazy tensor gave another number of bytes than its shape needs.
    """
    slots = _detached(model)
    data_path = path.with_name(path.name + ".data")
    _refuse_own_source(slots, (path, data_path))
    total = sum(slot.tensor.nbytes for slot in slots)
    try:
        if external_data or total >= INLINE_LIMIT_BYTES:
            return _save_external(model, slots, path, piece_bytes or sys.maxsize)
        return _save_inline(model, slots, path)
    except OSError as error:
        raise PackageError(
            f"could not write {path} ({total} bytes of weights): {error.strerror or error}; "
            "free space or choose another output folder"
        ) from error


def save_structure(model: ir.Model, path: Path) -> int:
    """Write a model whose weights stay where they are: in files of the folder of `path`.

    So several graphs of one model share one file of weights. What is in memory goes into `path`.

    Returns:
        Bytes written.

    Raises:
        PackageError: A weight lies in another folder, or the disk refused.
    """
    external = [
        (slot, slot.tensor)
        for slot in tensor_slots(model)
        if isinstance(slot.tensor, ir.ExternalTensor)
    ]
    try:
        for slot, tensor in external:
            slot.tensor = _beside(tensor, path)
        proto = ir.serde.serialize_model(model)
        return path.write_bytes(proto.SerializeToString(deterministic=True))
    except OSError as error:
        raise PackageError(f"could not write {path}: {error.strerror or error}") from error
    finally:
        for slot, tensor in external:
            slot.tensor = tensor


def _beside(tensor: ir.ExternalTensor, path: Path) -> ir.ExternalTensor:
    """The same reference, as a file in the folder of `path` writes it."""
    file = Path(tensor.path)
    if file.parent.resolve() != path.parent.resolve():
        raise PackageError(
            f"{path}: weight {tensor.name!r} lies in {file}; weights must lie in the same folder"
        )
    return ir.ExternalTensor(
        file.name,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name or "",
        doc_string=tensor.doc_string,
    )


def rest_bytes(model: ir.Model, without: Collection[str]) -> int:
    """What a file of the model holds besides some initializers: structure and other tensors."""
    slots = _detached(model)
    kept = sum(slot.tensor.nbytes for slot in slots if slot.name not in without)
    return kept + len(_skeleton(model, slots, _inline_places(slots)))


def release_weights(model: ir.Model) -> None:
    """Unmap whatever `numpy()` calls on external tensors have mapped.

    Arrays obtained from them stay valid; the mapping goes when the last one does.
    """
    for slot in tensor_slots(model):
        tensor = slot.tensor
        if isinstance(tensor, ir.ExternalTensor):
            try:
                tensor.release()
            except BufferError:  # somebody still holds a view
                tensor.raw = None


def _read_skeleton(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise CorruptModelError(f"{path} {what}; give the path of an .onnx file")
    if path.stat().st_size == 0:
        raise CorruptModelError(f"{path} is empty (0 bytes); copy or download it again")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:11] == b"version htt":
            raise CorruptModelError(
                f"{path} is a Git LFS pointer, not the model itself; run `git lfs pull`"
            )
        try:
            proto: onnx.ModelProto = onnx.ModelProto.FromString(detach_tensors(data))
        except (WireError, DecodeError) as error:
            raise CorruptModelError(
                f"{path} ({len(data)} bytes) is not an ONNX file, or is truncated or damaged: "
                f"{error}; copy, download or export it again"
            ) from error
    if not proto.HasField("graph") or proto.ir_version <= 0:
        raise CorruptModelError(
            f"{path} is not an ONNX model (no graph or no IR version in it); "
            "give the path of an .onnx file"
        )
    return proto


def _check_versions(proto: onnx.ModelProto, path: Path) -> None:
    if proto.ir_version > MAX_IR_VERSION:
        raise UnsupportedModelError(
            f"{path} has IR version {proto.ir_version}; {RUNTIME} reads up to {MAX_IR_VERSION}: "
            "export it with a lower IR version"
        )
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if opsets and max(opsets) > MAX_OPSET:
        raise UnsupportedModelError(
            f"{path} needs opset {max(opsets)}; {RUNTIME} supports up to {MAX_OPSET}: "
            f"export it with opset {MAX_OPSET} or lower"
        )
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise UnsupportedModelError(
            f"{path} has sparse initializers (first: {name!r}), which are not supported; "
            "export it with dense weights"
        )


def _check_names(model: ir.Model, path: Path) -> None:
    """Protobuf hands out names that are not UTF-8 as bytes."""
    for graph in model.graphs():
        names: list[object] = [value.name for value in (*graph.inputs, *graph.outputs)]
        names += graph.initializers
        for node in graph:
            names += (node.name, node.op_type, node.domain, *node.attributes)
            names += (value.name for value in node.outputs)
            names += (text for item in node.metadata_props.items() for text in item)
        damaged = next((name for name in names if isinstance(name, bytes)), None)
        if damaged is not None:
            raise CorruptModelError(
                f"{path}: the name {damaged!r} is not UTF-8 text; the file is damaged: copy, "
                "download or export it again"
            )


def _check_edges(model: ir.Model, path: Path) -> None:
    for graph in model.graphs():
        for node in graph:
            for value in node.inputs:
                if value is None or value.producer() is not None or value.is_initializer():
                    continue
                if not value.is_graph_input():
                    raise CorruptModelError(
                        f"{path}: node {node.name!r} ({node.op_type}) reads {value.name!r}, which "
                        "nothing produces; the graph is damaged: export the model again"
                    )


def _check_inline(slot: TensorSlot, path: Path) -> None:
    tensor = slot.tensor
    try:
        elements = tensor.numpy().size
    except Exception as error:  # damaged data fails in many ways inside numpy and onnx_ir
        raise CorruptModelError(
            f"{path}: initializer {slot.name!r} with dims {tensor.shape} of {tensor.dtype.name} "
            f"cannot be read ({_root_cause(error)}); the file is damaged: export it again"
        ) from error
    if elements != tensor.size or not _has_data(tensor):
        raise CorruptModelError(
            f"{path}: the data of initializer {slot.name!r} do not fill its dims {tensor.shape} "
            f"({tensor.size} elements); the file is damaged: export it again"
        )


def _has_data(tensor: ir.TensorProtocol) -> bool:
    """Whether a tensor of the file has numbers; onnx_ir reads missing ones as zeros."""
    if not isinstance(tensor, ir.serde.TensorProtoTensor) or tensor.size == 0:
        return True
    proto = tensor.raw
    typed = ("float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data")
    return proto.HasField("raw_data") or any(len(getattr(proto, field)) for field in typed)


def _at_hand_if_small(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Read what is not worth a reference: some exporters move even axes out of the file."""
    if tensor.nbytes >= MIN_DETACHED_BYTES:
        return tensor
    copied = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
    tensor.release()
    return copied


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


def _refuse_own_source(slots: Sequence[TensorSlot], targets: Sequence[Path]) -> None:
    existing = [target for target in targets if target.exists()]
    sources = {
        Path(slot.tensor.path) for slot in slots if isinstance(slot.tensor, ir.ExternalTensor)
    }
    for target in existing:
        if any(source.exists() and source.samefile(target) for source in sources):
            raise PackageError(
                f"{target} holds weights that are being read; write to another path"
            )


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are: file, offset in it (inline: number of the slot), length."""

    location: str
    offset: int
    length: int


def _save_inline(model: ir.Model, slots: Sequence[TensorSlot], path: Path) -> int:
    skeleton = _skeleton(model, slots, _inline_places(slots))
    with path.open("wb") as file:
        for piece in attach_tensors(skeleton):
            if isinstance(piece, Payload):
                _write_tensor(slots[piece.index], file)
            else:
                file.write(piece)
        return file.tell()


def _inline_places(slots: Sequence[TensorSlot]) -> list[_Place]:
    return [_Place(INLINE_LOCATION, at, slot.tensor.nbytes) for at, slot in enumerate(slots)]


def _save_external(
    model: ir.Model, slots: Sequence[TensorSlot], path: Path, piece_bytes: int
) -> int:
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


def _detached(model: ir.Model) -> list[TensorSlot]:
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
