"""The vector gallery: one interface, `Gallery`; an embedded one (LMDB and FAISS) and one on a server (Milvus).

    >>> from sightline.gallery import GalleryVersion, open_gallery
    >>> gallery = open_gallery("artifacts/gallery")                               # doctest: +SKIP
    >>> gallery.search({"v1": old_queries, "v2": new_queries}, k=10).ids          # doctest: +SKIP
"""

from __future__ import annotations

from sightline.gallery.base import Count, Found, Gallery, GalleryVersion, State

__all__ = ["Count", "Found", "Gallery", "GalleryVersion", "State", "is_milvus", "open_gallery"]


def is_milvus(location: str) -> bool:
    """`http(s)://…` is a Milvus server, a file `….db` a Milvus Lite; everything else is a folder."""
    return location.startswith(("http://", "https://")) or location.endswith(".db")


def open_gallery(location: str, *, readonly: bool = False) -> Gallery:
    """A folder is an embedded gallery (`LmdbGallery`), an address or a file `….db` Milvus (`MilvusGallery`)."""
    if is_milvus(location):
        from sightline.gallery.server import MilvusGallery

        return MilvusGallery(location)
    from sightline.gallery.embedded import LmdbGallery

    return LmdbGallery(location, readonly=readonly)
