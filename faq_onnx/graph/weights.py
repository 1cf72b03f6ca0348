"""Weights of a loaded model: read one at a time, change lazily."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.artifacts.sites import LinearSite, WeightLayout
from faq_onnx.errors import RewriteError
from faq_onnx.graph.tensors import read_tensor

__all__ = [
    "TransformedTensor",
    "find_initializer",
    "join_tensors",
    "read_initializer",
    "read_weight",
    "replace_weight",
    "transform_initializer",
]

Transform = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]


class TransformedTensor(ir.LazyTensor):
    """A float tensor computed from another one each time it is read.

    Transformations add up in float32; only the last result is rounded to the dtype.
    """

    source: ir.TensorProtocol
    transforms: tuple[Transform, ...]

    def __init__(self, source: ir.TensorProtocol, transforms: tuple[Transform, ...]) -> None:
        super().__init__(
            self._compute, source.dtype, ir.Shape(source.shape.numpy()), name=source.name
        )
        self.source = source
        self.transforms = transforms

    def _compute(self) -> ir.TensorProtocol:
        values = np.asarray(read_tensor(self.source), dtype=np.float32)
        for transform in self.transforms:
            values = transform(values)
        if values.shape != tuple(self.shape.numpy()):
            raise RewriteError(
                f"initializer {self.name!r}: a transformation turned shape {self.shape} into "
                f"{list(values.shape)}; this is a bug in the pass that set it"
            )
        with np.errstate(over="ignore"):
            rounded = np.ascontiguousarray(values).astype(self.dtype.numpy())
        if not np.isfinite(rounded).all() and np.isfinite(values).all():
            largest = float(np.abs(values).max())
            raise RewriteError(
                f"initializer {self.name!r}: value {largest:g} does not fit {self.dtype.name}; "
                "convert the float32 model instead, or use --method rtn"
            )
        return ir.Tensor(rounded, dtype=self.dtype, name=self.name)


def find_initializer(model: ir.Model, name: str) -> ir.Value:
    """The initializer of that name, looked up in the main graph first, then in subgraphs.

    Raises:
        RewriteError: There is none.
    """
    for graph in model.graphs():
        value = graph.initializers.get(name)
        if value is not None and value.const_value is not None:
            return value
    raise RewriteError(f"the model has no initializer {name!r}; was the census made of another?")


def read_initializer(model: ir.Model, name: str) -> npt.NDArray[np.generic]:
    """Values as they would be saved; float16 and bfloat16 come as float32.

    The array may be shared with the model: copy before writing to it.
    """
    tensor = find_initializer(model, name).const_value
    assert tensor is not None
    return read_tensor(tensor)


def read_weight(model: ir.Model, site: LinearSite) -> npt.NDArray[np.float32]:
    """The weight W of y = x W^T: float32 [N, K], C-contiguous, owned by the caller."""
    stored = read_initializer(model, site.weight)
    if site.layout is WeightLayout.ONE_K_N:
        stored = stored[0]
    oriented = stored if site.layout is WeightLayout.N_K else stored.T
    return np.array(oriented, dtype=np.float32, order="C")


def replace_weight(model: ir.Model, site: LinearSite, weight: npt.NDArray[np.float32]) -> None:
    """Let the initializer of a site hold W [N, K], in the layout and dtype that it has."""
    value = find_initializer(model, site.weight)
    assert value.const_value is not None
    oriented = weight if site.layout is WeightLayout.N_K else weight.T
    if site.layout is WeightLayout.ONE_K_N:
        oriented = oriented[np.newaxis]
    dtype = value.const_value.dtype
    stored = np.ascontiguousarray(oriented).astype(dtype.numpy(), copy=False)
    value.const_value = ir.Tensor(stored, dtype=dtype, name=site.weight)


def transform_initializer(model: ir.Model, name: str, function: Transform) -> None:
    """Let an initializer be `function` of what it was; name, shape and dtype stay.

    `function` receives a float32 array that it must not write to, each time the value is read.

    Raises:
        RewriteError: No such initializer, or it is not a float tensor.
    """
    value = find_initializer(model, name)
    tensor = value.const_value
    assert tensor is not None
    if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        raise RewriteError(f"initializer {name!r} is {tensor.dtype.name}, only floats are scaled")
    if isinstance(tensor, TransformedTensor):
        changed = TransformedTensor(tensor.source, (*tensor.transforms, function))
    else:
        changed = TransformedTensor(tensor, (function,))
    changed.name = name  # not that of a tensor which two initializers began with
    value.const_value = changed


def join_tensors(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.LazyTensor:
    """Tensors of one type, one after the other along `axis`; made when it is read.

    Their shapes are equal but for that axis.
    """
    dtype = tensors[0].dtype
    shape = list(tensors[0].shape.numpy())
    shape[axis] = sum(int(tensor.shape.numpy()[axis]) for tensor in tensors)

    def join() -> ir.TensorProtocol:
        joined = np.concatenate([read_tensor(tensor) for tensor in tensors], axis)
        return ir.Tensor(joined.astype(dtype.numpy(), copy=False), dtype=dtype)

    return ir.LazyTensor(join, dtype=dtype, shape=ir.Shape(shape))
