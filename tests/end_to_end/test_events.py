"""Events through the real server, by client and command, against profiles built offline from the same events."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sightline_client as client
import tritonclient.grpc
from tritonclient.utils import InferenceServerException
from typer.testing import CliRunner

from sightline import release
from sightline.cli import app
from sightline.errors import ConfigError, StoreError
from sightline.events import Event, EventRules
from sightline.features import HISTORY, seed
from sightline.profile import UserProfiles
from sightline.store import FeatureStore, Items, open_store
from sightline.tokens import TokenSpec
from tests.event_log import START, simulate, write_log

ITEMS = range(1000, 1040)  # with tokens; of a log, half of the items


def numbered(events: Sequence[Event], first_user: int) -> list[Event]:
    """The same for users and items of one's own: all tests share the server."""
    return [Event(**vars(one) | {"user_id": one.user_id + first_user, "item_id": one.item_id + ITEMS.start - 1})
            for one in events]  # fmt: skip


def with_items(rules: EventRules, store: FeatureStore) -> None:
    version = rules.versions.items
    rows = np.random.default_rng(0).integers(0, len(rules.affinities._base), (len(ITEMS), version.tokens))
    store.write_items(version.version, Items(
        ids=np.array(ITEMS), tokens=rows, captions=["…"] * len(ITEMS), media_hashes=[None] * len(ITEMS),
    ))  # fmt: skip


def assert_equal(rules: EventRules, spec: TokenSpec, store: FeatureStore, events: Sequence[Event]) -> None:
    """Every user's record is what the offline builder makes of their events, in every bit."""
    profiles = UserProfiles(rules.versions.profile, *spec.amounts_of(spec.families[0].kind))
    tokens = store.read_items([one.item_id for one in events], [rules.versions.items.version]).tokens
    for one, row in zip(events, tokens, strict=True):
        profiles.observe(one.user_id, row, strength=one.strength)
    for user in profiles:
        record = store.read_user(user, [rules.versions.users.version]).record
        assert record is not None
        for name, value in vars(profiles.read(user)).items():
            assert getattr(record.profile, name).tobytes() == value.tobytes()
        assert record.state == profiles.dump(user)
        assert (record.profile.tokens | record.profile.negative_tokens).any()
        last = [one for one in events if one.user_id == user][-HISTORY:]
        assert record.items.tolist() == [one.item_id for one in last]
        assert record.times.tolist() == [one.time for one in last]


@pytest.fixture(scope="module")
def folder(releases_dir: Path) -> Path:
    """Version folder of the release's model `events`."""
    return release.current(releases_dir) / "model_repository" / "events" / "1"


@pytest.fixture(scope="module")
def rules(folder: Path) -> EventRules:
    return EventRules.read(folder)


@pytest.fixture(scope="module")
def spec(folder: Path) -> TokenSpec:
    return TokenSpec.load(folder / "token_spec.json")


@pytest.fixture(scope="module")
def served(server: Any, rules: EventRules) -> FeatureStore:
    """The server's own store, opened beside it."""
    store = open_store(server.store)
    with_items(rules, store)
    return store


def sent(events: Sequence[Event]) -> list[client.Event]:
    return [client.Event(**vars(one)) for one in events]


def test_500_events_equal_the_offline_profiles(
    server: Any, served: FeatureStore, rules: EventRules, spec: TokenSpec
) -> None:
    """One half in one call, the other by many callers at once, each with the events of one user, a few at a time, which
    the server puts together; then some of them again.
    """
    events = numbered(simulate(500, users=12, items=2 * len(ITEMS)), 10_000)
    half = len(events) // 2
    with client.RankClient(server.url, timeout=60) as one:
        assert set(one.send_events(sent(events[:half]))) == {"applied"}
    before, asked = server.statistics()["events"]["executions"], 0

    async def at_once() -> list[str]:
        async with client.AsyncRankClient(server.url, timeout=60) as many:

            async def of_user(user: int) -> list[str]:
                nonlocal asked
                own = sent([event for event in events[half:] if event.user_id == user])
                parts = [own[at : at + 3] for at in range(0, len(own), 3)]
                asked += len(parts)
                return [outcome for part in parts for outcome in await many.send_events(part)]

            users = {event.user_id for event in events}
            return [out for part in await asyncio.gather(*map(of_user, users)) for out in part]

    assert asyncio.run(at_once()) == ["applied"] * (len(events) - half)
    assert server.statistics()["events"]["executions"] - before < asked > 50
    assert_equal(rules, spec, served, events)
    with client.RankClient(server.url, timeout=60) as one:
        assert set(one.send_events(sent(events[-30:]))) == {"duplicate"}
        assert_equal(rules, spec, served, events)
        assert one.send_events([client.Event(events[0].user_id, 5, 1.0, START - 1)]) == ["late"]


def test_what_is_no_event_is_refused_and_those_beside_it_are_not(server: Any, served: FeatureStore) -> None:
    def ask(*rows: tuple[int, int, float, int]) -> Any:
        tensors = []
        for name, values in zip(("USER_ID", "ITEM_ID", "STRENGTH", "TIMESTAMP"), zip(*rows, strict=True), strict=True):
            kind = ("FP32", np.float32) if name == "STRENGTH" else ("INT64", np.int64)
            tensors.append(tritonclient.grpc.InferInput(name, [len(rows), 1], kind[0]))
            tensors[-1].set_data_from_numpy(np.array(values, kind[1])[:, None])
        return tensors

    good = (20_001, 5, 0.5, START)
    with tritonclient.grpc.InferenceServerClient(server.url) as triton:
        for bad, message in (
            ((0, 5, 0.5, START), "user_id: expected an id above 0, got 0"),
            ((20_001, -1, 0.5, START), "item_id: expected an id above 0, got -1"),
            ((20_001, 5, 1.5, START), "strength: expected a number from -1 to 1, got 1.5"),
            ((20_001, 5, float("nan"), START), "strength: expected a number from -1 to 1, got nan"),
            ((20_001, 5, 0.5, -1), "time: expected microseconds since 1970, got -1"),
        ):
            with pytest.raises(InferenceServerException, match=message) as caught:
                triton.infer("events", ask(good, bad))
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
        assert triton.infer("events", ask(good, good)).as_numpy("APPLIED").tolist() == [[0], [1]]


def test_a_users_events_change_their_next_ranking(server: Any) -> None:
    """Profiles are read of the store, so what a client sends counts at once."""
    with client.RankClient(server.url, timeout=60) as one:
        before = one.rank_items(30_001, [5, 9, 11])
        one.send_events([client.Event(30_001, item, 1.0, START + item) for item in (5, 9, 11)])
        after = one.rank_items(30_001, [5, 9, 11])
    assert not np.array_equal(before.scores, after.scores)


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["events", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    last: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return last


def test_send_tells_what_became_of_an_event(server: Any) -> None:
    command = ["send", "--user", "40001", "--item", "5", "--strength", "0.25", "--url", server.url]
    first = run(*command)
    assert first["outcome"] == "applied"
    assert run(*command, "--time", first["time"])["outcome"] == "duplicate"
    assert run(*command, "--time", "2026-01-01")["outcome"] == "late"
    done = subprocess.run(
        [sys.executable, "-m", "sightline.cli", "events", *command[:-1], "127.0.0.1:1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: 127.0.0.1:1: ")


def test_replay_through_the_server(
    server: Any, served: FeatureStore, rules: EventRules, spec: TokenSpec, tmp_path: Path
) -> None:
    events = numbered(simulate(300, users=5, items=2 * len(ITEMS), seed=1), 50_000)
    write_log(tmp_path, events)
    log, mark = str(tmp_path / "interactions.parquet"), str(tmp_path / "mark.json")
    since = next(event.time for event in events[100:] if event.time > events[99].time)
    options = ["replay", "--from", log, "--url", server.url, "--mark", mark, "--since", f"{iso(since)}"]
    later = [event for event in events if event.time >= since]
    done = run(*options)
    assert done == {"log": log, "events": len(later), "applied": len(later), "mark": mark}
    assert_equal(rules, spec, served, later)
    assert run(*options)["events"] == 0  # all of it is marked
    with pytest.raises(ConfigError, match="is of another log, or of another --since"):
        run(*options[:-2])


def test_an_interrupted_replay_goes_on_and_applies_everything_once(
    releases_dir: Path, rules: EventRules, spec: TokenSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight into a store that fails before and after a batch was applied, in turn."""
    import sightline.events as module

    events = numbered(simulate(1500, users=8, items=2 * len(ITEMS), seed=2), 60_000)
    write_log(tmp_path, events)
    location, apply, calls = str(tmp_path / "store"), module.apply, 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 4 == 0:
            raise StoreError("before")
        outcomes = apply(*arguments, **keywords)
        if calls % 4 == 2:
            raise StoreError("after")
        return outcomes

    with open_store(location) as store:
        seed(release.current(releases_dir), store)
        with_items(rules, store)
    monkeypatch.setattr(module, "apply", failing)
    options = ["replay", "--from", str(tmp_path), "--store", location, "--releases", str(releases_dir), "--mark",
               str(tmp_path / "mark")]  # fmt: skip
    failures = []
    while True:
        try:
            done = run(*options)
            break
        except StoreError as error:
            failures.append(str(error))
    assert {*failures} == {"before", "after"}
    assert len(failures) > 4
    assert done["events"] < len(events) / 2  # the last parts only
    with open_store(location) as store:
        assert_equal(rules, spec, store, events)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["replay", "--from", "log.csv"], "--from: expected interactions.parquet or a folder that has it, got log.csv"),
        (["replay", "--from", "{}", "--since", "soon"], "--since: expected a time such as 2026-03-01T12:00:00Z"),
        (["replay", "--from", "{}", "--mark", "{}/interactions.parquet"], "--mark: .*: expected what a replay wrote"),
        (["send", "--user", "1", "--item", "1", "--time", "now"], "--time: expected a time such as"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, tmp_path: Path) -> None:
    write_log(tmp_path, simulate(5, users=2, items=3))
    with pytest.raises(ConfigError, match=message):
        run(*(one.format(tmp_path) for one in arguments))


def iso(micros: int) -> str:
    return str(np.datetime64(micros, "us")) + "Z"
