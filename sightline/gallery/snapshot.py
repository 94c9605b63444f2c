"""Snapshots of what a search needs: FAISS indices and arrays in files, written once, mapped by all readers.

`snapshots/<position>/` has per slot `<slot>.json` (the serial and what there is), `.ids.npy`, `.vectors.npy` of the
fresh rows, and, of an approximate index, `.index` with `.rows.npy` (its ids), `.order.npy` and `.shown.npy`. A folder
is complete before the gallery names its position, and is removed after the gallery names the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sightline.gallery.base import GalleryVersion
from sightline.gallery.frozen import FrozenIndex, build, default_lists, faiss
from sightline.gallery.rows import FlatRows, VersionRows

if TYPE_CHECKING:
    from sightline.gallery.follow import Slot

__all__ = ["Plan", "exclusive", "plan", "read"]

FRESH, FRESH_SHARE = 512, 0.003
"""Rows beside an approximate index that are worth a new one: that many, and that share of all."""
DEAD = {"ivf": 0.1, "hnsw": 0.2}
"""Share of an approximate index's rows that may be dead; a graph takes long to build."""
STALE = 0.25
"""Share of a flat version's rows that may differ from its snapshot."""


@contextmanager
def exclusive(folder: Path) -> Iterator[bool]:
    """Whether nobody else is in here; ends with the process."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@dataclass(frozen=True)
class _Part:
    """One version's next files; the arrays are copies."""

    slot: Slot
    ids: NDArray[np.int64]
    """[F], of fresh rows; vectors [F, D]."""
    vectors: NDArray[np.float32]
    frozen: tuple[Any, NDArray[np.int64], NDArray[np.bool_]] | None
    """Index of N rows, ids [N], shown [N]."""
    work: str
    """`keep` the index, `add` the fresh rows to it, or `build` a new one."""

    def write(self, folder: Path, before: Path) -> None:
        """Into a folder; `before` is the one with the index as it is."""
        name, ids, vectors, frozen = self.slot.number, self.ids, self.vectors, self.frozen
        file = folder / f"{name}.index"
        if self.work == "keep" and frozen is not None:
            os.link(before / file.name, file)
        elif self.work == "add" and frozen is not None:
            index = faiss.read_index(str(before / file.name))
            index.add(vectors)
            faiss.write_index(index, str(file))
            frozen = (index, np.concatenate([frozen[1], ids]), np.concatenate([frozen[2], np.ones(len(ids), bool)]))
            ids, vectors = ids[:0], vectors[:0]
        elif self.work == "build":
            ids, vectors = self._visible()
            if len(ids):
                index = build(self.slot.version, vectors)
                faiss.write_index(index, str(file))
                frozen = (index, ids, np.ones(len(ids), bool))
                ids, vectors = ids[:0], vectors[:0]
            else:
                frozen = None
        order = np.argsort(ids)
        np.save(folder / f"{name}.ids.npy", ids[order])
        np.save(folder / f"{name}.vectors.npy", vectors[order])
        if frozen is not None:
            np.save(folder / f"{name}.rows.npy", frozen[1])
            np.save(folder / f"{name}.order.npy", np.argsort(frozen[1], kind="stable"))
            np.save(folder / f"{name}.shown.npy", frozen[2])
        (folder / f"{name}.json").write_text(json.dumps({"serial": self.slot.serial, "index": frozen is not None}))

    def _visible(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        if self.frozen is None:
            return self.ids, self.vectors
        index, rows, shown = self.frozen
        kept = np.flatnonzero(shown)
        if isinstance(index, faiss.IndexIVF):
            index.make_direct_map()
        return (
            np.concatenate([rows[kept], self.ids]),
            np.concatenate([index.reconstruct_batch(kept), self.vectors]),
        )


@dataclass(frozen=True)
class Plan:
    """A snapshot that is to be written: of all versions at one position."""

    position: int
    before: int
    parts: list[_Part]

    def write(self, snapshots: Path) -> int:
        """Durably, as a whole or not at all; the position, which is its folder's name."""
        folder, temporary = snapshots / str(self.position), snapshots / "unfinished"
        for leftover in (folder, temporary):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir()
        for part in self.parts:
            part.write(temporary, snapshots / str(self.before))
        for path in [*temporary.iterdir(), temporary]:
            _flush(path)
        temporary.rename(folder)
        _flush(snapshots)
        return self.position

    def clean(self, snapshots: Path) -> None:
        """Remove what is older than the snapshot before this one, which readers may be opening just now."""
        for folder in snapshots.iterdir():
            if folder.is_dir() and folder.name not in (str(self.position), str(self.before)):
                shutil.rmtree(folder, ignore_errors=True)


def plan(versions: Mapping[Slot, VersionRows], position: int, before: int, *, force: bool) -> Plan | None:
    """What a new snapshot of these rows should be; None where it is not worth its time, or nothing changed."""
    works = {slot: _work(slot.version, rows) for slot, rows in versions.items()}
    if position == before or not (force or any(due for _, due in works.values())):
        return None
    parts = []
    for slot, (work, due) in works.items():
        rows = versions[slot]
        ids, vectors = rows.fresh.contents()
        frozen = None
        if rows.frozen is not None:
            frozen = (rows.frozen.index, rows.frozen.ids.copy(), rows.frozen.shown.copy())
        if not due and not force:
            work = "keep"
        parts.append(_Part(slot, ids.copy(), vectors.copy(), frozen, work))
    return Plan(position, before, parts)


def _work(version: GalleryVersion, rows: VersionRows) -> tuple[str, bool]:
    """What would be done about a version's index, and whether it is due."""
    frozen, fresh = rows.frozen, rows.fresh
    if version.index == "flat":
        return "keep", fresh.changed > FRESH + STALE * fresh.count
    many = fresh.count > FRESH + FRESH_SHARE * rows.count
    if frozen is None:
        return "build", many
    outgrown = isinstance(frozen.index, faiss.IndexIVF) and default_lists(version, rows.count) > 2 * frozen.index.nlist
    if frozen.dead > DEAD[version.index] * len(frozen.ids) or (many and outgrown):
        return "build", True
    return ("add" if fresh.count else "keep"), many


def read(snapshots: Path, position: int, slots: Sequence[Slot]) -> dict[Slot, VersionRows] | None:
    """Rows of those slots that the snapshot has, mapped from its files; None where it is gone."""
    found = {}
    with suppress(FileNotFoundError):
        folder = snapshots / str(position)
        for slot in slots:
            try:
                head = json.loads((folder / f"{slot.number}.json").read_text())
            except FileNotFoundError:
                if folder.exists():
                    continue  # made since
                raise
            if head["serial"] != slot.serial:
                continue

            found[slot] = _read(folder, slot, indexed=head["index"])
        return found
    return None


def _read(folder: Path, slot: Slot, *, indexed: bool) -> VersionRows:
    def array(what: str) -> Any:
        return np.load(folder / f"{slot.number}.{what}.npy", mmap_mode="c")

    frozen = None
    if indexed:
        index = FrozenIndex.map(folder / f"{slot.number}.index", slot.version.index)
        frozen = FrozenIndex(index, array("rows"), array("order"), array("shown"))
    return VersionRows(slot.version, frozen, FlatRows(array("ids"), array("vectors")))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
