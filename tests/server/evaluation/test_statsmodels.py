"""Our statistics are those of statsmodels and scikit-learn, on random data."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, cohen_kappa_score

from client.labels.reader_agreement import cohen_kappa, fleiss_kappa
from server.evaluation import operating
from server.evaluation.inference import holm
from server.evaluation.next_hospital import random_effects

pytest.importorskip("statsmodels", reason="of the extra `dev`; not installed")

SEEDS = range(20)


@pytest.mark.parametrize("seed", SEEDS)
def test_holm(seed: int) -> None:
    from statsmodels.stats.multitest import multipletests

    rng = np.random.default_rng(seed)
    p = rng.random(rng.integers(1, 40)) ** 3
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist(), rel=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_effects(seed: int) -> None:
    from statsmodels.stats.meta_analysis import combine_effects

    rng = np.random.default_rng(seed)
    count = int(rng.integers(3, 20))
    values, errors = rng.normal(1.5, 0.8, count), rng.uniform(0.05, 0.3, count)
    found = random_effects(values, errors)
    assert found is not None
    theirs = combine_effects(values, errors**2, method_re="chi2")
    assert found.q == pytest.approx(theirs.q)
    assert found.tau2 == pytest.approx(theirs.tau2, rel=1e-9)
    assert (found.mean, found.standard_error) == pytest.approx((theirs.mean_effect_re, theirs.sd_eff_w_re))


@pytest.mark.parametrize(("count", "of"), [(0, 1), (1, 1), (0, 40), (3, 7), (37, 40), (500, 1000)])
def test_wilson(count: int, of: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    found = operating.wilson(count, of)
    assert (found.low, found.high) == pytest.approx(proportion_confint(count, of, method="wilson"), abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_kappas(seed: int) -> None:
    from statsmodels.stats.inter_rater import cohens_kappa
    from statsmodels.stats.inter_rater import fleiss_kappa as theirs

    rng = np.random.default_rng(seed)
    first = rng.integers(0, 2, 60)
    second = np.where(rng.random(60) < 0.7, first, 1 - first)
    table = np.zeros((2, 2))
    np.add.at(table, (first, second), 1)
    found = cohen_kappa(first.astype(float), second.astype(float), np.arange(60), seed=1, draws=10)
    assert found.value == pytest.approx(cohen_kappa_score(first, second))
    assert found.standard_error == pytest.approx(cohens_kappa(table).std_kappa)
    readers = int(rng.integers(3, 7))
    yes = rng.binomial(readers, rng.random(40))
    counts = np.column_stack([readers - yes, yes])
    assert fleiss_kappa(counts, np.arange(40), seed=1, draws=10).value == pytest.approx(theirs(counts))


@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision(seed: int) -> None:
    rng = np.random.default_rng(seed)
    bins, labels = rng.integers(0, 30, 200), rng.random(200) < 0.3
    positives, negatives = (np.bincount(bins[labels == one], minlength=30) for one in (True, False))
    assert operating.average_precision(positives, negatives) == pytest.approx(
        average_precision_score(labels, bins)
    )
