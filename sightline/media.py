"""Media bytes → RGB frames → pixel tensor, the same way for the trainer and the server.

An image gives one frame; a video gives `MediaSpec.frames` frames, each from the middle of one of as many
equal parts. Whatever cannot be used is refused with a `MediaError` whose reason can be sent to the caller.
Limits are checked on what the file's header declares, before pixels are decoded.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sightline.errors import ConfigError, MediaError

__all__ = ["MediaSpec", "content_hash", "decode", "load", "preprocess", "resize", "sniff"]

# Pillow warns between its limit and twice its limit and raises above. Here both refuse, and MediaSpec's own
# limit is never above Pillow's, so that nothing depends on the process's warning filters at the call.
_PILLOW_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0
warnings.simplefilter("error", Image.DecompressionBombWarning)

if TYPE_CHECKING:
    VideoPacket = Packet[VideoStream]

_ACCEPTED = "JPEG, PNG, GIF, WebP or BMP images, MP4, MOV, WebM or Matroska videos"


class _Format(NamedTuple):
    kind: Literal["image", "video"]
    reader: str  # Pillow's format or FFmpeg's demuxer: naming it keeps every other parser away from the bytes
    label: str


@dataclass(frozen=True, kw_only=True)
class MediaSpec:
    """How media become pixels. Part of the captioner's contract: a release carries it with the weights."""

    size: tuple[int, int] = (224, 224)
    """Height and width of a preprocessed frame in pixels."""
    resize_shortest: int | None = None
    """Shortest edge after resizing, then a centre crop to `size` (CLIP); None resizes straight to `size`."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    resample: str = "bicubic"
    """Name of a Pillow resampling filter."""
    frames: int = 4
    """Frames sampled from a video."""
    max_bytes: int = 64 * 2**20
    max_pixels: int = 40_000_000
    """Largest width x height of an image or of a video's frame."""
    max_seconds: float = 600.0
    """Longest video."""
    max_decoded_pixels: int = 4_000_000_000
    """Most pixels that a video may make the decoder produce, frames between key frame and sample included:
    bounds the time spent on one video."""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ConfigError(f"size: expected (height, width) of at least 1, got {self.size}")
        if self.resize_shortest is not None and self.resize_shortest < max(self.size):
            raise ConfigError(
                f"resize_shortest: expected at least the crop's longer side {max(self.size)}, "
                f"got {self.resize_shortest}; padding after the crop is not supported"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ConfigError(
                f"mean and std: expected three numbers each, std above 0, got {self.mean}, {self.std}"
            )
        if self.resample.upper() not in Image.Resampling.__members__:
            names = ", ".join(name.lower() for name in Image.Resampling.__members__)
            raise ConfigError(f"resample: expected one of {names}, got {self.resample!r}")
        for name in ("frames", "max_bytes", "max_pixels", "max_seconds", "max_decoded_pixels"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        if self.max_pixels > _PILLOW_MAX_PIXELS:
            raise ConfigError(f"max_pixels: expected at most {_PILLOW_MAX_PIXELS}, got {self.max_pixels}")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> MediaSpec:
        """Read a captioner folder: CLIP's keys in `preprocessor_config.json` (or in `processor_config.json`,
        where newer transformers put them) and, if there, `video_frames` in `sightline.json`.

        Raises ConfigError where the folder asks for preprocessing that this module does not do.
        """
        folder = Path(folder)
        path, config = folder / "preprocessor_config.json", {}
        if path.exists():
            config = _read_json(path)
        elif (folder / "processor_config.json").exists():
            path = folder / "processor_config.json"
            config = _read_json(path).get("image_processor", {})
        if not config:
            raise ConfigError(f"{folder}: expected preprocessor_config.json of a CLIP image processor")
        try:
            values = _clip_values(config)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{path}: not a CLIP image processor's configuration: {error!r}") from error
        own = folder / "sightline.json"
        if own.exists():
            values["frames"] = _read_json(own).get("video_frames", cls.frames)
        return cls(**values)


def content_hash(data: bytes) -> str:
    """SHA-256 of the bytes in hexadecimal: the identity of a piece of media everywhere."""
    return hashlib.sha256(data).hexdigest()


def sniff(data: bytes) -> Literal["image", "video"]:
    """Kind of media by its first bytes. Raises MediaError for anything that is not accepted."""
    return _format(data).kind


def decode(data: bytes, spec: MediaSpec) -> list[Image.Image]:
    """Decode to RGB frames of their original size: 1 for an image, `spec.frames` for a video.

    Images: EXIF rotation is applied, alpha is composed over white, 16-bit greys keep their high byte, an
    animation gives its first frame. Videos: display rotation is applied; a video with fewer frames than
    samples repeats some. Raises MediaError with the reason for everything else.
    """
    found = _format(data)
    if len(data) > spec.max_bytes:
        raise MediaError(f"{len(data)} bytes are above the limit of {spec.max_bytes}")
    read = _decode_image if found.kind == "image" else _decode_video
    try:
        return read(data, found, spec)
    except MediaError:
        raise
    except UnidentifiedImageError as error:
        raise MediaError(f"damaged or truncated {found.label}: its header cannot be read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise MediaError(f"{found.label} has more pixels than the limit of {spec.max_pixels}") from error
    # On hostile bytes the decoders raise whatever their parsers ran into (struct.error, KeyError,
    # ZeroDivisionError, …). One bad file must never be more than one refusal.
    except Exception as error:
        detail = " ".join(str(error).split())[:120]
        raise MediaError(f"damaged or truncated {found.label}: {type(error).__name__}: {detail}") from error


def preprocess(frames: list[Image.Image], spec: MediaSpec) -> npt.NDArray[np.float32]:
    """Resize, crop and normalise RGB frames to FP32 [n, 3, H, W] in CLIP's way."""
    if not frames:
        raise ValueError("this is a bug: preprocess() needs at least one frame")
    mean, std = (
        np.asarray(values, np.float32)[:, None, None] for values in (spec.mean, spec.std)
    )  # [3, 1, 1]
    pixels = np.empty((len(frames), 3, *spec.size), np.float32)
    for row, frame in zip(pixels, frames, strict=True):
        row[:] = np.asarray(_resize(frame, spec)).transpose(2, 0, 1)
    pixels *= np.float32(1 / 255) / std
    pixels -= mean / std
    return pixels


def resize(frames: list[Image.Image], spec: MediaSpec) -> npt.NDArray[np.uint8]:
    """Resize and crop RGB frames to uint8 [n, H, W, 3]: `preprocess` without its normalisation."""
    return np.stack([np.asarray(_resize(frame, spec)) for frame in frames])


def load(data: bytes, spec: MediaSpec) -> npt.NDArray[np.float32]:
    """`decode` then `preprocess`: bytes → FP32 [1 or spec.frames, 3, H, W]."""
    return preprocess(decode(data, spec), spec)


def _format(data: bytes) -> _Format:
    if not data:
        raise MediaError("empty: 0 bytes")
    if data.startswith(b"\xff\xd8\xff"):
        return _Format("image", "JPEG", "JPEG")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _Format("image", "PNG", "PNG")
    if data.startswith((b"GIF87a", b"GIF89a")):
        return _Format("image", "GIF", "GIF")
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _Format("image", "WEBP", "WebP")
    if data.startswith(b"BM"):
        return _Format("image", "BMP", "BMP")
    if data.startswith(b"\x1a\x45\xdf\xa3"):
        return _Format("video", "matroska", "WebM/Matroska video")
    if data[4:8] == b"ftyp" and data[8:12] not in (b"heic", b"heix", b"mif1", b"msf1", b"avif", b"avis"):
        return _Format("video", "mp4", "MP4 video")
    raise MediaError(f"neither image nor video: starts with {data[:8]!r}; expected {_ACCEPTED}")


def _decode_image(data: bytes, found: _Format, spec: MediaSpec) -> list[Image.Image]:
    with Image.open(io.BytesIO(data), formats=[found.reader]) as image:
        _check_size(image.width, image.height, found, spec)
        image.load()
        upright = ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image
        return [_to_rgb(upright)]


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion clips at 255 instead of scaling
        high = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", rgba.size, "white")
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def _decode_video(data: bytes, found: _Format, spec: MediaSpec) -> list[Image.Image]:
    """Reads all packets (cheap), then decodes only from the key frames before the sampled ones.

    Handing the packets to the decoder ourselves, instead of seeking in the container, makes the result
    independent of the container's index. A WebM that was cut off is sampled from the frames that are whole.
    """
    limits = {"max_pixels": str(spec.max_pixels), "threads": "1"}
    with av.open(io.BytesIO(data), mode="r", format=found.reader, options=limits) as container:
        if not container.streams:
            raise MediaError(f"damaged or truncated {found.label}: no streams in it")
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos:
            raise MediaError(f"{found.label} has no video stream")
        stream = videos[0]
        context: VideoCodecContext | None = stream.codec_context
        if context is None:
            raise MediaError(f"{found.label} has a codec that cannot be decoded")
        context.thread_count = 1  # clips are short and the server's parallelism is across requests
        _check_size(context.width, context.height, found, spec)
        if container.duration is not None and container.duration / av.time_base > spec.max_seconds:
            raise MediaError(f"{found.label} is longer than the limit of {spec.max_seconds:g} s")

        packets = [packet for packet in container.demux(stream) if packet.pts is not None and packet.size]
        if any(packet.is_corrupt for packet in packets):
            raise MediaError(f"truncated {found.label}: a frame's data ends early")
        shown = sorted(packet.pts or 0 for packet in packets if not packet.is_discard)
        if not shown:
            raise MediaError(f"damaged or truncated {found.label}: no frame in it")
        samples = [shown[(2 * i + 1) * len(shown) // (2 * spec.frames)] for i in range(spec.frames)]
        runs = _runs(packets, samples)
        work = sum(last + 1 - first for first, last, _ in runs) * context.width * context.height
        if work > spec.max_decoded_pixels:
            raise MediaError(
                f"{found.label} is too expensive: {work} pixels would be decoded for {spec.frames} samples, "
                f"the limit is {spec.max_decoded_pixels}; send a shorter or smaller video"
            )
        return [
            image
            for first, last, times in runs
            for image in _decode_run(context, packets[first : last + 1], times)
        ]


def _runs(packets: list[VideoPacket], samples: list[int]) -> list[tuple[int, int, list[int]]]:
    """Which packets to decode for the samples (ascending timestamps): (first, last, samples) per run.

    A run starts at the last key frame that comes before its samples both in decoding and in display order:
    pictures that follow a key frame but are shown before it may refer to what came earlier.
    """
    position = {packet.pts: index for index, packet in enumerate(packets)}
    keys = [(index, packet.pts or 0) for index, packet in enumerate(packets) if packet.is_keyframe]
    runs: list[tuple[int, int, list[int]]] = []
    for sample in samples:
        last = position[sample]
        first = max((index for index, pts in keys if index <= last and pts <= sample), default=0)
        if runs and runs[-1][0] == first:
            _, last_before, times = runs.pop()
            runs.append((first, max(last, last_before), [*times, sample]))
        else:
            runs.append((first, last, [sample]))
    return runs


def _decode_run(
    context: VideoCodecContext, packets: list[VideoPacket], samples: list[int]
) -> list[Image.Image]:
    """The frame on display at each of the ascending timestamps: the last one that starts at or before it.

    A packet that shows nothing by itself (a hidden reference frame of VP8) so stands for the frame before it.
    """
    context.flush_buffers()
    images: list[Image.Image] = []
    shown: VideoFrame | None = None
    for packet in (*packets, None):
        for frame in context.decode(packet):
            shown = shown or frame
            while len(images) < len(samples) and (frame.pts or 0) > samples[len(images)]:
                images.append(_frame_image(shown))
            shown = frame
    if shown is None:
        raise MediaError("damaged video: no frame could be decoded")
    return images + [_frame_image(shown)] * (len(samples) - len(images))


def _frame_image(frame: VideoFrame) -> Image.Image:
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _check_size(width: int, height: int, found: _Format, spec: MediaSpec) -> None:
    if width < 1 or height < 1:
        raise MediaError(f"damaged {found.label}: its header declares no size")
    if width * height > spec.max_pixels:
        raise MediaError(
            f"{found.label} of {width} x {height} has more pixels than the limit of {spec.max_pixels}"
        )


def _resize(frame: Image.Image, spec: MediaSpec) -> Image.Image:
    height, width = spec.size
    filter = Image.Resampling[spec.resample.upper()]
    if spec.resize_shortest is None:
        return frame.resize((width, height), filter)
    # CLIP resizes, then crops. Resizing only the box that survives the crop gives the same pixels and cannot
    # be made to allocate a huge intermediate by a 1 x 100000 image.
    shortest = min(frame.size)
    resized = [int(spec.resize_shortest * edge / shortest) for edge in frame.size]
    left, top = (resized[0] - width) // 2, (resized[1] - height) // 2
    scale_x, scale_y = frame.width / resized[0], frame.height / resized[1]
    box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    return frame.resize((width, height), filter, box=box)


def _clip_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of a CLIPImageProcessor → fields of MediaSpec."""
    if not str(config.get("image_processor_type", "CLIPImageProcessor")).startswith("CLIPImageProcessor"):
        raise ValueError(f"image_processor_type {config['image_processor_type']!r} is not CLIPImageProcessor")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not config.get(key, True):
            raise ValueError(f"{key} false is not supported")
    if not np.isclose(config.get("rescale_factor", 1 / 255), 1 / 255):
        raise ValueError(f"rescale_factor {config['rescale_factor']} is not 1/255")
    size, crop = config["size"], config.get("crop_size")
    if isinstance(size, int):
        size = {"shortest_edge": size}
    values: dict[str, Any] = {
        "mean": tuple(config["image_mean"]),
        "std": tuple(config["image_std"]),
        "resample": Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)).name.lower(),
    }
    if "shortest_edge" in size:
        if not config.get("do_center_crop", True):
            raise ValueError("shortest_edge without do_center_crop gives frames of changing size")
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop or {}
        return values | {
            "size": (crop["height"], crop["width"]),
            "resize_shortest": size["shortest_edge"],
        }
    return values | {"size": (size["height"], size["width"])}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected a JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
