"""Progress lines and bars."""

from __future__ import annotations

import io

import pytest

from faq_onnx.progress import Progress
from faq_onnx.report.progress import LineProgress, RichProgress, make_progress


def test_a_pipe_gets_lines() -> None:
    assert isinstance(make_progress(io.StringIO()), LineProgress)


def test_both_are_progress() -> None:
    stream = io.StringIO()
    both: list[Progress] = [LineProgress(stream), RichProgress(stream)]
    for progress in both:
        with progress.stage("calibrate", 4, "layers") as advance:
            advance(4)
        progress.note("[bold] is text")
    assert stream.getvalue().count("calibrate: done in") == 2
    assert stream.getvalue().count("[bold] is text") == 2


def test_lines_are_few() -> None:
    stream = io.StringIO()
    with LineProgress(stream).stage("calibrate", 10_000, "windows") as advance:
        for _ in range(10_000):
            advance(1)
    assert len(stream.getvalue().splitlines()) == 2


def test_line_tells_share_and_time_left() -> None:
    stream = io.StringIO()
    with LineProgress(stream, interval_s=0.0).stage("calibrate", 4, "layers") as advance:
        advance(1)
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("] calibrate (4 layers)")
    assert "] calibrate: 25%, about " in lines[1]
    assert lines[1].endswith(" left")


@pytest.mark.parametrize("make", [LineProgress, RichProgress])
def test_unknown_total(make: type[LineProgress | RichProgress]) -> None:
    stream = io.StringIO()
    with make(stream).stage("export", 0, "steps") as advance:
        advance(1)
    assert "export: done in" in stream.getvalue()


@pytest.mark.parametrize("make", [LineProgress, RichProgress])
def test_failed_stage_is_not_done(make: type[LineProgress | RichProgress]) -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError, match="full"), make(stream).stage("write", 2, "files"):
        raise ValueError("full")
    assert "done" not in stream.getvalue()


@pytest.mark.parametrize("make", [LineProgress, RichProgress])
def test_stage_inside_a_stage(make: type[LineProgress | RichProgress]) -> None:
    stream = io.StringIO()
    progress = make(stream)
    with progress.stage("outer", 2, "layers") as outer:
        with progress.stage("inner", 0, "") as inner:
            inner(1)
        outer(2)
    lines = stream.getvalue()
    assert lines.index("inner: done in") < lines.index("outer: done in")


def test_bar_on_a_terminal_shows_steps_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    progress = make_progress(stream)
    assert isinstance(progress, RichProgress)
    with progress.stage("calibrate", 4, "layers") as advance:
        advance(4)
    assert "0/4 layers" in stream.getvalue()
    assert "left" in stream.getvalue()
