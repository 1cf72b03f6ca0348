"""`--target web` in a real Chromium: the same tokens, and a page that people can use.

Needs Chromium (Debian: apt-get install chromium), and npm for the libraries of the page: they are
taken from FAQ_ONNX_NODE_MODULES, else installed once into the cache folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.errors import PackageError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.browser import Browser, find_browser, open_browser, serve_folder
from faq_onnx.targets.web_libraries import find_libraries
from faq_onnx.targets.web_model import PAGE_CONFIG, PageConfig
from faq_onnx.targets.web_proof import page_script
from faq_onnx.testing import write_tiny_llama

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENTER = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
# In the page: a key pressed from here can come when the tiny model is through with its answer.
ESCAPE_AT_ONCE = """new MutationObserver((_, observer) => {
  if ((document.querySelector('li.assistant')?.textContent.length ?? 0) <= 2) return;
  observer.disconnect();
  window.stopSeen = document.querySelector('#stop').checkVisibility();
  document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape', bubbles: true }));
}).observe(document.querySelector('#log'), { childList: true, characterData: true, subtree: true })
"""
PATIENCE_S = 240.0


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "faq-onnx"
LIBRARIES = (
    "onnxruntime-web@1.30.0",
    "@huggingface/tokenizers@0.2.0",
    "@huggingface/jinja@0.5.11",
)
PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="session")
def npm() -> Path:
    """The node_modules folder."""
    given = os.environ.get("FAQ_ONNX_NODE_MODULES")
    if given:
        return find_libraries(Path(given)).folder
    folder = CACHE / f"web-{hashlib.sha256(' '.join(LIBRARIES).encode()).hexdigest()[:12]}"
    with contextlib.suppress(PackageError):
        return find_libraries(folder / "node_modules").folder
    program = shutil.which("npm")
    if program is None:
        pytest.skip("npm is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    command = [program, "install", "--ignore-scripts", "--no-audit", "--no-fund", "--prefix"]
    done = subprocess.run(
        [*command, str(folder), *LIBRARIES], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {LIBRARIES[0]}: {done.stderr.strip()[-300:]}")
    return find_libraries(folder / "node_modules").folder


def _source(folder: Path) -> Path:
    write_tiny_llama(folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, npm: Path) -> Path:
    """A float package, made without asking the browser: the tests here do that."""
    from faq_onnx import pipeline  # noqa: PLC0415 - heavy

    folder = tmp_path_factory.mktemp("web")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CHROME_PATH", str(folder / "none"))
        pipeline.package(
            str(_source(folder / "source")),
            folder / "out",
            target="web",
            target_options={"node_modules": str(npm), "title": "Tiny tales"},
        )
    return folder / "out"


@dataclasses.dataclass(frozen=True)
class Page:
    """The page in a browser, with what a person does."""

    browser: Browser
    address: str

    def press(self, key: dict[str, Any]) -> None:
        """One key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.browser.call("Input.dispatchKeyEvent", {"type": kind, **key})

    def write(self, text: str) -> None:
        """Into whatever has the focus."""
        self.browser.call("Input.insertText", {"text": text})

    def text(self, selector: str) -> str:
        """What stands there."""
        found = self.browser.evaluate(f"document.querySelector({selector!r})?.textContent ?? ''")
        return str(found)

    def sees(self, selector: str) -> bool:
        """Whether it is there and not hidden."""
        wish = f"document.querySelector({selector!r})?.checkVisibility() ?? false"
        return bool(self.browser.evaluate(wish))

    def wait(self, state: str) -> None:
        """Until the page says that it is so far."""
        self.browser.wait_for(f"document.body.dataset.state === {state!r}", PATIENCE_S)

    def open(self, query: str = "") -> None:
        """Go to the page."""
        self.browser.open(f"{self.address}index.html{query}")

    def start(self, query: str = "?provider=wasm") -> None:
        """As a person without a mouse: the button has the focus."""
        self.open(query)
        self.wait("welcome")
        self.press(ENTER)
        self.wait("ready")


@pytest.fixture
def page(package: Path) -> Iterator[Page]:
    assert PROGRAM is not None
    with serve_folder(package) as address, open_browser(PROGRAM) as browser:
        yield Page(browser, address)
        assert browser.console == []


def _native_answer(package: Path, said: str, tokens: int) -> str:
    codec = Tokenizer.from_file(str(package / "tokenizer.json"))
    ids = codec.encode(said, add_special_tokens=False).ids
    with exact_twin(package / "model.onnx") as exact:
        made = list(generate_greedy(open_session(exact), np.array(ids), tokens))
    return str(codec.decode(made))


@pytest.mark.parametrize(
    "words",
    [
        ("--symmetric", "--lm-head", "4", "--block-scales", "8-bit"),
        ("--no-fuse-attention", "--lm-head", "8", "--block-size", "16"),
    ],
    ids=["fused, 8-bit scales", "unfused, zero points"],
)
def test_tokens_in_both_providers_equal_native(
    cli: Any, tmp_path: Path, npm: Path, words: tuple[str, ...]
) -> None:
    source = _source(tmp_path / "source")
    place = f"node_modules={npm}"
    options = ("--method", "rtn", "--target", "web", "--target-option", place)
    out = tmp_path / "out"
    done = cli.quick("convert", source, "-o", out, *options, *words)
    assert done.code == 0, done.err
    manifest = PackageManifest.load(out / "package.json")
    if "--no-fuse-attention" not in words:  # one product for query, key and value there, too
        assert manifest.attention is not None
        assert manifest.attention.packed == manifest.attention.layers
    proof = manifest.proof
    names = ["greedy tokens, wasm", "greedy tokens, wasm, packed", "greedy tokens, webgpu"]
    wanted = [(name, True) for name in (*names, "tokenizer")]
    assert [(check.name, check.passed) for check in proof.checks] == wanted
    assert "onnxruntime-web" in proof.versions
    assert proof.versions["browser"].startswith(("Chrome/", "HeadlessChrome/"))


def test_a_fused_cache_stays_in_its_buffers(package: Path) -> None:
    """A prompt that fills the first ones: they are made once more, twice as large, and kept."""
    assert PROGRAM is not None
    config = PageConfig.load(package / PAGE_CONFIG)
    assert config.shares_cache
    ids = np.random.default_rng(0).integers(3, 250, 250)
    with serve_folder(package) as address, open_browser(PROGRAM) as browser:
        browser.open(f"{address}{PAGE_CONFIG}")
        script = page_script("webgpu", ids.tolist(), 12, seconds=PATIENCE_S, pieces=250)
        events = browser.evaluate(script, 4 * PATIENCE_S)
    assert "failed" not in events, events["failed"]
    with exact_twin(package / "model.onnx") as exact:
        made = list(generate_greedy(open_session(exact), ids, 12))
    assert events["proof"]["tokens"] == made


def test_verify_fails_where_the_model_was_changed(cli: Any, package: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for path in package.iterdir():  # links save copying the runtime
        (out / path.name).symlink_to(path)
    manifest = json.loads((package / "package.json").read_text())
    for check in manifest["proof"]["checks"]:
        check["passed"] = True
    for name, content in (
        ("package.json", json.dumps(manifest).encode()),
        ("model.onnx.data", bytes(reversed((package / "model.onnx.data").read_bytes()))),
    ):
        (out / name).unlink()
        (out / name).write_bytes(content)
    done = cli.run("verify", out, "-q")
    assert done.code == 7
    assert "greedy tokens, wasm" in done.err


def test_a_conversation_by_keyboard_on_a_phone(page: Page, package: Path) -> None:
    size = {"width": 390, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.browser.call("Emulation.setDeviceMetricsOverride", size)
    page.start()
    assert page.text("h1") == "Tiny tales"
    assert page.text("#where") == "processor, 1 thread" or "threads" in page.text("#where")
    page.browser.evaluate("document.querySelector('#longest').value = 12")
    said = ""
    for number, question in enumerate(("the tin", "and on <b>")):
        page.write(question)
        page.press(ENTER)
        page.browser.wait_for(f"document.querySelectorAll('li.assistant').length > {number}")
        page.wait("ready")
        said += f"user: {question}\nassistant: "
        answer = page.text(f"li.assistant:nth-of-type({3 * number + 2})")  # a note follows each
        assert answer == _native_answer(package, said, 12)
        said += f"{answer}\n"
    assert page.text("#speed").endswith("tokens/s")
    assert page.text("#memory").endswith("MB")
    assert page.text("#used").endswith("of 512")
    assert page.browser.evaluate("document.documentElement.scrollWidth") == 390
    assert not page.browser.evaluate("document.querySelector('li b')")  # text is never HTML


def test_escape_stops_and_a_new_chat_begins(page: Page) -> None:
    page.start()
    page.browser.evaluate("document.querySelector('#longest').value = 480")
    page.browser.evaluate("document.querySelector('#temperature').value = 1.5")
    page.browser.evaluate(ESCAPE_AT_ONCE)
    page.write("x")
    page.press(ENTER)
    page.browser.wait_for("window.stopSeen !== undefined", 60)
    page.wait("ready")
    assert page.text("li.note") == "stopped"
    assert page.browser.evaluate("window.stopSeen") is True
    page.browser.evaluate("document.querySelector('#anew').click()")
    assert page.text("#log") == ""


def test_the_second_visit_downloads_nothing(page: Page) -> None:
    page.start()
    page.open("?provider=wasm")
    page.wait("welcome")
    assert page.text("#load") == "Start"


def test_a_conversation_that_is_too_long_is_refused(page: Page) -> None:
    page.start()
    page.write("x" * 600)
    page.press(ENTER)
    page.browser.wait_for("!document.querySelector('#problem').hidden", 60)
    assert "the model reads 512" in page.text("#problem-text")


def test_threads_need_an_isolated_page(package: Path) -> None:
    assert PROGRAM is not None
    found = {}
    for isolated in (True, False):
        with (
            serve_folder(package, isolated=isolated) as address,
            open_browser(PROGRAM) as browser,
        ):
            page = Page(browser, address)
            page.start("?provider=wasm&threads=2")
            found[isolated] = page.text("#where")
    assert found == {True: "processor, 2 threads", False: "processor, 1 thread"}


def test_a_browser_without_webgpu_is_told_so(package: Path) -> None:
    assert PROGRAM is not None
    with serve_folder(package) as address, open_browser(PROGRAM, webgpu=False) as browser:
        page = Page(browser, address)
        page.open("?provider=webgpu")
        page.wait("welcome")
        assert "slower than WebGPU" in page.text("#note")
        assert page.browser.evaluate("document.querySelector('#provider').value") == "auto"


def test_what_cannot_run_says_why(page: Page, package: Path) -> None:
    page.browser.call("Page.navigate", {"url": (package / "index.html").as_uri()})
    page.browser.wait_for("document.readyState === 'complete'")
    assert "has to come from a server" in page.text("#problem-title")
    assert page.text("#problem-command") == "python -m http.server"
    script = {"source": "WebAssembly.validate = () => false"}
    page.browser.call("Page.addScriptToEvaluateOnNewDocument", script)
    page.open()
    assert page.text("#problem-title") == "This browser cannot run the model"
    page.browser.console.clear()


def test_a_download_that_breaks_off_can_be_tried_again(page: Page, package: Path) -> None:
    whole = package / "model.onnx.data"
    moved = whole.with_name("moved")
    whole.rename(moved)
    try:
        page.open("?provider=wasm")
        page.wait("welcome")
        page.press(ENTER)
        page.wait("failed")
        assert "model.onnx.data: the server answered 404" in page.text("#problem-text")
    finally:
        moved.rename(whole)
    page.browser.evaluate("document.querySelector('#again').click()")
    page.wait("ready")
    page.browser.console.clear()
