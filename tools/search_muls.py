"""Do Mul nodes in front of every site earn their run time?

    python tools/search_muls.py MODEL --calibration c4-train.txt --validation c4-valid.txt

Folded scales are shared by the sites that read one activation (q, k, v; gate, up). With a Mul in
front of each site every site could have its own. Both are planned on the same statistics and
compared: KL on validation text, and tokens/s of a greedy loop at batch 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import quality

from faq_onnx import stages
from faq_onnx.artifacts.sites import LinearRole, ModelCensus, ScaleGroup
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.config import CalibrationConfig, QuantizeConfig
from faq_onnx.graph.io import save_model
from faq_onnx.planning.planner import PlannedModel, make_plan
from faq_onnx.progress import SILENT
from faq_onnx.report.progress import make_progress
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session

ROUNDS = 5
TOKENS = 48


class SplitStats(CalibrationStats):
    """Statistics of the groups `<group>#<n>`, which are those of `<group>`."""

    def _read(self, group: str, what: str) -> npt.NDArray[np.float32]:
        return super()._read(group.partition("#")[0], what)

    def has(self, group: str) -> bool:
        """Whether the original group was collected."""
        return super().has(group.partition("#")[0])


def split_groups(census: ModelCensus) -> ModelCensus:
    """Every site of a layer in a group of its own that nobody absorbs."""
    groups: list[ScaleGroup] = []
    for group in census.groups:
        if census.site(group.sites[0]).role is LinearRole.LM_HEAD:
            groups.append(group)
            continue
        for number, site in enumerate(group.sites):
            change = {"name": f"{group.name}#{number}", "sites": (site,), "absorber": None}
            groups.append(group.model_copy(update=change))
    return census.model_copy(update={"groups": tuple(groups)})


def main(argv: list[str] | None = None) -> int:
    """Measure both."""
    args = _parse(argv)
    calibration = CalibrationConfig(
        source=args.calibration, samples=args.samples, sequence_length=512
    )
    settings = {"method": "awq", "lm_head": "keep", "embedding": "keep"}
    with quality.work_folder(args.work) as folder:
        bench = quality.Bench.prepare(
            args.model,
            folder,
            calibration=calibration,
            evaluation=args.validation,
            windows=args.windows,
            progress=make_progress(sys.stderr),
        )
        split = SplitStats(bench.stats.folder, bench.stats.manifest)
        census = split_groups(bench.opened.census)
        muls = dataclasses.replace(
            bench, stats=split, opened=dataclasses.replace(bench.opened, census=census)
        )
        paths = {}
        for name, which, insert in (("folded", bench, False), ("muls", muls, True)):
            config = QuantizeConfig.model_validate({**settings, "scale": {"insert_mul": insert}})
            fresh = which.fresh()
            planned = make_plan(fresh.census, config, which.stats, fresh.read)
            paths[name] = folder / f"{name}.onnx"
            _write(which, planned, paths[name])
            figure = quality.evaluate_file(name, paths[name], bench.reference, 0)
            print(f"{name:<7} KL {figure.kl_nats:.5f}  top-1 {figure.top1:.3f}", flush=True)
        speeds: dict[str, list[float]] = {name: [] for name in paths}
        for _round in range(ROUNDS):  # alternating: the machine's other work hits both
            for name, path in paths.items():
                speeds[name].append(_tokens_per_second(path))
        for name, values in speeds.items():
            print(f"{name:<7} {np.median(values):.1f} tokens/s (median of {ROUNDS})")
    return 0


def _write(bench: quality.Bench, planned: PlannedModel, path: Path) -> None:
    fresh = bench.fresh()
    stages.fold(fresh, planned)
    folder = path.with_suffix(".weights")
    quantized = stages.quantize(fresh, planned, bench.stats, {}, folder, SILENT)
    stages.rewrite(fresh, planned, quantized.weights)
    save_model(fresh.model, path)


def _tokens_per_second(path: Path) -> float:
    session = open_session(path)
    tokens = generate_greedy(session, np.arange(100, 132, dtype=np.int64), TOKENS)
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - start)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--work", type=Path, help="keep the calibration here and reuse it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
