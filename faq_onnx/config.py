"""What the user wants, validated: every option of `faq-onnx convert` and of a recipe file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "CalibrationConfig",
    "FaqConfig",
    "QuantizeConfig",
    "ScaleConfig",
    "VerifyConfig",
]

Bits = Literal[2, 3, 4, 8]
BlockSize = Literal[16, 32, 64, 128, 256]


class Method(StrEnum):
    """How weights get their scales."""

    RTN = "rtn"
    AWQ = "awq"
    FAQ = "faq"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CalibrationConfig(_Section):
    """Where calibration tokens come from."""

    source: str = "self"
    """`self` (the model writes its own text), or a .txt file, .jsonl file or folder of .npy/.npz
    token arrays.
    """
    samples: Annotated[int, Field(ge=1)] = 64
    """Number of calibration windows."""
    sequence_length: Annotated[int, Field(ge=8)] = 256
    """Tokens in a window."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""


class ScaleConfig(_Section):
    """The search for channel scales, common to AWQ and FAQ."""

    grid_points: Annotated[int, Field(ge=1, le=200)] = 20
    """Exponents tried: 0, 1/n, ... (n-1)/n; 0 is the identity and always among them."""
    clip: bool = True
    """Search a clipping ratio per block after scaling (AWQ's auto_clip)."""
    share_heads: bool = False
    """Under grouped-query attention, scale o_proj with one scale per group of repeated heads."""
    insert_mul: bool = False
    """Where no producer can absorb a scale, insert a Mul in front of the sites."""


class FaqConfig(_Section):
    """Future-aware statistics (arXiv 2602.02538)."""

    preview: Literal["layer", "window"] = "window"
    """One future layer at offset `window`, or the mean of the next `window` layers."""
    fusion: Annotated[float, Field(ge=0.0, le=1.0)] = 0.85
    """Weight of the current layer's statistic; 1 gives AWQ exactly."""
    window: Annotated[int, Field(ge=1)] = 5
    """Future layers looked at."""
    roles: tuple[
        Literal["attention_input", "attention_output", "mlp_input", "mlp_hidden"], ...
    ] = (
        "attention_input",
        "mlp_input",
    )
    """Activations whose statistic is fused; the channels of the other two do not line up across
    layers.
    """
    normalisation: Literal["none", "mean", "max"] = "mean"
    """Each layer's statistic is divided by its own mean or maximum before fusing."""


class VerifyConfig(_Section):
    """What a result must pass."""

    samples: Annotated[int, Field(ge=1)] = 8
    """Held-out windows on which KL, top-1 agreement and perplexity are taken."""
    max_kl: Annotated[float, Field(gt=0)] = 1.0
    """Largest accepted KL divergence to the source model, nats/token."""


class QuantizeConfig(_Section):
    """Everything that `faq-onnx convert` can be told; a recipe file holds the same keys."""

    method: Method = Method.FAQ
    """Channel scales: none (rtn), AWQ, or FAQ."""
    bits: Bits = 4
    """Bits per weight code; 3 means 3-bit codes in 4-bit storage."""
    block_size: BlockSize = 32
    """Consecutive input channels that share one scale."""
    symmetric: bool = False
    """No zero points."""
    lm_head: Literal["keep", "4", "8", "same"] = "8"
    """Bits of the output head: float, 4, 8, or as every other weight."""
    embedding: Literal["auto", "keep", "4", "8", "shared"] = "auto"
    """Bits of the token embedding; `shared` = one buffer with the head; auto = shared if tied,
    else keep.
    """
    exclude: tuple[str, ...] = ()
    """Shell patterns of site names that stay float."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """MatMulNBits: 4 computes with int8 activations (fast), 0 with float32."""
    external_data: bool = False
    """Write weights beside model.onnx even below 1 GB."""
    calibration: CalibrationConfig = CalibrationConfig()
    scale: ScaleConfig = ScaleConfig()
    faq: FaqConfig = FaqConfig()
    verify: VerifyConfig = VerifyConfig()
