"""Folds: which rows train, stop and test, which events may enter a history, and what may be fitted on.

A fold is all that the rest of the evaluation gets to know of a split. Test labels stay in `Log`; examples are
written without them, so no fitted part can see one, by mistake or otherwise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sightline.errors import ConfigError, DataError
from sightline.schema import read_interactions, read_items
from trainer.splits import TEST, TRAIN, VALID, Assigned, micros

__all__ = ["SPLITS", "Fold", "Log", "folds"]

SPLITS = ("cold", "temporal", "warm")
VALID_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Log:
    """A data set's interactions in time order, as arrays [rows].

    Attributes:
        data: its folder.
        identity, catalogue: hashes of its files, of items.parquet alone: what was made of them is kept only as long as
            they stay the same.
        user, item: int64 ids. time: int64 microseconds. label: FP32 in [0, 1].
        items: table of the catalogue.
        described: int64 ids of items with media, ascending: those that content can say something of.
    """

    data: Path
    identity: str
    catalogue: str
    user: np.ndarray
    item: np.ndarray
    time: np.ndarray
    label: np.ndarray
    items: pa.Table
    described: np.ndarray

    @classmethod
    def read(cls, data: Path) -> Log:
        """Read a data set in Sightline's layout.

        Raises:
            DataError: no interactions, or they are not in time order.
        """
        items, rows = read_items(data), read_interactions(data)
        if rows.num_rows == 0:
            raise DataError(f"{data}/interactions.parquet: expected interactions to evaluate rankers on, it is empty")
        time = micros(rows["timestamp"])
        if (np.diff(time) < 0).any():
            raise DataError(f"{data}/interactions.parquet: expected rows in time order; sort them by timestamp")
        shown = [kind is not None for kind in items["media_type"].to_pylist()]
        files = ("items.parquet", "interactions.parquet", "dataset.json")
        digests = [hashlib.sha256((data / name).read_bytes()).hexdigest()[:12] for name in files]
        return cls(
            data=data, identity="-".join(digests), catalogue=digests[0], user=rows["user_id"].to_numpy(),
            item=rows["item_id"].to_numpy(), time=time, label=rows["label"].to_numpy().astype(np.float32), items=items,
            described=np.sort(items["item_id"].to_numpy()[np.array(shown)]),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One split of a log.

    Attributes:
        name: unique in its evaluation.
        part: int8 [rows], TRAIN, VALID, TEST or −1 for rows that are left out.
        history: bool [rows], events that profiles may hold (always only for later rows).
        fitted: bool [rows], rows whose labels anything may be fitted on (TRAIN and VALID).
        fit_items: int64 ids whose media and text the captioner may be fitted on.
        groups: int64 [items of the log's table]: parts for cross-fitting, −1 for items outside `fit_items`.
    """

    name: str
    part: np.ndarray
    history: np.ndarray
    fitted: np.ndarray
    fit_items: np.ndarray
    groups: np.ndarray

    def assign(self, start: int, time: np.ndarray) -> Assigned:
        """Rows of the log by their number. Labels of test rows are hidden: they are not in the examples."""
        rows = slice(start, start + len(time))
        part = self.part[rows]
        return Assigned(
            part=part, history=self.history[rows], fitted=self.fitted[rows], hidden=~self.fitted[rows] & (part == TEST)
        )


def folds(log: Log, split: str, *, count: int = 5, seed: int = 0) -> Iterator[Fold]:
    """The folds of a split.

    - `cold`: items are dealt into `count` seeded parts; each is the test part once, and a tenth of the other items is
      for early stopping, so that stopping, too, looks at items that training does not know. Histories hold no event
      on a test item. Only items with media are tested.
    - `temporal`: one fold, 80 / 10 / 10 % by time; histories stream through all of it.
    - `warm`: one fold, a seeded tenth of the rows each for stopping and testing; test rows enter no history.

    Raises:
        ConfigError: another name, or too few items for the folds.
    """
    if split not in SPLITS:
        raise ConfigError(f"--split is {split!r}; expected one of {', '.join(SPLITS)}")
    ids = log.items["item_id"].to_numpy()
    rng = np.random.default_rng([seed, 11])
    deal = rng.permutation(len(ids)) % count  # part of each item
    of_row = deal[_position(ids, log.item)]
    if split == "cold":
        if len(log.described) < 10 * count:
            raise ConfigError(
                f"{log.data}: {len(log.described)} items with media are too few for {count} cold folds; expected at "
                f"least {10 * count}"
            )
        stopping = rng.uniform(size=len(ids)) < VALID_SHARE
        for number in range(count):
            test_row = of_row == number
            valid_row = ~test_row & stopping[_position(ids, log.item)]
            part = np.where(test_row, TEST, np.where(valid_row, VALID, TRAIN)).astype(np.int8)
            part[(part != TRAIN) & ~np.isin(log.item, log.described)] = -1
            yield _fold(log, f"cold {number}", part, ~test_row, ids[deal != number], ids, deal)
    elif split == "temporal":
        cuts = np.quantile(log.time, [0.8, 0.9])
        part = np.searchsorted(cuts, log.time, side="right").astype(np.int8)
        order = np.array([TRAIN, VALID, TEST], np.int8)[part]
        seen = np.unique(log.item[order != TEST])
        yield _fold(log, "temporal", order, np.ones(len(part), bool), seen, ids, deal)
    else:
        draw = rng.uniform(size=len(log.item))
        part = np.where(draw < 0.1, TEST, np.where(draw < 0.2, VALID, TRAIN)).astype(np.int8)
        yield _fold(log, "warm", part, part != TEST, np.unique(log.item[part != TEST]), ids, deal)


def _fold(
    log: Log, name: str, part: np.ndarray, history: np.ndarray, fit_items: np.ndarray, ids: np.ndarray,
    deal: np.ndarray,
) -> Fold:  # fmt: skip
    may = np.isin(ids, fit_items)
    return Fold(
        name=name, part=part, history=history, fitted=(part == TRAIN) | (part == VALID),
        fit_items=np.sort(fit_items), groups=np.where(may, deal, -1),
    )  # fmt: skip


def _position(ids: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Where each wanted id stands in `ids`, whatever its order."""
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids[order], wanted)]
