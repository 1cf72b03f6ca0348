"""Let a weight bring the residual stream back through the weights behind it.

Gate and up end in the hidden activation h of an MLP, and h in the residual stream by down_proj's
weight A. What the stream is off, e = r - r_q, can so be met before down_proj is rounded: a change
D of a weight whose outputs reach h through elementwise operators changes the stream by

    f(D) = ((x D^T) * s) A^T,      s = dh / d(x W^T), token by token,

which is linear in D. min_D E|w c (e - f(D))|^2 is a least-squares problem with as many unknowns
as the weight has numbers; the step taken here is one of Gauss and Newton with a diagonal metric of
the outputs and the Gram matrix of the inputs,

    D = (diag(H) + ridge mean(H) I)^-1 M (G + ridge mean(diag G) I)^-1,
    M = E[(w^2 c^2 e A * s)^T x],    H_n = |c A_n|^2 E[w^2 s_n^2],

and its strength is the one under which the step that one half of the tokens asks for helps the
other half most, with f itself and not its approximation. Tokens are weighted by w = 1 / rms(r), as
the norm that reads the stream does, and its channels by c, what the next layers' readers make of
them. No gradient passes through more than these two weights.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["AheadMoments", "Seen", "best_strengths", "stream_change", "stream_step"]

Array = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

INPUT_RIDGE = 0.1
OUTPUT_RIDGE = 1.0


@dataclasses.dataclass(frozen=True)
class Seen:
    """What some tokens show, weighted by w.

    Attributes:
        inputs: x, float32 [T, K].
        slopes: w s by site, float32 [T, N].
        missing: w c e, float32 [T, D].
        weight: c A, float32 [D, N].
    """

    inputs: Array
    slopes: Mapping[str, Array]
    missing: Array
    weight: Array

    def of(self, rows: slice) -> Seen:
        """What some of these tokens show."""
        slopes = {name: slope[rows] for name, slope in self.slopes.items()}
        return Seen(self.inputs[rows], slopes, self.missing[rows], self.weight)


@dataclasses.dataclass
class AheadMoments:
    """Running sums over some of the tokens.

    Attributes:
        pull: M by site, float64 [N, K].
        energy: The sum of w^2 s^2 by site, float64 [N].
        tokens: How many were added.
    """

    pull: dict[str, Doubles] = dataclasses.field(default_factory=dict)
    energy: dict[str, Doubles] = dataclasses.field(default_factory=dict)
    tokens: int = 0

    def add(self, seen: Seen) -> None:
        """Add some tokens."""
        if not len(seen.inputs):
            for name, slope in seen.slopes.items():
                self.pull.setdefault(name, np.zeros((slope.shape[1], seen.inputs.shape[1])))
                self.energy.setdefault(name, np.zeros(slope.shape[1]))
            return
        back = seen.missing @ seen.weight
        for name, slope in seen.slopes.items():
            pull = (back * slope).T @ seen.inputs
            energy = np.einsum("tn,tn->n", slope, slope, optimize=False)
            self.pull[name] = self.pull.get(name, 0) + pull.astype(np.float64)
            self.energy[name] = self.energy.get(name, 0) + energy.astype(np.float64)
        self.tokens += len(seen.inputs)

    def plus(self, other: AheadMoments) -> AheadMoments:
        """Over the tokens of both."""
        return AheadMoments(
            {name: pull + other.pull[name] for name, pull in self.pull.items()},
            {name: energy + other.energy[name] for name, energy in self.energy.items()},
            self.tokens + other.tokens,
        )


def stream_step(moments: AheadMoments, gram: Array, weight: Array) -> dict[str, Array]:
    """The step D by site, float32 [N, K].

    Args:
        moments: Of the tokens that ask for it.
        gram: G = E[x^T x], float32 [K, K].
        weight: c A, float32 [D, N].
    """
    damped = gram.astype(np.float64)
    np.fill_diagonal(damped, np.diagonal(damped) + INPUT_RIDGE * (np.diagonal(damped).mean() or 1))
    inverse = np.linalg.inv(damped)
    reach = np.square(weight.astype(np.float64)).sum(axis=0)
    steps: dict[str, Array] = {}
    for name, pull in moments.pull.items():
        metric = reach * moments.energy[name] / max(moments.tokens, 1)
        metric += OUTPUT_RIDGE * (metric.mean() or 1)
        step = (pull / max(moments.tokens, 1) / metric[:, np.newaxis]) @ inverse
        steps[name] = step.astype(np.float32)
    return steps


def stream_change(seen: Seen, step: Array, site: str) -> Array:
    """What a step at one site does to the stream, w c f(D): float32 [T, D]."""
    hidden: Array = seen.inputs @ step.T
    hidden *= seen.slopes[site]
    change: Array = hidden @ seen.weight.T
    return change


def best_strengths(slope: Doubles, curvature: Doubles) -> Doubles:
    """Strengths a in [0, 1] of several steps that lower -2 a . slope + a Q a^T most, float64 [n].

    Few steps, so every choice of those that are taken is looked at.

    Args:
        slope: Half the loss's fall along each step, float64 [n].
        curvature: Q, their products, float64 [n, n].
    """
    count = len(slope)
    best, least = np.zeros(count), 0.0
    for size in range(1, count + 1):
        for taken in itertools.combinations(range(count), size):
            own = curvature[np.ix_(taken, taken)]
            strength = np.linalg.lstsq(own, slope[list(taken)], rcond=None)[0]
            if (strength <= 0).any():
                continue
            strength = np.minimum(strength, 1.0)
            loss = float(strength @ own @ strength - 2 * strength @ slope[list(taken)])
            if loss < least:
                best, least = np.zeros(count), loss
                best[list(taken)] = strength
    return best
