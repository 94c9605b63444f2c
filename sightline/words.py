"""Which caption words an item has, and how much likelier each is than usual: a linear classifier on the vision tower.

A caption says what is likeliest. The tower knows more: a probability p of every caption word, from its patches'
maxima (SuperClass, Huang et al. 2024). A word's level is how many times its share of the training captions that is, in
thirds above one:

    level = round(3 · clip(p / (rate + 0.01) − 1, 0, 3)),    0 (not said) … 9

Trainer and server call this on the same pooled features. They come out of the tower in FP32, of batches of different
sizes, so a probability that lies within that error of a step between two levels may fall on either side of it.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sightline.errors import ConfigError

__all__ = ["WORDS", "WordHead"]

WORDS = "words.npz"
STEPS, MOST = 3, 3.0  # levels per usual share; usual shares above one that the highest level stands for
SMOOTHING = 0.01  # of the share of words that training hardly saw


@dataclass(frozen=True, kw_only=True, eq=False)
class WordHead:
    """The classifier of one captioner folder (`words.npz`).

    Attributes:
        words: W vocabulary pieces.
        rate: FP32 [W], share of training captions with the word.
        weight, bias: FP32 [W, frames · width] and [W].
        frames: that the classifier reads; an item's frames are repeated or left out, in order, to that many.
    """

    words: tuple[str, ...]
    rate: NDArray[np.float32]
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    frames: int

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> WordHead | None:
        """Read a captioner folder; None where it has no `words.npz`, as checkpoints of other origin.

        Raises:
            ConfigError: the file is damaged, or its arrays do not belong together.
        """
        path = Path(folder) / WORDS
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as held:
                head = cls(
                    words=tuple(map(str, held["words"])), frames=int(held["frames"]),
                    **{name: held[name].astype(np.float32) for name in ("rate", "weight", "bias")},
                )  # fmt: skip
        except (KeyError, ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f"{path}: expected words, rate, weight, bias and frames of a classifier; {error}. Train the captioner "
                "again, or remove the file to serve captions without confidences"
            ) from error
        count, inputs = len(head.words), head.weight.shape[-1] if head.weight.ndim == 2 else 0
        shapes = [head.rate.shape, head.bias.shape, head.weight.shape]
        if head.frames < 1 or not inputs or inputs % head.frames or shapes != [(count,), (count,), (count, inputs)]:
            raise ConfigError(
                f"{path}: {count} words and {head.frames} frames, but rate, bias and weight of {shapes}; expected "
                "[words], [words] and [words, frames · width]"
            )
        return head

    def check(self, width: int) -> None:
        """Raise ConfigError unless it reads pooled features of this width."""
        if width != (own := self.weight.shape[1] // self.frames):
            raise ConfigError(
                f"{WORDS}: made for a vision tower of width {own}, this one has {width}; use the file that was trained "
                "with it"
            )

    def __call__(self, items: Sequence[NDArray[np.float32]]) -> list[dict[str, int]]:
        """Word → level 1 … 9 of each item, in the vocabulary's order; words of level 0 are left out.

        Pieces lose their `▁`, those with other characters than letters and digits are no words, and of two pieces
        that are then the same word the higher level counts.

        Args:
            items: pooled features of each item, FP32 [frames ≥ 1, width].

        Raises:
            ConfigError: features of another width.
        """
        found: list[dict[str, int]] = []
        for pooled in items:
            self.check(pooled.shape[1])
            levels: dict[str, int] = {}
            for at, level in self._levels(pooled):
                word = self.words[at].replace("▁", "")
                if word.isalnum():
                    levels[word] = max(level, levels.get(word, 0))
            found.append(levels)
        return found

    def probabilities(self, pooled: NDArray[np.float32]) -> NDArray[np.float32]:
        """Pooled features of one item, FP32 [frames ≥ 1, width] → p of every word, FP32 [W]."""
        in_order = np.linspace(0, len(pooled) - 1, self.frames).round().astype(np.int64)
        logits = self.weight @ pooled[in_order].reshape(-1) + self.bias
        p: NDArray[np.float32] = 0.5 + 0.5 * np.tanh(logits / 2)
        return p

    def _levels(self, pooled: NDArray[np.float32]) -> list[tuple[int, int]]:
        """(number of the word, level) of the words above level 0."""
        ratio = self.probabilities(pooled) / (self.rate + np.float32(SMOOTHING))
        levels = np.rint(STEPS * np.clip(ratio - 1, 0, MOST)).astype(np.int64)
        return [(int(at), int(levels[at])) for at in np.flatnonzero(levels)]
