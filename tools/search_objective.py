"""Does it pay to judge a channel scale by the output of its module, as llm-awq does?

    python tools/search_objective.py MODEL --calibration c4-train.txt --evaluation c4-valid.txt

llm-awq measures a candidate for q, k and v at the attention's output, and one for gate and up at
the MLP's; our planner measures each site's own output through the Gram matrix. Here both choose
exponents for AWQ on the same statistics, and the resulting models are compared on validation text.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence

import bench_options
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import quality
from figures import paired

from faq_onnx.artifacts.plan import GroupPlan, ScaleApplication
from faq_onnx.artifacts.sites import GroupRole, LinearSite, ScaleGroup, WeightLayout
from faq_onnx.calibration.collect import Collector
from faq_onnx.graph.cut import Part, extract_part
from faq_onnx.graph.io import save_model
from faq_onnx.planning.planner import PlannedModel
from faq_onnx.quant.channel_scale import awq_scale, exponents
from faq_onnx.quant.formats import block_format
from faq_onnx.quant.uniform import fake_quantize, to_blocks
from faq_onnx.runtime.feeds import decoder_feeds
from faq_onnx.runtime.session import open_session

Array = npt.NDArray[np.float32]
Values = dict[str, npt.NDArray[np.generic]]
ENDS = {GroupRole.ATTENTION_INPUT: "o_proj", GroupRole.MLP_INPUT: "down_proj"}


@dataclasses.dataclass
class ModuleSearch:
    """Chooses exponents by module outputs, on a few windows."""

    bench: quality.Bench
    ids: npt.NDArray[np.int64]
    bits: int
    block_size: int

    def exponents(self) -> dict[str, float]:
        """Best exponent by group name, for the groups that AWQ judges at a module's output."""
        opened = self.bench.opened
        parts = Collector(opened.model, opened.census, "", self.bench.work).parts()
        values: Values = {}
        chosen = {}
        for part in parts[:-1]:
            for group in self._groups(part):
                chosen[group.name] = self._search(part, group, values)
            values.update(self._run(part, part.outputs, values, {}))
        return chosen

    def _groups(self, part: Part) -> Iterator[ScaleGroup]:
        for group in self.bench.opened.census.groups:
            first = self.bench.opened.census.site(group.sites[0])
            if group.role in ENDS and first.output in part.produces:
                yield group

    def _search(self, part: Part, group: ScaleGroup, values: Values) -> float:
        census = self.bench.opened.census
        sites = [census.site(name) for name in group.sites]
        end = next(
            site.output
            for site in census.sites
            if site.layer_index == group.layer_index and site.role == ENDS[group.role]
        )
        session = self._open(part, [end], values, sites)
        weights = {site.weight: self.bench.opened.read(site) for site in sites}
        feeds = self._feeds(session, values)
        truth = self._output(session, feeds, sites, weights)
        statistic = self.bench.stats.mean_abs(group.name)
        losses = []
        for exponent in exponents(20):
            scale = awq_scale(statistic, exponent)
            rounded = {name: self._round(weight, scale) for name, weight in weights.items()}
            error = self._output(session, feeds, sites, rounded) - truth
            losses.append(float(np.vdot(error, error)))
        return exponents(20)[int(np.argmin(losses))]

    def _round(self, weight: Array, scale: Array) -> Array:
        fmt = block_format(self.bits, self.block_size, symmetric=False)
        blocks = to_blocks(weight * scale, fmt.block_size)
        rounded = fake_quantize(blocks, fmt).reshape(len(weight), -1)[:, : weight.shape[1]]
        return rounded / scale

    def _output(
        self,
        session: ort.InferenceSession,
        feeds: Values,
        sites: Sequence[LinearSite],
        weights: dict[str, Array],
    ) -> Array:
        for site in sites:
            weight = weights[site.weight]
            feeds[site.weight] = weight if site.layout is WeightLayout.N_K else weight.T.copy()
        output: Array = session.run(None, feeds)[0]
        return output

    def _open(
        self, part: Part, outputs: Sequence[str], values: Values, free: Sequence[LinearSite]
    ) -> ort.InferenceSession:
        types = {
            name: (ir.DataType.from_numpy(values[name].dtype), values[name].ndim)
            for name in part.inputs
        }
        model = extract_part(self.bench.opened.model, types, outputs)
        for site in free:
            value = model.graph.initializers.pop(site.weight)
            value.const_value = None
            model.graph.inputs.append(value)
        path = self.bench.work / "module.onnx"
        save_model(model, path, external_data=True)
        return open_session(path)

    def _feeds(self, session: ort.InferenceSession, values: Values) -> Values:
        weights = {site.weight for site in self.bench.opened.census.sites}
        own = [a for a in session.get_inputs() if a.name not in values and a.name not in weights]
        known = {a.name: values[a.name] for a in session.get_inputs() if a.name in values}
        return {**decoder_feeds(own, self.ids), **known}

    def _run(self, part: Part, outputs: Sequence[str], values: Values, extra: Values) -> Values:
        session = self._open(part, outputs, values, ())
        feeds = {**self._feeds(session, values), **extra}
        return dict(zip(outputs, session.run(list(outputs), feeds), strict=True))


def main(argv: list[str] | None = None) -> int:
    """Measure both objectives."""
    args = _parse(argv)
    with bench_options.opened_bench(args) as bench:
        for name in args.formats:
            config = bench_options.make_config("awq", name, args)
            fresh = bench.fresh()
            start = time.perf_counter()
            gram = bench.plan(fresh, config, bench.stats)
            gram_s = time.perf_counter() - start
            start = time.perf_counter()
            search = ModuleSearch(bench, bench.windows[:4], config.bits, config.block_size)
            module = _with_exponents(gram, search.exponents(), bench)
            module_s = gram_s + time.perf_counter() - start
            pair = []
            for judge, planned, seconds in (("gram", gram, gram_s), ("module", module, module_s)):
                label = f"{name} {judge}"
                (figure,) = bench.finish(label, bench.fresh(), planned, seconds, (0,))
                pair.append(figure)
                bench_options.show(figure)
            gain = paired(pair[1].kl_windows, pair[0].kl_windows)
            print(f"{name} module minus gram {gain}")
    return 0


def _with_exponents(
    planned: PlannedModel, chosen: dict[str, float], bench: quality.Bench
) -> PlannedModel:
    groups, scales = [], dict(planned.scales)
    for group in planned.plan.groups:
        exponent = chosen.get(group.group)
        if exponent is None:
            groups.append(group)
            continue
        scales.pop(group.group, None)
        fold = ScaleApplication.FOLD if exponent else ScaleApplication.NONE
        groups.append(GroupPlan(group=group.group, application=fold, exponent=exponent))
        if exponent:
            scales[group.group] = awq_scale(bench.stats.mean_abs(group.group), exponent)
    plan = planned.plan.model_copy(update={"groups": tuple(groups)})
    return PlannedModel(plan, scales)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = bench_options.make_parser(__doc__)
    bench_options.add_calibration(parser, samples=48)
    bench_options.add_common(parser, ("4b32", "3b64"), windows=8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
