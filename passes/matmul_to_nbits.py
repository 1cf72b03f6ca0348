"""MatMul and Gemm with a constant weight become com.microsoft.MatMulNBits.

No numerics here: the weights arrive finished, see `faq_onnx.quant`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx_ir as ir

from faq_onnx.artifacts.plan import BlockFormat, SitePlan
from faq_onnx.artifacts.sites import LinearSite, WeightLayout
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import RewriteError
from faq_onnx.passes.low_bit_tensors import LowBitInitializers, WeightReader, add_low_bit
from faq_onnx.passes.nodes import (
    MICROSOFT_DOMAIN,
    ProducerIndex,
    become,
    import_microsoft_domain,
    initializer_above,
    low_bit_node_name,
    path_to_initializer,
    remove_dead,
)

__all__ = ["MatMulToNBitsPass"]


@dataclasses.dataclass(frozen=True)
class MatMulToNBitsPass(ir.passes.InPlacePass):
    """Store the weights of planned sites in 2, 4 or 8 bits.

    1. A site whose plan has no format stays as it is.
    2. The output value keeps its name, type and shape; the node is called `<site>_Q<bits>`, its
       initializers `<weight>_Q<bits>`, `<weight>_scales` and `<weight>_zero_points`.
    3. The bias of a Gemm becomes an Add: QNN and DirectML refuse MatMulNBits with a bias input,
       and onnxruntime's CPU provider fuses the Add by itself.
    4. A weight that several sites read is written once, where its initializer was: in the main
       graph or in the body of the If.
    5. The old initializer, and a Transpose above it, go when nobody else reads them.
    6. A second run changes nothing.

    Attributes:
        sites: All sites of the census.
        plans: By site name.
        weights: By site name; read once per site, when the model is written.
    """

    sites: tuple[LinearSite, ...] = dataclasses.field(repr=False)
    plans: Mapping[str, SitePlan] = dataclasses.field(repr=False)
    weights: Mapping[str, QuantizedWeight] = dataclasses.field(repr=False)

    def requires(self, model: ir.Model) -> None:
        """Every planned site is there and convertible, and has a weight.

        Raises:
            RewriteError: for the first that is not.
        """
        producers, available = ProducerIndex(model), set(self.weights)
        for site, _ in self._planned():
            node = producers.node(site.output, site.name)
            if _low_bit_node(node) is not None:
                continue
            if site.name not in available:
                raise RewriteError(f"{site.name}: is planned, but no quantized weight was made")
            _check_site(site, node)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in graph order."""
        producers, reader = ProducerIndex(model), WeightReader(self.weights)
        written: dict[tuple[ir.Value, BlockFormat], LowBitInitializers] = {}
        retired: list[ir.Value] = []
        for site, plan in self._planned():
            node = producers.node(site.output, site.name)
            if _low_bit_node(node) is not None:
                continue
            assert plan.format is not None
            weight = initializer_above(node, 1, site)
            key = (weight, plan.format)
            if key not in written:
                written[key] = add_low_bit(weight, site, plan.format, reader)
            retired.append(path_to_initializer(node, 1)[0])
            _rewrite(node, site, plan, written[key])
        remove_dead(retired)
        if retired:
            import_microsoft_domain(model)
        return ir.passes.PassResult(model, modified=bool(retired))

    def ensures(self, model: ir.Model) -> None:
        """Every planned site is a MatMulNBits node now.

        Raises:
            RewriteError: for the first that is not.
        """
        producers = ProducerIndex(model)
        for site, _ in self._planned():
            node = _low_bit_node(producers.node(site.output, site.name))
            if node is None or node.attributes.get_int("N") != site.out_features:
                raise RewriteError(f"{site.name}: was not rewritten; this is a bug in the pass")

    def _planned(self) -> list[tuple[LinearSite, SitePlan]]:
        """Sites with a format, in graph order."""
        pairs = [(site, self.plans[site.name]) for site in self.sites if site.name in self.plans]
        return [(site, plan) for site, plan in pairs if plan.format is not None]


def _low_bit_node(node: ir.Node) -> ir.Node | None:
    """The MatMulNBits node that a site has become, looking through the Add of a Gemm's bias."""
    if node.op_type == "Add" and node.inputs[0] is not None:
        node = node.inputs[0].producer() or node
    is_low_bit = node.domain == MICROSOFT_DOMAIN and node.op_type == "MatMulNBits"
    return node if is_low_bit else None


def _check_site(site: LinearSite, node: ir.Node) -> None:
    """Guard what the census promises."""
    if node.op_type not in ("MatMul", "Gemm") or node.domain not in ("", "ai.onnx"):
        raise RewriteError(
            f"{site.name}: {site.output!r} comes from {node.domain}::{node.op_type}, "
            "only MatMul and Gemm can be stored in low bits; take the census again"
        )
    if site.dtype not in ("float32", "float16"):
        raise RewriteError(
            f"{site.name}: onnxruntime's MatMulNBits computes in float32 and float16, "
            f"not {site.dtype}; keep the site float"
        )
    initializer_above(node, 1, site)
    if node.op_type == "Gemm":
        _check_gemm(site, node)
    if site.layout is WeightLayout.ONE_K_N:
        _check_rank(site, node)


def _check_gemm(site: LinearSite, node: ir.Node) -> None:
    """MatMulNBits has no transA, and no factors."""
    factors = [node.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    if node.attributes.get_int("transA", 0) or factors != [1.0, 1.0]:
        raise RewriteError(
            f"{site.name}: Gemm with transA={node.attributes.get_int('transA', 0)}, "
            f"alpha={factors[0]}, beta={factors[1]}; only 0, 1, 1 can be stored in low bits"
        )


def _check_rank(site: LinearSite, node: ir.Node) -> None:
    """A weight [1, K, N] gives rank 3 even for a matrix; MatMulNBits does not."""
    activation = node.inputs[0]
    shape = None if activation is None else activation.shape
    if shape is None or len(shape) < 3:
        raise RewriteError(
            f"{site.name}: weight [1, K, N] with an activation of shape {shape}: the output would "
            "lose its leading 1; run shape inference first, or keep the site float"
        )


def _rewrite(node: ir.Node, site: LinearSite, plan: SitePlan, weight: LowBitInitializers) -> None:
    """Turn one node into MatMulNBits, followed by an Add where a Gemm has a bias."""
    bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    attributes = _attributes(site, plan)
    name = low_bit_node_name(site.name, weight.storage_bits)
    if bias is None:
        become(node, MICROSOFT_DOMAIN, "MatMulNBits", [node.inputs[0], *weight.inputs])
        node.attributes.update(attributes)
        node.name = name
        return
    product = ir.Node(
        MICROSOFT_DOMAIN,
        "MatMulNBits",
        [node.inputs[0], *weight.inputs],
        attributes.values(),
        name=name,
    )
    product.outputs[0].name = f"{site.output}_product"
    product.outputs[0].type = node.outputs[0].type
    product.outputs[0].shape = node.outputs[0].shape
    assert node.graph is not None
    node.graph.insert_before(node, product)
    become(node, "", "Add", [product.outputs[0], bias])


def _attributes(site: LinearSite, plan: SitePlan) -> dict[str, ir.Attr]:
    """Attributes of MatMulNBits."""
    assert plan.format is not None
    numbers = {
        "K": site.in_features,
        "N": site.out_features,
        "accuracy_level": plan.accuracy_level,
        "bits": plan.format.storage_bits,
        "block_size": plan.format.block_size,
    }
    return {name: ir.AttrInt64(name, number) for name, number in numbers.items()}
