"""Two versions of one model on one set of images: train the backbones once, keep their embeddings."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from sightline.errors import ConfigError
from trainer.backfill.backbone import BackboneConfig, embed, train_backbone
from trainer.backfill.images import Images

__all__ = ["FIT", "Version", "train_versions"]

FIT = "fit"
COMPATIBLE = 1.0  # BCT's weight of the old head


@dataclass(frozen=True, kw_only=True)
class Version:
    """One model's embeddings of every part, and the directions of its classes."""

    vectors: Mapping[str, NDArray[np.float32]]
    """Part → [N, D], rows of length 1, in the order of the part's images."""
    head: NDArray[np.float32]
    """[classes, D], rows of length 1."""
    key: str
    """Of the images and everything that the backbone was trained with."""


def train_versions(
    parts: Mapping[str, Images], old: BackboneConfig, new: BackboneConfig, out: Path, *, compatible: bool,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Version]:  # fmt: skip
    """`old` on the first of the classes, `new` on all, and if wanted `bct`: as `new`, but compatible with `old`.

    What an earlier call finished under `out` with the same images and configurations is read; what it left unfinished
    is gone on with.

    Args:
        parts: images by name; backbones are trained on those of `fit` and embed all.
    """
    classes = int(parts[FIT].labels.max()) + 1
    if not (old.classes < classes and new.classes == classes):
        raise ConfigError(
            f"classes: got {old.classes} old and {new.classes} new ones, expected fewer than all and all {classes}"
        )
    if old.dim > new.dim:
        raise ConfigError(f"dim: got {old.dim} old and {new.dim} new, expected at most as many old ones as new")
    data = hashlib.sha256()
    for name, images in parts.items():
        data.update(name.encode() + images.pixels.tobytes() + images.labels.tobytes())

    def key(name: str, config: BackboneConfig, before: str = "") -> str:
        text = json.dumps([data.hexdigest(), asdict(config), before])
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    old_key, bct = key("old", old), replace(new, compatible=COMPATIBLE)
    wanted = [("old", old, old_key), ("new", new, key("new", new))]
    wanted += [("bct", bct, key("bct", bct, old_key))] if compatible else []
    found = {}
    for name, config, own in wanted:
        folder = out / own
        file = folder / "vectors.npz"
        if not file.exists():
            before = train_backbone(parts[FIT], old, out / old_key) if config.compatible else None
            model = train_backbone(parts[FIT].of_classes(config.classes), config, folder, old=before, say=say)
            head = F.normalize(model.head.weight.detach()).cpu().numpy()
            unfinished = folder / "vectors.part.npz"
            np.savez(unfinished, head=head, **{part: embed(model, images) for part, images in parts.items()})
            os.replace(unfinished, file)
        with np.load(file) as arrays:
            vectors = {part: arrays[part] for part in parts}
            found[name] = Version(vectors=vectors, head=arrays["head"], key=own)
    return found
