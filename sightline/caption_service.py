"""What every caption model does with Triton's requests: rows → media by content hash → `CaptionFlight` → responses.

`execute` hands its requests to one event loop in a thread of its own and returns; each is answered through its response
sender when its rows are there. So the answer of one never waits for the captions of another.

A row that cannot be used is `rejected` with a reason while the other rows are answered; a request with no usable row
fails with INVALID_ARG and the reasons. See docs/serving.md for deadlines and priorities.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from sightline.annotation import plain
from sightline.caption_flight import CaptionFlight, Captioning
from sightline.caption_jobs import Answer, Asker, Cancelled, DownstreamError, Limits, Overloaded
from sightline.caption_store import CaptionStore
from sightline.errors import ConfigError, MediaError
from sightline.media import content_hash, sniff
from sightline.metrics import Metrics
from sightline.queue import ItemEvent, ItemQueue, open_queue

__all__ = ["CaptionService", "wait_seconds"]

CALLS = 16  # to other models at a time. Triton has 32 threads for these and for the answers together.
_log = logging.getLogger(__name__)


class CaptionService:
    """The event loop of a caption model.

    Args:
        pb_utils: triton_python_backend_utils, which exists inside a Triton stub alone.
        args: what Triton gives to `initialize`.
        captioner: version under which captions are stored.
        caption: captions jobs together.
    """

    def __init__(self, pb_utils: Any, args: Mapping[str, str], captioner: str, caption: Captioning) -> None:
        config = json.loads(args["model_config"])
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        self._triton = pb_utils
        self._reserve = float(parameters["reserve_ms"]) / 1e3
        self._metrics = Metrics(pb_utils, model="caption", instance=args.get("model_instance_name", "0"))
        self._store = CaptionStore(os.environ.get("SIGHTLINE_STORE"), captioner, self._store_failed)
        self._queue = _Queue(os.environ.get("SIGHTLINE_QUEUE"), self._metrics)
        limits = Limits(batch=config["max_batch_size"], waiting=int(parameters["max_waiting_rows"]))
        self._flight = CaptionFlight(
            caption, self._store, limits, self._metrics, self._queue.put if self._queue.location else None
        )
        self._requests: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        # async_exec waits in a thread of the loop's default executor, which has cores + 4.
        self._loop.set_default_executor(ThreadPoolExecutor(CALLS, thread_name_prefix="call"))
        self._thread = threading.Thread(target=self._loop.run_forever, name="captions")
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests with MEDIA BYTES [rows, 1]; they are answered later."""
        self._loop.call_soon_threadsafe(self._begin, [self._take(request) for request in requests])

    def close(self) -> None:
        """End what is under way, the loop, the store and the queue."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()
        self._store.close()
        self._queue.close()
        self._metrics.close()

    # --- in Triton's thread -------------------------------------------------------------------------------

    def _take(self, request: Any) -> tuple[Any, list[bytes], list[str], Asker | str]:
        """Sender, rows, their content hashes, and what can be waited for or what is wrong about that."""
        arrived, sender = time.monotonic(), request.get_response_sender()
        # Copied: Triton takes its memory back when `execute` returns.
        rows = [bytes(row) for row in self._triton.get_input_tensor_by_name(request, "MEDIA").as_numpy().reshape(-1)]
        asker: Asker | str
        try:
            parameters = json.loads(request.parameters() or "{}")
            seconds = wait_seconds(request.timeout(), parameters)
            deadline = None if seconds is None else arrived + seconds - self._reserve
            asker = Asker(
                deadline=deadline, nearline=bool(parameters.get("nearline")), fresh=bool(parameters.get("fresh")),
                cancelled=_now_and_then(sender.is_cancelled),
            )  # fmt: skip
        except ConfigError as error:
            asker = str(error)
        return sender, rows, [content_hash(row) for row in rows], asker

    # --- in the loop --------------------------------------------------------------------------------------

    async def _end(self) -> None:
        await self._flight.close()
        await asyncio.gather(*self._requests)

    def _begin(self, taken: list[tuple[Any, list[bytes], list[str], Asker | str]]) -> None:
        for one in taken:
            task = self._loop.create_task(self._answer(*one))
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    async def _answer(self, sender: Any, rows: list[bytes], digests: list[str], asker: Asker | str) -> None:
        began, codes = time.monotonic(), self._triton.TritonError
        try:
            if isinstance(asker, str):
                response = self._error(asker, codes.INVALID_ARG)
            else:
                media = dict(zip(digests, rows, strict=True))
                answers = _refused(media)  # what needs no model waits for none: a canary's empty row, too
                usable = {digest: data for digest, data in media.items() if digest not in answers}
                answers |= await self._flight.answers(usable, asker) if usable else {}
                response = self._response([answers[digest] for digest in digests], time.monotonic() - began)
        except Overloaded:
            response = self._error("caption: too many media wait for the captioner; come back later", codes.UNAVAILABLE)
        except DownstreamError as error:
            response = self._error(str(error), codes.UNAVAILABLE if error.unavailable else codes.INTERNAL)
        except Cancelled:
            response = self._error("caption: the request was cancelled", codes.CANCELLED)
        except Exception as error:
            _log.exception("this is a bug: a request failed")
            response = self._error(f"caption: {type(error).__name__}: {error}", codes.INTERNAL)
        try:
            sender.send(response, flags=self._triton.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except self._triton.TritonModelException as error:
            _log.warning("an answer was not sent: %s", error)

    def _error(self, message: str, code: Any) -> Any:
        return self._triton.InferenceResponse(error=self._triton.TritonError(message, code))

    def _response(self, answers: list[Answer], seconds: float) -> Any:
        for answer in answers:
            self._metrics.count("sightline_caption_requests_total", source=answer.source)
            self._metrics.observe("sightline_caption_seconds", seconds, source=answer.source)
        for status, rows in (("fresh", "store"), ("stale_version", "previous"), ("missing", "model")):
            if count := sum(answer.source == rows for answer in answers):
                self._metrics.count("sightline_store_reads_total", count, kind="caption", status=status)
        if degraded := next((answer.degraded for answer in answers if answer.degraded), None):
            self._metrics.count("sightline_degraded_requests_total", reason=degraded)
        if answers and all(answer.error for answer in answers):
            reasons = "; ".join(dict.fromkeys(answer.error for answer in answers))
            return self._error(f"MEDIA: no row can be used: {reasons}", self._triton.TritonError.INVALID_ARG)
        columns = {
            "CAPTION": [plain(answer.annotation) for answer in answers],
            "ANNOTATION": [answer.annotation for answer in answers],
            "CAPTION_SOURCE": [answer.source for answer in answers],
            "CAPTION_ERROR": [answer.error for answer in answers],
        }
        return self._triton.InferenceResponse(
            [
                self._triton.Tensor(name, np.array([[value.encode()] for value in values], dtype=object))
                for name, values in columns.items()
            ]
        )

    def _store_failed(self, what: str, reason: str) -> None:
        _log.warning("captions come from the model; the store failed to %s: %s", what, reason)
        self._metrics.count("sightline_caption_store_failures_total", operation=what)


class _Queue:
    """Where media wait for the nearline worker; a queue that cannot be reached costs no request anything."""

    def __init__(self, location: str | None, metrics: Metrics) -> None:
        self.location, self._metrics = location, metrics
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="queue")
        self._opened: ItemQueue | None = None

    async def put(self, digest: str, data: bytes) -> None:
        """The worker finds the caption in the store if it is made here meanwhile."""
        result = await asyncio.get_running_loop().run_in_executor(self._thread, self._put, digest, data)
        self._metrics.count("sightline_caption_nearline_total", result=result)

    def _put(self, digest: str, data: bytes) -> str:
        assert self.location is not None
        try:
            self._opened = self._opened or open_queue(self.location)
            return self._opened.offer(ItemEvent(item_id=0, media=data, media_hash=digest)).value
        except Exception as error:
            _log.warning("%s is not queued for later: %s", digest, error)
            return "failed"

    def close(self) -> None:
        self._thread.shutdown()
        if self._opened is not None:
            self._opened.close()


def _now_and_then(ask: Callable[[], bool]) -> Callable[[], bool]:
    """`ask`, which is a message to the server and back, at most every 10 ms: a request has many rows."""
    asked, found = 0.0, False

    def answer() -> bool:
        nonlocal asked, found
        if time.monotonic() > asked + 0.01:
            asked, found = time.monotonic(), ask()
        return found

    return answer


def _refused(media: Mapping[str, bytes]) -> dict[str, Answer]:
    """Media whose first bytes are those of no image or video."""
    found = {}
    for digest, data in media.items():
        try:
            sniff(data)
        except MediaError as error:
            found[digest] = Answer("", "rejected", error.reason)
    return found


def wait_seconds(timeout: int, parameters: Mapping[str, Any]) -> float | None:
    """How long a request can wait: the smaller of its `timeout` (µs, 0: none) and its parameter `deadline_ms`.

    `deadline_ms` of 0 takes what is stored. None: it can wait for the model.

    Raises:
        ConfigError: `deadline_ms` is not a number of at least 0.
    """
    limits = [timeout / 1e6] if timeout else []
    if "deadline_ms" in parameters:
        value = parameters["deadline_ms"]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
            raise ConfigError(f"deadline_ms: expected milliseconds of at least 0, got {value!r}")
        limits.append(value / 1e3)
    return min(limits, default=None)
