"""What packaging did to a model, and what was tried with the result."""

from __future__ import annotations

from faq_onnx.artifacts.record import Record

__all__ = ["AttentionFusion", "PackageManifest"]


class AttentionFusion(Record):
    """How much attention became GroupQueryAttention.

    Attributes:
        fused: Attention nodes that are GroupQueryAttention now, those of the source included.
        layers: All attention found.
        error: Largest change of a logit by fusing, over the largest logit, on a prompt and on
            tokens behind a cache; None where nothing was fused.
        declined: Node and reason of what stayed.
    """

    fused: int
    layers: int
    error: float | None = None
    declined: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        count = f"{self.fused} of {self.layers} layers in GroupQueryAttention"
        if self.error is not None:
            count += f" (logits moved by {self.error:.1g} of their size)"
        if not self.declined:
            return count
        node, reason = self.declined[0]
        others = f" ({len(self.declined)} such)" if len(self.declined) > 1 else ""
        return f"{count}; {node} stays{others}: {reason}"


class PackageManifest(Record):
    """package.json of `faq-onnx package`.

    Attributes:
        faq_onnx: Version that wrote the folder.
        target: Runtime that the folder is for.
        source: As the user wrote it.
        versions: Of the runtimes that it was tried with.
        model_bytes: Size of the model with its weights.
        attention: None where the model has none that is known.
        generation_matches: Whether the target's greedy tokens equal those of a plain onnxruntime
            loop over the source; None where it was not tried.
        notes: What else there is to say.
    """

    faq_onnx: str
    target: str
    source: str
    versions: dict[str, str]
    model_bytes: int
    attention: AttentionFusion | None = None
    generation_matches: bool | None = None
    notes: tuple[str, ...] = ()
