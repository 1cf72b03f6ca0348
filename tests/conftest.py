"""Options and fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from faq_onnx.artifacts.plan import GroupPlan, QuantPlan, ScaleApplication
from faq_onnx.artifacts.sites import ModelCensus
from faq_onnx.passes import FoldScalesPass

Scales = dict[str, npt.NDArray[np.float32]]
MakeScales = Callable[[ModelCensus, bool], Scales]
HeadLosses = Callable[..., npt.NDArray[np.float64]]
MakeFold = Callable[[ModelCensus, Scales, ScaleApplication], FoldScalesPass]

# The same commit has the same result: examples of property tests are a function of the test.
# `make explore` draws others every time.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="write results into the golden files"
    )


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def head_losses() -> HeadLosses:
    """tr(H_out dW H_in dW^T) of each head, in float64; H_in [K, K], or one per head."""

    def losses(
        delta: npt.NDArray[np.floating],
        gram_in: npt.NDArray[np.floating],
        gram_out: npt.NDArray[np.floating],
    ) -> npt.NDArray[np.float64]:
        heads = delta.astype(np.float64).reshape(*gram_out.shape[:2], -1)
        found: npt.NDArray[np.float64] = np.einsum(
            "hij,hjk,hik->h", gram_out, heads @ gram_in, heads
        )
        return found

    return losses


@pytest.fixture
def make_scales(rng: np.random.Generator) -> MakeScales:
    """Random scales [K] by group, one per shared row; powers of two if asked for."""

    def make(census: ModelCensus, powers_of_two: bool) -> Scales:
        scales: Scales = {}
        for group in census.groups:
            exponents = rng.normal(scale=1.5, size=group.in_features)
            exponents = exponents.round() if powers_of_two else exponents
            repeats = group.absorber.repeats if group.absorber is not None else 1
            if repeats > 1:
                assert group.absorber is not None
                heads = exponents.reshape(-1, repeats, group.absorber.head_dim or 1)
                exponents = np.repeat(heads[:, :1], repeats, axis=1).ravel()
            scales[group.name] = np.exp2(exponents).astype(np.float32)
        return scales

    return make


@pytest.fixture
def make_fold() -> MakeFold:
    """A pass that scales every group that can be."""

    def make(census: ModelCensus, scales: Scales, application: ScaleApplication) -> FoldScalesPass:
        groups = tuple(
            GroupPlan(
                group=group.name,
                application=application if group.scalable else ScaleApplication.NONE,
            )
            for group in census.groups
            if group.name in scales
        )
        plan = QuantPlan(
            census_fingerprint=census.fingerprint(),
            method="awq",
            sites=(),
            groups=groups,
            embeddings=(),
        )
        return FoldScalesPass(census, plan, scales)

    return make
