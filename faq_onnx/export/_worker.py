"""The process that holds torch: `python -m faq_onnx.export._worker CHECKPOINT OUTPUT`.

Writes model.onnx, config and tokenizer into OUTPUT, and "step: ..." lines to stdout; everything
else that the libraries say goes to stderr, which the parent shows when this fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["main"]

_TASK = "text-generation-with-past"


def main(checkpoint: str, output: Path) -> None:
    """Load a checkpoint as float32, export it, and save its tokenizer."""
    path = Path(checkpoint)
    if path.suffix.lower() == ".gguf" and path.is_file():
        _export_gguf(path, output)
    else:
        _export_pretrained(checkpoint, output)
    _tidy_tokenizer(output)
    _step("tokenizer")


def _step(text: str) -> None:
    sys.stdout.write(f"step: {text}\n")
    sys.stdout.flush()


def _export_pretrained(checkpoint: str, output: Path) -> None:
    import torch  # noqa: PLC0415 - this process alone may hold torch
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(checkpoint, torch_dtype=torch.float32)
    _step("load")
    _export_model(model, output)
    _save_tokenizer(checkpoint, output)


def _export_gguf(path: Path, output: Path) -> None:
    import torch  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, torch_dtype=torch.float32
    )
    _step("load")
    _export_model(model, output)
    _save_tokenizer(str(path.parent), output, gguf_file=path.name)
    _apply_gguf_tokens(path, output)


def _export_model(model: Any, output: Path) -> None:
    from optimum.exporters.onnx import onnx_export_from_model  # noqa: PLC0415

    model.config.use_cache = True
    onnx_export_from_model(model, output, task=_TASK, do_validation=False)
    _step("export")


def _save_tokenizer(source: str, output: Path, **options: str) -> None:
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, KeyError, ImportError) as error:
        # A model without a tokenizer is still a model: calibration says what it misses.
        sys.stderr.write(f"no tokenizer: {error}\n")
        return
    tokenizer.save_pretrained(output)


def _tidy_tokenizer(output: Path) -> None:
    """Drop what tokenizer.json replaces; transformers copies a whole GGUF as tokenizer.model."""
    if not (output / "tokenizer.json").is_file():
        return
    for name in ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"):
        (output / name).unlink(missing_ok=True)


def _apply_gguf_tokens(path: Path, output: Path) -> None:
    """Give the tokenizer the GGUF's own special tokens.

    transformers 4.57 ignores `tokenizer.ggml.add_bos_token` and adds a BOS to every text, and
    names the BOS as EOS for Llama files with a GPT-2 vocabulary.
    """
    from gguf import GGUFReader  # noqa: PLC0415

    fields = GGUFReader(str(path)).fields
    names = _token_names(output, fields)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (output / file).is_file():
            _update_json(output / file, names)
    if "tokenizer.ggml.add_bos_token" not in fields:
        return
    if not fields["tokenizer.ggml.add_bos_token"].contents():
        _update_json(output / "tokenizer_config.json", {"add_bos_token": False})
        _update_json(output / "tokenizer.json", {"post_processor": None})


def _token_names(output: Path, fields: Any) -> dict[str, str]:
    from tokenizers import Tokenizer  # type: ignore[import-untyped]  # noqa: PLC0415

    if not (output / "tokenizer.json").is_file():
        return {}
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    names: dict[str, str] = {}
    for key, role in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        field = fields.get(f"tokenizer.ggml.{key}_token_id")
        token = None if field is None else tokenizer.id_to_token(int(field.contents()))
        if token is not None:
            names[role] = token
    return names


def _update_json(path: Path, changes: dict[str, Any]) -> None:
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    content.update(changes)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
