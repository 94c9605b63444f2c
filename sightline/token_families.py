"""Token families: what they read of a text, which tokens they make of it, and how they hash them."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Literal
from typing import Annotated as Typed

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sightline.annotation import Annotated

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["HASHED", "KINDS", "LEVELS", "PRIME", "Family", "Kind", "normalise"]

PRIME = 2**61 - 1
LEVELS = 9  # of a word's confidence
Kind = Literal["word", "bigram", "trigram", "subword", "slot", "semantic", "confidence", "sample"]
KINDS: tuple[Kind, ...] = ("word", "bigram", "trigram", "subword", "slot", "semantic", "confidence", "sample")
HASHED: dict[Kind, int] = {"bigram": 2, "trigram": 1, "semantic": 1}  # → digests of a token: of a bigram, of each word
Unit = Literal["word", "pair", "text"]
# What a family reads at a time. What it makes of a word or a pair never depends on the rest of the caption, so that a
# batch needs it once per distinct word or pair.
UNITS: dict[Kind, Unit] = {"word": "word", "bigram": "pair", "trigram": "word", "subword": "word"}
_SEPARATORS = re.compile(r"[^\w]+")


def normalise(caption: str) -> str:
    """NFKC, case folded, everything but letters, digits and `_` to single spaces."""
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", caption).casefold()).strip()


class Family(BaseModel):
    """One family of tokens and its rows: `vocabulary`, or `rows` and `hashes`; `tokenizer` of a subword family."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    vocabulary: tuple[str, ...] | None = None
    rows: Typed[int, Field(gt=0)]
    hashes: tuple[tuple[int, ...], ...] = ()
    """Of each hash a multiplier per digest of a token, and what is added."""
    # Not written where there is none: specs from before there were subwords keep their version.
    tokenizer: Typed[str | None, Field(exclude_if=lambda value: value is None)] = None
    """JSON of a `tokenizers.Tokenizer`; it reads normalised words, one at a time."""

    @model_validator(mode="after")
    def _one_way(self) -> Family:
        if (self.vocabulary is None) == (not self.hashes):
            raise ValueError(f"family {self.kind}: expected either a vocabulary or hashes")
        if self.vocabulary is not None and len(self.vocabulary) != self.rows:
            raise ValueError(f"family {self.kind}: {len(self.vocabulary)} words but {self.rows} rows")
        factors = HASHED.get(self.kind, 1)
        for seeds in self.hashes:
            if len(seeds) != factors + 1 or not (all(0 < a < PRIME for a in seeds[:-1]) and 0 <= seeds[-1] < PRIME):
                raise ValueError(
                    f"family {self.kind}: expected hash seeds of {factors} multipliers 0 < a < p and a summand "
                    f"0 <= b < p, p = 2^61 - 1, got {list(seeds)}; fit the spec again"
                )
        if self.unit == "pair" and not self.hashes:
            raise ValueError(f"family {self.kind}: expected hashes, pairs of words have no vocabulary")
        if (self.kind == "subword") == (self.tokenizer is None):
            raise ValueError(f"family {self.kind}: expected a tokenizer for subword and for no other family")
        if self.tokenizer is not None:
            _ = self._pieces  # refuses JSON that is no tokenizer
        if self.kind == "slot" and self.vocabulary is None:
            raise ValueError("family slot: expected a vocabulary, its phrases are looked for in captions")
        if self.kind == "confidence":
            words = [token.rpartition(" ")[0] for token in (self.vocabulary or ())[::LEVELS]]
            if self.vocabulary != tuple(f"{word} {level}" for word in words for level in range(1, LEVELS + 1)):
                raise ValueError(f"family confidence: expected a vocabulary of `word 1` … `word {LEVELS}` per word")
        return self

    @property
    def unit(self) -> Unit:
        """What the family reads at a time."""
        return UNITS.get(self.kind, "text")

    @cached_property
    def _pieces(self) -> Tokenizer:
        from tokenizers import Tokenizer

        try:
            return Tokenizer.from_str(self.tokenizer or "")
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"family {self.kind}: not a tokenizer: {error}") from error

    @cached_property
    def _phrases(self) -> tuple[frozenset[str], int]:
        """Known phrases, and the words of the longest."""
        known = frozenset(self.vocabulary or ())
        return known, max((phrase.count(" ") + 1 for phrase in known), default=1)

    def of_unit(self, word: str) -> list[str]:
        """Tokens of one word, or of one pair of words."""
        if self.kind == "trigram":
            marked = f" {word} "
            return [marked[i : i + 3] for i in range(len(marked) - 2)]
        if self.kind == "subword":
            return list(self._pieces.encode(word, add_special_tokens=False).tokens)
        return [word]

    def of_text(self, note: Annotated, words: Sequence[str]) -> list[str]:
        """Tokens of a whole text, whose caption has these words."""
        match self.kind:
            case "slot":
                return _longest(words, *self._phrases)
            case "semantic":
                return [" ".join(map(str, note.codes[: i + 1])) for i in range(len(note.codes))]
            case "confidence":
                return [f"{normalise(word)} {level}" for word, level in note.confidences.items()]
            case _:
                texts = (dict.fromkeys(normalise(sample).split()) for sample in note.samples)
                counts = Counter(chain.from_iterable(texts))
                return [f"{word} {count.bit_length() - 1}" for word, count in counts.items()]

    def words_of(self, unit: str, token: str) -> tuple[str, ...]:
        """The words that a token is made of; without any of them it would not be there."""
        match self.kind:
            case "semantic":
                return ()
            case "slot":
                return tuple(token.split())
            case "confidence" | "sample":
                return tuple(token.rpartition(" ")[0].split())
            case _:
                return tuple(unit.split())

    def terms(self, words: Sequence[str]) -> list[NDArray[np.uint64]]:
        """Of a hashed family, per digest of a token: what these words add to the hashes, uint64 [len(words), k] < p."""
        digests = b"".join([hashlib.blake2b(word.encode(), digest_size=8).digest() for word in words])
        x: NDArray[np.uint64] = np.frombuffer(digests, dtype="<u8") % np.uint64(PRIME)
        *factors, summands = zip(*self.hashes, strict=True)
        added = [summands, *[[0] * len(summands)] * (len(factors) - 1)]
        return [
            np.stack([_multiply_mod(x, a, b) for a, b in zip(some, more, strict=True)], axis=1)
            for some, more in zip(factors, added, strict=True)
        ]

    def settle(self, terms: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Sums of tokens' terms, uint64 [n, k] < 2p → rows int64 [n, k], counted from 0."""
        rest = np.minimum(terms, terms - np.uint64(PRIME))  # what falls below 0 wraps to large numbers
        return (rest % np.uint64(self.rows)).astype(np.int64)

    def hashed(self, tokens: Sequence[str]) -> NDArray[np.int64]:
        """Of a hashed family: rows int64 [len(tokens), k], counted from 0."""
        if self.unit != "pair":
            return self.settle(*self.terms(tokens))
        left, right = self.terms([word for token in tokens for word in token.split()])
        return self.settle(left[::2] + right[1::2])


def _multiply_mod(x: NDArray[np.uint64], a: int, b: int) -> NDArray[np.uint64]:
    """(a · x + b) mod p in 64 bits, for a, b, x < p = 2⁶¹ − 1: factors in halves of 31 bits, and 2⁶¹ ≡ 1."""
    low = np.uint64(2**31 - 1)
    x1, x0, a1, a0 = x >> np.uint64(31), x & low, np.uint64(a >> 31), np.uint64(a) & low
    middle = a1 * x0 + a0 * x1  # < 2⁶²; stands for middle · 2³¹
    carried = (middle >> np.uint64(30)) + ((middle & np.uint64(2**30 - 1)) << np.uint64(31))
    whole: NDArray[np.uint64] = (a1 * x1 * np.uint64(2) + carried + a0 * x0 + np.uint64(b)) % np.uint64(PRIME)  # < 2⁶⁴
    return whole


def _longest(words: Sequence[str], known: frozenset[str], longest: int) -> list[str]:
    """Words as phrases, from the left, the longest known phrase first; an unknown word stands for itself."""
    phrases, at = [], 0
    while at < len(words):
        for size in range(min(longest, len(words) - at), 0, -1):
            phrase = " ".join(words[at : at + size])
            if phrase in known or size == 1:
                break
        phrases.append(phrase)
        at += size
    return phrases
