"""Rotation on a real export of every kind, and through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from faq_onnx.analysis import canonicalise, find_rotation, take_census
from faq_onnx.artifacts.run import RunReport
from faq_onnx.artifacts.sites import Tie
from faq_onnx.errors import UnsupportedModelError
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.passes import RotatePass, run_passes
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama

MakeSource = Callable[..., Path]

FOLDERS = sorted(
    path.parent for path in (Path(__file__).parents[1] / "fixtures/exporters").glob("*/model.onnx")
)
VOCABULARY, WIDEST, LAYERS = 160, 96, 2
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (1, 12))
CHAIN = 4 * LAYERS + 1  # dot products that follow one another


def tolerance(folder: Path) -> float:
    """As in test_fold_and_walk: relative to the largest logit, to first order."""
    if folder.name.endswith("fp16"):
        return 2 * 3 * CHAIN * 2.0**-11
    return CHAIN * WIDEST * float(np.finfo(np.float32).eps)


def logits(path: Path) -> npt.NDArray[np.float32]:
    session = open_session(path)
    feeds = decoder_feeds(session.get_inputs(), IDS)
    return np.asarray(session.run(["logits"], feeds)[0], np.float32)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_export_computes_the_same_rotated(folder: Path, tmp_path: Path) -> None:
    model = canonicalise(load_model(folder / "model.onnx"))
    census = take_census(model, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    has_norms_behind_layers = "gemma3" in folder.name
    if has_norms_behind_layers:
        with pytest.raises(UnsupportedModelError, match="writes to it"):
            find_rotation(model, census, residual=True, heads=False)
    sites = find_rotation(model, census, residual=not has_norms_behind_layers, heads=True)
    assert len(sites.heads) == LAYERS
    if sites.stream is not None:
        assert len(sites.stream.writers) == 2 * LAYERS
        assert {reader.site.role for reader in sites.stream.readers} >= {"lm_head"}
        assert all(reader.gain is not None for reader in sites.stream.readers)
    assert run_passes(model, [RotatePass(sites, seed=5, untie_head=True)]).modified
    save_model(model, tmp_path / "rotated.onnx")
    before, after = logits(folder / "model.onnx"), logits(tmp_path / "rotated.onnx")
    assert np.abs(after - before).max() <= tolerance(folder) * np.abs(before).max()


ROTATE = ("--rotate", "residual+heads", "--method", "faq", "--bits", "4")


def test_stages_rotate_as_convert_does(cli: Any, source: Path, tmp_path: Path) -> None:
    stats, plan, staged, whole = (tmp_path / name for name in ("stats", "plan", "staged", "whole"))
    assert cli.quick("calibrate", source, "-o", stats, *ROTATE).code == 0
    assert cli.quick("plan", source, "-o", plan, "--stats", stats, *ROTATE).code == 0
    # apply is not told to rotate, or the seed: the plan knows
    done = cli.quick("apply", source, "--plan", plan, "--stats", stats, "-o", staged)
    assert done.code == 0, done.err
    assert cli.quick("convert", source, "-o", whole, *ROTATE).code == 0
    assert (staged / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    report = RunReport.load(whole / "report.json")
    verification = report.verification
    assert verification is not None
    assert verification.logits is not None
    assert verification.fold_error is not None
    assert 0 < verification.fold_error < 1e-4
    assert "check the rotation" in {stage.stage for stage in report.stages}
    # what is compared with is the source, so verify finds the same without knowing of rotations
    again = cli.run("verify", whole, "--source", source, "--json", "--quiet")
    assert again.code == 0, again.err
    assert again.json["logits"]["kl_nats"] == verification.logits.kl_nats


def test_statistics_of_the_unrotated_model_are_refused(
    cli: Any, source: Path, tmp_path: Path
) -> None:
    stats = tmp_path / "stats"
    assert cli.quick("calibrate", source, "-o", stats, "--method", "faq").code == 0
    done = cli.quick("plan", source, "-o", tmp_path / "plan", "--stats", stats, *ROTATE)
    assert done.code != 0
    assert "another model" in done.err


def test_a_tied_head_is_untied_when_told_to(
    cli: Any, make_source: MakeSource, tmp_path: Path
) -> None:
    tied = make_source(TinyLlama(tie=Tie.SHARED))
    words = ("--rotate", "residual", "--method", "rtn")
    done = cli.quick("convert", tied, "-o", tmp_path / "out", *words)
    assert done.code != 0
    assert "73728 bytes more" in done.err
    assert "--untie-head" in done.err
    assert not (tmp_path / "out").exists()
    done = cli.quick("convert", tied, "-o", tmp_path / "out", *words, "--untie-head")
    assert done.code == 0, done.err
    report = RunReport.load(tmp_path / "out" / "report.json")
    assert [table.storage_bits for table in report.embeddings] == [None]


def test_opt_rotates_and_refuses_unknown_parts(cli: Any, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "rotated.onnx"
    done = cli.run("opt", source, "-p", "rotate{parts=residual},rotate{parts=heads}", "-o", out)
    assert done.code == 0, done.err
    done = cli.run("opt", source, "-p", "rotate{parts=values}", "-o", out, "--force")
    assert done.code != 0
    assert "allowed residual, heads, residual+heads" in done.err
