"""Which products of a model run between 16-bit activations on Qualcomm's NPU, and their steps.

Its integer kernel takes weights in low-power block quantization (LPBQ): 4 bits, symmetric, block
scales of 1 to 16 times one float per row. Of other weights the provider drops the 16 bits around
the product without a word, and computes in float16. So products get them where the weight is
one that LPBQ holds without loss, and where no outlier takes the range for itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.target import FactTable
from faq_onnx.errors import PackageError
from faq_onnx.graph.exact import exact_twin
from faq_onnx.graph.io import load_model, save_structure
from faq_onnx.passes import ProductSteps
from faq_onnx.progress import Advance, Progress
from faq_onnx.quant.activation_scales import ActivationRange
from faq_onnx.quant.stored_scales import LPBQ_MULTIPLES
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session, run_session
from faq_onnx.targets.own_text import write_texts
from faq_onnx.targets.qnn_limits import LPBQ_WAY_OUT

__all__ = ["Activations", "find_activations"]

TEXTS = 8
TEXT_TOKENS = 128
# Of a token's size, in front of a product or behind it (docs/targets.md).
MOST_NOISE = 0.003
LPBQ_BITS = 4
_LARGEST, _ENERGY = "/faq_largest", "/faq_energy"


@dataclasses.dataclass(frozen=True)
class Activations:
    """What was found.

    Attributes:
        steps: Of the products that get 16-bit activations, by name of the node.
        table: About all products, for people.
        note: The same in a line.
    """

    steps: Mapping[str, ProductSteps]
    table: FactTable
    note: str


@dataclasses.dataclass(frozen=True)
class _Product:
    """A MatMulNBits node.

    Attributes:
        before: Name of the activation.
        behind: Name of the result.
        channels: Of both, by name.
    """

    before: str
    behind: str
    channels: Mapping[str, int]

    @classmethod
    def of(cls, node: ir.Node) -> _Product:
        """Of a node with a named input and output."""
        value, result = node.inputs[0], node.outputs[0]
        assert value is not None
        before, behind = str(value.name), str(result.name)
        width, features = (node.attributes[name].as_int() for name in ("K", "N"))
        return cls(before, behind, {before: width, behind: features})


def find_activations(path: Path, starts: npt.NDArray[np.int64], progress: Progress) -> Activations:
    """Measure activations on text that the model writes itself, and choose products.

    Args:
        path: A decoder with MatMulNBits nodes.
        starts: Token ids that texts begin with, int64 [any number].
        progress: Receives a stage.

    Raises:
        PackageError: No weight is one that LPBQ holds.
    """
    nodes = [node for node in load_model(path).graph if node.op_type == "MatMulNBits"]
    products = {str(node.name): _Product.of(node) for node in nodes if _is_lpbq(node)}
    if not products:
        raise PackageError(
            f"{path}: activations=16-bit needs weights that Qualcomm's low-power block "
            "quantization holds (4 bits, symmetric, block scales of 1 to 16 times one float per "
            f"row), and none of {len(nodes)} low-bit weights is one; {LPBQ_WAY_OUT}"
        )
    channels = {
        name: count for product in products.values() for name, count in product.channels.items()
    }
    with progress.stage("measure activations", 2 * TEXTS * TEXT_TOKENS, "tokens") as advance:
        texts = write_texts(path, starts, TEXTS, TEXT_TOKENS, advance)
        ranges = _ranges(path, channels, texts, advance)
    noise = {
        name: max(ranges[value].noise for value in product.channels)
        for name, product in products.items()
    }
    steps = {
        name: ProductSteps(ranges[product.before].step, ranges[product.behind].step)
        for name, product in products.items()
        if noise[name] <= MOST_NOISE
    }
    note = f"{len(steps)} of {len(nodes)} products run on 16-bit integers, the others in float16"
    return Activations(steps, _table(noise, len(nodes)), note)


def _is_lpbq(node: ir.Node) -> bool:
    """Whether the provider makes an LPBQ encoding of the weight without loss.

    It takes a sixteenth of the largest scale of a row for its unit.
    """
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    if node.attributes.get_int("bits", 0) != LPBQ_BITS or zero_points is not None:
        return False
    multiples = _multiples(node.inputs[2])
    return multiples is not None and bool(
        multiples.min() >= 1 and (multiples.max(axis=1) == LPBQ_MULTIPLES).all()
    )


def _multiples(scales: ir.Value | None) -> npt.NDArray[np.int8] | None:
    """What scales [N, k_blocks] are multiplied out of by the graph; None of other scales."""
    product = None if scales is None else scales.producer()
    for value in () if product is None else product.inputs:
        cast = None if value is None else value.producer()
        source = None if cast is None else cast.inputs[0]
        tensor = None if source is None else source.const_value
        if tensor is not None and tensor.dtype == ir.DataType.INT8:
            return np.asarray(tensor.numpy())
    return None


def _ranges(
    path: Path, channels: Mapping[str, int], texts: npt.NDArray[np.int64], advance: Advance
) -> dict[str, ActivationRange]:
    """Ranges of values, by name as `channels`; low-bit products in float32."""
    found: dict[str, ActivationRange] = {}
    wanted = [f"{name}{suffix}" for name in channels for suffix in (_LARGEST, _ENERGY)]
    with exact_twin(path) as exact, _with_reductions(exact, list(channels)) as measured:
        session = open_session(measured)
        for text in texts:
            feeds = decoder_feeds(session.get_inputs(), text[np.newaxis])
            outputs = run_session(session, feeds, wanted)
            for name, count in channels.items():
                energies = outputs[f"{name}{_ENERGY}"].reshape(-1).astype(np.float64)
                each = ActivationRange(float(outputs[f"{name}{_LARGEST}"]), count, energies)
                found[name] = found[name].join(each) if name in found else each
            advance(len(text))
    return found


@contextlib.contextmanager
def _with_reductions(path: Path, names: list[str]) -> Iterator[Path]:
    """The model with reductions of some values as further outputs: largest size, and energies.

    A small file beside `path`, whose weights it reads, gone after the block.
    """
    model = load_model(path)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    for name in names:
        size = ir.node("Abs", [values[name]])
        largest = ir.node("ReduceMax", size.outputs, {"keepdims": 0})
        energy = ir.node("Einsum", [values[name]] * 2, {"equation": "...k,...k->..."})
        for node, suffix in ((largest, _LARGEST), (energy, _ENERGY)):
            node.outputs[0].name = f"{name}{suffix}"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(node.outputs[0])
        model.graph.extend([size, largest, energy])
    handle, file = tempfile.mkstemp(prefix=".activations-", suffix=".onnx", dir=path.parent)
    os.close(handle)
    try:
        save_structure(model, Path(file))
        yield Path(file)
    finally:
        Path(file).unlink()


def _table(noise: Mapping[str, float], products: int) -> FactTable:
    """How many products have which activations, and the worst of them."""
    kept = {name: part for name, part in noise.items() if part <= MOST_NOISE}
    left = {name: part for name, part in noise.items() if part > MOST_NOISE}
    rows = [
        _row("16-bit", kept),
        _row(f"float16, rounding above {MOST_NOISE:.1%}", left),
        ("float16, the weight is no LPBQ one", products - len(noise), "", ""),
    ]
    return FactTable(
        title="Activations of products",
        header=("activations", "products", "largest rounding error", "where"),
        rows=tuple(row for row in rows if row[1]),
    )


def _row(kind: str, noise: Mapping[str, float]) -> tuple[str, int, str, str]:
    worst = max(noise, key=lambda name: noise[name], default="")
    return (kind, len(noise), f"{noise[worst]:.2%}" if worst else "", worst)
