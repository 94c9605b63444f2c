"""Attributes → pixels: PNG images and short MP4 videos.

Shapes are outlines in the unit square, drawn at `OVERSAMPLE` times the size and reduced, so that edges are
smooth. Position, tilt, shade, background texture and light vary from item to item; the attributes do not.
"""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
from PIL import Image, ImageDraw

from catalogue.attributes import Attributes

SIZE = 72  # pixels, both sides
FPS = 8
FRAMES = 8
OVERSAMPLE = 3

Rng = np.random.Generator
Point = tuple[float, float]

PALETTE = {
    "red": (205, 35, 40), "orange": (245, 135, 20), "yellow": (245, 220, 50), "green": (40, 150, 60),
    "blue": (40, 85, 205), "purple": (135, 50, 165), "black": (38, 38, 42), "white": (238, 238, 236),
}  # fmt: skip
# What a pattern is drawn with; white where nothing else is said. Black and white keep their distance.
INK = {"yellow": (25, 25, 30), "white": (70, 74, 84), "black": (190, 190, 195)}
GROUND = {
    "on grass": (126, 158, 96), "on wood": (164, 120, 78), "on sand": (216, 196, 150),
    "on snow": (222, 230, 238), "on brick": (158, 100, 88), "at night": (28, 34, 66),
}  # fmt: skip


def _background(setting: str, rng: Rng, size: int) -> np.ndarray:
    """A textured ground. Returns uint8 [size, size, 3]."""
    base = np.array(GROUND[setting], dtype=np.float32) * rng.uniform(0.92, 1.08)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    phase = rng.uniform(0, 1)
    match setting:
        case "on grass":
            shade = 18 * np.sin(60 * (x + 0.15 * np.sin(9 * y + phase))) * rng.uniform(0.6, 1, (size, 1))
        case "on wood":
            shade = 14 * np.sin(9 * x + 3 * np.sin(4 * y + 6 * phase)) - 40 * ((y * 4 + phase) % 1 < 0.06)
        case "on sand":
            shade = rng.normal(0, 9, (size, size))
        case "on snow":
            shade = 6 * np.sin(5 * (x + y) + 6 * phase) + rng.normal(0, 2, (size, size))
        case "on brick":
            row = np.floor(y * 7 + phase)
            mortar = ((y * 7 + phase) % 1 < 0.14) | ((x * 4 + 0.5 * (row % 2) + phase) % 1 < 0.08)
            shade = 45 * mortar + 6 * np.sin(31 * row + 5 * np.floor(x * 4 + 0.5 * (row % 2)))
        case _:
            shade = 190 * (rng.uniform(0, 1, (size, size)) > 0.992) + 10 * (1 - y)
    return np.clip(base + np.asarray(shade, dtype=np.float32)[..., None], 0, 255).astype(np.uint8)


def _ellipse(cx: float, cy: float, rx: float, ry: float, start: float = 0, stop: float = 360) -> list[Point]:
    angle = np.radians(np.linspace(start, stop, 40))
    return [(float(cx + rx * np.cos(a)), float(cy + ry * np.sin(a))) for a in angle]


def _ring(cx: float, cy: float, rx: float, ry: float, width: float, start: float, stop: float) -> list[Point]:
    outer = _ellipse(cx, cy, rx, ry, start, stop)
    return outer + _ellipse(cx, cy, rx - width, ry - width, stop, start)


# Each object is a list of polygons in the unit square; y points down.
SHAPES: dict[str, list[list[Point]]] = {
    "ball": [_ellipse(0.5, 0.5, 0.46, 0.46)],
    "bag": [
        [(0.06, 0.36), (0.94, 0.36), (1.0, 0.98), (0.0, 0.98)],
        _ring(0.5, 0.38, 0.26, 0.34, 0.09, 180, 360),
    ],
    "book": [
        [(0.0, 0.2), (0.48, 0.32), (0.48, 0.92), (0.0, 0.8)],
        [(1.0, 0.2), (0.52, 0.32), (0.52, 0.92), (1.0, 0.8)],
    ],
    "bottle": [
        [(0.42, 0.0), (0.58, 0.0), (0.58, 0.3), (0.72, 0.45), (0.72, 1.0), (0.28, 1.0), (0.28, 0.45), (0.42, 0.3)]
    ],
    "chair": [
        [(0.1, 0.0), (0.32, 0.0), (0.32, 0.42), (0.92, 0.42), (0.92, 1.0), (0.72, 1.0), (0.72, 0.68), (0.3, 0.68),
         (0.3, 1.0), (0.1, 1.0)]
    ],
    "clock": [
        _ring(0.5, 0.5, 0.48, 0.48, 0.18, 0, 360),
        [(0.46, 0.24), (0.54, 0.24), (0.54, 0.47), (0.76, 0.47), (0.76, 0.55), (0.46, 0.55)],
    ],
    "lamp": [
        [(0.3, 0.0), (0.7, 0.0), (0.98, 0.48), (0.02, 0.48)],
        [(0.45, 0.48), (0.55, 0.48), (0.55, 0.88), (0.8, 0.88), (0.8, 1.0), (0.2, 1.0), (0.2, 0.88), (0.45, 0.88)],
    ],
    "mug": [
        [(0.06, 0.12), (0.68, 0.12), (0.68, 0.94), (0.06, 0.94)],
        _ring(0.68, 0.5, 0.3, 0.28, 0.11, -90, 90),
    ],
    "shirt": [
        [(0.28, 0.06), (0.42, 0.16), (0.58, 0.16), (0.72, 0.06), (1.0, 0.3), (0.88, 0.48), (0.76, 0.38),
         (0.76, 0.98), (0.24, 0.98), (0.24, 0.38), (0.12, 0.48), (0.0, 0.3)]
    ],
    "shoe": [
        [(0.02, 0.2), (0.34, 0.2), (0.44, 0.46), (0.86, 0.56), (1.0, 0.72), (1.0, 0.84), (0.02, 0.84)]
    ],
}  # fmt: skip


def _surface(attributes: Attributes, rng: Rng, size: int) -> np.ndarray:
    """The object's material over the whole canvas. Returns uint8 [size, size, 3]."""
    base = np.clip(np.array(PALETTE[attributes.colour]) * rng.uniform(0.9, 1.1) + rng.normal(0, 6, 3), 0, 255)
    second = np.array(INK.get(attributes.colour, (245, 245, 240)))
    y, x = np.mgrid[0:size, 0:size] / (size / SIZE)  # in output pixels
    period = rng.uniform(7, 8.5)
    u, v = (x + rng.uniform(0, period)) / period, (y + rng.uniform(0, period)) / period
    match attributes.pattern:
        case "striped":
            ink = (u + 0.5 * v) % 1 < 0.34
        case "dotted":
            ink = ((u % 1) - 0.5) ** 2 + ((v % 1) - 0.5) ** 2 < 0.09
        case _:
            ink = np.zeros((size, size), dtype=bool)
    return np.where(ink[..., None], second, base).astype(np.uint8)


def _place(attributes: Attributes, rng: Rng) -> list[tuple[float, float, float, float]]:
    """(centre x, centre y, side, tilt in degrees) of each copy, in parts of the canvas."""
    count = {"single": 1, "set of two": 2, "set of three": 3}[attributes.count]
    large = {1: 0.74, 2: 0.45, 3: 0.43}[count]
    small = {1: 0.48, 2: 0.33, 3: 0.32}[count]
    side = (large if attributes.size == "large" else small) * rng.uniform(0.95, 1.05)
    middle = 0.5 + rng.uniform(-0.03, 0.03, 2)
    tilt = rng.uniform(-6, 6)
    if count == 1:
        return [(float(middle[0]), float(middle[1]), side, tilt)]
    offsets = [(-0.54, 0.0), (0.54, 0.0)] if count == 2 else [(-0.54, 0.5), (0.54, 0.5), (0.0, -0.5)]
    return [(float(middle[0] + dx * side), float(middle[1] + dy * side), side, tilt) for dx, dy in offsets]


def _moved(attributes: Attributes, phase: float) -> tuple[float, float, float]:
    """(dx, dy, scale) at `phase` in [-1, 1] of a video."""
    reach = 0.2 * phase
    return {
        None: (0.0, 0.0, 1.0),
        "moving left": (-reach, 0.0, 1.0),
        "moving right": (reach, 0.0, 1.0),
        "rising": (0.0, -reach, 1.0),
        "falling": (0.0, reach, 1.0),
        "growing": (0.0, 0.0, 1.0 + 0.3 * phase),
    }[attributes.motion]


def _frames(attributes: Attributes, rng: Rng, phases: list[float]) -> list[Image.Image]:
    big = SIZE * OVERSAMPLE
    ground = Image.fromarray(_background(attributes.setting, rng, SIZE))
    surface = Image.fromarray(_surface(attributes, rng, SIZE))
    outline = (235, 235, 235) if attributes.colour == "black" else (20, 20, 24)
    copies = _place(attributes, rng)
    frames = []
    for phase in phases:
        dx, dy, scale = _moved(attributes, phase)
        body, edge = Image.new("L", (big, big)), Image.new("L", (big, big))
        for cx, cy, side, tilt in copies:
            # Growing scales the whole arrangement about the centre of the picture.
            cx, cy = 0.5 + (cx + dx - 0.5) * scale, 0.5 + (cy + dy - 0.5) * scale
            cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
            for polygon in SHAPES[attributes.object]:
                around = (np.array(polygon) - 0.5) * side * scale
                turned = around @ np.array([[cos, sin], [-sin, cos]]) + (cx, cy)
                points = [(float(px), float(py)) for px, py in turned * big]
                ImageDraw.Draw(body).polygon(points, fill=255)
                ImageDraw.Draw(edge).line([*points, points[0]], fill=255, width=2 * OVERSAMPLE)
        frame = ground.copy()
        frame.paste(surface, mask=body.resize((SIZE, SIZE), Image.Resampling.BOX))
        frame.paste(outline, mask=edge.resize((SIZE, SIZE), Image.Resampling.BOX))
        frames.append(frame)
    return frames


def render_image(attributes: Attributes, rng: Rng) -> bytes:
    """One PNG of SIZE × SIZE pixels."""
    out = io.BytesIO()
    _frames(attributes, rng, [0.0])[0].save(out, "PNG", compress_level=1)
    return out.getvalue()


def render_video(attributes: Attributes, rng: Rng) -> bytes:
    """One MP4 (H.264) of FRAMES frames at FPS frames per second."""
    pictures = _frames(attributes, rng, [float(p) for p in np.linspace(-1, 1, FRAMES)])
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        options = {"crf": "20", "preset": "ultrafast", "threads": "1"}
        stream: Any = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return out.getvalue()


def render(attributes: Attributes, rng: Rng) -> bytes:
    """Media bytes: a video if the attributes have a motion, else an image."""
    return render_video(attributes, rng) if attributes.motion else render_image(attributes, rng)
