"""The proof of a web package: its own worker in a real Chromium, beside plain onnxruntime."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.target import FactTable, ProofCheck, Reference, TargetProof
from faq_onnx.errors import FaqOnnxError, PackageError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.progress import Progress
from faq_onnx.runtime.generate import DecoderRun
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.browser import Browser, find_browser, open_browser, serve_folder
from faq_onnx.targets.versions import installed_versions
from faq_onnx.targets.web_model import PAGE_CONFIG, PageConfig

__all__ = ["prove_in_browser"]

_LOGGER = logging.getLogger(__name__)
_PROVIDERS = ("wasm", "webgpu")
_NO_BROWSER = "not tried: no Chromium or Chrome on PATH or in CHROME_PATH"
# A processor that plays a graphics processor needs a minute a token for a model of 100 MB.
_TIME_LIMIT_S = 120
_PATIENCE_S = 900.0
_PIECE = 5  # tokens of the prompt at once: the others are read behind a filled cache
# How near two tokens' logits may lie, over the largest logit, to call an exchange of them a tie.
# WebAssembly computes in float32; WebGPU takes int8 activations where accuracy_level is 4, which
# moves logits of a 4-bit SmolLM2 by 4e-2 of their size.
_TIES: Mapping[str, float] = MappingProxyType({"wasm": 1e-4, "webgpu": 4e-2})
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
        provider: wasm or webgpu.
        events: Of the worker, by name.
        adapter: What WebGPU computes on.
        problem: Why there are no events.
        tried: False: the browser has no such provider.
    """

    provider: str
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
    names = [*(f"greedy tokens, {provider}" for provider in _PROVIDERS), "tokenizer"]
    if program is None:
        checks = tuple(ProofCheck(name=name, passed=None, value=_NO_BROWSER) for name in names)
        return TargetProof(target="web", checks=checks, versions=versions)
    trials = []
    with progress.stage("try it in a browser", len(_PROVIDERS), "providers") as advance:
        for provider in _PROVIDERS:
            trial, browser_version = _try(folder, provider, reference, program)
            versions |= browser_version
            trials.append(trial)
            advance(1)
    checks = tuple(
        ProofCheck(name=name, passed=passed, value=value)
        for name, (passed, value) in zip(
            names,
            [*(_judge(trial, folder, reference) for trial in trials), _judge_text(folder, trials)],
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
    folder: Path, provider: str, reference: Reference, program: str
) -> tuple[_Trial, dict[str, str]]:
    """One provider in a browser of its own; the version of that browser."""
    version: dict[str, str] = {}
    try:
        with serve_folder(folder) as address, open_browser(program) as browser:
            product = browser.call("Browser.getVersion")["product"]
            version["browser"] = str(product)
            browser.open(f"{address}{PAGE_CONFIG}")  # same origin, and it loads nothing by itself
            adapter = _adapter(browser) if provider == "webgpu" else ""
            if adapter is None:
                text = "not tried: this browser offers no WebGPU here"
                return _Trial(provider, problem=text, tried=False), version
            events = browser.evaluate(_script(provider, reference), _PATIENCE_S)
            return _Trial(provider, events, adapter), version
    except (PackageError, OSError) as error:
        return _Trial(provider, problem=str(error)), version


def _script(provider: str, reference: Reference) -> str:
    load = {"command": "load", "provider": provider, "threads": 1}
    prove = {
        "command": "prove",
        "ids": list(reference.prompt),
        "steps": max(len(reference.tokens), 1),
        "pieces": _PIECE,
        "seconds": _TIME_LIMIT_S,
    }
    encode = {"command": "encode", "text": _SAMPLE}
    words = {"load": load, "prove": prove, "encode": encode}
    return _SCRIPT % {name: json.dumps(word) for name, word in words.items()}


def _adapter(browser: Browser) -> str | None:
    """What WebGPU computes on; None without it."""
    found = browser.evaluate(
        "navigator.gpu ? navigator.gpu.requestAdapter().then((a) => a && (a.info.description || "
        "[a.info.vendor, a.info.architecture].join(' '))) : null"
    )
    return None if found is None else str(found)


def _judge(trial: _Trial, folder: Path, reference: Reference) -> tuple[bool | None, str]:
    if not trial.tried:
        return None, trial.problem
    failed = trial.events.get("failed", {}).get("message", "")
    if trial.problem or failed:
        return False, trial.problem or str(failed)
    if reference.problem:
        return None, f"nothing to compare with: {reference.problem}"
    tokens = [int(token) for token in trial.events["proof"]["tokens"]]
    wanted = list(reference.tokens)
    where = f" ({trial.adapter})" if trial.adapter else ""
    extent = f"{len(tokens)} tokens{where}"
    if len(tokens) < len(wanted):
        extent = f"{len(tokens)} of {len(wanted)} tokens in the time{where}"
    same = next((n for n, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), None)
    if same is None:
        return True, f"equal onnxruntime's, {extent}"
    gap = _gap(folder, reference, tokens, same)
    if gap is not None and gap <= _TIES[trial.provider]:
        text = f"equal onnxruntime's for {same} tokens, then a tie: logits {gap:.1g} of their size"
        return True, f"{text} apart, {extent}"
    return False, f"DIFFER: browser {tokens}, onnxruntime {wanted}{where}"


def _gap(folder: Path, reference: Reference, tokens: Sequence[int], same: int) -> float | None:
    """How far apart plain onnxruntime sees the two tokens where they part, over its largest."""
    try:
        with exact_twin(folder / "model.onnx") as exact:
            run = DecoderRun(open_session(exact))
            row = run.step(np.array([[*reference.prompt, *tokens[:same]]], np.int64))[0]
    except FaqOnnxError:
        return None
    return float(abs(row[reference.tokens[same]] - row[tokens[same]]) / (abs(row).max() or 1.0))


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
                trial.provider,
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
