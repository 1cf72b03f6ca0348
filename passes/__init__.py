"""Graph rewrites as onnx_ir passes; each is a frozen dataclass and works in any PassManager.

A pass changes topology. It neither decides (that is `planning`) nor computes (that is `quant`):
it receives decisions and finished weights as its fields. See docs/writing_passes.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from faq_onnx.passes.fold_scales import FoldScalesPass
from faq_onnx.passes.fuse_attention import (
    AttentionBlock,
    FuseAttentionPass,
    HeadRows,
    RotaryTable,
)
from faq_onnx.passes.fuse_norms import FuseNormsPass
from faq_onnx.passes.insert_activation_stats import ActivationRequest, InsertActivationStatsPass
from faq_onnx.passes.lift_matmul_nbits import LiftMatMulNBitsPass
from faq_onnx.passes.matmul_to_nbits import MatMulToNBitsPass
from faq_onnx.passes.pack_qkv import PackQkvPass, attention_nodes, is_packed
from faq_onnx.passes.quantize_activations import ProductSteps, QuantizeActivationsPass
from faq_onnx.passes.quantize_cache import QuantizeCachePass
from faq_onnx.passes.quantize_embedding import QuantizeEmbeddingPass
from faq_onnx.passes.rotate import (
    ROTATED_KEY,
    ResidualStream,
    RotatePass,
    RotationSites,
    StreamReader,
    ValueHeads,
)
from faq_onnx.passes.run import OnPass, pass_name, run_passes
from faq_onnx.passes.static_shapes import StaticShapesPass

__all__ = [
    "PASSES",
    "ROTATED_KEY",
    "ActivationRequest",
    "AttentionBlock",
    "FoldScalesPass",
    "FuseAttentionPass",
    "FuseNormsPass",
    "HeadRows",
    "InsertActivationStatsPass",
    "LiftMatMulNBitsPass",
    "MatMulToNBitsPass",
    "OnPass",
    "PackQkvPass",
    "ProductSteps",
    "QuantizeActivationsPass",
    "QuantizeCachePass",
    "QuantizeEmbeddingPass",
    "ResidualStream",
    "RotaryTable",
    "RotatePass",
    "RotationSites",
    "StaticShapesPass",
    "StreamReader",
    "ValueHeads",
    "attention_nodes",
    "is_packed",
    "pass_name",
    "run_passes",
]

PASSES: Mapping[str, type[ir.passes.InPlacePass]] = MappingProxyType(
    {
        "fold-scales": FoldScalesPass,
        "fuse-attention": FuseAttentionPass,
        "fuse-norms": FuseNormsPass,
        "insert-activation-stats": InsertActivationStatsPass,
        "lift-matmul-nbits": LiftMatMulNBitsPass,
        "matmul-to-nbits": MatMulToNBitsPass,
        "pack-qkv": PackQkvPass,
        "quantize-activations": QuantizeActivationsPass,
        "quantize-cache": QuantizeCachePass,
        "quantize-embedding": QuantizeEmbeddingPass,
        "rotate": RotatePass,
        "static-shapes": StaticShapesPass,
    }
)
"""Every pass of this room by the name that text pipelines and messages use."""
