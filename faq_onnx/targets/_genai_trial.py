"""The process that holds onnxruntime-genai: greedy tokens for the prompt ids on stdin.

`python -m faq_onnx.targets._genai_trial FOLDER STEPS`, a JSON list in, a JSON list out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from faq_onnx.graph.exact import exact_twin
from faq_onnx.targets.genai_config import MODEL_NAME

__all__ = ["main"]


def main(folder: str, steps: int) -> None:
    """Load the package and write the generated ids as the last line of stdout."""
    import onnxruntime_genai as og  # type: ignore[import-untyped]  # noqa: PLC0415 - optional

    prompt = json.loads(sys.stdin.read())
    config = og.Config(folder)
    with exact_twin(Path(folder) / MODEL_NAME) as exact:
        config.overlay(json.dumps({"model": {"decoder": {"filename": exact.name}}}))
        model = og.Model(config)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt) + steps, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(prompt)
    tokens: list[int] = []
    while not generator.is_done() and len(tokens) < steps:
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    sys.stdout.write(f"\n{json.dumps(tokens)}\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
