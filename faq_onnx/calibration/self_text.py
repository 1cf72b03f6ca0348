"""`self` calibration: the model writes its own text by sampling, so no data set is needed."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from tokenizers import Tokenizer  # type: ignore[import-untyped]

from faq_onnx.artifacts.source import SourceModel
from faq_onnx.config import CalibrationConfig
from faq_onnx.errors import CorpusError
from faq_onnx.progress import Progress
from faq_onnx.runtime.feeds import describe_inputs
from faq_onnx.runtime.generate import sample_tokens
from faq_onnx.runtime.session import open_session

__all__ = ["SelfText"]

_Tokens = npt.NDArray[np.int64]
# The cache is copied whole at every step, so long texts are slow and large: a window is made of
# several texts, as packed documents are. (24 texts of SmolLM2-135M: 0.1 s a step behind 100
# tokens, 0.6 s and 0.8 GB more behind 240.)
_TEXT_TOKENS = 128
# Three copies live at the peak of a step, and memory is promised to stay near the weights.
_CACHE_BYTES = 96 << 20
_MAX_BATCH = 64


@dataclasses.dataclass(frozen=True)
class SelfText:
    """Text by the model itself; a window is one or more texts, each from a start token.

    Attributes:
        source: The float model, and its tokenizer if it has one.
        vocabulary: Rows of the embedding.
    """

    source: SourceModel
    vocabulary: int

    def write(
        self, config: CalibrationConfig, count: int, progress: Progress, *, held_out: bool = False
    ) -> _Tokens:
        """Sample windows at temperature 1, the same for the same seed.

        Every text starts with a token drawn from the vocabulary, behind a BOS where the
        tokenizer prepends one.

        Args:
            config: Sequence length and seed.
            count: Windows to write.
            progress: Shows one stage, in tokens.
            held_out: Other windows than without, of the same seed.

        Returns:
            int64 [count, sequence_length].
        """
        if count == 0:
            return np.empty((0, config.sequence_length), np.int64)
        rng = np.random.default_rng([config.seed, int(held_out)])
        per_window = -(-config.sequence_length // _TEXT_TOKENS)
        length = -(-config.sequence_length // per_window)
        prompts = _draw_prompts(self.source, self.vocabulary, count * per_window, rng)
        session = open_session(self.source.onnx_path)
        batches = -(-len(prompts) // _batch_size(session, length))
        total = len(prompts) * (length - prompts.shape[1])
        with progress.stage("write calibration text", total, "tokens") as advance:
            texts = [
                sample_tokens(session, rows, length, rng, on_step=advance)
                for rows in np.array_split(prompts, batches)
            ]
        windows = np.concatenate(texts).reshape(count, per_window * length)
        return np.ascontiguousarray(windows[:, : config.sequence_length])


def _draw_prompts(
    source: SourceModel, vocabulary: int, count: int, rng: np.random.Generator
) -> _Tokens:
    """Start tokens, int64 [count, 1 or more]; distinct as long as there are enough."""
    path = source.companion("tokenizer.json")
    if path is None:
        candidates, prefix = np.arange(vocabulary), np.empty(0, np.int64)
    else:
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise CorpusError(f"{path}: not a tokenizer ({error})") from error
        candidates = _ordinary_tokens(tokenizer, vocabulary)
        prefix = np.asarray(tokenizer.encode("").ids, np.int64)
    if not len(candidates) or (prefix >= vocabulary).any():
        raise CorpusError(
            f"{path}: its tokens are not in the model's vocabulary of {vocabulary}; "
            f"the tokenizer belongs to another model"
        )
    starts = rng.choice(candidates, count, replace=count > len(candidates))
    return np.column_stack([np.broadcast_to(prefix, (count, len(prefix))), starts])


def _ordinary_tokens(tokenizer: Tokenizer, vocabulary: int) -> _Tokens:
    """Ids below `vocabulary` that stand for text: no control tokens, no unused rows."""
    control = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    known = set(tokenizer.get_vocab(with_added_tokens=True).values()) - control
    return np.asarray(sorted(i for i in known if i < vocabulary), np.int64)


def _batch_size(session: ort.InferenceSession, length: int) -> int:
    cache = describe_inputs(session.get_inputs()).cache
    row = sum(slot.heads * slot.head_dim * np.dtype(slot.dtype).itemsize for slot in cache)
    return max(1, min(_MAX_BATCH, _CACHE_BYTES // max(1, row * length)))
