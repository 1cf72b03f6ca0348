"""The base of all artifacts: frozen, strict, versioned records that go to and from JSON."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict

__all__ = ["Record", "fingerprint_bytes", "fingerprint_file"]


class Record(BaseModel):
    """A frozen record; unknown fields are errors, arrays never live in here."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=False)

    def fingerprint(self) -> str:
        """Sha256 (hex) of the canonical JSON of this record."""
        return fingerprint_bytes(self.model_dump_json().encode())

    def save(self, path: Path) -> None:
        """Write as indented JSON."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))


def fingerprint_bytes(data: bytes) -> str:
    """Sha256 of bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def fingerprint_file(path: Path) -> str:
    """Sha256 of a file, in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
