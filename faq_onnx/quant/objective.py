"""What a rounding costs: the mean squared output error of a site, through its Gram matrix.

With G = E[x^T x] in R^{K x K}:  E ||x (W_q - W)^T||^2 = sum over rows d of (W_q - W) of d G d^T.
No token has to be kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["block_errors", "block_grams", "output_energy", "scale_gram"]

Matrix = npt.NDArray[np.float32]


def output_energy(delta: Matrix, gram: Matrix) -> float:
    """sum_n delta_n G delta_n^T: E ||x delta^T||^2.

    Args:
        delta: float32 [N, K], a weight or the error of one.
        gram: float32 [K, K], mean over tokens of x^T x.
    """
    return float(np.vdot(delta @ gram, delta))


def scale_gram(gram: Matrix, scale: npt.NDArray[np.float32]) -> Matrix:
    """Gram matrix of x / s, for the activations that a scaled site reads."""
    inverse = np.float32(1) / scale
    result: Matrix = gram * inverse * inverse[:, np.newaxis]
    return result


def block_grams(gram: Matrix, block_size: int) -> Matrix:
    """Diagonal blocks of G: float32 [k_blocks, block, block], zero-padded at a ragged end."""
    size = gram.shape[0]
    k_blocks = -(-size // block_size)
    blocks = np.zeros((k_blocks, block_size, block_size), np.float32)
    for index in range(k_blocks):
        part = gram[index * block_size : (index + 1) * block_size]
        part = part[:, index * block_size : (index + 1) * block_size]
        blocks[index, : part.shape[0], : part.shape[1]] = part
    return blocks


def block_errors(delta: Matrix, grams: Matrix) -> Matrix:
    """Error d G_b d^T of each block alone: float32 [N, k_blocks].

    Args:
        delta: float32 [N, k_blocks, block], w^ - w.
        grams: Diagonal blocks of the Gram matrix, float32 [k_blocks, block, block].
    """
    by_block = np.ascontiguousarray(delta.transpose(1, 0, 2))
    product = np.matmul(by_block, grams)
    errors: Matrix = np.einsum("bnk,bnk->nb", product, by_block, optimize=False)
    return errors
