"""Token embeddings become com.microsoft.GatherBlockQuantized.

No numerics here: the tables arrive finished, or are those of the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from faq_onnx.artifacts.plan import BlockFormat, EmbeddingPlan
from faq_onnx.artifacts.sites import EmbeddingSite
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import RewriteError
from faq_onnx.passes.low_bit_tensors import LowBitInitializers, WeightReader, add_low_bit
from faq_onnx.passes.nodes import (
    MICROSOFT_DOMAIN,
    ProducerIndex,
    add_initializer,
    become,
    import_microsoft_domain,
    low_bit_node_name,
    path_to_initializer,
    remove_dead,
)

__all__ = ["QuantizeEmbeddingPass"]


@dataclasses.dataclass(frozen=True)
class QuantizeEmbeddingPass(ir.passes.InPlacePass):
    """Read embeddings from blocks of 2, 4 or 8 bits.

    1. An embedding whose plan has neither a format nor `shared_with` stays as it is.
    2. The output value keeps its name, type and shape; names are as MatMulToNBitsPass gives them.
    3. Shared: the Gather reads the buffer of the head's MatMulNBits through a Reshape to
       [rows, bytes], with the same scales and zero points, so the table is stored once.
       Run MatMulToNBitsPass before.
    4. The width must be a multiple of the block size: the kernel derives the width of its output
       from the packed bytes, and MatMulNBits pads the last block.
    5. A second run changes nothing.

    Attributes:
        embeddings: All embeddings of the census.
        plans: By embedding name.
        weights: By embedding name; not asked for shared ones, whose bytes are in the model.
    """

    embeddings: tuple[EmbeddingSite, ...] = dataclasses.field(repr=False)
    plans: Mapping[str, EmbeddingPlan] = dataclasses.field(repr=False)
    weights: Mapping[str, QuantizedWeight] = dataclasses.field(repr=False)

    def requires(self, model: ir.Model) -> None:
        """Every planned embedding is there and convertible, and has a table to read.

        Raises:
            RewriteError: for the first that is not.
        """
        producers, available = ProducerIndex(model), set(self.weights)
        for site, plan in self._planned():
            node = producers.node(site.output, site.name)
            if _is_low_bit(node):
                continue
            _check_site(site, node)
            if plan.shared_with is not None:
                _head_node(model, site, plan)
                continue
            assert plan.format is not None
            _check_width(site, plan.format.block_size)
            if site.name not in available:
                raise RewriteError(f"{site.name}: is planned, but no quantized table was made")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in graph order."""
        producers, reader = ProducerIndex(model), WeightReader(self.weights)
        written: dict[tuple[ir.Value, BlockFormat], LowBitInitializers] = {}
        retired: list[ir.Value] = []
        for site, plan in self._planned():
            node = producers.node(site.output, site.name)
            if _is_low_bit(node):
                continue
            table = path_to_initializer(node, 0)
            retired.append(table[0])
            if plan.shared_with is not None:
                _share(node, site, _head_node(model, site, plan))
                continue
            assert plan.format is not None
            key = (table[-1], plan.format)
            if key not in written:
                written[key] = add_low_bit(table[-1], site, plan.format, reader)
            _rewrite(node, site, written[key], plan.format.block_size)
        remove_dead(retired)
        if retired:
            import_microsoft_domain(model)
        return ir.passes.PassResult(model, modified=bool(retired))

    def ensures(self, model: ir.Model) -> None:
        """Every planned embedding is a GatherBlockQuantized node now.

        Raises:
            RewriteError: for the first that is not.
        """
        producers = ProducerIndex(model)
        for site, _ in self._planned():
            if not _is_low_bit(producers.node(site.output, site.name)):
                raise RewriteError(f"{site.name}: was not rewritten; this is a bug in the pass")

    def _planned(self) -> list[tuple[EmbeddingSite, EmbeddingPlan]]:
        """Embeddings with a format of their own or of the head, in graph order."""
        known = [site for site in self.embeddings if site.name in self.plans]
        pairs = [(site, self.plans[site.name]) for site in known]
        return [(site, plan) for site, plan in pairs if plan.format or plan.shared_with]


def _is_low_bit(node: ir.Node) -> bool:
    return node.domain == MICROSOFT_DOMAIN and node.op_type == "GatherBlockQuantized"


def _check_site(site: EmbeddingSite, node: ir.Node) -> None:
    """Guard what the census promises."""
    if node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        raise RewriteError(
            f"{site.name}: {site.output!r} comes from {node.op_type}, only a Gather on axis 0 can "
            "read low bits; take the census again"
        )
    if site.dtype not in ("float32", "float16"):
        raise RewriteError(
            f"{site.name}: onnxruntime's GatherBlockQuantized gives float32 and float16, not "
            f"{site.dtype}; keep the embedding float"
        )
    table = path_to_initializer(node, 0)[-1]
    if table.name != site.weight:
        raise RewriteError(
            f"{site.name}: reads the table {table.name!r}, the census says {site.weight!r}; "
            "take the census again"
        )


def _check_width(site: EmbeddingSite, block_size: int) -> None:
    if site.width % block_size:
        raise RewriteError(
            f"{site.name}: width {site.width} is not a multiple of block_size={block_size}, which "
            "GatherBlockQuantized needs; choose a divisor of it, or keep the embedding float"
        )


def _head_node(model: ir.Model, site: EmbeddingSite, plan: EmbeddingPlan) -> ir.Node:
    """The MatMulNBits node of the head whose table is shared.

    Raises:
        RewriteError: when the head is float still, or its table does not fit.
    """
    assert plan.shared_with is not None
    names = {low_bit_node_name(plan.shared_with, bits) for bits in (2, 4, 8)}
    heads = [node for node in model.graph.all_nodes() if node.name in names]
    if not heads or heads[0].op_type != "MatMulNBits":
        raise RewriteError(
            f"{site.name}: is to share the table of {plan.shared_with}, which is not in low bits; "
            "run matmul-to-nbits before quantize-embedding, and give the head a format"
        )
    numbers = {name: attr.as_int() for name, attr in heads[0].attributes.items()}
    if (numbers["N"], numbers["K"]) != (site.rows, site.width):
        raise RewriteError(
            f"{site.name}: table [{site.rows}, {site.width}] cannot be shared with "
            f"{plan.shared_with}, which has [{numbers['N']}, {numbers['K']}]"
        )
    _check_width(site, numbers["block_size"])
    return heads[0]


def _share(node: ir.Node, site: EmbeddingSite, head: ir.Node) -> None:
    """Let the Gather read the head's initializers."""
    packed, scales, *zero_points = head.inputs[1:]
    assert packed is not None
    assert scales is not None
    graph = packed.graph
    assert graph is not None
    assert node.graph is not None
    bits, block_size = (head.attributes[name].as_int() for name in ("bits", "block_size"))
    rows = np.array([site.rows, -1], np.int64)
    shape = add_initializer(graph, f"{site.name}_data_shape", ir.tensor(rows))
    reshape = ir.node("Reshape", [packed, shape], name=f"{site.name}_data")
    reshape.outputs[0].name = f"{site.name}_data_output"
    reshape.outputs[0].dtype = ir.DataType.UINT8
    reshape.outputs[0].shape = ir.Shape([site.rows, site.width * bits // 8])
    node.graph.insert_before(node, reshape)
    weight = LowBitInitializers(bits, reshape.outputs[0], scales, next(iter(zero_points), None))
    _rewrite(node, site, weight, block_size)


def _rewrite(
    node: ir.Node, site: EmbeddingSite, weight: LowBitInitializers, block_size: int
) -> None:
    """Turn the Gather into GatherBlockQuantized."""
    data, *rest = weight.inputs
    become(node, MICROSOFT_DOMAIN, "GatherBlockQuantized", [data, node.inputs[1], *rest])
    numbers = {
        "bits": weight.storage_bits,
        "block_size": block_size,
        "gather_axis": 0,
        "quantize_axis": 1,
    }
    for name, number in numbers.items():
        node.attributes[name] = ir.AttrInt64(name, number)
    node.name = low_bit_node_name(site.name, weight.storage_bits)
