r"""Search FAQ's configuration on validation text, over several models, texts and seeds.

    python tools/presearch.py MODEL0 MODEL1 --calibrations c4.txt code.txt --seeds 0 1 \
        --pool 256 --samples 48 --evaluation c4-valid.txt --formats 4b32 3b64 \
        --json presearch.jsonl --work work/

A cell is a model, a calibration text, a seed (which windows, drawn from the first --pool of the
text), a format and a stack: `plain` (clipping, nearest) or `gptq` (grid search and GPTQ on the
float path). In each cell AWQ and FAQ differ by nothing but the channel statistic. Starting from
the defaults, one axis after the other tries all its values in all cells, and keeps the one with
the lowest mean KL relative to AWQ's (cells of different formats have different sizes of KL).
With --settings "window=1 fusion=0.7 roles=attention_input" "" ... these are compared and nothing
is searched; what a setting does not name is the default's.

Prints, for each configuration and cell, the paired difference to AWQ (mean over windows +- its
standard error), then the mean over cells +- its standard error, and the winner. Never evaluate on
a test set: what is chosen here is evaluated elsewhere. Rows in --json are not measured again, so
an interrupted search goes on. SmolLM2-135M on one core: 1.2 minutes a row (plain), 2.7 (gptq);
13 rows a cell; 0.4 GB of statistics for each model, text and seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from pathlib import Path

import bench_options
import numpy as np
from figures import Figure, Results, mean_of, paired
from quality import Bench
from work import work_folder

from faq_onnx.config import CalibrationConfig, FaqConfig
from faq_onnx.report.progress import make_progress

STACKS = {
    "plain": "awq rounding.grid=clip rounding.rounding=nearest rounding.path=float",
    "gptq": "awq rounding.grid=search rounding.rounding=gptq rounding.path=float",
}
SETTINGS = (
    *("samples", "pool", "sequence_length"),
    *("evaluation", "windows", "lm_head", "embedding"),
)
RESIDUAL = ("attention_input", "mlp_input")
AXES: dict[str, tuple[object, ...]] = {
    "window": (1, 3, 5, 8),
    "fusion": (0.5, 0.7, 0.85, 0.95),
    "roles": (
        RESIDUAL,
        ("mlp_input",),
        ("attention_input",),
        (*RESIDUAL, "attention_output", "mlp_hidden"),
    ),
    "normalisation": ("none", "mean", "max"),
    "preview": ("layer", "window"),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """Where AWQ and FAQ are compared."""

    model: str
    calibration: str
    seed: int
    format: str
    stack: str

    def __str__(self) -> str:
        """As the trail names it."""
        text = Path(self.calibration).name
        return f"{Path(self.model).name} {text} seed {self.seed} {self.format} {self.stack}"


@dataclasses.dataclass
class Search:
    """Measures configurations in cells; models are opened when something is missing."""

    args: argparse.Namespace
    work: Path
    results: Results
    benches: dict[tuple[str, ...], Bench] = dataclasses.field(default_factory=dict)

    def cells(self) -> list[Cell]:
        """All of them, those of one calibration side by side."""
        a = self.args
        product = itertools.product(a.models, a.calibrations, a.seeds, a.formats, a.stacks)
        return [Cell(*values) for values in product]

    def score(self, faq: FaqConfig) -> float:
        """Print the configuration in every cell; its mean relative difference to AWQ."""
        print(f"\n{describe(faq)}", flush=True)
        relative, absolute = [], []
        for cell in self.cells():
            theirs, ours = self.measure(cell, None), self.measure(cell, faq)
            gain = paired(ours.kl_windows, theirs.kl_windows)
            relative.append(gain.mean / theirs.kl_nats)
            absolute.append(gain.mean)
            print(f"  {cell!s:<48} AWQ {theirs.kl_nats:.5f}  FAQ - AWQ {gain}", flush=True)
        share = mean_of([100 * value for value in relative])
        print(
            f"  mean over {len(relative)} cells {mean_of(absolute)}  "
            f"relative {share.mean:+.2f} ± {share.error:.2f} %",
            flush=True,
        )
        return float(np.mean(relative))

    def measure(self, cell: Cell, faq: FaqConfig | None) -> Figure:
        """One row; None is AWQ."""
        wish = None if faq is None else faq.model_dump(mode="json")
        key = {name: getattr(self.args, name) for name in SETTINGS}
        if self.args.evaluation == "heldout":  # behind the first text's windows
            key["evaluation"] = f"behind {self.args.calibrations[0]} {self.args.seeds[0]}"
        key |= {"cell": dataclasses.asdict(cell), "faq": wish}
        known = self.results.get(key)
        if known is not None:
            return known
        more = {} if faq is None else {"faq": wish, "scale": {"statistic": "faq"}}
        config = bench_options.make_config(STACKS[cell.stack], cell.format, self.args, **more)
        name = f"{cell} {'AWQ' if faq is None else describe(faq)}"
        (figure,) = self._bench(cell).measure(name, config, (0,))
        return self.results.add(key, figure)

    def _bench(self, cell: Cell) -> Bench:
        key = (cell.model, cell.calibration, str(cell.seed))
        if key not in self.benches:
            calibration = self._calibration(cell.calibration, cell.seed)
            model = self._opened(cell.model)
            self.benches[key] = model.recalibrated(calibration, pool=self.args.pool)
        return self.benches[key]

    def _opened(self, model: str) -> Bench:
        """The model, with evaluation windows that do not depend on which cell comes first."""
        args = self.args
        if (model,) not in self.benches:
            self.benches[model,] = Bench.prepare(
                model,
                self.work,
                calibration=self._calibration(args.calibrations[0], args.seeds[0]),
                evaluation=args.evaluation,
                windows=args.windows,
                pool=args.pool,
                progress=make_progress(sys.stderr),
            )
        return self.benches[model,]

    def _calibration(self, text: str, seed: int) -> CalibrationConfig:
        return bench_options.calibration_of(self.args, source=text, seed=seed)


def _settings(text: str) -> FaqConfig:
    """`window=1 roles=attention_input`, over the defaults."""
    return bench_options.checked(FaqConfig, bench_options.keys_of(text.split()), text)


def describe(faq: FaqConfig) -> str:
    """In one line."""
    roles = "+".join(faq.roles)
    return (
        f"fusion {faq.fusion:g} {faq.preview} {faq.window} roles {roles} "
        f"normalisation {faq.normalisation}"
    )


def main(argv: list[str] | None = None) -> int:
    """Search and print the trail."""
    args = _parse(argv)
    with work_folder(args.work) as folder:
        search = Search(args, folder, Results(args.json))
        if args.settings is not None:
            for faq in args.settings:
                search.score(faq)
            return 0
        best = FaqConfig()
        lowest = search.score(best)
        for axis in args.axes:
            start = best
            for value in AXES[axis]:
                faq = start.model_copy(update={axis: value})
                score = lowest if faq == best else search.score(faq)
                if score < lowest:
                    best, lowest = faq, score
            print(f"\nafter {axis}: {describe(best)} ({100 * lowest:+.2f} %)", flush=True)
        print("\nThe winner:")
        search.score(best)
        if best == FaqConfig():
            print("  These are the defaults.")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="ONNX folders or files")
    parser.add_argument("--calibrations", nargs="+", required=True, metavar="TEXT")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=48, help="windows [%(default)s]")
    parser.add_argument("--pool", type=int, default=256, help="windows to draw from [%(default)s]")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument(
        "--axes", nargs="+", choices=AXES, default=list(AXES), help="in this order [all]"
    )
    parser.add_argument(
        "--settings", nargs="+", type=_settings, help="compare these, and search nothing"
    )
    bench_options.add_common(parser, ("4b32", "3b64"), windows=8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
