"""The nearline worker with a captioner that does what it is told; LMDB and a folder, then Redis for both."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from serving.exposition import exposed
from serving.nearline import Worker, WorkerConfig
from sightline.annotation import Annotated
from sightline.cli import app
from sightline.errors import ConfigError, ReleaseError, ServingError, StoreError, TokenSpecError
from sightline.features import item_schema
from sightline.item_records import CaptionedItem, Recorder, Reply, Unavailable, to_items
from sightline.media import content_hash
from sightline.metrics import Metrics
from sightline.queue import Bounds, ItemEvent, ItemQueue, open_queue
from sightline.store import FeatureStore, open_store, transfer
from sightline.tokens import TokenSpec
from tests.feature_stores import PROCESSES, empty

WORDS = ["red", "blue", "mug", "star", "cat", "boat"]
SPEC = TokenSpec.fit([f"a {a} {b}" for a in WORDS for b in WORDS], length=4, families=("word",))
SCHEMA = item_schema("test-captioner", SPEC.version, SPEC.length)
QUICK = WorkerConfig(batch=4, attempts=3, backoff_seconds=0.01, longest_seconds=0.02)


def medium(number: int, kind: str = "good") -> bytes:
    return f"{kind} {number}".encode()


def annotation(media: bytes) -> str:
    """What the captioner says of it."""
    number = int(media.split()[1])
    return Annotated(f"a {WORDS[number % 6]} {WORDS[number // 6 % 6]}", confidences={WORDS[number % 6]: 7}).to_text()


def describe(media: list[bytes]) -> list[Reply]:
    """`poison` is rejected, `broken` fails with all that are in its batch."""
    if any(one.startswith(b"broken") for one in media):
        raise ServingError("the decoder fell over")
    return [Reply(error="not a picture") if one.startswith(b"poison") else Reply(annotation(one)) for one in media]


def event(number: int, kind: str = "good", *, item: int | None = None) -> ItemEvent:
    media = medium(number, kind)
    return ItemEvent(item_id=number if item is None else item, media=media, media_hash=content_hash(media))


@pytest.fixture(params=["embedded", "server"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Locations of an empty queue and an empty store."""
    if request.param == "embedded":
        return str(tmp_path / "queue"), str(tmp_path / "store")
    url: str = request.getfixturevalue("lone_redis")
    empty(url)
    return url, url


@pytest.fixture
def embedded(tmp_path: Path) -> tuple[str, str]:
    return str(tmp_path / "queue"), str(tmp_path / "store")


def work(
    places: tuple[str, str], caption: Callable[[list[bytes]], list[Reply]], events: Sequence[ItemEvent],
    check: Callable[[ItemQueue, FeatureStore], object] = lambda queue, store: None, config: WorkerConfig = QUICK,
) -> Counter[str]:  # fmt: skip
    """Until the queue is empty; how the events ended."""
    ended: Counter[str] = Counter()
    with open_queue(places[0]) as queue, open_store(places[1]) as store:
        for one in events:
            assert queue.put(one)
        tell = lambda result: ended.update([result])  # noqa: E731
        Worker(queue, caption, Recorder(store, SCHEMA, SPEC), config, tell=tell).run(until_empty=True)
        check(queue, store)
    return ended


def assert_written(store: FeatureStore, items: Sequence[int]) -> None:
    """Every item has its one record, whole and right, and nobody else has any; so have the captions."""
    report = transfer.verify(store, SCHEMA, lambda rows: None)
    assert (report.records, report.damaged) == (len(items), {})
    for item, found in zip(items, store.read_details(items, [SCHEMA.version]), strict=True):
        assert found is not None
        text = annotation(medium(item))
        assert (found.caption, found.media_hash) == (text, event(item).media_hash)
        assert found.tokens == [token for token in SPEC.encode(text).tolist() if token]
    captions = store.read_captions(SCHEMA.captioner, [event(item).media_hash for item in items])
    assert captions == [annotation(medium(item)) for item in items]


def test_every_item_gets_its_record_and_every_failure_its_letter(places: tuple[str, str]) -> None:
    good = list(range(1, 21))
    events = [*map(event, good), event(30, "poison"), event(31, "broken"), event(3, item=90), event(40, item=0)]
    calls: list[int] = []

    def caption(media: list[bytes]) -> list[Reply]:
        calls.append(len(media))
        return describe(media)

    def check(queue: ItemQueue, store: FeatureStore) -> None:
        (twin,) = store.read_details([90], [SCHEMA.version])
        assert twin is not None
        assert twin.caption == annotation(medium(3))  # another item with the same media
        store.delete(SCHEMA, [90])
        assert_written(store, good)
        assert store.read_captions(SCHEMA.captioner, [event(40).media_hash]) == [annotation(medium(40))]
        letters = {letter.item_id: letter for letter in queue.dead_letters()}
        assert letters.keys() == {30, 31}
        assert (letters[30].note.reason, letters[30].note.attempts) == ("not a picture", 1)
        assert letters[31].note.reason == "failed 3 times, at last: the decoder fell over"
        assert letters[31].note.attempts == letters[31].note.takes == 3
        stats = queue.stats()
        assert (stats.waiting, stats.taken, stats.dead) == (0, 0, 2)

    assert work(places, caption, events, check) == {"captioned": 22, "retried": 2, "dead": 2}
    assert max(calls) == QUICK.batch


def test_a_full_captioner_costs_no_event_an_attempt(embedded: tuple[str, str]) -> None:
    failures = iter([True] * 12)
    times: list[float] = []

    def caption(media: list[bytes]) -> list[Reply]:
        times.append(time.monotonic())
        if next(failures, False):
            raise Unavailable("full")
        return describe(media)

    slow = WorkerConfig(batch=4, attempts=3, backoff_seconds=0.01, longest_seconds=0.08)
    assert work(embedded, caption, list(map(event, range(1, 9))), config=slow) == {"captioned": 8}
    waits = np.diff(times)[:12]
    assert waits[:2].max() < waits[5:].min() + 0.05
    assert min(waits[5:]) > 0.039  # half of the longest


def test_backoff_doubles_up_to_a_bound_and_spreads() -> None:
    config = WorkerConfig(backoff_seconds=1, longest_seconds=20)
    for failures, longest in ((1, 1), (2, 2), (3, 4), (5, 16), (6, 20), (5000, 20)):
        delays = [config.delay(failures) for _ in range(50)]
        assert longest / 2 <= min(delays) < max(delays) <= longest
        assert len(set(delays)) == 50
    with pytest.raises(ConfigError, match="batch: expected a number above 0, got 0"):
        WorkerConfig(batch=0)


def test_a_store_that_is_away_is_waited_for(embedded: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    write, failures, captioned = Recorder.write, iter([True] * 3), []

    def failing(recorder: Recorder, rows: Sequence[CaptionedItem]) -> None:
        if next(failures, False):
            raise StoreError("away")
        write(recorder, rows)

    def caption(media: list[bytes]) -> list[Reply]:
        captioned.extend(media)
        return describe(media)

    monkeypatch.setattr(Recorder, "write", failing)
    ended = work(embedded, caption, list(map(event, range(1, 5))), lambda _, store: assert_written(store, range(1, 5)))
    assert ended == {"captioned": 4}
    assert len(captioned) == 4  # what was captioned is not thrown away


def test_one_malformed_caption_fails_alone(embedded: tuple[str, str]) -> None:
    def caption(media: list[bytes]) -> list[Reply]:
        return [Reply("a cup\x1fz nonsense") if one == medium(2) else reply
                for one, reply in zip(media, describe(media), strict=True)]  # fmt: skip

    def check(queue: ItemQueue, store: FeatureStore) -> None:
        assert_written(store, [1, 3, 4])
        (letter,) = queue.dead_letters()
        assert letter.item_id == 2
        assert "failed 3 times, at last: caption 'a cup': field 'z nonsense' is none" in letter.note.reason

    ended = work(embedded, caption, list(map(event, range(1, 5))), check)
    assert ended == {"captioned": 3, "retried": 2, "dead": 1}


def test_an_event_that_never_ends_is_given_up(embedded: tuple[str, str]) -> None:
    with open_queue(embedded[0]) as queue:
        queue.put(event(1))
        for _ in range(3):  # as if its takers had been killed
            (taken,) = queue.take(1, 1.0)
            queue.retry(taken, "no luck") if taken.note.takes == 1 else _kill(queue, embedded[0])
    config = WorkerConfig(takes=3, backoff_seconds=0.01)
    with open_queue(embedded[0], Bounds(lease_seconds=0.01)) as queue, open_store(embedded[1]) as store:
        Worker(queue, describe, Recorder(store, SCHEMA, SPEC), config).run(until_empty=True)
        (letter,) = queue.dead_letters()
    assert letter.note.reason == "taken 3 times without an end; the last failure: no luck"


def _kill(queue: ItemQueue, folder: str) -> None:
    """What it holds has been silent for an hour."""
    for taker in Path(folder, "taken").iterdir():
        taker.rename(taker.with_name(f"{taker.name}-killed"))
        os.utime(taker.with_name(f"{taker.name}-killed"), (0, 0))
    queue._recovered = -1e9  # type: ignore[attr-defined]


def test_a_worker_holds_two_batches_and_gives_back_what_it_does_not_begin(places: tuple[str, str]) -> None:
    asked, go_on = threading.Event(), threading.Event()

    def caption(media: list[bytes]) -> list[Reply]:
        asked.set()
        assert go_on.wait(30)
        return describe(media)

    with open_queue(places[0]) as queue, open_store(places[1]) as store:
        for number in range(1, 31):
            queue.put(event(number))
        worker = Worker(queue, caption, Recorder(store, SCHEMA, SPEC), QUICK)
        thread = threading.Thread(target=worker.run)
        thread.start()
        assert asked.wait(30)
        until = time.monotonic() + 20
        while queue.stats().taken < 8 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert queue.stats().taken == 8
        worker.stop()
        go_on.set()
        thread.join()
        stats = queue.stats()
        assert (stats.waiting, stats.taken) == (26, 0)
        assert_written(store, range(1, 5))
        assert {one.note.takes for one in queue.take(26)} == {1}  # those that went back, too


def test_another_release_ends_the_worker(embedded: tuple[str, str]) -> None:
    def caption(media: list[bytes]) -> list[Reply]:
        raise ReleaseError("another one is served")

    with pytest.raises(ReleaseError):
        work(embedded, caption, [event(1)])
    with open_queue(embedded[0]) as queue:
        assert (queue.stats().waiting, queue.stats().taken) == (1, 0)


def test_long_batches_outlive_the_lease(places: tuple[str, str]) -> None:
    """One worker's batch takes three leases; another, with nothing to do, would take it over."""
    asked: list[bytes] = []

    def caption(media: list[bytes]) -> list[Reply]:
        asked.extend(media)
        time.sleep(1.5)
        return describe(media)

    bounds = Bounds(lease_seconds=0.5)
    with open_queue(places[0], bounds) as one, open_queue(places[0], bounds) as two, open_store(places[1]) as store:
        for number in range(1, 5):
            one.put(event(number))
        recorder = Recorder(store, SCHEMA, SPEC)
        threads = [threading.Thread(target=Worker(queue, caption, recorder, QUICK).run, kwargs={"until_empty": True})
                   for queue in (one, two)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert_written(store, range(1, 5))
    assert sorted(asked) == sorted(map(medium, range(1, 5)))


# --- killed ---------------------------------------------------------------------------------------------------

KILLS, ITEMS = 20, 240
LETTERS = {number: "not a picture" for number in range(1001, 1009)} | {
    number: "failed 3 times, at last: the decoder fell over" for number in range(2001, 2004)
}


def _run_worker(places: tuple[str, str], seed: int) -> None:
    """In a process of its own, with a captioner that takes its time, is full at times, and fails at others."""
    chance = random.Random(seed)

    def caption(media: list[bytes]) -> list[Reply]:
        time.sleep(chance.uniform(0, 0.02))
        if chance.random() < 0.1:
            raise Unavailable("full")
        if len(media) > 1 and chance.random() < 0.1:
            raise ServingError("for a moment")
        return describe(media)

    with open_queue(places[0], Bounds(lease_seconds=0.2)) as queue, open_store(places[1]) as store:
        Worker(queue, caption, Recorder(store, SCHEMA, SPEC), QUICK).run(until_empty=True)


def test_twenty_kills_lose_nothing(places: tuple[str, str]) -> None:
    chance = random.Random(7)
    events = [*map(event, range(1, ITEMS + 1)), *(event(n, "poison") for n in range(1001, 1009)),
              *(event(n, "broken") for n in range(2001, 2004))]  # fmt: skip
    chance.shuffle(events)
    with open_queue(places[0]) as queue, open_store(places[1]) as store:
        store.register(SCHEMA)
        held: list[int] = []  # by the killed ones
        kills = 0
        for seed in count():
            for one in events[seed * 15 : (seed + 1) * 15]:  # more come while workers die
                assert queue.put(one)
            process = PROCESSES.Process(target=_run_worker, args=(places, seed))
            process.start()
            if kills == KILLS:
                process.join(60)
                assert process.exitcode == 0
                break
            _wait_for_a_take(queue)
            time.sleep(chance.uniform(0, 0.15))
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
            kills += process.exitcode == -signal.SIGKILL
            held.append(queue.stats().taken)
        stats = queue.stats()
        assert (stats.waiting, stats.taken) == (0, 0)
        assert_written(store, range(1, ITEMS + 1))
        assert {letter.item_id: letter.note.reason for letter in queue.dead_letters()} == LETTERS
    assert np.count_nonzero(held) >= KILLS // 2  # most were killed at work


def _wait_for_a_take(queue: ItemQueue) -> None:
    """Until the new worker has begun, or has nothing to do."""
    until = time.monotonic() + 20
    while time.monotonic() < until and (stats := queue.stats()).waiting and not stats.taken:
        time.sleep(0.01)


# --- records --------------------------------------------------------------------------------------------------


def test_records_of_captions() -> None:
    rows = [CaptionedItem(5, "a" * 64, "a red mug"), CaptionedItem(0, "b" * 64, "a cat"),
            CaptionedItem(5, "c" * 64, "a blue star"), CaptionedItem(2, "c" * 64, "a blue star")]  # fmt: skip
    items = to_items(rows, SPEC)
    assert items.ids.tolist() == [5, 2]
    assert list(items.captions) == ["a blue star"] * 2
    assert list(items.media_hashes) == ["c" * 64] * 2
    assert (items.tokens == SPEC.encode("a blue star")).all()
    with pytest.raises(TokenSpecError, match="field 'z' is none"):
        to_items([CaptionedItem(1, "a" * 64, "a mug\x1fz")], SPEC)


def test_a_recorder_refuses_what_it_could_not_write(tmp_path: Path) -> None:
    other = TokenSpec.fit(["a red mug"] * 2, length=4, families=("word",))
    with open_store(str(tmp_path)) as store:
        with pytest.raises(ConfigError, match="take both from one release"):
            Recorder(store, SCHEMA, other)
        with pytest.raises(StoreError, match=r"captioner: expected a version of .* got 'a b'"):
            Recorder(store, item_schema("a b", SPEC.version, SPEC.length), SPEC)


# --- seen from outside ----------------------------------------------------------------------------------------


def test_metrics_tell_what_happened(embedded: tuple[str, str]) -> None:
    metrics = Metrics(model="nearline")
    known = [Reply(annotation(medium(1)), known=True)]
    with (
        open_queue(embedded[0]) as queue, open_store(embedded[1]) as store, exposed(metrics, 0) as port,
    ):  # fmt: skip
        for one in (event(1), event(2), event(3, "poison"), event(4, "broken")):
            queue.put(one)
        caption = lambda media: known if media == [medium(1)] else describe(media)  # noqa: E731
        config = WorkerConfig(batch=1, attempts=3, backoff_seconds=0.01)
        Worker(queue, caption, Recorder(store, SCHEMA, SPEC), config, metrics=metrics).run(until_empty=True)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10)
        with pytest.raises(ServingError, match=f"--metrics-port {port}: expected a free port"), exposed(metrics, port):
            pass
    for result, number in (("captioned", 1), ("known", 1), ("retried", 2), ("dead", 2)):
        assert f'sightline_nearline_items_total{{model="nearline",result="{result}"}} {number}\n' in text
    assert 'sightline_nearline_lag_seconds_count{model="nearline"} 2\n' in text
    assert 'sightline_nearline_batch_seconds_count{model="nearline"} 6\n' in text
    assert re.search(r'sightline_nearline_queue_events\{model="nearline"\} \d', text)
    assert re.search(r'sightline_nearline_oldest_seconds\{model="nearline"\} \d', text)


def test_commands(embedded: tuple[str, str], tmp_path: Path) -> None:
    def run(*arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(app, ["nearline", *arguments, "--queue", embedded[0]])
        assert result.exit_code == code, result.output
        return result.stdout

    work(embedded, describe, [event(1), event(2, "poison"), event(3, "poison")])
    assert json.loads(run("stats")) == {"waiting": 0, "taken": 0, "dead": 2, "media_bytes": 0, "oldest_seconds": 0.0}
    shown = [json.loads(line) for line in run("dead", "list").splitlines()]
    assert {one["item"]: one["reason"] for one in shown} == {2: "not a picture", 3: "not a picture"}
    two, three = (event(number, "poison").media_hash for number in (2, 3))
    assert json.loads(run("dead", "list", three[:12]))["media_hash"] == three
    assert run("dead", "retry", two) == "1 events wait again\n"
    assert json.loads(run("stats"))["waiting"] == 1
    assert run("dead", "drop", "--yes") == "1 events removed\n"
    assert run("dead", "list") == ""
    result = CliRunner().invoke(app, ["nearline", "dead", "retry", "beef", "--queue", embedded[0]])
    assert "beef: expected the beginning of a dead event's media hash" in str(result.exception)


@pytest.mark.parametrize("command", [["stats"], ["dead", "list"], ["dead", "retry"], ["dead", "drop", "--yes"]])
def test_looking_at_a_queue_that_is_not_there_makes_none(tmp_path: Path, command: list[str]) -> None:
    with pytest.raises(ConfigError, match="there is none; expected a queue"):
        CliRunner().invoke(app, ["nearline", *command, "--queue", str(tmp_path / "typo")], catch_exceptions=False)
    assert not (tmp_path / "typo").exists()
