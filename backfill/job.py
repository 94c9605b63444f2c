"""The backfill itself: items in the chosen order, their media through the new encoder, into the new version.

What is left to do is what queries still see in the old version: the gallery is the checkpoint. A job may be killed at
any moment, started again, run twice at once; an item moves once, and one that was changed or deleted meanwhile is left
alone.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backfill.upgrade import FAILED, Order, Upgrade, read_upgrade, write_upgrade
from sightline.content import Encoder, unit
from sightline.errors import ConfigError, DataError, GalleryError, MediaError, ServingError
from sightline.gallery import Gallery, GalleryVersion
from sightline.metrics import Metrics
from sightline.retrieval import VIEWS, Transform, View, Views, read_views

__all__ = ["Estimate", "Media", "Writer", "backfill", "estimate", "fill", "in_order"]

Media = Mapping[int, bytes | None]
"""Item → its image or video, None where it has none; KeyError or DataError where there is no such item."""
Pace = Callable[[float], None]
"""Hears how many seconds a batch kept the encoder busy, and waits for as long as it should rest."""
_MOST_REASONS = 1000  # of items that failed, that are kept
_LONGEST = 30.0  # seconds of a wait for the encoder

_log = logging.getLogger(__name__)


class Writer:
    """Embeds items into the version of a gallery that a captioner writes to.

    Raises GalleryError where the gallery has no view for the captioner.
    """

    def __init__(self, gallery: Gallery, encoder: Encoder, captioner: str) -> None:
        self.gallery, self._encoder = gallery, encoder
        view = read_views(gallery).views.get(captioner)
        if view is None:
            raise GalleryError(f"the gallery knows no captioner {captioner}: fill it, or begin an upgrade to it")
        self.version = next(version for version, space in view.versions.items() if space != "old")
        graph = gallery.get_state(view.transform) if view.transform else None
        self._transform = Transform(graph) if graph is not None else None

    def __call__(
        self, ids: Sequence[int], media: Sequence[bytes | None], *, replace: bool = False, since: int | None = None
    ) -> tuple[NDArray[np.bool_], dict[int, str]]:
        """Embed and write items.

        Args:
            ids: items, each once.
            media: theirs.
            replace, since: as in `Gallery.put`.

        Returns:
            bool [N], the items that were written; item → why its media cannot be used.
        """
        found: list[Any] = [MediaError("it has no media")] * len(ids)
        there = [row for row, data in enumerate(media) if data is not None]
        for row, one in zip(there, self._encoder([media[row] or b"" for row in there]), strict=True):
            found[row] = one
        failed = {item: one.reason for item, one in zip(ids, found, strict=True) if isinstance(one, MediaError)}
        rows = [row for row, one in enumerate(found) if not isinstance(one, MediaError)]
        written = np.zeros(len(ids), bool)
        if rows:
            vectors = np.stack([found[row] for row in rows])
            vectors = unit(self._transform(vectors)["new"]) if self._transform else vectors
            chosen = np.array([ids[row] for row in rows], np.int64)
            written[rows] = self.gallery.put(
                chosen, {self.version: vectors}, self.version, replace=replace, since=since
            )
        return written, failed


def fill(
    gallery: Gallery, encoder: Encoder, captioner: str, width: int, media: Media, ids: NDArray[np.int64], *,
    index: str = "flat", batch: int = 64, advance: Callable[[int], object] = lambda items: None,
) -> dict[int, str]:  # fmt: skip
    """Embed items that the gallery does not have yet, or has under another captioner alone.

    The first call of a gallery makes its first version, which has the captioner's name.

    Args:
        width: of the encoder's vectors.
        ids: items int64 [N].
        advance: hears how many items are done, first of those that were there.

    Returns:
        Item → why it could not be embedded.
    """
    if captioner not in (views := read_views(gallery).views):
        if views:
            raise GalleryError(
                f"the gallery has vectors of captioner {', '.join(views)}; bring {captioner} in with "
                "`sightline backfill begin`"
            )
        gallery.create(GalleryVersion(name=captioner[:64], dimension=width, index=index))  # type: ignore[arg-type]
        view = Views(views={captioner: View(versions={captioner[:64]: "vector"})})
        gallery.put_state(VIEWS, view.model_dump_json().encode())
    write = Writer(gallery, encoder, captioner)
    others = set(read_views(gallery).views[captioner].versions) - {write.version}
    seen = gallery.seen(ids)
    todo = ids[[at is None or (at != write.version and at not in others) for at in seen]]
    advance(len(ids) - len(todo))
    failed: dict[int, str] = {}
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch].tolist()
        failed |= write(part, [media[item] for item in part])[1]
        gallery.compact()
        advance(len(part))
    return failed


def in_order(
    ids: NDArray[np.int64], order: Order, seed: int, *, popularity: Mapping[int, float] | None = None,
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """The items in the order in which they are moved; the same for the same items after a restart.

    random: by a hash of id and seed. popularity: the most asked for first. farthest: those whose old vector is farthest
    from the mean of all first (without classes, the whole catalogue is one; λ-orthogonality, arXiv 2509.16664, takes
    each class's own mean).
    """
    ids = np.sort(ids)
    shuffled = ids[np.argsort(_mixed(ids, seed), kind="stable")]
    if order == "random":
        return shuffled
    if order == "popularity":
        if popularity is None:
            raise ConfigError("--order popularity: expected interactions to count; the data set has none")
        asked = np.array([popularity.get(item, 0.0) for item in shuffled.tolist()])
        return shuffled[np.argsort(-asked, kind="stable")]
    assert vectors is not None
    old = vectors(shuffled)
    mean = old.mean(0)
    return shuffled[np.argsort(old @ mean, kind="stable")]


def backfill(
    gallery: Gallery, encoder: Encoder, media: Media, *, batch: int = 64, pace: Pace = lambda busy: None,
    popularity: Mapping[int, float] | None = None, metrics: Metrics | None = None,
    advance: Callable[[str, int], object] = lambda result, items: None, stopped: Callable[[], bool] = lambda: False,
    nap: Callable[[float], object] = time.sleep,
) -> Upgrade:  # fmt: skip
    """Move what the upgrade's old version still has, until nothing is left that can be moved.

    Ends early where `stopped` says so, or somebody paused or ended the upgrade. While the encoder does not answer, it
    is asked again after pauses that grow to half a minute (`nap`).

    Args:
        encoder: of the upgrade's captioner.
        advance: hears how many items ended how: moved, overtaken (changed or deleted meanwhile), failed.

    Returns:
        The upgrade as it is now; `moved` when the job is done.
    """
    upgrade = read_upgrade(gallery)
    if upgrade is None or upgrade.phase not in ("running", "moved"):
        raise GalleryError(
            "expected an upgrade that is running; `sightline backfill begin` makes one, `resume` lets a paused one on"
        )
    metrics = metrics or Metrics(model="backfill")
    write = Writer(gallery, encoder, upgrade.captioner)
    failed: dict[int, str] = {}
    silent = 0
    gallery.put_state(FAILED, None)
    while part := _next(gallery, upgrade, failed, batch, popularity):
        for ids in part:
            now = read_upgrade(gallery)
            if stopped() or now is None or now.phase not in ("running", "moved"):
                return now or upgrade
            began = time.monotonic()
            position = gallery.position()
            found, unusable = _look_up(media, ids)
            try:
                written, refused = write(list(found), list(found.values()), since=position)
            except ServingError as error:
                silent += 1
                _log.warning("%d items wait for the encoder: %s", len(found), error)
                nap(min(2.0 ** (silent - 1), _LONGEST))
                continue
            silent = 0
            unusable |= refused
            if unusable:
                failed |= unusable
                _keep(gallery, failed)
            gallery.compact()
            busy = time.monotonic() - began
            for result, count in (
                ("moved", int(written.sum())), ("failed", len(unusable)),
                ("overtaken", len(ids) - len(unusable) - int(written.sum())),
            ):  # fmt: skip
                if count:
                    metrics.count("sightline_backfill_items_total", count, result=result)
                    advance(result, count)
            metrics.observe("sightline_backfill_batch_seconds", busy)
            metrics.set("sightline_backfill_remaining_items", gallery.count()[upgrade.old].seen)
            pace(busy)
    now = read_upgrade(gallery)
    if now is None or now.phase != "running" or gallery.count()[upgrade.old].seen:
        return now or upgrade
    return write_upgrade(gallery, now.model_copy(update={"phase": "moved"}))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What an upgrade would cost."""

    items: int
    items_per_second: float
    hours: float
    """At full speed."""
    new_bytes: int
    """Vectors of the new version; the index beside them is about as large again."""


def estimate(
    gallery: Gallery, encoder: Encoder, media: Media, dimension: int, *, old: str, sample: int = 64, share: float = 1.0
) -> Estimate:
    """Embed some items for the clock's sake, and keep nothing.

    Args:
        dimension: of the new version's vectors.
        share: of the encoder's time that the job may take.
    """
    ids = gallery.ids(old)
    some = in_order(ids, "random", 0)[: sample + 1].tolist()
    data = [one for one in _look_up(media, some)[0].values() if one is not None]
    if not data:
        raise DataError("expected media of the gallery's items, the data set has none of the first ones")
    encoder(data[:1])
    began = time.monotonic()
    encoder(data)
    rate = len(data) / (time.monotonic() - began)
    return Estimate(
        items=len(ids), items_per_second=round(rate, 1), hours=round(len(ids) / rate / share / 3600, 3),
        new_bytes=len(ids) * dimension * 4,
    )  # fmt: skip


def _next(
    gallery: Gallery, upgrade: Upgrade, failed: Mapping[int, str], batch: int, popularity: Mapping[int, float] | None
) -> Iterator[list[int]] | None:
    """Batches of what is left; None where nothing is."""
    left = gallery.ids(upgrade.old)
    left = left[~np.isin(left, np.fromiter(failed, np.int64, len(failed)))]
    if not len(left):
        return None
    ids = in_order(
        left, upgrade.order, upgrade.seed, popularity=popularity,
        vectors=lambda some: gallery.get(some, upgrade.old)[0],
    )  # fmt: skip
    return (ids[start : start + batch].tolist() for start in range(0, len(ids), batch))


def _look_up(media: Media, ids: Sequence[int]) -> tuple[dict[int, bytes | None], dict[int, str]]:
    found: dict[int, bytes | None] = {}
    missing: dict[int, str] = {}
    for item in ids:
        try:
            found[item] = media[item]
        except (DataError, KeyError) as error:
            missing[item] = str(error)
    return found, missing


def _keep(gallery: Gallery, failed: Mapping[int, str]) -> None:
    gallery.put_state(FAILED, json.dumps(dict(list(failed.items())[:_MOST_REASONS])).encode())


def _mixed(ids: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """SplitMix64 of id and seed (Steele, Lea and Flood 2014)."""
    mixed: NDArray[np.uint64] = ids.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
