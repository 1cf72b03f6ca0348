"""Tokens per second of packages in onnxruntime-genai, in alternating rounds of one run.

    bench_decode.py NAME=FOLDER [NAME=FOLDER ...] [--prompts 32 512] [--new 64] [--rounds 5]

Folders are genai packages: `faq-onnx convert` (with and without --no-fuse-attention), and what
onnxruntime-genai's own builder wrote. Each round runs every package at every prompt length, so
that whatever else the machine does meets all of them; figures are medians over rounds, and the
ratio to the first package is the median of the ratios within rounds. Greedy, batch 1, a fresh
generator each time; end tokens do not stop it, so that all make the same number of steps.
On a machine that others use, `--clock cpu --threads 1` counts the processor's time instead of the
clock on the wall.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

FIRST_TOKEN = 10  # the lowest ids are special in most vocabularies
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True)
class Timing:
    """One generation.

    Attributes:
        prefill: Prompt tokens per second, the first new token included.
        decode: New tokens per second after the first.
    """

    prefill: float
    decode: float


@dataclasses.dataclass(frozen=True)
class Row:
    """Medians of one package at one prompt length, and ratios to the first package."""

    name: str
    prompt: int
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    decode_spread: float


class Package:
    """A loaded package."""

    def __init__(self, name: str, folder: Path, threads: int, clock: str = "wall") -> None:
        import onnxruntime_genai as og  # type: ignore[import-untyped]  # noqa: PLC0415 - heavy

        self.name, self._og, self._clock = name, og, CLOCKS[clock]
        config = og.Config(str(folder))
        settings = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": settings}}}))
        self._model = og.Model(config)

    def generate(self, prompt: Sequence[int], steps: int) -> Timing:
        """Time `steps` tokens behind a prompt."""
        og = self._og
        parameters = og.GeneratorParams(self._model)
        length = len(prompt) + steps
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = og.Generator(self._model, parameters)
        start = self._clock()
        generator.append_tokens(list(prompt))
        generator.generate_next_token()
        first = self._clock()
        for _ in range(steps - 1):
            generator.generate_next_token()
        end = self._clock()
        if generator.token_count() != length:
            msg = f"{self.name}: {generator.token_count()} tokens where {length} were asked for"
            raise RuntimeError(msg)
        return Timing(len(prompt) / (first - start), (steps - 1) / (end - first))


def measure(
    packages: Sequence[Package], prompts: Sequence[int], steps: int, rounds: int, vocabulary: int
) -> list[Row]:
    """Alternate over packages and prompt lengths; the first round warms up and is dropped."""
    rng = np.random.default_rng(0)
    texts = {n: rng.integers(FIRST_TOKEN, vocabulary, n).tolist() for n in prompts}
    found: dict[tuple[str, int], list[Timing]] = {}
    for turn in range(rounds + 1):
        order = packages if turn % 2 else packages[::-1]
        for length, text in texts.items():
            for package in order:
                timing = package.generate(text, steps)
                if turn:
                    found.setdefault((package.name, length), []).append(timing)
        sys.stderr.write(f"round {turn} of {rounds}\n")
    return [
        _row(package.name, length, found[package.name, length], found[packages[0].name, length])
        for length in prompts
        for package in packages
    ]


def _row(name: str, prompt: int, timings: list[Timing], base: list[Timing]) -> Row:
    decode = [timing.decode for timing in timings]
    pairs = list(zip(timings, base, strict=True))
    quartiles = statistics.quantiles(decode, n=4) if len(decode) > 1 else decode * 3
    return Row(
        name=name,
        prompt=prompt,
        prefill=statistics.median(timing.prefill for timing in timings),
        decode=statistics.median(decode),
        prefill_ratio=statistics.median(mine.prefill / first.prefill for mine, first in pairs),
        decode_ratio=statistics.median(mine.decode / first.decode for mine, first in pairs),
        decode_spread=quartiles[2] - quartiles[0],
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown; the spread is between the quartiles."""
    lines = [
        "| package | prompt | prefill tokens/s | ratio | decode tokens/s | spread | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.name} | {row.prompt} | {row.prefill:.0f} | {row.prefill_ratio:.2f} "
        f"| {row.decode:.1f} | {row.decode_spread:.1f} | {row.decode_ratio:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", metavar="NAME=FOLDER", nargs="+")
    parser.add_argument("--prompts", type=int, nargs="+", default=[32, 512])
    parser.add_argument("--new", type=int, default=64, help="tokens to generate (64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    args = parser.parse_args(argv)
    pairs: list[tuple[str, str]] = [
        (name, folder) for name, _, folder in (each.partition("=") for each in args.packages)
    ]
    packages = [Package(name, Path(folder), args.threads, args.clock) for name, folder in pairs]
    vocabulary = min(_vocabulary(Path(folder)) for _, folder in pairs)
    rows = measure(packages, args.prompts, args.new, args.rounds, vocabulary)
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    sys.stdout.write(
        f"{table(rows)}\n\n{args.threads} thread(s), {args.clock} time, load average {load}\n"
    )
    if args.json is not None:
        args.json.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=2))


def _vocabulary(folder: Path) -> int:
    config: Any = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    return int(config["model"]["vocab_size"])


if __name__ == "__main__":
    main()
