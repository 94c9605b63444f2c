"""A real Triton server with a small release: what it answers, what it refuses, what it leaves behind."""

from __future__ import annotations

import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from PIL import Image
from tritonclient.utils import InferenceServerException

from serving.triton import TritonServer
from sightline import release
from sightline.annotation import Annotated
from sightline.errors import ReleaseError, ServingError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt
from sightline.tokens import TokenSpec
from sightline.words import WordHead
from tests.media_files import again, clip, encoded, picture

ROOT = Path(__file__).parents[2]
KINDS = {"int64": "INT64", "int32": "INT32", "float32": "FP32", "object": "BYTES"}


@pytest.fixture(scope="module")
def client(server: TritonServer) -> Iterator[Any]:
    with triton.InferenceServerClient(server.url) as client:
        yield client


@pytest.fixture(scope="module")
def models(releases_dir: Path) -> Path:
    return release.current(releases_dir) / "model_repository"


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """32 different items: 24 pictures of several sizes and formats, 8 videos."""
    folder, random = tmp_path_factory.mktemp("media"), np.random.default_rng(11)
    pictures = []
    for i in range(24):
        blocks = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((40 + 5 * i, 90 - i), Image.Resampling.NEAREST)
        pictures.append(encoded(image, "JPEG" if i % 3 else "PNG"))
    videos = [clip(folder / f"{i}.mp4", random.integers(0, 256, 8).tolist()) for i in range(8)]
    items = [*pictures, *videos]
    return [items[i] for i in random.permutation(len(items))]


def infer(client: Any, model: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """All outputs of one inference."""
    tensors = []
    for name, value in inputs.items():
        tensors.append(triton.InferInput(name, list(value.shape), KINDS[value.dtype.name]))
        tensors[-1].set_data_from_numpy(value)
    result = client.infer(model, tensors)
    return {output.name: result.as_numpy(output.name) for output in result.get_response().outputs}


def column(values: list[Any]) -> np.ndarray:
    return np.array(values, dtype=object if isinstance(values[0], bytes) else np.int64).reshape(-1, 1)


def rank(
    client: Any, items: list[bytes], users: list[int], context: list[list[int]]
) -> dict[str, np.ndarray]:
    return infer(client, "rank_media", MEDIA=column(items), USER_ID=column(users),
                 ITEM_ID=column([0] * len(items)), CONTEXT=np.array(context, np.int64))  # fmt: skip


def test_one_item(client: Any, media: list[bytes]) -> None:
    answer = rank(client, media[:1], [7], [[1, 2]])
    assert {name: value.shape for name, value in answer.items()} == dict.fromkeys(answer, (1, 1))
    assert 0 <= answer["SCORE"].item() <= 1
    assert len(answer["CAPTION"].item()) > 0
    assert (answer["CAPTION_SOURCE"].item(), answer["CAPTION_ERROR"].item()) == (b"model", b"")


def test_batch_equals_singles(client: Any, media: list[bytes]) -> None:
    """Captions are identical; scores within 1e-4, as a batched product sums in another order."""
    users = [(0, 7, 42, 99)[i % 4] for i in range(32)]
    context = [[i % 4, i % 24] for i in range(32)]
    batch = rank(client, media, users, context)
    singles = [rank(client, [again(media[i])], users[i : i + 1], context[i : i + 1]) for i in range(32)]
    assert {b"model"} == {single["CAPTION_SOURCE"].item() for single in singles}
    assert batch["CAPTION"].tolist() == [single["CAPTION"][0].tolist() for single in singles]
    scores = np.concatenate([single["SCORE"] for single in singles])
    np.testing.assert_allclose(batch["SCORE"], scores, atol=1e-4, rtol=0)
    assert len(set(batch["CAPTION"][:, 0])) > 8, "captions that are all alike would hide a mix-up of rows"
    assert np.ptp(scores) > 2e-3


def test_equal_bytes_get_equal_captions(client: Any, media: list[bytes]) -> None:
    one, other = again(media[0]), again(media[1])
    captions = infer(client, "caption", MEDIA=column([one, other, one]))["CAPTION"][:, 0]
    assert captions[0] == captions[2]


def test_every_stage_alone_gives_what_the_ensemble_gives(
    client: Any, media: list[bytes], models: Path
) -> None:
    """The stages called one by one, fed by this package's own functions, equal one call of the ensemble."""
    folder = models / "caption" / "1"
    prompt = CaptionPrompt.from_pretrained(folder)
    pixels = load(media[0], MediaSpec.from_pretrained(folder))
    seen = infer(client, "vision_encoder", pixel_values=pixels)
    features = seen["image_features"]
    table = features.reshape(1, -1, features.shape[-1])
    ids = prompt.ids(table.shape[1])
    decoded = infer(
        client, "tensorrt_llm", input_ids=ids[None], prompt_embedding_table=table,
        **{name: np.array([[value]], np.int32) for name, value in (
            ("input_lengths", len(ids)), ("request_output_len", prompt.max_new_tokens),
            ("end_id", prompt.end_id), ("pad_id", prompt.pad_id), ("prompt_vocab_size", table.shape[1]))},
    )  # fmt: skip
    caption = prompt.text(decoded["output_ids"][0, 0, : decoded["sequence_length"].item()])
    words = WordHead.from_pretrained(folder)
    assert words is not None
    text = Annotated(caption, confidences=words([seen["pooled_features"]])[0]).to_text()
    answer = infer(client, "caption", MEDIA=column([again(media[0])]))
    assert (answer["CAPTION"].item().decode(), answer["ANNOTATION"].item().decode()) == (caption, text)

    tokens = infer(client, "tokenize", CAPTION=column([text.encode()]))["ITEM_TOKENS"]
    spec = TokenSpec.load(models / "tokenize" / "1" / "token_spec.json")
    np.testing.assert_array_equal(tokens, spec.encode_batch([text]))

    row = infer(client, "lookup", USER_ID=column([42]), ITEM_ID=column([0]))
    dense = row.pop("DENSE")
    embedded = infer(client, "embed", ITEM_TOKENS=tokens, CONTEXT=np.array([[1, 2]], np.int64), **row)
    score = infer(client, "score", DENSE=dense, **embedded)["SCORE"]
    ensemble = rank(client, media[:1], [42], [[1, 2]])
    assert ensemble["CAPTION"].item().decode() == caption
    np.testing.assert_allclose(score, ensemble["SCORE"], atol=1e-6)


def test_lookup_of_known_and_unknown_ids(client: Any) -> None:
    rows = infer(client, "lookup", USER_ID=column([42, 8, 0, -3]), ITEM_ID=column([5, 10**12, 0, 9]))
    assert rows["USER_INDEX"].ravel().tolist() == [2, 0, 0, 0]
    assert rows["ITEM_INDEX"].ravel().tolist() == [1, 0, 0, 2]
    np.testing.assert_array_equal(rows["PROFILE_TOKENS"][1], rows["PROFILE_TOKENS"][2])
    assert (rows["PROFILE_TOKENS"][0] != rows["PROFILE_TOKENS"][2]).any()


def test_bad_rows_do_not_touch_the_others(client: Any, media: list[bytes]) -> None:
    good = rank(client, media[:2], [7, 7], [[0, 0]] * 2)
    mixed = rank(client, [again(media[0]), b"nonsense", media[1], picture("PNG")[:200]], [7] * 4, [[0, 0]] * 4)
    assert mixed["CAPTION_SOURCE"].ravel().tolist() == [b"model", b"rejected", b"store", b"rejected"]
    assert mixed["CAPTION"][[1, 3]].ravel().tolist() == [b"", b""]
    assert b"neither image nor video" in mixed["CAPTION_ERROR"][1, 0]
    assert b"truncated PNG" in mixed["CAPTION_ERROR"][3, 0]
    assert mixed["CAPTION"][[0, 2]].tolist() == good["CAPTION"].tolist()
    np.testing.assert_allclose(mixed["SCORE"][[0, 2]], good["SCORE"], atol=1e-4)
    with pytest.raises(InferenceServerException, match="no row can be used") as refused:
        rank(client, [b"nonsense", b""], [7, 7], [[0, 0]] * 2)
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_rows_are_decoded_together(server: TritonServer, client: Any, media: list[bytes]) -> None:
    before = server.statistics()["tensorrt_llm"]
    infer(client, "caption", MEDIA=column([again(item) for item in media]))
    after = server.statistics()["tensorrt_llm"]
    assert after["inferences"] - before["inferences"] == 32
    assert after["executions"] - before["executions"] <= 8


def test_stand_ins_say_so_in_the_log(server: TritonServer) -> None:
    log = server.log_path.read_text()
    for model in ("embed", "score", "vision_encoder"):
        assert f"{model}: served by the python stand-in for the onnxruntime backend" in log
    assert "tensorrt_llm: served by the python stand-in for the tensorrtllm backend" in log


def changed_release(source: Path, folder: Path, file: str, text: str, other: str) -> Path:
    """Copy a release with one file of its models changed; its files are as published."""
    shutil.copytree(source, folder)
    path = folder / "model_repository" / file
    assert text in path.read_text()
    path.write_text(path.read_text().replace(text, other, 1))
    manifest = release.read_manifest(folder)
    changed: dict[str, Any] = {"release": release.release_id("cpu", folder, manifest.release)}
    for name in release.ID_BEARERS:
        bearer = folder / name
        bearer.write_text(bearer.read_text().replace(manifest.release, changed["release"]))
    changed["files"] = release.hash_files(folder)
    (folder / release.MANIFEST).write_text(manifest.model_copy(update=changed).model_dump_json())
    return folder


def test_a_model_that_breaks_the_rules_does_not_load(releases_dir: Path, tmp_path: Path) -> None:
    """A release whose configuration is not the graph's."""
    source = release.current(releases_dir)
    folder = changed_release(source, tmp_path / "release", "score/config.pbtxt", "TYPE_FP32", "TYPE_FP64")
    refused = r"score: .*'FEATURES': the graph has tensor\(float\), the configuration TYPE_FP64"
    with pytest.raises(ServingError, match=refused):  # noqa: SIM117 (the start is what fails)
        with TritonServer(folder, log_path=tmp_path / "log"):
            pass


def test_a_model_that_dies_while_it_loads_ends_the_start(releases_dir: Path, tmp_path: Path) -> None:
    """As a stub does whose C++ throws: Triton does not notice that it is gone and waits for ever."""
    source, load = release.current(releases_dir), "self.store ="
    death = 'import os; os.write(2, b"  what():  no space left in shared memory\\n"); os.abort()'
    folder = changed_release(source, tmp_path / "release", "lookup/1/model.py", load, f"{death}; {load}")
    server = TritonServer(folder, log_path=tmp_path / "log", timeout=120)
    crashed = r"crashed while it loaded \(no space left in shared memory\).* start again; .*/log"
    with pytest.raises(ServingError, match=crashed), server:
        pass
    assert traces(server.token) == []


def test_serving_leaves_the_release_as_it_was(server: TritonServer, client: Any, media: list[bytes]) -> None:
    rank(client, media[:1], [7], [[0, 0]])
    release.verify(server.release_dir)


def test_a_tampered_release_refuses_to_serve(releases_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "release"
    shutil.copytree(release.current(releases_dir), folder)
    with (folder / "model_repository" / "embed" / "1" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ReleaseError, match=r"model_repository/embed/1/model\.onnx: changed"):
        TritonServer(folder)


def test_a_busy_port_is_named_before_anything_starts(releases_dir: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServingError, match=f"--grpc-port {port}: cannot listen on 127.0.0.1:{port}"):
            TritonServer(release.current(releases_dir), grpc_port=port)


def traces(token: str) -> list[str]:
    """What is left of servers whose names hold `token`: processes, shared memory, run folders."""
    processes = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    return [
        *(line for line in processes.splitlines() if token in line),
        *(
            name
            for folder in ("/dev/shm", tempfile.gettempdir())
            for name in os.listdir(folder)
            if token in name
        ),
    ]


def test_a_killed_server_leaves_nothing(releases_dir: Path, tmp_path: Path) -> None:
    with TritonServer(release.current(releases_dir), log_path=tmp_path / "log") as server:
        token = server.token
        assert len(traces(token)) > 8
        os.kill(server.pid, signal.SIGKILL)
        with pytest.raises(ServingError, match="ended with code -9"):
            server.wait()
    assert traces(token) == []


SERVE = [sys.executable, "-m", "sightline.cli", "serve", "--grpc-port=0", "--http-port=0", "--metrics-port=0"]


def start_command(releases_dir: Path) -> tuple[subprocess.Popen[str], str]:
    """`sightline serve` up to the line that it can be stopped, and the token of its server."""
    state = releases_dir.parent
    process = subprocess.Popen(
        [*SERVE, f"--releases={releases_dir}", f"--store={state / 'features'}", f"--queue={state / 'queue'}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C stops it" in line:
            return process, f"sightline_{process.pid}_"
    raise AssertionError(f"sightline serve ended with code {process.wait()}")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_ends_cleanly(releases_dir: Path, number: signal.Signals) -> None:
    """Also as a background job, whose SIGINT the shell had ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process, token = start_command(releases_dir)
    finally:
        signal.signal(signal.SIGINT, before)
    process.send_signal(number)
    assert process.stderr is not None
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, rest
    assert "Traceback" not in rest
    assert traces(token) == []


def test_a_killed_command_takes_its_server_along(releases_dir: Path) -> None:
    process, token = start_command(releases_dir)
    listed = subprocess.run(["ps", "-ewwo", "pid,args"], capture_output=True, text=True, check=True).stdout
    (guard,) = (line.split()[0] for line in listed.splitlines() if token in line and " guard " in line)
    watched = os.pidfd_open(int(guard))  # readable as soon as the process has ended
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
    assert select.select([watched], [], [], 60)[0], "the guard did not end"
    os.close(watched)
    assert traces(token) == []
