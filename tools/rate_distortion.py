r"""How many bits are left to win, per role: the distance to the rate-distortion bound.

    python tools/rate_distortion.py MODEL --calibration c4.txt --samples 32 \
        --formats 4b32 3b64 2b64 --methods rtn awq gptq faq-gptq --json distance.jsonl

For each quantized site: D = sum of d G d^T / (N K), d the error of the weight and G the measured
Gram matrix of the float model; R(D), the fewest bits per weight with which independent Gaussian
weights of the site's variance could reach D (reverse water-filling over the eigenvalues of G);
and what was spent: code bits, and stored bits with scales and zero points. The excess is what was
spent minus R(D); roles average it over their weights. Nothing is evaluated: quantizing takes 1 to
3 minutes a row on SmolLM2-135M, the eigenvalues half a minute once.

The bound assumes Gaussian weights without memory. Real weights are neither, so an excess is a
yardstick. A method that rounds on the low-bit path aims at another Gram matrix and at shifted
targets, so D on the float model's Gram matrix is not quite what it minimises. G comes from the
calibration windows, which the rounding has seen: with few windows D flatters it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import bench_options
import numpy as np
import numpy.typing as npt
from quality import Bench

from faq_onnx.artifacts.sites import LinearSite, ScaleGroup
from faq_onnx.artifacts.weights import QuantizedWeight
from faq_onnx.quant.objective import output_energy
from faq_onnx.quant.rate_distortion import component_energies, gaussian_rate
from faq_onnx.quant.uniform import dequantize_weight

Array = npt.NDArray[np.float32]
ASSUMPTION = "The bound assumes Gaussian, memoryless weights of each site's variance."


@dataclasses.dataclass(frozen=True)
class Distance:
    """One site or, as means over weights, one role.

    Attributes:
        role: Of the site.
        weights: Number of them.
        bound_bits: R(D), bits per weight.
        code_bits: Of the codes.
        stored_bits: Codes, scales and zero points.
    """

    role: str
    weights: int
    bound_bits: float
    code_bits: float
    stored_bits: float


@dataclasses.dataclass
class Gauge:
    """Measures the sites of one model.

    Attributes:
        bench: The model and its statistics.
        energies: Eigenvalues by group, found when first asked for.
    """

    bench: Bench
    energies: dict[str, npt.NDArray[np.float64]] = dataclasses.field(default_factory=dict)

    def measure(self, method: str, fmt: str, args: argparse.Namespace) -> list[Distance]:
        """Quantize and compare each site with its bound."""
        config = bench_options.make_config(method, fmt, args)
        bench, fresh = self.bench, self.bench.fresh()
        stats = bench.stats_for(config)
        planned = bench.plan(fresh, config, stats)
        with tempfile.TemporaryDirectory(dir=bench.work) as folder:
            quantized = bench.quantize(fresh, planned, stats, Path(folder) / "weights")
            found = []
            for group, site in self._sites():
                if site.name in quantized.weights:
                    stored = quantized.weights[site.name]
                    low_bit = dequantize_weight(stored)
                    weights = bench.opened.read(site), fresh.read(site)
                    back = _unfolded(low_bit, *weights, planned.scales.get(group.name))
                    found += self._distance(group, site, stored, back)
        return found

    def _sites(self) -> Iterator[tuple[ScaleGroup, LinearSite]]:
        census = self.bench.opened.census
        for group in census.groups:
            for name in group.sites:
                if not census.site(name).in_subgraph:
                    yield group, census.site(name)

    def _distance(
        self, group: ScaleGroup, site: LinearSite, stored: QuantizedWeight, back: Array
    ) -> list[Distance]:
        """Of one site; empty where nothing was lost, which no finite rate explains."""
        weight, gram = self.bench.opened.read(site), self.bench.stats.gram(group.name)
        distortion = output_energy(back - weight, gram) / weight.size
        if distortion <= 0:
            return []
        variance = float(np.mean(np.square(weight), dtype=np.float64))
        bound = gaussian_rate(self._energies(group.name, gram, variance), distortion)
        bits = 8 * stored.size_bytes / weight.size
        code_bits = float(stored.format.code_bits)
        return [Distance(site.role.value, weight.size, bound, code_bits, bits)]

    def _energies(self, group: str, gram: Array, variance: float) -> npt.NDArray[np.float64]:
        if group not in self.energies:
            self.energies[group] = component_energies(gram, 1.0)
        return self.energies[group] * variance


def _unfolded(rounded: Array, weight: Array, folded: Array, given: Array | None) -> Array:
    """What a low-bit weight of the folded model stands for in the float model.

    Folding makes W' = diag(r) W diag(s): s of the site's own group, r where its rows take the
    inverse scale of the next group. r is a ratio of rows, exact but for rounding.
    """
    scale = np.ones(weight.shape[1], np.float32) if given is None else given
    own = weight * scale
    energy = np.maximum(np.vecdot(own, own), np.float32(1e-30))
    rows = np.vecdot(folded, own) / energy
    rows[rows == 0] = 1  # a row of zeros
    result: Array = rounded / (rows[:, np.newaxis] * scale)
    return result


def by_role(sites: list[Distance]) -> list[Distance]:
    """Means over weights, roles in order of appearance, and all together last."""
    names = [*dict.fromkeys(site.role for site in sites), "all"]
    rows = []
    for name in names:
        own = [site for site in sites if name in {site.role, "all"}]
        count = [site.weights for site in own]
        columns = [(s.bound_bits, s.code_bits, s.stored_bits) for s in own]
        bound, code, stored = np.average(columns, axis=0, weights=count).tolist()
        rows.append(Distance(name, sum(count), bound, code, stored))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    args = _parse(argv)
    with bench_options.opened_bench(args) as bench:
        gauge = Gauge(bench)
        print(ASSUMPTION)
        for fmt in args.formats:
            for method in args.methods:
                rows = by_role(gauge.measure(method, fmt, args))
                print(_table(f"{fmt} {method}", rows), flush=True)
                if args.json is not None:
                    line = {"model": args.model, "format": fmt, "method": method}
                    line["roles"] = [dataclasses.asdict(row) for row in rows]
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
    return 0


def _table(title: str, rows: list[Distance]) -> str:
    lines = ["", f"| {title} | bound R(D) | code bits | excess | stored bits | excess |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        code, stored = row.code_bits - row.bound_bits, row.stored_bits - row.bound_bits
        lines.append(
            f"| {row.role} | {row.bound_bits:.3f} | {row.code_bits:.2f} | {code:+.3f} "
            f"| {row.stored_bits:.2f} | {stored:+.3f} |"
        )
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser, samples=32)
    bench_options.add_common(parser, ("4b32", "3b64"), windows=1)
    parser.add_argument(
        "--methods",
        nargs="+",
        type=bench_options.method_argument,
        default=["rtn", "awq", "gptq", "faq-gptq"],
        metavar="METHOD",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
