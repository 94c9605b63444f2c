"""Ranks at every state of a backfill, against scikit-learn and against sorting everything anew."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from evaluation.backfilling.curves import ends
from evaluation.backfilling.ranks import POINTS, Relevance, Side, outcomes, steps_of
from sightline.errors import DataError

QUERIES, ITEMS = 30, 47


def halves(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Vectors of multiples of ½: inner products are exact, and many are equal."""
    return (rng.normal(size=(rows, dim)) * 2).round().astype(np.float32) / 2


@pytest.fixture
def case() -> tuple[Side, Side, Relevance]:
    rng = np.random.default_rng(3)
    old = Side(queries=halves(rng, QUERIES, 3), gallery=halves(rng, ITEMS, 3))
    new = Side(queries=halves(rng, QUERIES, 4), gallery=halves(rng, ITEMS, 4))
    itself = np.where(rng.random(QUERIES) < 0.5, np.arange(QUERIES), -1)
    labels = rng.integers(0, 4, QUERIES), rng.integers(0, 4, ITEMS)
    return old, new, Relevance(query_labels=labels[0], gallery_labels=labels[1], itself=itself)


def test_every_state_is_what_sorting_it_anew_gives(case: tuple[Side, Side, Relevance]) -> None:
    old, new, relevance = case
    assert relevance.itself is not None
    orders = {str(seed): np.random.default_rng(seed).permutation(ITEMS) for seed in range(3)}
    found = outcomes(old, new, relevance, orders)
    olds, news = old.queries @ old.gallery.T, new.queries @ new.gallery.T
    tied = 0
    for name, order in orders.items():
        for state in range(POINTS):
            done = order[: round(state * ITEMS / (POINTS - 1))]
            similar = olds.copy()
            similar[:, done] = news[:, done]
            for place, query in enumerate(found[name].queries):
                kept = np.arange(ITEMS) != relevance.itself[query]
                scores, relevant = similar[query, kept], relevance.row(query)[kept]
                wanted = average_precision_score(relevant, scores)
                assert found[name].precision[place, state] == pytest.approx(wanted, abs=1e-6)
                before = (scores[~relevant] >= scores[relevant].max()).sum()
                assert found[name].before[place, state] == before
                # By hand: worst place of the best positive when ties go to the negatives.
                ranking = sorted(zip(-scores, relevant, strict=True), key=lambda pair: (pair[0], pair[1]))
                assert [hit for _, hit in ranking].index(True) == before
                tied += len(np.unique(scores)) < len(scores)
    assert tied > 100


def test_a_matrix_says_the_same_as_labels(case: tuple[Side, Side, Relevance]) -> None:
    old, new, relevance = case
    matrix = np.stack([relevance.row(query) for query in range(QUERIES)])
    order = {"": np.arange(ITEMS)}
    one = outcomes(old, new, relevance, order)[""]
    two = outcomes(old, new, Relevance(matrix=matrix, itself=relevance.itself), order)[""]
    np.testing.assert_array_equal(one.precision, two.precision)
    np.testing.assert_array_equal(one.before, two.before)


def test_a_curve_starts_with_the_old_model_and_ends_with_the_new_one(case: tuple[Side, Side, Relevance]) -> None:
    old, new, relevance = case
    found = outcomes(old, new, relevance, {"": np.arange(ITEMS)[::-1].copy()})[""]
    before, after = ends(old, new, relevance)
    alone = outcomes(old, old, relevance, {"": np.arange(ITEMS)})[""]
    np.testing.assert_array_equal(found.precision[:, :1], before.precision)
    np.testing.assert_array_equal(found.precision[:, -1:], after.precision)
    np.testing.assert_array_equal(alone.precision[:, 7:8], before.precision)
    assert not np.allclose(before.precision, after.precision)


def test_a_query_without_anything_to_find_does_not_count(case: tuple[Side, Side, Relevance]) -> None:
    old, new, _ = case
    matrix = np.zeros((QUERIES, ITEMS), bool)
    matrix[4, [1, 2]] = matrix[6, 6] = True
    itself = np.arange(QUERIES)
    found = outcomes(old, new, Relevance(matrix=matrix, itself=itself), {"": np.arange(ITEMS)})[""]
    assert found.queries.tolist() == [4]
    with pytest.raises(DataError, match="found none"):
        outcomes(old, new, Relevance(matrix=np.zeros_like(matrix)), {"": np.arange(ITEMS)})


def test_steps_are_equally_spaced_and_follow_the_order() -> None:
    order = np.random.default_rng(0).permutation(100)
    steps = steps_of(order, 11)
    assert [(steps <= state).sum() for state in range(11)] == [10 * state for state in range(11)]
    assert set(np.flatnonzero(steps == 1)) == set(order[:10])


@pytest.mark.parametrize("order", [[0, 1, 1], [0, 1, 3]])
def test_an_order_is_a_permutation(order: list[int]) -> None:
    with pytest.raises(DataError, match="permutation"):
        steps_of(np.array(order))


def test_wrong_shapes_are_named(case: tuple[Side, Side, Relevance]) -> None:
    old, new, relevance = case
    with pytest.raises(DataError, match="permutation of all 47"):
        outcomes(old, new, relevance, {"": np.arange(ITEMS - 1)})
    with pytest.raises(DataError, match="expected the relevance's 30 and 47"):
        outcomes(old, Side(queries=new.queries[1:], gallery=new.gallery), relevance, {"": np.arange(ITEMS)})
    with pytest.raises(DataError, match=r"expected \[Q, D\] and \[G, D\]"):
        Side(queries=old.queries, gallery=new.gallery)
    with pytest.raises(DataError, match="finite"):
        Side(queries=old.queries * np.nan, gallery=old.gallery)
    with pytest.raises(DataError, match="a matrix, or labels"):
        Relevance()
    with pytest.raises(DataError, match="itself"):
        Relevance(matrix=np.ones((2, 3), bool), itself=np.array([0, 3]))
