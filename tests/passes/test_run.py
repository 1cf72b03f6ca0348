"""Errors of passes come out readable, and callbacks see every pass."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from faq_onnx.errors import RewriteError
from faq_onnx.passes import PASSES, pass_name, run_passes

EMPTY = (
    '<ir_version: 8, opset_import: ["" : 18]> main (float[1] x) => (float[1] y) { y = Neg (x) }'
)


class ComplainPass(ir.passes.InPlacePass):
    """Raises what it is given, from one of its three hooks."""

    def __init__(self, error: Exception, hook: str = "call") -> None:
        self.error, self.hook = error, hook

    def _maybe_raise(self, hook: str) -> None:
        if hook == self.hook:
            raise self.error

    def requires(self, model: ir.Model) -> None:
        """Complain here if asked to."""
        del model
        self._maybe_raise("requires")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Complain here if asked to."""
        self._maybe_raise("call")
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """Complain here if asked to."""
        del model
        self._maybe_raise("ensures")


@pytest.mark.parametrize("hook", ["requires", "call", "ensures"])
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "in a PassManager"])
def test_our_error_comes_out_unwrapped(hook: str, nested: bool) -> None:
    error = RewriteError("layer 3 is odd")
    each: ir.passes.PassBase = ComplainPass(error, hook)
    if nested:
        each = ir.passes.PassManager([ir.passes.Sequential(each)], steps=2)
    with pytest.raises(RewriteError) as caught:
        run_passes(ir.from_onnx_text(EMPTY), [each])
    assert caught.value is error
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert len(caught.value.__notes__) == 1


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_passes(ir.from_onnx_text(EMPTY), [ComplainPass(ZeroDivisionError())])
    with pytest.raises(ir.passes.PreconditionError) as caught:
        run_passes(ir.from_onnx_text(EMPTY), [ComplainPass(ZeroDivisionError(), "requires")])
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_the_callback_sees_each_pass_and_its_result() -> None:
    passes = [ComplainPass(RewriteError("never"), "never") for _ in range(2)]
    seen: list[tuple[ir.passes.PassBase, bool]] = []
    model = ir.from_onnx_text(EMPTY)
    result = run_passes(
        model, passes, on_pass=lambda each, done: seen.append((each, done.modified))
    )
    assert seen == [(passes[0], True), (passes[1], True)]
    assert result.model is model
    assert not run_passes(model, []).modified


def test_names_are_those_of_the_table() -> None:
    for name, kind in PASSES.items():
        assert pass_name(kind.__new__(kind)) == name
