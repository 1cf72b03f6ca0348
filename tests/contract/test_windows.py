"""The package imports where the modules of Unix are missing."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from faq_onnx.stages import run_report

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted(
    path for folder in ("faq_onnx", "passes", "models") for path in (ROOT / folder).rglob("*.py")
)
UNIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_needs_unix_to_be_imported(path: Path) -> None:
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    assert not found & UNIX_ONLY


def test_peak_memory_is_unknown_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)  # importing it fails from here on
    monkeypatch.setattr(sys, "platform", "win32")
    spec = importlib.util.spec_from_file_location("on_windows", run_report.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._peak_rss_bytes() is None  # noqa: SLF001 - there is no Windows here to run on


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_peak_memory_is_in_bytes() -> None:
    peak = run_report._peak_rss_bytes()  # noqa: SLF001 - kilobytes would look as good in a report
    assert peak is not None
    assert 2**24 < peak < 2**40  # numpy alone takes 16 MB
