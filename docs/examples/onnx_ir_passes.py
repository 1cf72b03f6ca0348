"""faq-onnx's passes among others in a PassManager of onnx_ir.

python onnx_ir_passes.py model.onnx low-bit.onnx
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from faq_onnx.analysis import canonicalise, find_attention, take_census
from faq_onnx.artifacts.plan import SitePlan
from faq_onnx.graph.weights import read_weight
from faq_onnx.passes import FuseAttentionPass, MatMulToNBitsPass
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import quantize_rtn


class TagLowBitNodesPass(ir.passes.InPlacePass):
    """A pass of your own."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Mark every MatMulNBits; says whether there was one."""
        nodes = [node for node in model.graph if node.op_type == "MatMulNBits"]
        for node in nodes:
            node.metadata_props["made_by"] = "onnx_ir_passes.py"
        return ir.passes.PassResult(model, modified=bool(nodes))


def main(source: Path, output: Path) -> None:
    """Run our passes and yours over the model in `source`; writes `output`."""
    model = ir.load(source)
    canonicalise(model)  # one form for what exporters write in many

    census = take_census(model)
    fmt = block_format(4, 32, symmetric=False)
    sites = tuple(site for site in census.sites if site.role != "lm_head")
    plans = {site.name: SitePlan(site=site.name, format=fmt) for site in sites}
    # Any finished weights will do: these are rounded to nearest.
    weights = {site.name: quantize_rtn(read_weight(model, site), fmt) for site in sites}

    passes = ir.passes.PassManager(
        [
            IdentityEliminationPass(),
            MatMulToNBitsPass(sites, plans, weights),
            FuseAttentionPass(find_attention(model, 512).blocks),
            TagLowBitNodesPass(),
            RemoveUnusedNodesPass(),
        ]
    )
    ir.save(passes(model).model, output)
    sys.stdout.write(f"{len(sites)} of {len(census.sites)} products in 4 bits\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
