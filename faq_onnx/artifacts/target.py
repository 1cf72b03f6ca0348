"""What targets and the stages around them tell each other."""

from __future__ import annotations

from typing import Literal

from faq_onnx.artifacts.plan import BlockFormat
from faq_onnx.artifacts.record import Record

__all__ = [
    "FactTable",
    "ModelOutline",
    "OperatorUse",
    "PackageFacts",
    "PlannedWeight",
    "ProofCheck",
    "Reference",
    "Refusal",
    "TargetProof",
]


class PlannedWeight(Record):
    """A weight as it is, or will be, in the finished model.

    Attributes:
        place: Name of the site, embedding or node.
        kind: Read by a product or by a Gather.
        rows: Output features, or size of the vocabulary.
        width: Input features, or width of the table: what is cut into blocks.
        dtype: Of activations and scales.
        format: None is a float weight.
        accuracy_level: Of MatMulNBits.
        float_zero_points: Zero points stored as floats, as other tools do.
        has_bias: The node adds a bias itself.
    """

    place: str
    kind: Literal["linear", "embedding"]
    rows: int
    width: int
    dtype: str
    format: BlockFormat | None
    accuracy_level: int = 4
    float_zero_points: bool = False
    has_bias: bool = False


class OperatorUse(Record):
    """An operator that a graph has.

    Attributes:
        op_type: Its name.
        domain: "" is that of ONNX.
        first: Name of the first such node.
        count: How many there are.
    """

    op_type: str
    domain: str
    first: str
    count: int


class ModelOutline(Record):
    """A finished model, or one that is planned: all that limits of a target depend on.

    Attributes:
        weights: In graph order.
        model_bytes: About the size of the file, weights included.
        inputs: Names of the graph's inputs.
        operators: Of the graph as it is, subgraphs included: not those that are planned.
    """

    weights: tuple[PlannedWeight, ...]
    model_bytes: int
    inputs: tuple[str, ...] = ()
    operators: tuple[OperatorUse, ...] = ()


class Refusal(Record):
    """Something that would not run on a target.

    Attributes:
        place: What it is about: a weight, or the whole model.
        found: As it is.
        allowed: What the target runs.
        way_out: What to do, in the words of the command line.
    """

    place: str
    found: str
    allowed: str
    way_out: str

    @property
    def text(self) -> str:
        """One line for people."""
        return f"{self.place}: {self.found}; allowed {self.allowed}; {self.way_out}"


class Reference(Record):
    """What plain onnxruntime makes of a prompt.

    Attributes:
        prompt: Token ids.
        tokens: Greedy continuation.
        margins: How far each of these was ahead of the second best, over the largest logit.
        logits: The largest logits behind the prompt: token and value, largest first.
        problem: Why there are no tokens and logits; "" otherwise.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    logits: tuple[tuple[int, float], ...] = ()
    problem: str = ""


class FactTable(Record):
    """Figures for people, and for programs in package.json."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str | int | float, ...], ...]


class ProofCheck(Record):
    """One thing that was tried in the real runtime.

    Attributes:
        name: What.
        passed: None where it could not be tried here.
        value: What came out, or why it was not tried.
    """

    name: str
    passed: bool | None
    value: str


class TargetProof(Record):
    """What the runtime of a target did with a package.

    Attributes:
        target: Its name.
        checks: In the order in which they were made.
        versions: Of the runtimes, by package name.
        tables: What was measured.
    """

    target: str
    checks: tuple[ProofCheck, ...]
    versions: dict[str, str]
    tables: tuple[FactTable, ...] = ()

    @property
    def failed(self) -> tuple[ProofCheck, ...]:
        """Checks that were tried and not passed."""
        return tuple(check for check in self.checks if check.passed is False)


class PackageFacts(Record):
    """What a target has to say about the folder that it filled.

    Attributes:
        notes: For people, now and in the manifest.
        tables: Figures.
        model_bytes: Size of the model in the form that it has now; None where it is as it was.
        reference: What to compare the package with later; None takes that of the source, whose
            low-bit products are computed in float32.
    """

    notes: tuple[str, ...] = ()
    tables: tuple[FactTable, ...] = ()
    model_bytes: int | None = None
    reference: Reference | None = None
