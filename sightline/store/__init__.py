"""The feature store: one interface, `FeatureStore`; an embedded store (LMDB) and one on a server (Redis).

    >>> from sightline.store import ItemSchema, open_store
    >>> store = open_store("artifacts/features")                                  # doctest: +SKIP
    >>> store.read_items(ids, accept=["v2", "v1"]).tokens                         # doctest: +SKIP
"""

from __future__ import annotations

from sightline.location import absolute, is_server, without_secrets
from sightline.store.base import FeatureStore, ItemBatch, ItemDetails, UserRead
from sightline.store.records import Items, ItemSchema, Schema, Status, UserRecord, UserSchema

__all__ = [
    "FeatureStore",
    "ItemBatch",
    "ItemDetails",
    "ItemSchema",
    "Items",
    "Schema",
    "Status",
    "UserRead",
    "UserRecord",
    "UserSchema",
    "absolute",
    "open_store",
    "without_secrets",
]


def open_store(location: str, *, readonly: bool = False) -> FeatureStore:
    """A folder is an LMDB store, `redis://…` or `rediss://…` (TLS) a Redis server or cluster (`RedisStore`)."""
    if is_server(location):
        from sightline.store.server import RedisStore

        return RedisStore(location)
    from sightline.store.embedded import LmdbStore

    return LmdbStore(location, readonly=readonly)
