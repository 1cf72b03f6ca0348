"""Statistics of random activations, without running a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from faq_onnx.artifacts.sites import LinearSite, ModelCensus
from faq_onnx.artifacts.stats import CalibrationStats, GroupStats, StatsManifest
from faq_onnx.graph.weights import read_weight
from faq_onnx.testing import TinyLlama, tiny_llama_census, tiny_llama_onnx

Array = npt.NDArray[np.float32]

SPEC = TinyLlama()


@dataclasses.dataclass(frozen=True)
class Planned:
    """What `make_plan` needs."""

    spec: TinyLlama
    census: ModelCensus
    stats: CalibrationStats
    read: Callable[[LinearSite], Array]


def random_stats(census: ModelCensus, folder: Path, seed: int = 0) -> CalibrationStats:
    """Statistics of 200 random tokens with outlier channels, for every group."""
    rng = np.random.default_rng(seed)
    arrays, entries = {}, []
    for group in census.groups:
        x = rng.normal(size=(200, group.in_features))
        x *= np.exp2(rng.normal(scale=1.5, size=group.in_features))
        arrays[f"{group.name}/mean_abs"] = np.abs(x).mean(axis=0).astype(np.float32)
        arrays[f"{group.name}/gram"] = (x.T @ x / 200).astype(np.float32)
        entries.append(
            GroupStats(group=group.name, features=group.in_features, file="all", gram=True)
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(arrays, folder / "all")
    manifest = StatsManifest(
        model_fingerprint="model",
        census_fingerprint=census.fingerprint(),
        corpus_fingerprint="corpus",
        tokens=200,
        groups=tuple(entries),
    )
    return CalibrationStats(folder, manifest)


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Planned]:
    def make(spec: TinyLlama = SPEC, seed: int = 0) -> Planned:
        census, model = tiny_llama_census(spec), tiny_llama_onnx(spec)
        stats = random_stats(census, tmp_path / f"stats{seed}", seed)
        return Planned(spec, census, stats, lambda site: read_weight(model, site))

    return make
