"""Requests of Triton → responses: what a caller may say about his time, and what he is told."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sightline.caption_jobs import DownstreamError, Job
from sightline.caption_service import CaptionService, wait_seconds
from sightline.errors import ConfigError
from sightline.media import content_hash
from sightline.queue import open_queue
from sightline.store import open_store
from tests.fake_triton import Request, load_model

PNG = b"\x89PNG\r\n\x1a\n"
PARAMETERS = {"reserve_ms": "10", "max_waiting_rows": "8"}


async def caption(jobs: Sequence[Job]) -> None:
    for job in jobs:
        name = job.data.removeprefix(PNG).decode()
        if name == "slow":
            await asyncio.sleep(0.3)
        if name == "broken":
            raise DownstreamError("tensorrt_llm: the queue is full", unavailable=True)
        if name == "mistake":
            raise ValueError("a mistake")
        if name.startswith("bad"):
            job.reject(f"{name} is no picture")
        elif job.wanted:
            job.caption(f"{name}\x1fc red 7")


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., CaptionService]]:
    """Starts services; `store` and `queue` are their locations."""
    load_model("model_repository/tokenize/1/model.py")  # puts the fake utilities in their place
    made: list[CaptionService] = []

    def start(store: Path | None = None, queue: Path | None = None) -> CaptionService:
        for name, value in (("SIGHTLINE_STORE", store), ("SIGHTLINE_QUEUE", queue)):
            monkeypatch.setenv(name, str(value)) if value else monkeypatch.delenv(name, raising=False)
        config = {"max_batch_size": 4, "parameters": {key: {"string_value": one} for key, one in PARAMETERS.items()}}
        utilities = sys.modules["triton_python_backend_utils"]
        made.append(CaptionService(utilities, {"model_config": json.dumps(config)}, "v1", caption))
        return made[-1]

    yield start
    for one in made:
        if one._thread.is_alive():
            one.close()


def ask(service: CaptionService, *media: bytes, **limits: Any) -> Request:
    """Request captions of media; those with a name for a picture."""
    rows = [[PNG + data if data and data[:4] != b"text" else data] for data in media]
    request = Request([], limits, MEDIA=np.array(rows, dtype=object))
    service.execute([request])
    return request


def answer(service: CaptionService, *media: bytes, **limits: Any) -> Any:
    return ask(service, *media, **limits).sender.response.result(timeout=30)


def settle(service: CaptionService) -> None:
    """Wait for what was put into the queue, and for its count."""
    service._queue._thread.submit(lambda: None).result()
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0.01), service._loop).result()


def column(response: Any, name: str) -> list[str]:
    values = response.tensors[name]
    assert values.shape[1:] == (1,)
    return [value.decode() for value in values[:, 0]]


def test_rows_come_back_in_their_order(serve, tmp_path: Path) -> None:
    service = serve(tmp_path / "store")
    response = answer(service, b"cup", b"bad 1", b"mug", b"cup")
    assert column(response, "CAPTION") == ["cup", "", "mug", "cup"]
    assert column(response, "ANNOTATION") == ["cup\x1fc red 7", "", "mug\x1fc red 7", "cup\x1fc red 7"]
    assert column(response, "CAPTION_SOURCE") == ["model", "rejected", "model", "model"]
    assert column(response, "CAPTION_ERROR") == ["", "bad 1 is no picture", "", ""]
    value = service._metrics.value
    assert value("sightline_caption_requests_total", source="model") == 3
    assert value("sightline_store_reads_total", kind="caption", status="missing") == 3
    assert value("sightline_caption_seconds_count", source="rejected") == 1


def test_what_callers_are_told(serve) -> None:
    service = serve()
    for media, code, message in (
        ([b"bad 1", b"bad 2"], "INVALID_ARG", "MEDIA: no row can be used: bad 1 is no picture; bad 2 is no picture"),
        ([b"broken"], "UNAVAILABLE", "tensorrt_llm: the queue is full"),
        ([b"mistake"], "INTERNAL", "caption: ValueError: a mistake"),
    ):
        error = answer(service, *media).error
        assert (error.code, error.message) == (code, message)
    assert answer(service, b"cup", deadline_ms="soon").error.code == "INVALID_ARG"
    assert column(answer(service, b"broken", deadline_ms=5000), "CAPTION_SOURCE") == ["deadline"]
    assert service._metrics.value("sightline_degraded_requests_total", reason="captioner") == 1


def test_what_is_no_medium_waits_for_nothing(serve) -> None:
    service = serve()
    slow = ask(service, b"slow")
    response = answer(service, b"", deadline_ms=0)
    assert (response.error.code, response.error.message) == ("INVALID_ARG", "MEDIA: no row can be used: empty: 0 bytes")
    assert column(answer(service, b"text", b"cup", deadline_ms=0), "CAPTION_SOURCE") == ["rejected", "deadline"]
    assert not slow.sender.response.done()


def test_a_cancelled_request_ends(serve) -> None:
    service = serve()
    slow = [ask(service, b"slow") for _ in range(2)]
    request = Request([], MEDIA=np.array([[PNG + b"cup"]], dtype=object))
    request.sender.cancelled = True
    service.execute([request])
    assert request.sender.response.result(timeout=30).error.code == "CANCELLED"
    assert [column(one.sender.response.result(timeout=30), "CAPTION") for one in slow] == [["slow"]] * 2


def test_time_is_the_smaller_of_both_and_some_is_left_to_others(serve, tmp_path: Path) -> None:
    service = serve(tmp_path / "store", tmp_path / "queue")
    answer(service, b"mug")
    response = answer(service, b"slow", timeout=60_000_000, deadline_ms=150)
    assert column(response, "CAPTION_SOURCE") == ["deadline"]
    assert (column(response, "CAPTION"), column(response, "ANNOTATION")) == ([""], [""])
    assert (column(response, "CAPTION_ERROR")) == [""]
    assert column(answer(service, b"cup", deadline_ms=9), "CAPTION_SOURCE") == ["deadline"], "9 ms are 10 ms too few"
    assert column(answer(service, b"cup", timeout=20_000_000), "CAPTION_SOURCE") == ["model"]
    settle(service)
    with open_queue(str(tmp_path / "queue")) as queue:
        (taken,) = queue.take(9)
    media = PNG + b"cup"
    assert (taken.event.media, taken.event.media_hash, taken.event.item_id) == (media, content_hash(media), 0)
    assert service._metrics.value("sightline_caption_nearline_total", result="queued") == 1
    assert column(answer(service, b"slow"), "CAPTION_SOURCE")[0] in ("model", "store")


def test_broken_store_and_queue_are_counted_and_nothing_else(serve, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("neither")
    service = serve(tmp_path / "file", tmp_path / "file" / "queue")
    assert column(answer(service, b"cup"), "CAPTION_SOURCE") == ["model"]
    assert column(answer(service, b"mug", deadline_ms=0), "CAPTION_SOURCE") == ["deadline"]
    settle(service)
    assert service._metrics.value("sightline_caption_store_failures_total", operation="read") == 1


def test_fresh_captions_are_made_again(serve, tmp_path: Path) -> None:
    service = serve(tmp_path / "store")
    for _ in range(2):
        assert column(answer(service, b"cup", fresh=1), "CAPTION_SOURCE") == ["model"]
        asyncio.run_coroutine_threadsafe(all_stored(service), service._loop).result()
    assert column(answer(service, b"cup"), "CAPTION_SOURCE") == ["store"]


async def all_stored(service: CaptionService) -> None:
    while service._flight._tasks:
        await asyncio.sleep(0.005)


def test_captions_are_there_after_a_restart(serve, tmp_path: Path) -> None:
    service = serve(tmp_path / "store")
    answer(service, b"cup")
    service.close()
    with open_store(str(tmp_path / "store")) as store:
        assert store.read_captions("v1", [content_hash(PNG + b"cup")]) == ["cup\x1fc red 7"]


@pytest.mark.parametrize(
    ("timeout", "parameters", "seconds"),
    [
        (0, {}, None),
        (2_000_000, {}, 2.0),
        (0, {"deadline_ms": 50}, 0.05),
        (20_000, {"deadline_ms": 50.5}, 0.02),
        (2_000_000, {"deadline_ms": 0, "nearline": True}, 0.0),
    ],
)
def test_wait_seconds(timeout: int, parameters: dict[str, Any], seconds: float | None) -> None:
    assert wait_seconds(timeout, parameters) == seconds


@pytest.mark.parametrize("value", [-1, "50", True, None, float("nan"), float("inf")])
def test_wait_seconds_refuses(value: Any) -> None:
    with pytest.raises(ConfigError, match="deadline_ms: expected milliseconds of at least 0, got"):
        wait_seconds(0, {"deadline_ms": value})
