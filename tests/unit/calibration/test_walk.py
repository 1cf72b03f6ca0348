"""The walk sums what the whole model computes, resumes where it stopped, and says what overflows.

Tolerances: a float32 sum over T tokens is within T eps of exact, relative to the sum of sizes, and
the activations themselves move by the rounding of the dot products before them, CHAIN K eps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from faq_onnx.artifacts.sites import LinearRole
from faq_onnx.calibration import batches as batches_module
from faq_onnx.calibration.walk import LayerWalk, PartSums
from faq_onnx.errors import CalibrationError, NonFiniteError
from faq_onnx.graph.cut import cut_model
from faq_onnx.passes import ActivationRequest
from faq_onnx.progress import Advance
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

SPEC = TinyLlama()
CENSUS = tiny_llama_census(SPEC)
LENGTH, WINDOWS = 8, 5
IDS = np.random.default_rng(3).integers(0, SPEC.vocabulary, (WINDOWS, LENGTH))
HELD = np.random.default_rng(4).integers(0, SPEC.vocabulary, (2, LENGTH))
NONE = IDS[:0]
EPS = 2.0**-23
CHAIN = 4 * SPEC.layers + 1
RELATIVE = (WINDOWS * LENGTH + CHAIN * SPEC.intermediate) * EPS

Array = npt.NDArray[np.float64]


@pytest.fixture(autouse=True)
def _several_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two windows a run, so that sums go over runs of 2, 2 and 1."""
    monkeypatch.setattr(batches_module, "TOKENS_PER_RUN", 2 * LENGTH)


def _requests() -> dict[int, list[ActivationRequest]]:
    requests: dict[int, list[ActivationRequest]] = {}
    for group in CENSUS.groups:
        index = SPEC.layers + 1 if group.layer_index is None else group.layer_index + 1
        request = ActivationRequest(group.input, group.in_features, gram=True)
        requests.setdefault(index, []).append(request)
    return requests


def _walk(
    folder: Path, fingerprint: str | None = "key", model: ir.Model | None = None
) -> LayerWalk:
    model = tiny_llama_onnx(SPEC) if model is None else model
    layer_of = {s.output: s.layer_index for s in CENSUS.sites if s.layer_index is not None}
    head = [s.output for s in CENSUS.sites if s.role is LinearRole.LM_HEAD]
    return LayerWalk(model, cut_model(model, layer_of, head), folder, fingerprint)


def _activations(names: Sequence[str], ids: npt.NDArray[np.int64]) -> dict[str, Array]:
    """Values inside of the whole model, float64 [T, K]."""
    model = tiny_llama_onnx(SPEC)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for name in names:
        if values[name] not in model.graph.outputs:
            model.graph.outputs.append(values[name])
    session = open_session(ir.to_proto(model).SerializeToString())
    results = session.run(list(names), decoder_feeds(session.get_inputs(), ids))
    return {
        name: np.asarray(array, np.float64).reshape(-1, np.shape(array)[-1])
        for name, array in zip(names, results, strict=True)
    }


def _logits(ids: npt.NDArray[np.int64]) -> Array:
    flat = _activations(["logits"], ids)["logits"]
    return flat.reshape(*ids.shape, SPEC.vocabulary)


def _equal(found: PartSums, expected: PartSums) -> None:
    assert (found.index, found.tokens) == (expected.index, expected.tokens)
    for name, total in expected.sum_abs.items():
        np.testing.assert_array_equal(found.sum_abs[name], total)
    for name, total in expected.gram.items():
        np.testing.assert_array_equal(found.gram[name], total)


def test_sums_are_those_of_the_whole_models_activations(tmp_path: Path) -> None:
    expected = _activations([group.input for group in CENSUS.groups], IDS)
    found = list(_walk(tmp_path).run(IDS, HELD, _requests()))
    assert [part.index for part in found] == [1, 2, 3]
    seen = set()
    for part in found:
        assert part.tokens == IDS.size
        for name, total in part.sum_abs.items():
            seen.add(name)
            x = expected[name]
            sizes = np.abs(x).sum(axis=0)
            np.testing.assert_allclose(total, sizes, rtol=0, atol=RELATIVE * sizes.max())
            gram = x.T @ x
            bound = 2 * RELATIVE * np.diag(gram).max()
            np.testing.assert_allclose(part.gram[name], gram, rtol=0, atol=bound)
    assert seen == set(expected)


def test_held_out_windows_do_not_enter_the_sums(tmp_path: Path) -> None:
    with_held = list(_walk(tmp_path / "a").run(IDS, HELD, _requests()))
    without = list(_walk(tmp_path / "b").run(IDS, HELD[:0], _requests()))
    for found, expected in zip(with_held, without, strict=True):
        _equal(found, expected)


def test_reference_gives_the_whole_models_logits(tmp_path: Path) -> None:
    walk = _walk(tmp_path)
    list(walk.run(IDS, HELD, _requests()))
    expected = _logits(HELD)
    reference = walk.reference(HELD)
    bound = CHAIN * SPEC.intermediate * EPS * np.abs(expected).max()
    for _ in range(2):  # it can be asked again
        for row, (ids, logits) in enumerate(reference):
            np.testing.assert_array_equal(ids, HELD[row : row + 1])
            np.testing.assert_allclose(logits[0], expected[row], rtol=0, atol=bound)


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_walk_goes_on_with_equal_results(finished: int, tmp_path: Path) -> None:
    """Interrupted while somebody saves part `finished + 1`, which is then walked again."""
    whole = list(_walk(tmp_path / "whole").run(IDS, HELD, _requests()))
    broken = _walk(tmp_path / "broken").run(IDS, HELD, _requests())
    for _ in range(finished + 1):
        next(broken)
    assert isinstance(broken, Iterator)
    broken.close()  # type: ignore[attr-defined]  # it is a generator
    again = _walk(tmp_path / "broken")
    rest = list(again.run(IDS, HELD, _requests()))
    assert len(rest) == len(whole) - finished
    for found, expected in zip(rest, whole[finished:], strict=True):
        _equal(found, expected)
    walk = _walk(tmp_path / "whole")
    pairs = zip(again.reference(HELD), walk.reference(HELD), strict=True)
    for (_, found_logits), (_, expected_logits) in pairs:
        np.testing.assert_array_equal(found_logits, expected_logits)


def test_a_finished_walk_is_not_walked_again(tmp_path: Path) -> None:
    list(_walk(tmp_path).run(IDS, HELD, _requests()))
    assert list(_walk(tmp_path).run(IDS, HELD, _requests())) == []


@pytest.mark.parametrize("fingerprint", ["other", None])
def test_another_fingerprint_starts_again(fingerprint: str | None, tmp_path: Path) -> None:
    list(_walk(tmp_path).run(IDS, HELD, _requests()))
    other = HELD[::-1]
    walk = _walk(tmp_path, fingerprint)
    found = list(walk.run(other, IDS[:1], _requests()))
    fresh = list(_walk(tmp_path / "fresh").run(other, IDS[:1], _requests()))
    for left, right in zip(found, fresh, strict=True):
        _equal(left, right)


def test_a_walk_that_was_overwritten_is_not_resumed(tmp_path: Path) -> None:
    expected = list(_walk(tmp_path / "whole").run(IDS, HELD, _requests()))
    list(_walk(tmp_path).run(IDS, HELD, _requests()))
    unknown = np.full_like(HELD, SPEC.vocabulary)  # fails in part 0, behind the other windows
    with pytest.raises(Exception, match="Gather"):
        list(_walk(tmp_path, "other").run(IDS[::-1], unknown, _requests()))
    found = list(_walk(tmp_path).run(IDS, HELD, _requests()))
    for left, right in zip(found, expected, strict=True):
        _equal(left, right)


@dataclasses.dataclass
class _StopAfter:
    """Progress that interrupts behind so many steps."""

    steps: int

    @contextmanager
    def stage(self, title: str, total: float, unit: str) -> Iterator[Advance]:
        del title, total, unit

        def advance(_steps: float) -> None:
            if self.steps == 0:
                raise KeyboardInterrupt
            self.steps -= 1

        yield advance

    def note(self, text: str) -> None:
        del text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_ctrl_c_between_parts(steps: int, tmp_path: Path) -> None:
    whole = list(_walk(tmp_path / "whole").run(IDS, HELD, _requests()))
    found: list[PartSums] = []
    with pytest.raises(KeyboardInterrupt):
        found.extend(_walk(tmp_path / "a").run(IDS, HELD, _requests(), _StopAfter(steps)))
    rest = list(_walk(tmp_path / "a").run(IDS, HELD, _requests()))
    assert [part.index for part in rest] == [1, 2, 3][steps:]
    _equal(rest[-1], whole[-1])


def test_disk_holds_no_more_than_two_layers(tmp_path: Path) -> None:
    names: list[int] = []
    for part in _walk(tmp_path).run(IDS, HELD, _requests()):
        names.append(len(list(tmp_path.glob("*.run0.npy"))))
        assert part.index
    # what goes in and what comes out of a layer, until the next one has started
    assert names[0] == names[1] == 2
    assert names[2] == 1


def test_an_activation_that_overflows_is_named(tmp_path: Path) -> None:
    model = tiny_llama_onnx(SPEC)
    value = model.graph.initializers["model.layers.1.input_layernorm.weight"]
    assert value.const_value is not None
    gain = value.const_value.numpy().copy()
    gain[7] = np.inf
    value.const_value = ir.tensor(gain, name=value.name)
    group = next(group for group in CENSUS.groups if group.name == "layers.1.attention_input")
    found: list[PartSums] = []
    with pytest.raises(NonFiniteError, match="part 2") as caught:
        found.extend(_walk(tmp_path, model=model).run(IDS, HELD, _requests()))
    assert group.input in str(caught.value)
    assert "1 of 64 channels (first: 7)" in str(caught.value)


def test_no_windows_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no token windows"):
        list(_walk(tmp_path).run(NONE, NONE, {}))
