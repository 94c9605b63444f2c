"""Every method of the comparison: fitted on one part's embeddings, and what it makes of queries and a gallery.

A method is two systems, one for items that are not backfilled and one for those that are
(`evaluation.backfilling.Method`); equations and sources are in docs/backfilling_methods.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from evaluation.backfilling.curves import Method
from evaluation.backfilling.orders import descending, spread
from evaluation.backfilling.ranks import Side
from sightline.errors import ConfigError
from trainer.backfill.fit import Fit, fit_forward, fit_query, fit_two_way, procrustes
from trainer.backfill.query import apply_query

__all__ = ["GRIDS", "METHODS", "Embeddings", "Fitted", "farthest_order", "popularity_order"]

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """One part's embeddings by both models, rows of length 1, and its labels."""

    old: Array
    new: Array
    labels: NDArray[np.int64]
    bct: Array | None = None
    """By the compatible model, for BCT alone."""


Fitted = Callable[[Embeddings, Embeddings], Method]
"""Queries, gallery → the method's two systems on them."""


def _padded(old: Array, width: int) -> Array:
    return np.pad(old, ((0, 0), (0, width - old.shape[1])))


def _no_backfill(*_: Any) -> Fitted:
    def apply(q: Embeddings, g: Embeddings) -> Method:
        side = Side(queries=q.old, gallery=g.old)
        return Method(old=side, new=side)

    return apply


def _hard_switch(*_: Any) -> Fitted:
    """The new query against both versions as if they were one space: old vectors are padded with zeros."""
    return lambda q, g: Method(
        old=Side(queries=q.new, gallery=_padded(g.old, g.new.shape[1])), new=Side(queries=q.new, gallery=g.new)
    )


def _bct(*_: Any) -> Fitted:
    """The same switch to a model that was trained for it."""

    def apply(q: Embeddings, g: Embeddings) -> Method:
        if q.bct is None or g.bct is None:
            raise ConfigError("BCT: expected embeddings of the compatible model, got none")
        return Method(
            old=Side(queries=q.bct, gallery=_padded(g.old, g.bct.shape[1])), new=Side(queries=q.bct, gallery=g.bct)
        )

    return apply


def _rank_merge(*_: Any) -> Fitted:
    return lambda q, g: Method(
        old=Side(queries=q.old, gallery=g.old), new=Side(queries=q.new, gallery=g.new)
    )


def _procrustes(on: Embeddings, head: Array, fit: Fit) -> Fitted:
    rotation = procrustes(on.old, on.new)
    return lambda q, g: Method(
        old=Side(queries=q.new, gallery=g.old @ rotation.T), new=Side(queries=q.new, gallery=g.new)
    )


def _forward(on: Embeddings, head: Array, fit: Fit, *, uncertain: bool) -> Fitted:
    module = fit_forward(on.old, on.new, on.labels, head, replace(fit, hidden=2 * fit.hidden), uncertain=uncertain)

    def apply(q: Embeddings, g: Embeddings) -> Method:
        with torch.inference_mode():
            vectors, s = module(torch.from_numpy(g.old))
        return Method(
            old=Side(queries=q.new, gallery=F.normalize(vectors).numpy()), new=Side(queries=q.new, gallery=g.new),
            orders={"uncertainty": descending(s.double().numpy())} if uncertain else {},
        )  # fmt: skip

    return apply


def _query(on: Embeddings, head: Array, fit: Fit, *, loss: str, learn_new: bool) -> Fitted:
    module = fit_query(on.old, on.new, on.labels, loss, fit, learn_new=learn_new)

    def apply(q: Embeddings, g: Embeddings) -> Method:
        (q_new, q_old), (g_new, _) = apply_query(module, q.new), apply_query(module, g.new)
        return Method(old=Side(queries=q_old, gallery=g.old), new=Side(queries=q_new, gallery=g_new))

    return apply


def _forward_learnt(on: Embeddings, head: Array, fit: Fit) -> Fitted:
    """FastFill towards MCL's ρ instead of the new model's own embedding: a control that has the same end as MCL."""
    module = fit_query(on.old, on.new, on.labels, "joint", fit, learn_new=True)

    def learnt(one: Embeddings) -> Embeddings:
        return replace(one, new=apply_query(module, one.new)[0])

    target = learnt(on)
    apply = _forward(target, _class_means(target.new, on.labels), fit, uncertain=True)
    return lambda q, g: apply(learnt(q), learnt(g))


def _two_way(on: Embeddings, head: Array, fit: Fit) -> Fitted:
    module, means = fit_two_way(on.old, on.new, on.labels, head, fit), _class_means(on.old, on.labels)

    def apply(q: Embeddings, g: Embeddings) -> Method:
        with torch.inference_mode():
            q_new, q_old = module.queries(torch.from_numpy(q.new))
            g_new, _ = module.queries(torch.from_numpy(g.new))
            g_old, gain = module.old_items(torch.from_numpy(g.old))
        gains, clusters = gain.double().numpy(), (g.old @ means.T).argmax(1)
        return Method(
            old=Side(queries=q_old.numpy(), gallery=g_old.numpy()),
            new=Side(queries=q_new.numpy(), gallery=g_new.numpy()),
            orders={"uncertainty": descending(gains), "spread": spread(gains, clusters)},
        )  # fmt: skip

    return apply


Make = Callable[[Embeddings, Array, Fit], Fitted]


def _of(make: Callable[..., Fitted], **options: Any) -> Make:
    return lambda on, head, fit: make(on, head, fit, **options)


METHODS: Mapping[str, Make] = {
    "no backfill": _no_backfill,
    "hard switch": _hard_switch,
    "BCT": _bct,
    "Procrustes": _procrustes,
    "FCT": _of(_forward, uncertain=False),
    "FastFill": _of(_forward, uncertain=True),
    "DRM": _rank_merge,
    "RQT": _of(_query, loss="reverse", learn_new=False),
    "MCL, old alone": _of(_query, loss="old", learn_new=False),
    "MCL, new alone": _of(_query, loss="new", learn_new=True),
    "MCL, independent": _of(_query, loss="independent", learn_new=True),
    "MCL, frozen new": _of(_query, loss="joint", learn_new=False),
    "MCL": _of(_query, loss="joint", learn_new=True),
    "FastFill, learnt new": _forward_learnt,
    "two-way": _two_way,
}
"""Name → (the part to fit on, directions of the new model's classes, how to fit) → the method."""
_TEMPERATURES = tuple({"temperature": value} for value in (0.1, 0.2, 0.4))
_EPOCHS = tuple({"epochs": value} for value in (10, 30))
GRIDS: Mapping[str, tuple[Mapping[str, Any], ...]] = {
    "FCT": _EPOCHS, "FastFill": _EPOCHS, "RQT": _EPOCHS,
    **{name: _TEMPERATURES for name in METHODS if name.startswith("MCL")},
    "FastFill, learnt new": _TEMPERATURES, "two-way": _TEMPERATURES,
}  # fmt: skip
"""Method → the settings among which the validation part chooses."""


def _class_means(vectors: Array, labels: NDArray[np.int64]) -> Array:
    """Directions of the classes' means, [classes, D]."""
    means = np.stack([vectors[labels == one].mean(0) for one in np.unique(labels)])
    return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True), np.float32)


def farthest_order(old: Array, fitted: Embeddings) -> NDArray[np.int64]:
    """Gallery items farthest from the nearest class mean of the fitted old vectors first (arXiv 2509.16664 takes the
    mean of an item's own class, which a gallery does not know)."""
    return descending(-(old @ _class_means(fitted.old, fitted.labels).T).max(1))


def popularity_order(old: Array, asked: Array, nearest: int = 10) -> NDArray[np.int64]:
    """Items that are most often among the old system's first ten answers to the queries `asked` first; among equally
    popular ones the earlier."""
    top = np.concatenate([
        np.argpartition(-(asked[at : at + 512] @ old.T), nearest - 1, axis=1)[:, :nearest].ravel()
        for at in range(0, len(asked), 512)
    ])  # fmt: skip
    return descending(np.bincount(top, minlength=len(old)))
