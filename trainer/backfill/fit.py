"""Fit the transforms on aligned embeddings of the same items in both systems; the backbones stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sightline.errors import ConfigError, DataError
from trainer.backfill.backbone import SCALE
from trainer.backfill.losses import CONTRASTS, contrast, mixed_contrast, reverse_distance
from trainer.backfill.transforms import Forward, QueryTransform, TwoWay

__all__ = ["Fit", "fit_forward", "fit_query", "fit_two_way", "procrustes", "unit_rows"]

Array = NDArray[np.float32]
LOSSES = ("reverse", *CONTRASTS)
SMOOTHING = 0.1  # of FastFill's labels
GAIN_WEIGHT = 0.1  # of the regression of g, which reads what the rest makes of an item


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a transform is fitted: Adam, cosine schedule; the same seed gives the same transform on one machine."""

    blocks: int = 2
    hidden: int = 256
    epochs: int = 30
    batch: int = 512
    lr: float = 1e-3
    weight_decay: float = 1e-4
    temperature: float = 0.4
    """τ of exp(−d/τ)."""
    reverse_weight: float = 0.0
    """λ of the reverse transform's own distance beside a contrastive loss that moves it."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low in (("blocks", 1), ("hidden", 1), ("epochs", 1), ("batch", 2), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if self.lr <= 0 or self.temperature < 0.05:
            raise ConfigError("lr and temperature: expected a positive number, and 0.05 or more")
        if self.weight_decay < 0 or self.reverse_weight < 0:
            raise ConfigError("weight_decay and reverse_weight: expected at least 0")


def unit_rows(vectors: NDArray[Any], name: str) -> Array:
    """float32 [N, D] with rows of length 1; DataError for another shape, a value that is not finite, a row of zeros."""
    if vectors.ndim != 2 or not np.issubdtype(vectors.dtype, np.floating) or 0 in vectors.shape:
        raise DataError(f"{name}: got {vectors.dtype} {vectors.shape}, expected floating point vectors [N, D]")
    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if bad := np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0))).tolist():
        raise DataError(f"{name}: row {bad[0]} has length {lengths[bad[0], 0]}; expected finite rows that are not 0")
    return (wide / lengths).astype(np.float32)


def procrustes(old: Array, new: Array) -> Array:
    """The R [D_n, D_o] with orthonormal columns that brings `old` nearest to `new`: R oldᵀ ≈ newᵀ (Schönemann 1966).

    As padding `old` with zeros to D_n and taking the orthogonal matrix; D_o may be at most D_n.
    """
    if old.shape[1] > new.shape[1]:
        raise ConfigError(f"old vectors have {old.shape[1]} dimensions, expected at most the new ones' {new.shape[1]}")
    u, _, v = np.linalg.svd(new.T.astype(np.float64) @ old, full_matrices=False)
    return (u @ v).astype(np.float32)


def ridge(old: Array, new: Array, penalty: float = 1e-4) -> tuple[Array, Array]:
    """W [D_o, D_n] and b [D_o] that minimise the mean of |W n + b − o|² + penalty · |W|²."""
    mean_old, mean_new = old.mean(0, dtype=np.float64), new.mean(0, dtype=np.float64)
    centred = new - mean_new
    gram = centred.T @ centred / len(new) + penalty * np.eye(new.shape[1])
    weight = np.linalg.solve(gram, centred.T @ (old - mean_old) / len(new)).T
    return weight.astype(np.float32), (mean_old - weight @ mean_new).astype(np.float32)


def fit_query(
    old: Array, new: Array, labels: NDArray[np.int64] | None, loss: str, fit: Fit, *, learn_new: bool,
    linear: bool = False,
) -> QueryTransform:  # fmt: skip
    """ψ, and ρ where the new embedding may be learnt.

    Args:
        old, new: the same items, rows of length 1, [N, D_o] and [N, D_n].
        labels: [N]; items of one label are each other's positives. Without them an item's only positive is itself.
        loss: `reverse` (RQT) or one of `losses.CONTRASTS`, to which the reverse transform's distance is added with
            its weight.
        learn_new: whether there is a ρ; `reverse` and `old` have nothing to learn it from.
        linear: ψ starts as the ridge regression of the old vectors on the new ones.
    """
    if loss not in LOSSES:
        raise ConfigError(f"loss: got {loss!r}, expected one of {', '.join(LOSSES)}")
    torch.manual_seed(fit.seed)
    module = QueryTransform(
        new.shape[1], old.shape[1], blocks=fit.blocks, hidden=fit.hidden, learn_new=learn_new, linear=linear
    )
    if module.linear is not None:
        weight, bias = ridge(old, new)
        with torch.no_grad():
            module.linear.weight.copy_(torch.from_numpy(weight))
            module.linear.bias.copy_(torch.from_numpy(bias))
    olds, news = torch.from_numpy(old), torch.from_numpy(new)
    classes = None if labels is None else torch.from_numpy(labels)

    def step(rows: Tensor) -> Tensor:
        forward, reverse = module(news[rows])
        distance = reverse_distance(reverse, olds[rows])
        if loss == "reverse":
            return distance
        positive, negative = _pairs(rows, classes)
        found = contrast(loss, reverse @ olds[rows].T, forward @ forward.T, positive, negative, fit.temperature)
        return found + (1.0 if loss == "new" else fit.reverse_weight) * distance

    _train(module, step, len(old), fit)
    return module


def fit_forward(
    old: Array, new: Array, labels: NDArray[np.int64], head: Array, fit: Fit, *, uncertain: bool
) -> Forward:
    """FCT's h (squared error), or FastFill's (uncertain): mean of ½ e^{−s} ℓ + ½ s with ℓ = error + CE_{0.1}.

    Vectors have length 1 here, so the error is the squared distance of h(o) to n, which is the mean over dimensions
    for vectors whose components are of order 1.

    Args:
        head: directions of the new model's classes [classes, D_n], frozen.
    """
    torch.manual_seed(fit.seed)
    module = Forward(old.shape[1], new.shape[1], fit.hidden)
    olds, news, classes = torch.from_numpy(old), torch.from_numpy(new), torch.from_numpy(labels)
    directions = torch.from_numpy(head)

    def step(rows: Tensor) -> Tensor:
        vector, s = module(olds[rows])
        error = (vector - news[rows]).square().sum(1)
        if not uncertain:
            return error.mean()
        logits = SCALE * F.normalize(vector) @ directions.T
        cost = error + F.cross_entropy(logits, classes[rows], label_smoothing=SMOOTHING, reduction="none")
        return (0.5 * torch.exp(-s) * cost + 0.5 * s).mean()

    _train(module, step, len(old), fit)
    return module


def fit_two_way(old: Array, new: Array, labels: NDArray[np.int64], head: Array, fit: Fit) -> TwoWay:
    """Ours: `losses.mixed_contrast` on `transforms.TwoWay`; cross-entropy of ρ(n) and of h(o) under directions of the
    classes, which are learnt from `head` on and dropped afterwards; g by regression on what backfilling would gain.

    Args:
        head: directions of the new model's classes [classes, D_n].
    """
    torch.manual_seed(fit.seed)
    temperature = fit.temperature / 2  # of similarities, as τ is of distances
    module = TwoWay(old.shape[1], new.shape[1], blocks=fit.blocks, hidden=fit.hidden)
    directions = nn.Parameter(torch.from_numpy(head.copy()))
    olds, news, classes = torch.from_numpy(old), torch.from_numpy(new), torch.from_numpy(labels)

    def step(rows: Tensor) -> Tensor:
        forward, both = module.queries(news[rows])
        items, gain = module.old_items(olds[rows])
        positive, _ = _pairs(rows, classes)
        loss, gained = mixed_contrast(both @ items.T, forward @ forward.T, positive, temperature)
        for vectors in (forward, F.normalize(items[:, : module.query.new_dim])):
            logits = vectors @ F.normalize(directions).T / temperature
            loss = loss + F.cross_entropy(logits, classes[rows])
        return loss + GAIN_WEIGHT * F.mse_loss(gain, gained)

    _train(nn.ModuleDict({"module": module, "directions": nn.ParameterList([directions])}), step, len(old), fit)
    return module


def _pairs(rows: Tensor, classes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positives and negatives of each row of a batch, bool [B, B]; by class an item is neither to itself."""
    itself = torch.eye(len(rows), dtype=torch.bool)
    if classes is None:
        return itself, ~itself
    same = classes[rows][:, None] == classes[rows]
    return same & ~itself, ~same


def _train(module: nn.Module, step: Callable[[Tensor], Tensor], count: int, fit: Fit) -> None:
    """Batches in an order of the seed; a rest that fills no batch is left out of that epoch."""
    batch = min(fit.batch, count)
    steps = count // batch
    optimizer = torch.optim.AdamW(module.parameters(), lr=fit.lr, weight_decay=fit.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, fit.epochs * steps)
    generator = torch.Generator().manual_seed(fit.seed)
    module.train()
    for _ in range(fit.epochs):
        for rows in torch.randperm(count, generator=generator)[: steps * batch].split(batch):
            loss = step(rows)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()
