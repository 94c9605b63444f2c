"""One captioner's captions and leases in the feature store, which may be absent, slow or down, and what captioners
before it said.

Without it everything is missing and every lease is ours: captions then come from the model, as if nobody had asked
before. A store that failed is left alone for a while, so that it costs no request its time.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeVar

from sightline.errors import StoreError
from sightline.store import FeatureStore, open_store, without_secrets

__all__ = ["CaptionStore"]

T = TypeVar("T")


class CaptionStore:
    """To be used from one event loop; the store itself is used in threads, because it may block.

    Args:
        location: of a feature store, None for none.
        captioner: version whose captions these are.
        failed: is told what was tried (`read`, `claim`, `write`) and why it failed.
    """

    PAUSE: ClassVar[float] = 5.0
    """Seconds for which a store that failed is not asked again."""
    PATIENCE: ClassVar[float] = 1.0
    """Seconds that a read or a lease may take; somebody waits for them."""
    WRITE_PATIENCE: ClassVar[float] = 30.0
    LEASE: ClassVar[float] = 6.0
    """Seconds for which a medium is ours; whoever captions it renews that in time (`RENEW`)."""
    RENEW: ClassVar[float] = 2.0

    def __init__(self, location: str | None, captioner: str, failed: Callable[[str, str], None]) -> None:
        self._location, self._captioner, self._failed = location, captioner, failed
        self._store: FeatureStore | None = None
        self._others: list[str] = []
        self._opening = threading.Lock()
        self._away_until = 0.0
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="store")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-write")  # reads do not wait for the disk

    @property
    def there(self) -> bool:
        """There is a store, and it did not fail just now."""
        return self._location is not None and time.monotonic() >= self._away_until

    async def read(self, digests: Sequence[str]) -> dict[str, str]:
        """Annotated captions by content hash, of those that are there."""

        if not digests:
            return {}
        return await self._use("read", self._readers, lambda store: self._found(store, self._captioner, digests), {})

    async def look(self, digests: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
        """As `read`, and of those that are not there, annotated captions by another captioner.

        Another one is whose items the store had when it was first used here: an earlier release's, as a rule.
        """

        def look(store: FeatureStore) -> tuple[dict[str, str], dict[str, str]]:
            own = self._found(store, self._captioner, digests)
            previous: dict[str, str] = {}
            for captioner in self._others:
                previous |= self._found(store, captioner, [key for key in digests if key not in own | previous])
            return own, previous

        return await self._use("read", self._readers, look, ({}, {}))

    async def claim(self, digests: Sequence[str]) -> set[str]:
        """Those that this server may caption now: nobody else does."""

        def claim(store: FeatureStore) -> set[str]:
            return {digest for digest in digests if store.claim(self._lease(digest), self.LEASE)}

        return await self._use("claim", self._readers, claim, set(digests)) if digests else set()

    async def unclaim(self, digests: Sequence[str]) -> None:
        """Give up what was claimed and not captioned. (Whoever finds a caption asks for no lease.)"""

        def unclaim(store: FeatureStore) -> None:
            for digest in digests:
                store.unclaim(self._lease(digest))

        if digests:
            await self._use("claim", self._writer, unclaim, None)

    async def write(self, captions: Mapping[str, str]) -> None:
        """Keep annotated captions by content hash; on return they are durable, unless the store failed."""
        if captions:
            await self._use("write", self._writer, lambda store: store.write_captions(self._captioner, captions), None)

    def close(self) -> None:
        """Wait for what is under way, then close the store."""
        self._readers.shutdown()
        self._writer.shutdown()
        if self._store is not None:
            self._store.close()

    @staticmethod
    def _found(store: FeatureStore, captioner: str, digests: Sequence[str]) -> dict[str, str]:
        captions = store.read_captions(captioner, digests)
        return {key: caption for key, caption in zip(digests, captions, strict=True) if caption is not None}

    def _lease(self, digest: str) -> str:
        return f"caption/{self._captioner}/{digest}"

    async def _use(self, what: str, threads: ThreadPoolExecutor, do: Callable[[FeatureStore], T], otherwise: T) -> T:
        if not self.there:
            return otherwise
        patience = self.WRITE_PATIENCE if threads is self._writer else self.PATIENCE
        running = asyncio.get_running_loop().run_in_executor(threads, lambda: do(self._opened()))
        try:
            return await asyncio.wait_for(running, patience)
        except Exception as error:
            if what == "read" or not isinstance(error, TimeoutError):  # LMDB's writers may wait for a bulk load
                self._away_until = time.monotonic() + self.PAUSE
            reason = f"no answer within {patience:g} s" if isinstance(error, TimeoutError) else str(error)
            place = "" if isinstance(error, StoreError) else f"{without_secrets(self._location or '')}: "
            self._failed(what, place + reason)
            return otherwise

    def _opened(self) -> FeatureStore:
        with self._opening:
            if self._store is None:
                assert self._location is not None
                store = open_store(self._location)
                items = (schema.captioner for schema in store.schemas() if schema.kind == "item")
                others = sorted(set(items) - {self._captioner})
                # While no other thread uses it: py-lmdb opens a database under the GIL, with the lock that a writing
                # thread has while it waits for the GIL.
                for captioner in (self._captioner, *others):
                    store.write_captions(captioner, {})
                self._others = others
                self._store = store
            return self._store
