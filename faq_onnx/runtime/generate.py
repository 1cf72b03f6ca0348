"""Text generation with a key/value cache on a decoder ONNX model: greedy, and sampled in batches.

The cache stays inside onnxruntime: each step binds the `present` values of the last one as `past`
inputs, so Python copies only token ids and the logits of one position. Models without a cache
read their whole context again at every step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from faq_onnx.errors import NonFiniteError, UnsupportedModelError
from faq_onnx.runtime.feeds import CacheSlot, cache_position, describe_inputs
from faq_onnx.runtime.session import RUN_ERRORS, run_error

__all__ = ["DecoderRun", "Sampling", "generate_greedy", "sample_tokens"]

Tokens = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]

LOGITS = "logits"
CPU = "cpu"
ORT_TYPES = {
    np.dtype(np.float32): "tensor(float)",
    np.dtype(np.float16): "tensor(float16)",
    np.dtype(np.int8): "tensor(int8)",
}


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: Divides the logits; 0 takes the best token.
        top_k: Only the k best tokens are candidates; None means all.
    """

    temperature: float = 1.0
    top_k: int | None = None

    def draw(self, logits: Logits, rng: np.random.Generator) -> Tokens:
        """One token for each row of logits [B, vocabulary]: int64 [B]."""
        if self.temperature == 0:
            best: Tokens = logits.argmax(axis=1)
            return best
        candidates: Tokens | None = None
        if self.top_k is not None and self.top_k < logits.shape[1]:
            largest = np.argpartition(logits, -self.top_k, axis=1)[:, -self.top_k :]
            candidates = np.sort(largest, axis=1)  # a set has no order; a draw needs one
            logits = np.take_along_axis(logits, candidates, axis=1)
        weights = logits - logits.max(axis=1, keepdims=True)
        weights *= np.float32(1 / self.temperature)
        np.exp(weights, out=weights)
        sums = np.cumsum(weights, axis=1, dtype=np.float64)
        # 1 - u lies in (0, 1]: a token of weight 0 in front is never drawn
        points = (1.0 - rng.random(len(logits))) * sums[:, -1]
        chosen: Tokens = (sums < points[:, np.newaxis]).sum(axis=1)
        if candidates is None:
            return chosen
        drawn: Tokens = candidates[np.arange(len(chosen)), chosen]
        return drawn


DEFAULT_SAMPLING = Sampling()


class DecoderRun:
    """One running batch on a decoder session.

    Raises:
        UnsupportedModelError: The model is not a decoder that can be fed, or has no logits.
    """

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self._inputs = describe_inputs(session.get_inputs())
        outputs = [value.name for value in session.get_outputs()]
        if LOGITS not in outputs:
            msg = f"the model has no output {LOGITS!r} to generate from; outputs: {outputs}"
            raise UnsupportedModelError(msg)
        presents = {cache_position(name): name for name in outputs}
        lost = [slot.name for slot in self._inputs.cache if slot.position not in presents]
        if lost:
            msg = f"no output continues the cache inputs {', '.join(lost)}; outputs: {outputs}"
            raise UnsupportedModelError(msg)
        self._presents = [presents[slot.position] for slot in self._inputs.cache]
        self._cache: list[ort.OrtValue] = []
        self._seen: Tokens | None = None

    @property
    def length(self) -> int:
        """Tokens read so far."""
        return 0 if self._seen is None else self._seen.shape[1]

    def step(self, input_ids: Tokens) -> Logits:
        """Read further tokens [B, S] and return float32 logits [B, vocabulary] behind the last.

        Raises:
            UnsupportedModelError: onnxruntime could not run the model.
            NonFiniteError: The logits are NaN or infinite.
        """
        past_length = self.length if self._inputs.cache else 0
        seen = input_ids if self._seen is None else np.hstack([self._seen, input_ids])
        read = input_ids if self._inputs.cache else seen
        values = self._run(read, past_length)
        self._seen, self._cache = seen, values[1:]
        last: Logits = np.asarray(values[0].numpy()[:, -1], np.float32)
        if not np.isfinite(last).all():
            msg = f"the model's logits are not finite at position {self.length - 1}"
            raise NonFiniteError(msg)
        return last

    def _run(self, input_ids: Tokens, past_length: int) -> list[ort.OrtValue]:
        """Logits and the new cache."""
        binding = self._session.io_binding()
        feeds = self._inputs.plain_feeds(input_ids, past_length)
        if self._cache:
            for slot, value in zip(self._inputs.cache, self._cache, strict=True):
                binding.bind_ortvalue_input(slot.name, _as_declared(value, slot))
        else:
            feeds |= {slot.name: slot.empty(len(input_ids)) for slot in self._inputs.cache}
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in (LOGITS, *self._presents):
            binding.bind_output(name, CPU)
        try:
            self._session.run_with_iobinding(binding)
        except RUN_ERRORS as error:
            raise run_error(feeds, error) from error
        return list(binding.get_outputs())


def generate_greedy(
    session: ort.InferenceSession,
    prompt: Tokens,
    max_tokens: int,
    stop: Collection[int] = (),
) -> Iterator[int]:
    """Yield the best next token up to `max_tokens` times, one by one as they are found.

    Args:
        session: A decoder.
        prompt: int64 [S], at least one token.
        max_tokens: Most tokens to yield.
        stop: Token ids that end the text; not yielded.

    Raises:
        UnsupportedModelError: The model is not a decoder that can be fed.
        NonFiniteError: The logits are NaN or infinite.
    """
    run = DecoderRun(session)
    ids = np.asarray(prompt, np.int64).reshape(1, -1)
    for _ in range(max_tokens):
        token = int(run.step(ids)[0].argmax())
        if token in stop:
            return
        yield token
        ids = np.array([[token]], np.int64)


def sample_tokens(  # noqa: PLR0913  the last two have defaults
    session: ort.InferenceSession,
    prompts: Tokens,
    length: int,
    rng: np.random.Generator,
    *,
    sampling: Sampling = DEFAULT_SAMPLING,
    on_step: Callable[[int], None] = lambda _tokens: None,
) -> Tokens:
    """Continue a batch of prompts by sampling, all to the same length.

    Args:
        session: A decoder.
        prompts: int64 [B, S], at least one token each (such as the start token).
        length: Tokens per row in the result, prompt included.
        rng: Source of all randomness; the same state gives the same text.
        sampling: Temperature and top-k.
        on_step: Called with the number of tokens drawn (B) after every step.

    Returns:
        int64 [B, length].

    Raises:
        UnsupportedModelError: The model is not a decoder that can be fed.
        NonFiniteError: The logits are NaN or infinite.
    """
    batch, start = prompts.shape
    text = np.empty((batch, length), np.int64)
    text[:, :start] = prompts[:, :length]
    run = DecoderRun(session)
    ids = prompts
    for position in range(start, length):
        text[:, position] = sampling.draw(run.step(ids), rng)
        ids = text[:, position : position + 1]
        on_step(batch)
    return text


def _as_declared(value: ort.OrtValue, slot: CacheSlot) -> ort.OrtValue:
    """A present value in the element type of the past input; float16 exports may differ."""
    array_type = ORT_TYPES[np.dtype(slot.dtype)]
    if value.data_type() == array_type:
        return value
    return ort.OrtValue.ortvalue_from_numpy(value.numpy().astype(slot.dtype))
