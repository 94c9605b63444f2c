"""A query's content vector → its nearest items, in all versions of the gallery in which items are seen.

One look at the query's media is enough: a captioner's `View` says how its content vector becomes a query of each
version, by the outputs of one small graph (reverse query transform, arXiv 2301.03767).

    VECTOR ──query.onnx──┬─ NEW ──► items of the new version ─┐
                         └─ OLD ──► items of the old version ─┴─ rank merge ──► ids, distances, versions

Views and graphs lie in the gallery itself and are written together with what they belong to: a reader never combines
the items of one state with the transform of another.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from sightline.content import unit
from sightline.errors import GalleryError
from sightline.gallery import Gallery

__all__ = ["VIEWS", "Retrieved", "Retriever", "Transform", "View", "Views", "read_views"]

VIEWS = "views"
Space = Literal["vector", "new", "old"]


class View(BaseModel):
    """How the content vectors of one captioner become queries."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: dict[str, Space]
    """Version of the gallery → what is searched there: the vector itself, or an output of the transform."""
    transform: str = ""
    """Name of the gallery's document that holds it; empty where there is none."""


class Views(BaseModel):
    """Of all captioners that may be served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    views: dict[str, View] = {}
    """Version of the captioner → its view."""


class Retrieved(NamedTuple):
    """B queries, at most k items each."""

    ids: NDArray[np.int64]
    """[B, k], the nearest first, −1 where there are fewer."""
    distances: NDArray[np.float32]
    """[B, k], squared Euclidean, inf where there are fewer."""
    versions: list[list[str]]
    """[B][k], in which each item was found; empty where there are fewer."""


def read_views(gallery: Gallery) -> Views:
    """Raises GalleryError for a document of another kind."""
    return _views(gallery.get_state(VIEWS))


class Transform:
    """`query.onnx`: VECTOR FP32 [B, W] → NEW FP32 [B, D], OLD FP32 [B, D'], rows of length 1."""

    def __init__(self, graph: bytes) -> None:
        """Raises GalleryError for anything else."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        try:
            self._session: Any = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own kinds have no common base but this
            raise GalleryError(f"transform: expected an ONNX graph: {error}") from error
        sides = self._session.get_inputs(), self._session.get_outputs()
        inputs, outputs = ([one.name for one in side] for side in sides)
        if inputs != ["VECTOR"] or outputs != ["NEW", "OLD"]:
            raise GalleryError(f"transform: expected VECTOR → NEW, OLD; got {inputs} → {outputs}")
        self.width = int(self._session.get_inputs()[0].shape[1])
        self.new, self.old = (int(one.shape[1]) for one in self._session.get_outputs())
        self.made_for: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        """`old`: the gallery's version, `captioner`: the new one; empty where it does not say."""

    def __call__(self, vectors: NDArray[np.float32]) -> dict[Space, NDArray[np.float32]]:
        """Content vectors [B, W] → queries by output."""
        new, old = self._session.run(["NEW", "OLD"], {"VECTOR": vectors})
        return {"new": new, "old": old}


class Retriever:
    """Searches a gallery with the content vectors of one captioner; for one thread."""

    def __init__(self, gallery: Gallery, captioner: str) -> None:
        self._gallery, self._captioner = gallery, captioner
        self._document: bytes | None = None
        self._view: View | None = None
        self._transform: Transform | None = None

    def __call__(self, vectors: NDArray[np.float32], k: int) -> Retrieved:
        """Content vectors float32 [B, W] of any length above 0, k from 1 to 4096.

        Raises:
            GalleryError: the gallery has no view for this captioner, or cannot be read.
            DataError: a vector without a direction.
        """
        view = self._current()
        queries = self._queries(view, unit(vectors))
        found = self._gallery.search(queries, k)
        names = np.array([*queries, ""], object)
        return Retrieved(found.ids, found.distances, names[found.version].tolist())

    def _current(self) -> View:
        document = self._gallery.get_state(VIEWS)
        if self._view is None or document != self._document:
            known = _views(document).views
            if self._captioner not in known:
                raise GalleryError(
                    f"the gallery has vectors for captioner {', '.join(known) or 'none so far'}, asked with "
                    f"{self._captioner}; fill it with `sightline gallery fill`, or begin an upgrade with `sightline "
                    "backfill begin`"
                )
            view = known[self._captioner]
            graph = self._gallery.get_state(view.transform) if view.transform else None
            if view.transform and graph is None:
                raise GalleryError(f"the gallery's view of {self._captioner} names {view.transform}, which is missing")
            self._transform = Transform(graph) if graph is not None else None
            self._document, self._view = document, view
        return self._view

    def _queries(self, view: View, vectors: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        width = self._transform.width if self._transform else self._gallery.version(next(iter(view.versions))).dimension
        if vectors.shape[1] != width:
            raise GalleryError(f"VECTOR: expected {width} numbers, got {vectors.shape[1]}")
        spaces: dict[Space, NDArray[np.float32]] = {"vector": vectors}
        if self._transform:
            spaces |= self._transform(vectors)
        return {version: spaces[space] for version, space in view.versions.items()}


def _views(document: bytes | None) -> Views:
    try:
        return Views.model_validate_json(document) if document is not None else Views()
    except ValidationError as error:
        raise GalleryError(f"{VIEWS}: expected a gallery's views, made by this release: {error}") from error
