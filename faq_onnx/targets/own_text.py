"""Text that a model writes itself, where a package is made and no other text is at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from faq_onnx.runtime.generate import sample_tokens
from faq_onnx.runtime.session import open_session

__all__ = ["write_texts"]

Tokens = npt.NDArray[np.int64]


def write_texts(
    path: Path, starts: Tokens, count: int, length: int, on_step: Callable[[int], None]
) -> Tokens:
    """Sample texts at temperature 1, always the same ones.

    Args:
        path: A decoder.
        starts: Token ids that texts begin with, int64 [any number].
        count: Texts.
        length: Tokens of each.
        on_step: Called with the number of tokens drawn after every step.

    Returns:
        int64 [count, length].
    """
    rng = np.random.default_rng(0)
    prompts = rng.choice(starts, count).reshape(count, 1)
    return sample_tokens(open_session(path), prompts, length, rng, on_step=on_step)
