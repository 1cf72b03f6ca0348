"""The files around the tiny decoder, and feeds for it; see `faq_onnx.testing`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from tokenizers import (  # type: ignore[import-untyped]
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
)

from faq_onnx.testing._llama import RMS_EPSILON, ROPE_BASE, TinyLlama, tiny_llama_onnx

__all__ = ["tiny_feeds", "tiny_llama_config", "tiny_tokenizer", "write_tiny_llama"]

Array = npt.NDArray[np.generic]
DEFAULT = TinyLlama()


def tiny_llama_config(spec: TinyLlama = DEFAULT) -> dict[str, object]:
    """The config.json that belongs to the decoder."""
    return {
        "architectures": ["Qwen2ForCausalLM" if spec.qkv_bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if spec.qkv_bias else "llama",
        "bos_token_id": 256,
        "eos_token_id": 257,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "max_position_embeddings": 512,
        "num_attention_heads": spec.heads,
        "num_hidden_layers": spec.layers,
        "num_key_value_heads": spec.kv_heads,
        "rms_norm_eps": RMS_EPSILON,
        "rope_theta": ROPE_BASE,
        "tie_word_embeddings": spec.tie is not None,
        "torch_dtype": spec.dtype,
        "vocab_size": spec.vocabulary,
    }


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE: 256 bytes, `<s>` (256), `</s>` (257) and six merges: 264 tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), ("e", "r"), ("o", "n")]
    tokens = [*letters, "<s>", "</s>", *(left + right for left, right in merges)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def write_tiny_llama(folder: Path, spec: TinyLlama = DEFAULT) -> Path:
    """Write model.onnx with config.json and the tokenizer files; return the path of model.onnx."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    ir.save(tiny_llama_onnx(spec), path)
    config = json.dumps(tiny_llama_config(spec), indent=2)
    (folder / "config.json").write_text(config, encoding="utf-8")
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 512,
    }
    text = json.dumps(tokenizer_config, indent=2)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    return path


def tiny_feeds(
    spec: TinyLlama = DEFAULT, *, batch: int = 2, length: int = 16, seed: int = 0
) -> dict[str, Array]:
    """Random tokens with an empty cache, as a feed of `tiny_llama_onnx(spec)`."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {
        "input_ids": rng.integers(0, spec.vocabulary, (batch, length)),
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
    }
    empty = np.zeros((batch, spec.kv_heads, 0, spec.head_dim), spec.dtype)
    for layer in range(spec.layers):
        feeds[f"past_key_values.{layer}.key"] = empty
        feeds[f"past_key_values.{layer}.value"] = empty
    return feeds
