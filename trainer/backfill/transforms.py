"""Networks between two embedding spaces. All take and give rows of length 1 unless they say otherwise."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Forward", "QueryTransform", "TwoWay", "layers"]


def layers(into: int, hidden: int, out: int, blocks: int) -> nn.Sequential:
    """`blocks` times Linear–BatchNorm–ReLU, then Linear: the form of the reverse query transform ψ."""
    widths = [into, *[hidden] * blocks]
    body = [
        part
        for a, b in pairwise(widths)
        for part in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())
    ]
    return nn.Sequential(*body, nn.Linear(widths[-1], out))


class QueryTransform(nn.Module):
    """What a new query vector becomes: ρ(x) for the new gallery and ψ(x) for the old one.

    ψ is `layers`, or with `linear` a linear map + `layers`, which start at zero; ρ(x) = x + `layers`(x), which starts
    as the identity, or is absent: then NEW is x.
    """

    def __init__(
        self, new_dim: int, old_dim: int, *, blocks: int, hidden: int, learn_new: bool, linear: bool = False
    ) -> None:
        super().__init__()
        self.new_dim, self.old_dim = new_dim, old_dim
        self.reverse = layers(new_dim, hidden, old_dim, blocks)
        self.linear = nn.Linear(new_dim, old_dim) if linear else None
        if self.linear is not None:
            nn.init.zeros_(self.reverse[-1].weight)
            nn.init.zeros_(self.reverse[-1].bias)
        self.residual = layers(new_dim, hidden, new_dim, 1) if learn_new else None
        if self.residual is not None:
            nn.init.zeros_(self.residual[-1].weight)
            nn.init.zeros_(self.residual[-1].bias)

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 [B, D_n] of any length → NEW [B, D_n], OLD [B, D_o], rows of length 1."""
        unit = F.normalize(vectors)
        new = unit if self.residual is None else F.normalize(unit + self.residual(unit))
        old = self.reverse(unit)
        return new, F.normalize(old if self.linear is None else self.linear(unit) + old)


class Forward(nn.Module):
    """h: old → new (FCT, Ramanujan et al. 2022), with the scalar uncertainty s of FastFill (Jaeckle et al. 2023).

    Two branches D_o → 2 D_o → 2 D_n, concatenated, → hidden → hidden → D_n. Without side information both branches
    read the old vector.
    """

    def __init__(self, old_dim: int, new_dim: int, hidden: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Sequential(layers(old_dim, 2 * old_dim, 2 * new_dim, 1), nn.BatchNorm1d(2 * new_dim), nn.ReLU())
            for _ in range(2)
        )
        self.trunk = nn.Sequential(*layers(4 * new_dim, hidden, hidden, 1), nn.BatchNorm1d(hidden), nn.ReLU())
        self.vector, self.uncertainty = nn.Linear(hidden, new_dim), nn.Linear(hidden, 1)

    def forward(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 [B, D_o] → vectors [B, D_n] of any length, uncertainty s [B]."""
        states = self.trunk(torch.cat([branch(old) for branch in self.branches], 1))
        return self.vector(states), self.uncertainty(states).squeeze(1)


class TwoWay(nn.Module):
    """Ours: the similarity of a new query q and an item that is not backfilled, from both directions,

        α(o) ⟨ρ(q), h(o)⟩ + β(o) ⟨ψ(q), o⟩ + γ(o),

    and of one that is, ⟨ρ(q), ρ(n)⟩. Weights α, β > 0 and offset γ are the item's own: an item about which its old
    vector says little is told by it to rank neither high nor low. g(o) is the expected gain of backfilling it.
    As vectors the first is ⟨(ρ(q), ψ(q), 1), (α h, β o, γ)⟩, so a gallery needs nothing but inner products.
    """

    def __init__(self, old_dim: int, new_dim: int, *, blocks: int, hidden: int) -> None:
        super().__init__()
        self.query = QueryTransform(new_dim, old_dim, blocks=blocks, hidden=hidden, learn_new=True)
        self.item = layers(old_dim, 2 * hidden, new_dim + 4, blocks)

    def old_items(self, old: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 [B, D_o] → gallery rows (α h, β o, γ) [B, D_n + D_o + 1], expected gains [B]."""
        found = self.item(old)
        h = F.normalize(found[:, :-4])
        alpha, beta = F.softplus(found[:, -4:-2]).unbind(1)
        return torch.cat([alpha[:, None] * h, beta[:, None] * old, found[:, -2:-1]], 1), found[:, -1]

    def queries(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """FP32 [B, D_n] → ρ(q) [B, D_n] for the new gallery, (ρ(q), ψ(q), 1) [B, D_n + D_o + 1] for the old one."""
        forward, reverse = self.query(new)
        return forward, torch.cat([forward, reverse, torch.ones_like(forward[:, :1])], 1)
