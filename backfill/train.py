"""The query transform of an upgrade, from items of which both captioners have vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from backfill.job import Media, in_order
from sightline.content import Encoder
from sightline.errors import GalleryError, MediaError
from sightline.gallery import Gallery
from sightline.retrieval import read_views

__all__ = ["train_transform"]

_BATCH = 64


def train_transform(
    gallery: Gallery, encoder: Encoder, captioner: str, media: Media, out: Path, *, items: int = 20_000,
    epochs: int = 50, seed: int = 0, advance: Callable[[int], object] = lambda items: None,
) -> dict[str, Any]:  # fmt: skip
    """Embed a random part of the gallery by the new encoder, fit, and write `query.onnx` and `transform.json`.

    Args:
        captioner: the encoder's version.
        items: at most so many are embedded.

    Returns:
        The record in `transform.json`.

    Raises:
        GalleryError: the gallery has not one old version, or is of this captioner already.
    """
    from trainer.backfill.query import TransformConfig, train_query_transform

    views = read_views(gallery).views
    versions = [version.name for version in gallery.versions()]
    if captioner in views or len(versions) != 1:
        raise GalleryError(
            f"expected a gallery with one version, of another captioner than {captioner}; it has "
            f"{', '.join(versions) or 'none'}, for captioner {', '.join(views) or 'none'}"
        )
    (old,) = versions
    ids = in_order(gallery.ids(old), "random", seed)[:items]
    found: dict[int, np.ndarray[Any, Any]] = {}
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH].tolist()
        data = {item: one for item in some if (one := media[item]) is not None}
        for item, vector in zip(data, encoder(list(data.values())), strict=True):
            if not isinstance(vector, MediaError):
                found[item] = vector
        advance(len(some))
    before, there = gallery.get(np.array(list(found), np.int64), old)
    if not len(found):
        raise GalleryError(f"none of {len(ids)} items of {old} has media that can be embedded")
    new = np.stack(list(found.values()))[there]
    record = train_query_transform(before[there], new, None, out, config=TransformConfig(epochs=epochs, seed=seed))
    graph = onnx.load(out / "query.onnx")
    onnx.helper.set_model_props(graph, {"old": old, "captioner": captioner})  # which `begin` looks for
    onnx.save(graph, out / "query.onnx")
    return record
