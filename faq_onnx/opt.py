"""Passes by hand: text pipelines over one model, for people who write passes.

The composition of `passes.spec` (text) with analysis, numerics and the passes. What is decided
here is decided by the person at the keyboard; `faq_onnx.pipeline` is the product.
"""

from __future__ import annotations

import fnmatch
import functools
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from faq_onnx.analysis import canonicalise, find_attention, find_rotation, take_census
from faq_onnx.artifacts.plan import (
    BlockFormat,
    EmbeddingPlan,
    GroupPlan,
    QuantPlan,
    ScaleApplication,
    SitePlan,
)
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus, WeightLayout
from faq_onnx.artifacts.source import context_length
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.errors import ConfigError
from faq_onnx.graph.tensors import read_tensor
from faq_onnx.graph.weights import find_initializer
from faq_onnx.passes import (
    ActivationRequest,
    FoldScalesPass,
    FuseAttentionPass,
    FuseNormsPass,
    InsertActivationStatsPass,
    LiftMatMulNBitsPass,
    MatMulToNBitsPass,
    OnPass,
    PackQkvPass,
    ProductSteps,
    QuantizeActivationsPass,
    QuantizeCachePass,
    QuantizeEmbeddingPass,
    RotatePass,
    StaticShapesPass,
    run_passes,
    spec,
)
from faq_onnx.planning.planner import PlannedModel
from faq_onnx.quant.formats import block_format, check_embedding_format, check_format
from faq_onnx.quant.uniform import quantize_rtn
from faq_onnx.runtime.feeds import cache_position

__all__ = ["PassBuilder", "optimize"]

_LOGGER = logging.getLogger(__name__)
_ROTATED_PARTS = {"residual", "heads"}


def optimize(
    model: ir.Model,
    pipeline: str,
    *,
    config: Mapping[str, object] | None = None,
    on_pass: OnPass | None = None,
) -> ir.passes.PassResult:
    """Run a text pipeline over a model, in place.

    Args:
        model: As `graph.io.load_model` gives it, or built by hand.
        pipeline: See `passes.spec`.
        config: The parsed config.json, if there is one.
        on_pass: Called after each pass.

    Raises:
        ConfigError: for a pipeline that cannot be read, or options that do not fit.
        FaqOnnxError: of a pass, with the pass's name as a note.
    """
    specs = spec.parse_pipeline(pipeline)
    canonicalise(model)
    builder = PassBuilder(model, config)
    # one at a time: a pass is built on the weights that the one before has left
    return run_passes(model, (builder.build(each) for each in specs), on_pass=on_pass)


class PassBuilder:
    """Turns specs into passes over one model."""

    def __init__(self, model: ir.Model, config: Mapping[str, object] | None = None) -> None:
        self._model = model
        self._config = config

    @functools.cached_property
    def census(self) -> ModelCensus:
        """Taken when the first pass needs it; passes keep the names that it goes by."""
        return take_census(self._model, self._config)

    def build(self, wish: spec.PassSpec) -> ir.passes.PassBase:  # noqa: C901, PLR0911, PLR0912  one a pass
        """The pass that a spec means for this model."""
        match wish:
            case spec.FoldScales():
                return self._fold_scales(wish)
            case spec.FuseAttention():
                return self._fuse_attention(wish)
            case spec.FuseNorms():
                return FuseNormsPass(wish.min_width)
            case spec.InsertActivationStats():
                return self._insert_activation_stats(wish)
            case spec.LiftMatMulNBits():
                return LiftMatMulNBitsPass()
            case spec.MatMulToNBits():
                return self._matmul_to_nbits(wish)
            case spec.PackQkv():
                return PackQkvPass()
            case spec.QuantizeActivations():
                return _quantize_activations(self._model, wish.step)
            case spec.QuantizeCache():
                return _quantize_cache(self._model, wish.scale)
            case spec.QuantizeEmbedding():
                return self._quantize_embedding(wish)
            case spec.Rotate():
                return self._rotate(wish)
            case spec.StaticShapes():
                return StaticShapesPass(_parse_shapes(wish.shapes))
            case spec.RemoveUnused():
                return common.RemoveUnusedNodesPass()
            case spec.ImportedPass():
                return _imported(wish)
            case _:
                raise ConfigError(f"no pass is built from {type(wish).__name__}")

    def _fold_scales(self, wish: spec.FoldScales) -> ir.passes.PassBase:
        if wish.plan:
            fingerprint = self.census.fingerprint()
            planned = PlannedModel.load(Path(wish.plan), census_fingerprint=fingerprint)
            return FoldScalesPass(self.census, planned.plan, planned.scales)
        applications = [each.value for each in ScaleApplication]
        if wish.application not in applications or wish.scale <= 0:
            raise ConfigError(
                f"fold-scales: needs plan=FOLDER, or scale=NUMBER > 0 with application one of "
                f"{', '.join(applications)}; has scale={wish.scale:g}, "
                f"application={wish.application}"
            )
        return self._fold_constant(wish.scale, ScaleApplication(wish.application))

    def _fold_constant(self, scale: float, application: ScaleApplication) -> FoldScalesPass:
        """One number for all channels of every group that can take it."""
        groups = [group for group in self.census.groups if group.scalable]
        if application is ScaleApplication.FOLD:
            groups = [group for group in groups if group.absorber is not None]
        plan = QuantPlan(
            census_fingerprint=self.census.fingerprint(),
            method="by hand",
            sites=(),
            groups=tuple(GroupPlan(group=each.name, application=application) for each in groups),
            embeddings=(),
        )
        scales = {each.name: np.full(each.in_features, scale, np.float32) for each in groups}
        return FoldScalesPass(self.census, plan, scales)

    def _fuse_attention(self, wish: spec.FuseAttention) -> ir.passes.PassBase:
        survey = find_attention(self._model, wish.positions or context_length(self._config))
        for each in survey.declined:
            _LOGGER.warning("fuse-attention: %s stays: %s", each.name, each.reason)
        return FuseAttentionPass(survey.blocks)

    def _insert_activation_stats(self, wish: spec.InsertActivationStats) -> ir.passes.PassBase:
        outside = {site.name for site in self.census.sites if not site.in_subgraph}
        groups = [each for each in self.census.groups if outside.issuperset(each.sites)]
        requests = tuple(
            ActivationRequest(each.input, each.in_features, sum_abs=wish.sum_abs, gram=wish.gram)
            for each in groups
        )
        return InsertActivationStatsPass(requests)

    def _matmul_to_nbits(self, wish: spec.MatMulToNBits) -> ir.passes.PassBase:
        fmt = block_format(wish.bits, wish.block_size, wish.symmetric)
        sites = tuple(
            site for site in self.census.sites if not fnmatch.fnmatchcase(site.name, wish.exclude)
        )
        for site in sites:
            check_format(fmt, in_features=site.in_features, site=site.name)
        plans = {
            site.name: SitePlan(site=site.name, format=fmt, accuracy_level=wish.accuracy_level)
            for site in sites
        }
        return MatMulToNBitsPass(sites, plans, self._rounded(sites, fmt))

    def _quantize_embedding(self, wish: spec.QuantizeEmbedding) -> ir.passes.PassBase:
        fmt = block_format(wish.bits, wish.block_size, wish.symmetric)
        sites = self.census.embeddings
        if wish.shared:
            plans = {site.name: _shared_plan(site) for site in sites}
            return QuantizeEmbeddingPass(sites, plans, {})
        for site in sites:
            check_embedding_format(fmt, width=site.width, embedding=site.name)
        plans = {site.name: EmbeddingPlan(embedding=site.name, format=fmt) for site in sites}
        return QuantizeEmbeddingPass(sites, plans, self._rounded(sites, fmt))

    def _rotate(self, wish: spec.Rotate) -> ir.passes.PassBase:
        parts = set(wish.parts.split("+"))
        if not parts <= _ROTATED_PARTS:
            raise ConfigError(
                f"rotate: found parts={wish.parts}; allowed residual, heads, residual+heads"
            )
        sites = find_rotation(
            self._model, self.census, residual="residual" in parts, heads="heads" in parts
        )
        del self.census  # a head that gets a table of its own is another site
        return RotatePass(sites, seed=wish.seed, untie_head=wish.untie_head)

    def _rounded(
        self, sites: tuple[LinearSite, ...] | tuple[EmbeddingSite, ...], fmt: BlockFormat
    ) -> Mapping[str, QuantizedWeight]:
        """Round-to-nearest weights by name, each made when it is read."""
        makers: dict[str, Callable[[], QuantizedWeight]] = {}
        for site in sites:
            # the tensor, not its name: by the time of writing the initializer is gone
            tensor = find_initializer(self._model, site.weight).const_value
            assert tensor is not None
            makers[site.name] = functools.partial(_round, tensor, site, fmt)
        return _OnDemand(makers)


class _OnDemand(Mapping[str, QuantizedWeight]):
    """Weights that are made each time they are read."""

    def __init__(self, makers: Mapping[str, Callable[[], QuantizedWeight]]) -> None:
        self._makers = makers

    def __getitem__(self, name: str) -> QuantizedWeight:
        return self._makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def _round(
    tensor: ir.TensorProtocol, site: LinearSite | EmbeddingSite, fmt: BlockFormat
) -> QuantizedWeight:
    """Round a stored weight, in any layout, to nearest."""
    array: npt.NDArray[np.float32] = np.asarray(read_tensor(tensor), np.float32)
    if isinstance(site, LinearSite):
        array = array[0] if site.layout is WeightLayout.ONE_K_N else array
        array = array if site.layout is WeightLayout.N_K else array.T
    return quantize_rtn(np.ascontiguousarray(array), fmt, np.dtype(site.dtype))


def _parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Shapes by name from `name:1x16 name:1x16x8`.

    Raises:
        ConfigError: for a word that is not such a shape.
    """
    found = {}
    for word in text.split():
        name, _, sizes = word.rpartition(":")
        numbers = sizes.split("x")
        if not name or not all(number.isdecimal() for number in numbers):
            raise ConfigError(f"static-shapes: found {word!r}; allowed NAME:SIZExSIZE...")
        found[name] = tuple(map(int, numbers))
    return found


def _quantize_activations(model: ir.Model, step: float) -> QuantizeActivationsPass:
    """One step in front of and behind every product.

    Raises:
        ConfigError: for a step that is not positive.
    """
    if step <= 0:
        raise ConfigError(f"quantize-activations: found step={step:g}; allowed a number > 0")
    names = [str(node.name) for node in model.graph if node.op_type == "MatMulNBits"]
    return QuantizeActivationsPass(dict.fromkeys(names, ProductSteps(step, step)))


def _quantize_cache(model: ir.Model, scale: float) -> QuantizeCachePass:
    """One scale for every channel of every cache.

    Raises:
        ConfigError: for a scale that is not positive.
    """
    if scale <= 0:
        raise ConfigError(f"quantize-cache: found scale={scale:g}; allowed a number > 0")
    scales = {}
    for value in model.graph.outputs:
        shape = None if cache_position(value.name or "") is None else value.shape
        if shape is None or len(shape) != 4:
            continue
        heads, width = shape[1], shape[3]
        if isinstance(heads, int) and isinstance(width, int):
            scales[str(value.name)] = np.full(heads * width, scale, np.float32)
    return QuantizeCachePass(scales)


def _shared_plan(site: EmbeddingSite) -> EmbeddingPlan:
    """Share the head's table.

    Raises:
        ConfigError: when the embedding is tied to no head.
    """
    if site.tied_site is None:
        raise ConfigError(
            f"quantize-embedding: {site.name} is tied to no head, so shared=true is not possible"
        )
    return EmbeddingPlan(embedding=site.name, format=None, shared_with=site.tied_site)


def _imported(wish: spec.ImportedPass) -> ir.passes.PassBase:
    """A pass class named `module:Class`, made with its options.

    Raises:
        ConfigError: when it cannot be imported or made, or is no onnx_ir pass.
    """
    module, _, name = wish.target.partition(":")
    try:
        made = getattr(importlib.import_module(module), name)(**dict(wish.options))
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{wish.target}: {error}; give module:Class{{option=value}}") from error
    if not isinstance(made, ir.passes.PassBase):
        raise ConfigError(f"{wish.target}: is no onnx_ir pass (onnx_ir.passes.InPlacePass)")
    return made
