"""The stages that make a written model a package of a target, and prove it, now and later."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from pathlib import Path

from faq_onnx.artifacts.package import PackageManifest
from faq_onnx.artifacts.source import SourceModel
from faq_onnx.artifacts.target import ModelOutline, Refusal, TargetProof
from faq_onnx.config import QuantizeConfig
from faq_onnx.errors import UnsupportedFormatError, VerificationError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import load_model
from faq_onnx.progress import Progress
from faq_onnx.quant.formats import PROVIDERS
from faq_onnx.runtime.reference import take_reference
from faq_onnx.runtime.session import open_session
from faq_onnx.stages.fusing import MODEL_NAME, SavedModel
from faq_onnx.stages.outline import outline_of_model
from faq_onnx.targets.opening import open_target
from faq_onnx.targets.package import MANIFEST_NAME, copy_companions
from faq_onnx.targets.protocol import PackageJob, Target

__all__ = [
    "Finished",
    "check_limits",
    "judge_proof",
    "make_package",
    "prove_again",
    "settle",
]

GENERATION_STEPS = 16
TRIAL_PROMPT = 8
SHOWN_REFUSALS = 3


@dataclasses.dataclass(frozen=True)
class Finished:
    """A model in its folder that is to become a package.

    Attributes:
        source: Where it came from.
        folder: Holds model.onnx.
        work: For what is not kept.
        saved: What was written.
    """

    source: SourceModel
    folder: Path
    work: Path
    saved: SavedModel


def settle(config: QuantizeConfig, target: Target) -> QuantizeConfig:
    """The settings with what a target leaves no choice about, where the user made none."""
    changes: dict[str, object] = {}
    if not target.fuses_attention:
        changes["fuse_attention"] = False
    if config.embedding == "auto" and not PROVIDERS[target.provider].gathers:
        changes["embedding"] = "keep"
    return config.model_copy(update=changes)


def check_limits(target: Target, outline: ModelOutline, *, finished: bool = False) -> None:
    """Refuse before the work what would not run on a target.

    Args:
        target: The runtime.
        outline: Of what is planned, or there.
        finished: The weights are in low bits already, so that no option changes them here.

    Raises:
        UnsupportedFormatError: Names places, what was found, what is allowed and the way out.
    """
    refusals = target.refusals(outline)
    if not refusals:
        return
    kinds: dict[tuple[str, str, str], list[Refusal]] = {}
    for refusal in refusals:
        kinds.setdefault((refusal.found, refusal.allowed, refusal.way_out), []).append(refusal)
    lines = [_line(each) for each in list(kinds.values())[:SHOWN_REFUSALS]]
    if len(kinds) > SHOWN_REFUSALS:
        rest = len(kinds) - SHOWN_REFUSALS
        lines.append(f"and {rest} more; `faq-onnx inspect --target {target.name}` lists all")
    if finished and outline.weights:
        lines.append(f"these are options of convert: `faq-onnx convert --target {target.name}`")
    msg = f"{len(refusals)} of {len(outline.weights)} weights would not run on {target.name}:"
    places = {weight.place for weight in outline.weights}
    if any(refusal.place not in places for refusal in refusals):
        msg = f"the target {target.name} would not run it:"
    raise UnsupportedFormatError("\n  - ".join([msg, *lines]))


def make_package(
    model: Finished, target: Target, prompt: Sequence[int], progress: Progress, *, force: bool
) -> PackageManifest:
    """Fill the folder, try it in the runtime, and write package.json.

    Args:
        model: What to make it of; its folder is changed.
        target: The runtime.
        prompt: Token ids, of which the first few are taken.
        progress: Receives stages and notes.
        force: Accept a package that the runtime does not run as it should.

    Raises:
        VerificationError: It does not, and the target must.
    """
    folder = model.folder
    copy_companions(model.source, folder)
    with exact_twin(model.saved.plain) as exact:
        reference = take_reference(open_session(exact), prompt[:TRIAL_PROMPT], GENERATION_STEPS)
    outline = outline_of_model(load_model(folder / MODEL_NAME), model.saved.bytes)
    job = PackageJob(model.source, folder, model.work, outline, reference, progress)
    facts = target.package(job)
    reference = facts.reference or reference
    proof = target.prove(folder, reference, progress)
    notes = (*facts.notes, *judge_proof(target, proof, force=force))
    manifest = PackageManifest(
        faq_onnx=importlib.metadata.version("faq-onnx"),
        target=target.name,
        options=target.options.model_dump(mode="json"),
        source=model.source.given,
        model_bytes=facts.model_bytes or model.saved.bytes,
        reference=reference,
        proof=proof,
        attention=model.saved.fusion,
        tables=facts.tables,
        files=_sizes(folder),
        notes=notes,
        usage=target.usage,
    )
    manifest.save(folder / MANIFEST_NAME)
    return manifest


def judge_proof(target: Target, proof: TargetProof, *, force: bool) -> tuple[str, ...]:
    """Raise where the runtime failed and must not; say it in notes otherwise.

    Raises:
        VerificationError: Names the checks.
    """
    failed = [f"{target.name}, {check.name}: {check.value}" for check in proof.failed]
    if failed and target.must_pass and not force:
        raise VerificationError("; ".join(failed) + "; --force writes it all the same")
    return tuple(f"{text}. The model itself is as verified" for text in failed)


def prove_again(
    folder: Path, manifest: PackageManifest, progress: Progress
) -> tuple[TargetProof, tuple[str, ...]]:
    """Repeat the proof of a package here; also what came out otherwise than when it was made.

    Raises:
        VerificationError: A check that was passed then is failed now.
    """
    target = open_target(manifest.target, manifest.options)
    proof = target.prove(folder, manifest.reference, progress)
    before = {check.name: check for check in manifest.proof.checks}
    other: list[str] = []
    lost: list[str] = []
    for check in proof.checks:
        old = before.get(check.name)
        if old is None or old.passed == check.passed:
            continue
        text = f"{check.name}: {old.value} when it was made, {check.value} here"
        (lost if old.passed and check.passed is False else other).append(text)
    other += [*_other_versions(manifest.proof, proof), *_other_files(folder, manifest)]
    if not lost:
        return proof, tuple(other)
    error = VerificationError(
        f"{folder}: what {target.name} did when the package was made, it does not do here: "
        f"{'; '.join(lost)}"
    )
    for text in other:
        error.add_note(text)
    raise error


def _other_versions(then: TargetProof, now: TargetProof) -> Iterator[str]:
    for name in sorted(then.versions.keys() | now.versions.keys()):
        old, new = then.versions.get(name, "none"), now.versions.get(name, "none")
        if old != new:
            yield f"{name}: {old} when it was made, {new} here"


def _other_files(folder: Path, manifest: PackageManifest) -> Iterator[str]:
    for name, size in manifest.files.items():
        path = folder / name
        found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        if found != f"{size} bytes":
            yield f"{name}: {size} bytes when it was made, {found} here"


def _line(alike: Sequence[Refusal]) -> str:
    others = f" (and {len(alike) - 1} like it)" if len(alike) > 1 else ""
    return f"{alike[0].place}{others}{alike[0].text.removeprefix(alike[0].place)}"


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
