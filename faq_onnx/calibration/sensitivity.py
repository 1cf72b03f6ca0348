"""How much KL at the logits each weight's rounding causes, with the future in view.

One walk through the parts carries the float hidden states and, for every weight met so far, the
hidden states of the model in which that weight alone is coarse. So a weight is judged by what all
later layers make of its error, without a backward pass:
    KL_site = mean over positions of KL(softmax(logits) || softmax(logits, site perturbed)).
A small error acts to second order, KL ~ 1/2 E[d^T F d] with d = x (W_q - W)^T and F the Fisher
matrix behind the site. Roundings are near enough to white for KL / E||d||^2 to carry over from
the coarse rounding to others. Cost: the stream of a weight runs through half of the layers on
average, and through the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.sensitivity import Perturbation, Sensitivity
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus, WeightLayout
from faq_onnx.calibration.hidden import HiddenStore
from faq_onnx.errors import CalibrationError, UnsupportedModelError
from faq_onnx.graph.cut import Part, extract_part
from faq_onnx.graph.io import release_weights, save_model
from faq_onnx.graph.weights import find_initializer, read_initializer
from faq_onnx.progress import SILENT, Advance, Progress
from faq_onnx.quant.divergence import ShiftedLogits, pieces
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session

__all__ = ["Perturb", "SensitivityWalk", "sensitivity_windows"]

Array = npt.NDArray[Any]
Weight = LinearSite | EmbeddingSite
Perturb = Callable[[Weight], Perturbation]

TOKENS_PER_RUN = 2048  # as in the calibration walk
TOKENS = 512  # KL / error is a mean over all rounding errors of a weight: few tokens are enough
FLOAT = ""  # the stream in which nothing is perturbed


def sensitivity_windows(
    windows: npt.NDArray[np.int64], tokens: int = TOKENS
) -> npt.NDArray[np.int64]:
    """The first windows, at least one, that come to about `tokens` tokens: int64 [n, length]."""
    return windows[: max(1, tokens // max(windows.shape[1], 1))]


@dataclasses.dataclass(frozen=True)
class SensitivityWalk:
    """A walk that measures what each weight's error does to the logits.

    Attributes:
        model: The float model, weights on disk.
        census: Of it.
        parts: From `Collector.parts`.
        folder: For hidden states and part models; of its own.
    """

    model: ir.Model
    census: ModelCensus
    parts: Sequence[Part]
    folder: Path

    def run(
        self,
        windows: npt.NDArray[np.int64],
        perturb: Perturb,
        progress: Progress = SILENT,
        title: str = "measure sensitivity",
    ) -> tuple[Sensitivity, ...]:
        """Measure every site and embedding that the logits depend on.

        Sites inside subgraphs cannot be perturbed and are left out.

        Args:
            windows: Token ids, int64 [n, length], from `sensitivity_windows`.
            perturb: Gives a coarse version of a weight; asked once for each.
            progress: Receives one step per window of a stream through a part.
            title: What the progress is called.

        Raises:
            CalibrationError: No windows.
            NonFiniteError: Logits are not finite.
            UnsupportedModelError: A value between layers has no batch axis in front.
        """
        if windows.size == 0:
            raise CalibrationError("no token windows to measure sensitivity on")
        self.folder.mkdir(parents=True, exist_ok=True)
        for stale in self.folder.glob("*.npy"):
            stale.unlink()
        weights = [self._weights(part) for part in self.parts]
        before = [1 + sum(map(len, weights[:index])) for index in range(len(weights))]
        total = len(windows) * (sum(before) + sum(map(len, weights)))
        errors: dict[str, float] = {}
        kls: dict[str, float] = {}
        with progress.stage(title, total, "runs") as advance:
            for part, found in zip(self.parts, weights, strict=True):
                runner = _Runner(self.model, self.folder, part, windows, advance)
                streams = list(errors)
                if part is self.parts[-1]:
                    kls = runner.finish(streams, found, perturb, errors)
                else:
                    runner.start(found, perturb, errors)
                    runner.carry([FLOAT, *streams])
                self._drop_dead(part)
        HiddenStore(self.folder).release()
        release_weights(self.model)
        return tuple(
            Sensitivity(name=name, error=error, kl=max(kls[name], 0.0))
            for name, error in errors.items()
        )

    def _weights(self, part: Part) -> list[Weight]:
        weights: list[Weight] = [*self.census.embeddings]
        weights += [site for site in self.census.sites if not site.in_subgraph]
        return [weight for weight in weights if weight.output in part.produces]

    def _drop_dead(self, part: Part) -> None:
        later = {name for p in self.parts if p.index > part.index for name in p.inputs}
        for name in {*part.inputs, *part.outputs} - later:
            HiddenStore(self.folder).drop(name)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One window of one stream."""

    stream: str
    window: int

    @property
    def key(self) -> str:
        """Names its files, whatever characters exporters have in node names."""
        return f"{fingerprint_bytes(self.stream.encode())[:16]}-{self.window}"


@dataclasses.dataclass(frozen=True)
class _Runner:
    """Runs one part.

    Attributes:
        model: The whole model.
        folder: For hidden states and the part's file.
        part: Stretch of the model.
        windows: int64 [n, length].
        advance: Told of every window that went through.
    """

    model: ir.Model
    folder: Path
    part: Part
    windows: npt.NDArray[np.int64]
    advance: Advance

    def carry(self, streams: Sequence[str]) -> None:
        """Push streams through, several windows at a time."""
        session = self._open(self._extract(self.part.outputs), "part")
        if set(self.part.outputs) - self.part.varying:
            self._keep_constants(session)
        for group in self._groups(streams):
            self._keep(group, self._run(session, group))
            self.advance(len(group))

    def start(self, weights: Sequence[Weight], perturb: Perturb, errors: dict[str, float]) -> None:
        """Begin the streams of this part's weights; notes the error of each perturbation."""
        if not weights:
            return
        opened = self._expose(weights, self.part.outputs)
        for weight in opened.weights:
            changed = opened.changed(self.model, weight, perturb, errors)
            for group in self._groups([weight.name]):
                self._keep(group, self._run(opened.session, group, changed))
                self.advance(len(group))

    def finish(
        self,
        streams: Sequence[str],
        weights: Sequence[Weight],
        perturb: Perturb,
        errors: dict[str, float],
    ) -> dict[str, float]:
        """Mean KL of every stream and of this part's own weights.

        Logits of one window, float and perturbed, are in memory at a time.
        """
        totals = dict.fromkeys(streams, 0.0)
        logits = self.part.outputs[-1:]
        session = self._open(self._extract(logits), "part")
        for window in range(len(self.windows)):
            reference = self._reference(session, window)
            self.advance(1)
            for stream in streams:
                found = self._run(session, [_Unit(stream, window)])[logits[0]]
                totals[stream] += _summed_kl(reference, found, stream)
                self.advance(1)
        if weights:
            opened = self._expose(weights, logits)
            for weight in opened.weights:
                changed = opened.changed(self.model, weight, perturb, errors)
                totals[weight.name] = 0.0
                for window in range(len(self.windows)):
                    reference = self._reference(session, window)
                    found = self._run(opened.session, [_Unit(FLOAT, window)], changed)[logits[0]]
                    totals[weight.name] += _summed_kl(reference, found, weight.name)
                    self.advance(1)
        return {name: total / self.windows.size for name, total in totals.items()}

    def _reference(self, session: ort.InferenceSession, window: int) -> ShiftedLogits:
        results = self._run(session, [_Unit(FLOAT, window)])
        return _shift(_flat(results[self.part.outputs[-1]]), "the float model")

    def _groups(self, streams: Sequence[str]) -> Iterator[list[_Unit]]:
        """Windows of streams, a power of two at a time: constants are kept for these sizes."""
        units = [_Unit(s, w) for s in streams for w in range(len(self.windows))]
        size = self._sizes()[-1]
        while units:
            while size > len(units):
                size //= 2
            yield units[:size]
            units = units[size:]

    def _sizes(self) -> list[int]:
        most = max(1, TOKENS_PER_RUN // self.windows.shape[1])
        return [1 << power for power in range(most.bit_length())]

    def _run(
        self,
        session: ort.InferenceSession,
        group: Sequence[_Unit],
        given: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """Outputs for some windows; `given` are inputs that are weights."""
        feeds = {**(given or {}), **self._stored(group)}
        inputs = session.get_inputs()
        ids = self.windows[[unit.window for unit in group]]
        own = [argument for argument in inputs if argument.name not in feeds]
        names = {argument.name for argument in inputs}
        feeds = {name: array for name, array in feeds.items() if name in names}
        return run_session(session, {**feeds, **decoder_feeds(own, ids)})

    def _stored(self, group: Sequence[_Unit]) -> dict[str, Array]:
        store = HiddenStore(self.folder)
        stored = {}
        for name in self.part.inputs:
            if name not in self.part.varying:
                stored[name] = store.get(name, f"n{len(group)}")
            elif len(group) == 1:
                stored[name] = self._own_or_float(name, group[0])
            else:
                stored[name] = np.concatenate([self._own_or_float(name, u) for u in group])
        return stored

    def _own_or_float(self, name: str, unit: _Unit) -> Array:
        """A stream has the float values of what was computed before it began."""
        store = HiddenStore(self.folder)
        try:
            return store.get(name, unit.key)
        except FileNotFoundError:
            return store.get(name, _Unit(FLOAT, unit.window).key)

    def _keep(self, group: Sequence[_Unit], results: Mapping[str, Array]) -> None:
        for name in self.part.outputs:
            if name not in self.part.varying:
                continue
            array = results[name]
            rows, left = divmod(len(array), len(group))
            flat = array.ndim == 2 and rows == self.windows.shape[1]  # batch * sequence
            if left or not (rows == 1 or flat):
                msg = (
                    f"value {name!r} between layers has shape {list(array.shape)} for "
                    f"{len(group)} windows; bits can be mixed only where the batch is the first "
                    "axis: give --bits instead of --budget"
                )
                raise UnsupportedModelError(msg)
            for unit, part in zip(group, np.split(array, len(group)), strict=True):
                HiddenStore(self.folder).put(name, unit.key, part)

    def _keep_constants(self, session: ort.InferenceSession) -> None:
        """Values that do not depend on the ids (masks, rotary tables), for each group size."""
        for size in self._sizes():
            results = self._run(session, [_Unit(FLOAT, 0)] * size)
            for name in set(self.part.outputs) - self.part.varying:
                HiddenStore(self.folder).put(name, f"n{size}", results[name])

    def _extract(self, outputs: Sequence[str]) -> ir.Model:
        store = HiddenStore(self.folder)
        kinds = {name: store.kind(name) for name in self.part.inputs}
        types = {n: (ir.DataType.from_numpy(dtype), rank) for n, (dtype, rank) in kinds.items()}
        return extract_part(self.model, types, outputs)

    def _open(self, model: ir.Model, title: str) -> ort.InferenceSession:
        path = self.folder / f"{title}.onnx"
        save_model(model, path, external_data=True)
        release_weights(model)
        return open_session(path)

    def _expose(self, weights: Sequence[Weight], outputs: Sequence[str]) -> _Exposed:
        """The part with the weights as inputs, so that one session serves all of them."""
        model = self._extract(outputs)
        found = [weight for weight in weights if weight.weight in model.graph.initializers]
        given: dict[str, Array] = {}
        for name in dict.fromkeys(weight.weight for weight in found):
            value = model.graph.initializers.pop(name)
            tensor = find_initializer(self.model, name).const_value
            assert tensor is not None
            value.const_value = None
            value.dtype, value.shape = tensor.dtype, ir.Shape(tensor.shape.numpy())
            model.graph.inputs.append(value)
            values = read_initializer(self.model, name)
            given[name] = np.ascontiguousarray(values, dtype=tensor.dtype.numpy())
        # not the file that a session of `_extract` may still read from
        return _Exposed(self._open(model, "exposed"), tuple(found), given)


@dataclasses.dataclass(frozen=True)
class _Exposed:
    """A part whose weights are inputs.

    Attributes:
        session: Of the part.
        weights: Those that are inputs.
        given: Their float values by initializer, as the file holds them.
    """

    session: ort.InferenceSession
    weights: tuple[Weight, ...]
    given: Mapping[str, Array]

    def changed(
        self, model: ir.Model, weight: Weight, perturb: Perturb, errors: dict[str, float]
    ) -> dict[str, Array]:
        """`given` with one weight perturbed, whose error is noted."""
        perturbation = perturb(weight)
        release_weights(model)
        errors[weight.name] = perturbation.error
        stored = self.given[weight.weight]
        values = perturbation.weight
        if isinstance(weight, LinearSite):
            turned = weight.layout is not WeightLayout.N_K
        else:  # a tied head's weight may be the table behind a Transpose
            turned = values.shape != stored.shape
        if turned:
            values = values.T
        array = np.ascontiguousarray(values, dtype=stored.dtype).reshape(stored.shape)
        return {**self.given, weight.weight: array}


def _summed_kl(reference: ShiftedLogits, logits: Array, whose: str) -> float:
    """Sum over positions of KL(reference || logits), nats; in pieces."""
    flat = _flat(logits)
    return sum(
        float(reference.rows(piece).kl(_shift(flat[piece], whose)).sum())
        for piece in pieces(*flat.shape)
    )


def _flat(logits: Array) -> Array:
    return logits.reshape(-1, logits.shape[-1])


def _shift(logits: Array, whose: str) -> ShiftedLogits:
    way_out = "the model overflows on this text: check it in float32, or calibrate on other text"
    return ShiftedLogits.of(logits, whose=f"logits of {whose}", way_out=way_out)
