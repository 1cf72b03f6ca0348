"""The base of all artifacts: frozen, strict, versioned records that go to and from JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from faq_onnx.errors import PackageError

__all__ = ["Record", "fingerprint_bytes", "fingerprint_file"]


class Record(BaseModel):
    """A frozen record; unknown fields are errors, arrays never live in here."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def fingerprint(self) -> str:
        """Sha256 (hex) of the canonical JSON of this record."""
        return fingerprint_bytes(self.model_dump_json().encode())

    def save(self, path: Path) -> None:
        """Write as indented JSON; an interrupted write leaves the old file as it was."""
        partial = path.with_name(f"{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            PackageError: The file is damaged, or of another version of faq-onnx.
        """
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, ValidationError) as error:
            problem = _problem(error)
            msg = (
                f"{path}: no {cls.__name__} of this version of faq-onnx ({problem}); the file is "
                "damaged, or another version wrote it: make it again"
            )
            raise PackageError(msg) from error


def _problem(error: UnicodeDecodeError | ValidationError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return str(error)
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def fingerprint_bytes(data: bytes) -> str:
    """Sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def fingerprint_file(path: Path) -> str:
    """Sha256 of a file, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
