"""Versions of runtimes that are here."""

from __future__ import annotations

import contextlib
import importlib.metadata

__all__ = ["installed_versions"]


def installed_versions(*packages: str) -> dict[str, str]:
    """By package name; those that are not installed are left out."""
    found = {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
