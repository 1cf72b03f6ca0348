"""A model whose low-bit products are computed in float32, to compare two graphs by numbers.

At accuracy_level 4 activations are rounded to int8: a difference in the last place moves a few
to another level, and 30 layers later two equal graphs differ by percents. onnxruntime's
`mlas.qnbit.force_fp32` avoids that for 4 bits in blocks of 32 alone (1.31).
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from faq_onnx.graph.io import load_model, save_structure

__all__ = ["exact_twin"]

_LOGGER = logging.getLogger(__name__)
_LEVEL = "accuracy_level"


@contextlib.contextmanager
def exact_twin(path: Path) -> Iterator[Path]:
    """The same model at accuracy_level 0; a small file beside `path`, gone after the block.

    It reads the weights of `path`. That file itself, where nothing computes in int8, or where its
    folder cannot be written.

    Raises:
        ModelError: `path` cannot be read.
    """
    model = load_model(path)
    nodes = [
        node
        for node in model.graph.all_nodes()
        if node.op_type == "MatMulNBits" and node.attributes.get_int(_LEVEL, 0) != 0
    ]
    if not nodes:
        yield path
        return
    for node in nodes:
        node.attributes[_LEVEL] = ir.AttrInt64(_LEVEL, 0)
    try:
        handle, name = tempfile.mkstemp(prefix=".exact-", suffix=".onnx", dir=path.parent)
    except OSError as error:
        _LOGGER.info("%s: compared with int8 activations (%s)", path, error)
        yield path
        return
    os.close(handle)
    twin = Path(name)
    try:
        save_structure(model, twin)
        yield twin
    finally:
        twin.unlink(missing_ok=True)
