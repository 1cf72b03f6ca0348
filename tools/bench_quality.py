"""Quality of methods x formats on one model, against the float model over the same tokens.

    python tools/bench_quality.py MODEL --calibration c4.txt --evaluation wikitext2.test.raw

prints perplexity, KL divergence and top-1 agreement at accuracy_level 4 (int8 activations) and 0
(float32 activations) for {rtn, awq, faq} x {4-bit block 32, 4-bit block 128, 3-bit block 64, 8-bit
block 32}, and for onnxruntime's own round-to-nearest. Takes minutes a row.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import quality

from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.report.progress import make_progress

FORMATS = {"4b32": (4, 32), "4b128": (4, 128), "3b64": (3, 64), "8b32": (8, 32)}
METHODS = ("rtn", "awq", "faq")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    calibration = CalibrationConfig(
        source=args.calibration, samples=args.samples, sequence_length=args.sequence_length
    )
    with quality.work_folder(args.work) as folder:
        bench = quality.Bench.prepare(
            args.model,
            folder,
            calibration=calibration,
            evaluation=args.evaluation,
            windows=args.windows,
            progress=make_progress(sys.stderr),
        )
        print(f"calibrated in {bench.calibrate_s:.1f} s", flush=True)
        for name in args.formats:
            bits, block_size = FORMATS[name]
            if args.outside and bits in {4, 8}:
                path, source = folder / "outside.onnx", bench.opened.source.onnx_path
                figures = []
                for level in args.levels:
                    quality.write_onnxruntime_rtn(source, path, bits, block_size, level)
                    name_of = f"onnxruntime {name}"
                    figures.append(quality.evaluate_file(name_of, path, bench.reference, level))
                quality.append_results(args.json, figures, model=args.model)
                _show(figures)
            for method in args.methods:
                config = QuantizeConfig.model_validate(
                    {
                        "method": method,
                        "bits": bits,
                        "block_size": block_size,
                        "lm_head": args.lm_head,
                        "embedding": "keep",
                        **_overrides(args.set),
                    }
                )
                label = f"{method}{args.label} {name}"
                figures = bench.measure(label, config, args.levels)
                quality.append_results(args.json, figures, model=args.model)
                _show(figures)
    return 0


def _overrides(settings: list[str]) -> dict[str, object]:
    """`faq.window=2` -> {"faq": {"window": "2"}}."""
    result: dict[str, object] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        place = result
        *sections, last = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[last] = value.split(",") if last == "roles" else value
    return result


def _show(figures: list[quality.Figure]) -> None:
    for figure in figures:
        print(
            f"{figure.name:<18} acc {figure.accuracy_level}  KL {figure.kl_nats:.4f}  "
            f"top-1 {figure.top1:.3f}  ppl {figure.perplexity:.3f} "
            f"(float {figure.perplexity_float:.3f})  {figure.size_bytes / 1e6:.1f} MB  "
            f"plan {figure.plan_s:.0f} s, quantize {figure.quantize_s:.0f} s",
            flush=True,
        )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", default="heldout", help="text file, or heldout")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--levels", nargs="+", type=int, default=[4, 0])
    parser.add_argument("--lm-head", default="keep")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--label", default="")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--outside",
        action="store_true",
        help="also onnxruntime's own quantizer, which leaves a tied head float",
    )
    parser.add_argument("--work", type=Path, help="keep the calibration here and reuse it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
