"""Speed of web packages in a headless Chromium, on each provider.

python tools/bench_web.py out-web/ --runs-on wasm:1 wasm:2 packed:1 webgpu --prompt 32 --new 16

packed: WebAssembly that unpacks low-bit weights at every token, as onnxruntime-web does by itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from faq_onnx.errors import PackageError
from faq_onnx.targets.browser import find_browser, open_browser, serve_folder
from faq_onnx.targets.web_model import PAGE_CONFIG, read_json
from faq_onnx.targets.web_proof import page_script

PATIENCE_S = 3600.0


def measure(folder: Path, provider: str, threads: int, prompt: int, new: int) -> str:
    """One line: seconds to load, tokens a second, memory."""
    vocabulary = int(read_json(folder / "config.json").get("vocab_size", 2))
    ids = np.random.default_rng(0).integers(0, vocabulary, prompt).tolist()
    program = find_browser()
    if program is None:
        raise PackageError("no Chromium here: apt-get install chromium")
    with serve_folder(folder) as address, open_browser(program) as browser:
        browser.open(f"{address}{PAGE_CONFIG}")
        script = page_script(
            provider.replace("packed", "wasm"),
            ids,
            new,
            threads=threads,
            packed=provider == "packed",
            seconds=PATIENCE_S,
            pieces=prompt,
        )
        events = browser.evaluate(script, PATIENCE_S)
    if "failed" in events:
        return f"failed: {events['failed']['message']}"
    ready, proof = events["ready"], events["proof"]
    decode = (len(proof["tokens"]) - 1) / proof["seconds"]
    return (
        f"load {ready['seconds']:.1f} s, prompt {prompt / proof['readSeconds']:.2f} tokens/s, "
        f"then {decode:.2f} tokens/s, memory {json.dumps(proof['memory'])}"
    )


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path)
    parser.add_argument("--runs-on", nargs="+", default=["wasm:1", "wasm:2", "webgpu"])
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=16)
    args = parser.parse_args()
    for wish in args.runs_on:
        provider, _, threads = wish.partition(":")
        found = measure(args.package, provider, int(threads or 1), args.prompt, args.new)
        print(f"{wish:<8} {found}", flush=True)


if __name__ == "__main__":
    main()
