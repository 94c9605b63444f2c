"""Losses over a batch of items in both systems, from similarities ⟨·, ·⟩ of rows of length 1: d = 2 − 2⟨a, b⟩."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CONTRASTS", "contrast", "mixed_contrast", "reverse_distance"]

CONTRASTS = ("old", "new", "independent", "joint")


def reverse_distance(reverse: Tensor, old: Tensor) -> Tensor:
    """RQT: mean squared distance of ψ(φ_n(x)) [B, D_o] to φ_o(x) [B, D_o], a scalar."""
    return (2 - 2 * (reverse * old).sum(1)).mean()


def contrast(kind: str, old: Tensor, new: Tensor, positive: Tensor, negative: Tensor, temperature: float) -> Tensor:
    """Metric-compatible contrastive loss and its ablations, a scalar; an anchor without a positive does not count.

    With s = exp(−d/τ), P and N an anchor's positives and negatives (arXiv 2301.03767; docs/decisions/0010):

        joint         −log Σ_P s^o / (Σ_P s^o + Σ_N (s^o + s^n)) − log Σ_P s^n / (Σ_P s^n + Σ_N (s^o + s^n))
        old           −log Σ_P s^o / (Σ_P s^o + Σ_N s^o)
        new           −log Σ_P s^n / (Σ_P s^n + Σ_N s^n)
        independent   old + new

    Args:
        old, new: ⟨ψ(x_i), φ_o(x_j)⟩ and ⟨ρ(x_i), ρ(x_j)⟩, FP32 [B, B].
        positive, negative: masks, bool [B, B].
        temperature: τ, at least 0.05; below that exp(−4/τ) is no FP32 number any more.
    """
    near = {"old": torch.exp((old - 1) * (2 / temperature)), "new": torch.exp((new - 1) * (2 / temperature))}
    counted = positive.any(1)
    found = {name: (value * positive).sum(1)[counted] for name, value in near.items()}
    negatives = {name: (value * negative).sum(1)[counted] for name, value in near.items()}
    total = old.new_zeros(())
    for name in ("old", "new"):
        if kind in (name, "independent", "joint"):
            against = negatives["old"] + negatives["new"] if kind == "joint" else negatives[name]
            total = total + torch.log1p(against / found[name]).mean()
    return total


def mixed_contrast(old: Tensor, new: Tensor, positive: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Ours: supervised contrastive loss (Khosla et al. 2020, L_out) over a gallery with every item in both versions.

    Returns:
        the loss, a scalar, and what backfilling would gain each item, [B], not differentiable: how much less the
        positive anchors would have to pay for finding it in the new version than in the old.
    """
    scores = torch.cat([old, new], 1) / temperature
    itself = torch.eye(len(old), dtype=torch.bool, device=old.device).repeat(1, 2)
    all_items = scores.masked_fill(itself, -torch.inf).logsumexp(1)
    weight = positive.float()
    counts = weight.sum(1)
    counted = counts > 0
    found = (scores.view(len(old), 2, -1).sum(1) * weight).sum(1)
    loss = (all_items - found / (2 * counts.clamp(min=1)))[counted].mean()
    with torch.no_grad():
        gain = ((new - old) * weight).sum(0) / weight.sum(0).clamp(min=1) / temperature
    return loss, gain
