"""An upgrade of the embedder, as a gallery remembers it: begin, cut over, roll back, clean.

            begin             run               cut over            clean
    old ──────────► old + new ──► (all in) new ────────► new (old kept) ────► new
                        ▲                                   │
                        └───────────── roll back ◄──────────┘     (clean then removes the new version)

Every step is written so that a crash between two writes leaves a state in which queries are answered, and calling the
step again finishes it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from sightline.errors import GalleryError
from sightline.gallery import Gallery, GalleryVersion
from sightline.retrieval import VIEWS, Transform, View, Views, read_views

__all__ = [
    "FAILED", "Upgrade", "begin", "clean", "cut_over", "failures", "read_uncertainty", "read_upgrade", "roll_back",
    "write_upgrade",
]  # fmt: skip

UPGRADE, FAILED = "upgrade", "upgrade.failed"
Order = Literal["random", "popularity", "farthest", "uncertainty"]
Phase = Literal["running", "paused", "moved", "cut over", "rolled back"]


class Upgrade(BaseModel):
    """From one version of the gallery to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    old: str
    """Version of the gallery that items leave."""
    new: str
    captioner: str
    """Whose vision tower embeds the new one."""
    order: Order = "random"
    seed: int = 0
    phase: Phase = "running"


def read_upgrade(gallery: Gallery) -> Upgrade | None:
    """The gallery's upgrade; None where there is none. Raises GalleryError for a document of another kind."""
    document = gallery.get_state(UPGRADE)
    try:
        return None if document is None else Upgrade.model_validate_json(document)
    except ValidationError as error:
        raise GalleryError(f"{UPGRADE}: expected a gallery's upgrade, made by this release: {error}") from error


def write_upgrade(gallery: Gallery, upgrade: Upgrade) -> Upgrade:
    """Durably."""
    gallery.put_state(UPGRADE, upgrade.model_dump_json().encode())
    return upgrade


def read_uncertainty(gallery: Gallery, upgrade: Upgrade) -> NDArray[np.float32] | None:
    """Weights of an old vector, float32 [D], where items are moved in that order."""
    document = gallery.get_state(_uncertainty(upgrade.new))
    return None if document is None else np.frombuffer(document, "<f4")


def failures(gallery: Gallery) -> dict[int, str]:
    """Item → why it could not be embedded by the new system, in the last run."""
    return {int(item): reason for item, reason in json.loads(gallery.get_state(FAILED) or b"{}").items()}


def begin(
    gallery: Gallery, captioner: str, transform: bytes, *, old: str | None = None, order: Order = "random",
    seed: int = 0, uncertainty: NDArray[np.float32] | None = None,
) -> Upgrade:  # fmt: skip
    """Make room for a new version: from now on queries of `captioner` are searched in both.

    Args:
        captioner: version of the new captioner.
        transform: its `query.onnx`.
        old: version that items leave; by default the only one that the gallery has.
        uncertainty: its `uncertainty.npy`, for that order.

    Raises:
        GalleryError: another upgrade is under way, the gallery is of this captioner already, the transform does not
            fit, or there is nothing to upgrade from.
    """
    graph = Transform(transform)
    known = read_upgrade(gallery)
    digest = hashlib.sha256(transform).hexdigest()[:12]
    new = f"{captioner[:40]}-{digest}"
    if known:
        if known.new == new and known.phase in ("running", "paused", "moved"):
            if (known.order, known.seed) != (order, seed):
                raise GalleryError(
                    f"the upgrade to {new} is {known.phase} in order {known.order}, seed {known.seed}, got {order}, "
                    f"{seed}; leave it as it is, or begin anew after `sightline backfill rollback` and `clean`"
                )
            return known
        end = "clean`" if known.phase in ("cut over", "rolled back") else "cut-over` or `rollback`, and `clean`,"
        raise GalleryError(
            f"an upgrade from {known.old} to {known.new} is {known.phase}; `sightline backfill {end} before the next "
            "begins"
        )
    view = read_views(gallery).views.get(captioner)
    if view is not None and new not in view.versions:
        raise GalleryError(
            f"the gallery is of captioner {captioner} already, in {', '.join(view.versions)}; name the new release"
        )
    versions = {version.name: version for version in gallery.versions() if version.name != new}
    if old is None and len(versions) != 1:
        raise GalleryError(
            "expected one version to upgrade from, the gallery has "
            + (f"{', '.join(versions)}; name it" if versions else "none; `sightline gallery fill` makes one")
        )
    before = gallery.version(old or next(iter(versions)))
    for what, wanted in (("old", before.name), ("captioner", captioner)):
        if (made_for := graph.made_for.get(what, wanted)) != wanted:
            raise GalleryError(
                f"transform: expected one for {what} {wanted}, got one for {made_for}; `sightline backfill train` with "
                "this release and gallery makes it, --transform names its folder"
            )
    if before.dimension != graph.old:
        raise GalleryError(
            f"transform: expected OLD with the {before.dimension} numbers of {before.name}, got {graph.old}; train it "
            "on that version's vectors"
        )
    if order == "uncertainty":
        if uncertainty is None or uncertainty.shape != (before.dimension,):
            raise GalleryError(
                f"uncertainty: expected the {before.dimension} weights of {before.name}, got "
                f"{None if uncertainty is None else list(uncertainty.shape)}; `sightline backfill train` writes them"
            )
        gallery.put_state(_uncertainty(new), uncertainty.astype("<f4").tobytes())
    gallery.create(GalleryVersion(**before.model_dump() | {"name": new, "dimension": graph.new}))
    gallery.put_state(_transform(new), transform)
    _set_view(gallery, captioner, View(versions={before.name: "old", new: "new"}, transform=_transform(new)))
    return write_upgrade(gallery, Upgrade(old=before.name, new=new, captioner=captioner, order=order, seed=seed))


def cut_over(gallery: Gallery, *, force: bool = False) -> Upgrade:
    """Search the new version alone. With `force` also while items are left behind, which are then not found.

    Raises GalleryError where there is no upgrade, or items are still seen in the old version.
    """
    upgrade = _required(gallery, "running", "paused", "moved", "cut over")
    left = gallery.count()[upgrade.old].seen
    if left and not force:
        raise GalleryError(
            f"{left} items are still in {upgrade.old}; let `sightline backfill start` finish, see its `status` for "
            "items that failed, or give --force: they will not be found until they have a new vector"
        )
    _set_view(gallery, upgrade.captioner, View(versions={upgrade.new: "new"}, transform=_transform(upgrade.new)))
    return write_upgrade(gallery, upgrade.model_copy(update={"phase": "cut over"}))


def roll_back(gallery: Gallery) -> tuple[Upgrade, int]:
    """Queries see all items in the old version again that have a vector there, in one write.

    Returns:
        The upgrade, and how many items have none: they came or changed since. They stay in the new version, where
        queries of the new captioner find them; `sightline gallery fill` with the old release brings them back, too.
    """
    upgrade = _required(gallery, "running", "paused", "moved", "cut over", "rolled back")
    # The phase first: a job that is running stops before it moves items forward again.
    back = write_upgrade(gallery, upgrade.model_copy(update={"phase": "rolled back"}))
    both = View(versions={upgrade.old: "old", upgrade.new: "new"}, transform=_transform(upgrade.new))
    views = read_views(gallery).views | {upgrade.captioner: both}
    gallery.show(upgrade.old, state=(VIEWS, Views(views=views).model_dump_json().encode()))
    return back, gallery.count()[upgrade.new].seen


def clean(gallery: Gallery) -> str:
    """Remove the version that the upgrade left behind, and its end: after this there is no way back.

    Returns the version that was removed. Raises GalleryError before cut-over or rollback, or while queries see items
    there.
    """
    upgrade = _required(gallery, "cut over", "rolled back")
    gone = upgrade.old if upgrade.phase == "cut over" else upgrade.new
    views = {
        captioner: view for captioner, view in read_views(gallery).views.items()
        if captioner == upgrade.captioner or gone not in view.versions
    }  # fmt: skip
    if upgrade.phase == "rolled back":
        views.pop(upgrade.captioner, None)
    if any(version.name == gone for version in gallery.versions()):
        if len(left := gallery.ids(gone)):
            some = ", ".join(map(str, left[:10].tolist()))
            raise GalleryError(
                f"{gone}: queries see {len(left)} items in it alone: {some}{', …' if len(left) > 10 else ''}; with the "
                "release that stays, `sightline gallery put` (or `fill`) brings them over; `delete` removes them"
            )
        gallery.drop(gone)
    gallery.put_state(VIEWS, Views(views=views).model_dump_json().encode())
    if upgrade.phase == "rolled back":
        gallery.put_state(_transform(upgrade.new), None)
    gallery.put_state(_uncertainty(upgrade.new), None)
    gallery.put_state(FAILED, None)
    gallery.put_state(UPGRADE, None)
    return gone


def _required(gallery: Gallery, *phases: Phase) -> Upgrade:
    upgrade = read_upgrade(gallery)
    if upgrade is None:
        raise GalleryError("expected an upgrade, there is none; `sightline backfill begin` makes one")
    if upgrade.phase not in phases:
        way = "clean` ends it, then `begin`" if upgrade.phase == "rolled back" else "cut-over` or `rollback` first"
        raise GalleryError(
            f"the upgrade to {upgrade.new} is {upgrade.phase}, expected {' or '.join(phases)}; `sightline backfill "
            f"{way}"
        )
    return upgrade


def _transform(new: str) -> str:
    return f"transform.{new}"


def _uncertainty(new: str) -> str:
    return f"uncertainty.{new}"


def _set_view(gallery: Gallery, captioner: str, view: View) -> None:
    views = read_views(gallery).views | {captioner: view}
    gallery.put_state(VIEWS, Views(views=views).model_dump_json().encode())
