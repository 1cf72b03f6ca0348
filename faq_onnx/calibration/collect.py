"""Collect the statistics that a plan needs, and save them as an artifact."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from safetensors.numpy import save_file

from faq_onnx.artifacts.record import fingerprint_bytes
from faq_onnx.artifacts.sites import LinearRole, ModelCensus, ScaleGroup
from faq_onnx.artifacts.stats import CalibrationStats, GroupStats, StatsManifest
from faq_onnx.calibration.walk import LayerWalk, PartSums, ReferenceLogits
from faq_onnx.graph.cut import Part, cut_model
from faq_onnx.passes.insert_activation_stats import ActivationRequest
from faq_onnx.progress import SILENT, Progress

__all__ = ["Collector", "corpus_fingerprint"]


def corpus_fingerprint(*token_arrays: npt.NDArray[np.int64]) -> str:
    """Sha256 over token windows."""
    return fingerprint_bytes(b"".join(np.ascontiguousarray(a).tobytes() for a in token_arrays))


@dataclasses.dataclass(frozen=True)
class Collector:
    """One calibration of one model.

    Attributes:
        model: The float model.
        census: Of it.
        model_fingerprint: Sha256 that stands for the weights.
        folder: Work folder: hidden states under walk/, statistics under stats/.
    """

    model: ir.Model
    census: ModelCensus
    model_fingerprint: str
    folder: Path

    def collect(
        self,
        windows: npt.NDArray[np.int64],
        held_out: npt.NDArray[np.int64],
        groups: Sequence[str],
        progress: Progress = SILENT,
    ) -> tuple[CalibrationStats, ReferenceLogits]:
        """Run the model once.

        Args:
            windows: Calibration ids, int64 [windows, length].
            held_out: Ids kept for verification, int64 [m, length].
            groups: Names of the scale groups that need statistics.
            progress: One step per layer.

        Returns:
            The statistics, and the float logits of the held-out windows.
        """
        parts = self.parts()
        wanted = [group for group in self.census.groups if group.name in set(groups)]
        by_part = _groups_by_part(parts, wanted, self.census)
        requests = {index: _requests(found) for index, found in by_part.items()}
        corpus = corpus_fingerprint(windows, held_out)
        identity = "|".join((self.model_fingerprint, corpus, *sorted(groups)))
        walk = LayerWalk(
            self.model, parts, self.folder / "walk", fingerprint_bytes(identity.encode())
        )
        stats_folder = self.folder / "stats"
        stats_folder.mkdir(parents=True, exist_ok=True)
        for sums in walk.run(windows if wanted else windows[:0], held_out, requests, progress):
            _save_part(stats_folder, sums, by_part[sums.index])
        manifest = StatsManifest(
            model_fingerprint=self.model_fingerprint,
            census_fingerprint=self.census.fingerprint(),
            corpus_fingerprint=corpus,
            tokens=int(windows.size) if wanted else 0,
            groups=tuple(_entries(by_part)),
        )
        stats = CalibrationStats(stats_folder, manifest)
        stats.save()
        return stats, walk.reference(held_out)

    def logits(
        self, windows: npt.NDArray[np.int64], progress: Progress = SILENT, title: str = "run"
    ) -> ReferenceLogits:
        """Float logits of the model as it is now (after folding, say), layer by layer.

        They are computed from files in a folder of that `title` when they are asked for, so a
        second call with the same title replaces what the first one gave.
        """
        folder = self.folder / title.replace(" ", "-")
        walk = LayerWalk(self.model, self.parts(), folder, fingerprint=None)
        for _sums in walk.run(windows[:0], windows, {}, progress, title):
            pass
        return walk.reference(windows)

    def parts(self) -> list[Part]:
        """The model cut at its layers."""
        layer_of = {
            site.output: site.layer_index
            for site in self.census.sites
            if site.layer_index is not None and not site.in_subgraph
        }
        head = [s.output for s in self.census.sites if s.role is LinearRole.LM_HEAD]
        return cut_model(self.model, layer_of, head)


def _groups_by_part(
    parts: Sequence[Part], groups: Sequence[ScaleGroup], census: ModelCensus
) -> dict[int, list[ScaleGroup]]:
    """Each group belongs to the part that computes its first site."""
    found: dict[int, list[ScaleGroup]] = {}
    for group in groups:
        output = census.site(group.sites[0]).output
        index = next((p.index for p in parts if output in p.produces), None)
        if index is not None:
            found.setdefault(index, []).append(group)
    return found


def _requests(groups: Sequence[ScaleGroup]) -> tuple[ActivationRequest, ...]:
    values = {group.input: group.in_features for group in groups}
    return tuple(ActivationRequest(name, k, sum_abs=True, gram=True) for name, k in values.items())


def _save_part(folder: Path, sums: PartSums, groups: Sequence[ScaleGroup]) -> None:
    arrays: dict[str, npt.NDArray[np.float32]] = {}
    for group in groups:
        mean_abs = sums.sum_abs[group.input] / sums.tokens
        gram = sums.gram[group.input] / sums.tokens
        arrays[f"{group.name}/mean_abs"] = mean_abs.astype(np.float32)
        arrays[f"{group.name}/gram"] = gram.astype(np.float32)
    partial = folder / f"{_file_name(sums.index)}.partial"
    save_file(arrays, partial)
    partial.replace(folder / _file_name(sums.index))


def _file_name(index: int) -> str:
    return f"part-{index:03d}.safetensors"


def _entries(by_part: Mapping[int, Sequence[ScaleGroup]]) -> Iterator[GroupStats]:
    for index, groups in sorted(by_part.items()):
        for group in groups:
            yield GroupStats(
                group=group.name,
                features=group.in_features,
                file=_file_name(index),
                gram=True,
            )
