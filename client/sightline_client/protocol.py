"""What is said to the server and when, without saying it: shared by the sync and the asyncio client.

`rank`, `rank_items`, `retrieve` and `send_events` are generators of steps: they yield an `Ask` or a `Pause`, the client
performs it, sends the result in or throws the error in, and gets the answer at the end. Deadline, retries and chunking
live here once.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tritonclient.grpc import InferInput, InferRequestedOutput
from tritonclient.utils import InferenceServerException

from sightline_client import events as event_log
from sightline_client import items as catalogue
from sightline_client import retrieval
from sightline_client.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ServerError,
    SightlineClientError,
    Unavailable,
)
from sightline_client.events import Event
from sightline_client.items import RankedItems
from sightline_client.retrieval import Retrieved

__all__ = ["MODEL", "TLS", "Ask", "ContextField", "ModelInfo", "Pause", "Ranked", "Session", "Steps"]

MODEL = "rank_media"
OUTPUTS = ("SCORE", "CAPTION", "CAPTION_SOURCE", "CAPTION_ERROR")
# The server answers rows beside rejected ones, but refuses a request none of whose media can be used.
NO_USABLE_MEDIA = "MEDIA: no row can be used: "
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 2.0


@dataclass(frozen=True, kw_only=True)
class TLS:
    """Files in PEM. Without `ca` the system's roots are trusted; `cert` and `key` identify this client."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        if (self.cert is None) != (self.key is None):
            raise InvalidArgument(
                f"tls: expected cert and key together, got cert={self.cert}, key={self.key}"
            )
        for name in ("ca", "cert", "key"):
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise InvalidArgument(f"tls: expected {name} to be a PEM file, there is none at {path}")


@dataclass(frozen=True)
class ContextField:
    """One context column of the ranker: an index from 0 to `cardinality` - 1."""

    name: str
    cardinality: int


@dataclass(frozen=True)
class ModelInfo:
    """What the server's configuration of rank_media says."""

    max_batch_size: int
    context: tuple[ContextField, ...]
    release: str

    @classmethod
    def from_config(cls, config: Any) -> ModelInfo:
        """Read a ModelConfig message. Raises ServerError if it is not that of a Sightline release."""
        try:
            fields = json.loads(config.parameters["context"].string_value or "[]")
            context = tuple(ContextField(str(field["name"]), int(field["cardinality"])) for field in fields)
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(
                f"{MODEL}: expected a `context` parameter with names and cardinalities: {error!r}"
            ) from error
        return cls(max(config.max_batch_size, 1), context, config.parameters["release"].string_value)


@dataclass(frozen=True)
class Ranked:
    """The answer for one image or video."""

    index: int
    """Its position in the request."""
    score: float | None
    """Probability of a click, 0 to 1; None if the media was rejected."""
    caption: str
    source: str
    """Where the caption came from: `model`, `store`, `previous` (none in time but that of an earlier captioner),
    `deadline` (none in time) or `rejected`."""
    error: str
    """Why the media was rejected, else empty."""


@dataclass(frozen=True)
class Ask:
    """Perform one call within `timeout` seconds: the model's configuration, or an inference."""

    timeout: float
    inputs: list[InferInput] | None = None
    outputs: list[InferRequestedOutput] | None = None
    model: str = MODEL
    captions_ms: int | None = None
    """How long the server may wait for captions; None: as long as for everything."""

    @property
    def infer_arguments(self) -> dict[str, Any]:
        parameters = {} if self.captions_ms is None else {"parameters": {"deadline_ms": self.captions_ms}}
        return parameters | {
            "model_name": self.model,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "client_timeout": self.timeout,
            "timeout": max(int(self.timeout * 1e6), 1),  # µs: lets the server drop a request nobody waits for
        }


@dataclass(frozen=True)
class Pause:
    """Wait before the next attempt."""

    seconds: float


T = TypeVar("T")
Steps = Generator[Ask | Pause, Any, T]


class Session:
    """What a client keeps between calls: its limits, and what it learned about the model.

    Args:
        timeout: seconds for one call with all its chunks and retries.
        retries: further attempts after UNAVAILABLE, for each call to the server.
    """

    def __init__(self, *, timeout: float, retries: int) -> None:
        if not timeout > 0:
            raise InvalidArgument(f"timeout: expected seconds above 0, got {timeout}")
        if retries < 0:
            raise InvalidArgument(f"retries: expected at least 0, got {retries}")
        self.info: ModelInfo | None = None
        self._items_info: ModelInfo | None = None
        self._event_batch: int | None = None
        self._query_batch: int | None = None
        self._timeout = timeout
        self._retries = retries

    def rank(
        self,
        user_id: int,
        media: Sequence[bytes],
        item_ids: Sequence[int] | None,
        context: Mapping[str, int] | None,
        caption_timeout: float | None,
    ) -> Steps[list[Ranked]]:
        deadline = time.monotonic() + self._timeout
        item_ids = [0] * len(media) if item_ids is None else item_ids
        _check(user_id, media, item_ids)
        if caption_timeout is not None and not 0 <= caption_timeout < float("inf"):
            raise InvalidArgument(f"caption_timeout: expected seconds of at least 0, got {caption_timeout}")
        captions_by = None if caption_timeout is None else time.monotonic() + caption_timeout
        if not media:
            return []
        if self.info is None:
            self.info = ModelInfo.from_config((yield from self._ask(deadline)).config)
        values = _context_values(self.info.context, context or {})

        size = self.info.max_batch_size
        waiting = [range(start, min(start + size, len(media))) for start in range(0, len(media), size)]
        rows: list[Ranked] = []
        while waiting:
            part = waiting.pop()
            chunk = slice(part.start, part.stop)
            inputs = _inputs(user_id, media[chunk], item_ids[chunk], values)
            outputs = [InferRequestedOutput(name) for name in OUTPUTS]
            try:
                rows += _parse((yield from self._ask(deadline, inputs, outputs, captions_by=captions_by)), part)
            except InvalidArgument as error:
                reason = str(error).partition(NO_USABLE_MEDIA)[2]
                if not reason:
                    self.info = None  # perhaps another release is served by now: ask again next time
                    raise
                if len(part) > 1:  # one by one, so that each gets its own reason
                    waiting += [range(index, index + 1) for index in part]
                else:
                    rows.append(Ranked(part.start, None, "", "rejected", reason))
        return sorted(rows, key=lambda row: (row.score is None, -(row.score or 0.0), row.index))

    def rank_items(
        self, user_id: int, item_ids: Sequence[int] | npt.NDArray[Any], context: Mapping[str, int] | None
    ) -> Steps[RankedItems]:
        deadline = time.monotonic() + self._timeout
        ids = catalogue.check(user_id, item_ids)
        if self._items_info is None:
            self._items_info = ModelInfo.from_config((yield from self._ask(deadline, model=catalogue.MODEL)).config)
        values = _context_values(self._items_info.context, context or {})
        scores, status = np.empty(len(ids), np.float32), np.empty(len(ids), np.uint8)
        for start in range(0, len(ids), catalogue.LARGEST):
            part = slice(start, start + catalogue.LARGEST)
            inputs = [_tensor(*column) for column in catalogue.columns(user_id, ids[part], values)]
            outputs = [InferRequestedOutput(name) for name in catalogue.OUTPUTS]
            try:
                answer = yield from self._ask(deadline, inputs, outputs, catalogue.MODEL)
            except InvalidArgument:
                self._items_info = None  # perhaps another release is served by now: ask again next time
                raise
            scores[part], status[part] = catalogue.parse(answer, len(ids[part]))
        return RankedItems(ids, scores, status)

    def retrieve(
        self, media: Sequence[bytes] | None, vectors: npt.NDArray[Any] | None, k: int
    ) -> Steps[list[Retrieved]]:
        deadline = time.monotonic() + self._timeout
        count = retrieval.check(media, vectors, k)
        if self._query_batch is None:
            config = (yield from self._ask(deadline, model=retrieval.MODEL)).config
            self._query_batch = max(config.max_batch_size, 1)
        found: list[Retrieved] = []
        for start in range(0, count, self._query_batch):
            part = slice(start, min(start + self._query_batch, count))
            inputs = [_tensor(*column) for column in retrieval.columns(media, vectors, part, k)]
            outputs = [InferRequestedOutput(name) for name in retrieval.OUTPUTS]
            answer = yield from self._ask(deadline, inputs, outputs, retrieval.MODEL)
            found += retrieval.parse(answer, part.stop - part.start, k)
        return found

    def send_events(self, events: Sequence[Event]) -> Steps[list[str]]:
        deadline = time.monotonic() + self._timeout
        event_log.check(events)
        if not events:
            return []
        if self._event_batch is None:
            config = (yield from self._ask(deadline, model=event_log.MODEL)).config
            self._event_batch = max(config.max_batch_size, 1)
        outcomes: list[str] = []
        for start in range(0, len(events), self._event_batch):
            chunk = events[start : start + self._event_batch]
            inputs = [_tensor(*column) for column in event_log.columns(chunk)]
            outputs = [InferRequestedOutput(event_log.OUTPUT)]
            answer = yield from self._ask(deadline, inputs, outputs, event_log.MODEL)
            outcomes += event_log.parse(answer, len(chunk))
        return outcomes

    def _ask(
        self,
        deadline: float,
        inputs: list[InferInput] | None = None,
        outputs: list[InferRequestedOutput] | None = None,
        model: str = MODEL,
        *,
        captions_by: float | None = None,
    ) -> Steps[Any]:
        """One call; again after UNAVAILABLE while retries are left and the deadline allows."""
        for attempt in range(self._retries + 1):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"no answer within {self._timeout:g} s")
            try:
                captions_ms = None if captions_by is None else max(int(1e3 * (captions_by - time.monotonic())), 0)
                return (yield Ask(remaining, inputs, outputs, model, captions_ms))
            except InferenceServerException as error:
                failure = _translate(error, self._timeout)
                # Full jitter: clients that failed together must not come back together.
                pause = random.uniform(0, min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S))
                left = deadline - time.monotonic()
                if not isinstance(failure, Unavailable) or attempt == self._retries or pause >= left:
                    raise failure from error
            yield Pause(pause)
        raise AssertionError("this is a bug: the last attempt returns or raises")


def _check(user_id: int, media: Sequence[bytes], item_ids: Sequence[int]) -> None:
    if user_id < 0:
        raise InvalidArgument(f"user_id: expected at least 0 (0 is nobody), got {user_id}")
    if isinstance(media, bytes):
        raise InvalidArgument("media: expected a sequence of bytes, one per image or video, got bytes")
    for index, item in enumerate(media):
        if not isinstance(item, bytes):
            raise InvalidArgument(f"media[{index}]: expected bytes, got {type(item).__name__}")
    if len(item_ids) != len(media):
        raise InvalidArgument(f"item_ids: expected one per media ({len(media)}), got {len(item_ids)}")
    for index, item_id in enumerate(item_ids):
        if item_id < 0:
            raise InvalidArgument(f"item_ids[{index}]: expected at least 0 (0 is unknown), got {item_id}")


def _context_values(fields: Sequence[ContextField], given: Mapping[str, int]) -> list[int]:
    """Values in the model's order; 0 where none is given."""
    names = [field.name for field in fields]
    if unknown := sorted(given.keys() - set(names)):
        raise InvalidArgument(f"context: expected names among {names}, got {unknown[0]!r}")
    for field in fields:
        if not 0 <= given.get(field.name, 0) < field.cardinality:
            raise InvalidArgument(
                f"context {field.name}: expected 0 to {field.cardinality - 1}, got {given[field.name]}"
            )
    return [given.get(name, 0) for name in names]


def _inputs(
    user_id: int, media: Sequence[bytes], item_ids: Sequence[int], context: Sequence[int]
) -> list[InferInput]:
    """MEDIA BYTES [n, 1], USER_ID INT64 [n, 1], ITEM_ID INT64 [n, 1], CONTEXT INT64 [n, C]."""
    column = np.empty((len(media), 1), dtype=np.object_)  # an `S` array would cut bytes at trailing zeros
    column[:, 0] = media
    rows = len(media)
    return [
        _tensor("MEDIA", "BYTES", column),
        _tensor("USER_ID", "INT64", np.full((rows, 1), user_id, np.int64)),
        _tensor("ITEM_ID", "INT64", np.array(item_ids, np.int64).reshape(rows, 1)),
        _tensor("CONTEXT", "INT64", np.tile(np.array(context, np.int64), (rows, 1))),
    ]


def _tensor(name: str, datatype: str, values: npt.NDArray[Any]) -> InferInput:
    tensor = InferInput(name, values.shape, datatype)
    tensor.set_data_from_numpy(values)
    return tensor


def _parse(result: Any, part: range) -> list[Ranked]:
    columns: dict[str, list[Any]] = {}
    for name in OUTPUTS:
        values = result.as_numpy(name)
        if values is None or values.size != len(part):
            got = "nothing" if values is None else f"{values.size} values"
            raise ServerError(f"{MODEL}: expected {len(part)} values in {name}, got {got}")
        columns[name] = values.reshape(-1).tolist()
    ranked = []
    for index, score, *texts in zip(part, *columns.values(), strict=True):
        caption, source, error = (text.decode("utf-8", "replace") for text in texts)
        ranked.append(Ranked(index, None if error else float(score), caption, source, error))
    return ranked


def _translate(error: InferenceServerException, timeout: float) -> SightlineClientError:
    status, message = error.status(), error.message()
    match status:
        case "StatusCode.INVALID_ARGUMENT":
            return InvalidArgument(message)
        case "StatusCode.DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"no answer within {timeout:g} s")
        case "StatusCode.UNAVAILABLE":
            return Unavailable(message)
        case _:
            return ServerError(f"{status}: {message}")
