"""Whether an evaluation with noise can tell anything is known from public numbers, by a table that a script
makes.
"""

from __future__ import annotations

import importlib

import numpy as np
import pytest

from common.artifacts import DEFAULT_LABELS
from common.counts import noise_deviation
from common.estimability import (
    LIMIT,
    error_95,
    estimability,
    models_scored,
    nominal_tested,
    smallest_estimable,
)
from common.plan import Evaluate, ReleasedModel
from common.privacy import gdp_max_mu
from tests.helpers.command_line import ROOT
from tests.helpers.consortium import tiny_plan


@pytest.fixture(scope="module")
def script() -> object:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("estimability")


@pytest.mark.parametrize(("patients", "deviation"), [(50, 2.0), (200, 8.0), (1000, 16.0), (350, 4.0)])
def test_the_packaged_table_is_what_the_script_makes(script: object, patients: int, deviation: float) -> None:
    """Within the Monte-Carlo error of 4,000 draws."""
    found = np.nan_to_num(script.errors(patients, deviation, 4000, seed=9)[0], nan=1.0)
    low, high = np.quantile(found, [0.935, 0.965])
    assert low - 1e-3 <= error_95(patients, deviation) <= high + 1e-3


# an independent table's figures for AUROC: one model, three artifacts, no shift, delta 1e-5
STATED = {
    (200, 0.5): 0.34,
    (100, 1.0): 0.35,
    (200, 1.0): 0.19,
    (500, 1.0): 0.09,
    (1000, 1.0): 0.05,
    (50, 2.0): 0.38,
    (100, 2.0): 0.22,
    (500, 2.0): 0.06,
    (1000, 2.0): 0.03,
}


@pytest.mark.parametrize(("patients", "epsilon"), STATED)
def test_it_agrees_with_an_independent_table(script: object, patients: int, epsilon: float) -> None:
    found = script.errors(patients, script.deviation_of(epsilon, 1, 3), 4000)[0]
    assert float(np.nanquantile(found, 0.95)) == pytest.approx(STATED[patients, epsilon], abs=0.03)


def test_more_patients_help_and_more_noise_or_models_hurt() -> None:
    by_size = [error_95(n, 8.0) for n in (50, 100, 200, 500, 1000, 5000)]
    by_noise = [error_95(300, deviation) for deviation in (0.5, 2.0, 8.0, 32.0)]
    assert by_size == sorted(by_size, reverse=True)
    assert by_noise == sorted(by_noise)
    assert (error_95(0, 1.0), error_95(10, 1e6)) == (1.0, pytest.approx(error_95(10, 700), abs=0.01))
    noise = 1 / gdp_max_mu(1.0, 1e-5)
    one, five = estimability(200, noise, 1), estimability(200, noise, 5)
    assert five.deviation == pytest.approx(one.deviation * 5**0.5)
    assert (
        one.deviation
        == noise_deviation(noise, 1, len(DEFAULT_LABELS))
        == pytest.approx(noise * len(DEFAULT_LABELS) ** 0.5)
    )
    assert one.error < LIMIT < five.error
    assert (one.is_so, five.is_so) == (True, False)
    least = smallest_estimable(noise, 5)
    assert least is not None
    assert estimability(least, noise, 5).is_so
    assert smallest_estimable(1e6, 5) is None


def test_the_words_name_n_epsilon_models_and_the_error() -> None:
    text = estimability(50, 4.0, 1).words("epsilon 1.00")
    assert text.startswith(
        "not estimable at this n and epsilon (50 test patients by the bucket, epsilon 1.00, 1 model)"
    )


def test_the_number_of_test_patients_follows_from_bucket_and_split() -> None:
    assert nominal_tested(500) == 214
    assert nominal_tested(500, 0.5, 0.5) == 500
    assert nominal_tested(500, 0.0, 1.0) == 500  # never trains: the bucket is of those who are scored


def test_the_models_of_a_plan_are_counted() -> None:
    plan = tiny_plan(arms=["public", "local", "federated"])
    assert models_scored(plan, 3) == 5
    model = ReleasedModel(name="federated", sha256="0" * 64)
    released = plan.model_copy(
        update={"arms": (), "held_out": (), "evaluate": Evaluate(run="r", models=(model,))}
    )
    assert models_scored(released, 3) == 1
