"""Optimisers for training from scratch on few samples: Muon on the matrices, AdamW on the rest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

WARMUP = 50  # steps


class Optimizer:
    """Muon (Jordan et al. 2024, orthogonalised momentum) for hidden matrices, AdamW elsewhere, cosine schedule.

    Muon reached the same loss in about half of AdamW's steps on the captioner (docs/log.md). A `muon_lr` of 0
    leaves everything to AdamW, which is what fine-tuning a trained checkpoint wants.
    """

    def __init__(self, model: nn.Module, *, lr: float, muon_lr: float, steps: int) -> None:
        trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        hidden = [p for name, p in trainable if muon_lr > 0 and p.ndim == 2 and not _is_table(name)]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in trainable if id(p) not in chosen]
        self._parameters = [p for _, p in trainable]
        self._steps = steps
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
        ]
        if hidden:
            self._optimizers.append(torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.05, momentum=0.95))
        self._base = [o.param_groups[0]["lr"] for o in self._optimizers]

    def step(self, loss: torch.Tensor, step: int) -> None:
        """Backward and one update at position `step` (from 0) of the schedule."""
        scale = min(1.0, (step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * step / self._steps))
        for optimizer, base in zip(self._optimizers, self._base, strict=True):
            optimizer.param_groups[0]["lr"] = base * scale
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        return [o.state_dict() for o in self._optimizers]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.load_state_dict(state)


def _is_table(name: str) -> bool:
    return "embed" in name or "lm_head" in name or name.startswith("head")
