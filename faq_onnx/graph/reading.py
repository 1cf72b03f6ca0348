"""The reading half of `graph.io`: what lies in a file, and whether it can be what it says."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import mmap
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from faq_onnx.errors import CorruptModelError, UnsupportedModelError
from faq_onnx.graph.tensors import TensorSlot
from faq_onnx.graph.wire import MIN_DETACHED_BYTES, WireError, detach_tensors

__all__ = ["check_inline", "read_graph", "read_if_small"]


@dataclasses.dataclass(frozen=True)
class ReadableVersions:
    """The newest files that the installed onnxruntime loads: others are refused before any work.

    Attributes:
        runtime: Its name and version.
        ir_version: Of the file format.
        opset: Of ONNX's own operators.
    """

    runtime: str
    ir_version: int
    opset: int

    @classmethod
    @functools.cache
    def installed(cls) -> ReadableVersions:
        """Measured on 1.31.1 and 1.32.0; the least of them where the version is not known."""
        try:
            version = importlib.metadata.version("onnxruntime")
        except importlib.metadata.PackageNotFoundError:  # another build, under another name
            return cls("onnxruntime 1.31", 13, 26)
        release = tuple(int(part) for part in version.split(".")[:2])
        limits = (14, 28) if release >= (1, 32) else (13, 26)
        return cls(f"onnxruntime {version}", *limits)


def read_graph(path: Path) -> ir.Model:
    """The structure of a file as a graph whose parts fit together; weights stay on disk.

    Raises:
        CorruptModelError: It is missing, truncated or damaged.
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
    try:
        model.graph.sort()  # converters append casts at the end, which onnxruntime puts up with
    except ValueError as error:
        raise CorruptModelError(
            f"{path}: nodes read each other in a circle; export the model again"
        ) from error
    return model


def check_inline(slot: TensorSlot, path: Path) -> None:
    """Make sure that a tensor inside of the file has the numbers that its shape needs.

    Raises:
        CorruptModelError: They are missing, too few, or cannot be read.
    """
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


def read_if_small(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Read what is not worth a reference: some exporters move even axes out of the file."""
    if tensor.nbytes >= MIN_DETACHED_BYTES:
        return tensor
    copied = ir.Tensor(tensor.numpy().copy(), tensor.dtype, name=tensor.name)
    tensor.release()
    return copied


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
    newest = ReadableVersions.installed()
    if proto.ir_version > newest.ir_version:
        raise UnsupportedModelError(
            f"{path} has IR version {proto.ir_version}; {newest.runtime} reads up to "
            f"{newest.ir_version}: export it with a lower IR version, or update onnxruntime"
        )
    opsets = [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")]
    if opsets and max(opsets) > newest.opset:
        raise UnsupportedModelError(
            f"{path} needs opset {max(opsets)}; {newest.runtime} supports up to {newest.opset}: "
            f"export it with opset {newest.opset} or lower, or update onnxruntime"
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


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
