"""Who can absorb the scale of a group: each rule with a match and near misses."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.sites import AbsorberKind, ModelCensus, ScaleGroup

HEADER = '<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>'
WIDTH, HEAD, HEADS, KV_HEADS = 32, 8, 4, 2


def _weights(**shapes: tuple[int, ...]) -> list[ir.Tensor[np.ndarray]]:
    rng = np.random.default_rng(0)
    return [
        ir.Tensor(rng.normal(size=shape).astype(np.float32), name=name)
        for name, shape in shapes.items()
    ]


def _constants(**values: object) -> list[ir.Tensor[np.ndarray]]:
    return [ir.Tensor(np.array(value, np.int64), name=name) for name, value in values.items()]


def _census(
    body: str, tensors: list[ir.Tensor[np.ndarray]], signature: str, outputs: str = "y"
) -> ModelCensus:
    words = set(re.findall(r"\w+", body))
    used = [tensor for tensor in tensors if tensor.name in words]
    text = f"{HEADER} g ({signature}) => ({outputs}) {{ {body} }}"
    return take_census(canonicalise(ir.from_onnx_text(text, initializers=used)), None)


def _group(census: ModelCensus, weight: str) -> ScaleGroup:
    site = next(site for site in census.sites if site.weight == weight)
    return next(group for group in census.groups if site.name in group.sites)


# --- norms -------------------------------------------------------------------------------------

NORM_TENSORS = [
    *_weights(w=(WIDTH, 16), v=(WIDTH, 24), g=(WIDTH,), b=(WIDTH,)),
    ir.Tensor(np.array(1, np.float32), name="one"),
]
INPUT = f"float[1, 5, {WIDTH}] x"


@dataclasses.dataclass(frozen=True)
class Norm:
    """A norm that absorbs."""

    body: str
    offset: float = 0.0
    bias: str | None = None


NORMS = {
    "mul": Norm("n = Mul (g, x)"),
    "mul_cast": Norm("m = Mul (x, g) n = Cast <to = 1> (m)"),
    "mul_add": Norm("m = Mul (x, g) n = Add (m, b)", bias="b"),
    "gemma": Norm("s = Add (g, one) n = Mul (x, s)", offset=1.0),
    "rms": Norm("n = RMSNormalization (x, g)"),
    "rms_gemma": Norm("s = Add (one, g) n = RMSNormalization (x, s)", offset=1.0),
    "layer_norm": Norm("n = LayerNormalization (x, g, b)", bias="b"),
    "simplified": Norm("n = SimplifiedLayerNormalization (x, g)"),
    "skip": Norm("n, p, q, r = com.microsoft.SkipSimplifiedLayerNormalization (x, x, g)"),
    "skip_bias": Norm("n = com.microsoft.SkipLayerNormalization (x, x, g, b)", bias="b"),
    "shape_reader": Norm("n = Mul (g, x) shape = Shape (n)"),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
def test_norm_absorbs(case: Norm) -> None:
    census = _census(f"{case.body} y = MatMul (n, w) z = MatMul (n, v)", NORM_TENSORS, INPUT)
    assert len(census.groups) == 1
    group = census.groups[0]
    assert group.input == "n"
    assert len(group.sites) == 2
    assert group.absorber is not None, group.reason
    assert group.absorber.kind is AbsorberKind.NORM
    assert group.absorber.initializer == "g"
    assert (group.absorber.offset, group.absorber.norm_bias) == (case.offset, case.bias)


@dataclasses.dataclass(frozen=True)
class NoNorm:
    """Something near a norm."""

    body: str
    reason: str
    outputs: str = "y"


NO_NORMS = {
    "other_reader": NoNorm("n = Mul (g, x) o = Neg (n)", "also read by Neg"),
    "reader_behind_cast": NoNorm(
        "n = Mul (g, x) c = Cast <to = 10> (n) o = Neg (c)", "also read by Neg"
    ),
    "graph_output": NoNorm("n = Mul (g, x)", "graph output", outputs="y, n"),
    "no_gain": NoNorm("n = Mul (x, x)", "no factor"),
    "scalar_gain": NoNorm("n = Mul (x, one)", "no factor"),
    "residual": NoNorm(
        "m, p, q, n = com.microsoft.SkipSimplifiedLayerNormalization (x, x, g)", "residual sum"
    ),
    "graph_input": NoNorm("n = Identity (x)", "graph input"),
    "shared_sum": NoNorm("s = Add (g, one) n = Mul (x, s) o = Neg (s)", "no factor"),
}


@pytest.mark.parametrize("case", NO_NORMS.values(), ids=NO_NORMS)
def test_norm_near_misses(case: NoNorm) -> None:
    body = f"{case.body} y = MatMul (n, w)"
    group = _group(_census(body, NORM_TENSORS, INPUT, case.outputs), "w")
    assert group.absorber is None
    assert case.reason in group.reason
    assert group.scalable


def test_shared_gains_are_copied_so_that_each_can_be_scaled() -> None:
    body = "n = Mul (g, x) y = MatMul (n, w) m = Mul (x, g) o = Neg (m) z = MatMul (o, v)"
    group = _group(_census(body, NORM_TENSORS, INPUT), "w")
    assert group.absorber is not None
    assert group.absorber.initializer == "g"


def test_views_of_one_activation_are_one_group() -> None:
    tensors = [*NORM_TENSORS, *_constants(flat=[-1, WIDTH])]
    body = "n = Mul (g, x) r = Reshape (n, flat) y = Gemm (r, w) z = MatMul (n, v)"
    census = _census(body, tensors, INPUT)
    assert len(census.groups) == 1
    assert census.groups[0].input == "n"
    assert census.groups[0].absorber is not None


def test_weight_of_two_inputs_is_left_unscaled() -> None:
    body = "n = Mul (g, x) y = MatMul (n, w) m = Neg (x) z = MatMul (m, w)"
    census = _census(body, NORM_TENSORS, INPUT)
    assert [group.scalable for group in census.groups] == [False, False]
    assert all("shared" in group.reason for group in census.groups)


# --- gated products ----------------------------------------------------------------------------

GATED_TENSORS = [
    *_weights(
        gate=(WIDTH, 48), up=(WIDTH, 48), both=(WIDTH, 96), down=(48, WIDTH), ub=(48,), bb=(96,)
    ),
    *_constants(sizes=[48, 48], s0=[0], s48=[48], s96=[96], last=[-1]),
]
SILU = "a = MatMul (x, gate) s = Sigmoid (a) t = Mul (a, s)"


@dataclasses.dataclass(frozen=True)
class Gated:
    """A gated product."""

    body: str
    site: str
    row_start: int = 0


GATED = {
    "silu": Gated(f"{SILU} u = MatMul (x, up) h = Mul (t, u)", "up"),
    "bias": Gated(f"{SILU} v = MatMul (x, up) u = Add (v, ub) h = Mul (u, t)", "up"),
    "packed_split": Gated(
        "p = MatMul (x, both) q, u = Split <axis = -1> (p, sizes) t = Gelu (q) h = Mul (t, u)",
        "both",
        48,
    ),
    "packed_bias_split": Gated(
        "o = MatMul (x, both) p = Add (o, bb) u, q = Split <axis = -1> (p, sizes)"
        " t = Gelu (q) h = Mul (t, u)",
        "both",
    ),
    "packed_slice": Gated(
        "p = MatMul (x, both) q = Slice (p, s0, s48, last) u = Slice (p, s48, s96, last)"
        " t = Gelu (q) h = Mul (t, u)",
        "both",
        48,
    ),
}


@pytest.mark.parametrize("case", GATED.values(), ids=GATED)
def test_up_projection_absorbs(case: Gated) -> None:
    census = _census(f"{case.body} y = MatMul (h, down)", GATED_TENSORS, INPUT)
    group = _group(census, "down")
    assert group.absorber is not None, group.reason
    assert group.absorber.kind is AbsorberKind.LINEAR
    assert group.absorber.site is not None
    assert census.site(group.absorber.site).weight == case.site
    assert group.absorber.row_start == case.row_start


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (f"{SILU} h = Mul (t, a)", "also read by"),
        ("a = MatMul (x, up) s = Sigmoid (a) h = Mul (a, s)", "also read by"),
        (f"{SILU} v = MatMul (x, up) u = Relu (v) h = Mul (t, u)", "not straight"),
        (f"{SILU} u = MatMul (x, up) o = Neg (u) h = Mul (t, u)", "also read by Neg"),
        (
            (
                f"{SILU} p = MatMul (x, both) r, v = Split <axis = -1> (p, sizes) u = Add (v, ub)"
                " o = Neg (r) h = Mul (t, u)"
            ),
            "not the bias of the whole layer",
        ),
        (
            (
                "p = MatMul (x, both) q = Slice (p, s0, s96, last) u = Slice (p, s48, s96, last)"
                " r = Slice (q, s0, s48, last) t = Gelu (r) h = Mul (t, u)"
            ),
            "also read by Slice",
        ),
        (f"{SILU} u = MatMul (x, up) m = MatMul (u, down) h = Relu (t)", "no gain to scale"),
    ],
)
def test_gated_near_misses(body: str, reason: str) -> None:
    census = _census(
        f"{body} y = MatMul (h, last_w)", [*GATED_TENSORS, *_weights(last_w=(48, 24))], INPUT
    )
    group = _group(census, "last_w")
    assert group.absorber is None
    assert reason in group.reason


# --- attention ---------------------------------------------------------------------------------

ATTENTION_TENSORS = [
    *_weights(
        wq=(WIDTH, HEADS * HEAD),
        wv=(WIDTH, KV_HEADS * HEAD),
        wqkv=(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD),
        wo=(HEADS * HEAD, 24),
        bv=(KV_HEADS * HEAD,),
    ),
    *_constants(
        split=[0, 0, -1, HEAD],
        two=[2],
        first=[1],
        five=[1, KV_HEADS, HEADS // KV_HEADS, 5, HEAD],
        joined=[1, HEADS, 5, HEAD],
        flat=[0, 0, HEADS * HEAD],
    ),
]
ATTENTION_INPUT = (
    f"float[1, 5, {WIDTH}] x, float[1, {HEADS}, 5, 5] scores, "
    f"float[1, {KV_HEADS}, 0, {HEAD}] past, int32[1] seq, int32 total"
)
DECOMPOSED = (
    "a = MatMul (x, wv) b = Add (a, bv) c = Reshape (b, split)"
    " d = Transpose <perm = [0, 2, 1, 3]> (c) e = Concat <axis = -2> (past, d)"
    " f = Unsqueeze (e, two) h = Expand (f, five) i = Reshape (h, joined)"
    " p = Softmax <axis = -1> (scores) j = MatMul (p, i)"
    " k = Transpose <perm = [0, 2, 1, 3]> (j) l = Reshape (k, flat)"
)
PROJECT = " y = MatMul (l, wo)"


def test_value_projection_absorbs_through_attention() -> None:
    census = _census(DECOMPOSED + PROJECT, ATTENTION_TENSORS, ATTENTION_INPUT, "y, e")
    absorber = _group(census, "wo").absorber
    assert absorber is not None, _group(census, "wo").reason
    assert absorber.site is not None
    assert census.site(absorber.site).weight == "wv"
    assert (absorber.row_start, absorber.head_dim, absorber.repeats) == (
        0,
        HEAD,
        HEADS // KV_HEADS,
    )


def test_values_inside_packed_projection_absorb() -> None:
    body = (
        "q = MatMul (x, wqkv) l, pk, pv = com.microsoft.GroupQueryAttention"
        f" <num_heads = {HEADS}, kv_num_heads = {KV_HEADS}> (q, , , past, past, seq, total)"
    )
    census = _census(body + PROJECT, ATTENTION_TENSORS, ATTENTION_INPUT, "y, pk, pv")
    absorber = _group(census, "wo").absorber
    assert absorber is not None, _group(census, "wo").reason
    assert absorber.row_start == (HEADS + KV_HEADS) * HEAD
    assert (absorber.head_dim, absorber.repeats) == (HEAD, HEADS // KV_HEADS)


@pytest.mark.parametrize(
    ("find", "put", "reason"),
    [
        ("Softmax <axis = -1>", "Sigmoid", "no Softmax"),
        ("Unsqueeze (e, two)", "Unsqueeze (e, first)", "side by side"),
        ("perm = [0, 2, 1, 3]> (c)", "perm = [0, 2, 3, 1]> (c)", "another way"),
        ("perm = [0, 2, 1, 3]> (j)", "perm = [0, 2, 3, 1]> (j)", "behind the sequence"),
        ("Concat <axis = -2>", "Concat <axis = 1>", "along the sequence"),
        ("(past, d)", "(d, d)", "not a cache"),
        ("b = Add (a, bv)", "b = Relu (a)", "not straight"),
        ("p = Softmax", "o = Neg (b) p = Softmax", "also read by Neg"),
        ("p = Softmax", "o = Neg (e) p = Softmax", "also read by Neg"),
    ],
)
def test_attention_near_misses(find: str, put: str, reason: str) -> None:
    assert find in DECOMPOSED
    body = DECOMPOSED.replace(find, put) + PROJECT
    group = _group(_census(body, ATTENTION_TENSORS, ATTENTION_INPUT), "wo")
    assert group.absorber is None
    assert reason in group.reason


def test_values_handed_to_another_model_do_not_absorb() -> None:
    body = DECOMPOSED.replace(" e = Concat <axis = -2> (past, d)", "").replace(
        "(e, two)", "(d, two)"
    )
    group = _group(_census(body + PROJECT, ATTENTION_TENSORS, ATTENTION_INPUT, "y, d"), "wo")
    assert group.absorber is None
    assert "another model" in group.reason
