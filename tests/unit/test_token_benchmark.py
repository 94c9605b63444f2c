"""benchmarks/tokens.py: its texts are what it says they are, and its record is complete."""

from __future__ import annotations

import numpy as np

from benchmarks.tokens import LOOP, annotate, bench, grammar_texts, open_texts
from sightline.annotation import Annotated


def test_texts_differ_and_have_their_words() -> None:
    rng = np.random.default_rng(0)
    grammar, free = grammar_texts(3000, rng), open_texts(500, rng)
    assert len(set(grammar)) == 3000
    assert {len(text.split()) for text in grammar} == {12}
    assert len({word for text in grammar for word in text.split()}) < 100
    assert {len(text.split()) for text in free} == {10}
    pairs = [pair for text in free for pair in zip(text.split(), text.split()[1:], strict=False)]
    assert len(set(pairs)) > 0.8 * len(pairs)
    note = Annotated.parse(annotate(grammar[:2], rng)[0])
    assert note.caption == grammar[0]
    assert (len(note.codes), note.samples) == (3, (grammar[0], grammar[1]))


def test_the_record_names_every_set_and_way() -> None:
    lines: list[str] = []
    document = bench(LOOP, 1, ["slot"], progress=lines.append)
    ways = {"split", "tokenizers", "word+bigram+trigram", "word+bigram+trigram, loop", "slot", "slot, loop"}
    assert {name: set(found) for name, found in document["captions_per_s"].items()} == dict.fromkeys(
        ("repeated", "grammar", "open"), ways
    )
    assert all(0 < rate["low"] <= rate["per_s"] <= rate["high"]
               for found in document["captions_per_s"].values() for rate in found.values())  # fmt: skip
    assert set(document["aim_reached"]) == {"repeated", "grammar", "open"}
    assert {"hardware", "versions", "commit", "command"} <= set(document)
    assert len(lines) == 3 * len(ways)
