"""What will be done: formats per site and channel scales per group."""

from __future__ import annotations

from enum import StrEnum

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.trade_off import TradeOff
from faq_onnx.config import (
    BlockScales,
    Grid,
    QuantizeConfig,
    Rounding,
    RoundingConfig,
    Scales,
)

__all__ = [
    "BlockFormat",
    "EmbeddingPlan",
    "GroupPlan",
    "QuantPlan",
    "ScaleApplication",
    "SitePlan",
]


class BlockFormat(Record):
    """How one weight is stored: w = scale * (code - zero_point), per block along K.

    Attributes:
        code_bits: Levels used are 2**code_bits.
        storage_bits: Bits per code in the file: 2, 4 or 8.
        block_size: Consecutive input channels that share a scale.
        symmetric: No zero points stored; the implied one is 2**(storage_bits - 1).
        block_scales: "float", in the dtype of the activations, or "8-bit": a byte each, times one
            float per row, which the graph multiplies and onnxruntime folds when it loads; "lpbq"
            is the same with 1 to 16 in the byte.
    """

    code_bits: int
    storage_bits: int
    block_size: int
    symmetric: bool
    block_scales: BlockScales = "float"

    def weight_bytes(self, out_features: int, in_features: int, scale_bytes: int = 4) -> int:
        """Size of a weight [N, K]: codes, scales and zero points.

        The last block of a row is stored whole, zero points fill whole bytes per row.
        `scale_bytes` is the size of a float scale.
        """
        k_blocks = -(-in_features // self.block_size)
        row = k_blocks * self.block_size * self.storage_bits // 8
        row += k_blocks * scale_bytes if self.block_scales == "float" else k_blocks + scale_bytes
        if not self.symmetric:
            row += -(-k_blocks * self.storage_bits // 8)
        return out_features * row


class SitePlan(Record):
    """Decision for one linear site.

    Attributes:
        site: Site name.
        format: Block format; None leaves the site float.
        grid: "minmax", "clip" (AWQ's), "search" (both on the Gram matrix), "hqq" or "k-quant".
        rounding: "nearest" or "gptq".
        accuracy_level: Attribute of MatMulNBits.
        reason: Why the site is kept float ("" when it is quantized).
    """

    site: str
    format: BlockFormat | None
    grid: Grid = "minmax"
    rounding: Rounding = "nearest"
    accuracy_level: int = 4
    reason: str = ""


class ScaleApplication(StrEnum):
    """How a channel scale enters the graph."""

    NONE = "none"
    FOLD = "fold"
    MUL = "mul"  # an explicit Mul in front of the sites


class GroupPlan(Record):
    """Decision for one scale group; the scale itself is `scales[group]` of the QuantPlan files.

    Attributes:
        group: Group name.
        application: Fold, insert a Mul, or leave.
        exponent: The alpha that won.
        loss_identity: Objective with scale 1 (mean squared output error summed over sites).
        loss: Objective with the chosen scale, <= loss_identity.
    """

    group: str
    application: ScaleApplication
    exponent: float = 0.0
    loss_identity: float | None = None
    loss: float | None = None


class EmbeddingPlan(Record):
    """Decision for one embedding table.

    `shared_with` names the lm_head site whose packed buffer the Gather reads.
    """

    embedding: str
    format: BlockFormat | None
    shared_with: str | None = None
    reason: str = ""


class QuantPlan(Record):
    """The whole decision; channel scales are float32 [K] arrays kept beside it by group name.

    `config` is the wish that it came from; None where somebody made the plan by hand. `trade_off`
    is what a budget bought. `channel_scales` is the statistic that they were chosen by: on a short
    text not the one that `config` asks for; None where nobody said.
    """

    schema_version: int = 1
    census_fingerprint: str
    method: str
    sites: tuple[SitePlan, ...]
    groups: tuple[GroupPlan, ...]
    embeddings: tuple[EmbeddingPlan, ...]
    config: QuantizeConfig | None = None
    trade_off: TradeOff | None = None
    channel_scales: Scales | None = None

    @property
    def rounding(self) -> RoundingConfig:
        """How codes are chosen; the defaults where somebody made the plan by hand."""
        return (self.config or QuantizeConfig()).rounding
