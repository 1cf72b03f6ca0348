"""Make tiny random decoders and export them, for tests/fixtures/exporters.

Two environments are needed (see tests/fixtures/exporters/README.md); run one verb in each:

    make_exporter_fixtures.py models  HF_DIR            # transformers < 4.58
    make_exporter_fixtures.py optimum HF_DIR OUT_DIR    # optimum-onnx 0.1
    make_exporter_fixtures.py dynamo  HF_DIR OUT_DIR    # torch 2.13
    make_exporter_fixtures.py genai   HF_DIR OUT_DIR    # transformers >= 5
    make_exporter_fixtures.py mobius  HF_DIR OUT_DIR    # transformers >= 5
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import argparse
import importlib
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

EXTERNAL = ("genai-llama-untied-fp32", "mobius-qwen3-untied-fp32")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3", "phi3")
COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def module(name: str) -> Any:
    """Import late and untyped: no single environment has all of the exporters."""
    return importlib.import_module(name)


def model_config(architecture: str, *, tied: bool) -> Any:
    """The tiny configuration of one architecture."""
    transformers = module("transformers")
    fields = dict(COMMON, tie_word_embeddings=tied)
    if architecture == "gemma3":
        return transformers.Gemma3TextConfig(
            **fields,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=16,
        )
    if architecture == "phi3":
        del fields["head_dim"]  # hidden_size / num_attention_heads
        return transformers.Phi3Config(**fields)
    names = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}
    return getattr(transformers, names[architecture])(**fields)


def random_model(architecture: str, *, tied: bool) -> Any:
    """A model whose parameters are random bfloat16 numbers held in float32."""
    transformers = module("transformers")
    torch.manual_seed(sum(architecture.encode()))
    model = transformers.AutoModelForCausalLM.from_config(model_config(architecture, tied=tied))
    gain_centre = 0.0 if architecture == "gemma3" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_parameter(name, tuple(parameter.shape), gain_centre))
    return model.float().eval()


def random_parameter(name: str, shape: tuple[int, ...], gain_centre: float) -> torch.Tensor:
    """Random values for one parameter: matrices get a few outlier input channels."""
    if name.endswith("norm.weight"):
        value = gain_centre + 0.2 * torch.randn(shape)
    elif len(shape) == 1:
        value = 0.1 * torch.randn(shape)
    else:
        value = torch.randn(shape) * shape[-1] ** -0.5
        channels = torch.randperm(shape[-1])[:3]
        value[:, channels] *= 6.0
    return value.bfloat16().float()


def make_models(hf_dir: Path) -> None:
    """Write every architecture, tied and untied, as Hugging Face folders."""
    for architecture in ARCHITECTURES:
        for tied in (False, True):
            folder = hf_dir / f"{architecture}-{'tied' if tied else 'untied'}"
            random_model(architecture, tied=tied).save_pretrained(folder)
            add_tokenizer(folder)


def add_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of exactly 160 entries: genai's builder wants one."""
    tokenizers = module("tokenizers")
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    vocab.update({f"w{i}": i for i in range(4, COMMON["vocab_size"])})
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    module("transformers").PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",  # noqa: S106
        eos_token="</s>",  # noqa: S106
        pad_token="<pad>",  # noqa: S106
        unk_token="<unk>",  # noqa: S106
    ).save_pretrained(folder)


def export_optimum(hf_dir: Path, out_dir: Path) -> None:
    """optimum-onnx: float32 and float16, tied and untied."""
    main_export = module("optimum.exporters.onnx").main_export
    for source in sorted(hf_dir.iterdir()):
        # Without post-processing a tied head stays a second, equal initializer.
        for suffix, dtype in (("", "fp32"), ("", "fp16"), ("dup", "fp32")):
            if suffix and source.name != "llama-tied":
                continue
            target = out_dir / f"optimum-{source.name}{suffix}-{dtype}"
            scratch = target.with_suffix(".tmp")
            main_export(
                str(source),
                output=scratch,
                task="text-generation-with-past",
                dtype=dtype,
                do_validation=False,
                no_post_process=bool(suffix),
            )
            keep(scratch, target, source)


class DynamoDecoder(torch.nn.Module):
    """A decoder with flat past/present tensors, as `torch.onnx.export(dynamo=True)` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.m = model

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits [B, S, V] and, per layer, key and value [B, kv_heads, past + S, head_dim]."""
        cache = module("transformers").DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.m(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        present = [
            x for layer in result.past_key_values.layers for x in (layer.keys, layer.values)
        ]
        return (result.logits, *present)


class FlatLinear(torch.nn.Linear):
    """A linear layer that flattens its input to [B * S, K] itself: it becomes Gemm transB=1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map x [..., K] to [..., N]."""
        flat = torch.nn.functional.linear(x.reshape(-1, self.in_features), self.weight, self.bias)
        return flat.reshape(*x.shape[:-1], self.out_features)


def export_dynamo(hf_dir: Path, out_dir: Path) -> None:
    """torch.onnx dynamo: opset 20 and 23, tied and untied, and Gemm variants."""
    for source in sorted(hf_dir.iterdir()):
        for opset in (20, 23):
            export_one_dynamo(source, out_dir / f"dynamo{opset}-{source.name}-fp32", opset)
    target = out_dir / "dynamo20-qwen2-untied-gemm-fp32"
    export_one_dynamo(hf_dir / "qwen2-untied", target, 20, flat=True)


def export_one_dynamo(source: Path, target: Path, opset: int, *, flat: bool = False) -> None:
    """Export one folder with past key and value inputs.

    Opset 23 gets position_ids too: without them RotaryEmbedding's caches have batch 1, which
    ONNX and onnxruntime refuse for a larger batch.
    """
    transformers = module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if flat:
        for layer in model.modules():
            if type(layer) is torch.nn.Linear:
                layer.__class__ = FlatLinear
    batch, sequence, past = 2, 3, 5
    cache_shape = (batch, COMMON["num_key_value_heads"], past, COMMON["head_dim"])
    caches = [torch.randn(cache_shape) for _ in range(4)]
    ids = torch.randint(3, 160, (batch, sequence))
    mask = torch.ones(batch, past + sequence, dtype=torch.int64)
    positions = torch.arange(past, past + sequence).repeat(batch, 1) if opset >= 23 else None
    dims = dict.fromkeys((0, 1), torch.export.Dim.DYNAMIC)
    cache_dims = [{0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for _ in caches]
    names = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(["position_ids"] if opset >= 23 else [])]
    target.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        DynamoDecoder(model).train(mode=False),
        (ids, mask, positions, caches),
        target / "model.onnx",
        dynamo=True,
        opset_version=opset,
        input_names=[*inputs, *(f"past_key_values.{n}" for n in names)],
        output_names=["logits", *(f"present.{n}" for n in names)],
        dynamic_shapes=(dims, dims, None if positions is None else dims, cache_dims),
        external_data=False,
    )
    drop_traces(target / "model.onnx")
    shutil.copy(source / "config.json", target / "config.json")


def drop_traces(path: Path) -> None:
    """Drop metadata that names this machine's folders or is large; keep the name scopes."""
    onnx = module("onnx")
    model = onnx.load(path)
    for node in model.graph.node:
        kept = [
            (entry.key, entry.value)
            for entry in node.metadata_props
            if entry.key in ("namespace", "pkg.torch.onnx.name_scopes")
        ]
        del node.metadata_props[:]
        for key, value in kept:
            node.metadata_props.add(key=key, value=value)
    onnx.save(model, path)


def export_genai(hf_dir: Path, out_dir: Path) -> None:
    """onnxruntime-genai's builder; float16 exists for the CUDA and DML providers only."""
    for source in sorted(hf_dir.iterdir()):
        for dtype, provider in (("fp32", "cpu"), ("fp16", "cuda")):
            target = out_dir / f"genai-{source.name}-{dtype}"
            scratch = target.with_suffix(".tmp")
            cache = target.with_suffix(".cache")
            command = [sys.executable, __file__, "builder"]
            command += ["-i", str(source), "-o", str(scratch), "-c", str(cache)]
            command += ["-p", dtype, "-e", provider]
            if "gemma" in source.name:
                command += ["--extra_options", "windowed_kv_cache=false"]
            run(command)
            shutil.rmtree(cache, ignore_errors=True)
            if (scratch / "model.onnx").exists():
                keep(scratch, target, source)


def run_builder(*arguments: str) -> None:
    """`python -m onnxruntime_genai.models.builder`, mended for Gemma 3.

    transformers 5 keeps one set of rotary parameters per kind of layer; the builder 0.18 reads
    the old flat form for gemma3_text, so it is given that.
    """
    # The builder is run as a script, so its modules are top-level ones.
    folder = Path(module("onnxruntime_genai.models").__path__[0])
    sys.path.insert(0, str(folder))
    gemma = module("builders.gemma").Gemma3Model

    def flat_rope(self: Any, config: Any) -> None:
        kinds = config.rope_parameters
        config.rope_theta = kinds["full_attention"]["rope_theta"]
        config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
        config.rope_parameters = dict(kinds["full_attention"])
        super(gemma, self).make_config_init(config)

    gemma.make_config_init = flat_rope
    sys.argv = ["builder", *arguments]
    runpy.run_path(str(folder / "builder.py"), run_name="__main__")


def export_mobius(hf_dir: Path, out_dir: Path) -> None:
    """mobius: portable ONNX (ep default) and the fused form (ep cpu)."""
    mobius = str(Path(sys.executable).parent / "mobius")
    for source in sorted(hf_dir.iterdir()):
        for name, provider, dtype in (
            ("mobius", "default", "f32"),
            ("mobius", "default", "f16"),
            ("mobiuscpu", "cpu", "f32"),
        ):
            target = out_dir / f"{name}-{source.name}-{dtype.replace('f', 'fp')}"
            scratch = target.with_suffix(".tmp")
            command = [mobius, "build", "--config", str(source), str(scratch)]
            run([*command, "--ep", provider, "--dtype", dtype])
            if (scratch / "model.onnx").exists():
                keep(scratch, target, source)


def run(command: list[str]) -> None:
    """Run one exporter and say which ones fail."""
    result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if result.returncode:
        print("FAILED", " ".join(command), result.stderr[-600:], flush=True)


def keep(scratch: Path, target: Path, source: Path) -> None:
    """Keep the model and the configuration only; weights go inline except for two fixtures."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    onnx = module("onnx")
    if target.name in EXTERNAL:
        for path in scratch.glob("model.onnx*"):
            shutil.move(path, target / path.name)
    else:
        onnx.save(onnx.load(scratch / "model.onnx"), target / "model.onnx")
    model = onnx.load(target / "model.onnx", load_external_data=False)
    if "/" in model.graph.name:
        model.graph.name = source.name  # mobius puts the folder there
        onnx.save(model, target / "model.onnx")
    shutil.copy(source / "config.json", target / "config.json")
    shutil.rmtree(scratch)


def main() -> int:
    """Run one verb."""
    if sys.argv[1:2] == ["builder"]:
        run_builder(*sys.argv[2:])
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    parser.add_argument("folders", nargs="+", type=Path)
    arguments = parser.parse_args()
    verbs: dict[str, Callable[..., None]] = {
        "models": make_models,
        "optimum": export_optimum,
        "dynamo": export_dynamo,
        "genai": export_genai,
        "mobius": export_mobius,
    }
    verbs[arguments.verb](*arguments.folders)
    return 0


if __name__ == "__main__":
    sys.exit(main())
