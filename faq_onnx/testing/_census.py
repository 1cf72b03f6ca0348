"""What a census of the tiny decoder must find, written down by hand; see `faq_onnx.testing`."""

from __future__ import annotations

from faq_onnx.artifacts.sites import (
    Absorber,
    AbsorberKind,
    EmbeddingSite,
    GroupRole,
    LinearRole,
    LinearSite,
    ModelCensus,
    ScaleGroup,
    Tie,
    WeightLayout,
)
from faq_onnx.testing._llama import TinyLlama

__all__ = ["tiny_llama_census"]

DEFAULT = TinyLlama()
FIRST_WEIGHT = 701  # the builder counts its anonymous weights from here, in this order
SITES_PER_LAYER = 7


def tiny_llama_census(spec: TinyLlama = DEFAULT) -> ModelCensus:
    """Sites, groups and the embedding of `tiny_llama_onnx(spec)`."""
    sites = [site for layer in range(spec.layers) for site in _layer_sites(spec, layer)]
    groups = [group for layer in range(spec.layers) for group in _layer_groups(spec, layer)]
    head = _head(spec)
    groups.append(
        ScaleGroup(
            name="lm_head_input",
            role=GroupRole.LM_HEAD_INPUT,
            layer_index=None,
            input=head.input,
            in_features=spec.hidden,
            sites=(head.name,),
            absorber=Absorber(kind=AbsorberKind.NORM, initializer="model.norm.weight"),
            scalable=spec.tie is not Tie.SHARED,
        )
    )
    embedding = EmbeddingSite(
        name="/model/embed_tokens/Gather",
        output="/model/embed_tokens/Gather_output_0",
        weight="model.embed_tokens.weight",
        rows=spec.vocabulary,
        width=spec.hidden,
        dtype=spec.dtype,
        tied_site=head.name if spec.tie is not None else None,
        tie=spec.tie,
    )
    return ModelCensus(
        family="qwen2" if spec.qkv_bias else "llama",
        layer_count=spec.layers,
        sites=(*sites, head),
        groups=tuple(groups),
        embeddings=(embedding,),
        skipped=(),
    )


def _layer_sites(spec: TinyLlama, layer: int) -> list[LinearSite]:
    """In the order in which the builder makes them."""
    normed = f"/model/layers.{layer}/{{}}/Mul_1_output_0"
    attention, mlp = normed.format("input_layernorm"), normed.format("post_attention_layernorm")
    kv = spec.kv_heads * spec.head_dim
    rows = (
        (LinearRole.Q_PROJ, attention, spec.hidden, spec.hidden),
        (LinearRole.K_PROJ, attention, spec.hidden, kv),
        (LinearRole.V_PROJ, attention, spec.hidden, kv),
        (LinearRole.O_PROJ, _input(layer, "self_attn/Reshape_5"), spec.hidden, spec.hidden),
        (LinearRole.GATE_PROJ, mlp, spec.hidden, spec.intermediate),
        (LinearRole.UP_PROJ, mlp, spec.hidden, spec.intermediate),
        (LinearRole.DOWN_PROJ, _input(layer, "mlp/Mul"), spec.intermediate, spec.hidden),
    )
    first = FIRST_WEIGHT + SITES_PER_LAYER * layer
    return [
        _site(spec, layer, role, source, (k, n), f"onnx::MatMul_{first + index}")
        for index, (role, source, k, n) in enumerate(rows)
    ]


def _input(layer: int, node: str) -> str:
    return f"/model/layers.{layer}/{node}_output_0"


def _site_name(layer: int, role: LinearRole) -> str:
    module = "mlp" if role in _MLP_ROLES else "self_attn"
    return f"/model/layers.{layer}/{module}/{role}/MatMul"


_MLP_ROLES = (LinearRole.GATE_PROJ, LinearRole.UP_PROJ, LinearRole.DOWN_PROJ)
_BIASED = (LinearRole.Q_PROJ, LinearRole.K_PROJ, LinearRole.V_PROJ)


def _site(  # noqa: PLR0913, PLR0917  one call, one row of the table above
    spec: TinyLlama,
    layer: int,
    role: LinearRole,
    source: str,
    features: tuple[int, int],
    weight: str,
) -> LinearSite:
    name = _site_name(layer, role)
    bias = f"model.layers.{layer}.self_attn.{role}.bias"
    return LinearSite(
        name=name,
        output=f"{name}_output_0",
        op_type="MatMul",
        input=source,
        weight=weight,
        layout=WeightLayout.K_N,
        role=role,
        layer_index=layer,
        in_features=features[0],
        out_features=features[1],
        dtype=spec.dtype,
        bias=bias if spec.qkv_bias and role in _BIASED else None,
    )


def _layer_groups(spec: TinyLlama, layer: int) -> list[ScaleGroup]:
    norm = f"model.layers.{layer}.{{}}.weight"
    sites = {site.role: site for site in _layer_sites(spec, layer)}

    def group(role: GroupRole, absorber: Absorber, *roles: LinearRole) -> ScaleGroup:
        first = sites[roles[0]]
        return ScaleGroup(
            name=f"layers.{layer}.{role}",
            role=role,
            layer_index=layer,
            input=first.input,
            in_features=first.in_features,
            sites=tuple(sites[each].name for each in roles),
            absorber=absorber,
        )

    before_attention = Absorber(kind=AbsorberKind.NORM, initializer=norm.format("input_layernorm"))
    values = Absorber(
        kind=AbsorberKind.LINEAR,
        site=sites[LinearRole.V_PROJ].name,
        head_dim=spec.head_dim,
        repeats=spec.heads // spec.kv_heads,
    )
    before_mlp = Absorber(
        kind=AbsorberKind.NORM, initializer=norm.format("post_attention_layernorm")
    )
    up = Absorber(kind=AbsorberKind.LINEAR, site=sites[LinearRole.UP_PROJ].name)
    return [
        group(GroupRole.ATTENTION_INPUT, before_attention, *_BIASED),
        group(GroupRole.ATTENTION_OUTPUT, values, LinearRole.O_PROJ),
        group(GroupRole.MLP_INPUT, before_mlp, LinearRole.GATE_PROJ, LinearRole.UP_PROJ),
        group(GroupRole.MLP_HIDDEN, up, LinearRole.DOWN_PROJ),
    ]


def _head(spec: TinyLlama) -> LinearSite:
    shared = spec.tie is Tie.SHARED
    number = FIRST_WEIGHT + SITES_PER_LAYER * spec.layers
    return LinearSite(
        name="/lm_head/MatMul",
        output="logits",
        op_type="MatMul",
        input="/model/norm/Mul_1_output_0",
        weight="model.embed_tokens.weight" if shared else f"onnx::MatMul_{number}",
        layout=WeightLayout.N_K if shared else WeightLayout.K_N,
        role=LinearRole.LM_HEAD,
        layer_index=None,
        in_features=spec.hidden,
        out_features=spec.vocabulary,
        dtype=spec.dtype,
    )
