"""Opening onnxruntime sessions on the CPU, and saying in our words why one cannot be opened."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from faq_onnx.errors import CorruptModelError, ModelError, UnsupportedModelError
from faq_onnx.graph.io import load_model
from faq_onnx.runtime.cache_width import named_cache_widths, parse_model
from faq_onnx.runtime.feeds import cache_position

__all__ = ["ORT_ERRORS", "RUN_ERRORS", "open_session", "run_error", "run_session"]

FATAL_LEVEL = 4  # errors are raised anyway; onnxruntime would print them in red as well
INFO_LEVEL = 1

ORT_ERRORS: tuple[type[Exception], ...] = (
    ort_state.EPFail,
    ort_state.Fail,
    ort_state.InvalidArgument,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.NoModel,
    ort_state.NoSuchFile,
    ort_state.NotFound,
    ort_state.NotImplemented,
    ort_state.RuntimeException,
)
# ValueError: a missing or unknown feed; RuntimeError: what runs with bound inputs raise
RUN_ERRORS: tuple[type[Exception], ...] = (*ORT_ERRORS, RuntimeError, ValueError)
_DAMAGED = re.compile(
    r"INVALID_PROTOBUF|NO_SUCHFILE|external data|External data|external_data|out of bounds"
    r"|escapes|cannot be read|ReadExternal|GetExtDataFromTensorProto",
)
# the C++ file, line and signature in front of a message
_CPP_PLACE = re.compile(r"/onnxruntime_src/\S+:\d+ [^()]*\([^()]*\) ?")
_TOO_NEW = re.compile(
    r"IR version|opset \d+ is under development|max supported|Unsupported model", re.IGNORECASE
)


def open_session(
    model: Path | bytes,
    *,
    threads: int | None = None,
    prepack: bool = True,
    verbose: bool = False,
    config: Mapping[str, str] | None = None,
) -> ort.InferenceSession:
    """Open a model on the CPU provider with settings that give the same numbers every time.

    Args:
        model: A file (needed for external data) or the serialized model.
        threads: Threads inside an operator; None lets onnxruntime take all cores.
        prepack: Keep weights a second time in the layout of the kernels: faster, more memory.
            Never False for low-bit models: MatMulNBits then dequantizes its weight on every call.
        verbose: Write onnxruntime's INFO log to stderr, for `captured_log`.
        config: Session configuration entries, e.g. {"mlas.qnbit.force_fp32": "1"}.

    Raises:
        CorruptModelError: The file or its external data is missing or damaged.
        UnsupportedModelError: onnxruntime refuses the graph (opset, IR, operator, attribute).
    """
    options = ort.SessionOptions()
    options.log_severity_level = INFO_LEVEL if verbose else FATAL_LEVEL
    options.use_deterministic_compute = True
    if threads is not None:
        options.intra_op_num_threads = threads
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for key, value in (config or {}).items():
        options.add_session_config_entry(key, value)
    session = _open(model, options)
    if any(_has_named_width(value) for value in session.get_inputs()):
        parsed = load_model(model) if isinstance(model, Path) else parse_model(model)
        for name, width in named_cache_widths(parsed).items():
            options.add_free_dimension_override_by_name(name, width)
        session = _open(model, options)
    return session


def _open(model: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    source: str | bytes = str(model) if isinstance(model, Path) else model
    try:
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise _load_error(model, error) from error


def _has_named_width(value: ort.NodeArg) -> bool:
    """A cache input whose head width is only a name."""
    shape = value.shape
    return cache_position(value.name) is not None and len(shape) == 4 and isinstance(shape[3], str)


def run_session(
    session: ort.InferenceSession,
    feeds: Mapping[str, npt.NDArray[Any]],
    outputs: Sequence[str] | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Run a session and return its outputs by name.

    Raises:
        UnsupportedModelError: onnxruntime could not run it on these feeds; lists their shapes.
    """
    names = [value.name for value in session.get_outputs()] if outputs is None else list(outputs)
    try:
        arrays = session.run(names, dict(feeds))
    except RUN_ERRORS as error:
        raise run_error(feeds, error) from error
    return {name: np.asarray(array) for name, array in zip(names, arrays, strict=True)}


def run_error(feeds: Mapping[str, npt.NDArray[Any]], error: Exception) -> UnsupportedModelError:
    """Our error for a run that onnxruntime gave up."""
    shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())
    return UnsupportedModelError(
        f"onnxruntime {ort.__version__} could not run the model: {_text(error)} (fed: {shapes})"
    )


def _load_error(model: Path | bytes, error: Exception) -> ModelError:
    text = _text(error)
    name = str(model) if isinstance(model, Path) else "the model"
    damaged = isinstance(error, ort_state.InvalidProtobuf | ort_state.NoSuchFile)
    if damaged or _DAMAGED.search(text):
        return CorruptModelError(
            f"{name}: the model or its external data is missing or damaged; fetch or export it "
            f"again (onnxruntime {ort.__version__}: {text})"
        )
    hint = ""
    if _TOO_NEW.search(text):
        hint = "; export it with a lower opset (17 to 23 are safe) or install a newer onnxruntime"
    return UnsupportedModelError(
        f"{name}: onnxruntime {ort.__version__} does not load it: {text}{hint}"
    )


def _text(error: Exception) -> str:
    """One line of onnxruntime's message, without its status prefix and C++ place."""
    line = _CPP_PLACE.sub("", " ".join(str(error).split()))
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", line)
