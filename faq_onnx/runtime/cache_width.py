"""The width of the key/value cache where a graph only gives it a name.

onnxruntime-genai's builder declares past_key_values.N.key as [batch, heads, past, "kv_cache_dim"];
an empty cache cannot be made from that. The GroupQueryAttention node that reads it knows better.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

__all__ = ["named_cache_widths", "parse_model"]

ATTENTION = "GroupQueryAttention"
PAST_KEY, COS_CACHE = 3, 7


def named_cache_widths(model: ir.Model) -> dict[str, int]:
    """Head widths by dimension name, as far as attention nodes tell."""
    widths: dict[str, int] = {}
    for node in model.graph:
        if node.op_type != ATTENTION or len(node.inputs) <= COS_CACHE:
            continue
        past, table = node.inputs[PAST_KEY], node.inputs[COS_CACHE]
        if past is None or past.shape is None or len(past.shape) != 4:
            continue
        # the table holds an angle for each pair of channels; a partial rotation says less
        partial = node.attributes.get_int("rotary_embedding_dim", 0)
        name = past.shape[3]
        if (
            isinstance(name, ir.SymbolicDim)
            and name.value is not None
            and not partial
            and table is not None
            and table.const_value is not None
        ):
            widths[name.value] = 2 * int(table.const_value.shape.numpy()[1])
    return widths


def parse_model(serialized: bytes) -> ir.Model:
    """The model of serialized bytes."""
    return ir.serde.deserialize_model(onnx.ModelProto.FromString(serialized))
