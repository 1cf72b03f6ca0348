"""The stages that open a model: from what a user names to a float graph that is understood."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.analysis import canonicalise, check_finite, take_census
from faq_onnx.artifacts.record import fingerprint_bytes, fingerprint_file
from faq_onnx.artifacts.sites import EmbeddingSite, LinearSite, ModelCensus
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.config import BlockScales
from faq_onnx.errors import CorruptModelError, FaqOnnxError, UnsupportedModelError
from faq_onnx.export import resolve_source
from faq_onnx.graph.io import load_model, release_weights, rest_bytes
from faq_onnx.graph.weights import read_initializer, read_weight
from faq_onnx.graph.writing import DATA_ALIGNMENT_BYTES
from faq_onnx.progress import Progress

__all__ = [
    "OpenedModel",
    "check_weights",
    "load_source",
    "open_model",
    "read_config",
    "source_bytes",
    "understand",
]

LOW_BIT_TENSORS = 3  # codes, scales and zero points of a weight
MULTIPLYING = 5  # unit of 8-bit scales, nodes that multiply, what lies between them
REFERENCE_BYTES = 90  # dims of one of them, suffix of its name, its share of the node's attributes


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A float model, understood.

    Attributes:
        source: Where it came from.
        model: The graph; weights on disk.
        census: What is in it.
        files: The ONNX file and those that hold its weights.
        unrotated: The model before a rotation; None where there was none.
    """

    source: SourceModel
    model: ir.Model
    census: ModelCensus
    files: tuple[Path, ...]
    unrotated: OpenedModel | None = None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Sha256 over its files, read when it is first asked for, and what was rotated."""
        if self.unrotated is not None:
            identity = f"{self.unrotated.fingerprint} {self.census.rotation}"
            return fingerprint_bytes(identity.encode())
        parts = [fingerprint_file(file) for file in self.files]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    @property
    def given(self) -> OpenedModel:
        """The model as it came, whose logits are the reference."""
        return self.unrotated or self

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        if self.census.embeddings:
            return self.census.embeddings[0].rows
        heads = [site for site in self.census.sites if site.role == "lm_head"]
        if not heads:
            msg = (
                f"{self.source.onnx_path}: neither a token embedding nor an lm_head was found, so "
                "the model cannot be run on text; use --method rtn with `faq-onnx opt`"
            )
            raise UnsupportedModelError(msg)
        return heads[0].out_features

    def read(self, site: LinearSite) -> npt.NDArray[np.float32]:
        """The weight of a site as the graph holds it now, float32 [N, K]."""
        return read_weight(self.model, site)

    def read_table(self, table: EmbeddingSite) -> npt.NDArray[np.float32]:
        """An embedding as the graph holds it now, float32 [rows, width]."""
        values = read_initializer(self.model, table.weight).astype(np.float32, copy=False)
        if values.shape == (table.rows, table.width):
            return values
        return np.ascontiguousarray(values.T)  # a tied head's weight, behind a Transpose

    def other_bytes(self, block_scales: BlockScales, *, external: bool) -> int:
        """At most what a low-bit file holds besides codes, scales and zero points."""
        weights = self._weights
        # Pages of onnxruntime: in a file of their own, tensors begin at multiples of 4096.
        padding = DATA_ALIGNMENT_BYTES if external else 0
        names = sum(len(weight.name) + len(weight.weight) for weight in weights)
        entries = LOW_BIT_TENSORS if block_scales == "float" else LOW_BIT_TENSORS + MULTIPLYING
        bookkeeping = entries * (len(weights) * REFERENCE_BYTES + names)
        return self._rest_bytes + bookkeeping + LOW_BIT_TENSORS * len(weights) * padding

    @functools.cached_property
    def _rest_bytes(self) -> int:
        """Structure and other tensors of the float file, which both formats and target ask for."""
        return rest_bytes(self.model, {weight.weight for weight in self._weights})

    @property
    def _weights(self) -> list[LinearSite | EmbeddingSite]:
        return [*self.census.sites, *self.census.embeddings]


def open_model(source: str, work: Path, progress: Progress) -> OpenedModel:
    """Resolve, load, canonicalise and take stock of a float source, and check its weights."""
    opened = understand(*load_source(source, work, progress), progress)
    check_weights(opened)
    return opened


def load_source(source: str, work: Path, progress: Progress) -> tuple[SourceModel, ir.Model]:
    """Resolve, load and canonicalise a source, float or low-bit."""
    resolved = _resolve(source, work, progress)
    model = load_model(resolved.onnx_path)
    try:
        canonicalise(model)
    except FaqOnnxError as error:
        error.add_note(f"model: {resolved.onnx_path}")
        raise
    return resolved, model


def understand(resolved: SourceModel, model: ir.Model, progress: Progress) -> OpenedModel:
    """Take stock of a float model, without a look at its weights."""
    try:
        census = take_census(model, read_config(resolved))
    except FaqOnnxError as error:
        error.add_note(f"model: {resolved.onnx_path}")
        raise
    release_weights(model)
    for warning in census.warnings:
        progress.note(warning)
    return OpenedModel(resolved, model, census, _files(model, resolved.onnx_path))


def check_weights(opened: OpenedModel) -> None:
    """Read every weight of a model, as it came, once: after all that can be refused without.

    Raises:
        NonFiniteError: Some are not numbers.
    """
    try:
        check_finite(opened.model, opened.census)
    except FaqOnnxError as error:
        error.add_note(f"model: {opened.source.onnx_path}")
        raise


def source_bytes(source: SourceModel, model: ir.Model) -> int:
    """Size of the ONNX file and of the files that hold its weights."""
    return sum(file.stat().st_size for file in _files(model, source.onnx_path))


def _files(model: ir.Model, path: Path) -> tuple[Path, ...]:
    """The ONNX file and those that hold its weights, in order of their names."""
    weights = {
        value.const_value.path
        for graph in model.graphs()
        for value in graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    return tuple(sorted({path.resolve(), *(Path(file).resolve() for file in weights)}))


def _resolve(source: str, work: Path, progress: Progress) -> SourceModel:
    """`resolve_source`, or the export that an earlier run left in the work folder."""
    record = work / "source.json"
    if record.is_file():
        earlier = SourceModel.load(record)
        path = Path(source)
        changed = path.exists() and path.stat().st_mtime > record.stat().st_mtime
        if earlier.given == source and earlier.onnx_path.is_file() and not changed:
            progress.note(f"{source}: taking the export in {earlier.onnx_path.parent}")
            return earlier
    resolved = resolve_source(source, work, progress)
    if resolved.exported:
        resolved.save(record)
    return resolved


def read_config(source: SourceModel) -> Mapping[str, object] | None:
    """The parsed config.json, None where there is none."""
    path = source.companion("config.json")
    if path is None:
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path}: not valid JSON ({error}); restore it or remove it"
        raise CorruptModelError(msg) from error
    return config if isinstance(config, dict) else None
