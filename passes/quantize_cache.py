"""The cache of com.microsoft.GroupQueryAttention in int8.

No numerics here: the scales arrive finished, see `faq_onnx.quant.cache_scales`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.errors import RewriteError
from faq_onnx.passes.nodes import MICROSOFT_DOMAIN, add_initializer

__all__ = ["QuantizeCachePass"]

_PAST, _PRESENT = (3, 4), (1, 2)  # key and value among inputs and outputs
_SCALES = (12, 13)
_CACHE_BITS = 8


@dataclasses.dataclass(frozen=True)
class QuantizeCachePass(ir.passes.InPlacePass):
    """Keep keys and values in int8, with one scale for each channel of each key/value head.

    1. The cache inputs and outputs of the graph become int8; names and shapes stay.
    2. The node gets `k_scale` and `v_scale`, float32 [kv_heads * head_dim]; it rounds what it
       writes and multiplies what it reads.
    3. A second run changes nothing.

    Attributes:
        scales: By name of the graph output, float32 [kv_heads * head_dim].
    """

    scales: Mapping[str, npt.NDArray[np.float32]] = dataclasses.field(repr=False)

    def requires(self, model: ir.Model) -> None:
        """Every cache of the graph is a float one of GroupQueryAttention, and has scales.

        Raises:
            RewriteError: for the first that is not.
        """
        for node in self._pending(model):
            past = [node.inputs[index] for index in _PAST]
            present = [node.outputs[index] for index in _PRESENT]
            for value in present:
                if value.name not in self.scales:
                    raise RewriteError(f"{node.name}: no scales were made for {value.name!r}")
            for each in (*past, *present):
                _check_value(node, each)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in graph order."""
        pending = self._pending(model)
        for node in pending:
            self._rewrite(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(pending))

    def ensures(self, model: ir.Model) -> None:
        """No cache is float any more.

        Raises:
            RewriteError: for the first that is.
        """
        for node in self._pending(model):
            raise RewriteError(f"{node.name}: was not rewritten; this is a bug in the pass")

    def _pending(self, model: ir.Model) -> list[ir.Node]:
        return [
            node
            for node in model.graph
            if (node.domain, node.op_type) == (MICROSOFT_DOMAIN, "GroupQueryAttention")
            and "kv_cache_bit_width" not in node.attributes
        ]

    def _rewrite(self, graph: ir.Graph, node: ir.Node) -> None:
        node.resize_inputs(_SCALES[-1] + 1)
        for past, present, place in zip(_PAST, _PRESENT, _SCALES, strict=True):
            output = node.outputs[present]
            assert output.name is not None
            tensor = ir.tensor(np.ascontiguousarray(self.scales[output.name], np.float32))
            node.replace_input_with(place, add_initializer(graph, f"{output.name}_scale", tensor))
            for value in (node.inputs[past], output):
                assert value is not None
                value.dtype = ir.DataType.INT8
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes[name] = ir.AttrString(name, "PER_CHANNEL")
        node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", _CACHE_BITS)


def _check_value(node: ir.Node, value: ir.Value | None) -> None:
    if value is None or not (value.is_graph_input() or value.is_graph_output()):
        name = "a cache" if value is None else repr(value.name)
        raise RewriteError(f"{node.name}: {name} is no input or output of the graph")
    if value.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise RewriteError(
            f"{node.name}: {value.name!r} is {value.dtype}; onnxruntime's CPU kernel quantizes "
            "caches of float32 and float16"
        )
    others = [user.name for user, _ in value.uses() if user is not node]
    if others:
        raise RewriteError(f"{node.name}: {value.name!r} is read by {others[0]} as well")
