"""Roles and layers that no name tells, from the shape of the graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from faq_onnx.analysis.groups import FoundGroup
from faq_onnx.analysis.operands import consumers, is_op
from faq_onnx.artifacts.sites import AbsorberKind, GroupRole, LinearRole

__all__ = ["group_role", "layers_from_topology", "roles_from_topology"]

_GROUP_ROLES: dict[LinearRole, GroupRole] = {
    LinearRole.Q_PROJ: GroupRole.ATTENTION_INPUT,
    LinearRole.K_PROJ: GroupRole.ATTENTION_INPUT,
    LinearRole.V_PROJ: GroupRole.ATTENTION_INPUT,
    LinearRole.QKV_PROJ: GroupRole.ATTENTION_INPUT,
    LinearRole.O_PROJ: GroupRole.ATTENTION_OUTPUT,
    LinearRole.GATE_PROJ: GroupRole.MLP_INPUT,
    LinearRole.UP_PROJ: GroupRole.MLP_INPUT,
    LinearRole.GATE_UP_PROJ: GroupRole.MLP_INPUT,
    LinearRole.DOWN_PROJ: GroupRole.MLP_HIDDEN,
    LinearRole.LM_HEAD: GroupRole.LM_HEAD_INPUT,
    LinearRole.OTHER: GroupRole.OTHER,
}
_TAIL = ("Add", "Cast", "Identity", "Reshape", "Mul", "Div", "Tanh", "Squeeze", "Unsqueeze")

Roles = Mapping[str, LinearRole]


def group_role(roles: Sequence[LinearRole]) -> GroupRole:
    """Role of a group by its first member with a known one."""
    known = [role for role in roles if role is not LinearRole.OTHER]
    return _GROUP_ROLES[known[0]] if known else GroupRole.OTHER


def roles_from_topology(groups: Sequence[FoundGroup]) -> dict[str, LinearRole]:
    """Roles of sites, by name, as far as the graph alone tells them."""
    roles: dict[str, LinearRole] = {}
    group_of = {member.site.name: group for group in groups for member in group.members}
    for group in groups:
        absorber = group.absorber
        if absorber is None or absorber.kind is not AbsorberKind.LINEAR or not absorber.site:
            continue
        producers = group_of[absorber.site]
        if group.via_attention:
            roles.update(_attention_roles(group, producers, absorber.site))
        else:
            roles.update(_mlp_roles(group, producers, absorber.site))
    heads = [
        member.site.name
        for group in groups
        for member in group.members
        if member.site.name not in roles and _reaches_output(member.output)
    ]
    if len(heads) == 1:  # a graph with several ends is no decoder, and none of them its head
        roles[heads[0]] = LinearRole.LM_HEAD
    return roles


def layers_from_topology(groups: Sequence[FoundGroup], roles: Roles) -> dict[str, int | None]:
    """Layer numbers by site name: a new layer starts with each group of q, k and v."""
    layers: dict[str, int | None] = {}
    current = -1
    for group in groups:
        role = group_role([roles[member.site.name] for member in group.members])
        if role is GroupRole.ATTENTION_INPUT:
            current += 1
        inside = role not in (GroupRole.LM_HEAD_INPUT, GroupRole.OTHER) and current >= 0
        for member in group.members:
            layers[member.site.name] = current if inside else None
    return layers


def _attention_roles(
    group: FoundGroup, producers: FoundGroup, value_site: str
) -> dict[str, LinearRole]:
    roles = {member.site.name: LinearRole.O_PROJ for member in group.members}
    members = [member.site.name for member in producers.members]
    if len(members) == 1:
        return roles | {value_site: LinearRole.QKV_PROJ}
    roles[value_site] = LinearRole.V_PROJ
    others = [name for name in members if name != value_site]
    if len(others) == 2:  # exporters write q before k
        roles |= {others[0]: LinearRole.Q_PROJ, others[1]: LinearRole.K_PROJ}
    return roles


def _mlp_roles(group: FoundGroup, producers: FoundGroup, up_site: str) -> dict[str, LinearRole]:
    roles = {member.site.name: LinearRole.DOWN_PROJ for member in group.members}
    up = next(member for member in producers.members if member.site.name == up_site)
    packed = up.site.out_features == 2 * group.members[0].site.in_features
    roles[up_site] = LinearRole.GATE_UP_PROJ if packed else LinearRole.UP_PROJ
    others = [member.site.name for member in producers.members if member is not up]
    if len(others) == 1:
        roles[others[0]] = LinearRole.GATE_PROJ
    return roles


def _reaches_output(value: ir.Value) -> bool:
    while not value.is_graph_output():
        readers = consumers(value)
        if len(readers) != 1 or not is_op(readers[0], *_TAIL, domain=""):
            return False
        value = readers[0].outputs[0]
    return True
