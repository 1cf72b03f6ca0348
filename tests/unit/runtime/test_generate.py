"""Generation with a cache equals reading the whole text again at every step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from faq_onnx.errors import NonFiniteError, UnsupportedModelError
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.generate import DecoderRun, Sampling, generate_greedy, sample_tokens
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.testing import tiny_llama_onnx

PROMPT = np.array([5, 17, 200])


def _session(model: ir.Model) -> ort.InferenceSession:
    return open_session(bytes(ir.to_proto(model).SerializeToString()), threads=1)


@pytest.fixture(scope="module")
def decoder() -> ort.InferenceSession:
    return _session(tiny_llama_onnx())


@pytest.fixture(scope="module")
def without_cache() -> ort.InferenceSession:
    return _session(_forgetful())


def _forgetful() -> ir.Model:
    """A decoder without cache: the logits of a token depend on that token and its position."""
    ids = ir.Value(
        name="input_ids", shape=ir.Shape(["b", "s"]), type=ir.TensorType(ir.DataType.INT64)
    )
    logits = ir.Value(
        name="logits", shape=ir.Shape(["b", "s", 11]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    table = np.random.default_rng(0).standard_normal((11, 11)).astype(np.float32)
    weight = ir.Value(name="table", const_value=ir.tensor(table, name="table"))
    axis = ir.Value(name="axis", const_value=ir.tensor(np.array(1), name="axis"))
    gather = ir.Node("", "Gather", [weight, ids], name="gather")
    gather.outputs[0].name = "embedded"
    # a running sum makes earlier tokens matter
    total = ir.Node("", "CumSum", [gather.outputs[0], axis], outputs=[logits], name="sum")
    graph = ir.Graph(
        [ids],
        [logits],
        nodes=[gather, total],
        initializers=[weight, axis],
        opset_imports={"": 17},
        name="g",
    )
    return ir.Model(graph, ir_version=8)


def _recompute(
    session: ort.InferenceSession, prompt: npt.NDArray[np.int64], steps: int
) -> Iterator[int]:
    ids = prompt.reshape(1, -1)
    for _ in range(steps):
        logits = run_session(session, decoder_feeds(session.get_inputs(), ids), ["logits"])
        token = int(logits["logits"][0, -1].argmax())
        yield token
        ids = np.hstack([ids, [[token]]])


def test_greedy_with_a_cache_equals_recomputing(decoder: ort.InferenceSession) -> None:
    found = list(generate_greedy(decoder, PROMPT, 12))
    assert found == list(_recompute(decoder, PROMPT, 12))
    assert len(found) == 12


def test_cached_logits_equal_the_whole_forward_pass(decoder: ort.InferenceSession) -> None:
    run = DecoderRun(decoder)
    run.step(PROMPT[np.newaxis, :1])
    cached = run.step(PROMPT[np.newaxis, 1:])
    feeds = decoder_feeds(decoder.get_inputs(), PROMPT[np.newaxis])
    whole = run_session(decoder, feeds)["logits"][:, -1]
    assert run.length == 3
    # the same sums in another order: hidden size 64, a few ulps of the largest logit
    assert np.abs(cached - whole).max() <= 64 * 2.0**-23 * np.abs(whole).max()


def test_models_without_a_cache_read_everything_again(
    without_cache: ort.InferenceSession,
) -> None:
    prompt = np.array([1, 2, 3])
    found = list(generate_greedy(without_cache, prompt, 8))
    assert found == list(_recompute(without_cache, prompt, 8))


def test_generation_stops_before_a_stop_token(decoder: ort.InferenceSession) -> None:
    free = list(generate_greedy(decoder, PROMPT, 8))
    stop = free[3]
    assert list(generate_greedy(decoder, PROMPT, 8, {stop})) == free[: free.index(stop)]


def test_tokens_stream_one_by_one(decoder: ort.InferenceSession) -> None:
    stream = generate_greedy(decoder, PROMPT, 1_000_000)
    assert [next(stream), next(stream)] == list(generate_greedy(decoder, PROMPT, 2))


def test_the_same_seed_writes_the_same_text(decoder: ort.InferenceSession) -> None:
    prompts = np.array([[5], [6], [7]])
    steps: list[int] = []
    first = sample_tokens(decoder, prompts, 9, np.random.default_rng(3), on_step=steps.append)
    again = sample_tokens(decoder, prompts, 9, np.random.default_rng(3))
    other = sample_tokens(decoder, prompts, 9, np.random.default_rng(4))
    assert first.shape == (3, 9)
    assert np.array_equal(first[:, :1], prompts)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert steps == [3] * 8


def test_temperature_zero_is_greedy(decoder: ort.InferenceSession) -> None:
    rng = np.random.default_rng(0)
    text = sample_tokens(decoder, PROMPT[None], 9, rng, sampling=Sampling(temperature=0))
    assert text[0, 3:].tolist() == list(generate_greedy(decoder, PROMPT, 6))


def test_a_prompt_of_full_length_is_returned_as_it_is(decoder: ort.InferenceSession) -> None:
    text = sample_tokens(decoder, PROMPT[None], 3, np.random.default_rng(0))
    assert np.array_equal(text, PROMPT[None])


def test_draws_follow_the_softmax() -> None:
    probabilities = np.array([0.0, 0.5, 0.2, 0.3])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32)
    drawn = Sampling().draw(np.tile(logits, (20_000, 1)), np.random.default_rng(0))
    shares = np.bincount(drawn, minlength=4) / 20_000
    assert shares[0] == 0
    # five standard deviations of a share
    assert (np.abs(shares - probabilities) <= 5 * np.sqrt(0.25 / 20_000)).all()


def test_temperature_sharpens() -> None:
    logits = np.tile(np.log(np.array([0.2, 0.8], np.float32)), (5_000, 1))
    drawn = Sampling(temperature=0.5).draw(logits, np.random.default_rng(0))
    squared = 0.8**2 / (0.2**2 + 0.8**2)
    assert abs(drawn.mean() - squared) <= 5 * np.sqrt(0.25 / 5_000)


def test_top_k_keeps_the_best_tokens_only() -> None:
    logits = np.tile(np.linspace(0, 1, 10, dtype=np.float32), (500, 1))
    drawn = Sampling(top_k=3).draw(logits, np.random.default_rng(0))
    assert set(drawn.tolist()) == {7, 8, 9}
    assert set(Sampling(top_k=99).draw(logits, np.random.default_rng(0)).tolist()) == {*range(10)}


def test_logits_that_are_not_finite_are_an_error() -> None:
    model = _forgetful()
    broken = np.full((11, 11), np.nan, np.float32)
    model.graph.initializers["table"].const_value = ir.tensor(broken, name="table")
    with pytest.raises(NonFiniteError, match="position 2"):
        next(generate_greedy(_session(model), np.array([1, 2, 3]), 1))


def test_a_model_without_logits_is_refused() -> None:
    model = _forgetful()
    model.graph.outputs[0].name = "hidden"
    with pytest.raises(UnsupportedModelError, match=r"no output 'logits'.*hidden"):
        DecoderRun(_session(model))


def test_a_token_outside_the_vocabulary_is_a_clear_error(
    without_cache: ort.InferenceSession,
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"could not run.*input_ids int64\[1, 1\]"):
        next(generate_greedy(without_cache, np.array([99]), 1))


def test_a_cache_that_no_output_continues_is_refused(tmp_path: Path) -> None:
    model = tiny_llama_onnx()
    del model.graph.outputs[1:]
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    with pytest.raises(UnsupportedModelError, match=r"continues .*past_key_values\.0\.key"):
        DecoderRun(open_session(path))
