"""Run a model part by part over token windows and collect statistics on the way.

Only one part's weights are in memory at a time, and hidden states lie on disk, so a model larger
than memory can be walked. The part that makes the logits is not run for calibration windows:
its input statistics are all that calibration needs; held-out windows stop in front of it and
`ReferenceLogits` finishes them when verification asks.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from faq_onnx.artifacts.record import Record
from faq_onnx.calibration.batches import Batch, make_batches, part_feeds, store_key
from faq_onnx.calibration.hidden import HiddenStore
from faq_onnx.errors import NonFiniteError
from faq_onnx.graph.cut import Part, extract_part
from faq_onnx.graph.io import release_weights, save_model
from faq_onnx.passes.insert_activation_stats import ActivationRequest, InsertActivationStatsPass
from faq_onnx.progress import SILENT, Progress
from faq_onnx.runtime.session import open_session

__all__ = ["LayerWalk", "PartSums", "ReferenceLogits"]

_LOG = logging.getLogger(__name__)

STATE_NAME = "walk.json"


class _WalkState(Record):
    """Where an interrupted walk stopped."""

    key: str
    parts_done: int


@dataclasses.dataclass(frozen=True)
class PartSums:
    """Sums over all calibration tokens of one part.

    Attributes:
        index: Of the part.
        tokens: T.
        sum_abs: float64 [K] by activation value.
        gram: float64 [K, K] by activation value.
    """

    index: int
    tokens: int
    sum_abs: Mapping[str, npt.NDArray[np.float64]]
    gram: Mapping[str, npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class ReferenceLogits:
    """Float logits of held-out windows, computed when asked from stored hidden states.

    Attributes:
        model_path: The part of the model that makes the logits.
        output: Name of the logits.
        inputs: Values it reads from the store.
        store: Holds these.
        windows: int64 [windows, length], the token ids.
        varying: Those of `inputs` that differ between windows.
    """

    model_path: Path
    output: str
    inputs: tuple[str, ...]
    store: HiddenStore
    windows: npt.NDArray[np.int64]
    varying: frozenset[str]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """Yield (ids [1, length], logits [1, length, vocabulary]) window by window."""
        session = open_session(self.model_path, prepack=False)
        for row in range(len(self.windows)):
            ids = self.windows[row : row + 1]
            feeds = part_feeds(session, ids, self._stored(row))
            logits = session.run([self.output], feeds)[0]
            yield ids, np.asarray(logits, dtype=np.float32)

    def _stored(self, row: int) -> dict[str, npt.NDArray[np.generic]]:
        shape = (1, self.windows.shape[1])
        return {
            name: self.store.get(name, store_key(name in self.varying, f"held{row}", shape))
            for name in self.inputs
        }


@dataclasses.dataclass(frozen=True)
class LayerWalk:
    """A walk through the parts of a model.

    Attributes:
        model: The float model, weights on disk.
        parts: From `cut_model`.
        folder: For hidden states and part models; an interrupted walk resumes from here.
        fingerprint: Of model and tokens; a state with another one is not resumed. None starts
            from the beginning every time.
    """

    model: ir.Model
    parts: Sequence[Part]
    folder: Path
    fingerprint: str | None

    def run(
        self,
        windows: npt.NDArray[np.int64],
        held_out: npt.NDArray[np.int64],
        requests: Mapping[int, Sequence[ActivationRequest]],
        progress: Progress = SILENT,
        title: str = "calibrate",
    ) -> Iterator[PartSums]:
        """Yield the sums of each part that has requests, in order.

        Args:
            windows: Calibration ids, int64 [windows, length].
            held_out: Ids whose hidden states are kept for `reference`, int64 [m, length].
            requests: Statistics wanted, by part index.
            progress: Receives one step per part.
            title: What the progress is called.

        Raises:
            NonFiniteError: An activation became NaN or infinite.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        done = self._resume_point()
        if done == 0:
            # what the file of another walk speaks of is about to be overwritten
            (self.folder / STATE_NAME).unlink(missing_ok=True)
        batches = make_batches(windows, held_out)
        with progress.stage(title, len(self.parts), "layers") as advance:
            for number, part in enumerate(self.parts):
                wanted = tuple(requests.get(part.index, ()))
                is_last = part is self.parts[-1]
                if number >= done:
                    sums = self._run_part(part, batches, wanted, is_last=is_last)
                    if sums is not None:
                        yield sums
                    self._finish(number)
                    self._drop_dead(part)  # not before: whoever resumes here needs its inputs
                advance(1)
        self._store.release()

    def reference(self, held_out: npt.NDArray[np.int64]) -> ReferenceLogits:
        """The logits of the held-out windows of the last `run`."""
        part = self.parts[-1]
        model = extract_part(self.model, self._types(part.inputs), part.outputs[-1:])
        path = self.folder / "logits.onnx"
        save_model(model, path, external_data=True)
        release_weights(model)
        return ReferenceLogits(
            model_path=path,
            output=part.outputs[-1],
            inputs=tuple(v.name or "" for v in model.graph.inputs if v.name in part.inputs),
            store=self._store,
            windows=held_out,
            varying=part.varying,
        )

    @property
    def _store(self) -> HiddenStore:
        return HiddenStore(self.folder)

    def _run_part(
        self,
        part: Part,
        batches: Sequence[Batch],
        wanted: tuple[ActivationRequest, ...],
        *,
        is_last: bool,
    ) -> PartSums | None:
        if is_last and not wanted:
            return None
        crossing = () if is_last else part.outputs
        session = self._open_part(part, crossing, wanted)
        sums = _Sums.zeros(wanted)
        for batch in batches:
            if is_last and not batch.collect:
                continue
            stored = {
                name: self._store.get(
                    name, store_key(name in part.varying, batch.name, batch.ids.shape)
                )
                for name in part.inputs
            }
            feeds = part_feeds(session, batch.ids, stored)
            names = list(dict.fromkeys([*crossing, *(sums.outputs if batch.collect else ())]))
            results = dict(zip(names, session.run(names, feeds), strict=True))
            for name in crossing:
                key = store_key(name in part.varying, batch.name, batch.ids.shape)
                self._store.put(name, key, results[name])
            if batch.collect:
                sums.add(results, batch.ids.size)
        if not wanted:
            return None
        sums.check_finite(part.index)
        return PartSums(part.index, sums.tokens, sums.sum_abs, sums.gram)

    def _open_part(
        self, part: Part, crossing: Sequence[str], wanted: tuple[ActivationRequest, ...]
    ) -> ort.InferenceSession:
        outputs = list(dict.fromkeys([*crossing, *(request.value for request in wanted)]))
        model = extract_part(self.model, self._types(part.inputs), outputs)
        reduced = tuple(dataclasses.replace(request, gram=False) for request in wanted)
        InsertActivationStatsPass(reduced)(model)
        kept = {*crossing, *(request.value for request in wanted if request.gram)}
        for value in [value for value in model.graph.outputs if value.name in set(outputs) - kept]:
            model.graph.outputs.remove(value)
        path = self.folder / "part.onnx"
        save_model(model, path, external_data=True)
        release_weights(model)
        return open_session(path)

    def _types(self, names: Sequence[str]) -> dict[str, tuple[ir.DataType, int]]:
        types = {}
        for name in names:
            dtype, rank = self._store.kind(name)
            types[name] = (ir.DataType.from_numpy(dtype), rank)
        return types

    def _drop_dead(self, part: Part) -> None:
        """Forget what no later part reads."""
        later = {name for other in self.parts if other.index > part.index for name in other.inputs}
        for name in part.inputs:
            if name not in later and part is not self.parts[-1]:
                self._store.drop(name)

    def _resume_point(self) -> int:
        path = self.folder / STATE_NAME
        if self.fingerprint is None or not path.is_file():
            return 0
        state = _WalkState.load(path)
        if state.key != self.fingerprint:
            return 0
        _LOG.info("resuming calibration behind part %d", state.parts_done)
        return state.parts_done

    def _finish(self, number: int) -> None:
        if self.fingerprint is not None:
            state = _WalkState(key=self.fingerprint, parts_done=number + 1)
            state.save(self.folder / STATE_NAME)


@dataclasses.dataclass
class _Sums:
    """Running float64 sums of one part.

    Attributes:
        requests: What is summed.
        sum_abs: Sum of |x| over tokens by value, [K].
        gram: Sum of x^T x over tokens by value, [K, K].
        tokens: How many are in the sums.
    """

    requests: tuple[ActivationRequest, ...]
    sum_abs: dict[str, npt.NDArray[np.float64]]
    gram: dict[str, npt.NDArray[np.float64]]
    tokens: int = 0

    @classmethod
    def zeros(cls, requests: tuple[ActivationRequest, ...]) -> _Sums:
        """Of no tokens yet."""
        return cls(
            requests,
            {r.value: np.zeros(r.features) for r in requests if r.sum_abs},
            {r.value: np.zeros((r.features, r.features)) for r in requests if r.gram},
        )

    @property
    def outputs(self) -> list[str]:
        """Names of the graph outputs that `add` reads."""
        names = [r.sum_abs_name for r in self.requests if r.sum_abs]
        return names + [r.value for r in self.requests if r.gram]

    @np.errstate(over="ignore", invalid="ignore")  # `check_finite` says where it happened
    def add(self, results: Mapping[str, npt.NDArray[np.floating]], tokens: int) -> None:
        """Add one run's sums over `tokens` tokens.

        x^T x is left to BLAS, which computes half of the symmetric product: onnxruntime's Gemm
        takes two and a half times as long.
        """
        for request in self.requests:
            if request.sum_abs:
                self.sum_abs[request.value] += results[request.sum_abs_name]
            if request.gram:
                rows = results[request.value].reshape(-1, request.features)
                rows = rows.astype(np.float32, copy=False)
                self.gram[request.value] += rows.T @ rows
        self.tokens += tokens

    def check_finite(self, index: int) -> None:
        """Refuse overflow.

        Args:
            index: Of the part, for the error.

        Raises:
            NonFiniteError: A sum is NaN or infinite; names the first channel.
        """
        for value, total in self.sum_abs.items():
            bad = np.flatnonzero(~np.isfinite(total))
            if bad.size:
                msg = (
                    f"part {index}: activation {value!r} is not finite in {bad.size} of "
                    f"{total.size} channels (first: {bad[0]}); the source model overflows on this "
                    "text: check it in float32, or calibrate on other text"
                )
                raise NonFiniteError(msg)
