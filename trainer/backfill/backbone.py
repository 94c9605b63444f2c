"""Backbones: images → embeddings, trained as classifiers.

`small` is a residual network for images of some 32 to 72 pixels on CPU cores (docs/backfilling_methods.md has its
rates); `resnet18` and `resnet50` (He et al. 2016) are those of `transformers`, with a 3×3 stem without pooling for
images below 64 pixels. All end in a linear map to the embedding, whose direction is what a gallery keeps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetModel

from sightline.errors import ConfigError
from trainer.backfill.images import Batches, Images

__all__ = ["Backbone", "BackboneConfig", "Head", "embed", "train_backbone"]

ARCHITECTURES = ("small", "resnet18", "resnet50")
SCALE = 16.0  # of the cosines that are a head's logits
SMALL_IMAGE = 64  # pixels


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """One backbone and its training."""

    arch: str = "small"
    width: int = 48
    """Channels of `small`'s first stage; the last has four times as many."""
    dim: int = 128
    classes: int = 100
    epochs: int = 15
    batch: int = 128
    lr: float = 0.2
    weight_decay: float = 5e-4
    compatible: float = 0.0
    """BCT: weight of the loss under the old model's head (Shen et al. 2020); 0 trains independently."""
    bf16: bool = False
    """Autocast to bfloat16, on CPUs with AVX512_BF16 half as fast again and more; the embeddings stay FP32."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arch not in ARCHITECTURES:
            raise ConfigError(f"arch: got {self.arch!r}, expected one of {', '.join(ARCHITECTURES)}")
        for name, low in (("width", 4), ("dim", 2), ("classes", 2), ("epochs", 1), ("batch", 2), ("seed", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {low}")
        if self.lr <= 0 or self.weight_decay < 0 or self.compatible < 0:
            raise ConfigError("lr must be above 0, weight_decay and compatible at least 0")


class Head(nn.Module):
    """Classes by cosine: logits = 16 · ⟨embedding, weight⟩ with both of length 1 (Wang et al. 2017, NormFace).

    Retrieval compares directions, so that is what the classes are told by.
    """

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, dim) / math.sqrt(dim))

    def forward(self, unit: Tensor) -> Tensor:
        """FP32 [B, D] with rows of length 1 → logits FP32 [B, classes]."""
        return SCALE * unit @ F.normalize(self.weight).T


class _Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.skip = nn.Sequential() if (into, stride) == (out, 1) else nn.Sequential(
            nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.main(x) + self.skip(x))


class _Pooled(nn.Module):
    def __init__(self, model: ResNetModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        pooled: Tensor = self.model(pixel_values=pixels).pooler_output
        return pooled


class Backbone(nn.Module):
    """Pixels FP32 [B, 3, H, W] → embeddings FP32 [B, D], rows of length 1; with the head that it is trained by."""

    def __init__(self, config: BackboneConfig, side: int) -> None:
        super().__init__()
        self.config = config
        body, width = _small(config.width) if config.arch == "small" else _resnet(config.arch, side)
        self.body, self.embedding = body, nn.Linear(width, config.dim)
        self.head = Head(config.dim, config.classes)

    def forward(self, pixels: Tensor) -> Tensor:
        device = pixels.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.config.bf16):
            states = self.body(pixels).flatten(1)
        return F.normalize(self.embedding(states.float()))


def _small(width: int) -> tuple[nn.Module, int]:
    stem = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    blocks = [_Residual(width, width, 1), _Residual(width, 2 * width, 2), _Residual(2 * width, 4 * width, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1)), 4 * width


def _resnet(arch: str, side: int) -> tuple[nn.Module, int]:
    kind = ("basic", [64, 128, 256, 512], [2, 2, 2, 2]) if arch == "resnet18" else (
        "bottleneck", [256, 512, 1024, 2048], [3, 4, 6, 3]
    )  # fmt: skip
    model = ResNetModel(ResNetConfig(layer_type=kind[0], hidden_sizes=kind[1], depths=kind[2]))
    if side < SMALL_IMAGE:
        model.embedder.embedder.convolution = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        model.embedder.pooler = nn.Identity()
    return _Pooled(model), kind[1][-1]


def train_backbone(
    images: Images, config: BackboneConfig, out: Path, *, old: Backbone | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Backbone:  # fmt: skip
    """Train on `images` and return the backbone in evaluation mode; its weights and its checkpoints are under `out`.

    SGD with Nesterov momentum, one cycle of the learning rate. An epoch's order and crops depend on (seed, epoch)
    alone: a run that goes on from a checkpoint ends where one that was left alone does. What is finished is loaded.

    Args:
        old: whose head the loss of `config.compatible` is taken under, on images of that head's classes and with the
            first of the new embedding's dimensions, as many as the old one has.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(config.seed)
    model = Backbone(config, images.pixels.shape[1]).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    weights, checkpoint = out / "backbone.pt", out / "checkpoint.pt"
    if weights.exists():
        model.load_state_dict(torch.load(weights, map_location=device))
        return model.eval()
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    steps = len(images) // config.batch
    if steps == 0:
        raise ConfigError(f"batch: got {config.batch}, expected at most the {len(images)} training images")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * steps)
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    batches, labels = Batches(images), torch.from_numpy(images.labels)
    for epoch in range(first, config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 10_000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        model.train()
        total = torch.zeros((), device=device)
        for rows in order[: steps * config.batch].split(config.batch):
            pixels, wanted = batches.augmented(rows, generator).to(device), labels[rows].to(device)
            unit = model(pixels)
            loss = F.cross_entropy(model.head(unit), wanted)
            if old is not None and config.compatible > 0:
                loss = loss + config.compatible * _influence(unit, wanted, old.head)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        say(f"{out.name}: epoch {epoch + 1} of {config.epochs}, loss {total.item() / steps:.4f}")
        _save(
            {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(),
             "epoch": epoch + 1, "config": asdict(config)}, checkpoint,
        )  # fmt: skip
    _save(model.state_dict(), weights)
    checkpoint.unlink(missing_ok=True)
    return model.eval()


def _influence(unit: Tensor, labels: Tensor, old: Head) -> Tensor:
    """BCT's influence loss: cross-entropy under the frozen old head (Shen et al. 2020, equation 6)."""
    known = labels < len(old.weight)
    logits = SCALE * unit[known, : old.weight.shape[1]] @ F.normalize(old.weight.detach()).T
    return F.cross_entropy(logits, labels[known]) if known.any() else unit.new_zeros(())


def _save(state: dict[str, Any], path: Path) -> None:
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


@torch.inference_mode()
def embed(model: Backbone, images: Images, *, batch: int = 512) -> NDArray[np.float32]:
    """Embeddings float32 [N, D] with rows of length 1."""
    device = next(model.parameters()).device
    batches = Batches(images)
    rows = [model(batches.plain(slice(at, at + batch)).to(device)).cpu() for at in range(0, len(images), batch)]
    return torch.cat(rows).numpy()
