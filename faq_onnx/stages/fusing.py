"""The stage that writes a finished model, its attention fused where that is proved to be exact.

Fused is: one node for attention, and one product for query, key and value in front of it.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.analysis import AttentionSurvey, find_attention
from faq_onnx.analysis.operands import FLOAT_TYPES, dims
from faq_onnx.artifacts.package import AttentionFusion
from faq_onnx.artifacts.source import SourceModel, context_length
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import save_model
from faq_onnx.passes import (
    FuseAttentionPass,
    PackQkvPass,
    attention_nodes,
    is_packed,
    run_passes,
)
from faq_onnx.runtime.feeds import cache_position, decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.stages.checks import fold_tolerance
from faq_onnx.stages.opening import read_config

__all__ = [
    "MODEL_NAME",
    "SavedModel",
    "fusion_error",
    "rotary_table_bytes",
    "save_package_model",
    "trial_tokens",
]

MODEL_NAME = "model.onnx"
CACHED_STEPS = 3
TRIAL_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A model in its folder.

    Attributes:
        bytes: Written, weights included.
        plain: The same model with its attention as it came, to compare with.
        fusion: None where fusing was not asked for, or there is no attention.
    """

    bytes: int
    plain: Path
    fusion: AttentionFusion | None = None


def save_package_model(  # noqa: PLR0913 - two places and two options
    model: ir.Model,
    source: SourceModel,
    folder: Path,
    work: Path,
    *,
    fuse_attention: bool,
    external_data: bool = False,
) -> SavedModel:
    """Write `folder / "model.onnx"`, its attention fused where that is proved to be exact.

    Args:
        model: Canonical; fused in place.
        source: Its config.json says how many positions there are.
        folder: The package.
        work: Gets the model as it came, for comparisons.
        fuse_attention: False leaves attention as it is.
        external_data: Write weights beside the model even below 1 GB.
    """
    target = folder / MODEL_NAME
    if not fuse_attention:
        return SavedModel(save_model(model, target, external_data=external_data), target)
    config = read_config(source)
    survey = AttentionSurvey((), (), 0)
    if config is not None:
        survey = find_attention(model, context_length(config))
    if not survey.blocks and not PackQkvPass().find(model):
        size = save_model(model, target, external_data=external_data)
        return SavedModel(size, target, _describe(survey, model))
    plain = work / "unfused" / MODEL_NAME
    plain.parent.mkdir(parents=True, exist_ok=True)
    plain_size = save_model(model, plain, external_data=external_data)
    run_passes(model, [FuseAttentionPass(survey.blocks), PackQkvPass()])
    size = save_model(model, target, external_data=external_data)
    error = fusion_error(plain, target, trial_tokens(config))
    if error <= fold_tolerance(_float_types(model), survey.layers):
        return SavedModel(size, plain, _describe(survey, model, error))
    for path in plain.parent.iterdir():
        shutil.move(path, folder / path.name)
    reason = f"in onnxruntime the fused model's logits differ by {error:.2g} of their size"
    fusion = AttentionFusion(
        fused=survey.fused, layers=survey.layers, declined=(("the whole model", reason),)
    )
    return SavedModel(plain_size, target, fusion)


def _float_types(model: ir.Model) -> set[str]:
    """In which numbers are computed and handed out."""
    values = (*model.graph.outputs, *model.graph.initializers.values())
    return {FLOAT_TYPES[value.dtype] for value in values if value.dtype in FLOAT_TYPES}


def rotary_table_bytes(model: ir.Model, source: SourceModel) -> int:
    """About what the tables of fused attention will add to the file, known before fusing.

    One pair of tables for each cosine that the graph computes now, in the type of the cache.
    """
    config = read_config(source)
    cache = [v for v in model.graph.inputs if cache_position(v.name or "") is not None]
    widths = [(dims(value) or (None,))[-1] or 0 for value in cache]
    if config is None or not widths:
        return 0
    rotations = sum(node.op_type == "Cos" for node in model.graph)
    size = max(value.dtype.itemsize for value in cache if value.dtype is not None)
    return int(rotations * context_length(config) * max(widths) * size)


def fusion_error(plain: Path, fused: Path, tokens: npt.NDArray[np.int64]) -> float:
    """Largest difference of logits over the largest logit, with float32 arithmetic.

    Args:
        plain: The model before.
        fused: The model after.
        tokens: int64 [S]; all but the last are a prompt, these follow one by one.
    """
    before, after = (_exact_logits(path, tokens) for path in (plain, fused))
    size = max(float(np.abs(logits).max()) for logits in before) or 1.0
    pairs = zip(before, after, strict=True)
    worst = max(float(np.abs(one - other).max()) for one, other in pairs) / size
    return worst if np.isfinite(worst) else float("inf")


def trial_tokens(config: Mapping[str, object] | None) -> npt.NDArray[np.int64]:
    """Tokens that any model of this vocabulary can read, the same ones every time."""
    size = (config or {}).get("vocab_size")
    vocabulary = size if isinstance(size, int) and size > 1 else 2
    return np.random.default_rng(0).integers(0, vocabulary, TRIAL_TOKENS)


def _exact_logits(path: Path, tokens: npt.NDArray[np.int64]) -> list[npt.NDArray[np.float32]]:
    """Logits of a prompt, and of single tokens that follow it."""
    with exact_twin(path) as exact:
        session = open_session(exact)
    presents = {cache_position(value.name): value.name for value in session.get_outputs()}
    pasts = {
        value.name: presents[cache_position(value.name)]
        for value in session.get_inputs()
        if cache_position(value.name) is not None
    }
    cache: dict[str, npt.NDArray[np.float32]] | None = None
    found = []
    pieces = np.split(tokens[np.newaxis], range(len(tokens) - CACHED_STEPS, len(tokens)), axis=1)
    for ids in pieces:
        feeds = decoder_feeds(session.get_inputs(), ids, cache)
        outputs = run_session(session, feeds)
        cache = {past: outputs[present] for past, present in pasts.items()}
        found.append(outputs["logits"].astype(np.float32))
    return found


def _describe(
    survey: AttentionSurvey, model: ir.Model, error: float | None = None
) -> AttentionFusion | None:
    if not survey.layers:
        return None
    return AttentionFusion(
        fused=len(survey.blocks) + survey.fused,
        layers=survey.layers,
        packed=sum(map(is_packed, attention_nodes(model))),
        error=error,
        declined=tuple((each.name, each.reason) for each in survey.declined),
    )
