"""Media → pixels in memory, captions → targets, and the batches that training draws from them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from sightline.errors import MediaError
from sightline.media import MediaSpec, decode, resize
from sightline.prompt import CaptionPrompt
from sightline.schema import MediaReader
from trainer.behaviour import split_behaviour

log = logging.getLogger(__name__)

IGNORE = -100  # a position without a target
COLOUR_WORDS = (
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey", "gray",
    "teal", "cyan", "magenta", "violet", "golden", "silver", "beige",
)  # fmt: skip


class Pixels:
    """Frames of many items: uint8 [frames, H, W, 3], and where each item's begin.

    Items without media, and items whose media cannot be used (logged with the reason), are left out of `ids`.
    """

    def __init__(self, reader: MediaReader, item_ids: Sequence[int], spec: MediaSpec) -> None:
        frames: list[np.ndarray] = []
        self.ids: list[int] = []
        for item_id in tqdm(item_ids, desc="decode", unit="item", mininterval=1):
            data = reader[item_id]
            if data is None:
                continue
            try:
                frames.append(resize(decode(data, spec), spec))
                self.ids.append(item_id)
            except MediaError as error:
                log.warning("item %d has no usable media: %s", item_id, error.reason)
        self.counts = np.array([len(f) for f in frames], dtype=np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.frames = np.concatenate(frames) if frames else np.zeros((0, *spec.size, 3), np.uint8)
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.ids)

    def by_length(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Rows with equal numbers of frames, one group per number."""
        for count in np.unique(self.counts[rows]):
            yield rows[self.counts[rows] == count]

    def batch(self, rows: np.ndarray) -> Tensor:
        """FP32 [B, n, 3, H, W] in [0, 1]: the n frames of rows of equal length."""
        index = self.starts[rows][:, None] + np.arange(self.counts[rows[0]])
        return torch.from_numpy(self.frames[index]).permute(0, 1, 4, 2, 3).float() / 255

    def normalised(self, x: Tensor) -> Tensor:
        """[B, n, 3, H, W] in [0, 1] → [B · n, 3, H, W] as the vision tower wants it."""
        return ((x - self._mean) / self._std).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What training may do to a picture without making its caption wrong.

    `colour_mix`: share of pictures whose channels are mixed at random. Their caption's colour words are then
    no targets. A model that has seen every object in every colour cannot learn "a mug is never red" from a
    catalogue without red mugs, which is what makes unseen combinations come out right (docs/log.md).
    """

    shift: int = 2  # pixels
    colour_mix: float = 0.35
    flip: bool = False  # mirror half of the batches; wrong where captions say left and right

    def __call__(self, x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """x FP32 [B, n, 3, H, W] → the same shape, and bool [B]: are the colours still true?"""
        b, n, _, h, w = x.shape
        if self.flip and rng.uniform() < 0.5:
            x = x.flip(-1)
        if self.shift:
            s = self.shift
            padded = F.pad(x.flatten(0, 1), (s, s, s, s), mode="replicate").unflatten(0, (b, n))
            offset = rng.integers(0, 2 * s + 1, (b, 2))
            x = torch.stack([padded[i, :, :, r : r + h, c : c + w] for i, (r, c) in enumerate(offset)])
        mixed = torch.from_numpy(rng.uniform(size=b) < self.colour_mix)
        mix = torch.from_numpy(rng.dirichlet([0.5, 0.5, 0.5], (b, 3)).astype(np.float32))
        mix = torch.where(mixed[:, None, None], mix, torch.eye(3))
        return torch.einsum("bij,bnjhw->bnihw", mix, x), ~mixed


class Targets:
    """Reference captions as padded ids int64 [items, T]: caption, end, then IGNORE.

    Where some captions end in taste words (trainer/behaviour.py), those of the others are unknown: neither their words
    nor where their captions end are targets. A word that captions have of looks, too, counts as one of looks.
    """

    def __init__(self, captions: Sequence[str], tokenizer: Tokenizer, end_id: int) -> None:
        rows = [[*e.ids, end_id] for e in tokenizer.encode_batch(list(captions), add_special_tokens=False)]
        self.length = max(map(len, rows), default=1)
        self.ids = torch.full((len(rows), self.length), IGNORE)
        for row, ids in enumerate(rows):
            self.ids[row, : len(ids)] = torch.tensor(ids)
        colours = [
            e.ids for e in tokenizer.encode_batch([f" {c}" for c in COLOUR_WORDS], add_special_tokens=False)
        ]
        whole = torch.tensor([ids[0] for ids in colours if len(ids) == 1], dtype=torch.int64)
        self.is_colour = torch.isin(self.ids, whole)
        words = torch.bincount(self.ids[self.ids >= 0])
        words[end_id] = 0
        self.sides = any(side in caption.split() for caption in captions for side in ("left", "right"))
        self.words = torch.nonzero(words >= 5).flatten()  # ids frequent enough to be a class, int64 [W]
        self.word_is_colour = torch.isin(self.words, whole)
        looks = [split_behaviour(caption)[0] for caption in captions]
        ends = torch.tensor([len(e.ids) for e in tokenizer.encode_batch(looks, add_special_tokens=False)])
        self._of_taste = (torch.arange(self.length) >= ends[:, None]) & (self.ids != end_id)
        self._has_taste = torch.tensor([a != b for a, b in zip(captions, looks, strict=True)], dtype=torch.bool)
        self._end_unknown = (self.ids == end_id) & ~self._has_taste[:, None] & self._has_taste.any()
        self.word_is_taste = ~torch.isin(self.words, self.ids[~self._of_taste])

    def labels(self, rows: np.ndarray, true_colours: Tensor) -> Tensor:
        """int64 [B, T]; colour words of pictures whose colours were changed are IGNORE, unknown ends, too."""
        unknown = (self.is_colour[rows] & ~true_colours[:, None]) | self._end_unknown[rows]
        return self.ids[rows].masked_fill(unknown, IGNORE)

    def bag(self, rows: np.ndarray) -> Tensor:
        """FP32 [B, W]: which of `words` the caption has."""
        there = self.ids[rows][:, :, None] == self.words
        return (there & (self._of_taste[rows][:, :, None] == self.word_is_taste)).any(1).float()

    def known(self, rows: np.ndarray, true_colours: Tensor) -> Tensor:
        """bool [B, W]: of which of `words` `bag` can tell: not of colours that were changed, nor of unknown taste."""
        colours = true_colours[:, None] | ~self.word_is_colour
        return colours & (self._has_taste[rows][:, None] | ~self.word_is_taste)


def model_inputs(
    prompt: CaptionPrompt, image_tokens: int, labels: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(input_ids int64 [B, L + T], labels int64 [B, L + T]) of prompt followed by caption.

    Args:
        labels: int64 [B, T], what to learn.
        ids: int64 [B, T], what to read; IGNORE is padding and never attended by a target before it.
    """
    head = torch.from_numpy(prompt.token_ids(image_tokens).astype(np.int64)).expand(len(ids), -1)
    read = ids.masked_fill(ids == IGNORE, prompt.pad_id)
    silent = torch.full_like(head, IGNORE)
    return torch.cat([head, read], 1), torch.cat([silent, labels], 1)
