"""Reading text with a decoder compiled for fixed lengths: one graph for prompts, one for tokens.

Both see a context of C positions: a graph that reads S tokens has a cache of C - S. The cache is
aligned to the right, so that what a graph read stands where the next one looks; the mask hides
the empty slots on the left, and, where a prompt does not fill the graph, the padding behind it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from faq_onnx.errors import UnsupportedModelError
from faq_onnx.runtime.feeds import DTYPES, Argument, InputKind, cache_position

__all__ = ["DecoderSession", "StaticDecoder"]

Array = npt.NDArray[Any]


class DecoderSession(Protocol):
    """The part of onnxruntime's InferenceSession that is needed here."""

    def get_inputs(self) -> Sequence[Argument]:
        """Inputs of the graph."""

    def get_outputs(self) -> Sequence[Argument]:
        """Outputs of the graph."""

    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]:
        """Outputs in the order of the names."""


@dataclasses.dataclass(frozen=True)
class _Graph:
    """One compiled graph.

    Attributes:
        session: Runs it.
        length: Tokens that it reads.
        inputs: By name.
        pasts: Name of each past, and of the present that continues it.
    """

    session: DecoderSession
    length: int
    inputs: Mapping[str, Argument]
    pasts: Mapping[str, str]

    @classmethod
    def of(cls, session: DecoderSession) -> _Graph:
        """Understand the inputs and outputs of a session."""
        inputs = {value.name: value for value in session.get_inputs()}
        presents = {
            cache_position(value.name): value.name
            for value in session.get_outputs()
            if cache_position(value.name) is not None
        }
        pasts = {
            name: presents[cache_position(name)]
            for name in inputs
            if cache_position(name) is not None
        }
        plain = {kind.value for kind in InputKind} - {InputKind.BRANCH}
        strangers = [name for name in inputs if name not in plain | pasts.keys()]
        if strangers or not plain <= inputs.keys():
            raise UnsupportedModelError(
                f"a static decoder has the inputs {', '.join(sorted(plain))} and a cache; this "
                f"one has {', '.join(inputs)}"
            )
        length = _static(inputs[InputKind.TOKENS], 1)
        return cls(session, length, inputs, pasts)

    @property
    def context(self) -> int:
        """Positions that the mask covers."""
        return _static(self.inputs[InputKind.MASK], 1)


class StaticDecoder:
    """Reads tokens one call after the other, and remembers them.

    Args:
        prefill: Session of the graph for many tokens.
        decode: Session of the graph for one token, of the same context.
    """

    def __init__(self, prefill: DecoderSession, decode: DecoderSession) -> None:
        self._prefill, self._decode = _Graph.of(prefill), _Graph.of(decode)
        self.context = self._decode.context
        self.length = 0
        self._cache = {
            name: np.zeros(
                (1, _static(value, 1), self.context, _static(value, 3)), DTYPES[value.type]
            )
            for name, value in self._decode.inputs.items()
            if name in self._decode.pasts
        }

    def read(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Logits float32 [n, vocabulary] of the next `tokens` (int64 [n]).

        Raises:
            UnsupportedModelError: The text becomes longer than the context.
        """
        if self.length + len(tokens) > self.context:
            raise UnsupportedModelError(
                f"{self.length} + {len(tokens)} tokens are more than the context of "
                f"{self.context}; package again with a larger --target-option context=N"
            )
        found = []
        while len(tokens):
            room = self.context - self.length
            graph = self._prefill if len(tokens) > 1 and self._prefill.length <= room else None
            graph = graph or self._decode
            found.append(self._run(graph, tokens[: graph.length]))
            tokens = tokens[graph.length :]
        return np.concatenate(found)

    def _run(self, graph: _Graph, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """One call; `tokens` may be fewer than the graph reads."""
        count, past = len(tokens), self.context - graph.length
        padding = graph.length - count
        mask = np.zeros((1, self.context), np.int64)
        mask[0, past - self.length : past + count] = 1
        positions = self.length + np.arange(graph.length)
        plain = {
            InputKind.TOKENS: np.pad(tokens, (0, padding))[np.newaxis],
            InputKind.MASK: mask,
            InputKind.POSITIONS: np.minimum(positions, self.context - 1)[np.newaxis],
        }
        feeds: dict[str, Array] = {
            str(kind): array.astype(DTYPES[graph.inputs[kind].type])
            for kind, array in plain.items()
        }
        for name in graph.pasts:
            feeds[name] = np.ascontiguousarray(self._cache[name][:, :, graph.length :])
        logits, *presents = graph.session.run(["logits", *graph.pasts.values()], feeds)
        for name, present in zip(graph.pasts, presents, strict=True):
            self._cache[name][:, :, padding:] = present[:, :, : self.context - padding]
        self.length += count
        return np.asarray(logits[0, :count], np.float32)


def _static(value: Argument, axis: int) -> int:
    size = value.shape[axis]
    if not isinstance(size, int):
        raise UnsupportedModelError(
            f"{value.name} has the shape {value.shape}; a static decoder has numbers only"
        )
    return size
