"""Which calibration windows serve what: channel scales need fewer tokens than a rounding does."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from faq_onnx.config import PATH_SHARES, QuantizeConfig

__all__ = ["path_windows", "scale_windows"]

# For the channel scales where rounding has a walk of its own: only their exponents hang on them.
SCALE_TOKENS = 16_384
# The least for that walk: a share of a small corpus would be too few.
LEAST_PATH_TOKENS = 16_384
# The most that is looked at where nobody says how much: of a longer text as many windows, evenly
# spaced.
MOST_PATH_TOKENS = 157_184
MOST_FLOAT_TOKENS = 131_072

Windows = npt.NDArray[np.int64]


def scale_windows(config: QuantizeConfig, windows: Windows) -> Windows:
    """The calibration windows whose statistics the channel scales are chosen by.

    All of them, or by default as many as give enough tokens, where grids and rounding look at the
    same statistics. Where these walk the low-bit path, the scales' exponents need far fewer
    tokens than a rounding does.

    Args:
        config: Tells whether rounding walks the low-bit path.
        windows: Token ids, int64 [n, length].

    Returns:
        Some of the windows, evenly spaced.
    """
    if config.axes.path == "float":
        asked = config.calibration.samples is not None
        return windows if asked else _spread(windows, _enough(windows, MOST_FLOAT_TOKENS))
    return _spread(windows, _enough(windows, SCALE_TOKENS))


def path_windows(config: QuantizeConfig, windows: Windows) -> Windows | None:
    """The calibration windows that walk the low-bit path, spread over all; None: no walk.

    Args:
        config: Tells the share of the windows that walks.
        windows: Token ids, int64 [n, length].
    """
    if config.axes.path == "float" or not config.axes.calibrates:
        return None
    share = round(config.path_share * len(windows))
    asked = config.calibration.samples is not None or config.rounding.path_share is not None
    if not asked and config.method not in PATH_SHARES:
        share = min(share, _enough(windows, MOST_PATH_TOKENS))
    return _spread(windows, max(share, _enough(windows, LEAST_PATH_TOKENS)))


def _enough(windows: Windows, tokens: int) -> int:
    """The number of windows that hold `tokens` tokens at least."""
    length: int = windows.shape[1]
    return math.ceil(tokens / length)


def _spread(windows: Windows, count: int) -> Windows:
    """`count` of the windows, at least 1, evenly spaced."""
    count = min(max(count, 1), len(windows))
    picked = np.linspace(0, len(windows) - 1, count).round().astype(np.intp)
    return windows[picked]
