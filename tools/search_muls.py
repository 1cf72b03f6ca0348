"""Do Mul nodes in front of every site earn their run time?

    python tools/search_muls.py MODEL --calibration c4-train.txt --evaluation c4-valid.txt

Folded scales are shared by the sites that read one activation (q, k, v; gate, up). With a Mul in
front of each site every site could have its own. Both are planned on the same statistics and
compared: KL on validation text, and tokens/s of a greedy loop at batch 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

import bench_options
import numpy as np
import numpy.typing as npt
import quality
from model_files import evaluate_file

from faq_onnx.artifacts.sites import LinearRole, ModelCensus, ScaleGroup
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.graph.io import save_model
from faq_onnx.planning.planner import PlannedModel
from faq_onnx.runtime.generate import generate_greedy
from faq_onnx.runtime.session import open_session
from faq_onnx.stages import quantizing

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
    with bench_options.opened_bench(args) as bench:
        split = SplitStats(bench.stats.folder, bench.stats.manifest)
        census = split_groups(bench.opened.census)
        muls = dataclasses.replace(bench, opened=dataclasses.replace(bench.opened, census=census))
        folder = bench.work
        paths = {}
        for name, which, stats in (("folded", bench, bench.stats), ("muls", muls, split)):
            more = {"scale": {"insert_mul": which is muls}}
            config = bench_options.make_config("awq", args.formats[0], args, **more)
            fresh = which.fresh()
            planned = which.plan(fresh, config, stats)
            paths[name] = folder / f"{name}.onnx"
            _write(which, planned, stats, paths[name])
            figure = evaluate_file(name, paths[name], bench.reference, 0)
            print(f"{name:<7} KL {figure.kl_nats:.5f}  top-1 {figure.top1:.3f}", flush=True)
        speeds: dict[str, list[float]] = {name: [] for name in paths}
        for _round in range(ROUNDS):  # alternating: the machine's other work hits both
            for name, path in paths.items():
                speeds[name].append(_tokens_per_second(path))
        for name, values in speeds.items():
            print(f"{name:<7} {np.median(values):.1f} tokens/s (median of {ROUNDS})")
    return 0


def _write(
    bench: quality.Bench, planned: PlannedModel, stats: CalibrationStats, path: Path
) -> None:
    fresh = bench.fresh()
    quantized = bench.quantize(fresh, planned, stats, path.with_suffix(".weights"))
    quantizing.rewrite(fresh, planned, quantized.weights)
    save_model(fresh.model, path)


def _tokens_per_second(path: Path) -> float:
    session = open_session(path)
    tokens = generate_greedy(session, np.arange(100, 132, dtype=np.int64), TOKENS)
    next(tokens)
    start = time.perf_counter()
    count = sum(1 for _ in tokens)
    return count / (time.perf_counter() - start)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser, samples=16)
    bench_options.add_common(parser, ("4b32",), windows=8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
