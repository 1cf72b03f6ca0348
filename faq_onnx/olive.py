"""`FaqOnnxQuantization`, a pass of Olive's: conversion as a step of an Olive workflow.

Olive finds it by a package config, see docs/examples/olive/. Needs `pip install olive-ai`.
"""

from __future__ import annotations

import pathlib
from typing import Any

from olive.common.config_utils import ParamCategory
from olive.hardware import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam

from faq_onnx.pipeline import convert
from faq_onnx.recipes import build_config, read_recipe

__all__ = ["FaqOnnxQuantization"]

MODEL_NAME = "model.onnx"


class FaqOnnxQuantization(Pass):  # type: ignore[misc]  # Olive has no types
    """Turn a float ONNX decoder into a verified low-bit package, as `faq-onnx convert` does.

    The output model is the whole package: tokenizer, configs and reports are its additional files.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        _ = accelerator_spec
        return {
            "method": PassConfigParam(
                type_=str, default_value=None, description="As --method of faq-onnx convert."
            ),
            "bits": PassConfigParam(type_=int, default_value=None, description="As --bits."),
            "block_size": PassConfigParam(
                type_=int, default_value=None, description="As --block-size."
            ),
            "settings": PassConfigParam(
                type_=dict,
                default_value={},
                description="More settings by their dotted names in a recipe, such as "
                "{'calibration.source': 'text.txt'}.",
            ),
            "recipe": PassConfigParam(
                type_=str,
                default_value=None,
                category=ParamCategory.PATH,
                description="A recipe file; what is given here wins over it.",
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        wish: Any = config
        named = {name: getattr(wish, name) for name in ("method", "bits", "block_size")}
        given = {name: value for name, value in named.items() if value is not None}
        recipe = read_recipe(pathlib.Path(wish.recipe)) if wish.recipe else {}
        folder = pathlib.Path(output_model_path).with_suffix("")
        settings = build_config(recipe, {**wish.settings, **given})
        convert(str(model.model_path), folder, settings)
        others = sorted(path for path in folder.iterdir() if not path.name.startswith(MODEL_NAME))
        return ONNXModelHandler(
            model_path=str(folder),
            onnx_file_name=MODEL_NAME,
            model_attributes={"additional_files": [str(path) for path in others]},
        )
