"""The backfill itself: items in the chosen order, their media through the new encoder, into the new version.

What is left to do is what queries still see in the old version: the gallery is the checkpoint. A job may be killed at
any moment, started again, run twice at once; an item moves once, and one that was changed or deleted meanwhile is left
alone. Who embeds is a `Stage`: this process, or workers on Ray (backfill/ray_pool.py); this process alone writes.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from backfill.upgrade import FAILED, Order, Upgrade, read_uncertainty, read_upgrade, write_upgrade
from sightline.content import Encoder, unit
from sightline.errors import ConfigError, DataError, GalleryError, MediaError, ServingError
from sightline.gallery import Gallery, GalleryVersion
from sightline.gallery.frozen import faiss
from sightline.metrics import Metrics
from sightline.retrieval import VIEWS, Transform, View, Views, read_views

__all__ = [
    "Embedded", "Estimate", "Media", "Stage", "Writer", "backfill", "embed", "estimate", "fill", "in_order",
    "in_process",
]  # fmt: skip

Media = Mapping[int, bytes | None]
"""Item → its image or video, None where it has none; KeyError or DataError where there is no such item."""
Pace = Callable[[float, float], object]
"""Hears how many seconds a batch kept an encoder busy and how many passed since the last one; rests."""
_MOST_REASONS = 1000  # of items that failed, that are kept
_LONGEST = 30.0  # seconds of a wait for the encoder
_POINTS = 64  # vectors per cluster that k-means is fitted on

_log = logging.getLogger(__name__)


class Embedded(NamedTuple):
    """A batch that was embedded."""

    vectors: dict[int, NDArray[np.float32]]
    """Item → content vector float32 [W], of length 1."""
    failed: dict[int, str]
    """Item → why it has none."""
    seconds: float
    """That it kept the encoder busy."""


Stage = Callable[[Iterable[Sequence[int]]], Iterator[Embedded]]
"""Embeds batches of items, which it takes when it begins with them; answers come as they are ready, in any order. A
batch without an answer stays where it is, and is asked for again when all others are through."""


def embed(encoder: Encoder, media: Media, ids: Sequence[int]) -> Embedded:
    """Items' media through an encoder. Raises ServingError where it does not answer."""
    began = time.monotonic()
    data, failed = _look_up(media, ids)
    found = dict(zip(data, encoder(list(data.values())), strict=True))
    failed |= {item: one.reason for item, one in found.items() if isinstance(one, MediaError)}
    vectors = {item: one for item, one in found.items() if not isinstance(one, MediaError)}
    return Embedded(vectors, failed, time.monotonic() - began)


def in_process(encoder: Encoder, media: Media, *, nap: Callable[[float], object] = time.sleep) -> Stage:
    """One batch after the other. While the encoder does not answer, pauses (`nap`) grow to half a minute."""
    silent = 0

    def stage(batches: Iterable[Sequence[int]]) -> Iterator[Embedded]:
        nonlocal silent
        for ids in batches:
            try:
                done = embed(encoder, media, ids)
            except ServingError as error:
                _log.warning("%d items wait for the encoder: %s", len(ids), error)
                nap(min(2**silent, _LONGEST))
                silent += 1
            else:
                silent = 0
                yield done

    return stage


class Writer:
    """Writes items into the version of a gallery that a captioner writes to.

    Raises GalleryError where the gallery has no view for the captioner, or queries no longer look there.
    """

    def __init__(self, gallery: Gallery, captioner: str) -> None:
        self.gallery = gallery
        view = read_views(gallery).views.get(captioner)
        if view is None:
            raise GalleryError(f"the gallery knows no captioner {captioner}: fill it, or begin an upgrade to it")
        self.version = next(version for version, space in view.versions.items() if space != "old")
        upgrade = read_upgrade(gallery)
        if upgrade and upgrade.phase == "cut over" and self.version == upgrade.old:
            raise GalleryError(
                f"the upgrade to {upgrade.new} is cut over, nobody looks for items in {self.version} any more; name a "
                f"release of captioner {upgrade.captioner}, or go back with `sightline backfill rollback`"
            )
        graph = gallery.get_state(view.transform) if view.transform else None
        self._transform = Transform(graph) if graph is not None else None

    def __call__(
        self, vectors: Mapping[int, NDArray[np.float32]], *, replace: bool = False, since: int | None = None
    ) -> int:
        """Write items; returns how many of them were written.

        Args:
            vectors: item → content vector float32 [W].
            replace, since: as in `Gallery.put`.
        """
        if not vectors:
            return 0
        rows = np.stack(list(vectors.values()))
        rows = unit(self._transform(rows)["new"]) if self._transform else rows
        ids = np.fromiter(vectors, np.int64, len(vectors))
        return int(self.gallery.put(ids, {self.version: rows}, self.version, replace=replace, since=since).sum())


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
    write = Writer(gallery, captioner)
    others = set(read_views(gallery).views[captioner].versions) - {write.version}
    if (upgrade := read_upgrade(gallery)) and upgrade.phase != "rolled back":
        others.add(upgrade.new)  # what has moved stays where it is
    seen = gallery.seen(ids)
    todo = ids[[at is None or (at != write.version and at not in others) for at in seen]]
    advance(len(ids) - len(todo))
    failed: dict[int, str] = {}
    for start in range(0, len(todo), batch):
        part = todo[start : start + batch].tolist()
        done = embed(encoder, media, part)
        write(done.vectors)
        failed |= done.failed
        gallery.compact()
        advance(len(part))
    return failed


def in_order(
    ids: NDArray[np.int64], order: Order, seed: int, *, popularity: Mapping[int, float] | None = None,
    vectors: Callable[[NDArray[np.int64]], NDArray[np.float32]] | None = None,
    uncertainty: NDArray[np.float32] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """The items in the order in which they are moved; the same for the same items after a restart.

    random: by a hash of id and seed. popularity: the most asked for first. farthest: those whose old vector is farthest
    from its cluster's mean first (λ-orthogonality, arXiv 2509.16664, takes the mean of the item's class, which a
    gallery does not know: spherical k-means, √N clusters). uncertainty: those first for whose old vector the query
    transform is expected to do worst, by these weights of it.
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
    if order == "uncertainty":
        assert uncertainty is not None
        return shuffled[np.argsort(-(old @ uncertainty), kind="stable")]
    clusters = faiss.Kmeans(
        old.shape[1], max(1, round(len(old) ** 0.5)), niter=10, spherical=True, seed=seed,
        min_points_per_centroid=1, max_points_per_centroid=_POINTS,
    )  # fmt: skip
    clusters.train(old)
    return shuffled[np.argsort((old @ clusters.centroids.T).max(1), kind="stable")]


def backfill(
    gallery: Gallery, stage: Stage, *, batch: int = 64, pace: Pace = lambda busy, passed: None,
    popularity: Mapping[int, float] | None = None, metrics: Metrics | None = None,
    advance: Callable[[str, int], object] = lambda result, items: None, stopped: Callable[[], bool] = lambda: False,
) -> Upgrade:  # fmt: skip
    """Move what the upgrade's old version still has, until nothing is left that can be moved.

    Ends where `stopped` says so, or somebody paused or ended the upgrade: batches that were begun are then not written.

    Args:
        stage: embeds with the upgrade's captioner.
        advance: hears how many items ended how: moved, overtaken (changed or deleted meanwhile), failed.

    Returns:
        The upgrade as it is now; `moved` when the job is done.
    """
    upgrade = read_upgrade(gallery)
    if upgrade is None or upgrade.phase not in ("running", "moved"):
        raise GalleryError(
            "expected an upgrade that is running; `sightline backfill begin` makes one, `resume` lets a paused one on"
        )

    def goes_on(ids: object = None) -> bool:
        now = read_upgrade(gallery)
        return not stopped() and now is not None and now.phase in ("running", "moved")

    metrics = metrics or Metrics(model="backfill")
    write = Writer(gallery, upgrade.captioner)
    failed: dict[int, str] = {}
    gallery.put_state(FAILED, None)
    while goes_on():
        position, last = gallery.position(), time.monotonic()  # what is written from here on is left alone
        if (batches := _left(gallery, upgrade, failed, batch, popularity)) is None:
            break
        for done in stage(takewhile(goes_on, batches)):
            if not goes_on():
                break
            began = time.monotonic()
            written = write(done.vectors, since=position)
            if done.failed:
                failed |= done.failed
                _keep(gallery, failed)
            gallery.compact()
            busy = done.seconds + time.monotonic() - began
            overtaken = len(done.vectors) - written
            for result, count in (("moved", written), ("failed", len(done.failed)), ("overtaken", overtaken)):
                if count:
                    metrics.count("sightline_backfill_items_total", count, result=result)
                    advance(result, count)
            metrics.observe("sightline_backfill_batch_seconds", busy)
            metrics.set("sightline_backfill_remaining_items", gallery.count()[upgrade.old].seen)
            pace(busy, time.monotonic() - last)
            last = time.monotonic()
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
    data = list(_look_up(media, some)[0].values())
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


def _left(
    gallery: Gallery, upgrade: Upgrade, failed: Mapping[int, str], batch: int, popularity: Mapping[int, float] | None
) -> Iterator[list[int]] | None:
    """Batches of what is left; None where nothing is."""
    left = gallery.ids(upgrade.old)
    left = left[~np.isin(left, np.fromiter(failed, np.int64, len(failed)))]
    if not len(left):
        return None
    ids = in_order(
        left, upgrade.order, upgrade.seed, popularity=popularity,
        vectors=lambda some: gallery.get(some, upgrade.old)[0], uncertainty=read_uncertainty(gallery, upgrade),
    )  # fmt: skip
    return (ids[start : start + batch].tolist() for start in range(0, len(ids), batch))


def _look_up(media: Media, ids: Sequence[int]) -> tuple[dict[int, bytes], dict[int, str]]:
    """Item → its media; item → why there is none."""
    found: dict[int, bytes] = {}
    missing: dict[int, str] = {}
    for item in ids:
        try:
            if (data := media[item]) is None:
                missing[item] = "it has no media"
            else:
                found[item] = data
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
