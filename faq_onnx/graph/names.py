"""What exporters write into node names and metadata about where a node comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

__all__ = ["layer_from_text", "node_layer_index", "node_paths"]

_LAYER = re.compile(r"(?:^|[/._'\" ])(?:layers?|h|blocks?)[./_](\d+)(?=$|[/._'\" :,])")
_SCOPE_KEYS = ("pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes", "namespace")


def node_paths(node: ir.Node) -> Iterator[str]:
    """The node's name and the module paths its exporter recorded, most trustworthy first."""
    if node.name:
        yield node.name
    for key in _SCOPE_KEYS:
        if key in node.metadata_props:
            yield node.metadata_props[key]


def layer_from_text(text: str) -> int | None:
    """N of the last `layers.N` in a path."""
    found = _LAYER.findall(text)
    return int(found[-1]) if found else None


def node_layer_index(node: ir.Node) -> int | None:
    """Decoder layer that the node's name, or the scope its exporter recorded, speaks of."""
    layers = (layer_from_text(path) for path in node_paths(node))
    return next((layer for layer in layers if layer is not None), None)
