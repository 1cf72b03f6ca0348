"""Running passes one after the other, with our own errors kept readable."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from faq_onnx.errors import FaqOnnxError

__all__ = ["OnPass", "pass_name", "run_passes"]

OnPass = Callable[[ir.passes.PassBase, ir.passes.PassResult], None]
"""Called after each pass: for timing, dumps and post-conditions."""


def run_passes(
    model: ir.Model, passes: Iterable[ir.passes.PassBase], *, on_pass: OnPass | None = None
) -> ir.passes.PassResult:
    """Run passes in order; an iterator is asked for the next pass when the one before is done.

    Raises:
        FaqOnnxError: of a pass, unwrapped: onnx_ir hides it behind up to four errors of its own.
            The name of the pass is a note on it.
        Exception: anything else that a pass raises, as onnx_ir wraps it.
    """
    modified = False
    for each in passes:
        try:
            result = each(model)
        except Exception as error:
            ours = _first_of_ours(error)
            if ours is None:
                raise
            ours.add_note(f"in pass {pass_name(each)}")
            raise ours from None
        model = result.model
        modified = modified or result.modified
        if on_pass is not None:
            on_pass(each, result)
    return ir.passes.PassResult(model, modified)


def pass_name(each: ir.passes.PassBase) -> str:
    """`FoldScalesPass` -> `fold-scales`; the name used in text pipelines and messages."""
    word = type(each).__name__.removesuffix("Pass")
    return _NAMES.get(word) or "".join(
        f"-{letter.lower()}" if letter.isupper() and index else letter.lower()
        for index, letter in enumerate(word)
    )


_NAMES = {"LiftMatMulNBits": "lift-matmul-nbits", "MatMulToNBits": "matmul-to-nbits"}
"""Where the words of a class name are not its capital letters."""


def _first_of_ours(error: BaseException) -> FaqOnnxError | None:
    """The first FaqOnnxError in the chain of causes."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, FaqOnnxError):
        cause = cause.__cause__
    return cause
