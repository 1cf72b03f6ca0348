"""The walk finds the KL that the whole model shows with one weight replaced.

Both compute the same function; they differ by float32 rounding, which moves logits of size 10 by
1e-4 at most, and KL by that times the spread of the difference: far below the KL of 3 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sensitivity import Perturbation, Sensitivity
from faq_onnx.artifacts.sites import (
    EmbeddingSite,
    LinearRole,
    LinearSite,
    ModelCensus,
    Tie,
    WeightLayout,
)
from faq_onnx.calibration import sensitivity as sensitivity_module
from faq_onnx.calibration.sensitivity import SensitivityWalk, sensitivity_windows
from faq_onnx.errors import CalibrationError, NonFiniteError
from faq_onnx.graph.cut import Part, cut_model
from faq_onnx.graph.weights import read_initializer, read_weight, transform_initializer
from faq_onnx.progress import Advance
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import fake_quantize, to_blocks
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

LENGTH, WINDOWS = 8, 3
COARSE = block_format(3, 32, symmetric=False)
RELATIVE = 1e-2
Floats = npt.NDArray[np.float32]


def _ids(spec: TinyLlama) -> npt.NDArray[np.int64]:
    return np.random.default_rng(3).integers(0, spec.vocabulary, (WINDOWS, LENGTH))


def _coarse(weight: Floats) -> Floats:
    return fake_quantize(to_blocks(weight, 32), COARSE).reshape(weight.shape)


def _perturb(model: ir.Model, weight: LinearSite | EmbeddingSite) -> Perturbation:
    if isinstance(weight, LinearSite):
        values = read_weight(model, weight)
    else:
        values = read_initializer(model, weight.weight).astype(np.float32)
    rounded = _coarse(values)
    return Perturbation(rounded, float(np.square(rounded - values).sum()))


def _parts(model: ir.Model, census: ModelCensus, *, layers: bool = True) -> list[Part]:
    layer_of = {s.output: s.layer_index for s in census.sites if s.layer_index is not None}
    head = [s.output for s in census.sites if s.role is LinearRole.LM_HEAD]
    return cut_model(model, layer_of, head) if layers else cut_model(model, {}, [])


def _walk(folder: Path, spec: TinyLlama) -> dict[str, Sensitivity]:
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    walk = SensitivityWalk(model, census, _parts(model, census), folder)
    found = walk.run(_ids(spec), lambda weight: _perturb(model, weight))
    return {entry.name: entry for entry in found}


def _logits(model: ir.Model, ids: npt.NDArray[np.int64]) -> Floats:
    session = open_session(ir.to_proto(model).SerializeToString())
    logits = session.run(["logits"], decoder_feeds(session.get_inputs(), ids))[0]
    return np.asarray(logits, np.float32)


@functools.cache
def _expected(spec: TinyLlama, weight: LinearSite | EmbeddingSite) -> float:
    model = tiny_llama_onnx(spec)

    def change(stored: Floats) -> Floats:
        turned = isinstance(weight, LinearSite) and weight.layout is WeightLayout.K_N
        return _coarse(np.ascontiguousarray(stored.T)).T if turned else _coarse(stored)

    transform_initializer(model, weight.weight, change)
    log_p = _log_softmax(_logits(tiny_llama_onnx(spec), _ids(spec)))
    log_q = _log_softmax(_logits(model, _ids(spec)))
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=-1).mean())


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return exact


@pytest.mark.parametrize("tokens_per_run", [LENGTH, 4 * LENGTH])
def test_each_weight_shows_its_kl_at_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens_per_run: int
) -> None:
    monkeypatch.setattr(sensitivity_module, "TOKENS_PER_RUN", tokens_per_run)
    spec = TinyLlama()
    census = tiny_llama_census(spec)
    found = _walk(tmp_path, spec)
    weights: list[LinearSite | EmbeddingSite] = [*census.sites, *census.embeddings]
    assert set(found) == {weight.name for weight in weights}
    for weight in weights:
        assert found[weight.name].kl == pytest.approx(_expected(spec, weight), rel=RELATIVE)
        assert found[weight.name].kl > 0
    assert not list(tmp_path.glob("*.npy"))


def test_head_and_embedding_of_one_table_are_told_apart(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1, tie=Tie.SHARED)
    census = tiny_llama_census(spec)
    found = _walk(tmp_path, spec)
    table, head = census.embeddings[0], census.site(census.embeddings[0].tied_site or "")
    both = _expected(spec, table)  # one initializer: the whole model shows both errors at once
    alone = [found[table.name].kl, found[head.name].kl]
    assert min(alone) > 0
    assert max(alone) < both
    separate = TinyLlama(layers=1, tie=Tie.DUPLICATE)
    expected = _expected(separate, tiny_llama_census(separate).embeddings[0])
    assert found[table.name].kl == pytest.approx(expected, rel=RELATIVE)


def test_float16_weights_are_perturbed(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1, dtype="float16")
    found = _walk(tmp_path, spec)
    site = tiny_llama_census(spec).sites[0]
    # logits carry 11 bits: their rounding is a tenth of what 3 bits do to one weight
    assert found[site.name].kl == pytest.approx(_expected(spec, site), rel=0.2)


def test_a_graph_without_layers_is_one_part(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1)
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    parts = _parts(model, census, layers=False)
    assert len(parts) == 1
    walk = SensitivityWalk(model, census, parts, tmp_path)
    found = {e.name: e for e in walk.run(_ids(spec), lambda weight: _perturb(model, weight))}
    for site in census.sites:
        assert found[site.name].kl == pytest.approx(_expected(spec, site), rel=RELATIVE)


def test_same_numbers_again_whatever_lies_in_the_folder(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1)
    first = _walk(tmp_path, spec)
    (tmp_path / "0123.n1.npy").write_bytes(b"stale")
    assert _walk(tmp_path, spec) == first


def test_an_unchanged_weight_costs_nothing(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1)
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)

    def keep(weight: LinearSite | EmbeddingSite) -> Perturbation:
        if isinstance(weight, LinearSite):
            return Perturbation(read_weight(model, weight), 0.0)
        return Perturbation(read_initializer(model, weight.weight).astype(np.float32), 0.0)

    walk = SensitivityWalk(model, census, _parts(model, census), tmp_path)
    for entry in walk.run(_ids(spec), keep):
        assert entry.kl < 1e-8  # rounding of float32 sums
        assert entry.per_error == 0.0


def test_windows_are_the_first_that_make_the_tokens() -> None:
    windows = np.arange(40).reshape(5, 8)
    assert len(sensitivity_windows(windows, 16)) == 2
    assert len(sensitivity_windows(windows, 4)) == 1
    assert len(sensitivity_windows(windows)) == 5


class _Counter:
    """Adds up what is announced and what is reported."""

    def __init__(self) -> None:
        self.total = 0.0
        self.done = 0.0

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        del title, unit
        self.total += total
        yield self._advance

    def _advance(self, steps: float) -> None:
        self.done += steps

    def note(self, text: str) -> None:
        del text


def test_progress_ends_at_what_was_announced(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1)
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    walk = SensitivityWalk(model, census, _parts(model, census), tmp_path)
    counter = _Counter()
    walk.run(_ids(spec), lambda weight: _perturb(model, weight), counter)
    assert counter.done == counter.total > 0


def test_no_windows_are_refused(tmp_path: Path) -> None:
    spec = TinyLlama(layers=1)
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    walk = SensitivityWalk(model, census, _parts(model, census), tmp_path)
    with pytest.raises(CalibrationError, match="no token windows"):
        walk.run(_ids(spec)[:0], lambda weight: _perturb(model, weight))


@pytest.mark.parametrize("whose", ["float model", "q_proj"])
def test_logits_that_are_not_finite_name_what_they_are_of(tmp_path: Path, whose: str) -> None:
    spec = TinyLlama(layers=1)
    model, census = tiny_llama_onnx(spec), tiny_llama_census(spec)
    walk = SensitivityWalk(model, census, _parts(model, census), tmp_path)

    def perturb(weight: LinearSite | EmbeddingSite) -> Perturbation:
        found = _perturb(model, weight)
        return (
            Perturbation(found.weight * np.float32(np.nan), 1.0) if whose in weight.name else found
        )

    if whose == "float model":
        last = census.sites[-1].weight
        transform_initializer(model, last, lambda stored: stored * np.float32(np.nan))
    with pytest.raises(NonFiniteError, match=rf"logits of .*{whose}.* not finite at \d+ of"):
        walk.run(_ids(spec), perturb)
