"""What is in a model: linear sites, embeddings, scale groups, and what was left out and why."""

from __future__ import annotations

from enum import StrEnum

from faq_onnx.artifacts.record import Record

__all__ = [
    "Absorber",
    "AbsorberKind",
    "EmbeddingSite",
    "GroupRole",
    "LinearRole",
    "LinearSite",
    "ModelCensus",
    "ScaleGroup",
    "SkippedWeight",
    "Tie",
    "WeightLayout",
]


class LinearRole(StrEnum):
    """The job of a linear layer in a decoder."""

    Q_PROJ = "q_proj"
    K_PROJ = "k_proj"
    V_PROJ = "v_proj"
    QKV_PROJ = "qkv_proj"
    O_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    GATE_UP_PROJ = "gate_up_proj"
    DOWN_PROJ = "down_proj"
    LM_HEAD = "lm_head"
    OTHER = "other"


class GroupRole(StrEnum):
    """The activation that a scale group reads."""

    ATTENTION_INPUT = "attention_input"
    ATTENTION_OUTPUT = "attention_output"  # what o_proj reads
    MLP_INPUT = "mlp_input"
    MLP_HIDDEN = "mlp_hidden"  # what down_proj reads
    LM_HEAD_INPUT = "lm_head_input"
    OTHER = "other"


class WeightLayout(StrEnum):
    """How an initializer holds the weight of a site (N out, K in)."""

    K_N = "kn"  # MatMul B, Gemm transB=0
    N_K = "nk"  # Gemm transB=1, or an initializer behind Transpose(perm=[1, 0])
    ONE_K_N = "1kn"  # MatMul B with a leading 1


class LinearSite(Record):
    """One linear layer y = x W^T (+ bias in a node of its own).

    Attributes:
        name: Unique name: the node's name, or its output value's where nodes are unnamed.
        output: Name of the value that the MatMul or Gemm node produces; finds the node again.
        op_type: "MatMul" or "Gemm".
        input: Name of the activation value [..., K].
        weight: Name of the initializer that holds W.
        layout: How the initializer holds it.
        role: Its job in the decoder.
        layer_index: Decoder layer, None outside of layers (lm_head, unknown graphs).
        in_features: K.
        out_features: N.
        dtype: "float32", "float16" or "bfloat16": of the weight and the activation.
        bias: Initializer added to the output (Gemm C, or the Add that follows), if any.
        in_subgraph: Inside an If/Loop body: can be rounded, cannot be calibrated.
    """

    name: str
    output: str
    op_type: str
    input: str
    weight: str
    layout: WeightLayout
    role: LinearRole
    layer_index: int | None
    in_features: int
    out_features: int
    dtype: str
    bias: str | None = None
    in_subgraph: bool = False


class Tie(StrEnum):
    """How an embedding and the lm_head share their table."""

    SHARED = "shared"  # one initializer
    DUPLICATE = "duplicate"  # two initializers of equal content


class EmbeddingSite(Record):
    """A Gather(axis=0) from a constant table.

    Attributes:
        name: Unique name (node name or output value).
        output: Value that the Gather produces; finds the node again.
        weight: Initializer [rows, width].
        rows: Size of the vocabulary.
        width: Hidden size.
        dtype: As for LinearSite.
        tied_site: Name of the lm_head site with the same table, if any.
        tie: How they share it.
    """

    name: str
    output: str
    weight: str
    rows: int
    width: int
    dtype: str
    tied_site: str | None = None
    tie: Tie | None = None


class AbsorberKind(StrEnum):
    """Which kind of producer takes 1/s so that the readers' weights can take s."""

    NORM = "norm"
    LINEAR = "linear"


class Absorber(Record):
    """Where the inverse channel scale of a group goes.

    NORM: gain initializer [K]; the effective gain is `initializer + offset`, so the new
    initializer is (w + offset) / s - offset.
    LINEAR: rows `row_start : row_start + kv_heads * head_dim` (or `in_features` rows when
    `head_dim` is None) of `site`'s weight, and the same elements of its bias, are divided.
    With grouped-query attention, input channel c of the readers belongs to query head
    h = c // head_dim and to row  row_start + (h // repeats) * head_dim + c % head_dim,
    so all `repeats` query heads of one kv head must share one scale.
    """

    kind: AbsorberKind
    initializer: str | None = None
    offset: float = 0.0
    norm_bias: str | None = None
    site: str | None = None
    row_start: int = 0
    head_dim: int | None = None
    repeats: int = 1


class ScaleGroup(Record):
    """Sites that read one activation value and so share one channel scale s in R^K.

    Attributes:
        name: Unique, e.g. "layers.3.attention_input".
        role: Which activation it is.
        layer_index: Decoder layer or None.
        input: Activation value name (what calibration observes), [..., K].
        in_features: K.
        sites: Names of *all* sites that read it, in graph order.
        absorber: Who takes 1/s; None when nobody can.
        reason: Why there is no absorber ("" when there is one).
        scalable: False where the weights themselves must not change (a table shared with an
            embedding or with a site of another group, a subgraph): then not even an inserted
            Mul helps.
    """

    name: str
    role: GroupRole
    layer_index: int | None
    input: str
    in_features: int
    sites: tuple[str, ...]
    absorber: Absorber | None
    reason: str = ""
    scalable: bool = True


class SkippedWeight(Record):
    """A constant operand that stays as it is, and why."""

    node: str
    op_type: str
    weight: str
    shape: tuple[int, ...]
    reason: str


class ModelCensus(Record):
    """Everything that later stages need to know about a graph.

    Attributes:
        family: Name of the `models` record that fits, or "unknown".
        layer_count: Number of decoder layers found (0 for unknown graphs).
        sites: In graph order.
        groups: In graph order; a site in a subgraph, or whose weight is shared by sites with
            different inputs, is in a group of its own with no absorber.
        embeddings: In graph order.
        skipped: What is left alone.
        warnings: What was assumed.
        rotation: What is rotated in the graph, as its metadata say (`passes.rotate`); "" for
            nothing. Part of the fingerprint: names and shapes do not tell.
    """

    schema_version: int = 1
    family: str
    layer_count: int
    sites: tuple[LinearSite, ...]
    groups: tuple[ScaleGroup, ...]
    embeddings: tuple[EmbeddingSite, ...]
    skipped: tuple[SkippedWeight, ...]
    warnings: tuple[str, ...] = ()
    rotation: str = ""

    def site(self, name: str) -> LinearSite:
        """The site of that name (KeyError if there is none)."""
        for site in self.sites:
            if site.name == name:
                return site
        raise KeyError(name)
