"""Model files in and out: structure in memory, weights on disk.

What a file may look like is in `graph.reading`, how one is written in `graph.writing`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import onnx_ir as ir

from faq_onnx.errors import PackageError
from faq_onnx.graph.external import ExternalFiles
from faq_onnx.graph.reading import check_inline, read_graph, read_if_small
from faq_onnx.graph.tensors import TensorSlot, tensor_slots
from faq_onnx.graph.writing import (
    detached_slots,
    structure_bytes,
    write_external,
    write_inline,
)

__all__ = [
    "INLINE_LIMIT_BYTES",
    "load_model",
    "release_weights",
    "rest_bytes",
    "save_model",
    "save_structure",
]

logger = logging.getLogger(__name__)

INLINE_LIMIT_BYTES = 1_000_000_000  # protobuf ends at 2 GiB; leave room for what passes add


def load_model(path: Path) -> ir.Model:
    """Load the structure of an ONNX file; weights stay on disk as `ir.ExternalTensor`s.

    Tensors below 1 KiB, wherever they lay, and those in typed fields (float_data) are in memory.

    Raises:
        CorruptModelError: The file or its external data is missing, truncated or damaged, or
            refers to a file outside of the folder.
        UnsupportedModelError: IR version or opset are newer than the runtime reads.
    """
    model = read_graph(path)
    files = ExternalFiles(path)
    for slot in tensor_slots(model):
        if isinstance(slot.tensor, ir.ExternalTensor):
            slot.tensor = read_if_small(files.resolve(slot.tensor, slot.name))
        else:
            check_inline(slot, path)
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
    slots = detached_slots(model)
    data_path = path.with_name(path.name + ".data")
    _refuse_own_source(slots, (path, data_path))
    total = sum(slot.tensor.nbytes for slot in slots)
    try:
        if external_data or total >= INLINE_LIMIT_BYTES:
            return write_external(model, slots, path, piece_bytes or sys.maxsize)
        return write_inline(model, slots, path)
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


def rest_bytes(model: ir.Model, without: Collection[str]) -> int:
    """What a file of the model holds besides some initializers: structure and other tensors."""
    slots = detached_slots(model)
    kept = sum(slot.tensor.nbytes for slot in slots if slot.name not in without)
    return kept + structure_bytes(model, slots)


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
