"""The item path through the real server: scores, status, changes of the store, bad requests, a dead store."""

from __future__ import annotations

import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
from sightline_client import STATUS, InvalidArgument, RankClient

from serving.triton import TritonServer
from sightline import release
from sightline.features import Versions
from sightline.store import ItemSchema, open_store
from sightline.store.records import Items
from tests.redis_server import redis_server

FRESH, STALE, MISSING = range(3)
DEGRADED = 'sightline_degraded_requests_total{model="rank_items",reason="store"}'


@pytest.fixture
def client(server: TritonServer) -> Iterator[RankClient]:
    with RankClient(server.url) as ranks:
        yield ranks


def infer(server: TritonServer, model: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    kinds = {"O": "BYTES", "i": "INT64", "f": "FP32"}
    tensors = []
    for name, value in inputs.items():
        tensor = triton.InferInput(name, list(value.shape), kinds[value.dtype.kind])
        tensor.set_data_from_numpy(value)
        tensors.append(tensor)
    with triton.InferenceServerClient(server.url) as connection:
        answer = connection.infer(model, tensors)
    return {output.name: answer.as_numpy(output.name) for output in answer.get_response().outputs}


def by_stages(server: TritonServer, user: int, items: list[int], tokens: np.ndarray, context: list[int]) -> np.ndarray:
    """Scores as lookup → embed → score give them, one row per item."""
    rows = len(items)
    found = infer(
        server, "lookup", USER_ID=np.full((rows, 1), user), ITEM_ID=np.array(items, np.int64).reshape(-1, 1)
    )
    dense = found.pop("DENSE")
    features = infer(server, "embed", ITEM_TOKENS=tokens, CONTEXT=np.tile(np.array(context), (rows, 1)), **found)
    return infer(server, "score", DENSE=dense, **features)["SCORE"][:, 0]


def versions(server: TritonServer) -> Versions:
    return Versions.read(server.release_dir / "model_repository" / "lookup" / "1")


def scrape(server: TritonServer, name: str, least: float) -> dict[str, float]:
    """The server's Prometheus samples, as soon as this one is so large: each instance sends what it counted later."""
    for _ in range(100):
        with urllib.request.urlopen(server.metrics_url) as page:
            lines = [line for line in page.read().decode().splitlines() if not line.startswith("#")]
        found = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}
        if found.get(name, 0) >= least:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{name} is {found.get(name)}, expected {least}")


@pytest.mark.parametrize("user", [42, 7, 8])
def test_scores_are_those_of_the_stages(server: TritonServer, client: RankClient, user: int) -> None:
    items = [9, 11, 5, 10**12, 9, 0]
    found = client.rank_items(user, items, context={"position": 1, "hour": 5})
    with open_store(server.store, readonly=True) as store:
        batch = store.read_items(items, [versions(server).items.version])
    expected = by_stages(server, user, items, batch.tokens, [1, 5])
    np.testing.assert_allclose(found.scores, expected, atol=1e-5)  # FP32 sums in another order
    assert found.scores[0] == found.scores[4]
    assert len(set(found.scores.tolist())) == 4, "the items' features count; two are unknown"
    assert [STATUS[code] for code in found.status] == ["fresh", "fresh", "fresh", "missing", "fresh", "missing"]
    best = found.best(3)
    assert found.scores[best].tolist() == sorted(found.scores.tolist(), reverse=True)[:3]


def test_the_user_and_the_context_count(client: RankClient) -> None:
    one, other, third = (
        client.rank_items(user, [5, 9], context={"hour": hour}).scores for user, hour in ((7, 0), (42, 0), (7, 3))
    )
    assert (one != other).all()
    assert (one != third).all()


def test_more_items_than_one_request_takes(client: RankClient) -> None:
    items = np.arange(1, 9001)
    found = client.rank_items(7, items)
    assert found.scores.shape == (9000,)
    np.testing.assert_allclose(found.scores[[4, 8]], client.rank_items(7, [5, 9]).scores, atol=1e-6)
    assert client.rank_items(7, []).scores.shape == (0,)


def test_a_written_item_counts_in_the_next_request(server: TritonServer, client: RankClient) -> None:
    """All instances hear of it, and a version of another captioner answers where the own one has nothing."""
    schema = versions(server).items
    item = 777
    tokens = np.zeros((1, schema.tokens), np.int64)
    tokens[0, :3] = 3, 4, 5
    items = Items(ids=np.array([item]), tokens=tokens, captions=["new"], media_hashes=[None])
    other = ItemSchema(version="older", token_spec=schema.token_spec, captioner="older", tokens=schema.tokens)
    changed = replace(items, tokens=tokens[:, ::-1] * 2)

    def ranked() -> tuple[set[float], set[int]]:
        answers = [client.rank_items(7, [item]) for _ in range(8)]
        return {one.scores.item() for one in answers}, {int(one.status.item()) for one in answers}

    nothing, status = ranked()
    assert status == {MISSING}
    with open_store(server.store) as store:
        store.register(other)
        store.write_items("older", changed)
        stale, status = ranked()
        assert status == {STALE}
        store.write_items(schema.version, items)
        fresh, status = ranked()
        assert status == {FRESH}
        store.delete(schema, [item])
        assert ranked() == (stale, {STALE})
        store.drop(other)
        assert ranked() == (nothing, {MISSING})
    assert len(stale) == len(fresh) == len(nothing) == 1
    assert len(stale | fresh | nothing) == 3
    np.testing.assert_allclose([*fresh], by_stages(server, 7, [item], tokens, [0, 0]), atol=1e-5)


def test_bad_requests_are_refused_with_what_was_expected(server: TritonServer, client: RankClient) -> None:
    row = {"USER_ID": np.array([[7]]), "CONTEXT": np.zeros((1, 2), np.int64)}
    for count in (0, 4097):
        with pytest.raises(triton.InferenceServerException, match=f"expected 1 to 4096 items, got {count}") as refused:
            infer(server, "rank_items", ITEM_IDS=np.ones((1, count), np.int64), **row)
        assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InvalidArgument, match="expected names among"):
        client.rank_items(7, [5], context={"colour": 1})
    with pytest.raises(InvalidArgument, match="expected a sequence of int64 ids, got float64"):
        client.rank_items(7, np.array([0.5]))
    both = infer(
        server, "rank_items", USER_ID=np.array([[7], [42]]), ITEM_IDS=np.array([[5, 9], [9, 5]]),
        CONTEXT=np.zeros((2, 2), np.int64),
    )["SCORES"]  # fmt: skip
    alone = [client.rank_items(user, items).scores for user, items in ((7, [5, 9]), (42, [9, 5]))]
    np.testing.assert_allclose(both, alone, atol=1e-6)


def test_a_dead_store_fails_no_request(releases_dir: Path, tmp_path: Path) -> None:
    """On Redis: what was asked before is answered as before, the rest as missing, users as strangers."""
    with redis_server(tmp_path / "redis") as (port, pid):
        location = f"redis://127.0.0.1:{port}"
        server = TritonServer(release.current(releases_dir), store=location, log_path=tmp_path / "log")
        with server, RankClient(server.url) as client:
            before = [client.rank_items(0, [5, 9]) for _ in range(8)][-1]
            assert before.status.tolist() == [FRESH, FRESH]
            os.kill(pid, signal.SIGKILL)
            after = [client.rank_items(0, [5, 9, 11]) for _ in range(4)]
            known = client.rank_items(7, [5, 9])
            counted = scrape(server, DEGRADED, 5)
    for answer in after:
        np.testing.assert_allclose(answer.scores[:2], before.scores, atol=1e-6)
        assert answer.status.tolist() == [FRESH, FRESH, MISSING]
    assert known.status.tolist() == [FRESH, FRESH]
    assert counted[DEGRADED] == 5
    assert counted['sightline_items_ranked_total{model="rank_items",status="missing"}'] >= 4
    assert counted['sightline_items_seconds_count{model="rank_items",stage="total"}'] >= 13
    assert "ranked as a stranger" in (tmp_path / "log").read_text()
