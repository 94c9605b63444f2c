"""What `make bench-backfill` compares methods on, and its image sets: generated ones, folders of classes, emoji in two
drawing styles."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from catalogue.attributes import COLOURS, OBJECTS, PATTERNS, SETTINGS, SIZES, Attributes
from catalogue.render import render_image
from evaluation.backfilling.ranks import Relevance
from sightline.errors import DataError
from trainer.backfill.images import Images, load_classes, split
from trainer.backfill.methods import Embeddings
from trainer.backfill.versions import FIT

__all__ = ["VALIDATION", "Asked", "Case", "ImageSet", "class_folders", "emoji", "generated"]

VALIDATION = 0.1  # of what may be fitted on, of each class where there are classes
STYLES = ("twemoji", "openmoji")  # asked in, found in
EMOJI_TEST, EMOJI_LEAST = 0.3, 10  # share of a subgroup's emoji; emoji that a subgroup must have
EMOJI_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Queries and a gallery by both models; they are one object where one set serves as both."""

    queries: Embeddings
    gallery: Embeddings
    relevance: Relevance


@dataclass(frozen=True, kw_only=True)
class Case:
    """One seed of a set, as vectors by both models, wherever they come from."""

    fit: Embeddings
    validation: Asked
    test: Asked
    head: NDArray[np.float32]
    """Directions of the new model's classes [classes, D_n], rows of length 1."""
    keys: Mapping[str, str]
    """Version → what identifies its vectors, and everything else here beside seed and profile."""
    sizes: Mapping[str, int]
    reference: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Rankings of the test gallery without a model → their mAP and CMC@1."""
    trial: float = 1 / 3
    """Share of a transform's epochs with which settings are tried."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images by part: `fit`, and queries and gallery of validation and test."""

    parts: Mapping[str, Images]
    """`fit`, `validation queries`, `validation gallery`, `test queries`, `test gallery`; where one set serves as both,
    `validation` and `test` alone."""
    classes: int

    def names(self, part: str) -> tuple[str, str]:
        """Of a part's queries and of its gallery."""
        return (part, part) if part in self.parts else (f"{part} queries", f"{part} gallery")


def generated(classes: int, train: int, test: int, size: int) -> ImageSet:
    """Products of the synthetic catalogue; a class is an object in a colour, all else varies.

    Args:
        classes: of the 80 pairs, drawn once and for all; train, test: images per class; size: pixels of both sides.
    """
    pairs = [(one, colour) for one in OBJECTS for colour in COLOURS]
    chosen = np.random.default_rng(7).permutation(len(pairs))[:classes]
    pixels, labels = [], []
    for label, pair in enumerate(chosen):
        for index in range(train + test):
            rng = np.random.default_rng([7, int(pair), index])
            item = Attributes(
                object=pairs[pair][0], colour=pairs[pair][1], pattern=str(rng.choice(PATTERNS)),
                size=str(rng.choice(SIZES)), count="single", setting=str(rng.choice(SETTINGS)),
            )  # fmt: skip
            with Image.open(io.BytesIO(render_image(item, rng))) as image:
                pixels.append(np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)))
            labels.append(label)
    images = Images(pixels=np.stack(pixels), labels=np.array(labels))
    place = np.arange(len(images)) % (train + test)
    return _one_style(images.take(np.flatnonzero(place < train)), images.take(np.flatnonzero(place >= train)), 0)


def class_folders(root: Path, seed: int) -> ImageSet:
    """`root`/train/<class>/* and `root`/test/<class>/*; every test image asks for the others of its class."""
    return _one_style(*load_classes(root), seed)


def _one_style(train: Images, test: Images, seed: int) -> ImageSet:
    fit, held = split(train.labels, VALIDATION, seed)
    parts = {FIT: train.take(fit), "validation": train.take(held), "test": test}
    return ImageSet(parts=parts, classes=int(train.labels.max()) + 1)


def emoji(root: Path, seed: int) -> ImageSet:
    """Emoji of `root`/emoji.csv; a class is a subgroup. Queries are drawn by Twemoji, the gallery by OpenMoji; one is
    fitted on both, of other emoji."""
    table = root / "emoji.csv"
    if not table.is_file():
        raise DataError(f"{table}: is missing; expected emoji.csv with folders {' and '.join(STYLES)} beside it")
    with table.open(newline="", encoding="utf-8") as lines:
        rows = [row for row in csv.DictReader(lines) if row["in_twemoji"] == "1" and not row["skintone"]]
    names, counts = np.unique([row["subgroup"] for row in rows], return_counts=True)
    kept = np.random.default_rng(7).permutation(names[counts >= EMOJI_LEAST]).tolist()  # old ones first
    rows = [row for row in rows if row["subgroup"] in kept]
    labels = np.array([kept.index(row["subgroup"]) for row in rows])
    by_style = [np.stack([_drawn(root / style / f"{row['hexcode']}.png") for row in rows]) for style in STYLES]

    def part(style: int, rows: NDArray[np.int64]) -> Images:
        return Images(pixels=by_style[style][rows], labels=labels[rows])

    train, test = split(labels, EMOJI_TEST, 0)
    fit, held = (train[rows] for rows in split(labels[train], VALIDATION * 2, seed))
    both = [part(style, fit) for style in (0, 1)]
    parts = {
        FIT: Images(
            pixels=np.concatenate([one.pixels for one in both]), labels=np.concatenate([one.labels for one in both])
        ),
        "validation queries": part(0, held), "validation gallery": part(1, held),
        "test queries": part(0, test), "test gallery": part(1, test),
    }  # fmt: skip
    return ImageSet(parts=parts, classes=len(kept))


def _drawn(file: Path) -> NDArray[np.uint8]:
    """On white, uint8 [EMOJI_SIZE, EMOJI_SIZE, 3]."""
    try:
        with Image.open(file) as image:
            drawing = image.convert("RGBA").resize((EMOJI_SIZE, EMOJI_SIZE), Image.Resampling.BICUBIC)
    except OSError as error:
        raise DataError(f"{file}: cannot be read as an image ({error})") from error
    ground = Image.new("RGBA", drawing.size, "white")
    return np.asarray(Image.alpha_composite(ground, drawing).convert("RGB"))
