"""Which words moved a score? Exact occlusion on a published release: take one word away, score again.

A word's ids are those that would not be there without it, of every family: its own row, its pairs, its trigrams, the
phrases that it is part of, its confidence. An id that another word has as well stays. So does everything else: no new
pairs come up where the word stood, and ids that were cut at the spec's length do not move up. The change is what the
graph answers, no gradient and no estimate. Changes of single words do not add up to the score, and what two words do
together only is in neither.

It reads the files of a release and asks no server: they are what a server would answer from, and hundreds of
questions about one item need not stand in line with its traffic.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from build.render import read_config
from sightline.annotation import plain
from sightline.errors import ConfigError, ReleaseError
from sightline.features import FEATURES
from sightline.lookup import Tables, tensors
from sightline.store import UserRecord, open_store
from sightline.store.transfer import count_rows, find_user
from sightline.tokens import TokenSpec

__all__ = ["Explanation", "Occlusion", "Scorer", "explain", "plot", "table"]

Row = dict[str, NDArray[Any]]
"""Input of the ranker's graphs: name → value of one row, without the batch dimension."""
SEMANTIC = "(semantic id)"
PROFILES = ("profile", "profile_negative")


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """The score without one word of the caption, or one token of the user's profile."""

    part: str
    """`caption`; `profile` or `profile_negative`, what the user liked or passed over."""
    word: str
    ids: dict[str, list[int]]
    """Family → ids that went with it."""
    without: float
    change: float
    """Score with it minus score without: above 0, it raised the score."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """One score and what moved it, the largest change first."""

    release: str
    user: int
    user_known: bool
    item: int
    item_known: bool
    caption: str
    context: dict[str, int]
    score: float
    occlusions: list[Occlusion]


class Scorer:
    """The ranker of a release, from its own files: tables, `embed` and `score`, as the server has them.

    Args:
        store: location of the feature store with the users' profiles; None: as they were when the ranker was trained.

    Raises:
        ReleaseError: the folder is no release, or a file of it is missing or cannot be read.
    """

    def __init__(self, release_dir: Path, store: str | None = None) -> None:
        models = release_dir / "model_repository"
        self._trained, self._store = release_dir / FEATURES / "users.parquet", store
        try:
            self.spec = TokenSpec.load(models / "tokenize" / "1" / "token_spec.json")
            self._tables = Tables(models / "lookup" / "1")
            count_rows(self._trained)
            self._embed, self._score = (
                onnxruntime.InferenceSession(models / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
                for name in ("embed", "score")
            )
            context = read_config(models / "rank_media" / "config.pbtxt").parameters["context"].string_value
            self.columns: dict[str, int] = {c["name"]: c["cardinality"] for c in json.loads(context or "[]")}
        except Exception as error:
            raise ReleaseError(
                f"{release_dir}: expected a release, as `sightline build` publishes it; {error}"
            ) from error
        self.release = release_dir.resolve().name

    def row(self, user: int, item: int, caption: str, context: Mapping[str, int]) -> tuple[Row, bool, bool]:
        """The graphs' inputs, and whether user and item are known; unknown ones have the fallback row 0.

        Raises:
            ConfigError: a context column that the ranker does not have, or a value that is out of range.
            TokenSpecError: the caption's fields are malformed.
        """
        for name, value in context.items():
            if name not in self.columns or not 0 <= value < self.columns[name]:
                known = ", ".join(f"{n}=0…{c - 1}" for n, c in self.columns.items()) or "none"
                raise ConfigError(f"--context {name}={value}: this ranker's context is {known}")
        record = self._user(user)
        profile = record.profile if record else self._tables.stranger
        rows = {"USER_INDEX": self._tables.users(np.array([user])), "ITEM_INDEX": self._tables.items(np.array([item]))}
        known = (bool(index[0] > 0) for index in rows.values())
        return {
            **rows,
            **{name: value[0] for name, value in tensors(profile).items()},
            "CONTEXT": np.array([context.get(name, 0) for name in self.columns], np.int64),
            "ITEM_TOKENS": self.spec.encode(caption),
        }, *known

    def _user(self, user: int) -> UserRecord | None:
        if self._store is None:
            return find_user(self._trained, user)
        with open_store(self._store, readonly=True) as store:
            return store.read_user(user, [self._tables.versions.users.version]).record

    def score(self, rows: list[Row]) -> NDArray[np.float32]:
        """SCORE FP32 [len(rows)]."""
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        features = self._embed.run(["FEATURES"], _inputs(self._embed, batch))[0]
        inputs = _inputs(self._score, batch | {"FEATURES": features})
        scores: NDArray[np.float32] = self._score.run(["SCORE"], inputs)[0]
        return scores[:, 0]


def _inputs(session: onnxruntime.InferenceSession, batch: Row) -> Row:
    return {tensor.name: batch[tensor.name] for tensor in session.get_inputs()}


def explain(
    release_dir: Path, user: int, item: int, caption: str, context: Mapping[str, int] | None = None, *,
    store: str | None = None,
) -> Explanation:  # fmt: skip
    """Score a user and an item with and without every word of the caption and every token of the user's profile.

    Args:
        release_dir: a published release; nothing has to be running.
        user, item: ids; unknown ones are scored with the fallback rows, as the server does.
        caption: of the item, with or without fields.
        context: context column → value; 0 for those that are left out.
        store: as `Scorer` takes it.

    Raises:
        ReleaseError, ConfigError, TokenSpecError: as `Scorer`. StoreError: the store cannot be read.
    """
    scorer, context = Scorer(release_dir, store), context or {}
    whole, user_known, item_known = scorer.row(user, item, caption, context)
    taken = [("caption", word, ids) for word, ids in _ids_of_words(scorer.spec, caption).items()]
    rows = [{**whole, "ITEM_TOKENS": _without(whole["ITEM_TOKENS"], ids)} for _, _, ids in taken]
    for side in PROFILES:
        tokens, weights = whole[f"{side.upper()}_TOKENS"], whole[f"{side.upper()}_WEIGHTS"]
        for token in tokens[tokens > 0].tolist():
            # The other tokens keep their weights: how strongly they were liked does not depend on this one.
            left = tokens != token
            taken.append((side, scorer.spec.name_of(token)[1], {token}))
            rows.append(
                {**whole, f"{side.upper()}_TOKENS": tokens * left, f"{side.upper()}_WEIGHTS": weights * left}
            )
    score, *without = scorer.score([whole, *rows]).tolist()
    occlusions = [
        Occlusion(part=part, word=word, ids=_by_family(scorer.spec, ids), without=less, change=score - less)
        for (part, word, ids), less in zip(taken, without, strict=True)
    ]
    return Explanation(
        release=scorer.release, user=user, user_known=user_known, item=item, item_known=item_known,
        caption=plain(caption), context={name: context.get(name, 0) for name in scorer.columns}, score=score,
        occlusions=sorted(occlusions, key=lambda one: -abs(one.change)),
    )  # fmt: skip


def _ids_of_words(spec: TokenSpec, caption: str) -> dict[str, set[int]]:
    """Word → ids of the caption that no token without this word has. A semantic id counts as one word."""
    kept = set(spec.encode(caption).tolist()) - {0}
    tokens = [(set(token.words or (SEMANTIC,)), set(token.rows) & kept) for token in spec.tokens(caption)]
    words = dict.fromkeys(word for token in spec.tokens(caption) for word in token.words or (SEMANTIC,))
    return {
        word: set().union(*(rows for made_of, rows in tokens if word in made_of))
        - set().union(*(rows for made_of, rows in tokens if word not in made_of))
        for word in words
    }


def _without(tokens: NDArray[np.int64], ids: set[int]) -> NDArray[np.int64]:
    """tokens int64 [L] without `ids`: the others move up, zeros follow."""
    left = tokens[~np.isin(tokens, list(ids))]
    return np.pad(left, (0, len(tokens) - len(left)))


def _by_family(spec: TokenSpec, ids: set[int]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row in sorted(ids):
        found.setdefault(spec.name_of(row)[0], []).append(row)
    return found


def table(explanation: Explanation, lines: int = 20) -> Table:
    """For a terminal: the largest changes first."""
    known = {True: "", False: " (unknown)"}
    made = Table(
        title=f"user {explanation.user}{known[explanation.user_known]}, "
        f"item {explanation.item}{known[explanation.item_known]}: score {explanation.score:.4f}"
    )
    for name in ("part", "word", "ids"):
        made.add_column(name)
    for name in ("score without", "change"):
        made.add_column(name, justify="right")
    for one in explanation.occlusions[:lines]:
        ids = "; ".join(f"{family} {' '.join(map(str, rows))}" for family, rows in one.ids.items())
        made.add_row(one.part, Text(one.word), ids or "none", f"{one.without:.4f}", f"{one.change:+.4f}")
    return made


def plot(explanation: Explanation, path: Path, bars: int = 20) -> None:
    """PNG with one bar per word, the largest changes on top."""
    from matplotlib.figure import Figure

    shown = explanation.occlusions[:bars][::-1]
    figure = Figure(figsize=(7, 1.6 + 0.3 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colours = {"caption": "#3465a4", "profile": "#e0803a", "profile_negative": "#8a8a8a"}
    axes.barh(range(len(shown)), [one.change for one in shown], color=[colours[one.part] for one in shown])
    axes.set_yticks(range(len(shown)), [f"{one.word}  ({one.part.replace('_', ' ')})" for one in shown])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("score with the word − score without it; changes do not add up")
    axes.set_title(
        f"user {explanation.user}, item {explanation.item}: score {explanation.score:.4f}\n{explanation.caption}",
        fontsize=10, wrap=True, parse_math=False,
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
