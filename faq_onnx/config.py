"""What the user wants, validated: every option of `faq-onnx convert` and of a recipe file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "METHODS",
    "Axes",
    "BlockScales",
    "CalibrationConfig",
    "FaqConfig",
    "Grid",
    "Method",
    "QuantizeConfig",
    "Rotation",
    "Rounding",
    "RoundingConfig",
    "ScaleConfig",
    "Scales",
    "VerifyConfig",
]

Bits = Literal[2, 3, 4, 8]
BlockSize = Literal[16, 32, 64, 128, 256]


class Method(StrEnum):
    """A named combination of channel scales, block grids and rounding: a row of `METHODS`."""

    RTN = "rtn"
    HQQ = "hqq"
    K_QUANT = "k-quant"
    AWQ = "awq"
    FAQ = "faq"
    GPTQ = "gptq"
    FAQ_GPTQ = "faq-gptq"
    BEST = "best"


Scales = Literal["none", "awq", "faq"]
Grid = Literal["minmax", "clip", "search", "hqq", "k-quant"]
Rounding = Literal["nearest", "gptq"]
Path = Literal["float", "low-bit"]
BlockScales = Literal["float", "8-bit", "lpbq"]
Rotation = Literal["none", "residual", "heads", "residual+heads"]


@dataclasses.dataclass(frozen=True)
class Axes:
    """One choice on each axis of quantization.

    Attributes:
        scales: Statistic behind the channel scales.
        grid: How each block's scale and zero point are found; "clip" and "search" look at
            activations.
        rounding: How codes are chosen on that grid.
        path: Whose activations grid and rounding look at: the float model's, or those of the
            model quantized so far.
    """

    scales: Scales
    grid: Grid
    rounding: Rounding
    path: Path = "float"

    @property
    def judges(self) -> bool:
        """Whether grids or rounding look at activations."""
        return self.grid in {"clip", "search"} or self.rounding == "gptq"

    @property
    def calibrates(self) -> bool:
        """Whether the model has to be run on text."""
        return self.judges or self.scales != "none"


METHODS: Mapping[Method, Axes] = MappingProxyType(
    {
        Method.RTN: Axes("none", "minmax", "nearest"),
        Method.HQQ: Axes("none", "hqq", "nearest"),
        Method.K_QUANT: Axes("none", "k-quant", "nearest"),
        Method.AWQ: Axes("awq", "clip", "nearest"),
        Method.FAQ: Axes("faq", "clip", "nearest"),
        Method.GPTQ: Axes("none", "search", "gptq"),
        Method.FAQ_GPTQ: Axes("faq", "search", "gptq", "low-bit"),
        Method.BEST: Axes("faq", "search", "gptq", "low-bit"),
    }
)


SAMPLES = 512
SELF_SAMPLES = 128
SAME_SIZE = "same"  # a budget: what the same settings take without one
PATH_SHARE = 0.8  # a conversion then takes less than four times a pass over the text
PATH_SHARES: Mapping[Method, float] = MappingProxyType({Method.BEST: 1.0})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class CalibrationConfig(_Section):
    """Where calibration tokens come from."""

    source: str = "self"
    """`self` (the model writes its own text), or a .txt file, .jsonl file or folder of .npy/.npz
    token arrays.
    """
    samples: Annotated[int, Field(ge=1)] | None = None
    """Number of calibration windows; fewer are faster. By default 512 of a text, which is used
    whole if it has fewer, and 128 where the model writes its own: writing takes time, too.
    Unless this is set, no more than 157,184 tokens of them walk the low-bit path (all for best),
    and methods that round against the float model look at no more than 131,072.
    """
    sequence_length: Annotated[int, Field(ge=8)] = 512
    """Tokens in a window; no more are taken than the model's config.json allows."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random."""

    @property
    def count(self) -> int:
        """Calibration windows to take."""
        if self.samples is not None:
            return self.samples
        return SELF_SAMPLES if self.source == "self" else SAMPLES


class ScaleConfig(_Section):
    """The search for channel scales, common to AWQ and FAQ."""

    statistic: Literal[Scales, "method"] = "method"
    """Channel scales: none, from this layer's activations (awq), or with later layers' (faq);
    by default what the method says, but awq for faq-gptq and best on fewer than 12,288 tokens.
    """
    grid_points: Annotated[int, Field(ge=1, le=200)] = 20
    """Exponents tried: 0, 1/n, ... (n-1)/n; 0 is the identity and always among them."""
    share_heads: bool = False
    """Under grouped-query attention, scale o_proj with one scale per group of repeated heads."""
    insert_mul: bool = False
    """Where no producer can absorb a scale, insert a Mul in front of the sites."""


class RoundingConfig(_Section):
    """Block grids and rounding."""

    grid: Literal[Grid, "method"] = "method"
    """Scale and zero point of each block: its range, AWQ's clipping, the search on the Gram
    matrix, or a data-free search (hqq, k-quant).
    """
    rounding: Literal[Rounding, "method"] = "method"
    """Each weight to its nearest level, or so that errors cancel (gptq)."""
    path: Literal[Path, "method"] = "method"
    """Round against activations of the float model, or of the model quantized so far."""
    path_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Share of the calibration windows that walks the low-bit path. By default 0.8, and all for
    best.
    """
    shrinkage: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """How far the Gram matrix of grids and rounding is drawn to its diagonal: 0 believes all
    correlations between activations that the calibration text shows, 1 none. By default
    5 / (5 + tokens per channel), at least 0.1: those of a short text are largely chance.
    """
    attention_aware: bool = False
    """On the low-bit path, round q, k and v for what attention makes of their errors (BoA)."""
    correct: bool = True
    """On the low-bit path, let weights make up for the errors of the sites before them."""
    look_ahead: bool = False
    """On the low-bit path, let gate and up bring the residual stream back through down_proj, too.
    The walk takes about half as long again; it helped a model of 260,000 parameters, most at 3
    bits, and not SmolLM2-135M (docs/methods.md).
    """


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


def means_same_size(budget: str) -> bool:
    """Whether a budget is the size that the same settings take without one."""
    return budget.strip().lower() == SAME_SIZE


class QuantizeConfig(_Section):
    """Everything that `faq-onnx convert` can be told; a recipe file holds the same keys."""

    method: Method = Method.FAQ_GPTQ
    """Nearest on plain ranges (rtn), data-free grids (hqq, k-quant), AWQ or FAQ as published,
    GPTQ without channel scales, FAQ scales with GPTQ (faq-gptq), or all that helps (best).
    """
    bits: Bits = 4
    """Bits per weight code; 3 means 3-bit codes in 4-bit storage."""
    block_size: BlockSize = 32
    """Consecutive input channels that share one scale."""
    symmetric: bool = False
    """No zero points."""
    block_scales: BlockScales = "float"
    """How each block's scale is stored: a float, or a byte times one float per row (8-bit), which
    saves 0.75 bits a weight in blocks of 32. onnxruntime multiplies them out when it loads the
    model; needs its graph optimizations, which are on unless switched off. lpbq: 1 to 16 times
    one float per row, for symmetric 4-bit weights, as Qualcomm's low-power block quantization
    wants them; other weights keep floats.
    """
    budget: str | None = None
    """Mix 2, 4 and 8 bits and block sizes by measured sensitivity: same (as large as without a
    budget), 3.0bpw (bits per weight), 80MB (of model.onnx) or kl<=0.05; head and embedding take
    part unless told to keep, and `bits` and `block_size` name the size for same, and hold only
    where nothing can be measured.
    """
    lm_head: Literal["keep", "4", "8", "same"] = "8"
    """Bits of the output head: float, 4, 8, or as every other weight."""
    embedding: Literal["auto", "keep", "4", "8", "shared"] = "auto"
    """Bits of the token embedding; `shared` = one buffer with the head; auto = shared if tied,
    else keep.
    """
    rotate: Rotation = "none"
    """Turn the residual stream, the values of each head, or both, by random orthogonal matrices
    before anything else: exact, no node more. Flattens outliers of activations, for runtimes that
    store these in few bits; weights in blocks get worse by it (docs/methods.md).
    """
    untie_head: bool = False
    """Give a head that shares the embedding's table its own, as a rotated residual stream needs:
    the package grows by a table.
    """
    exclude: tuple[str, ...] = ()
    """Shell patterns of site names that stay float."""
    accuracy_level: Literal[0, 1, 2, 3, 4] = 4
    """MatMulNBits: 4 computes with int8 activations (fast), 0 with float32."""
    external_data: bool = False
    """Write weights beside model.onnx even below 1 GB."""
    fuse_attention: bool = True
    """Compute attention in one node, GroupQueryAttention, and its query, key and value in one
    product, where that is proved to be exact: faster decoding on CPU and GPU; off for runtimes
    without it (Qualcomm's NPU) and for padding in front.
    """
    calibration: CalibrationConfig = CalibrationConfig()
    scale: ScaleConfig = ScaleConfig()
    rounding: RoundingConfig = RoundingConfig()
    faq: FaqConfig = FaqConfig()
    verify: VerifyConfig = VerifyConfig()

    @property
    def path_share(self) -> float:
        """Share of the calibration windows that walks the low-bit path."""
        wish = self.rounding.path_share
        return PATH_SHARES.get(self.method, PATH_SHARE) if wish is None else wish

    @property
    def same_size(self) -> bool:
        """Whether the budget is the size of the formats that `bits` and its kind name."""
        return self.budget is not None and means_same_size(self.budget)

    @property
    def axes(self) -> Axes:
        """The method's choices, with what is set otherwise."""
        named = METHODS[self.method]
        scales, rounding = self.scale.statistic, self.rounding
        return Axes(
            scales=named.scales if scales == "method" else scales,
            grid=named.grid if rounding.grid == "method" else rounding.grid,
            rounding=named.rounding if rounding.rounding == "method" else rounding.rounding,
            path=named.path if rounding.path == "method" else rounding.path,
        )
