"""Media: real files of every awkward kind through `decode`, and parity of `preprocess` with transformers."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sightline.errors import ConfigError, MediaError
from sightline.media import MediaSpec, content_hash, decode, load, preprocess, sniff
from tests.media_files import NOISE, RNG, audio_only, bomb_png, clip, encoded, picture

SPEC = MediaSpec(size=(32, 32))


def levels_of(frames: list[Image.Image]) -> list[int]:
    return [round(float(np.asarray(frame).mean())) for frame in frames]


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "tolerance"), [("PNG", 0), ("BMP", 0), ("GIF", 255), ("JPEG", 255), ("WEBP", 255)]
)
def test_each_image_format_gives_one_rgb_frame(format: str, tolerance: int) -> None:
    data = picture(format)
    [frame] = decode(data, SPEC)
    assert sniff(data) == "image"
    assert frame.mode == "RGB"
    assert frame.size == (56, 40)
    assert np.abs(np.asarray(frame).astype(int) - NOISE).max() <= tolerance


def test_lossless_webp_is_exact() -> None:
    [frame] = decode(picture("WEBP", lossless=True), SPEC)
    assert np.array_equal(np.asarray(frame), NOISE)


def test_cmyk_jpeg_keeps_its_colours() -> None:
    red = Image.new("RGB", (48, 48), (200, 30, 30))
    [frame] = decode(encoded(red.convert("CMYK"), "JPEG", quality=95), SPEC)
    assert frame.mode == "RGB"
    assert np.abs(np.asarray(frame).astype(int) - (200, 30, 30)).max() <= 4


def test_sixteen_bit_png_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    [frame] = decode(encoded(Image.fromarray(ramp), "PNG"), SPEC)
    assert np.array_equal(np.asarray(frame), np.repeat((ramp >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_bilevel(mode: str) -> None:
    [frame] = decode(encoded(Image.new(mode, (9, 9), 1 if mode == "1" else 255), "PNG"), SPEC)
    assert frame.getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composed_over_white(mode: str) -> None:
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 4, 8))
    data = encoded(half.convert(mode), "PNG")
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == mode
    [frame] = decode(data, SPEC)
    assert frame.getpixel((0, 0)) == (255, 255, 255)
    assert frame.getpixel((7, 7)) == (0, 0, 0)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_animation_gives_its_first_frame(format: str) -> None:
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = encoded(red, format, save_all=True, append_images=[blue, blue], duration=100)
    [frame] = decode(data, SPEC)
    assert np.abs(np.asarray(frame).astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_applied(format: str) -> None:
    image = Image.new("RGB", (64, 32), "white")
    image.paste((0, 0, 0), (0, 0, 32, 32))  # left half black
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated 90° clockwise, left becomes top
    [frame] = decode(encoded(image, format, exif=exif), SPEC)
    assert frame.size == (32, 64)
    assert max(frame.getpixel((16, 8))) < 20
    assert min(frame.getpixel((16, 56))) > 235


def test_one_by_one_pixel_is_handled() -> None:
    assert load(encoded(Image.new("RGB", (1, 1), "red"), "PNG"), SPEC).shape == (1, 3, 32, 32)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.9])
def test_truncated_image_is_refused(format: str, keep: float) -> None:
    data = picture(format)
    with pytest.raises(MediaError, match=r"truncated|damaged"):
        decode(data[: max(12, int(len(data) * keep))], SPEC)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty: 0 bytes"),
        (b"just some text, not a picture", "neither image nor video"),
        (b"%PDF-1.7\n1 0 obj\n<<>>\nendobj", "neither image nor video"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "neither image nor video"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "neither image nor video"),
    ],
)
def test_wrong_type_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(MediaError, match=reason) as caught:
        decode(data, SPEC)
    assert "\n" not in caught.value.reason
    with pytest.raises(MediaError):
        sniff(data)


def test_bomb_is_refused_without_decoding_pixels() -> None:
    data = bomb_png()
    assert len(data) < 100_000
    gc.collect()
    tracemalloc.start()
    try:
        with pytest.raises(MediaError, match="more pixels than the limit"):
            decode(data, SPEC)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    # A body that cannot be decoded is refused for its size too: nobody looked at the body.
    with pytest.raises(MediaError, match="more pixels than the limit"):
        decode(data[:60] + b"garbage", SPEC)


@pytest.mark.parametrize("side", [9_000, 12_000, 20_000])
def test_every_size_above_the_limit_is_refused(side: int) -> None:
    """9000² is between our limit and Pillow's, 12000² in its warning range, 20000² above that."""
    with pytest.raises(MediaError, match="limit of 40000000"):
        decode(bomb_png(side), SPEC)


def test_byte_limit() -> None:
    with pytest.raises(MediaError, match="above the limit of 100"):
        decode(picture(), MediaSpec(max_bytes=100))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([picture(f) for f in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]))
    damaged = bytearray(whole)
    for at, value in data.draw(
        st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=6)
    ):
        damaged[at] = value
    try:
        frames = decode(bytes(damaged), SPEC)
    except MediaError:
        return
    assert [frame.mode for frame in frames] == ["RGB"]


# --- videos ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "codec"),
    [("v.mp4", "libx264"), ("v.mov", "mpeg4"), ("v.webm", "libvpx"), ("v.mkv", "libvpx-vp9")],
)
def test_frames_are_sampled_from_the_middle_of_equal_parts(tmp_path: Path, name: str, codec: str) -> None:
    data = clip(tmp_path / name, [20, 60, 100, 140, 180, 220, 120, 80], codec=codec)
    frames = decode(data, SPEC)
    assert sniff(data) == "video"
    assert [frame.size for frame in frames] == [(64, 64)] * 4
    for got, expected in zip(levels_of(frames), [60, 140, 220, 80], strict=True):
        assert abs(got - expected) <= 4


@pytest.mark.parametrize("gop", [1, 5, 100])
@pytest.mark.parametrize("bframes", [0, 3])
def test_sampling_equals_a_full_decode(tmp_path: Path, gop: int, bframes: int) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 47, gop=gop, bframes=bframes, noise=True)
    with av.open(io.BytesIO(data)) as container:
        every = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    for count in (1, 3, 4, 47):
        frames = decode(data, MediaSpec(frames=count))
        expected = [every[(2 * i + 1) * 47 // (2 * count)] for i in range(count)]
        assert all(np.array_equal(np.asarray(a), b) for a, b in zip(frames, expected, strict=True))


def test_sampling_is_deterministic(tmp_path: Path) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 20, noise=True)
    assert np.array_equal(load(data, SPEC), load(data, SPEC))


def test_video_shorter_than_the_samples_repeats_its_frame(tmp_path: Path) -> None:
    frames = decode(clip(tmp_path / "v.mp4", [90]), SPEC)
    assert len(frames) == 4
    assert len({frame.tobytes() for frame in frames}) == 1


def test_display_rotation_is_applied(tmp_path: Path) -> None:
    turned = clip(tmp_path / "v.mp4", [255], size=(32, 64), rotation=90)  # left half black
    frame = decode(turned, SPEC)[0]
    assert frame.size == (32, 64)
    # A display rotation of 90° is counter-clockwise: what was left is at the bottom.
    assert max(frame.getpixel((16, 56))) < 30
    assert min(frame.getpixel((16, 8))) > 225


def test_audio_only_mp4_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no video stream"):
        decode(audio_only(tmp_path / "a.mp4"), SPEC)


def test_unknown_codec_is_refused(tmp_path: Path) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 8)
    with pytest.raises(MediaError, match="a codec that cannot be decoded"):
        decode(data.replace(b"avc1", b"zzz1"), SPEC)


@pytest.mark.parametrize("movflags", ["", "faststart", "frag_keyframe+empty_moov"])
def test_truncated_mp4_is_refused(tmp_path: Path, movflags: str) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 20, movflags=movflags, noise=True)
    for keep in (0.01, 0.3, 0.7):
        with pytest.raises(MediaError, match="truncated"):
            decode(data[: int(len(data) * keep)], SPEC)


def test_truncated_webm_uses_the_frames_that_are_whole(tmp_path: Path) -> None:
    data = clip(tmp_path / "v.webm", [120] * 20, codec="libvpx")
    assert levels_of(decode(data[: len(data) * 2 // 3], SPEC)) == levels_of(decode(data, SPEC))
    with pytest.raises(MediaError, match="damaged or truncated"):
        decode(data[:100], SPEC)


def test_huge_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="8192 x 8192 has more pixels than the limit"):
        decode(clip(tmp_path / "v.mp4", [128], size=(8192, 8192)), SPEC)


def test_long_videos_are_refused(tmp_path: Path) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 30)
    with pytest.raises(MediaError, match="longer than the limit of 2 s"):
        decode(data, MediaSpec(max_seconds=2))


def test_decoding_work_is_bounded_by_what_the_samples_need(tmp_path: Path) -> None:
    frame = 64 * 64
    sparse = clip(tmp_path / "sparse.mp4", [0] * 40, gop=40, noise=True)
    dense = clip(tmp_path / "dense.mp4", [0] * 40, gop=1, noise=True)
    budget = MediaSpec(max_decoded_pixels=10 * frame)
    assert len(decode(dense, budget)) == 4  # every frame is a key frame: 4 decoded
    with pytest.raises(MediaError, match="too expensive"):
        decode(sparse, budget)  # one key frame: everything up to the last sample


def test_damaged_video_never_raises_anything_else(tmp_path: Path) -> None:
    data = clip(tmp_path / "v.mp4", [0] * 12, noise=True)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(60):
        damaged = np.frombuffer(data, np.uint8).copy()
        damaged[rng.integers(12, len(data), 40)] = rng.integers(0, 256, 40)
        try:
            assert len(decode(damaged.tobytes(), SPEC)) == 4
        except MediaError:
            refused += 1
    assert refused > 0


# --- preprocessing --------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (40, 56), (300, 97), (33, 500), (17, 16)])
@pytest.mark.parametrize("resample", [2, 3])
def test_preprocessing_equals_transformers_clip(
    tmp_path: Path, shape: tuple[int, int], resample: int
) -> None:
    """Resizing only the crop's box may round a pixel the other way: at most 1 of 255 levels, rarely."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}, resample=resample
    )
    processor.save_pretrained(tmp_path)
    spec = MediaSpec.from_pretrained(tmp_path)
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    expected = np.asarray(processor(image)["pixel_values"])
    got = preprocess([image], spec)
    assert got.dtype == np.float32
    assert got.shape == expected.shape == (1, 3, 48, 48)
    difference = np.abs(got - expected)
    assert difference.max() <= 1.01 / 255 / min(spec.std)
    assert np.mean(difference > 1e-5) < 0.01


def test_straight_resize_equals_transformers_clip(tmp_path: Path) -> None:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil(size={"height": 32, "width": 48}, do_center_crop=False)
    processor.save_pretrained(tmp_path)
    image = Image.fromarray(NOISE)
    got = preprocess([image], MediaSpec.from_pretrained(tmp_path))
    np.testing.assert_allclose(got, np.asarray(processor(image)["pixel_values"]), atol=1e-5)


def test_batch_equals_single() -> None:
    spec = MediaSpec(size=(24, 24), resize_shortest=24)
    frames = [
        Image.fromarray(RNG.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for h, w in ((30, 40), (24, 24), (90, 25))
    ]
    assert np.array_equal(preprocess(frames, spec), np.concatenate([preprocess([f], spec) for f in frames]))


def test_extreme_aspect_ratio_allocates_no_intermediate() -> None:
    strip = Image.new("RGB", (100_000, 1), (10, 200, 30))
    spec = MediaSpec(size=(64, 64), resize_shortest=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    pixels = preprocess([strip], spec)[0]
    np.testing.assert_allclose(pixels[:, 32, 32], np.array([10, 200, 30]) / 255, atol=1e-6)


def test_content_hash_is_sha256() -> None:
    assert content_hash(b"abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- MediaSpec ------------------------------------------------------------------------------------

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 64},
    "crop_size": {"height": 64, "width": 64},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
    "resample": 3,
    "rescale_factor": 1 / 255,
}


def write_json(folder: Path, **files: object) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


@pytest.mark.parametrize("wrapped", [False, True])
def test_spec_from_pretrained(tmp_path: Path, wrapped: bool) -> None:
    if wrapped:
        write_json(tmp_path, processor_config={"image_processor": CLIP})
    else:
        write_json(tmp_path, preprocessor_config=CLIP, sightline={"video_frames": 7})
    spec = MediaSpec.from_pretrained(tmp_path)
    assert (spec.size, spec.resize_shortest, spec.mean, spec.resample) == (
        (64, 64),
        64,
        (0.5, 0.5, 0.5),
        "bicubic",
    )
    assert spec.frames == (4 if wrapped else 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "PixtralImageProcessor"),
        ({"do_resize": False}, "do_resize"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"do_center_crop": False}, "do_center_crop"),
        ({"crop_size": None}, "height"),
        ({"size": {"shortest_edge": 32}}, "resize_shortest"),
    ],
)
def test_unsupported_preprocessing_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        MediaSpec.from_pretrained(write_json(tmp_path, preprocessor_config=CLIP | change))


def test_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected preprocessor_config\.json"):
        MediaSpec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [{"size": (0, 4)}, {"resample": "cubic"}, {"frames": 0}, {"max_pixels": 10**9}, {"std": (1.0, 0.0, 1.0)}],
)
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        MediaSpec(**wrong)
