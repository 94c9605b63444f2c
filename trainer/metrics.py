"""What is reported: of captions, and of click predictions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import log_loss, roc_auc_score

from catalogue.attributes import caption_slots
from catalogue.movies import movie_slots
from sightline.tokens import normalise
from trainer.behaviour import split_behaviour

Slots = Iterable[tuple[str, str]]


def word_slots(caption: str) -> frozenset[tuple[str, str]]:
    """Every word is a slot of its own: for captions without a grammar."""
    return frozenset(("word", word) for word in normalise(caption).split())


def _with_taste(looks: Callable[[str], Slots]) -> Callable[[str], Slots]:
    """A grammar of what items look like, and of taste words behind it (trainer/behaviour.py)."""

    def slots(caption: str) -> frozenset[tuple[str, str]]:
        rest, taste = split_behaviour(caption)
        return frozenset({*looks(rest), *taste})

    return slots


GRAMMARS: dict[str, Callable[[str], Slots]] = {
    "product": _with_taste(caption_slots),
    "movie": _with_taste(movie_slots),
    "words": _with_taste(word_slots),
}


def grammar_of(record: Mapping[str, Any]) -> Callable[[str], Slots] | None:
    """The grammar that a data set's captions follow; None where they are free text."""
    name = record.get("grammar", "words")
    return None if name == "words" else GRAMMARS[name]


def caption_metrics(
    predicted: Sequence[str], reference: Sequence[str], slots: Callable[[str], Slots]
) -> dict[str, float]:
    """Attribute F1 (micro, over (slot, value) pairs), exact match, and token F1 (mean over captions)."""
    hit = claimed = wanted = 0
    token_f1 = []
    for ours, theirs in zip(predicted, reference, strict=True):
        p, r = set(slots(ours)), set(slots(theirs))
        hit, claimed, wanted = hit + len(p & r), claimed + len(p), wanted + len(r)
        a, b = Counter(normalise(ours).split()), Counter(normalise(theirs).split())
        token_f1.append(2 * (a & b).total() / max(1, a.total() + b.total()))
    return {
        "attribute_f1": 2 * hit / max(1, claimed + wanted),
        "exact_match": float(np.mean([a == b for a, b in zip(predicted, reference, strict=True)])),
        "token_f1": float(np.mean(token_f1)),
        "captions": len(predicted),
    }


def ranking_metrics(label: np.ndarray, score: np.ndarray, user: np.ndarray) -> dict[str, float]:
    """AUC, GAUC, normalised entropy and calibration of predicted click probabilities.

    GAUC is the mean of per-user AUCs weighted by the user's rows, over users with both labels. Normalised
    entropy is log loss over the log loss of the base rate (He et al. 2014). Calibration is mean prediction
    over mean label.

    Args:
        label: {0, 1} [rows].
        score: probabilities [rows].
        user: ids [rows].
    """
    rate = float(label.mean())
    order = np.argsort(user, kind="stable")
    bounds = np.flatnonzero(np.diff(user[order])) + 1
    aucs, weights = [], []
    for rows in np.split(order, bounds):
        if 0 < label[rows].sum() < len(rows):
            aucs.append(roc_auc_score(label[rows], score[rows]))
            weights.append(len(rows))
    return {
        "auc": float(roc_auc_score(label, score)),
        "gauc": float(np.average(aucs, weights=weights)) if aucs else float("nan"),
        "ne": float(log_loss(label, score) / log_loss(label, np.full(len(label), rate))),
        "calibration": float(score.mean() / rate),
        "rows": len(label),
    }


def relative_lift(auc: float, base: float) -> float:
    """AUC lift over a base in per cent of the base's AUC; in a draw of few rows that can be 0 and counts as .001."""
    return 100 * ((auc - base) / max(base, 1e-3))


def lift_interval(
    label: np.ndarray,
    user: np.ndarray,
    base: Sequence[np.ndarray],
    other: Sequence[np.ndarray],
    *,
    item: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    draws: int = 200,
    seed: int = 0,
) -> tuple[float, float]:
    """95 % interval of the relative AUC lift (%) of `other` over `base`: paired bootstrap over users, or two-way.

    With `groups` (ids [rows]), such as the users, AUC is that within groups, as in GAUC.

    A draw takes users with replacement, keeps all their rows, and scores both arms on the same users; arms
    are averaged over their seeds (`base[s]`, `other[s]`: scores [rows]). With `item` (ids [rows]) it takes items
    with replacement, too, and a row counts as often as its user times its item was drawn (the pigeonhole bootstrap of
    Owen 2007, which is conservative): rows of one item share that item's luck.
    """
    arms = [[_WeightedAuc(label, scores, groups) for scores in arm] for arm in (base, other)]
    factors = [np.unique(ids, return_inverse=True)[1] for ids in (user, item) if ids is not None]
    rng = np.random.default_rng([seed, 6])
    lifts = []
    while len(lifts) < draws:
        weight = np.ones(len(label), np.int64)
        for index in factors:
            count = int(index.max()) + 1
            weight = weight * np.bincount(rng.integers(count, size=count), minlength=count)[index]
        a, b = (np.mean([auc(weight) for auc in arm]) for arm in arms)
        if np.isnan(a):
            continue  # a draw without two labels has no AUC
        lifts.append(relative_lift(float(b), float(a)))
    low, high = np.percentile(lifts, [2.5, 97.5])
    return float(low), float(high)


class _WeightedAuc:
    """AUC of one set of scores under many sample weights: sorts once, where scikit-learn sorts every time.

    With `groups` (ids [rows]) the mean of the groups' AUCs, weighted by their rows; without two labels NaN.
    """

    def __init__(self, label: np.ndarray, score: np.ndarray, groups: np.ndarray | None = None) -> None:
        group = np.zeros(len(label), np.int64) if groups is None else np.unique(groups, return_inverse=True)[1]
        self._order = np.lexsort((score, group))
        score, group = score[self._order], group[self._order]
        first = np.concatenate([[True], (np.diff(score) > 0) | (np.diff(group) > 0)])
        self._tie = np.cumsum(first) - 1  # rows of a group with equal scores share a number
        self._group = group[first]
        self._positive = label[self._order] > 0

    def __call__(self, weight: np.ndarray) -> float:
        w = weight[self._order]
        positive = np.bincount(self._tie, w * self._positive)
        negative = np.bincount(self._tie, w * ~self._positive)
        positives, negatives = (np.bincount(self._group, one) for one in (positive, negative))
        below = np.cumsum(negative) - negative / 2 - (np.cumsum(negatives) - negatives)[self._group]
        pairs, won = positives * negatives, np.bincount(self._group, positive * below)
        if not pairs.any():
            return float("nan")
        there = pairs > 0
        return float(np.average(won[there] / pairs[there], weights=(positives + negatives)[there]))


def summary(values: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean over seeds of every metric."""
    return {key: float(np.mean([v[key] for v in values])) for key in values[0]}
