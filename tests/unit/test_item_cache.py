"""The item cache against a dictionary, and the item path against its own parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from build.ranker_onnx import export_ranker
from sightline.errors import StoreError
from sightline.item_cache import WAYS, ItemCache
from sightline.item_path import STAGES, ItemPath
from sightline.lookup import tensors
from sightline.store import FeatureStore, Items, open_store
from sightline.store.transfer import load
from tests.factories import tiny_ranker


def rows_of(ids: np.ndarray, stamp: int = 0) -> np.ndarray:
    return np.stack([ids, ids + 0.5 + stamp], 1).astype(np.float32)


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_the_cache_forgets_and_never_lies(rows: int) -> None:
    """Random inserts and drops: what is found is what was last written; what was dropped is not found."""
    random, cache = np.random.default_rng(0), ItemCache(rows, 2)
    written: dict[int, int] = {}
    for stamp in range(200):
        ids = random.integers(1, 2000, random.integers(1, 300))
        place = cache.find(ids)
        for identity, at in zip(ids.tolist(), place.tolist(), strict=True):
            if at >= 0:
                assert cache.values[at].tolist() == [identity, identity + 0.5 + written[identity]]
                assert cache.status[at] == written[identity] % 3
        new = np.unique(ids[place < 0])
        cache.insert(new, rows_of(new, stamp), np.full(len(new), stamp % 3, np.uint8))
        written |= dict.fromkeys(new.tolist(), stamp)
        gone = random.integers(1, 2000, 20)
        cache.drop(gone)
        assert (cache.find(gone) < 0).all()
        assert len(cache) <= max(rows, WAYS) * 2
    cache.clear()
    assert len(cache) == 0
    assert (cache.find(np.arange(2000)) < 0).all()


def test_a_cache_holds_about_as_many_rows_as_it_was_made_for() -> None:
    cache = ItemCache(1 << 14, 2)
    ids = np.arange(1, 1 + (1 << 13))  # half full
    cache.insert(ids, rows_of(ids), np.zeros(len(ids), np.uint8))
    assert (cache.find(ids) >= 0).mean() > 0.97
    assert cache.evicted < 0.03 * len(ids)


def test_a_free_place_is_taken_before_another_id_loses_its_own() -> None:
    """Dropped and inserted again and again, as changed items are: nothing else is evicted."""
    cache, ids = ItemCache(64, 2), np.arange(1, 33)
    cache.insert(ids, rows_of(ids), np.zeros(len(ids), np.uint8))
    evicted, here = cache.evicted, ids[cache.find(ids) >= 0]
    for one in np.tile(here, 5):
        cache.drop(one[None])
        cache.insert(one[None], rows_of(one[None]), np.zeros(1, np.uint8))
    assert cache.evicted == evicted
    assert (cache.find(here) >= 0).all()


def test_more_new_ids_than_a_set_holds() -> None:
    cache, ids = ItemCache(WAYS, 2), np.arange(1, 100)
    cache.insert(ids, rows_of(ids), np.zeros(len(ids), np.uint8))
    place = cache.find(ids)
    assert 1 <= (place >= 0).sum() <= 2 * WAYS
    np.testing.assert_array_equal(cache.values[place[place >= 0]], rows_of(ids[place >= 0]))


@pytest.fixture
def path(tmp_path: Path) -> tuple[ItemPath, FeatureStore, Path]:
    folder = tiny_ranker(tmp_path / "ranker")
    export_ranker(folder, folder)
    store = open_store(str(tmp_path / "store"))
    for name in ("items", "users"):
        load(store, folder / "features" / f"{name}.parquet", lambda rows: None)
    return ItemPath(folder, store, cache_rows=64), store, folder


def direct(path: ItemPath, folder: Path, user: int, ids: list[int], tokens: np.ndarray) -> np.ndarray:
    """embed → score on rows of their own."""
    embed, score = (onnxruntime.InferenceSession(folder / f"{name}.onnx") for name in ("embed", "score"))
    row = {name: np.repeat(value, len(ids), 0) for name, value in tensors(path.lookup.profile(user)[0]).items()}
    dense = row.pop("DENSE")
    indices = {
        "USER_INDEX": path.lookup.users(np.full(len(ids), user))[:, None],
        "ITEM_INDEX": path.lookup.items(np.array(ids))[:, None],
    }
    context = np.zeros((len(ids), 2), np.int64)
    (features,) = embed.run(None, {**row, **indices, "CONTEXT": context, "ITEM_TOKENS": tokens})
    return score.run(None, {"FEATURES": features, "DENSE": dense})[0][:, 0]


def test_hits_and_misses_give_the_same_scores(path: tuple[ItemPath, FeatureStore, Path]) -> None:
    ranks, store, folder = path
    ids, context = [5, 9, 11, 5, 77, 0, -3], np.zeros(2, np.int64)
    first, second = (ranks(42, np.array(ids), context) for _ in range(2))
    assert (first.read.tolist(), second.read.tolist()) == ([2, 0, 0, 0, 2], [])  # 0, 5, 9, 11, 77
    np.testing.assert_array_equal(first.scores, second.scores)
    assert first.status.tolist() == [0, 0, 0, 0, 2, 2, 2]
    batch = store.read_items([5, 9, 11, 5, 77], [ranks.lookup.versions.items.version])
    np.testing.assert_allclose(first.scores[:5], direct(ranks, folder, 42, ids[:5], batch.tokens), atol=1e-5)
    assert first.scores[4] == first.scores[5] == first.scores[6]
    assert len(second.seconds) == len(STAGES)
    assert all(seconds > 0 for seconds in second.seconds)


def test_only_what_changed_is_read_again(path: tuple[ItemPath, FeatureStore, Path]) -> None:
    ranks, store, _ = path
    ids, context = np.array([5, 9, 11]), np.zeros(2, np.int64)
    before = ranks(7, ids, context)
    schema = ranks.lookup.versions.items
    tokens = np.full((1, schema.tokens), 2)
    store.write_items(schema.version, Items(ids=np.array([9]), tokens=tokens, captions=[""], media_hashes=[None]))
    after = ranks(7, ids, context)
    assert after.read.tolist() == [0]
    assert after.complete
    assert after.scores[1] != before.scores[1]
    assert after.scores[[0, 2]].tolist() == before.scores[[0, 2]].tolist()


def test_more_items_than_the_cache_holds(path: tuple[ItemPath, FeatureStore, Path]) -> None:
    ranks, _, _ = path
    ids, context = np.arange(1, 4097), np.zeros(2, np.int64)
    found = ranks(7, ids, context)
    np.testing.assert_array_equal(found.scores[[4, 8, 10]], ranks(7, np.array([5, 9, 11]), context).scores)
    assert len(ranks.cache) <= 2 * 64


class Gone:
    """A store whose reads fail from now on."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def __getattr__(self, name: str) -> object:
        if name in ("read_user", "read_items", "changes"):
            raise StoreError("gone")
        return getattr(self._store, name)


def test_a_store_that_is_gone_is_complained_of_once_a_second(
    path: tuple[ItemPath, FeatureStore, Path], caplog: pytest.LogCaptureFixture
) -> None:
    ranks, store, _ = path
    ranks._store = ranks.lookup._store = Gone(store)
    for item in range(1, 101):
        found = ranks(7, np.array([item]), np.zeros(2, np.int64))
        assert not found.complete
        assert (found.user, found.status.tolist()) == (None, [2])
    words = [record.getMessage() for record in caplog.records]
    for complaint in ("ranked as a stranger", "without their features", "out of date"):
        assert 1 <= sum(complaint in line for line in words) <= 5
