"""What a searching process has in memory: every version's seen items, kept up to date by a log of changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sightline.gallery import snapshot
from sightline.gallery.base import Found, GalleryVersion
from sightline.gallery.frozen import default_lists, nearest_lists
from sightline.gallery.merge import rank_merge
from sightline.gallery.rows import FlatRows, VersionRows

__all__ = ["Entry", "Follower", "Slot", "View"]

_CHUNK = 65_536  # vectors that are read at once


@dataclass(frozen=True)
class Slot:
    """A version and where it is kept."""

    number: int
    serial: int
    """Position of its creation: slots are used again."""
    version: GalleryVersion


@dataclass(frozen=True)
class Entry:
    """One write of the log: the items it touched, and the slots in which it changed their vectors."""

    ids: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    changed: tuple[int, ...] = ()

    def encode(self) -> bytes:
        """Number of slots, slots, ids."""
        return bytes([len(self.changed), *self.changed]) + self.ids.astype("<i8").tobytes()

    @classmethod
    def decode(cls, data: bytes) -> Entry:
        """From `encode`."""
        ids = np.frombuffer(data, "<i8", offset=1 + data[0]).astype(np.int64)
        return cls(ids, tuple(data[1 : 1 + data[0]]))


class View(Protocol):
    """A gallery at one moment."""

    transaction: int
    position: int
    slots: list[Slot]
    snapshot: int
    """Position of the newest one; 0 where there is none."""

    def entries(self, after: int) -> list[Entry] | None:
        """Those behind a position; None where they are no longer remembered."""

    def seen(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Numbers of the slots [N] in which queries see these ids; another number for those that are not there."""

    def all_seen(self, slot: Slot) -> NDArray[np.int64]:
        """Ids [N], ascending, that queries see there."""

    def vectors(self, slot: Slot, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """[N, D], all of them there."""


class Follower:
    """Every version's rows at one position of the log."""

    def __init__(self, snapshots: Path) -> None:
        self._snapshots = snapshots
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.transaction = self._position = self._snapshot = -1
        self._rows: dict[Slot, VersionRows] = {}

    def follow(self, view: View) -> None:
        """Come to the view's moment: all versions at once, so that no item is in two of them or in none."""
        entries = view.entries(self._position) if view.snapshot == self._snapshot else None
        if entries is None:
            entries = self._start(view)
        try:
            self._rows = {slot: self._rows.get(slot) or _empty(slot) for slot in view.slots}
            self._apply(view, entries)
        except BaseException:
            self.clear()  # half of a write is worse than nothing
            raise
        self._position, self.transaction = view.position, view.transaction

    def _start(self, view: View) -> list[Entry]:
        """Load the newest snapshot, or everything; the entries that are not in it."""
        self.clear()
        entries = view.entries(view.snapshot) if view.snapshot else None
        if entries is not None:
            loaded = snapshot.read(self._snapshots, view.snapshot, view.slots)
            if loaded is not None:
                self._rows, self._snapshot = loaded, view.snapshot
                return entries
        self._snapshot = view.snapshot
        for slot in view.slots:
            ids = view.all_seen(slot)
            vectors = np.empty((len(ids), slot.version.dimension), np.float32)
            for start in range(0, len(ids), _CHUNK):
                vectors[start : start + _CHUNK] = view.vectors(slot, ids[start : start + _CHUNK])
            self._rows[slot] = VersionRows(slot.version, None, FlatRows(ids, vectors, changed=len(ids)))
        return []

    def _apply(self, view: View, entries: list[Entry]) -> None:
        if not entries:
            return
        touched = np.unique(np.concatenate([entry.ids for entry in entries]))
        now = view.seen(touched)
        for slot, rows in self._rows.items():
            changed = [entry.ids for entry in entries if slot.number in entry.changed]
            if changed:
                rows.forget(np.unique(np.concatenate(changed)))
            rows.hide(touched[now != slot.number])
            missing = rows.show(touched[now == slot.number])
            for start in range(0, len(missing), _CHUNK):
                part = missing[start : start + _CHUNK]
                rows.fresh.add(part, view.vectors(slot, part))

    def search(self, queries: Mapping[str, NDArray[np.float32]], k: int, effort: int | None) -> Found:
        """As `Gallery.search`, of what is here."""
        rows = {slot.version.name: rows for slot, rows in self._rows.items()}
        asked = [(place, rows[name], array) for place, (name, array) in enumerate(queries.items()) if name in rows]
        everything = sum(each.count for _, each, _ in asked)
        empty = np.zeros((len(next(iter(queries.values()))), 0))
        lists, places = [(empty.astype(np.int64), empty.astype(np.float32))], [-1]
        inverted = []
        for place, each, array in asked:
            if each.fresh.count:
                lists.append(each.fresh.search(array, k))
                places.append(place)
            if each.frozen and each.frozen.count:
                wanted = effort or each.version.effort
                if each.version.index == "hnsw":
                    lists.append(each.frozen.search(array, k, wanted, each.count / everything))
                    places.append(place)
                else:
                    share = each.frozen.index.nlist / default_lists(each.version, everything)
                    inverted.append((place, each.frozen, array, wanted * share))
        if inverted:  # as many items are scanned as in one index of all of them, however they are divided into lists
            budget = max(1, round(sum(share for *_, share in inverted)))
            probes = nearest_lists([(frozen, array) for _, frozen, array, _ in inverted], budget)
            for (place, frozen, array, _), probe in zip(inverted, probes, strict=True):
                lists.append(frozen.scan(array, k, probe))
                places.append(place)
        merged = rank_merge(lists, k)
        return merged._replace(version=np.array([*places, -1], np.int8)[merged.version])

    def plan(self, *, force: bool) -> snapshot.Plan | None:
        """What a new snapshot of all this should be; None where it is not worth its time."""
        return snapshot.plan(self._rows, self._position, self._snapshot, force=force)

    def describe(self) -> dict[str, dict[str, Any]]:
        """Version → rows in memory."""
        return {slot.version.name: rows.describe() for slot, rows in self._rows.items()}


def _empty(slot: Slot) -> VersionRows:
    nothing = FlatRows(np.zeros(0, np.int64), np.zeros((0, slot.version.dimension), np.float32))
    return VersionRows(slot.version, None, nothing)
