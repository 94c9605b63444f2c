"""Many captions → ids at once; the same ids as `TokenSpec.encode`, which says what they are.

Words are told apart in one pass over the bytes of all texts: NumPy finds them, Arrow numbers them. What a family makes
of a word does not depend on the rest of the caption, so it is worked out once for each distinct one, and a hash of two
words is a sum of what each adds to it (`Family.terms`). What is left is copying rows and leaving out repetitions, which
NumPy does on all cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sightline.annotation import SEPARATOR, Annotated
from sightline.token_families import normalise

if TYPE_CHECKING:
    from sightline.tokens import TokenSpec

__all__ = ["encode_batch"]

SMALL = 16  # distinct texts; up to here the loop is faster
BLOCK = 131_072  # texts whose words are told apart in one go
CHUNK = 2048  # texts whose ids fit the caches of a core
SLACK = 8  # repetitions that a text may have before it is looked at again
# ASCII normalised, but for what ends a text; other bytes as they are.
_NORMAL = bytes(
    ord(c.lower()) if c.isalnum() or c in f"_{SEPARATOR}" else ord(" ") for c in map(chr, range(128))
) + bytes(range(128, 256))

Ints = NDArray[np.int64]


def encode_batch(spec: TokenSpec, captions: Sequence[str]) -> Ints:
    """ids int64 [len(captions), spec.length]; equal texts are read once."""
    texts = list(dict.fromkeys(captions))
    ids = np.zeros((len(texts), spec.length), dtype=np.int64)
    if len(texts) <= SMALL:
        for row, text in zip(ids, texts, strict=True):
            row[:] = spec.encode(text)
    else:
        for start in range(0, len(texts), BLOCK):
            _encode_block(spec, texts[start : start + BLOCK], ids[start : start + BLOCK])
    if len(texts) == len(captions):
        return ids
    place = {text: i for i, text in enumerate(texts)}
    return ids[np.fromiter(map(place.__getitem__, captions), np.int64, len(captions))]


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What one family reads in some texts: in text t the units number `first[t]` … `last[t] - 1`.

    `rows` tells of units int64 [n] how many rows each has, int64 [n], at least one; where these begin, int64 [n]; and
    in what, int64 [m].
    """

    first: Ints
    last: Ints
    rows: Callable[[Ints], tuple[Ints, Ints, Ints]]


def _encode_block(spec: TokenSpec, texts: Sequence[str], out: Ints) -> None:
    """Write the ids of `texts` to `out` int64 [len(texts), length]."""
    sources = _read(spec, texts)

    def fill(start: int) -> None:
        chunk = np.arange(start, min(start + CHUNK, len(texts)))
        out[chunk] = _ids(sources, chunk, spec.length, spec.length + SLACK)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # NumPy works without Python's lock
        for _ in pool.map(fill, range(0, len(texts), CHUNK)):
            pass


def _read(spec: TokenSpec, texts: Sequence[str]) -> list[_Source]:
    """One source per family."""
    # Fields are parsed also where no family reads them: what `encode` refuses is refused.
    noted = SEPARATOR in "".join(texts)
    notes = [Annotated.parse(text) for text in texts] if noted else [Annotated("")] * len(texts)
    ends, code, words = _words([note.caption for note in notes] if noted else texts)
    sources = []
    for index, family in enumerate(spec.families):
        if family.kind == "slot":
            sources.append(_phrases(spec, index, ends, code, words))
        elif family.unit == "pair":
            sources.append(_pairs(spec, index, ends, code, words))
        elif family.unit == "word":
            sources.append(_units(spec, index, ends, code, [family.of_unit(word) for word in words]))
        else:
            each = np.arange(len(texts) + 1)
            sources.append(_units(spec, index, each, each[:-1], [family.of_text(note, ()) for note in notes]))
    return sources


def _words(captions: Sequence[str]) -> tuple[Ints, Ints, list[str]]:
    """Words before each text and in all, int64 [len(captions) + 1]; the number of every word; the words by number."""
    joined = SEPARATOR.join(captions)
    if not joined.isascii():
        joined = SEPARATOR.join([text if text.isascii() else normalise(text) for text in captions])
    text = np.frombuffer(f" {joined}{SEPARATOR}".encode().translate(_NORMAL), np.uint8)
    inside = text > ord(" ")
    begins, ends = (np.flatnonzero(there) for there in (inside[1:] > inside[:-1], inside[1:] < inside[:-1]))
    offsets = np.concatenate([[0], np.cumsum(ends - begins)])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text[inside])]
    found = pa.Array.from_buffers(pa.large_binary(), len(begins), buffers).dictionary_encode()
    words = [word.decode() for word in found.dictionary.to_pylist()]
    before = np.searchsorted(begins, np.flatnonzero(text == ord(SEPARATOR)))
    return np.concatenate([[0], before]), found.indices.to_numpy().astype(np.int64), words


def _units(spec: TokenSpec, index: int, ends: Ints, code: Ints, read: Sequence[Sequence[str]]) -> _Source:
    """Source with unit `code[i]` at place i, places `ends[t]` … `ends[t + 1] - 1` in text t, and the units' tokens."""
    unit = np.repeat(np.arange(len(read)), np.fromiter(map(len, read), np.int64, len(read)))
    # Different units share tokens: each is looked up once.
    place: dict[str, int] = {}
    tokens = np.array([place.setdefault(token, len(place)) for some in read for token in some], dtype=np.int64)
    rows = spec.rows_of(index, list(place))[tokens]
    there = rows > 0
    sizes = np.bincount(unit, there.sum(1), minlength=len(read)).astype(np.int64)
    begins, flat = np.cumsum(sizes) - sizes, rows[there]
    known = sizes[code] > 0
    ends, code = np.concatenate([[0], np.cumsum(known)])[ends], code[known]

    def rows_of(at: Ints) -> tuple[Ints, Ints, Ints]:
        return sizes[code[at]], begins[code[at]], flat

    return _Source(first=ends[:-1], last=ends[1:], rows=rows_of)


def _pairs(spec: TokenSpec, index: int, ends: Ints, code: Ints, words: Sequence[str]) -> _Source:
    """Source with the pair of words `code[i]` and `code[i + 1]` at place i."""
    family, start = spec.families[index], spec.starts[index]
    left, right = family.terms(words)

    def rows_of(at: Ints) -> tuple[Ints, Ints, Ints]:
        rows = start + family.settle(left[code[at]] + right[code[at + 1]])
        sizes = np.full(len(at), rows.shape[1])
        return sizes, np.arange(len(at)) * rows.shape[1], rows.ravel()

    return _Source(first=ends[:-1], last=np.maximum(ends[:-1], ends[1:] - 1), rows=rows_of)


def _phrases(spec: TokenSpec, index: int, ends: Ints, code: Ints, words: Sequence[str]) -> _Source:
    """Source of a slot family: its phrases, found at all places at once, then spoken from the left, longest first."""
    number = {word: i for i, word in enumerate(words)}
    row_of = {
        tuple(number.get(word, -1) for word in phrase.split(" ")): row
        for row, phrase in enumerate(spec.families[index].vocabulary or (), spec.starts[index])
    }
    row_of = {phrase: row for phrase, row in row_of.items() if -1 not in phrase}
    size, row = np.ones_like(code), np.zeros_like(code)
    last = np.repeat(ends[1:], np.diff(ends))
    at, before = np.arange(len(code)), np.zeros_like(code)
    # What begins a phrase, one word more each time. `before` is the number of the beginning that stands at `at`.
    place: dict[tuple[int, ...], int] = {(): 0}
    for length in range(1, max(map(len, row_of), default=0) + 1):
        here = at + length <= last[at]
        at, before = at[here], before[here]
        beginnings = sorted({phrase[:length] for phrase in row_of if len(phrase) >= length})
        keys = np.array([place[one[:-1]] * len(words) + one[-1] for one in beginnings])
        rows = np.array([row_of.get(one, 0) for one in beginnings])
        place = {one: i for i, one in enumerate(beginnings)}
        key = before * len(words) + code[at + length - 1]
        found = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
        there = keys[found] == key
        at, before = at[there], found[there]
        whole = rows[before] > 0
        size[at[whole]], row[at[whole]] = length, rows[before[whole]]
    spoken = np.zeros(len(code), dtype=bool)
    now = ends[:-1][ends[:-1] < ends[1:]]
    while len(now):
        spoken[now] = True
        now, after = now + size[now], last[now]
        now = now[now < after]
    kept = spoken & (row > 0)
    ends, flat = np.concatenate([[0], np.cumsum(kept)])[ends], row[kept]
    return _Source(first=ends[:-1], last=ends[1:], rows=lambda at: (np.ones_like(at), at, flat))


def _ids(sources: Sequence[_Source], texts: Ints, length: int, window: int) -> Ints:
    """ids int64 [len(texts), length] of these texts: families in order, each row once, then zeros.

    Looks at the first `window` rows of a text, and again at more where repetitions leave it too few.
    """
    found = np.zeros((len(texts), window), dtype=np.int64)
    filled = np.zeros(len(texts), dtype=np.int64)
    cut = np.zeros(len(texts), dtype=bool)
    for source in sources:
        first, room = source.first[texts], window - filled
        there = source.last[texts] - first
        units = np.minimum(there, room)
        owner = np.repeat(np.arange(len(texts)), units)
        ahead = np.cumsum(units) - units
        sizes, begins, flat = source.rows(np.arange(len(owner)) + (first - ahead)[owner])
        before = np.concatenate([[0], np.cumsum(sizes)])
        wanted = before[ahead + units] - before[ahead]
        cut |= (there > units) | (wanted > room)
        place = before[:-1] + (filled - before[ahead])[owner]  # of a unit's first row among those of its text
        sizes = np.clip(window - place, 0, sizes)
        step = np.arange(sizes.sum())
        ahead = np.cumsum(sizes) - sizes
        to, of = np.repeat(owner * window + place - ahead, sizes), np.repeat(begins - ahead, sizes)
        found.reshape(-1)[to + step] = flat[of + step]
        filled = np.minimum(filled + wanted, window)
    _close_up(found)
    ids = found[:, :length]
    again = cut & (ids[:, -1] == 0)
    if again.any():
        ids[again] = _ids(sources, texts[again], length, 4 * window)
    return ids


def _close_up(ids: Ints) -> None:
    """Leave out repetitions within a row of ids int64 [n, window]; what follows moves up, zeros come last."""
    bits = ids.shape[1].bit_length()
    key = ids << bits | np.arange(ids.shape[1])
    key.sort(axis=1)
    sorted_ids = key >> bits
    row, at = np.nonzero((sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] > 0))
    ids[row, key[row, at + 1] & ((1 << bits) - 1)] = 0
    changed = np.unique(row)
    some = ids[changed]
    ids[changed] = np.take_along_axis(some, np.argsort(some == 0, axis=1, kind="stable"), axis=1)
