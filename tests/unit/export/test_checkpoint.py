"""Checkpoints are exported in a process of their own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.errors import ExportError
from faq_onnx.export import checkpoint, resolve_source
from faq_onnx.progress import SILENT, Advance
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_config, tiny_tokenizer

SPEC = TinyLlama(hidden=32, heads=4, kv_heads=2, intermediate=48)
_Weights = dict[str, npt.NDArray[np.float32]]

needs_extra = pytest.mark.skipif(
    importlib.util.find_spec("optimum") is None or importlib.util.find_spec("gguf") is None,
    reason='needs pip install "faq-onnx[export]"',
)


class _Steps:
    def __init__(self) -> None:
        self.done = self.total = 0.0

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        assert title.startswith("export")
        assert unit == "step"
        self.total = total

        def _advance(steps: float) -> None:
            self.done += steps

        yield _advance

    def note(self, text: str) -> None:
        pytest.fail(text)


def _weights() -> _Weights:
    rng = np.random.default_rng(0)
    key_rows = SPEC.kv_heads * SPEC.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (SPEC.vocabulary, SPEC.hidden)}
    for layer in range(SPEC.layers):
        shapes |= {
            f"model.layers.{layer}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (SPEC.hidden, SPEC.hidden),
                "self_attn.k_proj": (key_rows, SPEC.hidden),
                "self_attn.v_proj": (key_rows, SPEC.hidden),
                "self_attn.o_proj": (SPEC.hidden, SPEC.hidden),
                "mlp.gate_proj": (SPEC.intermediate, SPEC.hidden),
                "mlp.up_proj": (SPEC.intermediate, SPEC.hidden),
                "mlp.down_proj": (SPEC.hidden, SPEC.intermediate),
                "input_layernorm": (SPEC.hidden,),
                "post_attention_layernorm": (SPEC.hidden,),
            }.items()
        }
    shapes |= {"model.norm": (SPEC.hidden,), "lm_head": (SPEC.vocabulary, SPEC.hidden)}
    return {
        f"{name}.weight": rng.normal(scale=0.3, size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny Llama."""
    path = tmp_path / "hf"
    path.mkdir()
    save_file(_weights(), path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(tiny_llama_config(SPEC)))
    tiny_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"})
    )
    return path


def _logits(model: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    session = open_session(model)
    logits = session.run(["logits"], decoder_feeds(session.get_inputs(), ids))[0]
    return np.asarray(logits, np.float32)


def _torch_logits(folder: Path, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    script = (
        "import json, sys, torch, transformers\n"
        "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "ids = torch.tensor(json.loads(sys.argv[2]))\n"
        "print(json.dumps(m(ids).logits.tolist()))\n"
    )
    command = [sys.executable, "-c", script, str(folder), json.dumps(ids.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return np.asarray(json.loads(done.stdout.splitlines()[-1]), np.float32)


@needs_extra
@pytest.mark.slow
def test_a_hugging_face_folder(folder: Path, tmp_path: Path) -> None:
    steps = _Steps()
    source = resolve_source(str(folder), tmp_path / "work", steps)
    assert source.exported
    assert source.onnx_path == tmp_path / "work" / "export" / "model.onnx"
    assert steps.done == steps.total == 3
    assert source.companion("config.json")
    assert source.companion("tokenizer.json")
    ids = np.arange(3, 27).reshape(2, 12)
    exact = _torch_logits(folder, ids)
    # Two float32 evaluations of one function; their order of summation differs.
    np.testing.assert_allclose(_logits(source.onnx_path, ids), exact, atol=1e-4 * exact.std())


@needs_extra
@pytest.mark.slow
def test_a_gguf_file_equals_its_origin(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    _write_gguf(path)
    source = resolve_source(str(path), tmp_path / "work", SILENT)
    assert source.folder is not None
    names = {file.name for file in source.folder.iterdir()}
    assert {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not names & {"tokenizer.model", "vocab.json", "merges.txt"}
    tokenizer = Tokenizer.from_file(str(source.companion("tokenizer.json")))
    expected = tiny_tokenizer().encode("the man in the tin").ids
    assert tokenizer.encode("the man in the tin").ids == expected  # and no BOS before it
    config = json.loads((source.folder / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")
    assert config["add_bos_token"] is False
    ids = np.arange(3, 27).reshape(2, 12)
    exact = _torch_logits(folder, ids)
    np.testing.assert_allclose(_logits(source.onnx_path, ids), exact, atol=1e-4 * exact.std())


def _write_gguf(path: Path) -> None:
    from gguf import GGUFWriter  # noqa: PLC0415 - optional

    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(SPEC.layers)
    writer.add_context_length(512)
    writer.add_embedding_length(SPEC.hidden)
    writer.add_feed_forward_length(SPEC.intermediate)
    writer.add_head_count(SPEC.heads)
    writer.add_head_count_kv(SPEC.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(SPEC.head_dim)
    writer.add_vocab_size(SPEC.vocabulary)
    model = json.loads(tiny_tokenizer().to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokens += [f"<unused{i}>" for i in range(len(tokens), SPEC.vocabulary)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in {"<s>", "</s>"} else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(value=False)
    for name, weight in _weights().items():
        writer.add_tensor(_gguf_name(name), _gguf_rows(name, weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    for old, new in (
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("self_attn.o_proj", "attn_output"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
    ):
        name = name.replace(old, new)
    return name


def _gguf_rows(name: str, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """GGUF interleaves the two rotary halves of every head in q_proj and k_proj."""
    if "q_proj" not in name and "k_proj" not in name:
        return weight
    halves = weight.reshape(-1, 2, SPEC.head_dim // 2, SPEC.hidden)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


@needs_extra
@pytest.mark.slow
def test_a_failing_export_shows_why_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    with pytest.raises(ExportError, match=r"(?s)exit code 1.*no_such_model"):
        resolve_source(str(folder), tmp_path / "work", SILENT)
    assert not (tmp_path / "work" / "export").exists()


def test_a_missing_extra_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_NEEDED", ("numpy", "no_such_exporter.onnx"))
    with pytest.raises(
        ExportError, match=r'needs no_such_exporter\.onnx: pip install "faq-onnx\[export\]"'
    ):
        resolve_source(str(folder), tmp_path, SILENT)


def test_a_killed_exporter_is_explained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\necho 'last words' >&2\nkill -9 $$\n")
    killer.chmod(0o755)
    monkeypatch.setattr(checkpoint, "_NEEDED", ())
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ExportError, match=r"(?s)want of memory.*last words"):
        resolve_source(str(folder), tmp_path / "work", SILENT)
