"""What is SOURCE? An ONNX file, a folder of one, a checkpoint, a GGUF file or a hub id."""

from __future__ import annotations

import re
from pathlib import Path

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import CorruptModelError, ExportError
from faq_onnx.export.checkpoint import export_checkpoint
from faq_onnx.export.ready import accept_file, accept_folder, find_onnx_files
from faq_onnx.progress import Progress

__all__ = ["resolve_source"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WEIGHT_SUFFIXES = (".safetensors", ".bin")
_GGUF_MAGIC = b"GGUF"
_ACCEPTED = (
    "an .onnx file, a folder holding one, a Hugging Face folder (config.json with .safetensors "
    "or .bin weights), a .gguf file, or a hub id such as owner/name"
)


def resolve_source(source: str, work: Path, progress: Progress) -> SourceModel:
    """Find the ONNX file of `source`, or export one into `work`.

    Args:
        source: Path or hub id as the user wrote it.
        work: Existing folder of this run; an export lies in `work / "export"` afterwards.
        progress: Told of every export, and before anything is downloaded.

    Returns:
        Where the float model and its companions lie.

    Raises:
        ExportError: Nothing of that name, nothing usable in it, or the export failed.
        UnsupportedModelError: A folder of several ONNX files without a clear choice.
        CorruptModelError: An ONNX or GGUF file that is empty or a Git LFS pointer.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _resolve_folder(source, path, work, progress)
    if path.is_file():
        return _resolve_file(source, path, work, progress)
    if not _is_hub_id(source, path):
        raise ExportError(f"SOURCE {source!r}: no such file or folder; SOURCE is {_ACCEPTED}")
    progress.note(f"{source} is not a local path: downloading it from the model hub")
    return export_checkpoint(source, source, work / "export", progress, online=True)


def _resolve_folder(given: str, folder: Path, work: Path, progress: Progress) -> SourceModel:
    if find_onnx_files(folder):
        return accept_folder(given, folder)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if (folder / "config.json").is_file() and any(f.suffix in _WEIGHT_SUFFIXES for f in files):
        return export_checkpoint(given, str(folder), work / "export", progress)
    ggufs = [path for path in files if path.suffix.lower() == ".gguf"]
    if len(ggufs) == 1:
        return export_checkpoint(given, str(ggufs[0]), work / "export", progress)
    found = ", ".join(path.name for path in files[:12]) or "no files"
    raise ExportError(
        f"SOURCE {given!r}: the folder holds no model (found: {found}); SOURCE is {_ACCEPTED}"
    )


def _resolve_file(given: str, path: Path, work: Path, progress: Progress) -> SourceModel:
    suffix = path.suffix.lower()
    if suffix == ".onnx":
        return accept_file(given, path)
    if suffix == ".gguf":
        _check_gguf(path)
        return export_checkpoint(given, str(path), work / "export", progress)
    hint = (
        f" (did you mean its folder {str(path.parent)!r}?)" if suffix in _WEIGHT_SUFFIXES else ""
    )
    raise ExportError(
        f"SOURCE {given!r}: cannot read a {suffix!r} file{hint}; SOURCE is {_ACCEPTED}"
    )


def _check_gguf(path: Path) -> None:
    with path.open("rb") as file:
        head = file.read(len(_GGUF_MAGIC))
    if head != _GGUF_MAGIC:
        raise CorruptModelError(
            f"{path}: begins with {head!r}, not with {_GGUF_MAGIC!r}; it is no GGUF file, or a "
            f"Git LFS pointer in its place"
        )


def _is_hub_id(source: str, path: Path) -> bool:
    """Whether a name that is no path can be a hub id; a mistyped path must not go online."""
    if path.suffix.lower() in {".onnx", ".gguf", *_WEIGHT_SUFFIXES} or path.parent.is_dir():
        return False
    return _HUB_ID.fullmatch(source) is not None
