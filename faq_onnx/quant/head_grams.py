"""Row metrics H_out and input metrics H_in of attention's projections, per head, for BoA.

A change dW [d, K] of a head's projection costs tr(H_out dW H_in dW^T) (`boa.py`):

    q, head h      H_in = E[x^T x]                 H_out = mean_t R_t^T C_K R_t, C_K = E[k k^T]
    k, kv head g   H_in = E[x^T x]                 H_out = mean_t R_t^T C_Q R_t, mean over g's
                                                   query heads of C_Q = E[q q^T]
    v, kv head g   H_in = E[(A_h x)^T (A_h x)]     H_out = I; mean over g's query heads;
                                                   A_h = causal attention weights

with k and q taken after the rotary embedding R_t. For q: the score's error at positions t and s is
k_s^T R_t dW x_t; softmax's Jacobian is dropped, and x is taken as independent of t and of the
keys. BoA's H_out of v, W_O,h^T W_O,h, took 3 % more off v's own loss on SmolLM2 and is left out.
Source: BoA (arXiv 2406.13474) eq. 9 and 11, TurboBoA (arXiv 2602.04929); algorithms.md 3.1.

The query heads h of kv head g are g * n ... g * n + n - 1, n = heads / kv_heads.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

__all__ = [
    "Rotary",
    "attended_gram",
    "fit_rotary",
    "head_covariance",
    "is_rotated",
    "key_metric",
    "query_metric",
    "rotate_mean",
]

FEWEST_SAMPLES = 4  # one complex factor fits a single pair exactly, whatever came between
ROTATION_TOLERANCE = 1e-2  # of the size of what is rotated: half floats are well within

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Tables of a rotary embedding, as onnxruntime's RotaryEmbedding reads them.

    At position t, pair i = (a, b) of a head's channels becomes
    (a cos[t, i] - b sin[t, i], b cos[t, i] + a sin[t, i]).

    Attributes:
        cos: float32 [positions, pairs]. Tables that carry a factor (YaRN) may be used as they are.
        sin: float32 [positions, pairs].
        interleaved: Pair i is channels (2i, 2i + 1); otherwise (i, i + pairs), "rotate_half".
    """

    cos: Array
    sin: Array
    interleaved: bool = False

    @property
    def channels(self) -> int:
        """Channels of a head that are rotated; those after them stay as they are."""
        return 2 * int(self.cos.shape[1])


def fit_rotary(before: npt.NDArray[np.floating], after: npt.NDArray[np.floating]) -> Rotary | None:
    """The tables of which `after` is `before` rotated, position by position, up to one factor.

    At position t, pair i is one complex number, and the rotation the factor e_ti that fits all
    sequences and heads best. Rotations of all channels, a half and a quarter are tried, in halves
    and interleaved. None where none explains `after`: a norm of queries and keys lies between, or
    there are too few samples to tell.

    Args:
        before: Outputs of the projection, [sequences, heads, tokens, d].
        after: What the scores read, of the same shape.
    """
    if before.shape != after.shape or before.shape[0] * before.shape[1] < FEWEST_SAMPLES:
        return None
    size = before.shape[-1]
    for channels in (size, size // 2, size // 4):
        for interleaved in (False, True):
            if channels % 2 == 0 and channels:
                fitted = _fit_pairs(before, after, channels, interleaved=interleaved)
                if fitted is not None:
                    return fitted
    return None


def is_rotated(
    before: npt.NDArray[np.floating], after: npt.NDArray[np.floating], rotary: Rotary
) -> bool:
    """Whether `after` is `before` rotated by these tables, up to one factor; [.., tokens, d]."""
    first, second = _pairs(rotary)
    turn = rotary.cos + 1j * rotary.sin
    turned = before.astype(np.float32)
    pairs = (before[..., first] + 1j * before[..., second]) * turn[: before.shape[-2]]
    turned[..., first], turned[..., second] = pairs.real, pairs.imag
    factor = float(np.vdot(turned, after)) / max(float(np.vdot(turned, turned)), 1e-30)
    missed = float(((after - factor * turned) ** 2).sum())
    return missed <= ROTATION_TOLERANCE**2 * float((after**2).sum())


def _fit_pairs(
    before: npt.NDArray[np.floating],
    after: npt.NDArray[np.floating],
    channels: int,
    *,
    interleaved: bool,
) -> Rotary | None:
    pairs = np.empty((1, channels // 2), np.float32)
    first, second = _pairs(Rotary(pairs, pairs, interleaved))
    one, other = (z[..., first] + 1j * z[..., second] for z in (before, after))
    energy = (np.abs(one) ** 2).sum(axis=(0, 1))
    turn = (other * one.conj()).sum(axis=(0, 1)) / np.maximum(energy, np.finfo(np.float32).tiny)
    factor = float(np.sqrt(np.mean(np.abs(turn) ** 2)))
    missed = float((np.abs(other - turn * one) ** 2).sum())
    missed += float(((after[..., channels:] - factor * before[..., channels:]) ** 2).sum())
    if factor == 0 or missed > ROTATION_TOLERANCE**2 * float((after**2).sum()):
        return None
    cos, sin = (part.astype(np.float32) for part in (turn.real / factor, turn.imag / factor))
    return Rotary(cos, sin, interleaved)


def head_covariance(values: npt.NDArray[np.floating]) -> Doubles:
    """C = E[v v^T] of each head: [tokens, heads, d] to float64 [heads, d, d]."""
    by_head = np.ascontiguousarray(values.transpose(1, 2, 0), np.float64)
    covariance: Doubles = by_head @ by_head.transpose(0, 2, 1) / values.shape[0]
    return covariance


def query_metric(
    key_covariance: Doubles, positions: npt.NDArray[np.integer], rotary: Rotary | None, heads: int
) -> Doubles:
    """H_out of q: each query head reads the keys of its kv head.

    Args:
        key_covariance: C_K of keys after the rotary embedding, float64 [kv_heads, d, d].
        positions: Positions of the queries, integers [tokens]; repeated ones count repeatedly.
        rotary: Tables; None if nothing is rotated.
        heads: Query heads, a multiple of kv_heads.

    Returns:
        float64 [heads, d, d].
    """
    metric = rotate_mean(key_covariance, positions, rotary)
    return np.repeat(metric, heads // len(key_covariance), axis=0)


def key_metric(
    query_covariance: Doubles,
    positions: npt.NDArray[np.integer],
    rotary: Rotary | None,
    kv_heads: int,
) -> Doubles:
    """H_out of k: a kv head is read by heads / kv_heads query heads.

    Args:
        query_covariance: C_Q of queries after the rotary embedding, float64 [heads, d, d].
        positions: Positions of the keys, integers [tokens].
        rotary: Tables; None if nothing is rotated.
        kv_heads: Key heads.

    Returns:
        float64 [kv_heads, d, d].
    """
    return rotate_mean(_mean_over_queries(query_covariance, kv_heads), positions, rotary)


def rotate_mean(
    metric: Doubles, positions: npt.NDArray[np.integer], rotary: Rotary | None
) -> Doubles:
    """mean_t R_t^T C R_t over the given positions, exactly, without a loop over them.

    A 2 x 2 block C_ij between the pairs i and j is z -> a z + b conj(z) on complex numbers, and
    R_t multiplies pair j by e_tj = cos + i sin. So the block's mean has
    a' = a mean_t(conj(e_ti) e_tj) and b' = b mean_t(conj(e_ti) conj(e_tj)).

    Args:
        metric: C, symmetric float64 [heads, d, d].
        positions: Rows of the tables, integers [tokens].
        rotary: Tables; None returns `metric`.

    Returns:
        Symmetric float64 [heads, d, d].
    """
    if rotary is None:
        return metric
    cos, sin = rotary.cos[positions], rotary.sin[positions]
    turn = cos.astype(np.complex128) + 1j * sin
    real, imaginary = _pairs(rotary)
    rest = np.arange(rotary.channels, metric.shape[1])
    order = np.concatenate([real, imaginary, rest])
    pairs, count = len(real), len(turn)
    result = metric[:, order[:, np.newaxis], order]
    still = turn.mean(axis=0)
    _turn_blocks(result, pairs, turn.conj().T @ turn / count, (turn.T @ turn).conj() / count)
    # rest: R_t^T C with R_t^T = conj(e)
    beside = result[:, :pairs, 2 * pairs :] + 1j * result[:, pairs : 2 * pairs, 2 * pairs :]
    beside = beside * still.conj()[:, np.newaxis]
    result[:, :pairs, 2 * pairs :] = beside.real
    result[:, pairs : 2 * pairs, 2 * pairs :] = beside.imag
    result[:, 2 * pairs :, : 2 * pairs] = result[:, : 2 * pairs, 2 * pairs :].transpose(0, 2, 1)
    back = np.empty_like(metric)
    back[:, order[:, np.newaxis], order] = result
    return (back + back.transpose(0, 2, 1)) / 2


def attended_gram(
    attention: npt.NDArray[np.floating], inputs: npt.NDArray[np.floating], kv_heads: int
) -> Doubles:
    """H_in of v for one sequence: E[(A_h x)^T (A_h x)], mean over the query heads of a kv head.

    A mean over sequences of one length is the mean of the results.

    Args:
        attention: Weights after softmax, rows sum to 1, [heads, tokens, tokens].
        inputs: What v_proj reads, [tokens, K].
        kv_heads: Value heads.

    Returns:
        float64 [kv_heads, K, K].
    """
    heads, tokens = attention.shape[:2]
    shared = attention.reshape(kv_heads, -1, tokens)  # the query heads' rows below each other
    mixed = shared @ inputs
    # float32 products, like every Gram matrix here; the division in float64
    product = mixed.transpose(0, 2, 1) @ mixed
    result: Doubles = product.astype(np.float64) / (tokens * (heads // kv_heads))
    return result


def _mean_over_queries(metrics: Doubles, kv_heads: int) -> Doubles:
    """[heads, d, d] to [kv_heads, d, d]."""
    means: Doubles = metrics.reshape(kv_heads, -1, *metrics.shape[1:]).mean(axis=1)
    return means


def _pairs(rotary: Rotary) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and second channel of each pair."""
    if rotary.interleaved:
        return np.arange(0, rotary.channels, 2), np.arange(1, rotary.channels, 2)
    half = rotary.channels // 2
    return np.arange(half), np.arange(half, rotary.channels)


def _turn_blocks(
    metric: Doubles,
    pairs: int,
    straight: npt.NDArray[np.complex128],
    mirrored: npt.NDArray[np.complex128],
) -> None:
    """Multiply a by `straight` and b by `mirrored` [pairs, pairs], in place.

    [[p, q], [r, s]] is z -> a z + b conj(z) with a = (p + s + i (r - q)) / 2 and
    b = (p - s + i (r + q)) / 2.
    """
    first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    p, q = metric[:, first, first], metric[:, first, second]
    r, s = metric[:, second, first], metric[:, second, second]
    a = (p + s + 1j * (r - q)) / 2 * straight
    b = (p - s + 1j * (r + q)) / 2 * mirrored
    metric[:, first, first] = (a + b).real
    metric[:, second, second] = (a - b).real
    metric[:, second, first] = (a + b).imag
    metric[:, first, second] = (b - a).imag
