"""Captions on the way: once per medium, in time or not begun, interactive first, and never lost with the store."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sightline.caption_flight import CaptionFlight
from sightline.caption_jobs import Answer, Asker, Cancelled, DownstreamError, Job, Limits, Overloaded, Pace
from sightline.caption_store import CaptionStore
from sightline.errors import ConfigError
from sightline.media import content_hash
from sightline.metrics import Metrics
from sightline.store import ItemSchema, open_store


class Captioner:
    """Counts its calls; `seconds` for a batch, or as long as `gate` is closed. Media say what becomes of them."""

    def __init__(self, seconds: float = 0.02) -> None:
        self.seconds, self.batches = seconds, []  # type: ignore[var-annotated]
        self.gate = asyncio.Event()
        self.gate.set()
        self.broken: Exception | None = None

    async def __call__(self, jobs: Sequence[Job]) -> None:
        self.batches.append([job.data for job in jobs])
        await asyncio.sleep(self.seconds)
        await self.gate.wait()
        if self.broken:
            raise self.broken
        for job in jobs:
            if job.data.startswith(b"bad"):
                job.reject("not a picture")
            elif job.wanted:
                job.caption(f"caption of {job.data.decode()}")

    @property
    def captioned(self) -> list[bytes]:
        return [data for batch in self.batches for data in batch]


class Place:
    """A flight over a store in a folder, which a test can look into."""

    def __init__(self, location: str | None, *, queue: bool = False, **limits: int) -> None:
        self.failures: list[str] = []
        self.queued: list[bytes] = []
        self.model = Captioner()
        self.store = CaptionStore(location, "v1", lambda what, reason: self.failures.append(f"{what}: {reason}"))
        self.metrics = Metrics(model="caption")
        self.flight = CaptionFlight(
            self.model, self.store, Limits(**{"batch": 4} | limits), self.metrics, self.put if queue else None
        )

    async def put(self, digest: str, data: bytes) -> None:
        assert content_hash(data) == digest
        self.queued.append(data)

    async def ask(
        self, *media: bytes, seconds: float | None = None, nearline: bool = False,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> list[Answer]:  # fmt: skip
        deadline = None if seconds is None else time.monotonic() + seconds
        asker = Asker(deadline=deadline, nearline=nearline, cancelled=cancelled)
        answers = await self.flight.answers({content_hash(data): data for data in media}, asker)
        return [answers[content_hash(data)] for data in media]

    async def stored(self, data: bytes) -> str | None:
        return (await self.store.read([content_hash(data)])).get(content_hash(data))

    async def settled(self) -> None:
        while self.flight._tasks or self.flight.waiting:
            await asyncio.sleep(0.005)


@pytest.fixture
def location(tmp_path: Path) -> str:
    return str(tmp_path / "features")


@pytest.fixture
async def places(location: str):  # type: ignore[no-untyped-def]
    """Makes places; closes what they opened."""
    made: list[Place] = []

    def make(**options: object) -> Place:
        made.append(Place(**{"location": location} | options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for place in made:
        place.model.gate.set()
        await place.flight.close()
        place.store.close()


async def begun(place: Place, batches: int = 1) -> None:
    async with asyncio.timeout(5):
        while len(place.model.batches) < batches:
            await asyncio.sleep(0.002)


async def test_a_hundred_askers_of_one_medium_caption_it_once(places) -> None:
    place = places()
    answers = await asyncio.gather(*(place.ask(b"mug") for _ in range(100)))
    assert place.model.captioned == [b"mug"]
    assert {answer for (answer,) in answers} == {Answer("caption of mug", "model")}
    await place.settled()
    assert await place.ask(b"mug") == [Answer("caption of mug", "store")]
    assert place.flight._jobs == {}


async def test_who_asks_before_it_is_stored_gets_it_without_the_model(places, monkeypatch) -> None:
    place, kept = places(), asyncio.Event()
    write = place.store.write

    async def slow(captions: dict[str, str]) -> None:
        await kept.wait()
        await write(captions)

    monkeypatch.setattr(place.store, "write", slow)
    await place.ask(b"mug")
    assert await place.ask(b"mug") == [Answer("caption of mug", "store")]
    assert await place.stored(b"mug") is None
    kept.set()
    await place.settled()
    assert await place.stored(b"mug") == "caption of mug"
    assert len(place.model.captioned) == 1


async def test_media_that_arrive_together_are_captioned_together(places, monkeypatch) -> None:
    monkeypatch.setattr(CaptionFlight, "GATHER", 0.2)
    place = places()
    await asyncio.gather(*(place.ask(data) for data in (b"a", b"b", b"c")))
    assert [sorted(batch) for batch in place.model.batches] == [[b"a", b"b", b"c"]]


async def test_rejected_media_are_not_stored(places) -> None:
    place = places()
    assert await place.ask(b"bad", b"mug") == [
        Answer("", "rejected", "not a picture"), Answer("caption of mug", "model"),
    ]  # fmt: skip
    await place.settled()
    assert await place.stored(b"bad") is None
    assert (await place.ask(b"bad"))[0].source == "rejected"
    assert place.model.captioned.count(b"bad") == 2


# --- deadlines ----------------------------------------------------------------------------------------


async def test_at_the_deadline_the_answer_is_empty_and_the_work_goes_on(places) -> None:
    place = places(queue=True)
    place.model.gate.clear()
    began = time.monotonic()
    (answer,) = await place.ask(b"mug", seconds=0.06)
    assert answer == Answer("", "deadline", degraded="deadline")
    assert 0.05 < time.monotonic() - began < 0.5
    assert place.queued == [], "it is being captioned here"
    place.model.gate.set()
    await place.settled()
    assert await place.ask(b"mug", seconds=0.06) == [Answer("caption of mug", "store")]
    assert len(place.model.captioned) == 1


async def test_no_time_takes_what_is_stored_and_puts_the_rest_off(places) -> None:
    place = places(queue=True)
    await place.ask(b"mug")
    await place.settled()
    answers = await place.ask(b"mug", b"cup", seconds=0)
    assert [answer.source for answer in answers] == ["store", "deadline"]
    await place.settled()
    assert (place.queued, place.model.captioned) == ([b"cup"], [b"mug"])


async def test_what_an_earlier_captioner_said_is_better_than_nothing(places, location) -> None:
    """Only where its own caption cannot be there in time; and only of captioners that the store knows."""
    with open_store(location) as store:
        store.register(ItemSchema(version="items-v0", captioner="v0", token_spec="spec", tokens=4))
        for captioner in ("v0", "unknown"):
            store.write_captions(captioner, {content_hash(captioner.encode()): "said before"})
        store.write_captions("v0", {content_hash(data): "said before" for data in (b"mug", b"cup")})
    place = places(queue=True)
    late = [Answer("said before", "previous", degraded="deadline"), Answer("", "deadline", degraded="deadline")]
    assert await place.ask(b"mug", b"unknown", seconds=0) == late
    await place.settled()
    assert sorted(place.queued) == [b"mug", b"unknown"]
    assert await place.ask(b"cup", seconds=5) == [Answer("caption of cup", "model")]
    await place.settled()
    assert await place.ask(b"cup", b"mug", seconds=0) == [Answer("caption of cup", "store"), late[0]]
    place.model.broken = DownstreamError("gone")
    assert await place.ask(b"mug", seconds=5) == [Answer("said before", "previous", degraded="captioner")]


async def test_without_a_queue_it_is_captioned_here_when_there_is_time(places) -> None:
    place = places()
    assert (await place.ask(b"cup", seconds=0))[0].source == "deadline"
    await place.settled()
    assert await place.stored(b"cup") == "caption of cup"


async def test_work_that_cannot_be_done_in_time_is_not_begun(places, monkeypatch) -> None:
    place = places(queue=True)
    place.model.seconds = 0.4
    await place.ask(b"mug")
    began = time.monotonic()
    (answer,) = await place.ask(b"cup", seconds=0.3)
    assert answer.source == "deadline"
    assert time.monotonic() - began < 0.25
    assert (await place.ask(b"vase", seconds=5))[0].source == "model"
    monkeypatch.setattr(Pace, "MEMORY", 0.0)  # a slow time is over some day: somebody has to try
    assert (await place.ask(b"plate", seconds=0.3))[0].source == "deadline"
    await place.settled()
    assert place.model.captioned == [b"mug", b"vase", b"plate"]
    assert place.queued == [b"cup"]


async def test_the_estimate_knows_what_waits_and_what_is_stuck(places) -> None:
    place = places(batch=2)
    place.flight._pace.add(time.monotonic(), 2, 0.4)
    assert place.flight._estimate(1, nearline=False) == pytest.approx(0.4)
    place.model.gate.clear()
    asking = [asyncio.create_task(place.ask(b"%d" % n)) for n in range(10)]
    await begun(place, 2)
    # Four are running, six wait: (2 running + 3 ahead − 1) / 2 turns of 0.4 s, and its own.
    assert place.flight._estimate(1, nearline=False) == pytest.approx(0.4 + 2 * 0.4, abs=1e-6)
    await asyncio.sleep(0.5)
    assert place.flight._estimate(1, nearline=False) > 0.4 + 2 * 0.49, "what runs already took longer than that"
    place.model.gate.set()
    await asyncio.gather(*asking)


def test_pace_is_that_of_batches_of_the_same_size() -> None:
    pace = Pace()
    assert pace.seconds(100.0, 1) == 0
    for n in range(10):
        pace.add(100.0, 1, 0.01 * n)
    pace.add(100.0, 32, 5.0)
    assert pace.seconds(101.0, 1) == pytest.approx(0.081)
    assert pace.seconds(101.0, 32) > 0.081
    assert pace.seconds(100.0 + Pace.MEMORY, 32) == 0


# --- failures -----------------------------------------------------------------------------------------


async def test_a_dead_model_fails_only_those_who_could_wait(places) -> None:
    place = places(queue=True)
    place.model.broken = DownstreamError("tensorrt_llm: the stub is gone")
    with pytest.raises(DownstreamError, match="the stub is gone"):
        await place.ask(b"mug")
    assert await place.ask(b"mug", seconds=5) == [Answer("", "deadline", degraded="captioner")]
    await place.settled()
    assert place.queued == [b"mug"]
    place.model.broken = ValueError("a mistake")
    with pytest.raises(DownstreamError, match="ValueError: a mistake"):
        await place.ask(b"mug")
    place.model.broken = None
    assert (await place.ask(b"mug"))[0].source == "model"


async def test_a_broken_store_costs_nothing_but_itself(places, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("no store")
    place = places(location=str(tmp_path / "file"))
    for _ in range(2):
        assert await place.ask(b"mug") == [Answer("caption of mug", "model")]
        await place.settled()
    assert len(place.failures) == 1, "it is left alone for a while"
    assert place.failures[0].startswith(f"read: {tmp_path / 'file'}: ")
    (tmp_path / "file").unlink()
    monkeypatch.setattr(place.store, "_away_until", 0.0)
    await place.ask(b"mug")
    await place.settled()
    assert (await place.ask(b"mug"))[0].source == "store"


async def test_a_store_that_does_not_answer_delays_nobody_beyond_his_deadline(places, monkeypatch) -> None:
    place = places(queue=True)
    await place.stored(b"mug")
    monkeypatch.setattr(place.store._store, "read_captions", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(CaptionStore, "PATIENCE", 0.25)
    began = time.monotonic()
    assert (await place.ask(b"mug", seconds=0.1))[0].source == "deadline"
    assert time.monotonic() - began < 0.2
    assert (await place.ask(b"mug"))[0].source == "model"
    assert "no answer within 0.25 s" in place.failures[0]


async def test_without_a_store_everything_comes_from_the_model(places) -> None:
    place = places(location=None)
    assert [(await place.ask(b"mug"))[0].source for _ in range(2)] == ["model", "model"]
    assert place.failures == []


# --- other servers ------------------------------------------------------------------------------------


async def test_a_medium_that_another_server_captions_is_waited_for(places, monkeypatch) -> None:
    place = places()
    monkeypatch.setattr(place.store, "claim", lambda digests: asyncio.sleep(0, set()))
    asking = asyncio.create_task(place.ask(b"mug"))
    await asyncio.sleep(0.1)
    await place.store.write({content_hash(b"mug"): "by another"})
    assert await asyncio.wait_for(asking, 5) == [Answer("by another", "store")]
    assert place.model.batches == []


async def test_a_lease_that_ends_is_taken_over(places, monkeypatch) -> None:
    place = places()
    claim, free = place.store.claim, time.monotonic() + 0.3

    async def claimed(digests: list[str]) -> set[str]:
        return await claim(digests) if time.monotonic() > free else set()

    monkeypatch.setattr(place.store, "claim", claimed)
    (answer,) = await asyncio.wait_for(place.ask(b"mug"), 5)
    assert (answer.source, time.monotonic() > free) == ("model", True)


async def test_leases_are_held_while_the_model_works_and_given_back(places, monkeypatch) -> None:
    monkeypatch.setattr(CaptionStore, "LEASE", 0.2)
    monkeypatch.setattr(CaptionStore, "RENEW", 0.05)
    place = places()
    place.model.gate.clear()
    asking = asyncio.create_task(place.ask(b"bad"))
    await begun(place)
    await asyncio.sleep(0.3)
    assert not another_may_caption(place, b"bad")
    place.model.gate.set()
    await asking
    await place.settled()
    assert another_may_caption(place, b"bad")


def another_may_caption(place: Place, data: bytes) -> bool:
    """Whether another store object gets the lease (a process must not open an LMDB store twice)."""
    store = place.store._opened()
    own, store._holder = store._holder, b"somebody else..."
    try:
        return store.claim(f"caption/v1/{content_hash(data)}", 1)
    finally:
        store._holder = own


# --- priorities, cancellation, overload ---------------------------------------------------------------


async def test_nearline_waits_while_interactive_waits(places) -> None:
    place = places(batch=1, batches=1)
    place.model.gate.clear()
    asking = [asyncio.create_task(place.ask(b"first"))]
    await begun(place)
    asking += [asyncio.create_task(place.ask(b"later %d" % n, nearline=True)) for n in range(2)]
    await asyncio.sleep(0.03)
    asking += [asyncio.create_task(place.ask(data)) for data in (b"now", b"later 1")]
    await asyncio.sleep(0.03)
    place.model.gate.set()
    await asyncio.gather(*asking)
    first, *now, last = place.model.captioned
    assert (first, set(now), last) == (b"first", {b"now", b"later 1"}, b"later 0")


async def test_nearline_leaves_a_place_for_interactive(places) -> None:
    place = places(batch=1, batches=2)
    place.model.gate.clear()
    asking = [asyncio.create_task(place.ask(b"later %d" % n, nearline=True)) for n in range(3)]
    await begun(place)
    asking.append(asyncio.create_task(place.ask(b"now")))
    await begun(place, 2)
    assert [data[:5] for data in place.model.captioned] == [b"later", b"now"]
    place.model.gate.set()
    await asyncio.gather(*asking)


async def test_what_nobody_waits_for_is_not_begun(places) -> None:
    place, gone = places(batch=1, batches=1), set()
    place.model.gate.clear()
    first = asyncio.create_task(place.ask(b"first"))
    await begun(place)
    names = ["a", "b", "c"]
    tasks = [asyncio.create_task(place.ask(b"left", cancelled=lambda name=name: name in gone)) for name in names]
    both = [asyncio.create_task(place.ask(b"kept", cancelled=lambda name=name: name in gone)) for name in "cd"]
    await asyncio.sleep(0.02)
    gone |= set(names)
    place.model.gate.set()
    await first
    for task in tasks:
        with pytest.raises(Cancelled):
            await task
    assert [answer.source for (answer,) in await asyncio.gather(*both)] == ["model", "model"]
    assert place.model.captioned == [b"first", b"kept"]


async def test_between_stages_a_job_knows_whether_it_is_wanted(places) -> None:
    place, gone = places(), []
    place.model.gate.clear()
    asking = asyncio.create_task(place.ask(b"mug", cancelled=lambda: bool(gone)))
    await begun(place)
    gone.append(True)
    place.model.gate.set()
    with pytest.raises(Cancelled):
        await asking
    await place.settled()
    assert await place.stored(b"mug") is None
    assert place.flight._jobs == {}


async def test_a_full_line_refuses_at_once(places) -> None:
    place, gone = places(batch=1, batches=1, waiting=4, queue=True), []
    place.model.gate.clear()
    asking = [asyncio.create_task(place.ask(b"first"))]
    await begun(place)
    asking += [asyncio.create_task(place.ask(b"later %d" % n, nearline=True)) for n in range(2)]
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded):
        await place.ask(b"too late", nearline=True)
    asking += [asyncio.create_task(place.ask(b"now %d" % n, cancelled=lambda: bool(gone))) for n in range(2)]
    await asyncio.sleep(0.01)
    assert place.metrics.value("sightline_caption_queue_items") == 4
    with pytest.raises(Overloaded):
        await place.ask(b"too much")
    assert await place.ask(b"mug", seconds=3600) == [Answer("", "deadline", degraded="queue_full")]
    assert await asyncio.wait_for(place.ask(b"too much", seconds=0), 1) == [Answer("", "deadline", degraded="deadline")]
    gone.append(True)
    await asyncio.sleep(0.12)
    asking.append(asyncio.create_task(place.ask(b"room")))
    place.model.gate.set()
    ends = await asyncio.gather(*asking, return_exceptions=True)
    assert [isinstance(end, Cancelled) for end in ends] == [False] * 3 + [True] * 2 + [False]
    assert place.queued == [b"mug", b"too much"]
    assert place.metrics.value("sightline_caption_queue_items") == 0


async def test_who_gave_up_waiting_makes_room_for_others(places) -> None:
    """What only was asked for with a deadline goes on at low priority, and into the queue."""
    place = places(batch=1, batches=1, queue=True)
    place.model.gate.clear()
    first = asyncio.create_task(place.ask(b"first"))
    await begun(place)
    place.flight._pace = Pace()
    assert (await place.ask(b"given up", seconds=0.05))[0].source == "deadline"
    last = asyncio.create_task(place.ask(b"last"))
    await asyncio.sleep(0.02)
    place.model.gate.set()
    await asyncio.gather(first, last)
    await place.settled()
    assert place.model.captioned == [b"first", b"last", b"given up"]
    assert place.queued == [b"given up"]
    assert await place.stored(b"given up") == "caption of given up"


def test_limits_are_checked() -> None:
    with pytest.raises(ConfigError, match="waiting: expected at least 1, got 0"):
        Limits(batch=4, waiting=0)


async def test_captions_are_those_of_other_processes(places, location: str) -> None:
    with open_store(location) as store:
        store.write_captions("v1", {content_hash(b"mug"): "a red mug\x1fc red 7"})
        store.write_captions("v2", {content_hash(b"cup"): "of another captioner"})
    place = places()
    assert await place.ask(b"mug", b"cup") == [
        Answer("a red mug\x1fc red 7", "store"), Answer("caption of cup", "model"),
    ]  # fmt: skip
