"""Metrics against scikit-learn and by hand; intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from trainer import metrics


def test_metrics_by_hand():
    label, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.35, 0.2])
    found = metrics.ranking_metrics(label, score, np.array([1, 1, 2, 2]))
    assert found["auc"] == roc_auc_score(label, score) == 0.75
    assert found["gauc"] == 0.5  # 1 for the first user, 0 for the second
    assert found["calibration"] == pytest.approx(score.mean() / 0.5)
    assert metrics.ranking_metrics(label, np.full(4, 0.5), np.arange(4))["ne"] == pytest.approx(1)


def test_weighted_auc_is_scikit_learns():
    rng = np.random.default_rng(0)
    label, score = rng.uniform(size=500) < 0.3, rng.integers(0, 40, 500) / 40  # many ties
    weight = rng.integers(0, 4, 500)
    ours = metrics._WeightedAuc(label, score)(weight)
    assert ours == pytest.approx(roc_auc_score(label, score, sample_weight=weight), abs=1e-12)
    assert np.isnan(metrics._WeightedAuc(label, score)(weight * label))


def test_weighted_auc_within_groups_is_the_weighted_mean_of_scikit_learns():
    rng = np.random.default_rng(1)
    user = 7 * rng.integers(0, 30, 500)
    label, score = rng.uniform(size=500) < 0.2, rng.integers(0, 9, 500) / 9
    weight = rng.integers(0, 4, 500)
    wanted = [
        (roc_auc_score(label[at], score[at], sample_weight=weight[at]), weight[at].sum())
        for at in (user == one for one in np.unique(user))
        if len(set(label[at & (weight > 0)])) == 2
    ]
    assert 10 < len(wanted) < 30  # some users have one label alone
    ours = metrics._WeightedAuc(label, score, user)(weight)
    assert ours == pytest.approx(sum(auc * rows for auc, rows in wanted) / sum(rows for _, rows in wanted), abs=1e-12)
    plain = metrics._WeightedAuc(label, score, user)(np.ones(500, int))
    assert plain == pytest.approx(metrics.ranking_metrics(label, np.clip(score, 0.01, 0.99), user)["gauc"], abs=1e-12)


def test_interval_covers_no_difference_and_finds_a_real_one():
    rng = np.random.default_rng(0)
    user, truth = rng.integers(0, 60, 3000), rng.uniform(size=3000)
    label = (rng.uniform(size=3000) < truth).astype(float)
    blind, seeing = truth + rng.normal(0, 2, 3000), truth + rng.normal(0, 0.2, 3000)
    low, high = metrics.lift_interval(label, user, [blind], [seeing], draws=60)
    assert 0 < low < high
    again = blind + rng.normal(0, 0.01, 3000)
    low, high = metrics.lift_interval(label, user, [blind], [again], draws=60)
    assert low < 0 < high


def test_caption_metrics_by_hand():
    from catalogue.attributes import caption_slots

    found = metrics.caption_metrics(
        ["mug, red, small, single, on wood", "nonsense"],
        ["mug, red, large, single, on wood", "shoe, blue, small, single, on sand"], caption_slots,
    )  # fmt: skip
    # 5 of 6 claimed slots right (plain counts), 12 wanted.
    assert found["attribute_f1"] == pytest.approx(2 * 5 / (6 + 12))
    assert found["exact_match"] == 0
