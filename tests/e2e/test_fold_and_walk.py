"""On a real export of every kind: folding all groups keeps the function, and so does cutting."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.analysis import canonicalise, take_census
from faq_onnx.artifacts.plan import GroupPlan, QuantPlan, ScaleApplication
from faq_onnx.artifacts.sites import ModelCensus, ScaleGroup
from faq_onnx.calibration.collect import Collector
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.passes import FoldScalesPass, run_passes
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session

FOLDERS = sorted(
    path.parent for path in (Path(__file__).parents[1] / "fixtures/exporters").glob("*/model.onnx")
)
each_export = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)

VOCABULARY, WIDEST, LAYERS = 160, 96, 2
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (1, 12))
# A layer rounds the outputs of four dot products that follow one another, the head is one more.
CHAIN = 4 * LAYERS + 1

Array = npt.NDArray[np.float32]


def tolerance(folder: Path) -> float:
    """Largest change by rounding, relative to the largest logit, to first order.

    float32: each dot product of at most WIDEST terms is within WIDEST eps. float16 products are
    summed in float32, but the weight, the activation and the sum of a residual are rounded to 11
    bits, on both sides of the comparison.
    """
    if folder.name.endswith("fp16"):
        return 2 * 3 * CHAIN * 2.0**-11
    return CHAIN * WIDEST * float(np.finfo(np.float32).eps)


def opened(folder: Path) -> tuple[ir.Model, ModelCensus]:
    model = load_model(folder / "model.onnx")
    canonicalise(model)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return model, take_census(model, config)


def logits(path: Path) -> Array:
    session = open_session(path)
    feeds = decoder_feeds(session.get_inputs(), IDS)
    return np.asarray(session.run(["logits"], feeds)[0], np.float32)


def random_scale(group: ScaleGroup, rng: np.random.Generator) -> Array:
    """Between 1/4 and 4; heads that share a value row share their scale."""
    exponents = rng.uniform(-2, 2, group.in_features)
    absorber = group.absorber
    assert absorber is not None
    if absorber.repeats > 1:
        heads = exponents.reshape(-1, absorber.repeats, absorber.head_dim or 1)
        exponents = np.repeat(heads[:, :1], absorber.repeats, axis=1).ravel()
    return np.exp2(exponents).astype(np.float32)


@each_export
def test_all_groups_folded_at_once_keep_the_function(folder: Path, tmp_path: Path) -> None:
    model, census = opened(folder)
    rng = np.random.default_rng(1)
    groups = [g for g in census.groups if g.scalable and g.absorber is not None]
    # only a head that shares its table with the embedding cannot be scaled
    left = {g.name for g in census.groups} - {g.name for g in groups}
    assert left == ({"lm_head_input"} if "-tied-" in folder.name else set())
    plan = QuantPlan(
        census_fingerprint=census.fingerprint(),
        method="awq",
        sites=(),
        groups=tuple(GroupPlan(group=g.name, application=ScaleApplication.FOLD) for g in groups),
        embeddings=(),
    )
    scales = {group.name: random_scale(group, rng) for group in groups}
    run_passes(model, [FoldScalesPass(census, plan, scales)])
    save_model(model, tmp_path / "folded.onnx")
    before, after = logits(folder / "model.onnx"), logits(tmp_path / "folded.onnx")
    assert np.abs(after - before).max() <= tolerance(folder) * np.abs(before).max()


@each_export
def test_parts_give_the_logits_of_the_whole(folder: Path, tmp_path: Path) -> None:
    model, census = opened(folder)
    collector = Collector(model, census, "model", tmp_path)
    parts = collector.parts()
    assert [part.index for part in parts] == [0, 1, 2, 3]
    # the hidden state, and where norms add the residual themselves, what it is added to
    assert all(1 <= len(part.varying & {*part.inputs}) <= 2 for part in parts[1:])
    whole = logits(folder / "model.onnx")
    ((ids, parted),) = collector.logits(IDS)
    np.testing.assert_array_equal(ids, IDS)
    assert np.abs(parted - whole).max() <= tolerance(folder) * np.abs(whole).max()
