"""The tools of bench_peers.py: what each is called, and how it is asked for a model.

Ours is among them, run from its command line with all its defaults. Tools that need packages of
their own run in another environment, most through a script in peers/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from faq_onnx.graph.io import load_model, save_model

__all__ = ["PEERS", "Job"]

_NEEDS_HF = "needs --hf, the checkpoint that MODEL was exported from"


@dataclasses.dataclass(frozen=True)
class Job:
    """One model for a peer to write.

    Attributes:
        source: The float model.
        output: The file to write.
        bits: Of the codes.
        block_size: Weights along K with one scale.
        feeds: Inputs of the model, one per calibration window.
        text: What these windows were cut from: a file, or self.
        hf: Folder of the checkpoint that `source` was exported from.
        pythons: Interpreters of other environments, by name.
    """

    source: Path
    output: Path
    bits: int
    block_size: int
    feeds: tuple[Mapping[str, npt.NDArray[Any]], ...]
    text: str
    hf: Path | None
    pythons: Mapping[str, str]


def _faq_onnx(job: Job) -> None:
    """What a user of ours gets who names a text and a format; cuts the text as it likes."""
    folder = job.output.with_suffix("")
    kept = ["--lm-head", "keep", "--embedding", "keep"]  # as in every other row
    numbers = ["--bits", str(job.bits), "--block-size", str(job.block_size)]
    arguments = [str(job.source), "-o", str(folder), "--calibration", job.text, *numbers, *kept]
    _run([sys.executable, "-m", "faq_onnx", "convert", *arguments, "--quiet"])
    _lift(folder, job.output)


def _onnxruntime(job: Job, algorithm: str) -> None:
    """MatMulNBitsQuantizer with one of its algorithms, asymmetric; a tied head stays float."""
    from onnxruntime.quantization import matmul_nbits_quantizer as ort  # noqa: PLC0415

    bits, block = job.bits, job.block_size
    configs: dict[str, Callable[[], Any]] = {
        "default": lambda: ort.DefaultWeightOnlyQuantConfig(block_size=block, bits=bits),
        "hqq": lambda: ort.HQQWeightOnlyQuantConfig(block_size=block, bits=bits),
        "k_quant": ort.KQuantWeightOnlyQuantConfig,
        "rtn": ort.RTNWeightOnlyQuantConfig,
        "gptq": lambda: ort.GPTQWeightOnlyQuantConfig(
            calibration_data_reader=_Reader(job.feeds[:1])
        ),
    }
    if bits != 4 and algorithm not in {"default", "hqq"}:
        raise NotImplementedError(f"{algorithm} of onnxruntime knows 4 bits only")
    ort.logger.setLevel(logging.WARNING)  # one line per node otherwise
    tool = ort.MatMulNBitsQuantizer(
        str(job.source),
        bits=bits,
        block_size=block,
        is_symmetric=False,
        nodes_to_exclude=["/lm_head/MatMul"],
        algo_config=configs[algorithm](),
    )
    tool.process()
    tool.model.save_model_to_file(str(job.output))


def _modelopt(job: Job) -> None:
    """AWQ-lite of ModelOpt, in its own environment."""
    if job.bits != 4:
        raise NotImplementedError("AWQ of ModelOpt knows 4 bits only")
    options = ["--block-size", str(job.block_size)]
    with _feeds_folder(job) as folder:
        arguments = [str(job.source), str(job.output), *options, "--feeds", folder]
        _call(job, "modelopt", [_script("modelopt_awq"), *arguments])


def _onnxsim(job: Job, algorithm: str) -> None:
    """GPTQ or AWQ of onnxsim, in its own environment: symmetric, to DequantizeLinear."""
    if (job.bits, job.block_size) != (4, 32):
        raise NotImplementedError("onnxsim knows 4 bits in blocks of 32 only")
    with _feeds_folder(job) as folder:
        arguments = [str(job.source), str(job.output), "--method", algorithm, "--feeds", folder]
        _call(job, "onnxsim", [_script("onnxsim_ptq"), *arguments])


def _olive(job: Job) -> None:
    """GPTQ of Olive: from the checkpoint, through a builder, to a fused graph."""
    if job.hf is None:
        raise ValueError(_NEEDS_HF)
    if job.bits != 4:
        raise NotImplementedError("Olive writes 4 bits only on this route")
    folder = job.output.with_suffix("")
    options = ["--block-size", str(job.block_size)]
    with _feeds_folder(job) as feeds:
        arguments = [str(job.hf), str(folder), *options, "--feeds", feeds]
        _call(job, "olive", [_script("olive_gptq"), *arguments])
    _lift(folder, job.output)


def _genai(job: Job, algorithm: str) -> None:
    """The int4 builder of onnxruntime-genai: from the checkpoint, to a fused graph of its own."""
    if job.hf is None:
        raise ValueError(_NEEDS_HF)
    if job.bits != 4:
        raise NotImplementedError("the builder knows int4 and int8 only")
    with tempfile.TemporaryDirectory(dir=job.output.parent) as cache:
        options = [
            *("-i", str(job.hf), "-o", str(job.output.with_suffix("")), "-p", "int4", "-e", "cpu"),
            *("-c", cache, "--extra_options", "filename=model.onnx"),
            *(f"algo_config={algorithm}", f"block_size={job.block_size}", "is_symmetric=false"),
            *("shared_embeddings=false", "op_types_to_quantize=MatMul"),
            "nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather",
        ]
        _call(job, "genai", ["-m", "onnxruntime_genai.models.builder", *options])
    _lift(job.output.with_suffix(""), job.output)


def _lift(folder: Path, output: Path) -> None:
    """Out of the folder that a builder wrote, weights and all, into one file."""
    save_model(load_model(folder / "model.onnx"), output)
    shutil.rmtree(folder)


PEERS: Mapping[str, Callable[[Job], None]] = MappingProxyType(
    {
        "faq-onnx": _faq_onnx,
        "modelopt-awq": _modelopt,
        "onnxsim-gptq": partial(_onnxsim, algorithm="gptq"),
        "onnxsim-awq": partial(_onnxsim, algorithm="awq"),
        "olive-gptq": _olive,
        "ort-default": partial(_onnxruntime, algorithm="default"),
        "ort-hqq": partial(_onnxruntime, algorithm="hqq"),
        "ort-k-quant": partial(_onnxruntime, algorithm="k_quant"),
        "ort-rtn": partial(_onnxruntime, algorithm="rtn"),
        "ort-gptq": partial(_onnxruntime, algorithm="gptq"),
        "genai-rtn": partial(_genai, algorithm="rtn"),
        "genai-k-quant": partial(_genai, algorithm="k_quant"),
    }
)


class _Reader:
    """onnxruntime's CalibrationDataReader: feeds until None, as often as rewound."""

    def __init__(self, feeds: tuple[Mapping[str, npt.NDArray[Any]], ...]) -> None:
        self.feeds = feeds
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self.rest = iter(self.feeds)

    def get_next(self) -> dict[str, npt.NDArray[Any]] | None:
        """The next feeds."""
        following = next(self.rest, None)
        return None if following is None else dict(following)

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        return iter([dict(feeds) for feeds in self.feeds])


@contextlib.contextmanager
def _feeds_folder(job: Job) -> Iterator[str]:
    """The calibration windows as files for another environment."""
    with tempfile.TemporaryDirectory(dir=job.output.parent) as folder:
        for index, feeds in enumerate(job.feeds):
            arrays: dict[str, Any] = dict(feeds)
            np.savez(Path(folder) / f"{index:03d}.npz", **arrays)
        yield folder


def _script(name: str) -> str:
    return str(Path(__file__).with_name("peers") / f"{name}.py")


def _call(job: Job, environment: str, arguments: list[str]) -> None:
    """Run another environment's Python."""
    if environment not in job.pythons:
        raise ValueError(f"needs --python {environment}=path/to/bin/python")
    _run([job.pythons[environment], *arguments])


def _run(command: list[str]) -> None:
    """Run a command; its last lines are the error."""
    environ = {**os.environ, "OLIVE_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(  # noqa: S603
        command, capture_output=True, text=True, check=False, env=environ
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(last or f"ended with status {done.returncode} and said nothing")
