"""Roles from what exporters write into names and metadata."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from faq_onnx.artifacts.sites import LinearRole
from faq_onnx.graph.names import node_paths

__all__ = ["node_texts", "role_from_text"]

# Last component of a module path -> role. Names that mean different things in different
# families (c_proj, dense, w1) are left to the topology.
ROLE_NAMES: dict[str, LinearRole] = {
    **{role.value: role for role in LinearRole if role is not LinearRole.OTHER},
    "Wqkv": LinearRole.QKV_PROJ,
    "c_attn": LinearRole.QKV_PROJ,
    "query_key_value": LinearRole.QKV_PROJ,
    "out_proj": LinearRole.O_PROJ,
    "fc1": LinearRole.UP_PROJ,
    "fc2": LinearRole.DOWN_PROJ,
    "embed_out": LinearRole.LM_HEAD,
}
_PACKED: dict[frozenset[LinearRole], LinearRole] = {
    frozenset((LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.V_PROJ)): LinearRole.QKV_PROJ,
    frozenset((LinearRole.GATE_PROJ, LinearRole.UP_PROJ)): LinearRole.GATE_UP_PROJ,
}
_SEPARATORS = re.compile(r"(?:[/.:,+'\"\[\]\s]|__)+")


def node_texts(node: ir.Node, weight: str) -> Iterator[str]:
    """What may tell the job of a node, most trustworthy first."""
    yield from node_paths(node)
    yield weight


def role_from_text(text: str) -> LinearRole | None:
    """Role named by the last component of a path that is a known name.

    A text that names q, k and v, or gate and up, belongs to the packed weight of all of them.
    """
    roles = [ROLE_NAMES[part] for part in _SEPARATORS.split(text) if part in ROLE_NAMES]
    for parts, packed in _PACKED.items():
        if parts <= set(roles):
            return packed
    return roles[-1] if roles else None
