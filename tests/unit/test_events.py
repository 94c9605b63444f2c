"""Events applied online: the records that they leave are those of the offline builder, bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from benchmarks.redis_server import free_port
from sightline.errors import ConfigError, DataError, ReleaseError
from sightline.events import Event, EventRules, Outcome, apply
from sightline.features import HISTORY, Versions, item_schema, user_schema
from sightline.profile import Affinities, Profile, ProfileConfig, UserProfiles
from sightline.store import FeatureStore, Items, UserRecord, open_store, transfer
from tests.event_log import START, simulate, write_log
from tests.factories import tiny_ranker
from tests.fake_triton import Request, load_model
from tests.feature_stores import empty
from tests.redis_server import redis_server
from trainer.examples import Columns, write_examples
from trainer.features import write_features
from trainer.splits import Split

ROWS, LENGTH = 300, 9
CONFIG = ProfileConfig(length=6, prior=2.0, prior_strength=-0.3)
_RNG = np.random.default_rng(1)
# Some rows are parts of others, as confidences of words are, some are in no profile.
BASE = np.where(_RNG.random(ROWS) < 0.2, 0, np.arange(ROWS) // 3 * 3)
AMOUNT = (np.arange(ROWS) % 3 + 1).astype(np.float32) / 3
KNOWN = 90  # items 1 … of a log that have tokens
TOKENS = {item: row for item, row in enumerate(_RNG.integers(0, ROWS, (KNOWN, LENGTH)), 1)}
ITEM, USER = item_schema("captioner", "spec", LENGTH), user_schema("ranker", "spec", CONFIG)


def prepared(location: str) -> FeatureStore:
    store = open_store(location)
    store.register(USER)
    store.register(ITEM)
    ids = np.array(list(TOKENS))
    store.write_items(ITEM.version, Items(
        ids=ids, tokens=np.array(list(TOKENS.values())), captions=["…"] * len(ids), media_hashes=[None] * len(ids),
    ))  # fmt: skip
    return store


def tell(store: FeatureStore, events: Sequence[Event], config: ProfileConfig = CONFIG) -> list[Outcome]:
    return apply(
        store, events, items=[ITEM.version], users=USER.version, affinities=Affinities(config, BASE, AMOUNT)
    )


def record(store: FeatureStore, user: int) -> UserRecord:
    found = store.read_user(user, [USER.version]).record
    assert found is not None
    return found


def event(time: int, item: int = 1, *, user: int = 1, strength: float = 1.0) -> Event:
    return Event(user_id=user, item_id=item, strength=strength, time=START + time)


def offline(events: Sequence[Event], config: ProfileConfig = CONFIG) -> UserProfiles:
    """Fed in the order given."""
    profiles = UserProfiles(config, BASE, AMOUNT)
    for one in events:
        profiles.observe(one.user_id, TOKENS.get(one.item_id, np.zeros(0, np.int64)), strength=one.strength)
    return profiles


def bits(profile: Profile) -> dict[str, bytes]:
    return {name: value.tobytes() for name, value in vars(profile).items()}


def assert_equal(store: FeatureStore, profiles: UserProfiles, events: Sequence[Event]) -> None:
    """Every user's record has the offline profile and state, and the last events in the order given."""
    for user in profiles:
        found, last = record(store, user), [one for one in events if one.user_id == user][-HISTORY:]
        assert bits(found.profile) == bits(profiles.read(user))
        assert found.state == profiles.dump(user)
        assert found.items.tolist() == [one.item_id for one in last]
        assert found.times.tolist() == [one.time for one in last]
        assert found.strengths.tolist() == [one.strength for one in last]


@pytest.mark.parametrize(("count", "half_life"), [(10_000, 400.0), (4_000, 1.5)], ids=["10000", "rescaled"])
def test_equal_to_the_trainers_examples_and_its_last_profiles(tmp_path: Path, count: int, half_life: float) -> None:
    """Batches of any size, the store closed and opened between them; at 200 moments the record is what the trainer
    wrote as the example's profile, and at the end all records are its profiles.
    """
    config = replace(CONFIG, half_life=half_life)
    events = simulate(count, users=60, items=KNOWN + 30)
    log = write_log(tmp_path, events)
    profiles, split = UserProfiles(config, BASE, AMOUNT), Split(valid_from=int(2e18), test_from=int(3e18))
    write_examples(tmp_path, tmp_path / "examples.parquet", Columns.of(log, split), split, TOKENS, profiles)
    examples = pq.read_table(tmp_path / "examples.parquet")

    rng = np.random.default_rng(2)
    times = np.array([one.time for one in events])
    moments = rng.choice(np.flatnonzero(np.diff(times, prepend=0)), 200, replace=False)
    cuts = np.unique([*moments, *rng.integers(0, len(events), 40), len(events)])  # the 40 split moments, too
    store, start, checked = prepared(str(tmp_path / "store")), 0, 0
    for end in cuts.tolist():
        assert set(tell(store, events[start:end], config)) <= {Outcome.applied}
        start = end
        if rng.random() < 0.3:
            store.close()
            store = open_store(str(tmp_path / "store"))
        if end not in moments:
            continue
        for row in np.flatnonzero(times == times[end]).tolist():
            known = store.read_user(events[row].user_id, [USER.version]).record
            profile = known.profile if known else UserProfiles(config, BASE, AMOUNT).read(0)
            example = {name: examples[name][row].as_py() for name in examples.column_names}
            assert profile.tokens.tolist() == example["profile_tokens"]
            assert profile.weights.tolist() == example["profile_weights"]
            assert profile.negative_tokens.tolist() == example["profile_negative_tokens"]
            assert profile.negative_weights.tolist() == example["profile_negative_weights"]
            assert profile.dense.tolist() == example["dense"]
            checked += 1
    assert checked > 250  # some moments have several events
    assert len(list(profiles)) > 40
    assert_equal(store, profiles, events)
    store.close()


def test_users_of_a_training_go_on_online(tmp_path: Path) -> None:
    """What a ranker is published with, and then the events since: equal to a training on the whole log."""
    events = simulate(1200, users=20, items=KNOWN, seed=4)
    cut = next(row for row in range(800, 1200) if events[row].time > events[row - 1].time)
    write_log(tmp_path, events[:cut])
    texts, table = dict.fromkeys(TOKENS, "…"), (np.array(list(TOKENS)), np.array(list(TOKENS.values())))
    versions = Versions(items=ITEM, users=USER, profile=CONFIG)
    write_features(tmp_path / "features", tmp_path, versions, texts, table, offline(events[:cut]))
    with open_store(str(tmp_path / "store")) as store:
        for name in ("items", "users"):
            transfer.load(store, tmp_path / "features" / f"{name}.parquet", lambda rows: None)
        again = [one for one in events[:cut] if one.time == events[cut - 1].time]
        assert set(tell(store, again)) == {Outcome.duplicate}
        assert set(tell(store, events[cut:])) == {Outcome.applied}
        assert_equal(store, offline(events), events)


def test_the_same_in_every_store(location: str) -> None:
    events = simulate(1500, users=30, items=KNOWN + 30, seed=3)
    with prepared(location) as store:
        start = 0
        while start < len(events):
            end = start + int(np.random.default_rng(start).integers(1, 120))
            tell(store, events[start:end])
            start = end
        assert_equal(store, offline(events), events)


def test_events_of_one_moment_leave_the_state_of_events_one_after_the_other(tmp_path: Path) -> None:
    """That they do not see each other is a matter of what is read, not of what is kept: the trainer reads all their
    profiles before it adds the first. Their order does matter, so it has to be the log's.
    """
    items = [4, 9, 2, 9, 5]
    alone = [event(time, item, user=1, strength=0.3) for time, item in enumerate(items)]
    moment = [event(7 * (row > 2), item, user=2, strength=0.3) for row, item in enumerate(items)]
    log = write_log(tmp_path, sorted(alone + moment, key=lambda one: one.time))
    profiles, split = UserProfiles(CONFIG, BASE, AMOUNT), Split(valid_from=int(2e18), test_from=int(3e18))
    write_examples(tmp_path, tmp_path / "examples.parquet", Columns.of(log, split), split, TOKENS, profiles)
    examples = pq.read_table(tmp_path / "examples.parquet").to_pylist()
    seen = [row["dense"] for row in examples if row["user_id"] == 2]
    assert seen[0] == seen[1] == seen[2]
    assert seen[3] == seen[4]
    assert profiles.dump(1) == profiles.dump(2)
    with prepared(str(tmp_path / "store")) as store:
        tell(store, [*alone, *moment])
        assert record(store, 2).state == profiles.dump(2)
        tell(store, [replace(one, user_id=3) for one in (moment[1], moment[0], *moment[2:])])
        assert record(store, 3).state != profiles.dump(2)


def test_events_that_are_sent_again_change_nothing(tmp_path: Path) -> None:
    events = [event(time, 1 + time % 7, user=1 + time % 2) for time in range(40)]
    with prepared(str(tmp_path)) as store:
        assert tell(store, events[:30]) == [Outcome.applied] * 30
        assert tell(store, events[20:]) == [Outcome.duplicate] * 10 + [Outcome.applied] * 10
        assert tell(store, [*events, *events]) == [Outcome.duplicate] * 80
        assert tell(store, [event(99), event(99), event(99, 2)]) == [
            Outcome.applied, Outcome.duplicate, Outcome.applied,
        ]  # fmt: skip
        whole = [*events, event(99), event(99, 2)]
        assert_equal(store, offline(whole), whole)


def test_a_history_knows_its_last_events_and_no_earlier_ones(tmp_path: Path) -> None:
    with prepared(str(tmp_path)) as store:
        tell(store, [event(time) for time in range(HISTORY + 1)])
        assert tell(store, [event(1)]) == [Outcome.duplicate]
        assert tell(store, [event(0)]) == [Outcome.late]


def test_late_events_are_applied_as_they_come_and_within_a_call_there_are_none(tmp_path: Path) -> None:
    first, second, third = event(10, 3), event(20, 4), event(30, 5)
    with prepared(str(tmp_path)) as store:
        assert tell(store, [third, first]) == [Outcome.applied] * 2  # sorted by time
        assert tell(store, [second]) == [Outcome.late]
        assert tell(store, [second]) == [Outcome.duplicate]
        assert tell(store, [replace(third, item_id=6)]) == [Outcome.applied]  # of the last moment
        order = [first, third, second, replace(third, item_id=6)]
        assert_equal(store, offline(order), order)
        assert record(store, 1).state != offline([first, second, third, order[-1]]).dump(1)
        assert tell(store, [event(12), event(11)]) == [Outcome.late] * 2


def test_items_without_tokens_count_as_events(tmp_path: Path) -> None:
    with prepared(str(tmp_path)) as store:
        assert tell(store, [event(0, KNOWN + 1), event(1, KNOWN + 2, strength=-1)]) == [Outcome.applied] * 2
        found = record(store, 1)
        assert not found.profile.tokens.any()
        assert found.profile.dense[:2] == pytest.approx(np.log1p([2, 1]))
        assert found.items.tolist() == [KNOWN + 1, KNOWN + 2]


def test_strengths_are_those_of_a_log(tmp_path: Path) -> None:
    """FP32, as a data set and the server's tensors have them."""
    with prepared(str(tmp_path)) as store:
        tell(store, [event(0, strength=0.1)])
        assert record(store, 1).state == offline([event(0, strength=float(np.float32(0.1)))]).dump(1)


def test_a_state_that_cannot_be_continued_is_left_alone(tmp_path: Path) -> None:
    """As of a user who was loaded without one; others of the call are applied."""
    with prepared(str(tmp_path)) as store:
        tell(store, [event(0, user=1), event(0, user=2)])
        broken = UserRecord(**vars(record(store, 1)) | {"state": b""})
        store.write_users(USER.version, [broken])
        assert tell(store, [event(1, user=1), event(1, user=2)]) == [Outcome.damaged, Outcome.applied]
        assert vars(record(store, 1)).keys() == vars(broken).keys()
        assert record(store, 1).times.tolist() == broken.times.tolist()
        assert len(record(store, 2).times) == 2


def test_a_user_whom_others_change_meanwhile_loses_nothing(lone_redis: str) -> None:
    """Redis asks again then."""

    def run(worker: int) -> list[Outcome]:
        with open_store(lone_redis) as store:
            return [tell(store, [event(time, 1 + worker)])[0] for time in range(25)]

    empty(lone_redis)
    prepared(lone_redis).close()
    with ThreadPoolExecutor(3) as pool:
        outcomes = [one for part in pool.map(run, range(3)) for one in part]
    with open_store(lone_redis) as store:
        assert record(store, 1).profile.dense[0] == np.float32(np.log1p(75))
    assert set(outcomes) <= {Outcome.applied, Outcome.late}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("user_id", 0, "user_id: expected an id above 0, got 0"),
        ("item_id", -3, "item_id: expected an id above 0"),
        ("strength", 1.01, "strength: expected a number from -1 to 1, got 1.01"),
        ("strength", float("nan"), "got nan"),
        ("time", -1, "time: expected microseconds"),
        ("time", 2**63, "time: expected microseconds"),
    ],
)
def test_what_is_no_event(name: str, value: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        replace(event(0), **{name: value})


def test_versions_that_do_not_fit_together(tmp_path: Path) -> None:
    other = item_schema("captioner", "other-spec", LENGTH)
    forgetful = USER.model_copy(update={"version": "forgetful", "history": 0})
    affinities = Affinities(CONFIG, BASE, AMOUNT)
    with prepared(str(tmp_path)) as store:
        store.register(other)
        store.register(forgetful)
        with pytest.raises(ConfigError, match=r"item.captioner-other-spec: expected tokens of the spec spec"):
            apply(store, [], items=[ITEM.version, other.version], users=USER.version, affinities=affinities)
        with pytest.raises(ConfigError, match="expected a history of at least 1"):
            apply(store, [], items=[ITEM.version], users="forgetful", affinities=affinities)


def test_rules_are_read_of_a_pair(tmp_path: Path) -> None:
    one, other = tiny_ranker(tmp_path / "one"), tiny_ranker(tmp_path / "other", families=("word",))
    assert EventRules.read(one).versions == Versions.read(one)
    (one / "token_spec.json").write_bytes((other / "token_spec.json").read_bytes())
    with pytest.raises(ReleaseError, match="was made with token spec"):
        EventRules.read(one)


def _request(rows: Sequence[Event]) -> Request:
    return Request(
        ["APPLIED"],
        USER_ID=np.array([[one.user_id] for one in rows]), ITEM_ID=np.array([[one.item_id] for one in rows]),
        STRENGTH=np.array([[one.strength] for one in rows], np.float32),
        TIMESTAMP=np.array([[one.time] for one in rows]),
    )  # fmt: skip


def test_the_model_says_when_the_store_is_down_and_goes_on_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_ranker(tmp_path / "ranker" / "1")
    port = free_port()
    monkeypatch.setenv("SIGHTLINE_STORE", f"redis://127.0.0.1:{port}")
    module = load_model("model_repository/events/1/model.py")
    model = module.TritonPythonModel()
    requests = [_request([event(0, user=5), event(1, user=5)]), _request([event(2, user=5)])]
    with redis_server(tmp_path, port=port):
        model.initialize({"model_repository": str(tmp_path / "ranker"), "model_version": "1"})
        (answer,) = model.execute(requests[:1])
        assert answer.tensors["APPLIED"].tolist() == [[0], [0]]
    bad = _request([event(3)])
    bad.inputs["STRENGTH"][0, 0] = np.nan
    answers = model.execute([requests[0], bad, requests[1]])
    assert [answer.error.code for answer in answers] == ["UNAVAILABLE", "INVALID_ARG", "UNAVAILABLE"]
    assert "send the events again" in answers[0].error.message
    with redis_server(tmp_path, port=port):
        answers = model.execute([*requests, bad])
        assert [answer.tensors.get("APPLIED", np.zeros(0)).tolist() for answer in answers] == [[[1], [1]], [[0]], []]
        model.finalize()
