"""How much disk calibration takes, known before it starts."""

from __future__ import annotations

from collections.abc import Collection

from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.calibration.corpus import TokenWindows
from faq_onnx.calibration.sensitivity import sensitivity_windows
from faq_onnx.calibration.windows import path_windows, scale_windows
from faq_onnx.config import QuantizeConfig

__all__ = ["disk_space"]

FLOAT_BYTES = 4  # hidden states and Gram matrices are float32


def disk_space(
    census: ModelCensus, config: QuantizeConfig, windows: TokenWindows, groups: Collection[str]
) -> int:
    """Bytes that Gram matrices and the hidden states of all walks take at most.

    Args:
        census: Of the model.
        config: Tells which windows walk, and whether sensitivities are measured.
        windows: Of the calibration text.
        groups: Names of those whose Gram matrices are kept.
    """
    named = set(groups)
    grams = sum(group.in_features**2 for group in census.groups if group.name in named)
    space = FLOAT_BYTES * grams + _walk_bytes(census, config, windows)
    if config.budget is not None:
        space += _sensitivity_bytes(census, windows)
    return space


def _walk_bytes(census: ModelCensus, config: QuantizeConfig, windows: TokenWindows) -> int:
    """Hidden states of the float walk, or of the walk on the low-bit path that comes after it.

    A walk keeps a group's activations and the streams around it, the one on the low-bit path for
    either path; files of dead values stay until it ends. Measured: at most five times the stream,
    and once what each kind of group reads, which attention may make wider than the stream.
    """
    calibrated = scale_windows(config, windows.calibration)
    walked = path_windows(config, windows.calibration)
    tokens = max(
        calibrated.size + windows.heldout.size,
        0 if walked is None else 2 * walked.size,
    )
    widths = {group.in_features for group in census.groups}
    return FLOAT_BYTES * (5 * _stream_width(census) + sum(widths)) * tokens


def _sensitivity_bytes(census: ModelCensus, windows: TokenWindows) -> int:
    """Hidden states of two layers, once for each weight that is perturbed."""
    tokens = sensitivity_windows(windows.calibration).size
    weights = len(census.sites) + len(census.embeddings)
    return FLOAT_BYTES * 2 * _stream_width(census) * tokens * weights


def _stream_width(census: ModelCensus) -> int:
    """Of the residual stream; without an embedding, of the widest that a linear layer reads."""
    widths = [table.width for table in census.embeddings]
    return max(widths or [group.in_features for group in census.groups], default=0)
