"""Every file under tests/golden: a model, a pipeline, the model it becomes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from faq_onnx.opt import optimize
from faq_onnx.passes import PASSES
from faq_onnx.testing import assert_golden

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = sorted(GOLDEN.rglob("*.onnxtxt"))


def rewrite(model: ir.Model, pipeline: str) -> ir.Model:
    return optimize(model, pipeline).model


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden(path: Path, update_golden: bool) -> None:
    assert_golden(path, rewrite, update=update_golden)


def test_every_pass_has_a_golden_file() -> None:
    assert {path.parent.name.replace("_", "-") for path in CASES} == set(PASSES)


def test_a_wrong_result_is_shown_as_a_diff(tmp_path: Path) -> None:
    case = tmp_path / "case.onnxtxt"
    text = CASES[0].read_text(encoding="utf-8")
    case.write_text(text.replace("ir_version: 8", "ir_version: 9", 1), encoding="utf-8")
    with pytest.raises(AssertionError, match=r"\+   ir_version: 9"):
        assert_golden(case, rewrite)
    assert_golden(case, rewrite, update=True)
    assert_golden(case, rewrite)
