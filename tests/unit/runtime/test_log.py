"""Capturing what C++ writes to stderr."""

from __future__ import annotations

import os

import pytest

from faq_onnx.runtime.log import captured_log


def test_writes_to_the_descriptor_are_caught() -> None:
    with captured_log() as log:
        os.write(2, b"from C\n")
    assert "from C" in log.text


def _fail() -> None:
    with captured_log():
        os.write(2, b"last words")
        raise ZeroDivisionError


def test_the_descriptor_is_restored_after_an_error() -> None:
    before = os.fstat(2)
    with pytest.raises(ZeroDivisionError):
        _fail()
    after = os.fstat(2)
    assert (before.st_dev, before.st_ino) == (after.st_dev, after.st_ino)


def test_captures_nest() -> None:
    with captured_log() as outer:
        os.write(2, b"a")
        with captured_log() as inner:
            os.write(2, b"b")
        os.write(2, b"c")
    assert (outer.text, inner.text) == ("ac", "b")


def test_bytes_that_are_not_text_do_not_raise() -> None:
    with captured_log() as log:
        os.write(2, b"\xff\xfe ok")
    assert log.text.endswith(" ok")


def test_a_closed_stderr_stays_closed() -> None:
    saved = os.dup(2)
    os.close(2)
    try:
        with captured_log() as log:
            os.write(2, b"heard")
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(2)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
    assert log.text == "heard"
