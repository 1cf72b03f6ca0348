"""A static folder: the model, its tokenizer, and a page that runs both in a browser."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, ClassVar

import onnx_ir as ir
from pydantic import Field

from faq_onnx.artifacts.record import fingerprint_bytes, fingerprint_file
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import (
    FactTable,
    ModelOutline,
    PackageFacts,
    PlannedWeight,
    Reference,
    Refusal,
    TargetProof,
)
from faq_onnx.graph.io import load_model, save_model
from faq_onnx.progress import Progress
from faq_onnx.quant.formats import Provider
from faq_onnx.targets.protocol import PackageJob, Target, TargetOptions
from faq_onnx.targets.web_libraries import (
    BINARIES,
    LIBRARY_FOLDER,
    find_libraries,
)
from faq_onnx.targets.web_model import (
    PAGE_CONFIG,
    PageConfig,
    PageFile,
    check_decoder,
    describe_decoder,
    text_facts,
)
from faq_onnx.targets.web_proof import prove_in_browser
from faq_onnx.targets.web_unpack import UNPACKED_GRAPH, write_unpacked_graph

__all__ = ["TARGET", "WebOptions", "WebTarget"]

_MODEL = "model.onnx"
_PAGE = Path(__file__).with_name("web_page")
# WebAssembly addresses 4 GiB, and cache and activations need some of them.
LARGEST_MODEL_BYTES = 3_500_000_000
LARGEST_TENSOR_BYTES = 2**31 - 1  # of an ArrayBuffer in Chromium
_FLOAT_BYTES = {"float16": 2, "bfloat16": 2}


class WebOptions(TargetOptions):
    """What can be said about a page."""

    node_modules: Path | None = None
    """Folder with onnxruntime-web, @huggingface/tokenizers and @huggingface/jinja; by default
    node_modules here.
    """
    title: str = ""
    """Of the page; by default the name of SOURCE."""
    piece_mb: Annotated[int, Field(ge=1, le=2000)] = 1000
    """Size in MB at which weights go on in another file, as some hosts want it (GitHub Pages: 95);
    a single tensor may be larger.
    """


@dataclasses.dataclass(frozen=True)
class WebTarget(Target):
    """onnxruntime-web in a page of plain files: WebGPU, else WebAssembly."""

    name: ClassVar[str] = "web"
    options_type: ClassVar[type[TargetOptions]] = WebOptions
    provider: ClassVar[Provider] = Provider.WEBGPU

    options: WebOptions

    def check_source(self, source: SourceModel, model: ir.Model) -> None:
        """Refuse before the work what the page cannot run, or a missing library.

        Raises:
            PackageError: Libraries, tokenizer or config are not there.
            UnsupportedModelError: The graph is no decoder with a cache.
        """
        find_libraries(self.options.node_modules)
        check_decoder(source, model)

    def weight_refusals(self, weight: PlannedWeight) -> tuple[Refusal, ...]:
        """Formats that WebGPU has no kernel for, and tensors that no browser holds."""
        found = super().weight_refusals(weight)
        size = _weight_bytes(weight)
        if size <= LARGEST_TENSOR_BYTES:
            return found
        too_large = Refusal(
            place=weight.place,
            found=f"a tensor of {size / 1e9:.1f} GB",
            allowed="2.1 GB, the largest array of a browser",
            way_out="--embedding 4" if weight.kind == "embedding" else "--bits 4 --lm-head 4",
        )
        return (*found, too_large)

    def model_refusals(self, outline: ModelOutline) -> tuple[Refusal, ...]:
        """Sizes that no browser holds."""
        if outline.model_bytes <= LARGEST_MODEL_BYTES:
            return ()
        too_large = Refusal(
            place="the model",
            found=f"{outline.model_bytes / 1e9:.1f} GB",
            allowed=f"{LARGEST_MODEL_BYTES / 1e9:.1f} GB (WebAssembly addresses 4 GiB)",
            way_out="fewer bits (--bits 4, --lm-head 4, a smaller --budget), or a smaller model",
        )
        return (too_large,)

    def package(self, job: PackageJob) -> PackageFacts:
        """Put weights beside the model, and the page with its libraries around it."""
        libraries = find_libraries(self.options.node_modules)
        model = load_model(job.folder / _MODEL)
        facts = describe_decoder(model, job.source.given)
        libraries.copy_to(job.folder / LIBRARY_FOLDER)
        divided = _divide(model, job.folder, job.work, self.options.piece_mb * 1_000_000)
        unpacked = write_unpacked_graph(job.folder / _MODEL)
        files = (*divided, *_other_files(job.folder))
        context, ends, template = text_facts(job.folder)
        config = PageConfig(
            name=self.options.title or _title(job.source),
            version=_version(job.folder, files),
            model=_MODEL,
            data=tuple(file.file for file in divided if file.file != _MODEL),
            files=files,
            inputs=facts.inputs,
            cache=facts.cache,
            context=context,
            ends=ends,
            template=template,
            float16=facts.float16,
            largest=facts.largest,
            libraries=dict(libraries.versions),
            unpacked_graph=UNPACKED_GRAPH if unpacked else "",
            unpacked=unpacked,
            shares_cache=facts.shares_cache,
        )
        config.save(job.folder / PAGE_CONFIG)
        shutil.copytree(_PAGE, job.folder, dirs_exist_ok=True)
        silent = ("there is no chat template: the page continues texts",)
        return PackageFacts(
            notes=silent if template is None else (),
            tables=(_downloads(config),),
            model_bytes=sum(file.bytes for file in divided),
        )

    def prove(self, folder: Path, reference: Reference, progress: Progress) -> TargetProof:
        """Greedy tokens in a real Chromium, on WebAssembly and on WebGPU."""
        return prove_in_browser(folder, reference, progress)


TARGET = WebTarget


def _weight_bytes(weight: PlannedWeight) -> int:
    bits = 8 * _FLOAT_BYTES.get(weight.dtype, 4)
    if weight.format is not None:
        bits = weight.format.storage_bits
    return weight.rows * weight.width * bits // 8


def _divide(model: ir.Model, folder: Path, work: Path, piece_bytes: int) -> tuple[PageFile, ...]:
    """Write the model anew with its weights in files of their own; all of them with sizes."""
    place = work / "web"
    place.mkdir(parents=True, exist_ok=True)
    save_model(model, place / _MODEL, external_data=True, piece_bytes=piece_bytes)
    for old in folder.glob(f"{_MODEL}*"):
        old.unlink()
    moved = [Path(shutil.move(path, folder)) for path in sorted(place.iterdir())]
    return tuple(PageFile(file=path.name, bytes=path.stat().st_size) for path in moved)


def _other_files(folder: Path) -> tuple[PageFile, ...]:
    """Tokenizer and runtime."""
    wanted = {"tokenizer.json": "", "tokenizer_config.json": ""}
    wanted[UNPACKED_GRAPH] = "wasm"
    wanted |= {f"{LIBRARY_FOLDER}/{name}": provider for provider, name in BINARIES.items()}
    return tuple(
        PageFile(file=name, bytes=(folder / name).stat().st_size, provider=provider)
        for name, provider in wanted.items()
        if (folder / name).is_file()
    )


def _version(folder: Path, files: tuple[PageFile, ...]) -> str:
    sums = "".join(fingerprint_file(folder / file.file) for file in files)
    return fingerprint_bytes(sums.encode())[:16]


def _title(source: SourceModel) -> str:
    path = Path(source.given)
    name = path.parent.name if path.suffix == ".onnx" and path.stem == "model" else path.stem
    return name or "A language model"


def _downloads(config: PageConfig) -> FactTable:
    """What a visitor's browser fetches once."""
    model = sum(file.bytes for file in config.files if file.file in {config.model, *config.data})
    rows: list[tuple[str | int | float, ...]] = []
    for provider in BINARIES:
        every = config.download_bytes(provider)
        rows.append((provider, *(round(n / 1e6, 1) for n in (model, every - model, every))))
    header = ("runs on", "model", "onnxruntime-web, tokenizer", "all")
    return FactTable(title="download in MB, uncompressed", header=header, rows=tuple(rows))
