"""The examples of docs/writing_passes.md run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from faq_onnx.errors import RewriteError
from faq_onnx.passes import PASSES, run_passes

PAGE = Path(__file__).parents[2] / "docs" / "writing_passes.md"


def run_examples() -> dict[str, Any]:
    blocks = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    # dataclasses look up the module that a class says it is from
    names: dict[str, Any] = {"__name__": __name__}
    exec("\n".join(blocks), names)
    return names


def test_the_examples_run_and_the_pass_does_what_its_rules_say() -> None:
    example = run_examples()["RemoveNoopCastPass"]
    text = '<ir_version: 8, opset_import: ["" : 18]> main (%s x) => (float[1] y) { %s }'
    given_out = ir.from_onnx_text(text % ("float[1]", "y = Cast <to: int = 1> (x)"))
    assert not run_passes(given_out, [example()]).modified
    untyped = "a = Neg (x) b = Cast <to: int = 1> (a) y = Neg (b)"
    with pytest.raises(RewriteError, match="unknown type"):
        run_passes(ir.from_onnx_text(text % ("float[1]", untyped)), [example()])


def test_every_pass_is_listed() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{kind.__name__}` | `{name}` |" in page for name, kind in PASSES.items())
