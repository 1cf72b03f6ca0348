"""Refuse weights that are not numbers, before any time is spent on them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.errors import NonFiniteError
from faq_onnx.graph.weights import read_initializer

__all__ = ["check_finite"]


def check_finite(model: ir.Model, census: ModelCensus) -> None:
    """Read every weight, bias and gain of the census once, one at a time.

    Raises:
        NonFiniteError: Names the initializer, how many values are NaN or infinite, and where
            the first one is.
    """
    for name in _names(census):
        values = read_initializer(model, name)
        if np.isfinite(values).all():
            continue
        bad = ~np.isfinite(values)
        first = tuple(int(index) for index in np.argwhere(bad)[0])
        raise NonFiniteError(
            f"initializer {name!r} has {int(bad.sum())} values that are NaN or infinite, the "
            f"first at index {list(first)} ({values[first]}); the checkpoint is damaged or the "
            "model was converted to float16 with overflow: export it again in float32"
        )


def _names(census: ModelCensus) -> list[str]:
    names: dict[str, None] = {}
    for site in census.sites:
        names[site.weight] = None
        if site.bias is not None:
            names[site.bias] = None
    for table in census.embeddings:
        names[table.weight] = None
    for group in census.groups:
        absorber = group.absorber
        for vector in (absorber.initializer, absorber.norm_bias) if absorber is not None else ():
            if vector is not None:
                names[vector] = None
    return list(names)
