"""What packaging did to a model, and what was tried with the result."""

from __future__ import annotations

from pydantic import JsonValue

from faq_onnx.artifacts.record import Record
from faq_onnx.artifacts.target import FactTable, Reference, TargetProof

__all__ = ["AttentionFusion", "PackageManifest"]


class AttentionFusion(Record):
    """How much attention became GroupQueryAttention.

    Attributes:
        fused: Attention nodes that are GroupQueryAttention now, those of the source included.
        layers: All attention found.
        packed: Nodes that read query, key and value from one product, those of the source
            included.
        error: Largest change of a logit by fusing and packing, over the largest logit, on a prompt
            and on tokens behind a cache; None where nothing was done.
        declined: Node and reason of what stayed.
    """

    fused: int
    layers: int
    packed: int = 0
    error: float | None = None
    declined: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        """One line for people."""
        count = f"{self.fused} of {self.layers} layers in GroupQueryAttention"
        if self.packed:
            count += f", query, key and value in one product in {self.packed}"
        if self.error is not None:
            count += f" (logits moved by {self.error:.1g} of their size)"
        if not self.declined:
            return count
        node, reason = self.declined[0]
        others = f" ({len(self.declined)} such)" if len(self.declined) > 1 else ""
        return f"{count}; {node} stays{others}: {reason}"


class PackageManifest(Record):
    """package.json: what a folder is made for, what was tried with it, and how to try it again.

    Attributes:
        faq_onnx: Version that wrote the folder.
        target: Runtime that the folder is for.
        options: Options of the target, by name.
        source: As the user wrote it.
        model_bytes: Size of the model with its weights.
        reference: What plain onnxruntime made of the source, to compare with.
        proof: What the runtime did with the folder.
        attention: None where the model has none that is known.
        tables: Figures.
        files: Size of each file but package.json, by its path in the folder.
        notes: What else there is to say.
        usage: How to run the folder, from inside it: Markdown.
    """

    schema_version: int = 2
    faq_onnx: str
    target: str
    options: dict[str, JsonValue]
    source: str
    model_bytes: int
    reference: Reference
    proof: TargetProof
    attention: AttentionFusion | None = None
    tables: tuple[FactTable, ...] = ()
    files: dict[str, int]
    notes: tuple[str, ...] = ()
    usage: str = ""
