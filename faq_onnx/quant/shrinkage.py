"""How far to draw a Gram matrix to its diagonal: as far as its text is short.

Let correlations be drawn from an inverse Wishart prior whose mean is the diagonal and that weighs
as much as n tokens. After T tokens with second moments G, the mean of what is left is
    (T G + n diag G) / (T + n) = (1 - r) G + r diag G,    r = n / (n + T).
How many tokens the prior is worth was measured, in tokens per channel (docs/methods.md).
"""

from __future__ import annotations

__all__ = ["LEAST", "PRIOR_TOKENS", "shrinkage_of"]

PRIOR_TOKENS = 5  # per channel
# Other texts differ from the calibration's, however long that is.
LEAST = 0.1


def shrinkage_of(tokens: int, channels: int) -> float:
    """Share of what lies off the diagonal that is not to be believed, in [LEAST, 1].

    Args:
        tokens: T, that the Gram matrix is a mean over.
        channels: K.
    """
    prior = PRIOR_TOKENS * channels
    return max(LEAST, prior / (prior + tokens))
