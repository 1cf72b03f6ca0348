"""Tiny models and assertions, for our own tests and for authors of passes.

The model itself is built in `faq_onnx.testing._llama`. Nothing here is used by the package.
"""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from faq_onnx.graph.io import save_model
from faq_onnx.testing._census import tiny_llama_census
from faq_onnx.testing._folder import (
    tiny_feeds,
    tiny_llama_config,
    tiny_tokenizer,
    write_tiny_llama,
)
from faq_onnx.testing._llama import TinyLlama, tiny_llama_onnx

__all__ = [
    "TinyLlama",
    "assert_golden",
    "assert_models_close",
    "tiny_feeds",
    "tiny_llama_census",
    "tiny_llama_config",
    "tiny_llama_onnx",
    "tiny_tokenizer",
    "write_tiny_llama",
]

Array = npt.NDArray[np.generic]


def assert_models_close(
    actual: ir.Model | Path,
    expected: ir.Model | Path,
    feeds: Mapping[str, Array],
    *,
    atol: float,
    rtol: float = 0.0,
) -> None:
    """Run both in onnxruntime and compare every output of `expected` by name.

    Raises:
        AssertionError: naming the output, the largest difference and its tolerance.
    """
    got, wanted = _run(actual, feeds), _run(expected, feeds)
    for name, want in wanted.items():
        assert name in got, f"output {name!r} is missing; there are {sorted(got)}"
        have = got[name]
        assert have.shape == want.shape, f"{name}: shape {have.shape}, expected {want.shape}"
        assert have.dtype == want.dtype, f"{name}: dtype {have.dtype}, expected {want.dtype}"
        assert np.isfinite(have).all(), f"{name}: has values that are not finite"
        difference = np.abs(have.astype(np.float64) - want.astype(np.float64))
        excess = difference - (atol + rtol * np.abs(want.astype(np.float64)))
        worst = np.unravel_index(excess.argmax(), excess.shape) if excess.size else ()
        assert not excess.size or excess[worst] <= 0, (
            f"{name}{list(map(int, worst))}: {have[worst]!r} is not {want[worst]!r} "
            f"within atol={atol:g}, rtol={rtol:g} (difference {difference[worst]:g})"
        )


def _run(model: ir.Model | Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name; feeds that the model does not have are left out."""
    from faq_onnx.runtime.session import open_session  # noqa: PLC0415  onnxruntime is heavy

    if isinstance(model, ir.Model):
        # a file, because the weights of a loaded model may lie in one still
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_model(model, path)
            return _run(path, feeds)
    session = open_session(model)
    inputs = {value.name for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(names, {name: feeds[name] for name in feeds if name in inputs})
    return dict(zip(names, outputs, strict=True))


GOLDEN_PASSES = "// PASSES: "
GOLDEN_EXPECT = "// EXPECT"


def assert_golden(
    path: Path, rewrite: Callable[[ir.Model, str], ir.Model], *, update: bool = False
) -> None:
    """Check one golden file.

    It holds comments (`// ...`), `// PASSES: spec`, a model as ONNX text, `// EXPECT`, the result.

    Args:
        path: The golden file.
        rewrite: Applies the passes that the spec names to the model.
        update: Write the result into the file instead of comparing (`pytest --update-golden`).

    Raises:
        AssertionError: with a diff, when the result is not what the file expects.
    """
    before, _, expected = path.read_text(encoding="utf-8").partition(f"{GOLDEN_EXPECT}\n")
    lines = before.splitlines()
    specs = [x.removeprefix(GOLDEN_PASSES) for x in lines if x.startswith(GOLDEN_PASSES)]
    assert len(specs) == 1, f"{path}: needs one line '{GOLDEN_PASSES}...', has {len(specs)}"
    source = "\n".join(line for line in lines if not line.startswith("//"))
    result = ir.to_onnx_text(rewrite(ir.from_onnx_text(source), specs[0])).rstrip() + "\n"
    if update:
        path.write_text(f"{before.rstrip()}\n{GOLDEN_EXPECT}\n{result}", encoding="utf-8")
        return
    difference = difflib.unified_diff(
        expected.splitlines(), result.splitlines(), "expected", "result", lineterm=""
    )
    report = "\n".join(difference)
    assert not report, f"{path} (accept with --update-golden):\n{report}"
