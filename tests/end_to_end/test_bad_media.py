"""Awkward and bad media through a real server: handled, or refused with INVALID_ARG and a reason.

Whatever comes, the server goes on and the other rows of a batch are answered.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
from PIL import Image
from sightline_client import RankClient

from tests.media_files import NOISE, again, audio_only, bomb_png, clip, encoded, picture


@pytest.fixture(scope="module")
def handled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("handled")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise = Image.fromarray(NOISE)
    deep = Image.fromarray((NOISE[..., 0].astype(np.uint16) << 8) + 7)
    return {
        "cmyk": encoded(noise.convert("CMYK"), "JPEG"),
        "16 bit": encoded(deep, "PNG"),
        "transparent": encoded(noise.convert("RGBA"), "PNG"),
        "animated gif": encoded(noise, "GIF", save_all=True, append_images=[noise.rotate(90)], duration=50),
        "animated webp": encoded(noise, "WEBP", save_all=True, append_images=[noise.rotate(90)], duration=50),
        "exif": encoded(noise, "JPEG", exif=exif),
        "1 x 1": encoded(Image.new("RGB", (1, 1), "red"), "PNG"),
        "50000 x 1": encoded(Image.new("RGB", (50_000, 1), "red"), "PNG"),
        "one frame": clip(folder / "one.mp4", [90]),
        "webm": clip(folder / "v.webm", [20, 90, 160, 230], codec="libvpx"),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, str]]:
    folder = tmp_path_factory.mktemp("refused")
    video = clip(folder / "v.mp4", [0] * 20, noise=True)
    return {
        "truncated jpeg": (picture("JPEG")[:400], "truncated JPEG"),
        "truncated png": (picture("PNG")[:400], "truncated PNG"),
        "zero bytes": (b"", "empty: 0 bytes"),
        "text": (b"just text", "neither image nor video"),
        "pdf": (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj", "neither image nor video"),
        "bomb": (bomb_png(), "more pixels than the limit"),
        "audio only": (audio_only(folder / "a.mp4"), "no video stream"),
        "truncated mp4": (video[: len(video) // 2], "truncated MP4"),
        "huge frames": (clip(folder / "h.mp4", [9], size=(8192, 8192)), "more pixels than the limit"),
    }


@pytest.fixture(scope="module")
def client(server: Any) -> Any:
    with RankClient(server.url, timeout=120) as client:
        yield client


def test_awkward_media_are_captioned(client: RankClient, handled: dict[str, bytes]) -> None:
    for row in client.rank(7, list(handled.values())):
        name = list(handled)[row.index]
        assert (row.source, row.error) == ("model", ""), name
        assert row.score is not None
        assert 0 <= row.score <= 1


def test_bad_media_alone_are_an_invalid_argument(server: Any, refused: dict[str, tuple[bytes, str]]) -> None:
    """On the wire, without our client: status and reason."""
    with tritonclient.grpc.InferenceServerClient(server.url) as raw:
        context = raw.get_model_config("rank_media").config.input[3].dims[0]
        for name, (data, reason) in refused.items():
            values = {
                "MEDIA": np.array([[data]], dtype=np.object_),
                "USER_ID": np.full((1, 1), 7),
                "ITEM_ID": np.zeros((1, 1), np.int64),
                "CONTEXT": np.zeros((1, context), np.int64),
            }
            inputs = []
            for key, value in values.items():
                kind = "BYTES" if key == "MEDIA" else "INT64"
                tensor = tritonclient.grpc.InferInput(key, value.shape, kind)
                inputs.append(tensor.set_data_from_numpy(value))
            with pytest.raises(tritonclient.grpc.InferenceServerException, match=reason) as caught:
                raw.infer("rank_media", inputs, client_timeout=120)
            assert caught.value.status() == "StatusCode.INVALID_ARGUMENT", name


def test_bad_media_do_not_touch_the_other_rows(
    client: RankClient, refused: dict[str, tuple[bytes, str]]
) -> None:
    good = [encoded(Image.new("RGB", (64, 64), colour), "PNG") for colour in ("red", "white")]
    alone = [client.rank(7, [data])[0] for data in good]
    media = [good[0], *(data for data, _ in refused.values()), good[1]]
    rows = {row.index: row for row in client.rank(7, media)}
    for index, expected in zip((0, len(media) - 1), alone, strict=True):
        assert rows[index].caption == expected.caption
        assert rows[index].score == pytest.approx(expected.score, abs=1e-4)
    for index, (name, (_, reason)) in enumerate(refused.items(), 1):
        assert (rows[index].score, rows[index].caption, rows[index].source) == (None, "", "rejected"), name
        assert reason in rows[index].error


def test_only_bad_media_come_back_each_with_its_reason(
    client: RankClient, refused: dict[str, tuple[bytes, str]]
) -> None:
    rows = client.rank(7, [data for data, _ in refused.values()])
    for row, (_, reason) in zip(rows, refused.values(), strict=True):
        assert row.source == "rejected"
        assert reason in row.error


def test_the_server_goes_on(client: RankClient, refused: dict[str, tuple[bytes, str]]) -> None:
    good = encoded(Image.new("RGB", (64, 64), "blue"), "PNG")
    before = client.rank(7, [good])[0]
    for data, _ in refused.values():
        assert client.rank(7, [data])[0].error
        after = client.rank(7, [again(good)])[0]
        assert (after.caption, after.source) == (before.caption, "model")
