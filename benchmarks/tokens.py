"""How many captions per second become ids, per family and together, and what makes the difference?

Why: tokenising a catalogue again (new spec, new captioner) should take seconds; the aim is 200 000 captions/s on two
    cores for captions of about ten words with words, bigrams and trigrams.
Regime: one process, texts in memory, ids int64 [texts, 32] out, as training and backfilling do it. Sets of texts:
    repeated   as catalogues are: each caption is there 50 times
    grammar    all texts differ, made of 90 words by a grammar, as a captioner's are
    open       all texts differ, words drawn from 8 000 by Zipf's law: most pairs of words have never been seen before
    A family that reads fields gets them: three codes, a confidence per word, two samples.
Peers: `loop`, the specification itself one text at a time, on the first texts; `tokenizers`, Hugging Face's
    encode_batch_fast in Rust on all cores, with byte pairs learnt from the same texts. It gives pieces only: no pairs,
    hashes or padding.
Ceiling: `split`, Python's own str.split and no more, one core: whoever makes all words Python strings pays that.
Method: ways take turns; the first run of each is left out; medians of `--runs`, lowest–highest.

    python -m benchmarks.tokens [--texts 100000] [--runs 5] [--families word bigram]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.environment import describe
from sightline.annotation import Annotated
from sightline.errors import ConfigError
from sightline.tokens import KINDS, Kind, TokenSpec

TOGETHER: tuple[Kind, ...] = ("word", "bigram", "trigram")
FIELDS = ("semantic", "confidence", "sample")
LENGTH, ROWS, LOOP, REPEATED, AIM = 32, 4096, 2000, 50, 200_000
SLOTS = (
    "small large tiny tall wide", "plain striped dotted checked woven",
    "red orange yellow green blue purple black white",
    "ball bag book bottle chair clock lamp mug shirt shoe cup vase table drum kite boat plate spoon box hat", "with a",
    "wooden golden rusty leather paper plastic silver stone linen copper",
    "handle lid strap label cover base rim leg tag", "on in beside under behind",
    "grass wood sand snow brick water moss gravel leaves straw", "at",
    "night dawn noon dusk sunrise sunset midday midnight",
)  # fmt: skip


def grammar_texts(count: int, rng: np.random.Generator) -> list[str]:
    """Different captions of twelve words."""
    texts: dict[str, None] = {}
    slots = [slot.split() if slot != "with a" else [slot] for slot in SLOTS]
    while len(texts) < count:
        parts = [rng.choice(slot, count).tolist() for slot in slots]
        texts.update(dict.fromkeys(map(" ".join, zip(*parts, strict=True))))
    return list(texts)[:count]


def open_texts(count: int, rng: np.random.Generator, words: int = 8000) -> list[str]:
    """Different captions of ten words of 2 to 9 letters."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    known = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(words)]
    chance = 1 / (5 + np.arange(words))
    drawn = rng.choice(words, (count, 10), p=chance / chance.sum())
    return [" ".join(known[i] for i in row) for row in drawn.tolist()]


def annotate(texts: Sequence[str], rng: np.random.Generator) -> list[str]:
    """The same captions with fields."""
    codes = rng.integers(0, 256, (len(texts), 3)).tolist()
    bins = rng.integers(0, 10, 10).tolist()
    return [
        Annotated(text, code, dict(zip(text.split(), bins, strict=False)), (text, other)).to_text()
        for text, code, other in zip(texts, codes, [*texts[1:], texts[0]], strict=True)
    ]


def measure(ways: dict[str, tuple[int, Callable[[], Any]]], runs: int) -> dict[str, dict[str, int]]:
    """way → (texts, what to do) → texts per second: median, low, high."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 1):
        for name, (_, work) in ways.items():
            start = time.perf_counter()
            work()
            if run:
                taken[name].append(time.perf_counter() - start)
    return {
        name: {
            "per_s": round(count / statistics.median(taken[name])),
            "low": round(count / max(taken[name])), "high": round(count / min(taken[name])),
        }
        for name, (count, _) in ways.items()
    }  # fmt: skip


def bench(texts: int, runs: int, families: Sequence[Kind], progress: Callable[[str], None] = print) -> dict[str, Any]:
    """All measurements; the JSON document."""
    rng = np.random.default_rng(0)
    grammar, free = grammar_texts(texts, rng), open_texts(texts, rng)
    few = grammar[: max(1, texts // REPEATED)]
    sets = {"repeated": (few * REPEATED)[:texts], "grammar": grammar, "open": free}
    results: dict[str, dict[str, Any]] = {}
    for name, plain in sets.items():
        noted = annotate(plain[: len(few)], rng) * REPEATED if name == "repeated" else annotate(plain, rng)
        asked: dict[str, tuple[tuple[Kind, ...], list[str]]] = {"+".join(TOGETHER): (TOGETHER, plain)}
        asked |= {kind: ((kind,), noted if kind in FIELDS else plain) for kind in families}
        if set(families) == set(KINDS):
            asked["all eight"] = (KINDS, noted)
        peer = Tokenizer.from_str(TokenSpec.fit(plain[:5000], families=["subword"]).families[0].tokenizer or "")
        results[name] = measure(
            {"split": (texts, lambda plain=plain: [text.split() for text in plain]),
             "tokenizers": (texts, lambda plain=plain, peer=peer: peer.encode_batch_fast(plain))}, runs,
        )  # fmt: skip
        for label, (kinds, read) in asked.items():
            spec = TokenSpec.fit(read[:5000], families=kinds, rows=ROWS, length=LENGTH)
            ways = {
                label: (len(read), lambda spec=spec, read=read: spec.encode_batch(read)),
                f"{label}, loop": (LOOP, lambda spec=spec, read=read: [spec.encode(text) for text in read[:LOOP]]),
            }
            results[name] |= measure(ways, runs)
        for label, found in results[name].items():
            progress(f"{name:<9} {label:<28} {found['per_s']:>10,} captions/s   {found['low']:,}–{found['high']:,}")
    record = describe()
    record["versions"]["tokenizers"] = version("tokenizers")
    aim = "+".join(TOGETHER)
    return {
        "benchmark": "tokens", **record, "texts": texts, "runs": runs, "length": LENGTH, "rows_per_hashed_family": ROWS,
        "captions_per_s": results, "aim_per_s": AIM,
        "aim_reached": {name: found[aim]["per_s"] >= AIM for name, found in results.items()},
    }  # fmt: skip


def main() -> None:
    """Measure and print; the last line is JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokens", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--families", nargs="*", choices=KINDS, default=list(KINDS), metavar="FAMILY")
    options = parser.parse_args()
    for flag, value, low in (("texts", options.texts, LOOP), ("runs", options.runs, 1)):
        if value < low:
            raise ConfigError(f"--{flag}: got {value}, expected {low} or more")
    assert __doc__ is not None
    print(__doc__.strip())
    print(json.dumps(bench(options.texts, options.runs, options.families), separators=(",", ":")))


if __name__ == "__main__":
    main()
