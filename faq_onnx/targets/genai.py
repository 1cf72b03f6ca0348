"""onnxruntime-genai: its config file beside the model, and a trial of what it generates."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from faq_onnx.artifacts.target import PackageFacts, ProofCheck, Reference, TargetProof
from faq_onnx.graph.exact import exact_twin
from faq_onnx.progress import Progress
from faq_onnx.runtime.reference import FLOAT_ROUNDING, take_reference, token_agreement
from faq_onnx.runtime.session import open_session
from faq_onnx.targets.genai_config import CONFIG_NAME, MODEL_NAME, write_genai_config
from faq_onnx.targets.kv_cache import quantize_cache
from faq_onnx.targets.protocol import PackageJob, Target, TargetOptions
from faq_onnx.targets.tokenizer import TOKENIZER_NAME
from faq_onnx.targets.versions import installed_versions

__all__ = ["TARGET", "GenaiTarget"]

_LOGGER = logging.getLogger(__name__)
_TIMEOUT_S = 600
_CHECK = "greedy tokens"


@dataclasses.dataclass(frozen=True)
class _Trial:
    """What genai generated, or why it could not."""

    tokens: list[int]
    problem: str = ""


class GenaiOptions(TargetOptions):
    """What the folder is to be like."""

    kv_cache: Literal["float", "int8"] = "float"
    """Type of cached keys and values: int8 takes a quarter of the memory and decodes faster behind
    thousands of tokens, on the CPU; costs a little accuracy, which package.json tells.
    """


@dataclasses.dataclass(frozen=True)
class GenaiTarget(Target):
    """A folder for onnxruntime and onnxruntime-genai, which `convert` writes of any model."""

    name: ClassVar[str] = "genai"
    options_type: ClassVar[type[TargetOptions]] = GenaiOptions
    must_pass: ClassVar[bool] = False  # what genai cannot run is a package of onnxruntime still

    def package(self, job: PackageJob) -> PackageFacts:
        """Quantize the cache where that is wished, and write genai_config.json."""
        assert isinstance(self.options, GenaiOptions)
        facts = PackageFacts()
        if self.options.kv_cache == "int8":
            facts = _with_int8_cache(job)
        write_genai_config(job.folder, job.source, job.progress)
        if not (job.folder / TOKENIZER_NAME).is_file():
            note = (
                f"no {TOKENIZER_NAME} beside the source: onnxruntime-genai runs the folder on "
                "token ids; to chat, put the tokenizer there and package again"
            )
            return facts.model_copy(update={"notes": (*facts.notes, note)})
        return facts

    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Whether genai's greedy tokens equal those of a plain onnxruntime loop.

        Low-bit nodes compute in float32 on both sides, since int8 activations make two equal
        graphs differ at near ties.
        """
        with progress.stage("try onnxruntime-genai", 1, "runs") as advance:
            check = _check(folder, reference)
            advance(1)
        versions = installed_versions("onnxruntime", "onnxruntime-genai")
        return TargetProof(target=self.name, checks=(check,), versions=versions)


TARGET = GenaiTarget


def _with_int8_cache(job: PackageJob) -> PackageFacts:
    path = job.folder / MODEL_NAME
    starts = np.array(job.reference.prompt, np.int64)
    size, table = quantize_cache(path, starts, job.work, job.progress)
    with exact_twin(path) as exact:
        steps = len(job.reference.tokens)
        reference = take_reference(open_session(exact), job.reference.prompt, steps)
    return PackageFacts(tables=(table,), model_bytes=size, reference=reference)


def _check(folder: Path, reference: Reference) -> ProofCheck:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return _verdict(None, "not tried (pip install 'faq-onnx[genai]')")
    if not (folder / CONFIG_NAME).is_file():
        return _verdict(None, f"not tried: no {CONFIG_NAME}")
    trial = _generate(folder, reference)
    if trial.problem:
        return _verdict(False, trial.problem)
    if reference.problem:
        return _verdict(None, f"nothing to compare with: {reference.problem}")
    agreement = token_agreement(reference, trial.tokens, FLOAT_ROUNDING)
    return _verdict(agreement.passed, agreement.text)


def _verdict(passed: bool | None, value: str) -> ProofCheck:
    if passed is False:
        _LOGGER.warning("%s", value)
    return ProofCheck(name=_CHECK, passed=passed, value=value)


def _generate(folder: Path, reference: Reference) -> _Trial:
    """Greedy tokens of genai in a process of its own: it crashes on what it does not like."""
    steps = len(reference.tokens) or 1
    command = [sys.executable, "-m", "faq_onnx.targets._genai_trial", str(folder), str(steps)]
    try:
        done = subprocess.run(  # noqa: S603 - our own module, no shell
            command,
            input=json.dumps(reference.prompt),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _Trial([], f"onnxruntime-genai took more than {_TIMEOUT_S} s on {folder}")
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return _Trial([], f"onnxruntime-genai cannot run it: {lines[-1]}")
    tokens = [int(token) for token in json.loads(done.stdout.splitlines()[-1])]
    return _Trial(tokens, "" if tokens else f"onnxruntime-genai generates nothing from {folder}")
