"""The proof of a web package: its own worker in a real Chromium, beside plain onnxruntime."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.target import FactTable, ProofCheck, Reference, TargetProof
from faq_onnx.errors import PackageError
from faq_onnx.progress import Progress
from faq_onnx.runtime.reference import FLOAT_ROUNDING, token_agreement
from faq_onnx.targets.browser import Browser, find_browser, open_browser, serve_folder
from faq_onnx.targets.versions import installed_versions
from faq_onnx.targets.web_model import PAGE_CONFIG, PageConfig

__all__ = ["page_script", "prove_in_browser"]

_LOGGER = logging.getLogger(__name__)
# Ways to run it; packed: WebAssembly computes with low-bit weights, too.
_PROVIDERS = ("wasm", "wasm, packed", "webgpu")
_NO_BROWSER = "not tried: no Chromium or Chrome on PATH or in CHROME_PATH"
# A processor that plays a graphics processor needs a minute a token for a model of 100 MB.
_TIME_LIMIT_S = 120
_PATIENCE_S = 900.0
_PIECE = 5  # tokens of the prompt at once: the others are read behind a filled cache
# WebAssembly computes low-bit products in float32; WebGPU takes int8 activations where
# accuracy_level is 4, which moved the logits of a 4-bit SmolLM2 by 4e-2 of their size natively.
_ROUNDING: Mapping[str, float] = MappingProxyType({"webgpu": 4e-2})
_SAMPLE = "Hello, world!\n\n  Zwölf Boxkämpfer jagen 日本語 über 1234 (a_b) 🙂 don't\tstop"

# The page's worker, told what to do; the promise is its last event.
_SCRIPT = """
new Promise((resolve, reject) => {
  const worker = new Worker("worker.mjs", {type: "module"});
  const events = {};
  worker.onerror = (event) => reject(new Error(event.message || "the worker cannot be loaded"));
  worker.onmessage = ({data}) => {
    events[data.event] = data;
    if (data.event === "ready") worker.postMessage(%(prove)s);
    if (data.event === "proof") worker.postMessage(%(encode)s);
    if (data.event === "encoded" || data.event === "failed") {
      worker.terminate();
      resolve(events);
    }
  };
  worker.postMessage(%(load)s);
})
"""


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What one provider did.

    Attributes:
        way: One of `_PROVIDERS`.
        events: Of the worker, by name.
        adapter: What WebGPU computes on.
        problem: Why there are no events.
        tried: False: the browser has no such provider.
    """

    way: str
    events: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapter: str = ""
    problem: str = ""
    tried: bool = True


def prove_in_browser(folder: Path, reference: Reference, progress: Progress) -> TargetProof:
    """Whether tokens in a browser equal plain onnxruntime's.

    Args:
        folder: The package.
        reference: Prompt and tokens.
        progress: Receives one stage.
    """
    config = PageConfig.load(folder / PAGE_CONFIG)
    versions = installed_versions("onnxruntime", "tokenizers") | config.libraries
    program = find_browser()
    ways = [way for way in _PROVIDERS if config.unpacked or "packed" not in way]
    names = [*(f"greedy tokens, {way}" for way in ways), "tokenizer"]
    if program is None:
        checks = tuple(ProofCheck(name=name, passed=None, value=_NO_BROWSER) for name in names)
        return TargetProof(target="web", checks=checks, versions=versions)
    trials = []
    with progress.stage("try it in a browser", len(ways), "providers") as advance:
        for way in ways:
            trial, found = _try(folder, way, reference, program, float16=config.float16)
            versions |= found
            trials.append(trial)
            advance(1)
    checks = tuple(
        ProofCheck(name=name, passed=passed, value=value)
        for name, (passed, value) in zip(
            names,
            [*(_judge(trial, reference) for trial in trials), _judge_text(folder, trials)],
            strict=True,
        )
    )
    for check in checks:
        if check.passed is False:
            _LOGGER.warning("%s: %s", check.name, check.value)
    return TargetProof(
        target="web", checks=checks, versions=versions, tables=_figures(trials, versions)
    )


def _try(
    folder: Path, way: str, reference: Reference, program: str, *, float16: bool
) -> tuple[_Trial, dict[str, str]]:
    """One provider in a browser of its own; the version of that browser."""
    version: dict[str, str] = {}
    try:
        with serve_folder(folder) as address, open_browser(program) as browser:
            product = browser.call("Browser.getVersion")["product"]
            version["browser"] = str(product)
            browser.open(f"{address}{PAGE_CONFIG}")  # same origin, and it loads nothing by itself
            provider, _, packed = way.partition(", ")
            adapter = ""
            if provider == "webgpu":
                adapter, why_not = _adapter(browser, float16=float16)
                if why_not:
                    return _Trial(way, problem=why_not, tried=False), version
            steps = max(len(reference.tokens), 1)
            script = page_script(provider, reference.prompt, steps, packed=bool(packed))
            events = browser.evaluate(script, _PATIENCE_S)
            return _Trial(way, events, adapter), version
    except (PackageError, OSError) as error:
        return _Trial(way, problem=str(error)), version


def page_script(  # noqa: PLR0913 - what can be asked of the worker
    provider: str,
    ids: Sequence[int],
    steps: int,
    *,
    threads: int = 1,
    packed: bool = False,
    seconds: float = _TIME_LIMIT_S,
    pieces: int = _PIECE,
) -> str:
    """JavaScript that loads the package, continues a prompt and gives the worker's events.

    Args:
        provider: wasm or webgpu.
        ids: The prompt.
        steps: Most tokens.
        threads: Of WebAssembly.
        packed: WebAssembly computes with low-bit weights, too.
        seconds: After them no further token is begun.
        pieces: Tokens of the prompt that are read at once.
    """
    prove = {"ids": list(ids), "steps": steps, "pieces": pieces, "seconds": seconds}
    words = {
        "load": {"command": "load", "provider": provider, "threads": threads, "packed": packed},
        "prove": {"command": "prove", **prove},
        "encode": {"command": "encode", "text": _SAMPLE},
    }
    return _SCRIPT % {name: json.dumps(word) for name, word in words.items()}


def _adapter(browser: Browser, *, float16: bool) -> tuple[str, str]:
    """What WebGPU computes on, or why the page would not take it."""
    found = browser.evaluate(
        "navigator.gpu ? navigator.gpu.requestAdapter().then((a) => a && {half: "
        "a.features.has('shader-f16'), name: a.info.description || "
        "[a.info.vendor, a.info.architecture].join(' ')}) : null"
    )
    if found is None:
        return "", "not tried: this browser offers no WebGPU here"
    name = str(found["name"])
    if float16 and not found["half"]:
        return name, f"not tried: {name} has no float16 (shader-f16); the page takes wasm there"
    return name, ""


def _judge(trial: _Trial, reference: Reference) -> tuple[bool | None, str]:
    if not trial.tried:
        return None, trial.problem
    failed = trial.events.get("failed", {}).get("message", "")
    if trial.problem or failed:
        return False, trial.problem or str(failed)
    if reference.problem:
        return None, f"nothing to compare with: {reference.problem}"
    tokens = [int(token) for token in trial.events["proof"]["tokens"]]
    agreement = token_agreement(reference, tokens, _ROUNDING.get(trial.way, FLOAT_ROUNDING))
    text = agreement.text
    if len(tokens) < len(reference.tokens):
        text += f", no more in {_TIME_LIMIT_S} s"
    return agreement.passed, f"{text} ({trial.adapter})" if trial.adapter else text


def _judge_text(folder: Path, trials: Sequence[_Trial]) -> tuple[bool | None, str]:
    found = next((t.events["encoded"]["ids"] for t in trials if "encoded" in t.events), None)
    if found is None:
        return None, "not tried: the model did not start"
    path = str(folder / "tokenizer.json")
    wanted = Tokenizer.from_file(path).encode(_SAMPLE, add_special_tokens=False).ids
    if found == wanted:
        return True, f"a sample of {len(wanted)} tokens is read alike"
    return False, f"DIFFERS: browser {found}, tokenizers {wanted}"


def _figures(trials: Sequence[_Trial], versions: Mapping[str, str]) -> tuple[FactTable, ...]:
    rows: list[tuple[str | int | float, ...]] = []
    for trial in trials:
        if "proof" not in trial.events:
            continue
        ready, proof = trial.events["ready"], trial.events["proof"]
        steps = len(proof["tokens"]) - 1
        rows.append(
            (
                trial.way,
                trial.adapter or "1 thread",
                round(ready["seconds"], 1),
                round(proof["readTokens"] / max(proof["readSeconds"], 1e-6), 2),
                round(steps / max(proof["seconds"], 1e-6), 2) if steps else "-",
                round(proof["memory"]["heap"] / 1e6),
                round(proof["memory"]["gpu"] / 1e6),
            )
        )
    if not rows:
        return ()
    header = (*("runs on", "with", "load s", "prompt tokens/s", "tokens/s", "heap MB", "GPU MB"),)
    title = f"in {versions.get('browser', 'a browser')} on this machine"
    return (FactTable(title=title, header=header, rows=tuple(rows)),)
