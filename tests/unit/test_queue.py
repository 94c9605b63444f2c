"""The nearline queue in a folder, on a Redis server and on a cluster: the same of all of them, then each its own."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from sightline.errors import ConfigError, DataError, StoreError
from sightline.queue import Bounds, ItemEvent, ItemQueue, Offer, open_queue
from sightline.queue.manifest import count_items, enqueue
from sightline.schema import ITEMS
from tests.feature_stores import PROCESSES, empty

LEASE = 0.4  # seconds
Opener = Callable[..., ItemQueue]


@pytest.fixture(params=["folder", "lone_redis", "redis_nodes"], ids=["folder", "server", "cluster"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty queue."""
    if request.param == "folder":
        return str(tmp_path / "queue")
    url: str = request.getfixturevalue(request.param)
    empty(url)
    return url


@pytest.fixture
def opened(place: str) -> Iterator[Opener]:
    """Takers of the queue, each as if in a process of its own."""
    queues = []

    def opener(**bounds: float) -> ItemQueue:
        queues.append(open_queue(place, Bounds(**{"lease_seconds": 60, **bounds})))  # type: ignore[arg-type]
        return queues[-1]

    yield opener
    for queue in queues:
        queue.close()


def event(number: int, *, item: int | None = None, size: int = 20) -> ItemEvent:
    media = f"medium {number} ".encode().ljust(size, b".")
    return ItemEvent(
        item_id=number if item is None else item, media=media, media_hash=hashlib.sha256(media).hexdigest()
    )


def fill(queue: ItemQueue, *numbers: int) -> None:
    for number in numbers:
        assert queue.put(event(number))


def test_what_was_put_is_taken_whole_the_oldest_first(opened: Opener) -> None:
    fill(queue := opened(), *range(1, 6))
    before = time.time()
    assert [one.event for one in queue.take(3)] == [event(1), event(2), event(3)]
    other = opened().take(9)
    assert [one.event for one in other] == [event(4), event(5)]
    assert {one.note.takes for one in other} == {1}
    assert all(before - 5 < one.put_at <= before + 0.001 for one in other)
    assert queue.take(9) == []


def test_equal_events_collapse_until_they_are_done(opened: Opener) -> None:
    queue = opened()
    assert queue.offer(event(1)) is Offer.queued
    assert queue.offer(event(1)) is Offer.known
    assert not opened().put(event(1))
    assert queue.put(event(1, item=8))  # another item with the same picture has a record of its own
    assert queue.put(event(1, item=0))
    first, second, third = queue.take(9)
    assert (first.event.item_id, second.event.item_id, third.event.item_id) == (1, 8, 0)
    assert not opened().put(event(1))  # being worked on
    queue.retry(first, "no luck")
    assert not queue.put(event(1))  # waiting again
    queue.done(second)
    assert queue.put(event(1, item=8))


def test_a_full_queue_refuses(opened: Opener) -> None:
    queue = opened(events=3)
    fill(queue, 1, 2, 3)
    assert queue.offer(event(4)) is Offer.full
    assert queue.offer(event(3)) is Offer.known
    taken = queue.take(1)
    assert queue.offer(event(4)) is Offer.full  # what is taken counts
    queue.done(taken[0])
    time.sleep(0.25)  # a folder counts five times a second
    assert queue.put(event(4))

    small = opened(media_bytes=100)
    assert small.stats().media_bytes == 60
    assert small.offer(event(5, size=41)) is Offer.full
    assert small.put(event(5, size=40))
    assert small.offer(event(6, size=1)) is Offer.full


def test_silent_takers_lose_what_they_hold(opened: Opener) -> None:
    silent, alive, heir = (opened(lease_seconds=LEASE) for _ in range(3))
    fill(silent, *range(1, 7))
    lost, kept = silent.take(2), alive.take(2)
    until = time.monotonic() + 2.5 * LEASE
    found = []
    while time.monotonic() < until:
        alive.renew(kept)
        found += heir.take(9, 0.05)
        heir.renew(found)
    assert [one.event for one in found] == [event(5), event(6), event(1), event(2)]
    assert [one.note.takes for one in found] == [1, 1, 2, 2]
    silent.done(lost[0])  # late, but its effect is there: whether it counts is up to the queue
    silent.retry(lost[1], "late")
    silent.dead(lost[1], "late")
    assert heir.take(9) == []
    assert heir.dead_letters() == []
    for one in (*found, *kept):
        heir.done(one)
    alive.done(kept[0])
    alive.done(kept[1])
    time.sleep(1.5 * LEASE)
    assert heir.take(9) == []
    assert heir.stats().waiting == heir.stats().taken == 0


def test_failures_are_counted_and_wait(opened: Opener) -> None:
    fill(queue := opened(), 1)
    for attempt in range(1, 4):
        (taken,) = queue.take(1, 2.0)
        assert (taken.note.takes, taken.note.attempts) == (attempt, attempt - 1)
        began = time.time()
        queue.retry(taken, f"failure {attempt}", delay=0.2)
        assert queue.stats().waiting == 1
        assert queue.take(1) == []
    (taken,) = queue.take(1, 2.0)
    assert time.time() - began > 0.19
    assert taken.note.reason == "failure 3"
    queue.put_back(taken)
    (taken,) = opened().take(1)
    assert (taken.note.takes, taken.note.attempts) == (4, 3)
    queue.done(taken)
    fill(queue, 1)
    assert opened().take(1)[0].note.takes == 1


def test_dead_letters_keep_media_and_reason(opened: Opener) -> None:
    fill(queue := opened(), 1, 2, 3)
    began = time.time()
    one, two, _ = queue.take(3)
    queue.retry(one, "no luck")
    (one,) = queue.take(1)
    queue.dead(two, "not a picture: «№»")
    queue.dead(one, "failed")
    letters = queue.dead_letters()
    assert [(letter.item_id, letter.media_hash, letter.media_bytes) for letter in letters] == [
        (number, event(number).media_hash, 20) for number in (2, 1)
    ]
    assert [(letter.note.reason, letter.note.attempts) for letter in letters] == [
        ("not a picture: «№»", 1), ("failed", 2),
    ]  # fmt: skip
    assert all(began - 1 < letter.note.at < time.time() + 1 for letter in letters)
    assert (queue.stats().waiting, queue.stats().taken, queue.stats().dead) == (0, 1, 2)

    assert queue.put(event(2))  # a dead one hinders nobody
    (again,) = queue.take(1)
    queue.dead(again, "again not")
    assert [letter.note.reason for letter in queue.dead_letters()] == ["failed", "again not"]

    queue.revive(letters[1])
    (revived,) = queue.take(1)
    assert (revived.event, revived.note.takes, revived.note.attempts) == (event(1), 1, 0)
    queue.drop(letters[0])
    queue.drop(letters[0])
    assert queue.dead_letters() == []


def test_stats_tell_the_age_of_the_oldest(opened: Opener) -> None:
    queue = opened()
    assert queue.stats().oldest_seconds == 0
    fill(queue, 1)
    time.sleep(0.2)
    fill(queue, 2)
    (taken,) = queue.take(1)
    assert 0.19 < queue.stats().oldest_seconds < 10
    queue.retry(taken, "no luck")
    assert queue.stats().oldest_seconds > 0.19  # waiting on does not make it younger
    queue.done(queue.take(1)[0])
    assert queue.stats().oldest_seconds < 0.19


def test_take_waits_for_what_comes(place: str, opened: Opener) -> None:
    queue = opened()
    began = time.monotonic()
    assert queue.take(1, 0.2) == []
    assert 0.15 < time.monotonic() - began < 5
    process = PROCESSES.Process(target=_put_later, args=(place,))
    process.start()
    assert [one.event for one in queue.take(1, 20)] == [event(7)]
    process.join()


def _put_later(place: str) -> None:
    time.sleep(0.3)
    with open_queue(place) as queue:
        queue.put(event(7))


def test_of_many_processes_one_gets_each(place: str) -> None:
    processes, ends = [], []
    for number in range(3):
        ours, theirs = PROCESSES.Pipe()
        ends.append(ours)
        processes.append(PROCESSES.Process(target=_put_and_take, args=(place, number, theirs)))
        processes[-1].start()
    found: Counter[int] = Counter()
    put = 0
    for process, end in zip(processes, ends, strict=True):
        mine, taken = end.recv()
        put += mine
        found.update(taken)
        process.join()
    assert put == 30
    assert found == Counter({number: 1 for number in range(30)})


def _put_and_take(place: str, first: int, end: Connection) -> None:
    """The same events in every process."""
    with open_queue(place) as queue:
        put = sum(queue.put(event(1000 + number, item=number)) for number in range(30))
        found = []
        while taken := queue.take(4, 0.5):
            found += [one.event.item_id for one in taken]
            time.sleep(0.005 * first)  # until all have offered theirs: a done event may be put again
            queue.renew(taken)
        end.send((put, found))


def test_killed_takers_events_come_back(place: str, opened: Opener) -> None:
    fill(opened(), *range(1, 5))
    ours, theirs = PROCESSES.Pipe()
    process = PROCESSES.Process(target=_take_and_hang, args=(place, theirs))
    process.start()
    assert ours.recv() == 4
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    heir = opened(lease_seconds=LEASE)
    assert heir.stats().taken == 4
    found = []
    while len(found) < 4:
        found += heir.take(9, 5.0)
    assert {one.event.item_id for one in found} == {1, 2, 3, 4}


def _take_and_hang(place: str, end: Connection) -> None:
    end.send(len(open_queue(place).take(4)))
    time.sleep(60)


def test_marks(opened: Opener) -> None:
    queue, name = opened(), "a/path with spaces\nand lines"
    assert queue.mark(name) == 0
    queue.set_mark(name, 7)
    assert opened().mark(name) == 7
    queue.set_mark(name, None)
    queue.set_mark(name, None)
    assert queue.mark(name) == 0


# --- manifests ----------------------------------------------------------------------------------------------


def manifest(folder: Path, rows: int, group: int = 100) -> Path:
    """Every third item beside the file, every fifth without media."""
    (folder / "media").mkdir(parents=True)
    columns: dict[str, list[object]] = {name: [] for name in ITEMS.names}
    for number in range(1, rows + 1):
        beside, none = number % 3 == 0, number % 5 == 0
        if beside and not none:
            (folder / f"media/{number}").write_bytes(event(number).media)
        values = {
            "item_id": number, "media": None if beside or none else event(number).media,
            "media_uri": f"media/{number}" if beside and not none else None, "media_type": None if none else "image",
            "created_at": 0, "text": None,
        }  # fmt: skip
        for name, value in values.items():
            columns[name].append(value)
    pq.write_table(pa.table(columns, ITEMS), folder / "items.parquet", row_group_size=group)
    return folder / "items.parquet"


def drain(queue: ItemQueue) -> list[int]:
    found = []
    while taken := queue.take(50):
        for one in taken:
            assert one.event == event(one.event.item_id)
            queue.done(one)
            found.append(one.event.item_id)
    return found


def test_a_catalogue_is_queued_and_an_interruption_resumed(tmp_path: Path, opened: Opener) -> None:
    queue, path = opened(), manifest(tmp_path / "data", 150, group=70)
    wanted = [number for number in range(1, 151) if number % 5]
    seen: list[int] = []

    def advance(rows: int) -> None:
        seen.append(rows)
        if sum(seen) >= 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        enqueue(queue, path, advance)
    first = drain(queue)
    assert 56 <= len(first) < 112
    seen.clear()
    assert enqueue(queue, path, seen.append) < 70
    assert seen[0] >= 70
    assert sum(seen) == count_items(path) == 150
    assert sorted({*first, *drain(queue)}) == wanted
    assert enqueue(queue, path) == len(wanted)  # from the beginning again
    assert enqueue(queue, path) == 0


def test_a_full_queue_makes_the_catalogue_wait(tmp_path: Path, opened: Opener) -> None:
    queue, path, most, found = opened(events=10), manifest(tmp_path / "data", 60), [0], []

    def nap(seconds: float) -> None:
        most.append(queue.stats().waiting)
        found.extend(drain(queue))
        time.sleep(seconds)

    assert enqueue(queue, path, nap=nap) == 48
    assert max(most) == 10
    assert sorted([*found, *drain(queue)]) == [number for number in range(1, 61) if number % 5]


def test_manifests_that_cannot_be(tmp_path: Path) -> None:
    queue = open_queue(str(tmp_path / "queue"), Bounds(media_bytes=10))
    with pytest.raises(DataError, match=r"item 1: expected media of at most 10 bytes.*--max-bytes"):
        enqueue(queue, manifest(tmp_path / "data", 5))
    pq.write_table(pa.table({"item_id": [1]}), tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"short\.parquet: expected .* there is no media"):
        enqueue(queue, tmp_path / "short.parquet")
    with pytest.raises(DataError, match=r"none\.parquet: expected a Parquet file of items"):
        enqueue(queue, tmp_path / "none.parquet")


# --- each its own -------------------------------------------------------------------------------------------


def test_events_and_bounds_that_cannot_be() -> None:
    for item, digest in ((-1, "0" * 64), (2**63, "0" * 64), (1, "0" * 63), (1, "G" * 64)):
        with pytest.raises(DataError, match="event: expected an item id"):
            ItemEvent(item_id=item, media=b"", media_hash=digest)
    with pytest.raises(ConfigError, match="lease_seconds: expected a number above 0, got 0"):
        Bounds(lease_seconds=0)


def test_a_folder_clears_what_killed_writers_left(tmp_path: Path) -> None:
    with open_queue(str(tmp_path)) as queue:
        fill(queue, 1)
        for name, age in (("fresh", 0), ("old", 7200)):
            (tmp_path / "tmp" / name).mkdir()
            (tmp_path / "tmp" / name / "media").write_bytes(b"half")
            os.utime(tmp_path / "tmp" / name, (time.time() - age,) * 2)
        assert len(queue.take(9)) == 1
        assert os.listdir(tmp_path / "tmp") == ["fresh"]


def test_a_folder_says_what_does_not_belong_there(tmp_path: Path) -> None:
    with open_queue(str(tmp_path)) as queue:
        (tmp_path / "new" / "holiday").mkdir()
        with pytest.raises(StoreError, match="holiday: expected the name of an event"):
            queue.stats()
        with pytest.raises(StoreError, match="holiday"):
            queue.put(event(1))
        with pytest.raises(StoreError, match="holiday"):
            queue.take(1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="file: expected a folder for a queue"):
        open_queue(str(tmp_path / "file"))


def test_a_damaged_history_is_forgotten_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_queue(str(tmp_path)) as queue:
        fill(queue, 1)
        queue.retry(queue.take(1)[0], "no luck")
        next(tmp_path.glob("later/*/event.json")).write_text("{")
        (taken,) = queue.take(1)
        assert (taken.event, taken.note.takes, taken.note.attempts) == (event(1), 1, 0)
        assert "event.json: expected the JSON of an event's history" in caplog.text


def test_what_cannot_be_read_does_not_keep_what_was_taken(tmp_path: Path) -> None:
    with open_queue(str(tmp_path)) as queue:
        fill(queue, 1, 2)
        (tmp_path / "new" / event(2).key / "media").unlink()
        (tmp_path / "new" / event(2).key / "media").mkdir()
        later = time.time() + 60
        os.utime(tmp_path / "new" / event(2).key / "media", (later, later))
        assert [one.event for one in queue.take(2)] == [event(1)]
        with pytest.raises(StoreError, match=r"expected a folder for a queue.*Is a directory"):
            queue.take(2)


def test_a_server_that_lost_everything_is_used_on(lone_redis: str) -> None:
    with open_queue(lone_redis) as queue, redis.Redis.from_url(lone_redis) as client:
        fill(queue, 1)
        client.flushall()
        assert queue.stats().waiting == 0
        assert queue.take(1) == []
        fill(queue, 1)
        assert [one.event for one in queue.take(1)] == [event(1)]


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(StoreError, match=r"redis://127\.0\.0\.1:1: expected a Redis server that answers: .*refused"):
        open_queue("redis://:s3cret@127.0.0.1:1")
    with pytest.raises(ConfigError, match="no_such_option"):
        open_queue("redis://127.0.0.1:1?no_such_option=1")
