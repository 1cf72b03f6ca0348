"""Walk the float model and the one quantized so far side by side, scale group by scale group.

A site that is rounded against its float inputs does not know that its real inputs already carry
the errors of all sites before it. Here every group is reached twice, on the same tokens: by the
float path x and by the low-bit path x_q, on which all earlier sites hold their rounded weights.
The caller gets the second moments of both, rounds, and gives back what the low-bit path goes on
with. One part's weights are in memory at a time; hidden states lie on disk.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from faq_onnx.artifacts.sites import LinearSite, ModelCensus, ScaleGroup
from faq_onnx.calibration.ahead import (
    Ahead,
    Look,
    LookAhead,
    find_ahead,
    measure_slopes,
    stream_metric,
)
from faq_onnx.calibration.attention import (
    ATTENDED_TOKENS,
    Attended,
    AttentionMoments,
    AttentionSites,
    attention_sites,
)
from faq_onnx.calibration.batches import Batch, make_batches, part_feeds, store_key
from faq_onnx.calibration.hidden import HiddenStore
from faq_onnx.calibration.paired_moments import (
    Accumulator,
    Halves,
    PairedSums,
    halves_of,
)
from faq_onnx.calibration.residual import Residual, find_residual
from faq_onnx.errors import NonFiniteError
from faq_onnx.graph.cut import Part, cut_at, extract_part
from faq_onnx.graph.io import release_weights, save_model
from faq_onnx.graph.weights import read_initializer, read_weight, replace_weight
from faq_onnx.progress import SILENT, Progress
from faq_onnx.quant.ahead import Seen
from faq_onnx.runtime.session import open_session

__all__ = ["PairedWalk", "Solve"]

Array = npt.NDArray[np.float32]


Solve = Callable[[ScaleGroup, Halves, LookAhead | None], Mapping[str, Array]]


@dataclasses.dataclass(frozen=True)
class _Stop:
    """One group as the walk meets it: `value` is what its sites read."""

    group: ScaleGroup
    value: str
    residuals: Mapping[str, Residual]
    attention: AttentionSites | None = None
    ahead: Ahead | None = None


@dataclasses.dataclass
class PairedWalk:
    """One walk; not resumed when interrupted.

    Attributes:
        model: The float model, channel scales folded.
        census: Of it.
        folder: For hidden states and part models.
        attention_aware: Find out how errors of q, k and v count behind attention.
        look_ahead: Offer `solve` to look ahead of groups in front of a site that writes to the
            residual stream.
    """

    model: ir.Model
    census: ModelCensus
    folder: Path
    attention_aware: bool = False
    look_ahead: bool = False
    _diverged: set[str] = dataclasses.field(default_factory=set, init=False)

    def run(
        self,
        windows: npt.NDArray[np.int64],
        groups: Iterable[str],
        solve: Solve,
        progress: Progress = SILENT,
    ) -> None:
        """Stop at every group, in graph order.

        Args:
            windows: Token ids, int64 [windows, length].
            groups: Names of the groups to stop at; others stay float on both paths.
            solve: Gets a group, its moments on two halves of the tokens and, where there is
                something to see, what looks ahead of it; returns the weights [N, K] that the
                low-bit path goes on with, by site name.
            progress: One step per part.

        Raises:
            NonFiniteError: An activation became NaN or infinite.
        """
        parts, stops = self._plan(set(groups))
        batches = make_batches(windows)
        if not stops:
            return
        last = max(stops)
        parts = [part for part in parts if part.index <= last]
        with progress.stage("round layer by layer", len(parts), "parts") as advance:
            for part in parts:
                here = stops.get(part.index, [])
                is_last = part.index == last
                after = {r.after for stop in here for r in stop.residuals.values()}
                crossing = () if is_last else part.outputs
                if crossing or after:
                    self._forward(part, batches, {*crossing, *after}, {}, self._float)
                weights: dict[str, Array] = {}
                for stop in here:
                    halves = self._moments(stop, part, batches)
                    look = None if is_last else self._look(stop, part, batches, halves)
                    weights |= solve(stop.group, halves, look)
                    del look  # its session reads the file that the next one is written to
                diverged = weights or self._diverged & set(part.inputs)
                if crossing and diverged:
                    self._forward(part, batches, set(crossing), weights, self._low_bit)
                    self._diverged |= part.varying & set(crossing)
                self._drop_dead(part, parts, after)
                advance(1)
        self._float.release()
        self._low_bit.release()

    @property
    def _float(self) -> HiddenStore:
        return HiddenStore(self.folder / "float")

    @property
    def _low_bit(self) -> HiddenStore:
        return HiddenStore(self.folder / "low-bit")

    def _plan(self, wanted: set[str]) -> tuple[list[Part], dict[int, list[_Stop]]]:
        """The parts, and the groups that end each."""
        order = {site.name: number for number, site in enumerate(self.census.sites)}
        groups = sorted(self.census.groups, key=lambda g: min(order[s] for s in g.sites))
        in_graph = {site.name for site in self.census.sites if not site.in_subgraph}
        groups = [group for group in groups if in_graph.issuperset(group.sites)]
        stage_of = {
            self.census.site(name).output: number
            for number, group in enumerate(groups, start=1)
            for name in group.sites
        }
        parts = cut_at(self.model, stage_of)
        values = ir.convenience.create_value_mapping(self.model.graph, include_subgraphs=False)
        stops: dict[int, list[_Stop]] = {}

        def residual_of(site: LinearSite) -> Residual | None:
            part = _common_part(parts, [site])
            return None if part is None else find_residual(values[site.output], part)

        for group in groups:
            sites = [self.census.site(name) for name in group.sites]
            part = _common_part(parts, sites)
            read = {_activation(values[site.output]) for site in sites}
            if group.name not in wanted or part is None or len(read) != 1:
                continue
            (value,) = read
            if value not in part.varying or value not in part.inputs:
                continue
            residuals = {s.name: r for s in sites if (r := find_residual(values[s.output], part))}
            attention = None
            if self.attention_aware:
                attention = attention_sites(self.census, values, group)
            if attention is not None and not part.produces.issuperset(attention.values):
                attention = None
            ahead = None
            if self.look_ahead:
                ahead = find_ahead(self.census, values, groups, group, residual_of)
            if ahead is not None and not part.produces.issuperset(ahead.outputs.values()):
                ahead = None
            stop = _Stop(group, value, residuals, attention, ahead)
            stops.setdefault(part.index, []).append(stop)
        return parts, stops

    def _forward(
        self,
        part: Part,
        batches: Sequence[Batch],
        outputs: set[str],
        weights: Mapping[str, Array],
        store: HiddenStore,
    ) -> None:
        """Run one part on all batches and keep `outputs` in `store`."""
        store.folder.mkdir(parents=True, exist_ok=True)
        low_bit = store == self._low_bit
        names = sorted(outputs)
        session = self._session(part, names, weights)
        for batch in batches:
            results = self._run(session, part, batch, names, low_bit=low_bit)
            for name, result in zip(names, results, strict=True):
                varying = name in part.varying or name not in part.outputs
                store.put(name, store_key(varying, batch.name, batch.ids.shape), result)

    def _session(
        self, part: Part, outputs: Sequence[str], weights: Mapping[str, Array]
    ) -> ort.InferenceSession:
        """The part as a model of its own, with other weights where given."""
        model = extract_part(self.model, self._types(part.inputs), outputs)
        for name, weight in weights.items():
            replace_weight(model, self.census.site(name), weight)
        path = self.folder / "part.onnx"
        save_model(model, path, external_data=True)
        release_weights(model)
        return open_session(path)

    def _run(
        self,
        session: ort.InferenceSession,
        part: Part,
        batch: Batch,
        outputs: Sequence[str],
        *,
        low_bit: bool,
    ) -> list[npt.NDArray[np.generic]]:
        stored = {name: self._read(part, name, batch, low_bit=low_bit) for name in part.inputs}
        results: list[npt.NDArray[np.generic]] = session.run(
            outputs, part_feeds(session, batch.ids, stored)
        )
        return results

    def _read(
        self, part: Part, name: str, batch: Batch, *, low_bit: bool
    ) -> npt.NDArray[np.generic]:
        store = self._low_bit if low_bit and name in self._diverged else self._float
        return store.get(name, store_key(name in part.varying, batch.name, batch.ids.shape))

    def _types(self, names: Sequence[str]) -> dict[str, tuple[ir.DataType, int]]:
        types = {}
        for name in names:
            dtype, rank = self._float.kind(name)
            types[name] = (ir.DataType.from_numpy(dtype), rank)
        return types

    @np.errstate(over="ignore", invalid="ignore")  # `_check_finite` says where it happened
    def _moments(self, stop: _Stop, part: Part, batches: Sequence[Batch]) -> Halves:
        rows_of = {name: self.census.site(name).out_features for name in stop.residuals}
        sums = [PairedSums.zeros(stop.group.in_features, rows_of) for _ in range(2)]
        biases = {name: self._bias(name) for name in stop.residuals}
        for number, batch in enumerate(batches):
            low = _rows(self._read(part, stop.value, batch, low_bit=True))
            float_path = None
            if len(stop.residuals) < len(stop.group.sites):
                float_path = _rows(self._read(part, stop.value, batch, low_bit=False))
            missing = {}
            for name, place in stop.residuals.items():
                after = _rows(self._float.get(place.after, batch.name))
                before = _rows(self._read(part, place.before, batch, low_bit=True))
                missing[name] = after - before - biases[name]
            for half, rows in zip(sums, halves_of(len(low), number, len(batches)), strict=True):
                ahead = None if float_path is None else float_path[rows]
                half.add(low[rows], ahead, {name: m[rows] for name, m in missing.items()})
        self._check_finite(stop, sums[0].gram + sums[1].gram)
        attention = self._attention(stop, part, batches)
        one, other = (dataclasses.replace(half.means(), attention=attention) for half in sums)
        return one, other

    def _attention(self, stop: _Stop, part: Part, batches: Sequence[Batch]) -> AttentionMoments:
        """How errors count behind attention: that of the float path, on low-bit inputs."""
        if stop.attention is None:
            return AttentionMoments()
        names = sorted(stop.attention.values)
        session = self._session(part, names, {})
        sums, tokens = Attended(stop.attention), 0
        for batch in batches:
            if tokens >= ATTENDED_TOKENS:
                break
            tokens += batch.ids.size
            inputs = _rows(self._read(part, stop.value, batch, low_bit=True))
            results = self._run(session, part, batch, names, low_bit=False)
            seen = {n: np.asarray(r, np.float32) for n, r in zip(names, results, strict=True)}
            sums.add(seen, inputs.reshape(*batch.ids.shape, -1))
        return sums.moments()

    def _look(
        self, stop: _Stop, part: Part, batches: Sequence[Batch], halves: Halves
    ) -> LookAhead | None:
        """Looks through the site behind a group at what the stream is off."""
        ahead = stop.ahead
        if ahead is None:
            return None
        behind = self.census.site(ahead.site)
        metric = stream_metric(self.model, self.census, ahead.readers)
        weight, bias = read_weight(self.model, behind), self._bias(ahead.site)
        if not metric.size:
            metric = np.ones(behind.out_features, np.float32)
        names = [ahead.hidden, *ahead.outputs.values()]

        def observe(targets: Mapping[str, Array]) -> Callable[[int], Seen]:
            session = self._session(part, names, targets)
            between = self._elementwise(ahead)
            moved = {name: value for name, value in ahead.outputs.items() if name in targets}

            def see(number: int) -> Seen:
                batch = batches[number]
                results = self._run(session, part, batch, names, low_bit=True)
                given = dict(zip(names, results, strict=True))
                hidden = _rows(given.pop(ahead.hidden))
                slopes = measure_slopes(between, ahead.hidden, given, moved)
                before = ahead.residual.before
                goal = _rows(self._float.get(before, batch.name)) + bias
                goal += _rows(self._float.get(ahead.hidden, batch.name)) @ weight.T
                store = self._low_bit if before in self._diverged else self._float
                missing = goal - _rows(store.get(before, batch.name)) - bias - hidden @ weight.T
                loudness = np.sqrt(np.square(goal).mean(axis=1, keepdims=True))
                share = np.divide(1, loudness, out=np.zeros_like(loudness), where=loudness > 0)
                return Seen(
                    _rows(self._read(part, stop.value, batch, low_bit=True)),
                    {name: _rows(slope) * share for name, slope in slopes.items()},
                    missing * share * metric,
                    weight * metric[:, np.newaxis],
                )

            return see

        return Look((halves[0].gram, halves[1].gram), len(batches), observe)

    def _elementwise(self, ahead: Ahead) -> ort.InferenceSession:
        """What lies between the outputs of sites and the hidden activation, as a model."""
        dtype, rank = self._float.kind(ahead.hidden)
        kind = ir.DataType.from_numpy(dtype), rank
        model = extract_part(
            self.model, dict.fromkeys(ahead.outputs.values(), kind), [ahead.hidden]
        )
        path = self.folder / "elementwise.onnx"
        save_model(model, path)
        return open_session(path)

    def _bias(self, name: str) -> Array:
        site = self.census.site(name)
        if site.bias is None:
            return np.zeros(site.out_features, np.float32)
        return read_initializer(self.model, site.bias).astype(np.float32, copy=False)

    def _check_finite(self, stop: _Stop, gram: Accumulator) -> None:
        bad = np.flatnonzero(~np.isfinite(np.diagonal(gram)))
        if bad.size:
            msg = (
                f"{stop.group.name}: activation {stop.value!r} of the low-bit model is not finite "
                f"in {bad.size} of {len(gram)} channels (first: {bad[0]}); use more bits, or "
                "--path float"
            )
            raise NonFiniteError(msg)

    def _drop_dead(self, part: Part, parts: Sequence[Part], after: set[str]) -> None:
        """Forget what no later part reads."""
        later = {name for other in parts if other.index > part.index for name in other.inputs}
        for name in {*part.inputs, *after} - later:
            self._float.drop(name)
            self._low_bit.drop(name)


def _rows(array: npt.NDArray[np.generic]) -> Array:
    return array.reshape(-1, array.shape[-1]).astype(np.float32, copy=False)


def _common_part(parts: Sequence[Part], sites: Sequence[LinearSite]) -> Part | None:
    """The part that computes all of the sites, if one does."""
    names = {site.output for site in sites}
    return next((part for part in parts if names <= part.produces), None)


def _activation(output: ir.Value) -> str | None:
    """The value that the site with this output reads."""
    node = output.producer()
    value = None if node is None else node.inputs[0]
    return None if value is None else value.name
