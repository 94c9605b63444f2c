"""From outcomes per query to curves over the backfilled fraction, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.backfilling.ranks import POINTS, Outcomes, Relevance, Side, outcomes
from sightline.errors import ConfigError

__all__ = ["METRICS", "Method", "ends", "evaluate", "flips", "summarise"]

METRICS = ("mAP", "CMC@1", "CMC@5")
RESAMPLES = 1000
LEVEL = 0.05
ROUNDING = 1e-9  # of means: a smaller span is none
Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How one method compares a query with an item before and after the item is backfilled."""

    old: Side
    new: Side
    orders: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """The method's own, by name: permutations of the gallery's columns, the first is backfilled first."""


def evaluate(
    methods: Mapping[str, Method], relevance: Relevance, orders: Mapping[str, NDArray[np.int64]],
    points: int = POINTS,
) -> dict[str, dict[str, Outcomes]]:  # fmt: skip
    """Method → order → outcomes, in the given orders and in the method's own."""
    return {
        name: outcomes(method.old, method.new, relevance, {**orders, **method.orders}, points)
        for name, method in methods.items()
    }


def ends(old: Side, new: Side, relevance: Relevance) -> tuple[Outcomes, Outcomes]:
    """The two models alone, each with its own queries: outcomes with one point each."""
    order = {"": np.arange(relevance.shape[1])}
    both = outcomes(old, new, relevance, order, points=2)[""]
    return tuple(
        Outcomes(precision=both.precision[:, [k]], before=both.before[:, [k]], queries=both.queries) for k in (0, 1)
    )  # type: ignore[return-value]


def _values(found: Outcomes, metric: str) -> NDArray[np.float64]:
    """Per query and state, [Q', points]."""
    if metric == "mAP":
        return found.precision.astype(np.float64)
    return (found.before < int(metric.partition("@")[2])).astype(np.float64)


def flips(found: Outcomes) -> NDArray[np.float64]:
    """Negative flips, [points]: the share of queries whose first hit is wrong in this state and was right in an earlier
    one (Yan et al. 2021, against the best so far instead of the state before)."""
    right = found.before < 1
    earlier = np.logical_or.accumulate(right, axis=1)
    return np.asarray((earlier & ~right).mean(0))


def summarise(
    found: Sequence[Outcomes], old: Sequence[Outcomes], new: Sequence[Outcomes], *, seed: int = 0
) -> dict[str, Any]:
    """One method in one order, over runs: curves, AUC, relative gain, flips, drops; means over runs.

    `own_gain` is the relative gain with the method's own end in place of the new model alone: the shape of its curve,
    without what a learnt new embedding adds to the end. Both are none where that end is not above the old model.

    Intervals are 95 % percentile intervals over queries: all runs are resampled with the same queries where they share
    them, as they do with one test set, and differ in what was trained.

    Args:
        found, old, new: one per run; `old` and `new` as `ends` gives them.
    """
    queries = found[0].queries
    for one in (*found, *old, *new):
        if not np.array_equal(one.queries, queries):
            raise ConfigError("runs: expected the same queries in all, got other ones")
    weights = _weights(len(queries), seed)
    summary: dict[str, Any] = {"runs": len(found), "queries": len(queries)}
    for metric in METRICS:
        per_run = [
            [weights @ _values(one, metric) for one in run] for run in zip(found, old, new, strict=True)
        ]  # run → curve [R, points], old [R, 1], new [R, 1]
        curves = np.array([curve for curve, _, _ in per_run])  # [runs, R, points]
        before = np.array([value[:, 0] for _, value, _ in per_run])
        after = np.array([value[:, 0] for _, _, value in per_run])
        auc = curves.mean(2)  # [runs, R]
        summary[metric] = {
            "curve": _rounded(curves[:, 0].mean(0)), "auc": _with_interval(auc.mean(0)),
            "auc_per_run": _rounded(auc[:, 0]), "old": float(before[:, 0].mean()), "new": float(after[:, 0].mean()),
            "relative_gain": _with_interval(_share(auc - before, after - before)),
            "own_gain": _with_interval(_share(auc - before, curves[:, :, -1] - before)),
            "start_over_old": _with_interval((curves[:, :, 0] - before).mean(0)),
            "end_over_new": _with_interval((curves[:, :, -1] - after).mean(0)),
            "drop": _drop(curves.mean(0)),
        }  # fmt: skip
    flipped = np.array([flips(one) for one in found])
    summary["negative_flips"] = {
        "curve": _rounded(flipped.mean(0)), "mean": float(flipped[:, 1:].mean()), "most": float(flipped.mean(0).max()),
        "end": float(flipped[:, -1].mean()),
    }  # fmt: skip
    return summary


@lru_cache(maxsize=1)
def _weights(count: int, seed: int) -> NDArray[np.float64]:
    """Of each query in each resample, [1 + RESAMPLES, count]; the first row is the sample itself."""
    share = np.full(count, 1 / count)
    return np.vstack([share, np.random.default_rng([seed, 22]).multinomial(count, share, RESAMPLES) / count])


def _drop(curves: NDArray[np.float64]) -> dict[str, Any]:
    """Violations of monotonicity in a mean curve, [R, points]; the first row is the curve, the others are resamples.

    Each state is held against the best one before it, with a bootstrap interval of the difference at level 0.05 shared
    by all states (Bonferroni); the best state is the curve's own in all resamples.
    """
    states = np.arange(1, curves.shape[1])
    best = np.array([int(curves[0, :k].argmax()) for k in states])
    change = curves[:, states] - curves[:, best]
    upper = np.quantile(change[1:], 1 - LEVEL / 2 / len(states), axis=0)
    return {
        "steps": int((np.diff(curves[0]) < 0).sum()), "most": float(max(0.0, -change[0].min())),
        "significant": int((upper < 0).sum()),
        "significant_most": float(max(0.0, -change[0][upper < 0].min(initial=0.0))),
    }  # fmt: skip


def _share(way: NDArray[np.float64], span: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of means over runs, [runs, R] each, [R]; not a number where there is no span."""
    spans = span.mean(0)
    return np.asarray(way.mean(0) / np.where(spans > ROUNDING, spans, np.nan))


def _with_interval(values: NDArray[np.float64]) -> dict[str, Any]:
    """The first value and a 95 % interval of the others; none for what is not a number."""
    sure, resampled = np.isfinite(values[0]), np.isfinite(values).all()
    interval = [float(v) for v in np.quantile(values[1:], (LEVEL / 2, 1 - LEVEL / 2))] if resampled else None
    return {"value": float(values[0]) if sure else None, "ci95": interval}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [round(float(v), 5) for v in values]
