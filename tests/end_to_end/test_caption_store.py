"""Captions of a real server: stored, made once, in time or not at all, interactive first.

The server's captioner takes two seconds for media that end with `slow`, and four media may wait for it; all else is as
released.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton
from PIL import Image
from sightline_client import RankClient
from tritonclient.utils import InferenceServerException

from serving.triton import TritonServer
from sightline import release
from sightline.media import content_hash
from sightline.queue import open_queue
from sightline.store import FeatureStore, ItemSchema, open_store
from tests.end_to_end.test_serving import KINDS, changed_release, column
from tests.media_files import again, encoded
from tests.redis_server import redis_server

CAPTIONER, BEFORE = "test-captioner", "captioner-before"
SLOW = 2.0
PICTURE = encoded(Image.effect_noise((64, 64), 90).convert("RGB"), "PNG")


def fresh(kind: str = "") -> bytes:
    """A picture that nobody has captioned yet."""
    return again(PICTURE) + kind.encode()


@pytest.fixture(scope="module")
def queue_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("queue") / "items"


@pytest.fixture(scope="module")
def server(
    releases_dir: Path, queue_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TritonServer]:
    folder, decode = tmp_path_factory.mktemp("slow"), "loop = asyncio.get_running_loop()"
    slow = f'await asyncio.sleep({SLOW} * any(job.data.endswith(b"slow") for job in jobs))'
    changed = changed_release(
        release.current(releases_dir), folder / "one", "caption/1/model.py", decode, f"{slow}; {decode}"
    )
    changed = changed_release(changed, folder / "release", "caption/config.pbtxt", '"256"', '"4"')
    with open_store(str(folder / "store")) as store:
        store.register(ItemSchema(version="items-before", captioner=BEFORE, token_spec="before", tokens=4))
    with TritonServer(
        changed, store=str(folder / "store"), queue=str(queue_dir), log_path=folder / "log"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def store(server: TritonServer) -> Iterator[FeatureStore]:
    """The server's, as another process has it."""
    with open_store(server.store) as store:
        yield store


def tensors(model: str, media: list[bytes]) -> list[Any]:
    rows = len(media)
    values = {"MEDIA": column(media)}
    if model == "rank_media":
        values |= {"USER_ID": column([7] * rows), "ITEM_ID": column([0] * rows), "CONTEXT": np.array([[1, 2]] * rows)}
    found = []
    for name, value in values.items():
        found.append(triton.InferInput(name, list(value.shape), KINDS[value.dtype.name]))
        found[-1].set_data_from_numpy(value)
    return found


def ask(client: Any, model: str, *media: bytes, **parameters: Any) -> dict[str, list[Any]]:
    """Outputs by name, texts as str."""
    return outputs(client.infer(model, tensors(model, list(media)), parameters=parameters))


def outputs(result: Any) -> dict[str, list[Any]]:
    columns = {output.name: result.as_numpy(output.name)[:, 0] for output in result.get_response().outputs}
    return {
        name: [value.decode() if isinstance(value, bytes) else float(value) for value in values]
        for name, values in columns.items()
    }


def start(client: Any, model: str, *media: bytes, **parameters: Any) -> tuple[Future[Any], Any]:
    """An inference under way, and what cancels it."""
    done: Future[Any] = Future()

    def ended(result: Any, error: Exception | None) -> None:
        done.set_exception(error) if error else done.set_result(outputs(result))

    return done, client.async_infer(model, tensors(model, list(media)), ended, parameters=parameters)


def until(what: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Its first value that is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


def stored(store: FeatureStore, media: bytes) -> str | None:
    return store.read_captions(CAPTIONER, [content_hash(media)])[0]


def decoded(server: TritonServer) -> int:
    found = server.statistics()
    assert found["tensorrt_llm"]["inferences"] == found["vision_encoder"]["inferences"]
    return int(found["tensorrt_llm"]["inferences"])


def test_from_the_model_then_from_the_store(client: Any, store: FeatureStore) -> None:
    media = fresh()
    first, second = (ask(client, "rank_media", media) for _ in range(2))
    assert (first["CAPTION_SOURCE"], second["CAPTION_SOURCE"]) == (["model"], ["store"])
    assert first["CAPTION"] == second["CAPTION"] != [""]
    assert first["SCORE"] == pytest.approx(second["SCORE"])
    annotation = until(lambda: stored(store, media))
    assert ask(client, "caption", media)["ANNOTATION"] == [annotation]
    store.write_captions(CAPTIONER, {content_hash(other := fresh()): "written by somebody else"})
    assert ask(client, "rank_media", other)["CAPTION"] == ["written by somebody else"]


def test_a_hundred_requests_for_a_new_medium_caption_it_once(server: TritonServer, client: Any) -> None:
    before, media = decoded(server), fresh()
    answers = [done.result(30) for done, _ in [start(client, "rank_media", media) for _ in range(100)]]
    assert decoded(server) == before + 1
    assert len({(*one["CAPTION"], *one["SCORE"]) for one in answers}) == 1
    assert {one["CAPTION_SOURCE"][0] for one in answers} <= {"model", "store"}


def test_in_time_or_without_a_caption(
    server: TritonServer, client: Any, store: FeatureStore, queue_dir: Path
) -> None:
    """First work that takes too long, which goes on; then, by that experience, work that is not begun."""
    late = fresh("slow")
    began = time.monotonic()
    with RankClient(server.url, timeout=60) as ranker:
        (row,) = ranker.rank(7, [late], caption_timeout=0.3)
    assert time.monotonic() - began < SLOW
    assert (row.source, row.caption, row.error) == ("deadline", "", "")
    assert row.score is not None
    assert 0 <= row.score <= 1
    until(lambda: stored(store, late))
    assert ask(client, "caption", late, deadline_ms=200)["CAPTION_SOURCE"] == ["store"]
    with open_queue(str(queue_dir)) as queue:
        assert queue.take(9) == [], "it was being captioned"

    for _ in range(2):  # one alone may be chance
        ask(client, "caption", fresh("slow"))
    before, known, new = decoded(server), late, fresh()
    began = time.monotonic()
    answer = ask(client, "rank_media", known, new, deadline_ms=1000 * SLOW * 0.9)
    assert time.monotonic() - began < SLOW / 2
    assert (answer["CAPTION_SOURCE"], answer["CAPTION_ERROR"]) == (["store", "deadline"], ["", ""])
    assert all(0 <= score <= 1 for score in answer["SCORE"])
    with open_queue(str(queue_dir)) as queue:
        (taken,) = queue.take(9, wait_seconds=10)
        assert (taken.event.media, taken.event.item_id) == (new, 0)
        queue.done(taken)
    assert decoded(server) == before


def test_a_malformed_deadline_is_the_callers_fault(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="deadline_ms: expected milliseconds") as refused:
        ask(client, "rank_media", fresh(), deadline_ms="soon")
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_another_servers_work_is_waited_for_and_taken_over(
    server: TritonServer, client: Any, store: FeatureStore
) -> None:
    before, (one, other) = decoded(server), (fresh(), fresh())
    for media, seconds in ((one, 60), (other, 1)):
        assert store.claim(f"caption/{CAPTIONER}/{content_hash(media)}", seconds)
    waiting, _ = start(client, "caption", one)
    began = time.monotonic()
    assert ask(client, "caption", other)["CAPTION_SOURCE"] == ["model"], "the lease ended"
    assert time.monotonic() - began > 0.5
    assert not waiting.done()
    store.write_captions(CAPTIONER, {content_hash(one): "by another server"})
    answer = waiting.result(30)
    assert (answer["CAPTION"], answer["CAPTION_SOURCE"]) == (["by another server"], ["store"])
    assert decoded(server) == before + 1


def test_no_time_takes_what_the_captioner_before_said(client: Any, store: FeatureStore) -> None:
    """As after an upgrade: ranked as if the new captioner had said the same."""
    (said,) = ask(client, "caption", fresh())["ANNOTATION"]
    media, same = fresh(), fresh()
    store.write_captions(BEFORE, {content_hash(media): said})
    store.write_captions(CAPTIONER, {content_hash(same): said})
    answer = ask(client, "rank_media", media, same, fresh(), deadline_ms=0)
    assert answer["CAPTION_SOURCE"] == ["previous", "store", "deadline"]
    assert answer["CAPTION"][0] == answer["CAPTION"][1] != ""
    assert answer["SCORE"][0] == pytest.approx(answer["SCORE"][1])
    assert answer["SCORE"][0] != pytest.approx(answer["SCORE"][2], abs=1e-6)
    assert ask(client, "rank_media", media)["CAPTION_SOURCE"][0] in ("model", "store"), "who has time waits"


def test_a_full_line_refuses_and_what_nobody_waits_for_is_dropped(server: TritonServer, client: Any) -> None:
    before, ends = decoded(server), []

    def begin(name: str, kind: str = "", **parameters: Any) -> tuple[Future[Any], Any]:
        done, call = start(client, "caption", fresh(kind), **parameters)
        done.add_done_callback(lambda _: ends.append(name))
        return done, call

    running = []
    for name in ("first", "second"):
        running.append(begin(name, "slow")[0])
        time.sleep(0.15)
    later, _ = begin("nearline", nearline=True)
    time.sleep(0.15)
    now, _ = begin("interactive")
    left = [begin("left") for _ in range(2)]
    time.sleep(0.15)

    began = time.monotonic()
    with pytest.raises(InferenceServerException, match="too many media wait for the captioner") as refused:
        ask(client, "rank_media", fresh())
    assert refused.value.status() == "StatusCode.UNAVAILABLE"
    answer = ask(client, "rank_media", fresh(), deadline_ms=60_000)
    assert (answer["CAPTION_SOURCE"], time.monotonic() - began < SLOW / 2) == (["deadline"], True)

    for _, call in left:
        call.cancel()
    sources = [done.result(30)["CAPTION_SOURCE"] for done in (*running, now, later)]
    assert sources == [["model"]] * 4
    assert [name for name in ends if name in ("interactive", "nearline")] == ["interactive", "nearline"]
    assert decoded(server) == before + 4


def test_a_dead_store_fails_nothing(releases_dir: Path, tmp_path: Path) -> None:
    with redis_server(tmp_path) as (port, pid):
        location = f"redis://127.0.0.1:{port}"
        with (
            TritonServer(release.current(releases_dir), store=location, log_path=tmp_path / "log") as server,
            triton.InferenceServerClient(server.url) as client,
        ):
            media = fresh()
            assert [ask(client, "rank_media", media)["CAPTION_SOURCE"] for _ in range(2)] == [["model"], ["store"]]
            os.kill(pid, signal.SIGKILL)
            began = time.monotonic()
            for limits in ({}, {"deadline_ms": 20_000}):
                answer = ask(client, "rank_media", media, **limits)
                assert (answer["CAPTION_SOURCE"], 0 <= answer["SCORE"][0] <= 1) == (["model"], True)
            assert time.monotonic() - began < 10
            assert "the store failed to read" in server.log_path.read_text()


def test_a_dead_captioner_fails_no_request_that_has_a_deadline(server: TritonServer, client: Any) -> None:
    """Last in this file: nobody brings the decoder back."""
    media = fresh()
    assert ask(client, "rank_media", media)["CAPTION_SOURCE"] == ["model"]
    stubs = psutil.Process(server.pid).children()
    (decoder,) = (stub for stub in stubs if "/models/tensorrt_llm/" in " ".join(stub.cmdline()))
    decoder.kill()
    until(lambda: decoder.status() == psutil.STATUS_ZOMBIE)
    assert ask(client, "rank_media", media)["CAPTION_SOURCE"] == ["store"]
    answer = ask(client, "rank_media", fresh(), deadline_ms=30_000)
    assert answer["CAPTION_SOURCE"] == ["deadline"]
    assert 0 <= answer["SCORE"][0] <= 1
    with pytest.raises(InferenceServerException, match="tensorrt_llm"):
        ask(client, "rank_media", fresh())
