"""Labelled images for a backbone: folders of classes, splits, random crops and flips."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from sightline.errors import DataError

__all__ = ["Images", "load_classes", "split"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
PADDING = 8  # one eighth of an image's side may be cropped away, as the usual 4 of CIFAR's 32 pixels


@dataclass(frozen=True, kw_only=True)
class Images:
    """Images of one size with one class each."""

    pixels: NDArray[np.uint8]
    """[N, H, W, 3]."""
    labels: NDArray[np.int64]
    """[N], from 0."""

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.shape[-1] != 3 or self.pixels.dtype != np.uint8:
            raise DataError(f"pixels: got {self.pixels.dtype} {self.pixels.shape}, expected uint8 [N, H, W, 3]")
        if self.labels.shape != self.pixels.shape[:1]:
            raise DataError(f"labels: got shape {self.labels.shape}, expected [{len(self.pixels)}]")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> Images:
        return Images(pixels=self.pixels[rows], labels=self.labels[rows])

    def of_classes(self, count: int) -> Images:
        """Those of the first `count` classes."""
        return self.take(np.flatnonzero(self.labels < count))


class Batches:
    """Batches as a network takes them: FP32 [B, 3, H, W] in channels-last order, centred, about −1.7 to 1.7."""

    def __init__(self, images: Images) -> None:
        self.images = images
        height, width = images.pixels.shape[1:3]
        self._margin = max(height, width) // PADDING
        margin = ((0, 0), (self._margin, self._margin), (self._margin, self._margin), (0, 0))
        self._padded = torch.from_numpy(np.pad(images.pixels, margin, mode="reflect"))
        self._height, self._width = height, width

    def plain(self, rows: slice) -> Tensor:
        return _scaled(torch.from_numpy(self.images.pixels[rows]))

    def augmented(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """Rows int64 [B], each cropped at random out of its reflected margins and mirrored half of the time."""
        draw = torch.randint(0, 2 * self._margin + 1, (2, len(rows), 1), generator=generator)
        down, across = torch.arange(self._height), torch.arange(self._width).expand(len(rows), -1)
        mirrored = torch.rand((len(rows), 1), generator=generator) < 0.5
        across = torch.where(mirrored, across.flip(1), across)
        return _scaled(
            self._padded[rows[:, None, None], (draw[0] + down)[:, :, None], (draw[1] + across)[:, None, :]]
        )


def _scaled(pixels: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] → FP32 [B, 3, H, W], channels last as they lie."""
    return pixels.float().sub_(127.5).div_(75.0).permute(0, 3, 1, 2)


def load_classes(root: Path, *, size: int | None = None) -> tuple[Images, Images]:
    """Training and test images of `root`/train/<class>/* and `root`/test/<class>/*; classes in order of their names.

    Args:
        size: pixels of both sides that every image is resized to; without it all must have the same size.
    Raises DataError for a missing folder, a class that only one of the two has, an unreadable file and other sizes.
    """
    folders = {part: root / part for part in ("train", "test")}
    for folder in folders.values():
        if not folder.is_dir():
            raise DataError(f"{root}: expected folders train/<class>/ and test/<class>/, {folder.name}/ is missing")
    train, test = (sorted(f.name for f in folder.iterdir() if f.is_dir()) for folder in folders.values())
    if train != test:
        odd = sorted(set(train) ^ set(test))
        raise DataError(f"{root}: expected the same classes in train/ and test/, one has {', '.join(odd[:5])}")
    found = [_load(folder, train, size) for folder in folders.values()]
    shapes = {images.pixels.shape[1:] for images in found}
    if len(shapes) > 1:
        raise DataError(f"{root}: train/ and test/ have images of sizes {sorted(shapes)}; expected one, or give a size")
    return found[0], found[1]


def _load(folder: Path, classes: list[str], size: int | None) -> Images:
    files = [
        (file, label)
        for label, name in enumerate(classes)
        for file in sorted((folder / name).iterdir()) if file.suffix.lower() in SUFFIXES
    ]  # fmt: skip
    if not files:
        raise DataError(f"{folder}: expected images ({', '.join(SUFFIXES)}) in its class folders, found none")
    pixels = [_read(file, size) for file, _ in files]
    for (file, _), one in zip(files, pixels, strict=True):
        if one.shape != pixels[0].shape:
            raise DataError(f"{file}: is {one.shape}, expected {pixels[0].shape} as the others, or a size to resize to")
    return Images(pixels=np.stack(pixels), labels=np.array([label for _, label in files]))


def _read(file: Path, size: int | None) -> NDArray[np.uint8]:
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
            return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC) if size else image)
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{file}: cannot be read as an image ({error})") from error


def split(labels: NDArray[np.int64], share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to fit on and rows to validate on, `share` of each class drawn by `seed`; both ascending."""
    draw = np.random.default_rng([seed, 11]).random(len(labels))
    order = np.lexsort((draw, labels))  # class by class, at random within one
    _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
    place = np.arange(len(labels)) - np.repeat(first, counts)
    held = place < np.repeat(np.round(share * counts), counts)
    return np.sort(order[~held]), np.sort(order[held])
