r"""What looking at the logits is worth when bits are shared out.

    python tools/budget_view.py MODEL --calibration c4.txt --evaluation wikitext2.test.txt \
        --formats 4b32 3.0bpw

`--budget` weighs a weight's error by what it does to the KL at the logits, behind all later layers
(calibration/sensitivity.py). Here the same budget is shared out by what a quantizer sees that
looks at each layer alone, too: the error of a weight's output, relative to that output,

    err_i / E|x_i W_i^T|^2,   err_i = sum over rows d of (W_q - W) of  d G d^T.

Candidates, sizes, rounding and channel scales are the same, and both see the same statistics;
only the weight of each error differs. For a uniform format (4b32) its own row comes first, and the
budget is its size. Differences are paired over the evaluation windows.
"""

from __future__ import annotations

import argparse
import dataclasses

import bench_options
import numpy as np
import numpy.typing as npt
from collecting import Statistics
from figures import Figure, append_results, paired
from quality import Bench

from faq_onnx.artifacts.sensitivity import Sensitivities, Sensitivity
from faq_onnx.artifacts.stats import CalibrationStats
from faq_onnx.config import QuantizeConfig
from faq_onnx.quant.objective import output_energy

Tokens = npt.NDArray[np.int64]


@dataclasses.dataclass
class OwnOutputs(Statistics):
    """Errors count by the energy of what they disturb, nothing behind it."""

    def sensitivities(self, stats: CalibrationStats, windows: Tokens) -> Sensitivities:
        """One for each weight that was measured at the logits, in the same order."""
        measured = super().sensitivities(stats, windows)
        energies = self._energies(stats, windows)
        entries = tuple(
            Sensitivity(name=entry.name, error=energies[entry.name], kl=1.0)
            for entry in measured.entries
        )
        return measured.model_copy(update={"entries": entries, "perturbation": "own output"})

    def _energies(self, stats: CalibrationStats, windows: Tokens) -> dict[str, float]:
        """E|x W^T|^2 of each site, or |W|^2 without a Gram matrix; of a table, of its rows."""
        opened, energies = self.opened, {}
        group_of = {site: group.name for group in opened.census.groups for site in group.sites}
        for site in opened.census.sites:
            weight, group = opened.read(site), group_of[site.name]
            known = stats.has(group)
            energies[site.name] = (
                output_energy(weight, stats.gram(group))
                if known
                else float(np.vdot(weight, weight))
            )
        for table in opened.census.embeddings:
            rows = opened.read_table(table)[windows.reshape(-1)]
            energies[table.name] = float(np.vdot(rows, rows)) / len(rows)
        return energies


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    with bench_options.opened_bench(args) as bench:
        near = OwnOutputs(bench.opened, bench.work, bench.progress)
        for fmt in args.formats:
            rows: list[Figure] = []
            budget = bench_options.make_config(args.method, fmt, args)
            if budget.budget is None:
                rows.append(_measure(bench, f"the same everywhere, {fmt}", budget, args))
                _report(rows, args, fmt)
                budget = budget.model_copy(update={"budget": "same"})
            for view, statistics in (("own output", near), ("logits", bench.statistics)):
                one = dataclasses.replace(bench, statistics=statistics)
                rows.append(_measure(one, f"{view}, {fmt}", budget, args))
                _report(rows, args, fmt)
    return 0


def _measure(bench: Bench, name: str, config: QuantizeConfig, args: argparse.Namespace) -> Figure:
    (figure,) = bench.measure(name, config, (args.level,))
    return figure


def _report(rows: list[Figure], args: argparse.Namespace, fmt: str) -> None:
    """The last row, less the first of its format."""
    first, last = rows[0], rows[-1]
    versus = paired(last.kl_windows, first.kl_windows) if last is not first else None
    bench_options.show(last, versus, first.name)
    context = {"method": args.method, "format": fmt, "seed": args.seed}
    context |= {"calibration": args.calibration, "samples": args.samples}
    append_results(args.json, [last], model=args.model, **context)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser, samples=48)
    bench_options.add_common(parser, ("4b32", "3.0bpw"))
    parser.add_argument("--method", type=bench_options.method_argument, default="faq-gptq")
    parser.add_argument("--level", type=int, choices=[0, 4], default=4, help="[%(default)s]")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
