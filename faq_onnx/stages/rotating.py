"""The stage that rotates a float model before anything else looks at it, and its proof."""

from __future__ import annotations

import dataclasses

from faq_onnx.analysis import canonicalise, find_rotation, take_census
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import FaqOnnxError
from faq_onnx.graph.io import load_model
from faq_onnx.passes import RotatePass, run_passes
from faq_onnx.stages.opening import OpenedModel, read_config

__all__ = ["rotate"]


def rotate(opened: OpenedModel, config: QuantizeConfig) -> OpenedModel:
    """The model with its residual stream or value heads rotated, as `config` asks for.

    Weights are computed when they are read; the model as it came stays in `unrotated`.

    Raises:
        UnsupportedModelError: It would not be exact; names place and reason.
        RewriteError: A weight must not change, or a tied head not be untied.
    """
    if config.rotate == "none":
        return opened
    parts = config.rotate.split("+")
    model = canonicalise(load_model(opened.source.onnx_path))
    try:
        sites = find_rotation(
            model, opened.census, residual="residual" in parts, heads="heads" in parts
        )
        turn = RotatePass(sites, seed=config.calibration.seed, untie_head=config.untie_head)
        run_passes(model, [turn])
    except FaqOnnxError as error:
        error.add_note(f"--rotate {config.rotate}, model: {opened.source.onnx_path}")
        raise
    census = take_census(model, read_config(opened.source))
    return dataclasses.replace(opened, model=model, census=census, unrotated=opened)
