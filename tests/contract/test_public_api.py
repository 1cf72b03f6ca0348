"""The public names of `import faq_onnx`, and what importing it does not load."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import faq_onnx
from faq_onnx import errors

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "optimum", "onnxruntime", "onnx", "onnx_ir", "pydantic", "numpy")


def _loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


def test_import_loads_nothing_heavy() -> None:
    assert not _loaded_after("import faq_onnx").intersection(HEAVY)


def test_help_loads_nothing_heavy() -> None:
    code = "from faq_onnx.cli.main import main; main(['--help'])"
    assert not _loaded_after(code).intersection(HEAVY)


def test_help_of_a_command_loads_no_onnx() -> None:
    code = "from faq_onnx.cli.main import main; main(['convert', '--help'])"
    heavy = set(HEAVY) - {"pydantic", "numpy"}
    assert not _loaded_after(code).intersection(heavy)


@pytest.mark.parametrize("name", faq_onnx.__all__)
def test_public_name_loads(name: str) -> None:
    assert getattr(faq_onnx, name) is not None


def test_all_is_sorted_and_complete() -> None:
    assert faq_onnx.__all__ == sorted(faq_onnx.__all__)
    assert set(errors.__all__) <= set(faq_onnx.__all__)
    assert set(faq_onnx.__all__) <= set(dir(faq_onnx))


def test_all_equals_what_type_checkers_see() -> None:
    tree = ast.parse((ROOT / "faq_onnx" / "__init__.py").read_text(encoding="utf-8"))
    typed = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module != "__future__"
        for alias in node.names
    }
    assert typed - {"TYPE_CHECKING"} | {"__version__"} == set(faq_onnx.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'converts'"):
        _ = getattr(faq_onnx, "converts")  # noqa: B009 - the type checker knows that it is missing
