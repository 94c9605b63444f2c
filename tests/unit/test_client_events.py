"""The client's events against a scripted server that speaks the real wire protocol in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from sightline_client import (
    OUTCOMES,
    AsyncRankClient,
    Event,
    InvalidArgument,
    RankClient,
    ServerError,
    Unavailable,
)
from tritonclient.grpc import service_pb2

from sightline.events import Outcome
from tests.unit.test_client import Server, fails, started

EVENTS = [Event(17, 80 + row, row / 10 - 0.3, 1_700_000_000_000_000 + row) for row in range(6)]
Send = Callable[..., list[str]]


class Events(Server):
    """Model `events`, with batches of 4; what was sent twice is a duplicate."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[Any, ...]] = []
        self.codes: np.ndarray | None = None

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        types = {"INT64": np.int64, "FP32": np.float32}
        columns = {
            tensor.name: np.frombuffer(raw, types[tensor.datatype]).reshape(list(tensor.shape))
            for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True)
        }
        assert all(values.shape[1:] == (1,) for values in columns.values())
        names = "USER_ID", "ITEM_ID", "STRENGTH", "TIMESTAMP"
        rows = list(zip(*(columns[name][:, 0].tolist() for name in names), strict=True))
        codes = np.array([[int(row in self.rows)] for row in rows], np.uint8)
        self.rows += rows
        if self.script:
            self.script.pop(0)(self, request, context)
        codes = codes if self.codes is None else self.codes
        response = service_pb2.ModelInferResponse(model_name=request.model_name)
        response.outputs.add(name="APPLIED", datatype="UINT8", shape=codes.shape)
        response.raw_output_contents.append(codes.tobytes())
        return response


@pytest.fixture
def server() -> Events:
    return Events()


@pytest.fixture
def url(server: Events) -> Iterator[str]:
    yield from started(server)


@pytest.fixture(params=["sync", "asyncio"])
def send(request: pytest.FixtureRequest, url: str) -> Send:
    """One call through either client."""

    def call(events: Any, **options: Any) -> list[str]:
        if request.param == "sync":
            with RankClient(url, timeout=20, **options) as client:
                return client.send_events(events)

        async def run() -> list[str]:
            async with AsyncRankClient(url, timeout=20, **options) as client:
                return await client.send_events(events)

        return asyncio.run(run())

    return call


def test_events_go_in_order_in_batches_of_the_model(send: Send, server: Events) -> None:
    assert send(EVENTS) == ["applied"] * 6
    assert [request.model_name for request in server.requests] == ["events"] * 2
    assert [request.inputs[0].shape[0] for request in server.requests] == [4, 2]
    assert server.rows == [(*row[:2], np.float32(row[2]), row[3]) for row in EVENTS]
    assert send([]) == []
    assert len(server.requests) == 2


def test_what_was_applied_before_a_failure_comes_back_as_duplicate(send: Send, server: Events) -> None:
    server.script = [fails(grpc.StatusCode.UNAVAILABLE, "store: …; send the events again")]
    assert send(EVENTS) == ["duplicate"] * 4 + ["applied"] * 2
    server.script = [fails(grpc.StatusCode.UNAVAILABLE, "store")] * 2
    with pytest.raises(Unavailable, match="store"):
        send(EVENTS, retries=1)


def test_codes_are_those_of_the_server() -> None:
    assert tuple(outcome.name for outcome in Outcome) == OUTCOMES
    assert list(Outcome) == list(range(len(OUTCOMES)))


@pytest.mark.parametrize(
    "codes", [np.zeros((1, 1), np.uint8), np.full((2, 1), len(OUTCOMES), np.uint8)], ids=["few", "unknown"]
)
def test_an_answer_that_cannot_be_understood(send: Send, server: Events, codes: np.ndarray) -> None:
    server.codes = codes
    with pytest.raises(ServerError, match=r"events: expected 2 codes below 4 in APPLIED, got"):
        send(EVENTS[:2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_id": 0}, r"events\[1\].user_id: expected an id above 0, got 0"),
        ({"item_id": 2**63}, r"events\[1\].item_id"),
        ({"strength": -1.5}, r"events\[1\].strength: expected a number from -1 to 1, got -1.5"),
        ({"strength": float("nan")}, r"events\[1\].strength"),
        ({"time": -1}, r"events\[1\].time: expected microseconds since 1970"),
    ],
)
def test_what_is_no_event_is_not_sent(send: Send, server: Events, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        send([EVENTS[0], EVENTS[1]._replace(**change)])
    assert not server.requests
