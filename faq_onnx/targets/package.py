"""The output folder: all or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import onnx_ir as ir

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.errors import PackageError
from faq_onnx.graph.io import save_model
from faq_onnx.targets.tokenizer import mend_tokenizer

__all__ = [
    "MANIFEST_NAME",
    "OutputFolder",
    "check_free_space",
    "copy_companions",
    "name_full_disk",
    "replace_model",
]

_LOGGER = logging.getLogger(__name__)
MANIFEST_NAME = "package.json"
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "NOTICE",
)
# Only where there is no tokenizer.json, which says the same in one file.
_OLD_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")
# What any of our commands writes; --force deletes only a folder that looks like one of them.
_OUR_SUFFIXES = {".onnx", ".json"}
# Where libraries lose the errno: numpy's tofile, and the Rust of safetensors.
_DISK_FULL = re.compile(r"\b\d+ requested and \d+ written|No space left on device|os error 28\b")
_NO_ROOM_BYTES = 1 << 20  # a disk with less free than this is what the error was about


@dataclasses.dataclass
class OutputFolder:
    """Context manager: write into `path`; at the end it becomes `output`, or nothing remains.

    Enter it before any work, so that an existing output is refused first. Whatever is raised
    inside, Ctrl-C too, removes everything written; with `force` the old output is deleted only
    after the new one is complete.

    Attributes:
        output: Where the result will be.
        source: What the user converts, to keep it from being overwritten; None: nothing to keep.
        force: Replace an existing output.
    """

    output: Path
    source: Path | None = None
    force: bool = False
    _path: Path | None = dataclasses.field(default=None, init=False, repr=False)
    _made_parents: list[Path] = dataclasses.field(default_factory=list, init=False, repr=False)

    @property
    def path(self) -> Path:
        """The temporary folder to write into, a sibling of `output`."""
        assert self._path is not None, "only inside of the `with` block"
        return self._path

    def __enter__(self) -> Self:
        """Check the place and make the temporary folder.

        Raises:
            PackageError: The output exists, or holds or lies in the source, or is not writable.
        """
        self.output = self.output.expanduser().absolute()
        _check_apart(self.output, self.source)
        _check_replaceable(self.output, force=self.force)
        parent = self.output.parent
        self._made_parents = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._path = Path(tempfile.mkdtemp(prefix=f".{self.output.name}.partial-", dir=parent))
        except OSError as error:
            self._remove_parents()
            raise PackageError(f"{parent}: cannot write there ({error.strerror})") from error
        self._path.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Rename on success; otherwise remove, and say so when the disk was full.

        Raises:
            PackageError: The disk is full, or the rename failed.
        """
        try:
            if error is None:
                self._publish()
                return
            full = _find_disk_full(error)
            if full is not None and not isinstance(error, PackageError):  # that says it already
                raise PackageError(self._describe_full()) from full
        finally:
            # After success the folder has another name, and these do nothing.
            shutil.rmtree(self.path, ignore_errors=True)
            self._remove_parents()
            self._path = None

    def _publish(self) -> None:
        try:
            if not self.output.exists() or not any(self.output.iterdir()):
                self.path.replace(self.output)
                return
            _swap(self.path, self.output)
        except OSError as error:
            raise PackageError(f"{self.output}: cannot rename into place ({error})") from error

    def _describe_full(self) -> str:
        written = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.path).free
        return (
            f"{self.output}: no space left on the disk after writing {written:,} bytes "
            f"({free:,} bytes free); the partial output is removed"
        )

    def _remove_parents(self) -> None:
        for parent in self._made_parents:
            with contextlib.suppress(OSError):  # not empty: the output is in it
                parent.rmdir()


def check_free_space(path: Path, bytes_needed: int) -> None:
    """Refuse before the work what cannot be written at its end.

    Args:
        path: Any place on that disk; need not exist yet.
        bytes_needed: Size of what will be written.

    Raises:
        PackageError: Fewer bytes are free.
    """
    place = path.expanduser().absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise PackageError(
            f"{path}: {bytes_needed:,} bytes are needed and {free:,} are free on that disk; "
            f"make room or choose another output"
        )


@contextlib.contextmanager
def name_full_disk(folder: Path) -> Iterator[None]:
    """Say that the disk of a work folder is full, while what fills it still lies there.

    Raises:
        PackageError: The disk of `folder` is full.
    """
    try:
        yield
    except Exception as error:
        free = shutil.disk_usage(folder).free
        if _find_disk_full(error) is None or free > _NO_ROOM_BYTES:
            raise
        raise PackageError(
            f"{folder}: no space left on the disk of intermediate results ({free:,} bytes free); "
            "make room, choose another disk with --work, or set TMPDIR"
        ) from error


def copy_companions(source: SourceModel, folder: Path) -> tuple[str, ...]:
    """Copy config, tokenizer and licence files of the source; returns the names copied.

    The tokenizer is mended where genai would misread it.
    """
    names = list(_COMPANIONS)
    if source.companion("tokenizer.json") is None:
        names.extend(_OLD_TOKENIZERS)
    copied = []
    for name in names:
        path = source.companion(name)
        if path is not None:
            shutil.copyfile(path, folder / name)
            copied.append(name)
    mend_tokenizer(folder)
    _LOGGER.debug("copied %s", ", ".join(copied) or "no companions")
    return tuple(copied)


def replace_model(model: ir.Model, path: Path, work: Path, *, external_data: bool) -> int:
    """Write a model in the place of the one that it was made of, and still reads.

    Args:
        model: What to write.
        path: The .onnx file.
        work: For the new files, until they are complete.
        external_data: Weights beside it even below 1 GB.

    Returns:
        Bytes written.
    """
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        size = save_model(model, Path(folder) / path.name, external_data=external_data)
        for file in Path(folder).iterdir():
            shutil.move(file, path.parent / file.name)
    return size


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _check_apart(output: Path, source: Path | None) -> None:
    if source is None or not source.exists():
        return
    target, origin = output.resolve(), source.resolve()
    if target == origin or target in origin.parents:
        raise PackageError(f"{output}: the source {source} lies there; choose another output")
    if origin.is_dir() and origin in target.parents:
        raise PackageError(
            f"{output}: lies inside of the source folder {source}; choose an output beside it"
        )


def _check_replaceable(output: Path, *, force: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise PackageError(f"{output}: exists and is not a folder; choose another output")
    entries = list(output.iterdir())
    if not entries:
        return
    if not force:
        raise PackageError(f"{output}: exists already; choose another output or use --force")
    ours = any(entry.suffix in _OUR_SUFFIXES for entry in entries)
    folders = [entry for entry in entries if not entry.is_file()]
    deep = {file for folder in folders for file in folder.rglob("*") if not file.is_dir()}
    named = {output / name for name in _files_named_in_manifest(output)}
    known = {parent for path in named for parent in path.parents}
    if not ours or not known.issuperset(folders) or not named.issuperset(deep):
        raise PackageError(
            f"{output}: does not look like an output of faq-onnx, so even --force does not "
            f"delete it; remove it yourself or choose another output"
        )


def _files_named_in_manifest(output: Path) -> list[str]:
    """Files that a package says it has: targets may write folders."""
    try:
        content = json.loads((output / MANIFEST_NAME).read_text(encoding="utf-8"))
        return list(content["files"])
    except (OSError, ValueError, KeyError, TypeError):  # none, damaged, or of something else
        return []


def _find_disk_full(error: BaseException | None) -> BaseException | None:
    """The "disk full" at the bottom of an error, however deep a library has wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return error
        if _DISK_FULL.search(str(error)):
            return error
        error = error.__cause__ or error.__context__
    return None


def _swap(new: Path, output: Path) -> None:
    """Put `new` in the place of `output`, which comes back if that fails."""
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old-", dir=output.parent))
    try:
        output.replace(old)
        try:
            new.replace(output)
        except BaseException:
            old.replace(output)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
