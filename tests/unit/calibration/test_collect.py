"""Statistics by scale group, on disk; and the float logits that come along."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.calibration.collect import Collector, corpus_fingerprint
from faq_onnx.errors import StatsMismatchError
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
GROUPS = [group.name for group in CENSUS.groups]
IDS = np.random.default_rng(3).integers(0, SPEC.vocabulary, (3, 8))
HELD = np.random.default_rng(4).integers(0, SPEC.vocabulary, (2, 8))


def _collector(folder: Path, model: ir.Model | None = None) -> Collector:
    return Collector(tiny_llama_onnx(SPEC) if model is None else model, CENSUS, "model", folder)


def test_statistics_are_means_over_tokens(tmp_path: Path) -> None:
    stats, _ = _collector(tmp_path).collect(IDS, HELD, GROUPS)
    assert stats.manifest.tokens == IDS.size
    for group in CENSUS.groups:
        mean_abs, gram = stats.mean_abs(group.name), stats.gram(group.name)
        assert (mean_abs.shape, gram.shape) == ((group.in_features,), (group.in_features,) * 2)
        assert mean_abs.dtype == gram.dtype == np.float32
        # E|x|^2 <= E x^2, with equality only where |x| never changes
        assert (mean_abs**2 <= np.diag(gram) * (1 + 1e-5)).all()
        np.testing.assert_allclose(gram, gram.T, rtol=0, atol=2e-5 * np.diag(gram).max())
        assert np.linalg.eigvalsh(gram.astype(np.float64)).min() >= -1e-5 * np.trace(gram)


def test_only_what_was_asked_for_is_collected(tmp_path: Path) -> None:
    wanted = ["layers.1.mlp_input"]
    stats, _ = _collector(tmp_path).collect(IDS, HELD, wanted)
    assert [entry.group for entry in stats.manifest.groups] == wanted
    assert stats.has(wanted[0])
    assert not stats.has("layers.0.mlp_input")
    with pytest.raises(StatsMismatchError, match=r"group 'layers\.0\.mlp_input'"):
        stats.gram("layers.0.mlp_input")


def test_without_groups_only_the_logits_are_computed(tmp_path: Path) -> None:
    stats, reference = _collector(tmp_path).collect(IDS, HELD, [])
    assert (stats.manifest.tokens, stats.manifest.groups) == (0, ())
    assert len(list(reference)) == len(HELD)


def test_saved_statistics_open_for_their_model_only(tmp_path: Path) -> None:
    stats, _ = _collector(tmp_path).collect(IDS, HELD, GROUPS)
    again = CalibrationStats.open(stats.folder, census_fingerprint=CENSUS.fingerprint())
    np.testing.assert_array_equal(again.gram(GROUPS[0]), stats.gram(GROUPS[0]))
    with pytest.raises(StatsMismatchError, match="belong to another model"):
        CalibrationStats.open(stats.folder, census_fingerprint="0" * 64)
    with pytest.raises(StatsMismatchError, match=r"stats\.json is missing"):
        CalibrationStats.open(tmp_path, census_fingerprint=CENSUS.fingerprint())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        stats, _ = _collector(tmp_path / name).collect(IDS, HELD, GROUPS)
        contents.append({p.name: p.read_bytes() for p in sorted(stats.folder.iterdir())})
    assert contents[0] == contents[1]


def test_a_second_collection_in_one_folder_is_not_mixed_with_the_first(tmp_path: Path) -> None:
    _collector(tmp_path).collect(IDS, HELD, GROUPS)
    second, _ = _collector(tmp_path).collect(HELD, IDS, GROUPS)
    fresh, _ = _collector(tmp_path / "fresh").collect(HELD, IDS, GROUPS)
    for group in GROUPS:
        np.testing.assert_array_equal(second.gram(group), fresh.gram(group))


def test_logits_are_those_of_the_model_as_it_is_now(tmp_path: Path) -> None:
    """A model that was changed between two calls must not be answered from the first one's files.

    This is what proves a fold: a resumed walk would compare the model with itself.
    """
    model = tiny_llama_onnx(SPEC)
    ((_, before),) = _collector(tmp_path, model).logits(HELD[:1])
    value = model.graph.initializers["onnx::MatMul_701"]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(2), name=value.name)
    ((_, after),) = _collector(tmp_path, model).logits(HELD[:1])
    session = open_session(ir.to_proto(model).SerializeToString())
    expected = session.run(["logits"], decoder_feeds(session.get_inputs(), HELD[:1]))[0]
    bound = (4 * SPEC.layers + 1) * SPEC.intermediate * 2.0**-23 * np.abs(expected).max()
    np.testing.assert_allclose(after, expected, rtol=0, atol=bound)
    assert np.abs(after - before).max() > 100 * bound


def test_a_reference_is_not_disturbed_by_logits_of_another_title(tmp_path: Path) -> None:
    collector = _collector(tmp_path)
    reference = collector.logits(HELD, title="float model")
    expected = [logits for _, logits in reference]
    collector.logits(IDS, title="check")
    for (_, found), wanted in zip(reference, expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_corpora_have_fingerprints() -> None:
    assert corpus_fingerprint(IDS, HELD) == corpus_fingerprint(IDS.copy(), HELD.copy())
    assert corpus_fingerprint(IDS, HELD) != corpus_fingerprint(HELD, IDS)
