"""Many captions → ids at once; the same ids as `TokenSpec.encode`, which says what they are.

Words are told apart in one pass over all texts. What a family makes of a word or of a pair of words does not depend on
the rest of the caption, so it is worked out once for each distinct one; what is left is copying rows and leaving out
repetitions, which NumPy does on all cores.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from sightline.annotation import SEPARATOR, Annotated, plain
from sightline.token_families import normalise

if TYPE_CHECKING:
    from sightline.tokens import TokenSpec

__all__ = ["encode_batch"]

SMALL = 16  # distinct texts; up to here the loop is faster
BLOCK = 131_072  # texts whose words are told apart in one go
CHUNK = 2048  # texts whose ids fit the caches of a core
_END = "\0"  # of a text, among words
_ASCII = str.maketrans({c: c.lower() if c.isalnum() or c in "_\n" else " " for c in map(chr, range(128))})

Ints = NDArray[np.int64]


def encode_batch(spec: TokenSpec, captions: Sequence[str]) -> Ints:
    """ids int64 [len(captions), spec.length]; equal texts are read once."""
    # ASCII texts come first, because they can be normalised all together; their order is no matter otherwise.
    texts = sorted(dict.fromkeys(captions), key=str.isascii, reverse=True)
    ids = np.zeros((len(texts), spec.length), dtype=np.int64)
    if len(texts) <= SMALL:
        for row, text in zip(ids, texts, strict=True):
            row[:] = spec.encode(text)
    else:
        for start in range(0, len(texts), BLOCK):
            _encode_block(spec, texts[start : start + BLOCK], ids[start : start + BLOCK])
    place = {text: i for i, text in enumerate(texts)}
    return ids[np.fromiter(map(place.__getitem__, captions), np.int64, len(captions))]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What one family reads in some texts, and its rows.

    Occurrence i lies in text `owner[i]` (ascending) and is unit `code[i]` (a word, a pair, or a whole text). Unit u
    has the rows `flat[starts[u] : starts[u] + sizes[u]]`.
    """

    owner: Ints
    code: Ints
    starts: Ints
    sizes: Ints
    flat: Ints

    def within(self, first: int, last: int) -> _Source:
        """The part in texts `first` … `last - 1`, counted from 0."""
        a, b = np.searchsorted(self.owner, (first, last))
        return replace(self, owner=self.owner[a:b] - first, code=self.code[a:b])


def _encode_block(spec: TokenSpec, texts: Sequence[str], out: Ints) -> None:
    """Write the ids of `texts`, ASCII ones first, to `out` int64 [len(texts), length], which is zero."""
    sources = _read(spec, texts)

    def fill(first: int) -> None:
        last = min(first + CHUNK, len(texts))
        _fill(out[first:last], [source.within(first, last) for source in sources])

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy works without Python's lock
        for _ in pool.map(fill, range(0, len(texts), CHUNK)):
            pass


def _read(spec: TokenSpec, texts: Sequence[str]) -> list[_Source]:
    """One source per family."""
    kinds = {family.kind for family in spec.families}
    units = {family.unit for family in spec.families}
    # Also where no family reads fields: what `encode` refuses is refused.
    notes = [Annotated.parse(text) for text in texts if "text" in units or SEPARATOR in text]
    owner, code, words = _words([plain(text) for text in texts])
    whole = np.arange(len(texts))
    spoken: list[list[str]] = [[]] * len(texts)
    if "slot" in kinds:
        ends = np.cumsum(np.bincount(owner, minlength=len(texts)))[:-1]
        spoken = [[words[c] for c in part.tolist()] for part in np.split(code, ends)]
    pairs = _pairs(owner, code, words) if "pair" in units else (owner, code, words)
    sources = []
    for index, family in enumerate(spec.families):
        *places, distinct = pairs if family.unit == "pair" else (owner, code, words)
        if family.unit == "text":
            places = [whole, whole]
            read = [family.of_text(note, some) for note, some in zip(notes, spoken, strict=True)]
        elif family.kind == "word" or family.kind == "bigram":  # tokens are what it reads
            sources.append(_source(places, np.arange(len(distinct)), len(distinct), spec.rows_of(index, distinct)))
            continue
        else:
            read = [family.of_unit(unit) for unit in distinct]
        unit = np.repeat(np.arange(len(read)), np.fromiter(map(len, read), np.int64, len(read)))
        # Different words share tokens: each is looked up once.
        place: dict[str, int] = {}
        tokens = np.array([place.setdefault(token, len(place)) for some in read for token in some], dtype=np.int64)
        sources.append(_source(places, unit, len(read), spec.rows_of(index, list(place))[tokens]))
    return sources


def _source(places: Sequence[Ints], unit: Ints, units: int, rows: Ints) -> _Source:
    """Source of occurrences (text, unit), with the tokens of all units: `unit` int64 [m] and `rows` int64 [m, k]."""
    there = rows > 0
    sizes = np.bincount(unit, there.sum(1), minlength=units).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    return _Source(owner=places[0], code=places[1], starts=starts, sizes=sizes, flat=rows[there])


def _words(captions: Sequence[str]) -> tuple[Ints, Ints, list[str]]:
    """Text and number of every word, int64 [n] each, and the distinct words by number."""
    ascii_ones = next((i for i, caption in enumerate(captions) if not caption.isascii()), len(captions))
    lines = "\n".join([caption.replace("\n", " ") for caption in captions[:ascii_ones]]).translate(_ASCII)
    others = "".join([f"\n{normalise(caption)}" for caption in captions[ascii_ones:]])
    text = f"{lines}{others}\n" if ascii_ones else f"{others[1:]}\n"
    found = text.replace("\n", f" {_END} ").split()
    numbers: defaultdict[str, int] = defaultdict()
    numbers.default_factory = numbers.__len__  # a new word gets the next number
    numbers[_END] = 0
    codes = np.fromiter(map(numbers.__getitem__, found), np.int64, len(found))
    ends = codes == 0
    owner = np.cumsum(ends)[~ends]
    return owner, codes[~ends] - 1, list(numbers)[1:]


def _pairs(owner: Ints, code: Ints, words: Sequence[str]) -> tuple[Ints, Ints, list[str]]:
    """Text and number of every pair of neighbouring words, and the distinct pairs by number."""
    inside = owner[:-1] == owner[1:]
    both = (code[:-1] * len(words) + code[1:])[inside]
    distinct, numbers = np.unique(both, return_inverse=True)
    a, b = np.divmod(distinct, max(1, len(words)))
    pairs = [f"{words[i]} {words[j]}" for i, j in zip(a.tolist(), b.tolist(), strict=True)]
    return owner[:-1][inside], numbers, pairs


def _fill(out: Ints, sources: Sequence[_Source]) -> None:
    """Write each text's rows to `out` int64 [texts, length]: families in order, each row once, until it is full."""
    texts, length = out.shape
    filled = np.zeros(texts, dtype=np.int64)
    for source in sources:
        before = filled.copy()
        # A text needs no more rows than it has room for, but repetitions are seen only afterwards: look at some more
        # than that, and again at many more where it was not enough.
        window = 2 * (length - filled) + 8
        todo = filled < length
        while todo.any():
            mine = todo[source.owner]
            owner, code = source.owner[mine], source.code[mine]
            sizes = source.sizes[code]
            ahead = np.cumsum(sizes) - sizes
            begins = np.searchsorted(owner, owner)  # first occurrence in the same text
            near = ahead - ahead[begins] < window[owner]
            left = np.zeros(texts, dtype=bool)
            left[owner[~near]] = True
            owner, sizes, starts = owner[near], sizes[near], source.starts[code[near]]
            row = np.repeat(owner, sizes)
            offset = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
            ids = source.flat[offset + np.arange(len(row))]
            first = _first(row, ids)
            row, ids = row[first], ids[first]
            counts = np.bincount(row, minlength=texts)
            rank = np.arange(len(row)) - (np.cumsum(counts) - counts - before)[row]
            fits = rank < length
            out[row[fits], rank[fits]] = ids[fits]
            filled[todo] = np.minimum(before + counts, length)[todo]
            todo = left & (filled < length)
            window *= 4


def _first(row: Ints, ids: Ints) -> NDArray[np.bool_]:
    """bool [n]: is this the first place of its (row, id)? A hash table, all places at once.

    Places are written to their slots backwards, so that the first one stays (of repeated indices NumPy keeps the last).
    A place that finds its own (row, id) in its slot is settled; the others try again with another hash.
    """
    key = (row << 40 | ids).astype(np.uint64)
    bits = max(4, int(4 * len(key)).bit_length())
    table = np.empty(1 << bits, dtype=np.int32)
    first = np.zeros(len(key), dtype=bool)
    place = np.arange(len(key), dtype=np.int32)
    multiplier = 0x9E3779B97F4A7C15
    while len(place):
        slot = (key[place] * np.uint64(multiplier)) >> np.uint64(64 - bits)
        table[slot[::-1]] = place[::-1]
        there = table[slot]
        first[there[there == place]] = True
        place = place[key[there] != key[place]]
        multiplier = multiplier * 0xD1342543DE82EF95 % 2**64
    return first
