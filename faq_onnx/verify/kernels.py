"""Every low-bit weight: what onnxruntime's kernel makes of the bytes, against float64 arithmetic.

Nodes are taken from the file one at a time and in pieces of rows, and run alone at
accuracy_level 0. A wrong nibble order, zero-point packing or shape shows as an error of the size
of the weights, ten thousand times the tolerance.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from faq_onnx.artifacts.verification import KernelCheck
from faq_onnx.graph.io import load_model
from faq_onnx.progress import SILENT, Progress
from faq_onnx.quant.packing import unpack_codes
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.verify.nodes import (
    GATHER,
    LowBitNode,
    gather_model,
    low_bit_nodes,
    matmul_model,
)

__all__ = ["check_kernels"]

# Elements of a piece: 8 MB as float32.
PIECE_ELEMENTS = 1 << 21
UNIT_ROUNDOFF = 2.0**-24
# Roundings of one product beside the K - 1 additions: the product itself, the scale, the zero
# point's share, the last sum of both.
EXTRA_ROUNDINGS = 4
SIGN_ROWS = 2
TINY = np.finfo(np.float64).tiny


def check_kernels(path: Path, *, progress: Progress = SILENT) -> KernelCheck:
    """Compare the kernels of all low-bit nodes with float64.

    For A with entries +-1 and y = A W^T, however float32 sums are ordered:
        |y_kernel - y| <= (K + 4) u  sum_k |scale| (code + zero_point),   u = 2^-24,
    because a kernel may sum codes and zero points separately. float16 nodes run in float32 with
    the same scales: the bytes are what is tested, and float16 sums would hide errors.

    Raises:
        VerificationError: A node has no constant weights or sizes that contradict each other.
        ModelError: The file does not load.
    """
    model = load_model(path)
    nodes = list(low_bit_nodes(model))
    worst, worst_node = -1.0, ""
    with progress.stage("check kernels", len(nodes), "nodes") as advance:
        for node in nodes:
            step = max(1, PIECE_ELEMENTS // max(1, node.spec.in_features))
            for start in range(0, node.rows, step):
                ratio = _ratio(node, slice(start, min(start + step, node.rows)))
                if ratio > worst:
                    worst, worst_node = ratio, node.name
            node.release()
            advance(1)
    return KernelCheck(nodes=len(nodes), worst=max(worst, 0.0), worst_node=worst_node)


def _ratio(node: LowBitNode, rows: slice) -> float:
    """Largest error over tolerance in some rows of a node; infinite where NaN comes out."""
    spec = dataclasses.replace(node.spec, accuracy_level=0, scale_dtype="float32")
    packed, scales, stored = node.packed(rows), node.scales(rows), node.zero_points(rows)
    if stored is not None and stored.dtype != np.uint8:
        stored = stored.astype(np.float32)
    blocks = packed.reshape(len(packed), node.k_blocks, -1)
    rng = np.random.default_rng(0)
    signs = rng.choice(np.array([-1, 1], np.float32), (SIGN_ROWS, spec.in_features))
    if node.op_type == GATHER:
        session = open_session(gather_model(spec, packed, scales, stored))
        table = run_session(session, {"A": np.arange(len(packed))})["Y"]
        kernel = signs.astype(np.float64) @ table.T.astype(np.float64)
    else:
        session = open_session(matmul_model(spec, blocks, scales, stored))
        kernel = run_session(session, {"A": signs})["Y"].astype(np.float64)
    exact, bound = _reference(node, blocks, scales, stored, signs)
    tolerance = (spec.in_features + EXTRA_ROUNDINGS) * UNIT_ROUNDOFF * bound
    ratio = float((np.abs(kernel - exact) / np.maximum(tolerance, TINY)).max())
    return math.inf if math.isnan(ratio) else ratio


def _reference(
    node: LowBitNode,
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float32],
    stored: npt.NDArray[Any] | None,
    signs: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A W^T as float64 [M, rows], and sum_k |scale| (code + |zero_point|) of each row.

    Sums of codes with signs inside a block are integers below 2^24, hence exact in float32.
    """
    bits, block_size = node.spec.bits, node.spec.block_size
    codes = unpack_codes(blocks, bits, block_size).astype(np.float32)
    zero_points = _zero_points(node, scales, stored)
    # the row of ones counts codes; what lies behind K is multiplied by 0
    padded = np.zeros((SIGN_ROWS + 1, node.k_blocks * block_size), np.float32)
    padded[:SIGN_ROWS, : node.spec.in_features] = signs
    padded[SIGN_ROWS, : node.spec.in_features] = 1
    factors = padded.reshape(SIGN_ROWS + 1, node.k_blocks, block_size).transpose(1, 2, 0)
    code_sums = np.matmul(codes.transpose(1, 0, 2), factors).astype(np.float64)
    shifts = factors.sum(axis=1, dtype=np.float64)[:, np.newaxis]
    zero_columns = zero_points.T[..., np.newaxis]
    scale_columns = scales.astype(np.float64).T[..., np.newaxis]
    exact = (code_sums - zero_columns * shifts)[..., :SIGN_ROWS] * scale_columns
    sizes = (code_sums + np.abs(zero_columns) * shifts)[..., SIGN_ROWS:] * np.abs(scale_columns)
    return exact.sum(axis=0).T, sizes.sum(axis=0)[:, 0]


def _zero_points(
    node: LowBitNode, scales: npt.NDArray[np.float32], stored: npt.NDArray[Any] | None
) -> npt.NDArray[np.float64]:
    if stored is None:
        return np.full(scales.shape, 1 << (node.spec.bits - 1), np.float64)
    if stored.dtype == np.uint8:
        return unpack_codes(stored, node.spec.bits, node.k_blocks).astype(np.float64)
    return stored.astype(np.float64)
