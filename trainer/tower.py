"""What the vision tower is taught with before it meets the decoder: a classifier of caption words on it, a network that
teaches it, masked pictures; and where its weights start."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from trainer.captioner_data import Pixels

__all__ = ["Convolutions", "Masked", "Patches", "Words", "start_tower"]


class Words(nn.Module):
    """Which caption words an item has, from its frames in order; a picture counts as a still video."""

    def __init__(self, body: nn.Module, width: int, words: int, frames: int) -> None:
        super().__init__()
        self.body, self.frames = body, frames
        self.head = nn.Linear(frames * width, words)

    def forward(self, pixels: Tensor, frames: int) -> Tensor:
        """FP32 [B · frames, 3, H, W] → logits FP32 [B, words]."""
        pooled = self.body(pixels).unflatten(0, (-1, frames))  # [B, frames, width]
        in_order = torch.linspace(0, frames - 1, self.frames).round().long()
        logits: Tensor = self.head(pooled[:, in_order].flatten(1))
        return logits


class Masked(nn.Module):
    """Simple masked image modelling (SimMIM, Xie et al. 2022): a learnt vector stands for some patches, and a linear
    map of the tower's states has to tell their pixels."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        config = model.config.vision_config
        self.tower, self.size = model.model.vision_tower, config.patch_size
        self.patches = (config.image_size // config.patch_size) ** 2
        self.token = nn.Parameter(torch.zeros(config.hidden_size))
        self.head = nn.Linear(config.hidden_size, 3 * self.size**2)

    def forward(self, pixels: Tensor, masked: Tensor) -> Tensor:
        """FP32 [N, 3, H, W], bool [N, patches] → mean absolute error on the masked patches, a scalar."""

        def replaced(_: nn.Module, __: Any, found: Tensor) -> Tensor:  # [N, width, rows, columns]
            hidden = masked.unflatten(1, found.shape[2:]).unsqueeze(1)
            return torch.where(hidden, self.token[:, None, None], found)

        with _embeddings(self.tower).patch_embedding.register_forward_hook(replaced):
            states = self.tower(pixel_values=pixels).last_hidden_state[:, 1:]
        wanted = F.unfold(pixels, self.size, stride=self.size).transpose(1, 2)
        lost: Tensor = (self.head(states) - wanted)[masked].abs().mean()
        return lost


class Patches(nn.Module):
    """The vision tower, max-pooled over patches: pixels [N, 3, H, W] → [N, width]."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower

    def forward(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self.tower(pixel_values=pixels).last_hidden_state[:, 1:].amax(1)  # without the class token
        return pooled


class Convolutions(nn.Sequential):
    """A small residual network (He et al. 2016): pixels [N, 3, H, W] → [N, 128].

    On a few thousand natural pictures it learns what a transformer from scratch does not, and can teach it.
    """

    width = 128

    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 32, 5, 2, 2, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
        blocks = [_Residual(32, 32), _Residual(32, 64), _Residual(64, self.width)]
        super().__init__(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3))


class _Residual(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(into, out, 3, 2, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip = nn.Conv2d(into, out, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.skip(x))


@torch.no_grad()
def start_tower(model: LlavaForConditionalGeneration, pixels: Pixels, rows: np.ndarray, seed: int) -> None:
    """Data-dependent start of the vision tower: whitened patch components and 2-D sinusoidal positions.

    Small ViTs spend most of a short training on finding edge filters and the grid; both can be given.
    """
    tower = model.model.vision_tower
    config = model.config.vision_config
    width, patch = config.hidden_size, config.patch_size
    chosen = np.random.default_rng([seed, 4]).choice(rows, min(len(rows), 2000), replace=False)
    x = pixels.normalised(torch.cat([pixels.batch(group)[:, :1] for group in pixels.by_length(chosen)]))
    patches = F.unfold(x, patch, stride=patch).transpose(1, 2).flatten(0, 1)  # [n, 3 · patch²]
    values, vectors = torch.linalg.eigh(torch.cov(patches.T))
    k = min(width, len(values))
    scale = (values[-k:] + 1e-3 * values[-1]).rsqrt()
    embeddings = _embeddings(tower)
    embeddings.patch_embedding.weight[:k] = (vectors[:, -k:] * scale).T.unflatten(1, (3, patch, patch))

    side = config.image_size // patch
    frequency = 1e4 ** (-torch.arange(width // 4) / (width // 4))
    row, column = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [v.reshape(-1, 1) * frequency for v in (column, row)]
    waves = torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)
    embeddings.position_embedding.weight[1:, : waves.shape[1]] = 0.5 * waves


def _embeddings(tower: nn.Module) -> Any:
    return (tower.vision_model if hasattr(tower, "vision_model") else tower).embeddings
