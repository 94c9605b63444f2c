"""The client against a scripted server that speaks the real wire protocol in this process."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from sightline_client import (
    TLS,
    AsyncRankClient,
    DeadlineExceeded,
    InvalidArgument,
    RankClient,
    Ranked,
    ServerError,
    SightlineClientError,
    Unavailable,
)
from sightline_client.cli import app
from sightline_client.protocol import NO_USABLE_MEDIA, Ask, Pause, Session
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException, deserialize_bytes_tensor, serialize_byte_tensor
from typer.testing import CliRunner

PEM = Path(__file__).parent / "tls"
CONTEXT = [{"name": "position", "cardinality": 10}, {"name": "device", "cardinality": 3}]
Script = Callable[["Server", Any, grpc.ServicerContext], None]


class Server(service_pb2_grpc.GRPCInferenceServiceServicer):
    """rank_media of a release: scores a row by its media's length, rejects media that start with `bad`.

    `script` holds what happens to the next requests before that, each entry once.
    """

    def __init__(self) -> None:
        self.script: list[Script] = []
        self.requests: list[Any] = []
        self.configs = 0
        self.max_batch_size = 4
        self.context = json.dumps(CONTEXT)
        self.over = threading.Event()

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.configs += 1
        response = service_pb2.ModelConfigResponse()
        response.config.name = request.name
        response.config.max_batch_size = self.max_batch_size
        response.config.parameters["context"].string_value = self.context
        response.config.parameters["release"].string_value = "r1"
        return response

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        if self.script:
            self.script.pop(0)(self, request, context)
        media = tensors(request)["MEDIA"].reshape(-1)
        errors = [item.decode() if item.startswith(b"bad") else "" for item in media]
        if all(errors):
            context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"in ensemble 'rank_media', {NO_USABLE_MEDIA}" + "; ".join(dict.fromkeys(errors)),
            )
        return answer(
            SCORE=np.array([[len(item) / 100] for item in media], np.float32),
            CAPTION=texts(
                "" if error else f"caption of {item.decode()}"
                for item, error in zip(media, errors, strict=True)
            ),
            CAPTION_SOURCE=texts("rejected" if error else "model" for error in errors),
            CAPTION_ERROR=texts(errors),
        )


def texts(values: Any) -> np.ndarray:
    return np.array([[value.encode()] for value in values], dtype=np.object_)


def tensors(request: Any) -> dict[str, np.ndarray]:
    found = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        values = deserialize_bytes_tensor(raw) if tensor.datatype == "BYTES" else np.frombuffer(raw, np.int64)
        found[tensor.name] = values.reshape(list(tensor.shape))
    return found


def answer(**outputs: np.ndarray) -> Any:
    response = service_pb2.ModelInferResponse(model_name="rank_media")
    for name, values in outputs.items():
        bytes_ = values.dtype == np.object_
        response.outputs.add(name=name, datatype="BYTES" if bytes_ else "FP32", shape=values.shape)
        response.raw_output_contents.append(
            serialize_byte_tensor(values).item() if bytes_ else values.tobytes()
        )
    return response


def fails(code: grpc.StatusCode, message: str) -> Script:
    return lambda _server, _request, context: context.abort(code, message)


def hangs(server: Server, _request: Any, _context: grpc.ServicerContext) -> None:
    server.over.wait(30)


UNAVAILABLE = fails(grpc.StatusCode.UNAVAILABLE, "rank_media has no available versions")


def started(server: Server, credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    with ThreadPoolExecutor(4) as pool:
        listener = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(server, listener)
        if credentials is None:
            port = listener.add_insecure_port("localhost:0")
        else:
            port = listener.add_secure_port("localhost:0", credentials)
        listener.start()
        yield f"localhost:{port}"
        server.over.set()
        listener.stop(0).wait()


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def url(server: Server) -> Iterator[str]:
    yield from started(server)


Rank = Callable[..., list[Ranked]]


@pytest.fixture(params=["sync", "asyncio"])
def rank(request: pytest.FixtureRequest, url: str) -> Rank:
    """One call through either client; both have to do the same in every test."""

    def call(
        *arguments: Any, options: dict[str, Any] | None = None, url: str = url, **keywords: Any
    ) -> list[Ranked]:
        options = {"timeout": 20.0} | (options or {})
        if request.param == "sync":
            with RankClient(url, **options) as client:
                return client.rank(*arguments, **keywords)

        async def run() -> list[Ranked]:
            async with AsyncRankClient(url, **options) as client:
                return await client.rank(*arguments, **keywords)

        return asyncio.run(run())

    return call


def test_rows_come_best_first_and_rejected_last(rank: Rank) -> None:
    rows = rank(7, [b"bad file", b"aa", b"aaaa"])
    assert [row.index for row in rows] == [2, 1, 0]
    assert rows[0] == Ranked(2, pytest.approx(0.04), "caption of aaaa", "model", "")
    assert rows[2] == Ranked(0, None, "", "rejected", "bad file")


def test_what_is_sent(rank: Rank, server: Server) -> None:
    binary = b"zero \x00 and trailing \x00\x00"
    rank(7, [b"one", b"two"], item_ids=[0, 12], context={"device": 2})
    sent = tensors(server.requests[0])
    assert {name: (list(values.shape), values.tolist()) for name, values in sent.items()} == {
        "MEDIA": ([2, 1], [[b"one"], [b"two"]]),
        "USER_ID": ([2, 1], [[7], [7]]),
        "ITEM_ID": ([2, 1], [[0], [12]]),
        "CONTEXT": ([2, 2], [[0, 2], [0, 2]]),
    }
    assert [output.name for output in server.requests[0].outputs] == [
        "SCORE", "CAPTION", "CAPTION_SOURCE", "CAPTION_ERROR",
    ]  # fmt: skip
    rank(7, [binary])
    assert tensors(server.requests[1])["MEDIA"].item() == binary
    assert 0 < server.requests[1].parameters["timeout"].int64_param <= 20_000_000


def test_time_for_captions_is_that_of_the_call_and_not_of_each_chunk(rank: Rank, server: Server) -> None:
    rank(1, [b"a"])
    assert "deadline_ms" not in server.requests[0].parameters
    server.script = [lambda *_: time.sleep(0.05)]
    rank(1, [b"x" * length for length in range(1, 6)], caption_timeout=0.5)
    first, second = (request.parameters["deadline_ms"].int64_param for request in server.requests[1:])
    assert 0 <= second <= first - 50
    rank(1, [b"a"], caption_timeout=0)
    assert server.requests[3].parameters["deadline_ms"].int64_param == 0


def test_chunks_above_the_models_batch_size(rank: Rank, server: Server) -> None:
    media = [b"x" * length for length in (3, 9, 1, 7, 5, 8, 2, 6, 4)]
    rows = rank(1, media)
    assert sorted(len(tensors(request)["MEDIA"]) for request in server.requests) == [1, 4, 4]
    assert [len(media[row.index]) for row in rows] == [9, 8, 7, 6, 5, 4, 3, 2, 1]


def test_unusable_chunk_beside_a_usable_one(rank: Rank) -> None:
    rows = rank(1, [b"good", b"fine", b"bad 2", b"ok", b"bad 4", b"bad 5"])
    assert [row.index for row in rows if row.score is not None] == [0, 1, 3]
    assert {row.index: row.error for row in rows if row.error} == {2: "bad 2", 4: "bad 4", 5: "bad 5"}


@pytest.mark.parametrize("media", [[b"bad one"], [b"bad one", b"bad two"]])
def test_only_unusable_media_each_with_its_reason(rank: Rank, media: list[bytes]) -> None:
    assert [(row.score, row.source, row.error) for row in rank(1, media)] == [
        (None, "rejected", item.decode()) for item in media
    ]


def test_nothing_to_rank(rank: Rank, server: Server) -> None:
    assert rank(1, []) == []
    assert server.requests == []


def test_configuration_is_asked_once(server: Server, url: str) -> None:
    with RankClient(url) as client:
        assert client.info is None
        client.rank(1, [b"a"])
        client.rank(1, [b"b"])
        assert client.info is not None
        assert (client.info.release, client.info.max_batch_size) == ("r1", 4)
    assert server.configs == 1


def test_configuration_is_asked_again_after_a_refusal(server: Server, url: str) -> None:
    """Another release with other context columns may have come: the next call has to fit it."""
    with RankClient(url) as client:
        client.rank(1, [b"a"])
        server.context = "[]"
        server.script = [fails(grpc.StatusCode.INVALID_ARGUMENT, "unexpected shape for input 'CONTEXT'")]
        with pytest.raises(InvalidArgument, match="unexpected shape"):
            client.rank(1, [b"a"])
        client.rank(1, [b"a"])
    assert tensors(server.requests[-1])["CONTEXT"].shape == (1, 0)


# --- retries and deadlines ------------------------------------------------------------------------


def test_unavailable_is_retried(rank: Rank, server: Server) -> None:
    server.script = [UNAVAILABLE, UNAVAILABLE]
    assert rank(1, [b"a"])[0].caption == "caption of a"
    assert len(server.requests) == 3


def test_retries_end(rank: Rank, server: Server) -> None:
    server.script = [UNAVAILABLE] * 5
    with pytest.raises(Unavailable, match="no available versions"):
        rank(1, [b"a"], options={"retries": 2})
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidArgument),
        (grpc.StatusCode.INTERNAL, ServerError),
        (grpc.StatusCode.NOT_FOUND, ServerError),
    ],
)
def test_nothing_else_is_retried(
    rank: Rank, server: Server, code: grpc.StatusCode, error: type[SightlineClientError]
) -> None:
    server.script = [fails(code, "it broke")]
    with pytest.raises(error, match="it broke"):
        rank(1, [b"a"])
    assert len(server.requests) == 1


def test_slow_answers_end_at_the_deadline(rank: Rank, server: Server) -> None:
    server.script = [hangs]
    start = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.5 s"):
        rank(1, [b"a"], options={"timeout": 0.5})
    assert time.monotonic() - start < 10


def test_nobody_listens(rank: Rank) -> None:
    with pytest.raises(Unavailable):
        rank(1, [b"a"], options={"retries": 1}, url="localhost:1")


def steps_until_failure(session: Session, seconds: float, clock: list[float]) -> list[Ask | Pause]:
    """Let every call take `seconds` and end in UNAVAILABLE; the steps that the session asked for."""
    steps = session.rank(1, [b"a"], None, None, None)
    seen = [next(steps)]
    try:
        while True:
            if isinstance(seen[-1], Pause):
                clock[0] += seen[-1].seconds
                seen.append(steps.send(None))
            else:
                clock[0] += seconds
                seen.append(steps.throw(InferenceServerException("down", "StatusCode.UNAVAILABLE")))
    except Unavailable:
        return seen


def test_backoff_grows_with_jitter_and_stays_within_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("sightline_client.protocol.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("sightline_client.protocol.random.uniform", lambda low, high: high)
    steps = steps_until_failure(Session(timeout=3.0, retries=8), 0.1, clock)
    pauses = [step.seconds for step in steps if isinstance(step, Pause)]
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8]  # another 1.6 s would end after the deadline
    timeouts = [step.timeout for step in steps if isinstance(step, Ask)]
    assert timeouts == pytest.approx([3.0, 2.85, 2.65, 2.35, 1.85, 0.95])
    assert clock[0] < 103.0


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((-1, [b"a"]), {}, "user_id: expected at least 0"),
        ((1, b"a"), {}, "media: expected a sequence of bytes"),
        ((1, [b"a", "path.png"]), {}, r"media\[1\]: expected bytes, got str"),
        ((1, [b"a"]), {"item_ids": [1, 2]}, r"item_ids: expected one per media \(1\), got 2"),
        ((1, [b"a"]), {"item_ids": [-4]}, r"item_ids\[0\]: expected at least 0"),
        ((1, [b"a"]), {"context": {"hour": 1}}, "context: expected names among .*'position'.*, got 'hour'"),
        ((1, [b"a"]), {"context": {"position": 10}}, "context position: expected 0 to 9, got 10"),
        ((1, [b"a"]), {"context": {"device": -1}}, "context device: expected 0 to 2, got -1"),
        ((1, [b"a"]), {"caption_timeout": -0.1}, r"caption_timeout: expected seconds of at least 0, got -0\.1"),
    ],
)
def test_wrong_arguments_never_reach_the_server(
    rank: Rank, server: Server, arguments: tuple[Any, ...], keywords: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        rank(*arguments, **keywords)
    assert server.requests == []


@pytest.mark.parametrize(
    ("options", "message"), [({"timeout": 0.0}, "timeout: expected"), ({"retries": -1}, "retries: expected")]
)
def test_wrong_options(rank: Rank, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        rank(1, [b"a"], options=options)


def test_a_server_that_is_no_release(rank: Rank, server: Server) -> None:
    server.context = '{"position": 10}'
    with pytest.raises(ServerError, match="expected a `context` parameter"):
        rank(1, [b"a"])


# --- TLS ------------------------------------------------------------------------------------------


@pytest.fixture
def secure_url(server: Server) -> Iterator[str]:
    key, chain, ca = ((PEM / name).read_bytes() for name in ("server.key", "server.pem", "ca.pem"))
    credentials = grpc.ssl_server_credentials([(key, chain)], ca, require_client_auth=True)
    yield from started(server, credentials)


def test_tls_with_a_client_certificate(rank: Rank, secure_url: str) -> None:
    tls = TLS(ca=PEM / "ca.pem", cert=PEM / "client.pem", key=PEM / "client.key")
    assert rank(1, [b"a"], url=secure_url, options={"tls": tls})[0].caption == "caption of a"


@pytest.mark.parametrize(
    "tls", [None, TLS(), TLS(ca=PEM / "ca.pem")], ids=["plain", "no-ca", "no-certificate"]
)
def test_tls_refuses(rank: Rank, secure_url: str, tls: TLS | None) -> None:
    with pytest.raises(Unavailable):
        rank(1, [b"a"], url=secure_url, options={"tls": tls, "retries": 0})


def test_tls_options_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cert and key together"):
        TLS(cert=PEM / "client.pem")
    with pytest.raises(InvalidArgument, match="expected ca to be a PEM file"):
        TLS(ca=tmp_path / "none.pem")


# --- command --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, content in (("a.png", b"aa"), ("b.mp4", b"bbbb"), ("c.txt", b"bad text")):
        (tmp_path / name).write_bytes(content)
    return [str(tmp_path / name) for name in ("a.png", "b.mp4", "c.txt")]


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["--user", "3", *arguments], terminal_width=300, env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_command_prints_a_table_and_json(url: str, files: list[str]) -> None:
    code, output = command("--url", url, "--context", "position=4", "--json", *files)
    assert code == 0
    table, last = output.strip().rsplit("\n", 1)
    document = json.loads(last)
    assert document["user"] == 3
    assert [Path(row["file"]).name for row in document["results"]] == ["b.mp4", "a.png", "c.txt"]
    assert document["results"][0] == {
        "file": files[1], "index": 1, "score": pytest.approx(0.04), "caption": "caption of bbbb",
        "source": "model", "error": "",
    }  # fmt: skip
    lines = [line for line in table.splitlines() if ".png" in line or ".mp4" in line or ".txt" in line]
    assert ["caption of bbbb" in lines[0], "caption of aa" in lines[1], "bad text" in lines[2]] == [True] * 3


def test_command_fails_only_if_all_files_are_rejected(url: str, files: list[str]) -> None:
    assert command("--url", url, files[0], files[2])[0] == 0
    code, output = command("--url", url, files[2])
    assert code == 1
    assert "bad text" in output


@pytest.mark.parametrize("context", ["position", "position=x", "=3"])
def test_command_checks_its_context(url: str, files: list[str], context: str) -> None:
    with pytest.raises(InvalidArgument, match="--context: expected NAME=INDEX"):
        command("--url", url, "--context", context, *files)


@pytest.mark.parametrize("module", ["sightline_client.cli", "sightline.cli"])
def test_commands_end_in_one_line_without_a_server(module: str, files: list[str]) -> None:
    verb = ["rank"] if module == "sightline.cli" else []
    done = subprocess.run(
        [sys.executable, "-m", module, *verb, "--user", "1", "--url", "localhost:1", files[0]],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_client_imports_no_model_library() -> None:
    code = (
        "import sys, sightline_client.cli;"
        "print({'torch', 'transformers', 'sightline', 'pyarrow', 'PIL'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "set()"
