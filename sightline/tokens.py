"""Caption → categorical ids. Written once, called by the trainer and by the server.

A caption is normalised, split into words, and read by token *families*: word unigrams, word bigrams, character
trigrams. Families own disjoint ranges of rows of one embedding table; row 0 is padding. A family either has a
vocabulary (one row per known token, unknown tokens give nothing) or hashes every token to k rows,

    h_j(x) = ((a_j · x + b_j) mod p) mod rows,    p = 2⁶¹ − 1,

with x the token's first eight BLAKE2b bytes and (a_j, b_j) stored in the spec (multiply-mod hashing with k = 2, as
in OmniSearchSage, arXiv 2404.16260). Summing k rows makes full collisions rare in small tables.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sightline.errors import TokenSpecError

__all__ = ["Family", "TokenSpec", "normalise"]

PRIME = 2**61 - 1
Kind = Literal["word", "bigram", "trigram"]
_SEPARATORS = re.compile(r"[^\w]+")


def normalise(caption: str) -> str:
    """NFKC, case folded, everything but letters, digits and `_` to single spaces."""
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFKC", caption).casefold()).strip()


class Family(BaseModel):
    """One family of tokens and its rows: `vocabulary`, or `rows` and `hashes`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    vocabulary: tuple[str, ...] | None = None
    rows: Annotated[int, Field(gt=0)]
    hashes: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _one_way(self) -> Family:
        if (self.vocabulary is None) == (not self.hashes):
            raise ValueError(f"family {self.kind}: expected either a vocabulary or hashes")
        if self.vocabulary is not None and len(self.vocabulary) != self.rows:
            raise ValueError(f"family {self.kind}: {len(self.vocabulary)} words but {self.rows} rows")
        if any(not 0 < a < PRIME or not 0 <= b < PRIME for a, b in self.hashes):
            raise ValueError(
                f"family {self.kind}: expected hash seeds 0 < a < p and 0 <= b < p, p = 2^61 - 1"
            )
        return self


class TokenSpec(BaseModel):
    """How captions become ids; a JSON document that the ranker and the release name by its `version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    normalisation: Literal["nfkc-casefold-words"] = "nfkc-casefold-words"
    length: Annotated[int, Field(gt=0)]
    families: Annotated[tuple[Family, ...], Field(min_length=1)]

    @classmethod
    def fit(
        cls,
        captions: Iterable[str],
        *,
        families: Sequence[Kind] = ("word", "bigram"),
        length: int = 32,
        min_count: int = 2,
        max_words: int = 200_000,
        rows: int = 4096,
        hashes: int = 2,
        seed: int = 0,
    ) -> TokenSpec:
        """A spec for captions like these: words get a vocabulary, bigrams and trigrams are hashed.

        Args:
            captions: of training items only.
            families: which, in order of priority when a caption has more than `length` ids.
            length: ids per caption.
            min_count: captions that a word must occur in.
            rows: of each hashed family.
            hashes: k, rows per hashed token.
            seed: of the hash coefficients.
        """
        rng = np.random.default_rng([seed, 5])
        counts = Counter(word for caption in captions for word in set(normalise(caption).split()))
        made = []
        for kind in families:
            if kind == "word":
                frequent = sorted((-n, word) for word, n in counts.items() if n >= min_count)
                words = tuple(word for _, word in frequent[:max_words])
                if not words:
                    raise TokenSpecError(
                        f"expected captions with words that occur at least {min_count} times; "
                        f"{len(counts)} different words came. Lower min_count or caption more items"
                    )
                made.append(Family(kind=kind, vocabulary=words, rows=len(words)))
            else:
                seeds = tuple((int(rng.integers(1, PRIME)), int(rng.integers(PRIME))) for _ in range(hashes))
                made.append(Family(kind=kind, rows=rows, hashes=seeds))
        return cls(length=length, families=tuple(made))

    @classmethod
    def load(cls, path: str | Path) -> TokenSpec:
        """Read a spec.

        Raises:
            TokenSpecError: no such file, or not a valid spec; the message names file and field.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise TokenSpecError(f"{path}: expected a token spec; {error.strerror}") from error
        except ValidationError as error:
            raise TokenSpecError(f"{path}: not a token spec of format 1: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the spec as JSON."""
        Path(path).write_text(json.dumps(self.model_dump(mode="json"), ensure_ascii=False, indent=1))

    @cached_property
    def version(self) -> str:
        """12 hex digits of the SHA-256 of the canonical JSON: equal specs have equal versions."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(canonical.encode()).hexdigest()[:12]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each family."""
        return tuple(1 + sum(f.rows for f in self.families[:i]) for i in range(len(self.families)))

    @property
    def rows(self) -> int:
        """Rows of the embedding table, padding row 0 included."""
        return 1 + sum(family.rows for family in self.families)

    def ids_of(self, kind: Kind) -> range:
        """Row ids of one family.

        Raises:
            TokenSpecError: the spec has no such family.
        """
        for start, family in zip(self.starts, self.families, strict=True):
            if family.kind == kind:
                return range(start, start + family.rows)
        raise TokenSpecError(f"no family {kind!r}; this spec has {', '.join(f.kind for f in self.families)}")

    def encode(self, caption: str) -> NDArray[np.int64]:
        """ids int64 [length] of a caption: each id once, families in order, padded with 0.

        A pure function of spec and caption. An empty caption gives zeros.
        """
        ids = np.zeros(self.length, dtype=np.int64)
        found = list(dict.fromkeys(self._rows(normalise(caption))))[: self.length]
        ids[: len(found)] = found
        return ids

    def encode_batch(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """ids int64 [len(captions), length]."""
        ids = np.zeros((len(captions), self.length), dtype=np.int64)
        for row, caption in zip(ids, captions, strict=True):
            row[:] = self.encode(caption)
        return ids

    @cached_property
    def _memory(self) -> list[dict[str, tuple[int, ...]]]:
        """Per family: token → rows. Vocabularies are filled; hashed tokens are remembered as they come."""
        return [
            {word: (start + i,) for i, word in enumerate(family.vocabulary or ())}
            for start, family in zip(self.starts, self.families, strict=True)
        ]

    def _rows(self, text: str) -> Iterator[int]:
        for start, family, memory in zip(self.starts, self.families, self._memory, strict=True):
            for token in _tokens(text, family.kind):
                if (rows := memory.get(token)) is None:
                    if family.vocabulary is not None:
                        continue
                    rows = _hashed(token, family, start)
                    if len(memory) < 1_000_000:
                        memory[token] = rows
                yield from rows


def _tokens(text: str, kind: Kind) -> Iterator[str]:
    words = text.split()
    match kind:
        case "word":
            yield from words
        case "bigram":
            yield from (f"{a} {b}" for a, b in pairwise(words))
        case "trigram":
            for word in words:
                marked = f" {word} "
                yield from (marked[i : i + 3] for i in range(len(marked) - 2))


def _hashed(token: str, family: Family, start: int) -> tuple[int, ...]:
    x = int.from_bytes(hashlib.blake2b(token.encode(), digest_size=8).digest(), "little")
    return tuple(start + (a * x + b) % PRIME % family.rows for a, b in family.hashes)
