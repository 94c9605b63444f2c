"""benchmarks/hot: the load generator charges for queues, the contenders do the same work, a run survives failures."""

from __future__ import annotations

import asyncio
import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import tritonclient.grpc as triton
from aiohttp import web

from benchmarks.hot import data, install, load, measure, servers, wire
from benchmarks.hot.__main__ import main, parse
from benchmarks.hot.grpc_load import GrpcLoad
from benchmarks.hot.load import Line, Load, arrivals, percentiles
from benchmarks.hot.measure import HotOptions, Notebook
from benchmarks.hot.processes import Tree
from benchmarks.hot.search import capacity
from benchmarks.hot.summary import fixed_rates, ratios
from benchmarks.hot.work import GRAPHS, STORE, Plain, Tricked
from serving.triton import TritonServer
from sightline.errors import ConfigError, ServingError
from sightline.store import open_store

ASK = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
SERVICE = 0.01
ITEMS, USERS, CANDIDATES = 60, 8, 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def running(handler: Handler) -> Iterator[tuple[str, int]]:
    """An aiohttp server in a thread."""
    loop, address, ready = asyncio.new_event_loop(), [("", 0)], threading.Event()

    async def start() -> web.AppRunner:
        app = web.Application()
        app.router.add_route("*", "/", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        address[0] = runner.addresses[0]
        ready.set()
        return runner

    def work() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(20)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def one_at_a_time() -> Handler:
    """A server of known capacity: 1 / SERVICE requests per second."""
    lock = asyncio.Lock()

    async def answer(request: web.Request) -> web.Response:
        async with lock:
            await asyncio.sleep(SERVICE)
        return web.Response(text="ok")

    return answer


# --- the load generator -------------------------------------------------------------------------------------


def test_a_queue_counts_although_its_requests_were_sent_late() -> None:
    with running(one_at_a_time()) as address:
        # Of twice the capacity for a second, the last ones wait for another second. From the time of sending, two
        # connections see 2 * SERVICE at most.
        window = Load(address, [ASK], connections=2).run(2 / SERVICE, 1.0, warm=0, grace=20)
        calm = Load(address, [ASK], connections=2).run(0.1 / SERVICE, 1.0, warm=0, grace=20)
    assert window.failed == calm.failed == 0
    assert window.p50 > 250
    assert window.p99 > 600
    assert 1e3 * SERVICE < calm.p50 < window.p50 / 4
    assert window.per_s < 1.05 / SERVICE


def test_a_server_that_falls_behind_is_given_up_and_never_looks_fast() -> None:
    with running(one_at_a_time()) as address:
        slow, began = Load(address, [ASK], connections=4), time.monotonic()
        window = slow.run(3 / SERVICE, 10.0, warm=0, limit=5 * SERVICE * 1e3)
        assert time.monotonic() - began < 5
        assert window.p99 == math.inf
        assert slow.saturate(0.5) < 1.2 / SERVICE


def test_only_answers_with_status_200_count() -> None:
    seen = [0]

    async def answer(request: web.Request) -> web.Response:
        seen[0] += 1
        return web.Response(status=503 if seen[0] > 4 and seen[0] % 2 else 200)

    with running(answer) as address:
        window = Load(address, [ASK], connections=4).run(200, 0.5, warm=0)
        assert 0.4 < window.failed / window.requests < 0.6
        assert window.p50 == math.inf or window.failed <= window.requests / 2
        seen[0] = 10**9
        Load(address, [ASK], connections=4).warm_up()  # a refusal may follow an overload


def test_a_server_that_only_refuses_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answer(request: web.Request) -> web.Response:
        return web.Response(status=503)

    monkeypatch.setattr(load, "_RECOVERY", 0.1)
    with running(answer) as address, pytest.raises(ServingError, match="status 200, got 503"):
        Load(address, [ASK], connections=4).run(10, 1.0)


@pytest.mark.parametrize("chunked", [False, True])
def test_answers_of_both_framings_are_read(chunked: bool) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        if chunked:
            response.enable_chunked_encoding()
        else:
            response.content_length = 60_000
        await response.prepare(request)
        for part in range(3):
            await response.write(bytes([part]) * 20_000)
            await asyncio.sleep(0.005)
        await response.write_eof()
        return response

    with running(answer) as address, closing(Line(address)) as line:
        for _ in range(2):
            assert line.ask(ASK) == b"\0" * 20_000 + b"\1" * 20_000 + b"\2" * 20_000


def test_connections_are_dealt_evenly() -> None:
    answered: list[int] = []

    async def answer(request: web.Request) -> web.Response:
        assert request.transport is not None
        answered.append(request.transport.get_extra_info("peername")[1])
        return web.Response()

    known: dict[int, int] = {}

    def owners(ports: Any) -> list[int | None]:
        """Three of four connections are the first process's."""
        for port in ports:
            known.setdefault(port, int(len(known) % 4 == 3))
        return [known[port] for port in ports]

    with running(answer) as address:
        dealt = Load(address, [ASK], connections=8, owners=owners, acceptors=2)
        before = len(answered)
        dealt.run(400, 0.5, warm=0)
        measured = [known[port] for port in answered[before + 16 :]]
        assert 0.4 < np.mean(measured) < 0.6
        with pytest.raises(ServingError, match="expected 3 processes"):
            Load(address, [ASK], connections=6, owners=owners, acceptors=3).warm_up()


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    due = arrivals(1000, 20, seed=1)
    gaps = np.diff(due)
    assert len(due) == pytest.approx(20_000, rel=0.05)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)
    assert (gaps > 0).all()
    assert due[-1] < 20
    assert np.array_equal(due, arrivals(1000, 20, seed=1))
    assert len(arrivals(0.01, 1, seed=0)) == 1


def test_percentiles_are_ranks() -> None:
    assert percentiles(np.arange(1, 201) / 1e3) == (100, 190, 198)
    assert percentiles(np.array([0.001] * 98 + [math.inf] * 2))[2] == math.inf


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guess", [1, 50, 239, 240, 241, 3000])
def test_bisection_finds_the_rate_at_which_a_queue_gets_too_long(guess: float) -> None:
    service, limit, probes = 1 / 470, 0.02, []

    def meets(rate: float) -> bool:
        """M/M/1: the response time's 99th percentile is ln 100 / (μ − λ)."""
        probes.append(rate)
        return rate < 1 / service and math.log(100) / (1 / service - rate) <= limit

    exact = 1 / service - math.log(100) / limit
    found = capacity(meets, guess, 1.02)
    assert exact / 1.02 <= found <= exact
    assert len(probes) < 25


def test_a_server_that_never_meets_the_limit_has_no_capacity() -> None:
    assert capacity(lambda rate: False, 300) == 0


# --- the work and its forms ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Data of a small catalogue, without a release; good for the whole module, whoever edits what it is made from."""
    folder = tmp_path_factory.mktemp("hot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "key", lambda items, users: f"{items} {users}")
        data.prepare(folder, ITEMS, USERS, print, with_release=False)
        yield folder


def test_requests_are_seeded_and_follow_zipf() -> None:
    made = data.requests(1000, 50, 100, count=40)
    again = data.requests(1000, 50, 100, count=40)
    assert all(np.array_equal(one.items, other.items) for one, other in zip(made, again, strict=True))
    assert all(len(set(one.items.tolist())) == 100 for one in made)
    counts = np.sort(np.bincount(np.concatenate([one.items for one in made])))[::-1]
    assert counts[0] > 30 > 5 > counts[500]
    assert {one.user for one in made} <= set(range(1, 51))


def test_both_designs_score_as_embed_and_score_by_hand(folder: Path) -> None:
    request = data.requests(ITEMS, USERS, CANDIDATES)[3]
    items = pq.read_table(folder / "ranker/features/items.parquet").to_pydict()
    user = pq.read_table(folder / "ranker/features/users.parquet").slice(request.user - 1, 1).to_pylist()[0]
    assert user["id"] == request.user
    embed, score = (onnxruntime.InferenceSession(folder / GRAPHS / f"{name}.onnx") for name in ("embed", "score"))
    expected = []
    for item in request.items.tolist():
        (features,) = embed.run(None, {
            "USER_INDEX": np.array([[request.user]]), "ITEM_INDEX": np.array([[item]]),
            "CONTEXT": request.context[None], "ITEM_TOKENS": np.array([items["tokens"][item - 1]]),
            "PROFILE_TOKENS": np.array([user["tokens"]]),
            "PROFILE_WEIGHTS": np.array([user["weights"]], np.float32),
            "PROFILE_NEGATIVE_TOKENS": np.array([user["negative_tokens"]]),
            "PROFILE_NEGATIVE_WEIGHTS": np.array([user["negative_weights"]], np.float32),
        })  # fmt: skip
        (found,) = score.run(None, {"FEATURES": features, "DENSE": np.array([user["dense"]], np.float32)})
        expected.append(found[0, 0])
    assert np.std(expected) > 1e-3  # otherwise the next lines would say nothing
    with open_store(str(folder / STORE)) as store:
        for work in (Plain(folder, store), Tricked(folder, store)):
            answer = work(*request)
            assert np.abs(answer.scores - expected).max() < 1e-5
            assert answer.status.tolist() == [0] * CANDIDATES
            strange = work(USERS + 1, np.array([1, ITEMS + 1]), request.context)
            assert strange.status.tolist() == [0, 2]


def test_all_forms_say_the_same() -> None:
    request = wire.Request(7, np.array([5, 9, 2**40]), np.array([3, 1]))
    for form in ("json", "binary", "kserve"):
        head, _, body = wire.http(form, "/path", request).partition(b"\r\n\r\n")
        assert head.startswith(b"POST /path HTTP/1.1\r\n")
        assert f"Content-Length: {len(body)}".encode() in head
        for number in (7, 2**40, 3):
            assert number.to_bytes(8, "little") in body or str(number).encode() in body
    unpacked = wire.unpack(wire.pack(request))
    assert unpacked.user == 7
    assert all(np.array_equal(one, other) for one, other in zip(unpacked[1:], request[1:], strict=True))
    scores, status = np.array([0.25, 0.5, 0.125], np.float32), np.array([0, 2, 1], np.uint8)
    forms: dict[wire.Form, bytes] = {
        "json": json.dumps({"scores": scores.tolist(), "status": status.tolist()}).encode(),
        "binary": wire.pack_answer(scores, status),
    }
    for form, content in forms.items():
        found = wire.answer(form, content)
        assert np.array_equal(found.scores, scores)
        assert np.array_equal(found.status, status)


def test_triton_understands_its_form(server: TritonServer) -> None:
    request = wire.Request(7, np.array([5, 9, 11, 12_345]), np.array([1, 2]))
    inputs = []
    for name, value in (("USER_ID", np.array([7])), ("ITEM_IDS", request.items), ("CONTEXT", request.context)):
        inputs.append(triton.InferInput(name, [1, len(value)], "INT64"))
        inputs[-1].set_data_from_numpy(value[None])
    with triton.InferenceServerClient(server.url) as client:
        expected = client.infer("rank_items", inputs)
    host, _, port = server.http_url.partition(":")
    with closing(Line((host, int(port)))) as line:
        found = wire.answer("kserve", line.ask(wire.http("kserve", wire.KSERVE_PATH, request)))
    assert np.array_equal(found.scores, expected.as_numpy("SCORES")[0])
    assert np.array_equal(found.status, expected.as_numpy("FEATURE_STATUS")[0])
    with closing(GrpcLoad(server.url, [request])) as through_grpc:
        window = through_grpc.run(50, 0.5, warm=0)
        assert window.failed == 0
        assert 0 < window.p50 < math.inf
        assert 0 < through_grpc.alone(0.1).p50 < math.inf


# --- processes ----------------------------------------------------------------------------------------------


def test_daemons_of_a_server_are_found_counted_and_ended() -> None:
    script = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
if sys.argv[1:] == ["leave"]:
    sys.exit()
until = time.process_time() + 0.3
while time.process_time() < until:
    pass
print("ready", flush=True)
time.sleep(60)
"""
    tree = Tree()
    with subprocess.Popen([sys.executable, "-c", script], env=tree.environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            assert len(tree.pids()) == 3
            assert tree.cpu_since({}) >= 0.29
            before = tree.cpu()
            assert tree.cpu_since(before) < 0.2
            memory = tree.memory_mb()
            assert 3 < memory["pss"] < memory["rss"]
            process.kill()
            process.wait()
            assert len(tree.pids()) == 2  # they are init's by now
        finally:
            tree.end()
    assert tree.pids() == []


# --- the run ------------------------------------------------------------------------------------------------


def test_steps_are_made_once_unless_something_changed(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Any]:
        made.append(1)
        return {"figure": len(made)}

    def fail() -> dict[str, Any]:
        raise ServingError("no")

    notes = Notebook(tmp_path / "notes", "key")
    with pytest.raises(ServingError):
        notes.get("a b", fail)
    assert [notes.get("a b", make), Notebook(tmp_path / "notes", "key").get("a b", make)] == [{"figure": 1}] * 2
    assert Notebook(tmp_path / "notes", "another").get("a b", make) == {"figure": 2}


def test_ratios_and_rates_are_those_of_the_best() -> None:
    contenders = {
        name: {"peer": peer, "design": design, "capacity": figure, "alone": {"p50": 0.5}}
        for name, peer, design, figure in (
            ("a plain", "a", "plain", 100.0), ("b plain", "b", "plain", 400.0), ("a tricked", "a", "tricked", 1000.0),
            (servers.OURS, None, "tricked", 900.0),
        )
    }  # fmt: skip
    document = {"contenders": contenders, "floors": {"plain": {"p50": 2.0}, "tricked": {"p50": 0.25}}}
    found = ratios(document)
    assert (found["best_peer"], found["best_tricked_peer"]) == ("b plain", "a tricked")
    assert found["throughput_over_best_peer"] == 2.25
    assert found["throughput_over_best_tricked_peer"] == 0.9
    assert (found["p50_over_floor"], found["p50_over_plain_floor"]) == (2.0, 0.25)
    del contenders["a plain"], contenders["b plain"]
    assert ratios(document)["throughput_over_best_peer"] is None
    peers = [servers.Contender("a", "plain"), servers.Contender("a", "tricked"), servers.Contender(None, "tricked")]
    sweeps = {"a plain": {"capacity": 400.0}, "a tricked": {"capacity": 1000.0}, servers.OURS: {"capacity": 1500.0}}
    assert list(fixed_rates(peers, sweeps).values()) == [100, 200, 300, 750]
    assert list(fixed_rates(peers[2:], sweeps).values()) == [375, 750, 1125]


@pytest.mark.parametrize(("given", "message"), [
    (["--rounds", "0"], "--rounds: got 0"), (["--only", "Flask"], "--only: got Flask, expected some of FastAPI plain"),
    (["--items", "800"], "--candidates: got 500"),
])  # fmt: skip
def test_impossible_options_are_named(given: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(given)


def test_the_lock_has_a_section_per_peer_and_our_own_versions() -> None:
    sections = install.sections(install.LOCK.read_text())
    assert list(sections) == ["FastAPI", "LitServe", "BentoML", "Ray Serve"]
    pins, known = (
        dict(re.findall(r"^([a-z0-9-]+)==([^;\s]+)", text, re.MULTILINE))
        for text in ("\n".join(sections.values()), Path("requirements.lock").read_text())
    )
    both = pins.keys() & known.keys()
    assert {"onnxruntime", "numpy", "lmdb", "pyarrow", "pydantic"} <= both
    assert {name: pins[name] for name in both} == {name: known[name] for name in both}


def run_quick(folder: Path, out: Path) -> int:
    """FastAPI alone, on data that are there."""
    (out / "data").mkdir(exist_ok=True)
    if not (there := out / "data" / f"{ITEMS}-{USERS}").exists():
        there.symlink_to(folder)
    options = ["--quick", "--items", str(ITEMS), "--users", str(USERS), "--candidates", str(CANDIDATES)]
    return main([*options, "--only", "FastAPI plain", "--out", str(out)])


def outcome(capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    """The document in the last line of stdout, and stderr."""
    out, err = capsys.readouterr()
    document: dict[str, Any] = json.loads(out.splitlines()[-1])
    return document, err


def interrupt(*_: Any) -> dict[str, Any]:
    raise KeyboardInterrupt


def test_a_run_survives_a_server_that_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(measure.install, "install", lambda progress: {})
    monkeypatch.setattr(servers, "PYTHON", sys.executable)
    monkeypatch.setitem(servers._APPS, "FastAPI", ("-c", "raise SystemExit('no such wheel')"))
    with monkeypatch.context() as patch:
        patch.setattr(measure.Bench, "_floor", interrupt)
        assert run_quick(folder, tmp_path) == 130
    assert "run it again, it goes on" in capsys.readouterr().err
    monkeypatch.setattr(measure.Bench, "_client", interrupt)  # is not asked again
    assert run_quick(folder, tmp_path) == 0
    document, err = outcome(capsys)
    assert document["resumed"]
    assert "ended with code 1" in document["problems"]["FastAPI plain"]
    assert "no such wheel" in err
    assert document["contenders"] == {}
    assert 0 < document["floors"]["tricked"]["p50"] <= document["floors"]["plain"]["p99"]
    assert set(document["stages"]["plain"]) == {"user", "items", "embed", "score", "rest"}
    assert document["client"]["capacity"] > 100
    assert not (tmp_path / "unfinished").exists()


@pytest.mark.skipif(not install.PYTHON.exists(), reason="no peers; `make bench-hot BENCH=--quick` installs them")
def test_fastapi_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert run_quick(folder, tmp_path) == 0
    document, err = outcome(capsys)
    assert document["problems"] == {}
    found = document["contenders"]["FastAPI plain"]
    assert found["difference"] < 1e-5
    assert found["alone"]["failed"] == 0
    assert found["alone"]["p50"] > document["floors"]["plain"]["p50"] / 2
    assert found["memory_mb"]["rss"] >= found["memory_mb"]["pss"] > 20
    assert found["cpu_s_per_1000"] > 0
    assert document["best_peer"] == "FastAPI plain"
    assert "| FastAPI plain | 1 × 1 |" in err
    report = Path(document["report"])
    assert {path.name for path in report.iterdir()} == {"report.json", "report.md", "report.png"}


def test_quick_options_are_small() -> None:
    assert HotOptions.quick().rounds == 1 < HotOptions().rounds
