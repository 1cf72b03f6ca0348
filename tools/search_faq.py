"""Search FAQ's configuration on validation text and print the trail.

    python tools/search_faq.py MODEL --calibration c4-train.txt --validation c4-valid.txt

Starts from AWQ (fusion factor 1) and the middle of the space, then varies one setting at a time:
fusion factor, window, preview, normalisation, roles, clipping, shared heads. The head stays float,
so that only what FAQ changes is seen. KL at accuracy_level 0: the error of the weights alone.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import quality

from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.report.progress import make_progress

ALL_ROLES = ["attention_input", "attention_output", "mlp_input", "mlp_hidden"]
RESIDUAL = ["attention_input", "mlp_input"]
BASE = {"fusion": 0.85, "window": 3, "preview": "window", "normalisation": "mean"}
SCALED = {"share_heads": True}  # the trail began with o_proj scaled; the default came out of it
TRAIL: dict[str, dict[str, object]] = {
    "rtn": {"method": "rtn"},
    "awq": {"method": "awq"},
    "awq, no clip": {"method": "awq", "rounding": {"grid": "minmax"}},
    "awq, o_proj not scaled": {"method": "awq", "scale": {"share_heads": False}},
    "faq base": {"faq": BASE},
    "faq fusion 0.5": {"faq": {**BASE, "fusion": 0.5}},
    "faq fusion 0.7": {"faq": {**BASE, "fusion": 0.7}},
    "faq fusion 0.95": {"faq": {**BASE, "fusion": 0.95}},
    "faq window 1": {"faq": {**BASE, "window": 1}},
    "faq window 2": {"faq": {**BASE, "window": 2}},
    "faq window 5": {"faq": {**BASE, "window": 5}},
    "faq layer 1": {"faq": {**BASE, "window": 1, "preview": "layer"}},
    "faq layer 3": {"faq": {**BASE, "preview": "layer"}},
    "faq norm none": {"faq": {**BASE, "normalisation": "none"}},
    "faq norm max": {"faq": {**BASE, "normalisation": "max"}},
    "faq all roles": {"faq": {**BASE, "roles": ALL_ROLES}},
    "faq mlp only": {"faq": {**BASE, "roles": ["mlp_input"]}},
    "faq attention only": {"faq": {**BASE, "roles": ["attention_input"]}},
    "faq window 8": {"faq": {**BASE, "window": 8}},
    "faq window 5, o_proj not scaled": {
        "faq": {**BASE, "window": 5},
        "scale": {"share_heads": False},
    },
    "faq fusion 0.7 window 5": {"faq": {**BASE, "fusion": 0.7, "window": 5}},
    "faq fusion 0.5 window 1": {"faq": {**BASE, "fusion": 0.5, "window": 1}},
    "faq fusion 0.3 window 5": {"faq": {**BASE, "fusion": 0.3, "window": 5}},
}


def main(argv: list[str] | None = None) -> int:
    """Measure the trail."""
    args = _parse(argv)
    calibration = CalibrationConfig(
        source=args.calibration, samples=args.samples, sequence_length=512
    )
    with quality.work_folder(args.work) as folder:
        bench = quality.Bench.prepare(
            args.model,
            folder,
            calibration=calibration,
            evaluation=args.validation,
            windows=args.windows,
            progress=make_progress(sys.stderr),
        )
        for bits, block_size in args.formats:
            awq: tuple[float, ...] | None = None
            for name, settings in TRAIL.items():
                if args.only and name not in args.only:
                    continue
                scale = {**SCALED, **settings.get("scale", {})}  # type: ignore[dict-item]
                wish = {"method": "faq", "bits": bits, "block_size": block_size, **settings}
                wish["scale"] = scale
                config = QuantizeConfig.model_validate(
                    {"lm_head": "keep", "embedding": "keep", **wish}
                )
                (figure,) = bench.measure(f"{name} {bits}b{block_size}", config, levels=(0,))
                awq = figure.kl_windows if name == "awq" else awq
                _show(figure, awq)
                quality.append_results(args.json, [figure], model=args.model)
    return 0


def _show(figure: quality.Figure, awq: tuple[float, ...] | None) -> None:
    versus = ""
    if awq is not None:
        gain = np.subtract(figure.kl_windows, awq)
        error = gain.std(ddof=1) / np.sqrt(len(gain))
        versus = f"  minus AWQ {gain.mean():+.5f} +- {error:.5f}"
    print(
        f"{figure.name:<34} KL {figure.kl_nats:.5f}  top-1 {figure.top1:.3f}{versus}", flush=True
    )


def _format(text: str) -> tuple[int, int]:
    bits, _, block_size = text.partition("b")
    return int(bits), int(block_size)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--formats", nargs="+", type=_format, default=[(4, 32), (3, 64)])
    parser.add_argument("--only", nargs="+", choices=TRAIL, help="these configurations only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--work", type=Path, help="keep the calibration here and reuse it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
