"""The nearline queue: media that wait for their caption, in a folder or on a Redis server. See docs/nearline.md.

    >>> from sightline.queue import ItemEvent, open_queue
    >>> queue = open_queue("artifacts/queue")                                      # doctest: +SKIP
    >>> queue.put(ItemEvent(item_id=7, media=data, media_hash=content_hash(data)))  # doctest: +SKIP
    True
"""

from __future__ import annotations

from sightline.location import is_server
from sightline.queue.base import Bounds, DeadLetter, ItemEvent, ItemQueue, Offer, Stats, Taken

__all__ = ["Bounds", "DeadLetter", "ItemEvent", "ItemQueue", "Offer", "Stats", "Taken", "open_queue"]


def open_queue(location: str, bounds: Bounds | None = None) -> ItemQueue:
    """A folder is a queue of one machine, `redis://…` or `rediss://…` (TLS) one on a Redis server or cluster.

    Raises StoreError where the queue cannot be opened, ConfigError for an address that is none.
    """
    if is_server(location):
        from sightline.queue.server import RedisQueue

        return RedisQueue(location, bounds)
    from sightline.queue.folder import FolderQueue

    return FolderQueue(location, bounds)
