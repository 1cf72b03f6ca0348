"""Channel scales enter the graph: into the producers' weights, or as a Mul.

No search here: the plan says where and the scales arrive finished, see `faq_onnx.planning`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from faq_onnx.artifacts.plan import GroupPlan, QuantPlan, ScaleApplication
from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.sites import LinearSite, ModelCensus, ScaleGroup
from faq_onnx.errors import RewriteError
from faq_onnx.graph.weights import find_initializer
from faq_onnx.passes.absorbers import (
    Fold,
    Vector,
    absorb_in_linear,
    absorb_in_norm,
    multiply,
    row_scale,
)
from faq_onnx.passes.nodes import ProducerIndex, add_initializer, initializer_above, readers

__all__ = ["FOLDED_KEY", "FoldScalesPass"]

FOLDED_KEY = "faq_onnx.channel_scales"
"""Metadata of a model: JSON {group: fingerprint of its scale}. It is what makes a second run
change nothing, and it tells whoever reads the file what was scaled."""

_SHAPE_READERS = ("Shape", "Size")
"""These read an activation, but not its values."""

_VIEWS = ("Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")
"""Between a norm and the sites that read it: they keep the channels last."""


@dataclasses.dataclass(frozen=True)
class FoldScalesPass(ir.passes.InPlacePass):
    """Multiply the readers' weights by a channel scale and divide their producer by it.

    1. A site's weight takes s along its input channels, in whatever layout it lies.
    2. FOLD: the absorber takes 1/s: a norm's gain (and bias), or rows of a linear layer (and its
       bias), where all query heads of one key/value head share their scale.
    3. MUL: a Mul by 1/s goes in front of the sites.
    4. A weight that anything else reads is refused. Only a norm's gain is copied instead: several
       norms may share one.
    5. Weights keep their dtype; they are multiplied in float32, when read, and rounded once.
    6. A second run changes nothing: the model's metadata name the groups that are done.

    Attributes:
        census: Of the model.
        plan: Says for each group whether and how.
        scales: float32 [K] by group name.
    """

    census: ModelCensus = dataclasses.field(repr=False)
    plan: QuantPlan = dataclasses.field(repr=False)
    scales: Mapping[str, Vector] = dataclasses.field(repr=False)

    def requires(self, model: ir.Model) -> None:
        """Every scale fits its group, and every weight that it changes may change.

        Raises:
            RewriteError: for the first that does not.
        """
        producers = ProducerIndex(model)
        for fold in self._folds(model):
            _check_scale(fold)
            if fold.application is ScaleApplication.FOLD and fold.group.absorber is None:
                raise RewriteError(
                    f"{fold.group.name}: nothing absorbs its scale ({fold.group.reason}); plan "
                    "the application 'mul' or 'none'"
                )
            _check_readers(model, fold, producers)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Scale group by group, in the plan's order."""
        producers, folds = ProducerIndex(model), self._folds(model)
        done = _folded(model)
        for fold in folds:
            for weight, axis in fold.columns(producers).items():
                multiply(model, weight, fold.scale, axis)
            if fold.application is ScaleApplication.MUL:
                _insert_mul(fold, producers)
            elif fold.absorbing_site is None:
                absorb_in_norm(model, fold, producers)
            else:
                absorb_in_linear(model, fold, producers)
            done[fold.group.name] = _fingerprint(fold.scale)
        if folds:
            model.metadata_props[FOLDED_KEY] = json.dumps(done)
        return ir.passes.PassResult(model, modified=bool(folds))

    def ensures(self, model: ir.Model) -> None:
        """Nothing is left to fold.

        Raises:
            RewriteError: if something is.
        """
        if self._folds(model):
            raise RewriteError("groups were left unscaled; this is a bug in the pass")

    def _folds(self, model: ir.Model) -> list[Fold]:
        """What is planned and not done yet."""
        done = _folded(model)
        groups = {group.name: group for group in self.census.groups}
        sites = {site.name: site for site in self.census.sites}
        folds = []
        for plan in self.plan.groups:
            if plan.application is ScaleApplication.NONE:
                continue
            fold = _look_up(plan, groups, sites, self.scales)
            if plan.group not in done:
                folds.append(fold)
            elif done[plan.group] != _fingerprint(fold.scale):
                raise RewriteError(
                    f"{plan.group}: the model already carries another channel scale for this "
                    "group; start from the unscaled model"
                )
        return folds


def _look_up(
    plan: GroupPlan,
    groups: Mapping[str, ScaleGroup],
    sites: Mapping[str, LinearSite],
    scales: Mapping[str, Vector],
) -> Fold:
    """Bring together what belongs to one group.

    Raises:
        RewriteError: when the plan names a group that is not there, or one without a scale.
    """
    group = groups.get(plan.group)
    if group is None:
        raise RewriteError(f"{plan.group}: the plan's group is not in the census")
    if plan.group not in scales:
        raise RewriteError(f"{plan.group}: is to be scaled, but there is no scale for it")
    absorber = group.absorber.site if group.absorber is not None else None
    return Fold(
        group=group,
        application=plan.application,
        scale=scales[plan.group],
        sites=tuple(sites[name] for name in group.sites),
        absorbing_site=None if absorber is None else sites[absorber],
    )


def _folded(model: ir.Model) -> dict[str, str]:
    """Groups that were scaled in this model, with the fingerprints of their scales."""
    text = model.metadata_props.get(FOLDED_KEY, "{}")
    done: dict[str, str] = json.loads(text)
    return done


def _fingerprint(scale: Vector) -> str:
    return fingerprint_bytes(np.ascontiguousarray(scale, np.float32).tobytes())[:16]


def _check_scale(fold: Fold) -> None:
    """Shape, sign, and that heads which share a row share a scale."""
    name, scale = fold.group.name, fold.scale
    if not fold.group.scalable:
        raise RewriteError(f"{name}: its weights must not change ({fold.group.reason})")
    if scale.shape != (fold.group.in_features,):
        raise RewriteError(
            f"{name}: scale has shape {list(scale.shape)}, needs [{fold.group.in_features}]"
        )
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        worst = scale[~(np.isfinite(scale) & (scale > 0))][0]
        raise RewriteError(f"{name}: a channel scale is {worst}; all must be positive and finite")
    if fold.application is ScaleApplication.FOLD and fold.absorbing_site is not None:
        assert fold.group.absorber is not None
        row_scale(fold, fold.group.absorber, fold.absorbing_site.out_features)


def _check_readers(model: ir.Model, fold: Fold, producers: ProducerIndex) -> None:
    """Everything that is scaled must be read by this group alone."""
    nodes = {producers.node(site.output, site.name) for site in fold.sites}
    for weight in fold.columns(producers):
        _check_only_read_by(weight, nodes, fold)
    if fold.application is not ScaleApplication.FOLD:
        return
    for node in nodes:
        _check_activation(node, nodes, fold)
    site = fold.absorbing_site
    if site is None:
        return
    absorbing = producers.node(site.output, site.name)
    _check_only_read_by(initializer_above(absorbing, 1, site), {absorbing}, fold)
    if site.bias is not None:
        _check_bias(find_initializer(model, site.bias), site, fold)


def _check_activation(node: ir.Node, nodes: set[ir.Node], fold: Fold) -> None:
    """Nobody outside of the group sees the divided activation."""
    activation = node.inputs[0]
    assert activation is not None
    allowed = (*_SHAPE_READERS, *_VIEWS)
    others = [each for each in activation.consumers() if each not in nodes]
    strangers = [each.name or each.op_type for each in others if each.op_type not in allowed]
    if activation.is_graph_output():
        strangers.append("the graph's output")
    if strangers:
        raise RewriteError(
            f"{fold.group.name}: {activation.name!r} is also read by {strangers[0]}, which is not "
            "in the group and would see divided values; plan the application 'mul'"
        )


def _check_bias(bias: ir.Value, site: LinearSite, fold: Fold) -> None:
    """The absorber's bias is its own and has one element per row."""
    if len(bias.uses()) > 1:
        raise RewriteError(
            f"{fold.group.name}: the bias {bias.name!r} of {site.name} has other readers, so it "
            "cannot be divided; plan the application 'mul' or 'none'"
        )
    assert bias.const_value is not None
    shape = bias.const_value.shape.numpy()
    if not shape or shape[-1] != site.out_features:
        raise RewriteError(
            f"{fold.group.name}: the bias {bias.name!r} of {site.name} has shape {list(shape)}, "
            f"needs [..., {site.out_features}]; plan the application 'mul' or 'none'"
        )


def _check_only_read_by(weight: ir.Value, nodes: set[ir.Node], fold: Fold) -> None:
    """A weight that anything else reads, or that is visible from outside, must not change."""
    group = fold.group.name
    others = [node for node in readers(weight) if node not in nodes]
    if weight.is_graph_input() or weight.is_graph_output():
        raise RewriteError(f"{group}: {weight.name!r} is an input or output of the graph")
    if others:
        raise RewriteError(
            f"{group}: {weight.name!r} is also read by {others[0].name or others[0].op_type}, "
            "so it cannot be scaled; plan the application 'none' for this group"
        )


def _insert_mul(fold: Fold, producers: ProducerIndex) -> None:
    """A Mul by 1/s in front of the sites, one for each value that they read."""
    inserted: dict[ir.Value, ir.Value] = {}
    inverse: ir.Value | None = None
    for site in fold.sites:
        node = producers.node(site.output, site.name)
        activation, graph = node.inputs[0], node.graph
        assert activation is not None
        assert graph is not None
        if inverse is None:
            vector = (1 / fold.scale).astype(_NUMPY_DTYPES[site.dtype])
            name = f"{fold.group.name}.channel_scale_inverse"
            inverse = add_initializer(graph, name, ir.tensor(vector))
        if activation not in inserted:
            inserted[activation] = _mul_before(node, activation, inverse, fold.group.name)
        node.replace_input_with(0, inserted[activation])


_NUMPY_DTYPES = {"float32": np.float32, "float16": np.float16}


def _mul_before(node: ir.Node, activation: ir.Value, inverse: ir.Value, group: str) -> ir.Value:
    """Activation times inverse, right before `node`."""
    mul = ir.node("Mul", [activation, inverse], name=f"/{group}/Mul")
    # two groups may read one activation, each with its own scale
    mul.outputs[0].name = f"{group}/{activation.name}_scaled"
    mul.outputs[0].type, mul.outputs[0].shape = activation.type, activation.shape
    assert node.graph is not None
    node.graph.insert_before(node, mul)
    return mul.outputs[0]
