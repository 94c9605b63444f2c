"""The queue of one machine: a folder in which every event is a folder that moves from place to place.

    tmp/             being written, or being removed
    new/<key>/       waiting: `media` with the bytes; its time of change is when it was put
    later/<key>/     waiting, but not before the folder's time of change
    taken/<taker>/   what one taker works on; the folder's time of change is the taker's last sign of life
    dead/<key>/      given up
    marks/           how far manifests came

`event.json` beside the media is the event's history (`Note`). Every move is one rename, which either happens or does
not, and to one process alone; an event that is there already (the rename finds a folder that is not empty) stays.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sightline.errors import StoreError
from sightline.queue.base import Bounds, DeadLetter, ItemEvent, ItemQueue, Note, Offer, Stats, Taken, parse_key

__all__ = ["FolderQueue"]

_POLL = 0.05  # seconds
_COUNTED = 0.2  # seconds for which a count of the events is good enough
_ABANDONED = 3600.0  # seconds after which what lies in tmp/ belongs to nobody
_PLACES = ("tmp", "new", "later", "taken", "dead", "marks")

_log = logging.getLogger(__name__)


class FolderQueue(ItemQueue):
    """A folder on a local disk; made on first use. What `put` accepted is flushed to the disk.

    The bounds are each process's own, from a count that is at most 0.2 s old: several that put at once may exceed them
    by what they put in that time.
    """

    def __init__(self, path: str | Path, bounds: Bounds | None = None) -> None:
        super().__init__(bounds)
        self.path = Path(path)
        self._tmp, self._new, self._later, self._takers, self._dead, self._marks = (
            self.path / place for place in _PLACES
        )
        self._lease = self._takers / f"{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._backlog: list[str] = []  # names of new/, the oldest last
        self._counted, self._events, self._bytes = 0.0, 0, 0
        self._recovered = 0.0
        self._lock = threading.Lock()
        with self._errors():
            for place in _PLACES:
                (self.path / place).mkdir(parents=True, exist_ok=True)

    def close(self) -> None:
        with suppress(OSError):
            self._lease.rmdir()  # where nothing is taken

    def offer(self, event: ItemEvent) -> Offer:
        with self._errors(), self._lock:
            if self._is_known(event.key):
                return Offer.known
            self._count()
            size = len(event.media)
            if self._events + 1 > self.bounds.events or self._bytes + size > self.bounds.media_bytes:
                return Offer.full
            folder = self._tmp / uuid.uuid4().hex
            folder.mkdir()
            with (folder / "media").open("wb") as file:
                file.write(event.media)
                file.flush()
                os.utime(file.fileno(), ns=(time.time_ns(),) * 2)  # the kernel's own clock ticks every 4 ms
                os.fsync(file.fileno())
            _flush(folder)
            if not self._move(folder, self._new / event.key):
                return Offer.known
            _flush(self._new)
            self._events += 1
            self._bytes += size
            return Offer.queued

    def take(self, count: int, wait_seconds: float = 0.0) -> list[Taken]:
        until = time.monotonic() + wait_seconds
        while True:
            with self._errors(), self._lock:
                self._recover()
                self._lease.mkdir(exist_ok=True)
                os.utime(self._lease)
                found = self._claim_some(count)
            left = until - time.monotonic()
            if found or left <= 0:
                return found
            time.sleep(min(_POLL, left))

    def renew(self, taken: Sequence[Taken]) -> None:
        with self._errors(), suppress(FileNotFoundError):
            os.utime(self._lease)

    def done(self, taken: Taken) -> None:
        with self._errors():
            self._remove(taken.handle)

    def retry(self, taken: Taken, reason: str, *, delay: float = 0.0) -> None:
        note = taken.note.and_(attempts=taken.note.attempts + 1, reason=reason, at=time.time())
        self._return(taken, note, time.time() + delay)

    def put_back(self, taken: Taken) -> None:
        self._return(taken, taken.note.and_(takes=taken.note.takes - 1), taken.put_at)

    def dead(self, taken: Taken, reason: str) -> None:
        with self._errors(), suppress(FileNotFoundError):  # another taker's by now
            note = taken.note.and_(attempts=taken.note.attempts + 1, reason=reason, at=time.time())
            _write(taken.handle / "event.json", note)
            target = self._dead / taken.event.key
            self._remove(target)
            self._move(taken.handle, target)

    def stats(self) -> Stats:
        with self._errors():
            waiting = [*_list(self._new), *_list(self._later)]
            taken = [event for taker in _list(self._takers) for event in _list(taker)]
            times = [at for event in (*waiting, *taken) if (at := _time(event / "media"))]
            return Stats(
                waiting=len(waiting), taken=len(taken), dead=len(_list(self._dead)),
                media_bytes=sum(parse_key(event.name)[2] for event in (*waiting, *taken)),
                oldest_seconds=max(time.time() - min(times), 0.0) if times else 0.0,
            )  # fmt: skip

    def dead_letters(self) -> list[DeadLetter]:
        with self._errors():
            found = [DeadLetter.of(event.name, _read(event)) for event in _list(self._dead)]
        return sorted(found, key=lambda letter: letter.note.at)

    def revive(self, letter: DeadLetter) -> None:
        folder = self._dead / letter.key
        with self._errors(), suppress(FileNotFoundError):
            (folder / "event.json").unlink()
            os.utime(folder / "media")
            self._move(folder, self._new / letter.key)

    def drop(self, letter: DeadLetter) -> None:
        with self._errors():
            self._remove(self._dead / letter.key)

    def mark(self, name: str) -> int:
        with self._errors(), suppress(FileNotFoundError):
            return int(self._mark(name).read_text())
        return 0

    def set_mark(self, name: str, rows: int | None) -> None:
        with self._errors():
            if rows is None:
                self._mark(name).unlink(missing_ok=True)
            else:
                part = self._tmp / uuid.uuid4().hex
                part.write_text(str(rows))
                part.replace(self._mark(name))

    def _mark(self, name: str) -> Path:
        return self._marks / hashlib.sha256(name.encode()).hexdigest()

    def _is_known(self, key: str) -> bool:
        """Taken last: an event that is taken meanwhile is then found there."""
        return any(os.path.exists(place / key) for place in (self._new, self._later, *_list(self._takers)))

    def _count(self) -> None:
        if time.monotonic() - self._counted > _COUNTED:
            places = (self._new, self._later, *_list(self._takers))
            sizes = [parse_key(event.name)[2] for place in places for event in _list(place)]
            self._events, self._bytes, self._counted = len(sizes), sum(sizes), time.monotonic()

    def _waiting(self) -> Iterator[Path]:
        """Those whose time has come, then the new ones, the oldest first."""
        now = time.time()
        due = [(at, event) for event in _list(self._later) if 0 < (at := _time(event)) <= now]
        yield from (event for _, event in sorted(due))
        if not self._backlog:
            new = [(_time(event / "media"), event.name) for event in _list(self._new)]
            self._backlog = [name for _, name in sorted(new, reverse=True)]
        while self._backlog:
            yield self._new / self._backlog.pop()

    def _claim_some(self, count: int) -> list[Taken]:
        found: list[Taken] = []
        waiting = self._waiting()
        while len(found) < count and (event := next(waiting, None)) is not None:
            try:
                taken = self._claim(event)
            except (OSError, StoreError):
                if not found:
                    raise
                break  # those that were taken are not to be forgotten; the next call says what is wrong
            if taken is not None:
                found.append(taken)
        return found

    def _claim(self, event: Path) -> Taken | None:
        """None where another taker was faster."""
        digest, item, _ = parse_key(event.name)
        handle = self._lease / event.name
        try:
            os.rename(event, handle)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                return None
            raise
        media = handle / "media"
        try:
            note = _read(handle)
            note = note.and_(takes=note.takes + 1)
            _write(handle / "event.json", note)
            found = ItemEvent(item_id=item, media=media.read_bytes(), media_hash=digest)
        except OSError:  # a full disk, perhaps: somebody may have more luck later
            self._move(handle, self._later / event.name)
            raise
        return Taken(event=found, note=note, put_at=_time(media), handle=handle)

    def _recover(self) -> None:
        """Give what silent takers hold to whoever comes first; clear what writers that were killed left."""
        if time.monotonic() - self._recovered < self.bounds.lease_seconds / 4:
            return
        now, self._recovered = time.time(), time.monotonic()
        for taker in _list(self._takers):
            if taker != self._lease and now - _time(taker) > self.bounds.lease_seconds:
                for event in _list(taker):
                    os.utime(event, (_time(event / "media"),) * 2)  # due since it was put
                    self._move(event, self._later / event.name)
                with suppress(OSError):
                    taker.rmdir()
        for left in _list(self._tmp):
            if now - _time(left) > _ABANDONED:
                _erase(left)

    def _return(self, taken: Taken, note: Note, due: float) -> None:
        with self._errors(), suppress(FileNotFoundError):  # another taker's by now
            _write(taken.handle / "event.json", note)
            os.utime(taken.handle, (due, due))
            self._move(taken.handle, self._later / taken.event.key)

    def _move(self, source: Path, target: Path) -> bool:
        """False where the target is there already; the source is removed then, or was taken by another."""
        try:
            os.rename(source, target)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            self._remove(source)
            return False
        return True

    def _remove(self, event: Path) -> None:
        """At once for everybody else; nothing where it is not there."""
        trash = self._tmp / uuid.uuid4().hex
        with suppress(FileNotFoundError):
            os.rename(event, trash)
            _erase(trash)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"{self.path}: expected a folder for a queue, readable and writable: {error}") from error


def _list(folder: Path) -> list[Path]:
    """What is in a folder, nothing where there is none."""
    try:
        return [folder / name for name in os.listdir(folder)]
    except FileNotFoundError:
        return []


def _time(path: Path) -> float:
    """Of the last change, seconds since 1970; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read(event: Path) -> Note:
    path = event / "event.json"
    try:
        return Note.parse(path.read_bytes(), str(path))
    except FileNotFoundError:
        return Note()
    except StoreError as error:  # as a loss of power may leave it: the event is what counts
        _log.warning("%s; it begins anew", error)
        return Note()


def _write(path: Path, note: Note) -> None:
    part = path.with_suffix(".part")
    part.write_text(note.model_dump_json())
    part.replace(path)


def _flush(folder: Path) -> None:
    """To the disk: which names it has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _erase(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
