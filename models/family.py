"""What a model family is recognised by: data only, one file per family beside this one."""

from __future__ import annotations

import dataclasses

__all__ = ["ModelFamily"]


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """A decoder architecture.

    Attributes:
        name: As the census and the report show it.
        model_types: Values of `model_type` in config.json that mean this family.
        qk_norm: Queries and keys are normalised per head.
        qkv_bias: The q, k and v projections have biases.
        scaled_embedding: Token embeddings are multiplied by sqrt(hidden size).
        fused_projections: q, k, v and gate, up are single weights in the checkpoint itself.
    """

    name: str
    model_types: tuple[str, ...]
    qk_norm: bool = False
    qkv_bias: bool = False
    scaled_embedding: bool = False
    fused_projections: bool = False
