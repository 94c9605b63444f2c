"""What a synthetic item looks like, and the caption grammar that says so.

A caption names the object first, then what modifies it:

    caption := object ", " [pattern " "] colour ", " size ", " count ", " setting [", " motion]
    e.g.       mug, striped red, small, set of two, on grass, moving left

Naming the object before its colour matters for composition: a decoder that has already written
"red" has learned which objects were red in training, and an unseen pair then loses to that prior.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

OBJECTS = ("ball", "bag", "book", "bottle", "chair", "clock", "lamp", "mug", "shirt", "shoe")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
PATTERNS = ("plain", "striped", "dotted")
SIZES = ("small", "large")
COUNTS = ("single", "set of two", "set of three")
SETTINGS = ("on grass", "on wood", "on sand", "on snow", "on brick", "at night")
MOTIONS = ("moving left", "moving right", "rising", "falling", "growing")

SLOTS: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": COLOURS,
    "pattern": PATTERNS,
    "size": SIZES,
    "count": COUNTS,
    "setting": SETTINGS,
    "motion": MOTIONS,
}


@dataclass(frozen=True, kw_only=True)
class Attributes:
    """One value per slot; `motion` is None for an image."""

    object: str
    colour: str
    pattern: str
    size: str
    count: str
    setting: str
    motion: str | None = None

    def caption(self) -> str:
        """The reference caption."""
        look = self.colour if self.pattern == "plain" else f"{self.pattern} {self.colour}"
        parts = [self.object, look, self.size, self.count, self.setting]
        return ", ".join(parts + ([self.motion] if self.motion else []))

    def slots(self) -> Iterator[tuple[str, str]]:
        """The (slot, value) pairs that are set."""
        for slot in SLOTS:
            if (value := getattr(self, slot)) is not None:
                yield slot, value


_PHRASES = {phrase: (slot, phrase) for slot, phrases in SLOTS.items() for phrase in phrases}


def caption_slots(caption: str) -> frozenset[tuple[str, str]]:
    """Inverse of `Attributes.caption` on its own language; words outside the grammar give nothing.

    A caption without a pattern word reads as `plain`, so that a missing pattern counts as a claim.
    """
    found: set[tuple[str, str]] = set()
    for part in caption.split(", "):
        if part in _PHRASES:
            found.add(_PHRASES[part])
        else:
            found.update(_PHRASES[word] for word in part.split() if word in _PHRASES)
    if found and not any(slot == "pattern" for slot, _ in found):
        found.add(("pattern", "plain"))
    return frozenset(found)


def held_out_pairs(seed: int, per_object: int = 1) -> frozenset[tuple[str, str]]:
    """Object-colour pairs that no training item shows: `per_object` colours of each object.

    Every object keeps its other colours and every colour its other objects, so both words are learnt.
    """
    rng = np.random.default_rng([seed, 1])
    pairs: set[tuple[str, str]] = set()
    for round_ in range(per_object):
        colours = np.resize(rng.permutation(len(COLOURS)), len(OBJECTS))
        for index, colour in enumerate(colours):
            pairs.add((OBJECTS[index], COLOURS[(colour + round_) % len(COLOURS)]))
    return frozenset(pairs)


def all_looks() -> list[tuple[str, str]]:
    """Every (object, colour) pair."""
    return list(product(OBJECTS, COLOURS))
