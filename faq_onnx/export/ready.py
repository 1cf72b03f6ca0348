"""Accept ONNX files that exist already, and find the folder of their tokenizer and config."""

from __future__ import annotations

from pathlib import Path

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import CorruptModelError, UnsupportedModelError

__all__ = ["accept_file", "accept_folder", "find_onnx_files"]

_COMPANIONS = ("config.json", "genai_config.json", "tokenizer.json", "tokenizer_config.json")
# Names of a hub's `onnx/` folder for one model at several precisions and in several cuts.
_PREFERRED = ("model.onnx", "decoder_model_merged.onnx")
_LFS_POINTER = b"version https://git-lfs"


def find_onnx_files(folder: Path) -> list[Path]:
    """ONNX files in `folder`, else those of its `onnx/` sub-folder as hubs have it."""
    for place in (folder, folder / "onnx"):
        files = sorted(path for path in place.glob("*.onnx") if path.is_file())
        if files:
            return files
    return []


def accept_folder(given: str, folder: Path) -> SourceModel:
    """Choose the model of a folder: model.onnx, else the only decoder, else the only file.

    Raises:
        UnsupportedModelError: Several files and no clear choice; all are listed.
    """
    files = find_onnx_files(folder)
    chosen = _choose(files)
    if chosen is None:
        names = ", ".join(path.name for path in files)
        raise UnsupportedModelError(
            f"SOURCE {given!r}: {len(files)} ONNX files and none is model.onnx or the only "
            f"decoder ({names}); name one of them as SOURCE"
        )
    return accept_file(given, chosen)


def accept_file(given: str, path: Path) -> SourceModel:
    """Take one ONNX file; its companions lie beside it or, for `onnx/x.onnx`, one level up.

    Raises:
        CorruptModelError: An empty file, or a Git LFS pointer in its place.
    """
    with path.open("rb") as file:
        head = file.read(len(_LFS_POINTER))
    if not head:
        raise CorruptModelError(f"{path}: the file is empty; download or export it again")
    if head == _LFS_POINTER:
        raise CorruptModelError(
            f"{path}: a Git LFS pointer, not the model; fetch it with `git lfs pull`"
        )
    return SourceModel(given=given, onnx_path=path, folder=_companion_folder(path))


def _choose(files: list[Path]) -> Path | None:
    if len(files) == 1:
        return files[0]
    by_name = {path.name: path for path in files}
    for name in _PREFERRED:
        if name in by_name:
            return by_name[name]
    decoders = [p for p in files if "decoder" in p.name and "with_past" not in p.name]
    return decoders[0] if len(decoders) == 1 else None


def _companion_folder(path: Path) -> Path | None:
    places = [path.parent]
    if path.absolute().parent.name == "onnx":
        places.append(path.absolute().parent.parent)
    for place in places:
        if any((place / name).is_file() for name in _COMPANIONS):
            return place
    return None
