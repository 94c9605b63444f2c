"""Real media files of every kind that tests need, good and bad."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image

COUNTER = itertools.count()
RNG = np.random.default_rng(7)
NOISE = RNG.integers(0, 256, (40, 56, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(format: str = "PNG", **options: object) -> bytes:
    return encoded(Image.fromarray(NOISE), format, **options)


def again(data: bytes) -> bytes:
    """The same picture (PNG, JPEG) or video (MP4) under another content hash, which nobody has captioned yet."""
    number = next(COUNTER).to_bytes(8, "big")
    return data + (b"\0\0\0\x10free" + number if data[4:8] == b"ftyp" else number)


def patchwork(count: int) -> list[bytes]:
    """Pictures of six random patches of colour each, no two alike."""
    patches = np.random.default_rng(3).integers(0, 256, (count, 2, 3, 3), dtype=np.uint8)
    return [encoded(Image.fromarray(one).resize((60, 40), Image.Resampling.NEAREST), "PNG") for one in patches]


def clip(
    path: Path,
    levels: list[int],
    size: tuple[int, int] = (64, 64),
    codec: str = "libx264",
    gop: int = 12,
    rotation: int = 0,
    movflags: str = "",
    bframes: int = 2,
    noise: bool = False,
) -> bytes:
    """A video whose frame i is grey of `levels[i]`, or noise; its left half is black if it is rotated."""
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(
            codec, rate=10, options={"bf": str(bframes)} if codec == "libx264" else {}
        )
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = "yuv420p", gop
        if rotation:
            stream.set_display_rotation(rotation)
        for level in levels:
            pixels = np.full((*size, 3), level, np.uint8)
            if rotation:
                pixels[:, : size[1] // 2] = 0
            if noise:
                pixels = RNG.integers(0, 256, pixels.shape, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path.read_bytes()


def audio_only(path: Path) -> bytes:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path.read_bytes()


def bomb_png(side: int = 20_000) -> bytes:
    """A valid 1-bit PNG of side x side in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
