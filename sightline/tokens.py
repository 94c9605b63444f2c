"""Caption → categorical ids. Written once, called by the trainer and by the server.

A text is a caption, with or without fields behind it (sightline/annotation.py). Token *families* read it:

    family       reads        tokens                                            rows
    word         words        every word                                        vocabulary
    bigram       word pairs   two neighbouring words                            hashed
    trigram      words        three characters of a word, its ends marked       hashed
    subword      words        pieces of a Hugging Face tokenizer, in the spec   vocabulary
    slot         the text     attribute phrases: longest known phrase first     vocabulary
    semantic     field s      code₁; code₁ code₂; … (arXiv 2504.02137)          hashed
    confidence   fields c     word and level of its confidence, 1 … 9           vocabulary
    sample       fields x     word and how many samples have it: 1, 2–3, 4–7…   vocabulary

Words are those of the normalised caption. Families own disjoint ranges of rows of one embedding table; row 0 is
padding. A family either has a vocabulary (one row per known token, unknown tokens give nothing) or hashes every token
to k rows,

    h_j(x)    = ((a_j · x + b_j) mod p) mod rows,    p = 2⁶¹ − 1,
    h_j(x, y) = ((a_j · x + a'_j · y + b_j) mod p) mod rows    of a pair of words,

with x the first eight BLAKE2b bytes of the token or word, and the multipliers and b_j stored in the spec (multiply-mod
hashing with k = 2, as in OmniSearchSage, arXiv 2404.16260; of pairs, its form for vectors, Carter and Wegman 1979).
Summing k rows makes full collisions rare in small tables.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated as Typed
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sightline import token_batch
from sightline.annotation import Annotated
from sightline.errors import TokenSpecError
from sightline.token_families import HASHED, KINDS, LEVELS, PRIME, Family, Kind, normalise

__all__ = ["KINDS", "Family", "FamilyStatistics", "Kind", "Statistics", "Token", "TokenSpec", "normalise"]

MEMORY = 262_144  # tokens whose hashes a family remembers
PHRASE_WORDS = 3  # of phrases found by frequency


class Token(NamedTuple):
    """One token of a caption and the rows that it has in the table; none if it is not in the vocabulary."""

    kind: Kind
    text: str
    words: tuple[str, ...]
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FamilyStatistics:
    """What one family does with captions. Shares are of 1; of nothing they are 0."""

    rows: int
    used_rows: int
    """Rows that some caption has."""
    distinct: int
    """Different tokens."""
    token_coverage: float
    """Share of tokens, as often as they occur, that have a row."""
    caption_coverage: float
    """Share of captions with at least one row."""
    ids: float
    """Different rows per caption, before the cut at the spec's length."""
    full_collisions: float
    """Hashed: share of distinct tokens whose set of rows is that of another token as well. Vocabularies have none."""
    partial_collisions: float
    """Hashed: share of distinct tokens that have at least one row in common with another."""
    truncated: float
    """Share of captions that lose rows of this family at the spec's length."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """A spec, held against captions."""

    captions: int
    length: int
    truncated: float
    """Share of captions with more ids than `length`."""
    families: dict[Kind, FamilyStatistics]


class TokenSpec(BaseModel):
    """How captions become ids; a JSON document that the ranker and the release name by its `version`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    normalisation: Literal["nfkc-casefold-words"] = "nfkc-casefold-words"
    length: Typed[int, Field(gt=0)]
    families: Typed[tuple[Family, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _once(self) -> TokenSpec:
        if len({family.kind for family in self.families}) < len(self.families):
            raise ValueError(f"families {', '.join(f.kind for f in self.families)}: expected each once")
        return self

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
        slots: Callable[[str], Iterable[tuple[str, str]]] | None = None,
        min_pmi: float = 0.3,
        tokenizer: str | None = None,
        pieces: int = 1024,
    ) -> TokenSpec:
        """A spec for captions like these. Bigrams, trigrams and semantic ids are hashed, the others get a vocabulary.

        Args:
            captions: texts, annotated or not, of training items only.
            families: which, in order of priority when a caption has more than `length` ids.
            length: ids per caption.
            min_count: captions that a token of a vocabulary must occur in.
            max_words: of each vocabulary, the most frequent.
            rows: of each hashed family.
            hashes: k, rows per hashed token.
            seed: of the hash coefficients.
            slots: grammar of the data set, caption → (slot, value) pairs: phrases of `slot` are its values. Without
                one they are the words and those runs of up to three words that are more than their parts: wherever
                a run is split, log(P(run) / (P(left) · P(right))) ≥ `min_pmi`, P being shares of captions.
            tokenizer: JSON of a `tokenizers.Tokenizer` (`to_str()`, `tokenizer.json`) for `subword`; without one,
                byte pairs are learnt from the captions' words, at most `pieces`.

        Raises:
            TokenSpecError: a vocabulary would be empty; an unknown family, or one twice; `tokenizer` is none.
        """
        rng = np.random.default_rng([seed, 5])
        texts = list(captions)
        notes = [Annotated.parse(text) for text in texts]
        words = [normalise(note.caption).split() for note in notes]
        made = []
        for kind in families:
            if kind in HASHED:
                lows = (*[1] * HASHED[kind], 0)
                seeds = tuple(tuple(int(rng.integers(low, PRIME)) for low in lows) for _ in range(hashes))
                made.append(Family(kind=kind, rows=rows, hashes=seeds))
                continue
            if kind not in KINDS:
                raise TokenSpecError(f"family {kind!r}: expected some of {', '.join(KINDS)}")
            own = (tokenizer or _learn_pieces(words, pieces)) if kind == "subword" else None
            try:
                every = [f" {level}" for level in range(1, LEVELS + 1)] if kind == "confidence" else [""]
                draft = Family(kind=kind, vocabulary=tuple(every), rows=len(every), tokenizer=own)
            except ValidationError as error:
                raise TokenSpecError(f"family {kind} cannot be fitted: {error}") from error
            if kind == "slot":
                counts = _count_values(notes, slots) if slots else _count_phrases(words, min_count, min_pmi)
            elif kind == "confidence":
                counts = Counter(word for note in notes for word in {normalise(word) for word in note.confidences})
            elif draft.unit == "word":
                of = {word: draft.of_unit(word) for word in set(chain.from_iterable(words))}
                counts = Counter(t for some in words for t in {t for word in some for t in of[word]})
            else:
                counts = Counter(
                    t for note, some in zip(notes, words, strict=True) for t in set(draft.of_text(note, some))
                )
            frequent = sorted((-n, token) for token, n in counts.items() if n >= min_count)
            vocabulary = tuple(token for _, token in frequent[:max_words])
            if kind == "confidence":  # all levels of a word, whichever of them these captions have
                vocabulary = tuple(f"{word} {level}" for word in vocabulary for level in range(1, LEVELS + 1))
            if not vocabulary:
                raise TokenSpecError(
                    f"family {kind}: expected captions with tokens of it that occur at least {min_count} times; "
                    f"{len(counts)} different ones came. Lower min_count, caption more items, or leave the family out"
                )
            made.append(Family(kind=kind, vocabulary=vocabulary, rows=len(vocabulary), tokenizer=own))
        try:
            return cls(length=length, families=tuple(made))
        except ValidationError as error:
            raise TokenSpecError(f"families and length make no token spec: {error}") from error

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

    @cached_property
    def base(self) -> NDArray[np.int64]:
        """int64 [rows]: the row that a row is an amount of. A word's confidence is an amount of the word itself, as
        another family has it (`slot`, else `word`); where none has, of its first level. Any other row is itself. So a
        ranker learns one vector per word in place of nine, and what a user likes of captions counts for words that a
        captioner is not sure of.
        """
        base = np.arange(self.rows)
        said: dict[str, int] = {}
        for kind in ("word", "slot"):
            for start, family in zip(self.starts, self.families, strict=True):
                if family.kind == kind:
                    said |= {word: row for row, word in enumerate(family.vocabulary or (), start)}
        for start, family in zip(self.starts, self.families, strict=True):
            if family.kind == "confidence":
                for row, token in enumerate(family.vocabulary or (), start):
                    word, _, level = token.rpartition(" ")
                    base[row] = said.get(word, row + 1 - int(level))
        return base

    @cached_property
    def amount(self) -> NDArray[np.float32]:
        """FP32 [rows]: how much of its base a row is; a confidence of level n is n / 3, any other row 1, padding 0."""
        amount = np.minimum(np.arange(self.rows), 1).astype(np.float32)
        for start, family in zip(self.starts, self.families, strict=True):
            if family.kind == "confidence":
                amount[start : start + family.rows] = (np.arange(family.rows) % LEVELS + 1) / 3
        return amount

    def amounts_of(self, kind: Kind) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`base` and `amount` with zeros in all rows but those of one family: what profiles are made of."""
        there = np.isin(np.arange(self.rows), self.ids_of(kind))
        return self.base * there, self.amount * there

    def name_of(self, row: int) -> tuple[Kind, str]:
        """Family of a row, and its token; `#n` where the row is number n of a hashed family.

        Raises:
            TokenSpecError: padding, or no row of this spec.
        """
        for start, family in zip(self.starts, self.families, strict=True):
            if start <= row < start + family.rows:
                at = row - start
                return family.kind, family.vocabulary[at] if family.vocabulary is not None else f"#{at}"
        raise TokenSpecError(f"row {row}: expected 1 … {self.rows - 1}, the rows of this spec")

    def tokens(self, caption: str) -> Iterator[Token]:
        """All tokens of a text, families in order, also those that have no row.

        Raises:
            TokenSpecError: the text's fields are malformed.
        """
        for index, (family, (units, read)) in enumerate(zip(self.families, self._read(caption), strict=True)):
            for unit, some in zip(units, read, strict=True):
                for token, rows in zip(some, self._rows(index, some), strict=True):
                    yield Token(family.kind, token, family.words_of(unit, token), rows)

    def encode(self, caption: str) -> NDArray[np.int64]:
        """ids int64 [length] of a text: each id once, families in order, padded with 0.

        A pure function of spec and text. An empty caption gives zeros.

        Raises:
            TokenSpecError: the text's fields are malformed.
        """
        rows = (self._rows(i, list(chain.from_iterable(read))) for i, (_, read) in enumerate(self._read(caption)))
        found = dict.fromkeys(chain.from_iterable(chain.from_iterable(rows)))
        ids = np.zeros(self.length, dtype=np.int64)
        kept = list(found)[: self.length]
        ids[: len(kept)] = kept
        return ids

    def _read(self, caption: str) -> Iterator[tuple[list[str], list[list[str]]]]:
        """Per family: what it reads, and the tokens of each."""
        note = Annotated.parse(caption)
        words = normalise(note.caption).split()
        pairs = [f"{a} {b}" for a, b in pairwise(words)]
        for family in self.families:
            if family.unit == "text":
                yield [""], [family.of_text(note, words)]
            else:
                units = words if family.unit == "word" else pairs
                yield units, [family.of_unit(unit) for unit in units]

    def encode_batch(self, captions: Sequence[str]) -> NDArray[np.int64]:
        """ids int64 [len(captions), length]; row i is `encode(captions[i])`, in a fraction of the time.

        Raises:
            TokenSpecError: the fields of a text are malformed.
        """
        return token_batch.encode_batch(self, captions)

    def statistics(self, captions: Iterable[str]) -> Statistics:
        """How many tokens of each family these captions have, and what becomes of them."""
        seen = Counter(captions)
        total = max(1, seen.total())
        known: list[dict[str, tuple[int, ...]]] = [{} for _ in self.families]
        tokens, with_row, covered, ids, cut = np.zeros((5, len(self.families)))
        place = {family.kind: i for i, family in enumerate(self.families)}
        over = 0
        for caption, times in seen.items():
            found: list[set[int]] = [set() for _ in self.families]
            for token in self.tokens(caption):
                at = place[token.kind]
                known[at][token.text] = token.rows
                tokens[at] += times
                with_row[at] += times * bool(token.rows)
                found[at].update(token.rows)
            sizes = np.array([len(rows) for rows in found])
            ids += times * sizes
            covered += times * (sizes > 0)
            cut += times * ((sizes > 0) & (sizes.cumsum() > self.length))
            over += times * int(sizes.sum() > self.length)
        return Statistics(
            captions=seen.total(), length=self.length, truncated=over / total,
            families={
                family.kind: FamilyStatistics(
                    rows=family.rows, used_rows=len(set(chain.from_iterable(known[i].values()))),
                    distinct=len(known[i]), token_coverage=float(with_row[i] / max(1, tokens[i])),
                    caption_coverage=float(covered[i] / total), ids=float(ids[i] / total),
                    truncated=float(cut[i] / total), **_collisions(known[i].values()),
                )
                for i, family in enumerate(self.families)
            },
        )  # fmt: skip

    @cached_property
    def _memory(self) -> list[dict[str, tuple[int, ...]]]:
        """Per family: token → rows. Vocabularies are filled; hashed tokens are remembered as they come."""
        return [
            {word: (start + i,) for i, word in enumerate(family.vocabulary or ())}
            for start, family in zip(self.starts, self.families, strict=True)
        ]

    def rows_of(self, index: int, tokens: Sequence[str]) -> NDArray[np.int64]:
        """int64 [len(tokens), k]: rows of each token of family number `index`; 0 where it has none."""
        family, start = self.families[index], self.starts[index]
        if family.vocabulary is not None:
            known = self._memory[index]
            found = (known.get(token, (0,))[0] for token in tokens)
            return np.fromiter(found, np.int64, len(tokens)).reshape(-1, 1)
        return start + family.hashed(tokens)

    def _rows(self, index: int, tokens: Sequence[str]) -> list[tuple[int, ...]]:
        """The same for few tokens, most of which were there before: tuples, empty where there is no row."""
        memory, family = self._memory[index], self.families[index]
        fresh: dict[str, tuple[int, ...]] = {}
        if family.vocabulary is None and (new := [t for t in dict.fromkeys(tokens) if t not in memory]):
            hashed = self.starts[index] + family.hashed(new)
            fresh = dict(zip(new, map(tuple, hashed.tolist()), strict=True))
            if len(memory) < MEMORY:
                memory.update(fresh)
        return [memory.get(token) or fresh.get(token, ()) for token in tokens]


def _collisions(rows: Iterable[tuple[int, ...]]) -> dict[str, float]:
    """Shares of tokens, given by their rows, that have all rows, or some row, in common with another one."""
    sets = [frozenset(one) for one in rows if one]
    whole, single = Counter(sets), Counter(chain.from_iterable(sets))
    full = sum(n for n in whole.values() if n > 1)
    partial = sum(any(single[row] > 1 for row in one) for one in sets)
    return {"full_collisions": full / max(1, len(sets)), "partial_collisions": partial / max(1, len(sets))}


# --- fitting ----------------------------------------------------------------------------------------


def _count_values(notes: Iterable[Annotated], slots: Callable[[str], Iterable[tuple[str, str]]]) -> Counter[str]:
    """Captions per value of the grammar. A value that no word of the caption says (a default) is no phrase of it."""
    counts: Counter[str] = Counter()
    for note in notes:
        whole = f" {normalise(note.caption)} "
        counts.update({phrase for _, value in slots(note.caption) if f" {(phrase := normalise(value))} " in whole})
    return counts


def _count_phrases(words: Sequence[list[str]], min_count: int, min_pmi: float) -> Counter[str]:
    """Captions per word and per run of words that says more than its parts, wherever it is split."""
    counts: Counter[str] = Counter()
    for some in words:
        counts.update(
            {" ".join(some[i : i + n]) for n in range(1, PHRASE_WORDS + 1) for i in range(len(some) - n + 1)}
        )

    def holds(run: str) -> bool:
        parts = run.split()
        splits = ((" ".join(parts[:i]), " ".join(parts[i:])) for i in range(1, len(parts)))
        return all(math.log(counts[run] * len(words) / (counts[a] * counts[b])) >= min_pmi for a, b in splits)

    return Counter({run: n for run, n in counts.items() if n >= min_count and holds(run)})


def _learn_pieces(words: Iterable[list[str]], pieces: int) -> str:
    """JSON of a byte-pair tokenizer of these words, the same for the same words; `▁` marks where a word begins."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=pieces, show_progress=False)
    tokenizer.train_from_iterator(chain.from_iterable(words), trainer)
    return tokenizer.to_str()
