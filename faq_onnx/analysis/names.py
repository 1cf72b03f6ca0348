"""Roles and layers from what exporters write into names and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from faq_onnx.artifacts.sites import LinearRole

__all__ = ["layer_from_text", "node_texts", "role_from_text"]

# Last component of a module path -> role. Names that mean different things in different
# families (c_proj, dense) are left to the topology.
ROLE_NAMES: dict[str, LinearRole] = {
    **{role.value: role for role in LinearRole if role is not LinearRole.OTHER},
    "Wqkv": LinearRole.QKV_PROJ,
    "c_attn": LinearRole.QKV_PROJ,
    "query_key_value": LinearRole.QKV_PROJ,
    "out_proj": LinearRole.O_PROJ,
    "w1": LinearRole.GATE_PROJ,
    "w3": LinearRole.UP_PROJ,
    "w2": LinearRole.DOWN_PROJ,
    "fc1": LinearRole.UP_PROJ,
    "fc2": LinearRole.DOWN_PROJ,
    "embed_out": LinearRole.LM_HEAD,
}
_SEPARATORS = re.compile(r"[/.:,'\"\[\]\s]+")
_LAYER = re.compile(r"(?:^|[/._'\" ])(?:layers?|h|blocks?)[./_](\d+)(?=$|[/._'\" :,])")
_SCOPE_KEYS = ("pkg.torch.onnx.name_scopes", "pkg.onnxscript.name_scopes", "namespace")


def node_texts(node: ir.Node, weight: str) -> Iterator[str]:
    """What may tell the job of a node, most trustworthy first."""
    if node.name:
        yield node.name
    for key in _SCOPE_KEYS:
        if key in node.metadata_props:
            yield node.metadata_props[key]
    yield weight


def role_from_text(text: str) -> LinearRole | None:
    """Role named by the last component of a path that is a known name."""
    for part in reversed(_SEPARATORS.split(text)):
        if part in ROLE_NAMES:
            return ROLE_NAMES[part]
    return None


def layer_from_text(text: str) -> int | None:
    """N of the last `layers.N` in a path."""
    found = _LAYER.findall(text)
    return int(found[-1]) if found else None
