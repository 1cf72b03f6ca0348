"""A real Chromium without a window, driven through DevTools, and a server for one folder.

DevTools speaks JSON over two pipes (`--remote-debugging-pipe`): no port, no WebSocket, no library.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from faq_onnx.errors import PackageError

__all__ = ["BROWSERS", "Browser", "find_browser", "open_browser", "serve_folder"]

# Names on PATH; the variable of the same name as in other tools that drive Chromium wins.
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_VARIABLE = "CHROME_PATH"
# The browser reads commands from file 3 and answers in file 4.
_TRAMPOLINE = (
    "import os, sys; command, answer, *words = sys.argv[1:]; "
    "os.dup2(int(command), 3); os.dup2(int(answer), 4); os.execvp(words[0], words)"
)
_OPTIONS = (
    "--headless=new",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--no-default-browser-check",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--metrics-recording-only",
    "--disable-dev-shm-usage",
    "--mute-audio",
)
# WebGPU on the graphics processor, also on Linux, where Chromium has it off by default; without
# one it takes SwiftShader, which computes on the processor.
_WEBGPU = ("--enable-unsafe-webgpu", "--enable-features=Vulkan", "--ignore-gpu-blocklist")
_ISOLATION: Mapping[str, str] = MappingProxyType(
    {
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Embedder-Policy": "require-corp",
    }
)
_START_TIMEOUT_S = 60.0


def find_browser() -> str | None:
    """Path of a Chromium or Chrome: $CHROME_PATH, else the first of `BROWSERS` on PATH."""
    given = os.environ.get(_VARIABLE)
    if given:
        return given if Path(given).is_file() else None
    return next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """One page of a running browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to = to_browser
        self._from = from_browser
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.console: list[str] = []

    def attach(self) -> None:
        """Open an empty page."""
        target = self.call("Target.createTarget", {"url": "about:blank"}, _START_TIMEOUT_S)
        wish = {"targetId": target["targetId"], "flatten": True}
        self._session = self.call("Target.attachToTarget", wish)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(
        self, method: str, parameters: Mapping[str, Any] | None = None, timeout_s: float = 30.0
    ) -> dict[str, Any]:
        """One DevTools command and its result.

        Raises:
            PackageError: The browser refused, ended, or did not answer in time.
        """
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method}
        message["params"] = dict(parameters or {})
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + timeout_s
        while True:
            answer = self._receive(deadline, method)
            if answer.get("id") == self._number:
                break
            self._note(answer)
        if "error" in answer:
            raise PackageError(f"the browser refused {method}: {answer['error'].get('message')}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, address: str, timeout_s: float = 60.0) -> None:
        """Go to a page and wait until it is loaded."""
        found = self.call("Page.navigate", {"url": address}, timeout_s)
        if found.get("errorText"):
            raise PackageError(f"the browser cannot open {address}: {found['errorText']}")
        self.wait_for("document.readyState === 'complete'", timeout_s)

    def evaluate(self, expression: str, timeout_s: float = 30.0) -> Any:
        """The value of a JavaScript expression; promises are awaited.

        Raises:
            PackageError: It threw, or took too long.
        """
        wish = {"expression": expression, "awaitPromise": True, "returnByValue": True}
        found = self.call("Runtime.evaluate", {**wish, "userGesture": True}, timeout_s)
        thrown = found.get("exceptionDetails")
        if thrown is not None:
            text = thrown.get("exception", {}).get("description") or thrown.get("text")
            raise PackageError(f"in the browser: {text}")
        return found["result"].get("value")

    def wait_for(self, condition: str, timeout_s: float = 30.0) -> None:
        """Wait until a JavaScript condition holds.

        Raises:
            PackageError: It does not hold in time.
        """
        deadline = time.monotonic() + timeout_s
        while not self.evaluate(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise PackageError(f"in the browser, {condition} did not become true")
            time.sleep(0.05)

    def _receive(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select(
                [self._from], [], [], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                raise PackageError(f"the browser did not answer {method} in time")
            piece = os.read(self._from, 1 << 16)
            if not piece:
                raise PackageError(f"the browser ended during {method}")
            self._buffer += piece
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: Mapping[str, Any]) -> None:
        """Keep what pages write to their console."""
        parameters = event.get("params", {})
        if event.get("method") == "Runtime.consoleAPICalled":
            words = (str(a.get("value", a.get("description", ""))) for a in parameters["args"])
            self.console.append(" ".join(words))
        elif event.get("method") == "Log.entryAdded":
            self.console.append(str(parameters["entry"].get("text")))
        elif event.get("method") == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details.get("text")
            self.console.append(str(text))


@contextlib.contextmanager
def open_browser(
    program: str, *, webgpu: bool = True, more: tuple[str, ...] = ()
) -> Iterator[Browser]:
    """Start a browser with one empty page; it is gone afterwards, with all that it wrote.

    Args:
        program: What `find_browser` found.
        webgpu: Offer WebGPU, on the processor where there is no graphics processor.
        more: Further command line options.

    Raises:
        PackageError: It does not start.
    """
    with tempfile.TemporaryDirectory(
        prefix="faq-onnx-browser-", ignore_cleanup_errors=True
    ) as home:
        read_in, write_in = os.pipe()
        read_out, write_out = os.pipe()
        root = ("--no-sandbox",) if hasattr(os, "geteuid") and os.geteuid() == 0 else ()
        gpu = _WEBGPU if webgpu else ("--disable-gpu", "--disable-features=WebGPU")
        words = (program, *_OPTIONS, *root, *gpu, f"--user-data-dir={home}", *more, "about:blank")
        started = subprocess.Popen(  # noqa: S603 - a browser that the user has, no shell
            [sys.executable, "-c", _TRAMPOLINE, str(read_in), str(write_out), *words],
            pass_fds=(read_in, write_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_in)
        os.close(write_out)
        try:
            browser = Browser(write_in, read_out)
            browser.attach()
            yield browser
        finally:
            with contextlib.suppress(PackageError, OSError):
                browser.call("Browser.close", timeout_s=10)
            try:
                started.wait(10)
            except subprocess.TimeoutExpired:
                started.kill()
                started.wait()
            os.close(write_in)
            os.close(read_out)


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Files of one folder, with the headers that threads need."""

    extra_headers: Mapping[str, str] = MappingProxyType({})

    def end_headers(self) -> None:
        """Send what is common to all answers, then what the base class sends."""
        for name, value in self.extra_headers.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the name is theirs
        """Nothing."""


class _IsolatedHandler(_Handler):
    extra_headers = _ISOLATION


@contextlib.contextmanager
def serve_folder(folder: Path, *, isolated: bool = True) -> Iterator[str]:
    """Serve a folder on this machine only; yields its address, such as http://127.0.0.1:1234/.

    Args:
        folder: What to serve.
        isolated: Send the headers that give pages threads (COOP and COEP).
    """
    handler = functools.partial(
        _IsolatedHandler if isolated else _Handler, directory=str(folder.absolute())
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
