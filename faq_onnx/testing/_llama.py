"""A tiny decoder for tests; see `faq_onnx.testing` for the public names.

`tiny_llama_onnx` builds it whole (embedding, RMSNorm, rotary grouped-query attention
with a key/value cache, SwiGLU, head) as optimum-onnx 0.1 writes it: the same node and value
names, decomposed operators, anonymous `onnx::MatMul_n` weights [K, N], IR 8, opset 18. It runs in
onnxruntime, is the same for the same `TinyLlama`, and has outlier channels, so that channel
scales have something to gain. Nothing here is used by the package itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common

from faq_onnx.artifacts.sites import Tie

__all__ = ["RMS_EPSILON", "ROPE_BASE", "TinyLlama", "tiny_llama_onnx"]

RMS_EPSILON = 1e-5
ROPE_BASE = 10000.0
OUTLIER_CHANNELS = 3
OUTLIER_GAIN = 12.0  # real decoders show 10 to 100 times the median channel
LOGIT_GAIN = 3.0  # about the standard deviation of the logits
MASKED = {"float32": float(np.finfo(np.float32).min), "float16": -30000.0}
"""Added to masked scores; float16 must not overflow to -inf when it is added."""

Array = npt.NDArray[np.generic]


@dataclasses.dataclass(frozen=True)
class TinyLlama:
    """Size and variant of a tiny decoder.

    Attributes:
        layers: Decoder layers.
        hidden: Hidden size.
        heads: Query heads; hidden // heads is the head size.
        kv_heads: Key and value heads; divides `heads`.
        intermediate: Width of the MLP.
        vocabulary: Rows of the embedding; `tiny_tokenizer` needs 264.
        dtype: "float32" or "float16".
        tie: None: head of its own; SHARED: the head reads the embedding through a Transpose;
            DUPLICATE: two initializers of equal content.
        qkv_bias: Add after q_proj, k_proj and v_proj, as qwen2 has.
        rotated: Channels of a head that are rotated, the first ones; None for all.
        seed: Of the weights.
    """

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 128
    vocabulary: int = 288
    dtype: str = "float32"
    tie: Tie | None = None
    qkv_bias: bool = False
    rotated: int | None = None
    seed: int = 0

    @property
    def head_dim(self) -> int:
        """Channels of one head."""
        return self.hidden // self.heads

    @property
    def rotary_dim(self) -> int:
        """Channels of one head that are rotated."""
        return self.head_dim if self.rotated is None else self.rotated


class _Builder:
    """Appends nodes, constants and initializers to one graph, under optimum's names."""

    def __init__(self, spec: TinyLlama) -> None:
        self.spec = spec
        self.dtype = ir.DataType[{"float32": "FLOAT", "float16": "FLOAT16"}[spec.dtype]]
        self.rng = np.random.default_rng(spec.seed)
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 18}, name="main_graph")
        self._anonymous = 700

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Add a graph input; texts in `shape` are free dimensions."""
        value = ir.val(name, dtype=dtype, shape=ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, shape: Sequence[int | str]) -> None:
        """Make a value a graph output, under that name and in the dtype of the decoder."""
        value.name = name
        value.dtype, value.shape = self.dtype, ir.Shape(shape)
        self.graph.outputs.append(value)

    def initializer(self, name: str, array: npt.NDArray[np.floating]) -> ir.Value:
        """Add an initializer; rounds `array` to the dtype of the decoder."""
        tensor = ir.tensor(array.astype(self.spec.dtype), name=name)
        value = ir.val(name, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def op(
        self, op_type: str, name: str, *inputs: ir.Value, **attributes: int | Sequence[int]
    ) -> ir.Value:
        """Append a node of the main domain; its one output, under optimum's name."""
        node = ir.node(op_type, list(inputs), attributes or None, name=name)
        node.outputs[0].name = f"{name}_output_0"
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, name: str, array: Array) -> ir.Value:
        """Append a Constant node, in the dtype of `array`."""
        node = ir.node("Constant", [], {"value": ir.tensor(array)}, name=name)
        node.outputs[0].name = f"{name}_output_0"
        self.graph.append(node)
        return node.outputs[0]

    def ints(self, name: str, *numbers: int) -> ir.Value:
        """Append an int64 Constant [n]: shapes, axes and indices."""
        return self.constant(name, np.array(numbers, np.int64))

    def linear(self, name: str, x: ir.Value, weight: npt.NDArray[np.floating]) -> ir.Value:
        """Multiply x [.., K] by an anonymous initializer [K, N]; `weight` is [N, K]."""
        self._anonymous += 1
        initializer = self.initializer(f"onnx::MatMul_{self._anonymous}", weight.T)
        return self.op("MatMul", f"{name}/MatMul", x, initializer)

    def random(self, out_features: int, in_features: int) -> npt.NDArray[np.float64]:
        """Weights [N, K] that keep the variance of their input."""
        return self.rng.normal(scale=in_features**-0.5, size=(out_features, in_features))


def tiny_llama_onnx(spec: TinyLlama = TinyLlama()) -> ir.Model:
    """Build the decoder.

    Inputs input_ids, attention_mask, position_ids (int64) and past_key_values.N.key/value
    [batch, kv_heads, past, head_dim]; outputs logits [batch, sequence, vocabulary] and
    present.N.key/value.
    """
    b = _Builder(spec)
    ids = b.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    total = "past_sequence_length + sequence_length"
    mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", total])
    positions = b.input("position_ids", ir.DataType.INT64, ["batch_size", "sequence_length"])
    cache_shape: list[int | str] = [
        "batch_size",
        spec.kv_heads,
        "past_sequence_length",
        spec.head_dim,
    ]
    past = [
        b.input(f"past_key_values.{layer}.{part}", b.dtype, cache_shape)
        for layer in range(spec.layers)
        for part in ("key", "value")
    ]
    table = _vocabulary_table(b)
    embedding = b.initializer("model.embed_tokens.weight", table)
    hidden = b.op("Gather", "/model/embed_tokens/Gather", embedding, ids)
    bias = _causal_bias(b, ids, mask)
    rotary = _rotary(b, positions)
    present: list[ir.Value] = []
    for layer in range(spec.layers):
        name = f"/model/layers.{layer}"
        normed = _norm(b, f"{name}/input_layernorm", hidden)
        attention = _Attention(f"{name}/self_attn", bias, *rotary)
        mixed = attention.build(b, normed, past[2 * layer : 2 * layer + 2], present)
        hidden = b.op("Add", f"{name}/Add", hidden, mixed)
        normed = _norm(b, f"{name}/post_attention_layernorm", hidden)
        hidden = b.op("Add", f"{name}/Add_1", hidden, _mlp(b, f"{name}/mlp", normed))
    logits = _head(b, _norm(b, "/model/norm", hidden), embedding, table)
    b.output(logits, "logits", ["batch_size", "sequence_length", spec.vocabulary])
    cache_shape[2] = total
    for index, value in enumerate(present):
        b.output(value, f"present.{index // 2}.{('key', 'value')[index % 2]}", cache_shape)
    model = ir.Model(b.graph, ir_version=8, producer_name="faq_onnx.testing")
    return onnx_ir.passes.common.ShapeInferencePass()(model).model


def _norm(b: _Builder, name: str, x: ir.Value) -> ir.Value:
    """RMSNorm, decomposed, computed in float32; the gain has outliers, as trained ones do."""
    gain = np.exp(b.rng.normal(scale=0.3, size=b.spec.hidden))
    gain[b.rng.choice(b.spec.hidden, OUTLIER_CHANNELS, replace=False)] *= OUTLIER_GAIN
    weight = b.initializer(f"{name[1:].replace('/', '.')}.weight", gain)
    x = b.op("Cast", f"{name}/Cast", x, to=ir.DataType.FLOAT)
    square = b.op("Pow", f"{name}/Pow", x, b.constant(f"{name}/Constant", np.array(2, np.float32)))
    axes = b.ints(f"{name}/Constant_1", -1)
    mean = b.op("ReduceMean", f"{name}/ReduceMean", square, axes, keepdims=1)
    epsilon = b.constant(f"{name}/Constant_2", np.array(RMS_EPSILON, np.float32))
    root = b.op("Sqrt", f"{name}/Sqrt", b.op("Add", f"{name}/Add", mean, epsilon))
    one = b.constant(f"{name}/Constant_3", np.array(1, np.float32))
    unit = b.op("Mul", f"{name}/Mul", x, b.op("Div", f"{name}/Div", one, root))
    unit = b.op("Cast", f"{name}/Cast_1", unit, to=b.dtype)
    return b.op("Mul", f"{name}/Mul_1", weight, unit)


def _mlp(b: _Builder, name: str, x: ir.Value) -> ir.Value:
    """SwiGLU; some rows of up_proj are large, so down_proj reads outlier channels."""
    width, hidden = b.spec.intermediate, b.spec.hidden
    gate = b.linear(f"{name}/gate_proj", x, b.random(width, hidden) / OUTLIER_GAIN)
    sigmoid = b.op("Sigmoid", f"{name}/act_fn/Sigmoid", gate)
    gate = b.op("Mul", f"{name}/act_fn/Mul", gate, sigmoid)
    weight = b.random(width, hidden) / OUTLIER_GAIN
    weight[b.rng.choice(width, OUTLIER_CHANNELS, replace=False)] *= OUTLIER_GAIN
    up = b.linear(f"{name}/up_proj", x, weight)
    return b.linear(
        f"{name}/down_proj", b.op("Mul", f"{name}/Mul", gate, up), b.random(hidden, width)
    )


def _head(
    b: _Builder, x: ir.Value, embedding: ir.Value, table: npt.NDArray[np.float64]
) -> ir.Value:
    """Logits [.., V]."""
    if b.spec.tie is Tie.SHARED:
        transposed = b.op("Transpose", "Transpose_1", embedding, perm=[1, 0])
        return b.op("MatMul", "/lm_head/MatMul", x, transposed)
    return b.linear("/lm_head", x, table if b.spec.tie is Tie.DUPLICATE else _vocabulary_table(b))


def _vocabulary_table(b: _Builder) -> npt.NDArray[np.float64]:
    """[V, hidden], scaled so that as a head it gives peaked, but not one-hot, predictions."""
    return b.random(b.spec.vocabulary, b.spec.hidden) * (LOGIT_GAIN / math.sqrt(OUTLIER_GAIN))


def _causal_bias(b: _Builder, ids: ir.Value, mask: ir.Value) -> ir.Value:
    """[batch, 1, sequence, total]: 0 where a query may look, else very negative."""
    name = "/model"
    sequence = b.op("Gather", f"{name}/Gather", b.op("Shape", f"{name}/Shape", ids), _scalar(b, 1))
    total = b.op(
        "Gather", f"{name}/Gather_1", b.op("Shape", f"{name}/Shape_1", mask), _scalar(b, 2)
    )
    past = b.op("Sub", f"{name}/Sub", total, sequence)
    zero = b.constant(f"{name}/Constant_3", np.array(0, np.int64))
    one = b.constant(f"{name}/Constant_4", np.array(1, np.int64))
    keys = b.op("Range", f"{name}/Range", zero, total, one)
    queries = b.op("Range", f"{name}/Range_1", past, total, one)
    rows = b.op("Unsqueeze", f"{name}/Unsqueeze", queries, b.ints(f"{name}/Constant_5", 1))
    causal = b.op("LessOrEqual", f"{name}/LessOrEqual", keys, rows)
    valid = b.op("Cast", f"{name}/Cast", mask, to=ir.DataType.BOOL)
    valid = b.op("Unsqueeze", f"{name}/Unsqueeze_1", valid, b.ints(f"{name}/Constant_6", 1, 2))
    allowed = b.op("And", f"{name}/And", causal, valid)
    low = b.constant(f"{name}/Constant_7", np.array(MASKED[b.spec.dtype], b.spec.dtype))
    none = b.constant(f"{name}/Constant_8", np.array(0, b.spec.dtype))
    return b.op("Where", f"{name}/Where", allowed, none, low)


def _scalar(b: _Builder, index: int) -> ir.Value:
    """The constant 1 (an axis of Shape), under a name of its own per reader."""
    return b.constant(f"/model/Constant_{index}", np.array(1, np.int64))


def _rotary(b: _Builder, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine [batch, 1, sequence, rotary_dim]."""
    name, half = "/model/rotary_emb", b.spec.rotary_dim // 2
    frequency = ROPE_BASE ** -(np.arange(half, dtype=np.float32) / half)
    axis = b.ints(f"{name}/Constant", 1, 3)
    angle = b.op("Unsqueeze", f"{name}/Unsqueeze", positions, axis)
    angle = b.op("Cast", f"{name}/Cast", angle, to=ir.DataType.FLOAT)
    angle = b.op("Mul", f"{name}/Mul", angle, b.constant(f"{name}/Constant_1", frequency))
    angle = b.op("Concat", f"{name}/Concat", angle, angle, axis=-1)
    cosine = b.op("Cast", f"{name}/Cast_1", b.op("Cos", f"{name}/Cos", angle), to=b.dtype)
    sine = b.op("Cast", f"{name}/Cast_2", b.op("Sin", f"{name}/Sin", angle), to=b.dtype)
    return cosine, sine


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Grouped-query attention of one layer: decomposed, with the cache as Concat."""

    name: str
    bias: ir.Value
    cosine: ir.Value
    sine: ir.Value

    def build(
        self, b: _Builder, x: ir.Value, past: Sequence[ir.Value], present: list[ir.Value]
    ) -> ir.Value:
        """Append the block.

        Args:
            b: The graph so far.
            x: Normed hidden states, [batch, sequence, hidden].
            past: Cached key and value, each [batch, kv_heads, past, head_dim].
            present: Receives both, longer by `sequence`.

        Returns:
            What o_proj makes of the heads, [batch, sequence, hidden].
        """
        name, spec = self.name, b.spec
        query = self._rotate(b, self._project(b, x, "q", spec.heads), "q")
        key = self._rotate(b, self._project(b, x, "k", spec.kv_heads), "k")
        value = self._project(b, x, "v", spec.kv_heads)
        key = b.op("Concat", f"{name}/Concat_4", past[0], key, axis=2)
        value = b.op("Concat", f"{name}/Concat_5", past[1], value, axis=2)
        present += [key, value]
        key, value = self._repeat(b, key, "k"), self._repeat(b, value, "v")
        key = b.op("Transpose", f"{name}/Transpose_3", key, perm=[0, 1, 3, 2])
        scores = b.op("MatMul", f"{name}/MatMul", query, key)
        factor = np.array(spec.head_dim**-0.5, spec.dtype)
        scores = b.op("Mul", f"{name}/Mul_8", scores, b.constant(f"{name}/Constant_8", factor))
        scores = b.op("Add", f"{name}/Add_2", scores, self.bias)
        weights = b.op("Softmax", f"{name}/Softmax", scores, axis=-1)
        mixed = b.op("MatMul", f"{name}/MatMul_1", weights, value)
        mixed = b.op("Transpose", f"{name}/Transpose_4", mixed, perm=[0, 2, 1, 3])
        shape = b.ints(f"{name}/Constant_9", 0, 0, spec.hidden)
        mixed = b.op("Reshape", f"{name}/Reshape_5", mixed, shape)
        return b.linear(f"{name}/o_proj", mixed, b.random(spec.hidden, spec.hidden))

    def _project(self, b: _Builder, x: ir.Value, part: str, heads: int) -> ir.Value:
        """[batch, heads, sequence, head_dim]; a few rows of v_proj are outliers."""
        name, rows = f"{self.name}/{part}_proj", heads * b.spec.head_dim
        weight = b.random(rows, b.spec.hidden) / OUTLIER_GAIN
        if part == "v":
            weight[b.rng.choice(rows, OUTLIER_CHANNELS, replace=False)] *= OUTLIER_GAIN
        y = b.linear(name, x, weight)
        if b.spec.qkv_bias:
            label = f"{name[1:].replace('/', '.')}.bias"
            y = b.op("Add", f"{name}/Add", b.initializer(label, b.rng.normal(size=rows)), y)
        shape = b.ints(f"{self.name}/Constant_{part}", 0, 0, heads, b.spec.head_dim)
        y = b.op("Reshape", f"{self.name}/Reshape_{part}", y, shape)
        return b.op("Transpose", f"{self.name}/Transpose_{part}", y, perm=[0, 2, 1, 3])

    def _rotate(self, b: _Builder, x: ir.Value, part: str) -> ir.Value:
        """Return x cos + rotate_half(x) sin of the rotated channels, and the others."""
        if b.spec.rotated is None:
            return self._rotate_all(b, x, part)
        name = f"{self.name}/{part}/part"
        axis, zero = b.ints(f"{name}/Constant", 3), b.ints(f"{name}/Constant_1", 0)
        middle = b.ints(f"{name}/Constant_2", b.spec.rotary_dim)
        end = b.ints(f"{name}/Constant_3", np.iinfo(np.int64).max)
        turned = self._rotate_all(b, b.op("Slice", f"{name}/Slice", x, zero, middle, axis), part)
        rest = b.op("Slice", f"{name}/Slice_1", x, middle, end, axis)
        return b.op("Concat", f"{name}/Concat", turned, rest, axis=-1)

    def _rotate_all(self, b: _Builder, x: ir.Value, part: str) -> ir.Value:
        """Return x cos + rotate_half(x) sin."""
        name, half = f"{self.name}/{part}", b.spec.rotary_dim // 2
        axis, zero = b.ints(f"{name}/Constant", 3), b.ints(f"{name}/Constant_1", 0)
        middle = b.ints(f"{name}/Constant_2", half)
        end = b.ints(f"{name}/Constant_3", np.iinfo(np.int64).max)
        low = b.op("Slice", f"{name}/Slice", x, zero, middle, axis)
        high = b.op("Slice", f"{name}/Slice_1", x, middle, end, axis)
        turned = b.op("Concat", f"{name}/Concat", b.op("Neg", f"{name}/Neg", high), low, axis=-1)
        return b.op(
            "Add",
            f"{name}/Add",
            b.op("Mul", f"{name}/Mul", x, self.cosine),
            b.op("Mul", f"{name}/Mul_1", turned, self.sine),
        )

    def _repeat(self, b: _Builder, x: ir.Value, part: str) -> ir.Value:
        """[batch, kv_heads, total, head_dim] -> [batch, heads, total, head_dim]."""
        name, spec = f"{self.name}/repeat_{part}", b.spec
        x = b.op("Unsqueeze", f"{name}/Unsqueeze", x, b.ints(f"{name}/Constant", 2))
        times = b.ints(f"{name}/Constant_1", 1, 1, spec.heads // spec.kv_heads, 1, 1)
        x = b.op("Expand", f"{name}/Expand", x, times)
        shape = b.ints(f"{name}/Constant_2", 0, spec.heads, -1, spec.head_dim)
        return b.op("Reshape", f"{name}/Reshape", x, shape)
