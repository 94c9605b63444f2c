"""Examples: profiles at their point in time, vocabularies of training rows, no leaks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sightline.errors import DataError
from sightline.profile import ProfileConfig, UserProfiles
from sightline.schema import INTERACTIONS, ITEMS, read_items, write_dataset
from trainer.examples import Columns, Vocabulary, write_examples
from trainer.splits import Split

START = datetime(2026, 1, 1, tzinfo=UTC)


def _log(folder, events):
    """events: (user, item, seconds, label). Items 1…9 exist."""
    items = [{"item_id": i, "media": None, "media_uri": None, "media_type": None,
              "created_at": START - timedelta(days=1), "text": None} for i in range(1, 10)]  # fmt: skip
    rows = [{"user_id": u, "item_id": i, "timestamp": START + timedelta(seconds=s), "label": float(y)}
            for u, i, s, y in events]  # fmt: skip
    log = pa.Table.from_pylist(rows, INTERACTIONS)
    log = log.append_column("context_hour", pa.array([0] * len(rows), pa.int32()))
    write_dataset(folder, pa.Table.from_pylist(items, ITEMS), log, {"name": "x"})
    return log


def _profiles_of(folder, events, **config):
    """Examples of the log, item i having token 10 + i, and the profiles after it."""
    log = _log(folder, events)
    split = Split(valid_from=int(2e18), test_from=int(3e18))
    tokens = {item: np.array([10 + item, 0], dtype=np.int64) for item in range(1, 10)}
    profiles = UserProfiles(ProfileConfig(**{"length": 4, "half_life": 1e9} | config), np.arange(100), np.ones(100))
    write_examples(folder, folder / "e.parquet", Columns.of(log, split), split, tokens, profiles)
    return pq.read_table(folder / "e.parquet"), profiles


def test_profiles_never_see_the_present_or_the_future(tmp_path):
    events = [(1, 1, 0, 1), (1, 2, 5, 1), (1, 3, 5, 0), (1, 4, 9, 0), (2, 1, 9, 1), (1, 5, 12, 1), (1, 6, 13, 0)]
    table, profiles = _profiles_of(tmp_path, events)
    likes, dislikes = (
        [set(row) - {0} for row in table[name].to_pylist()] for name in ("profile_tokens", "profile_negative_tokens")
    )
    # The two events of second 5 do not see each other; items are liked or disliked; users are apart.
    assert likes == [set(), {11}, {11}, {11, 12}, set(), {11, 12}, {11, 12, 15}]
    assert dislikes == [set(), set(), set(), {13}, set(), {13, 14}, {13, 14}]
    # The last events are there for serving.
    assert set(profiles.read(2).tokens.tolist()) == {11, 0}
    assert set(profiles.read(1).negative_tokens.tolist()) == {13, 14, 16, 0}


HISTORY = [(1, 1, 0, 1), (1, 2, 5, 0)]
LEAKS = {
    "its own label": ([(1, 3, 9, 0)], [(1, 3, 9, 1)]),
    "its own item": ([(1, 3, 9, 1)], [(1, 4, 9, 1)]),
    "a later event": ([(1, 3, 9, 1)], [(1, 3, 9, 1), (1, 5, 10, 1)]),
    "a later dislike": ([(1, 3, 9, 1)], [(1, 3, 9, 1), (1, 5, 10, 0)]),
    "an event of the same instant, after it": ([(1, 3, 9, 1)], [(1, 3, 9, 1), (1, 5, 9, 1)]),
    "a dislike of the same instant, before it": ([(1, 3, 9, 1)], [(1, 5, 9, 0), (1, 3, 9, 1)]),
    "another user's event": ([(1, 3, 9, 1)], [(2, 5, 8, 1), (1, 3, 9, 1)]),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_planted_leaks_change_nothing(tmp_path, leak):
    """The example at second 9 has the same features, whatever else happens then or later."""
    found = []
    for number, events in enumerate(LEAKS[leak]):
        table, _ = _profiles_of(tmp_path / str(number), HISTORY + events)
        row = len(HISTORY) + [user for user, item, *_ in events].index(1)
        if leak.startswith("a dislike of the same instant"):
            row = len(HISTORY) + len(events) - 1
        columns = [name for name in table.column_names if name.startswith("profile")] + ["dense"]
        found.append(table.select(columns).to_pylist()[row])
    assert found[0] == found[1]
    assert sum(found[0]["profile_weights"]) > 0 < sum(found[0]["profile_negative_weights"])  # it has a history


def test_an_earlier_event_does_change_the_profile(tmp_path):
    """What the planted leaks would do if they were seen."""
    changed = [
        _profiles_of(tmp_path / str(item), [*HISTORY, (1, item, 6, 1), (1, 3, 9, 1)])[0]["profile_tokens"][3].as_py()
        for item in (5, 6)
    ]
    assert changed[0] != changed[1]


def test_the_strength_of_a_logged_event_counts(tmp_path):
    """Where the log has it, a profile is made of it and not of the label; the labels stay what they were."""
    log = _log(tmp_path, events := [(1, 1, 0, 1), (1, 2, 5, 0), (1, 3, 9, 1)])
    at = log.schema.get_field_index("context_hour")
    logged = log.add_column(at, "strength", pa.array([-0.5, 1.0, 0.0], pa.float32()))
    write_dataset(tmp_path, read_items(tmp_path), logged, {"name": "x"})
    split = Split(valid_from=int(2e18), test_from=int(3e18))
    columns = Columns.of(logged, split)
    assert columns.mean_strength == pytest.approx(0.5 / 3)
    assert Columns.of(log, split).mean_strength == pytest.approx(1 / 3)
    tokens = {item: np.array([10 + item], dtype=np.int64) for item in range(1, 10)}
    profiles = UserProfiles(ProfileConfig(length=4, prior_strength=0.0), np.arange(100), np.ones(100, np.float32))
    write_examples(tmp_path, tmp_path / "e.parquet", columns, split, tokens, profiles)
    table = pq.read_table(tmp_path / "e.parquet")
    assert set(table["profile_tokens"][2].as_py()) == {12, 0}
    assert set(table["profile_negative_tokens"][2].as_py()) == {11, 0}
    assert table["label"].to_pylist() == [label for *_, label in events]


def test_only_training_rows_have_table_rows_and_cold_is_what_nothing_was_fitted_on(tmp_path):
    """A row of a table that training never reaches is noise: users and items of validation alone are strangers."""
    log = _log(tmp_path, [(1, 1, 0, 1), (1, 2, 1, 0), (2, 3, 5, 1), (3, 1, 6, 0), (4, 4, 9, 1)])
    second = int(START.timestamp() * 1e6), 1_000_000
    split = Split(valid_from=second[0] + 5 * second[1], test_from=second[0] + 9 * second[1])
    columns = Columns.of(log, split)
    assert columns.users.ids.tolist() == [1]
    assert columns.items.ids.tolist() == [1, 2]
    assert columns.met.tolist() == [1, 2, 3]
    assert columns.mean_strength == 0


def test_a_log_without_context_is_refused(tmp_path):
    log = _log(tmp_path, [(1, 1, 0, 1)]).drop_columns(["context_hour"])
    with pytest.raises(DataError, match="context_<name>"):
        Columns.of(log, Split(valid_from=int(2e18), test_from=int(3e18)))


def test_rows_out_of_time_order_are_refused(tmp_path):
    log = _log(tmp_path, [(1, 1, 9, 1), (1, 2, 5, 0)])
    split = Split(valid_from=int(2e18), test_from=int(3e18))
    with pytest.raises(DataError, match="time order"):
        write_examples(
            tmp_path, tmp_path / "e.parquet", Columns.of(log, split), split, {},
            UserProfiles(ProfileConfig(), np.arange(2), np.ones(2)),
        )  # fmt: skip


def test_vocabulary_gives_0_to_strangers():
    vocabulary = Vocabulary(ids=np.array([3, 7, 9]))
    assert vocabulary.index(np.array([9, 1, 3, 100, 7, 8])).tolist() == [3, 0, 1, 0, 2, 0]
    assert vocabulary.rows == 4
