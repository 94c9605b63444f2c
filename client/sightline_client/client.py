"""The two clients: each performs the steps of `protocol.Session` in its own way of waiting."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy.typing as npt
import tritonclient.grpc
import tritonclient.grpc.aio
from tritonclient.utils import InferenceServerException

from sightline_client.events import Event
from sightline_client.items import RankedItems
from sightline_client.protocol import TLS, Ask, ModelInfo, Pause, Ranked, Session, Steps
from sightline_client.retrieval import Retrieved

__all__ = ["AsyncRankClient", "RankClient"]

T = TypeVar("T")


class RankClient:
    """Ranks media and items for a user, and tells the server what users did.

    >>> with RankClient("localhost:8001", timeout=2.0) as client:    # doctest: +SKIP
    ...     client.rank(17, [open("mug.png", "rb").read()])

    Args:
        url: host:port of the server's gRPC endpoint.
        timeout: seconds for one call with all its chunks and retries.
        retries: further attempts after UNAVAILABLE, with jittered backoff, while the timeout allows.
        tls: encrypt, and check the server; None speaks plain text.
    """

    def __init__(self, url: str, *, timeout: float = 10.0, retries: int = 3, tls: TLS | None = None) -> None:
        self._session = Session(timeout=timeout, retries=retries)
        self._server = tritonclient.grpc.InferenceServerClient(url, **_tls_arguments(tls))

    def rank(
        self,
        user_id: int,
        media: Sequence[bytes],
        *,
        item_ids: Sequence[int] | None = None,
        context: Mapping[str, int] | None = None,
        caption_timeout: float | None = None,
    ) -> list[Ranked]:
        """Rank images and videos, best first; media that cannot be used come last, with their reason.

        Args:
            user_id: 0 or a user unknown to the ranker gives the ranking for nobody in particular.
            media: bytes of each image or video, any number.
            item_ids: their catalogue ids, 0 where they have none; None means none has.
            context: index per context name of the served ranker; 0 where not given.
            caption_timeout: seconds after which media without a caption are ranked by that of an earlier captioner
                (source `previous`) or by everything else (`deadline`); 0 takes the captions that the server has. None:
                as late as the client's timeout allows.

        Raises:
            InvalidArgument: wrong arguments.
            DeadlineExceeded, Unavailable, ServerError: see `sightline_client.errors`.
        """
        return self._run(self._session.rank(user_id, media, item_ids, context, caption_timeout))

    def rank_items(
        self,
        user_id: int,
        item_ids: Sequence[int] | npt.NDArray[Any],
        *,
        context: Mapping[str, int] | None = None,
    ) -> RankedItems:
        """Score items of the catalogue by their features in the server's store: no media, no captioner.

        Args:
            user_id: 0 or a user unknown to the ranker gives the scores for nobody in particular.
            item_ids: int64 [N], any number; unknown items are scored as strangers, and their status says so.
            context: index per context name of the served ranker; 0 where not given.

        Raises:
            InvalidArgument: wrong arguments.
            DeadlineExceeded, Unavailable, ServerError: see `sightline_client.errors`.
        """
        return self._run(self._session.rank_items(user_id, item_ids, context))

    def retrieve(
        self, media: Sequence[bytes] | None = None, *, vectors: npt.NDArray[Any] | None = None, k: int = 10
    ) -> list[Retrieved]:
        """Items of the server's gallery that look like a picture; while the gallery is being moved to another
        captioner, the nearest of both its versions.

        Args:
            media: images or videos, any number; or else
            vectors: content vectors float32 [queries, W] of the served captioner.
            k: items per query, 1 to 4096.

        Raises:
            InvalidArgument: wrong arguments, or media that cannot be used.
            DeadlineExceeded, Unavailable, ServerError: see `sightline_client.errors`.
        """
        return self._run(self._session.retrieve(media, vectors, k))

    def send_events(self, events: Sequence[Event]) -> list[str]:
        """Tell the server what users did; on return it is in their histories and profiles.

        Args:
            events: any number, in the order in which they happened.

        Returns:
            One of `OUTCOMES` per event. After an error it is unknown which were applied: send all of them again; those
            come back as duplicates, as long as no user has more of them, or of later ones, than a history holds (64).

        Raises:
            InvalidArgument: an event is not one; nothing was sent.
            DeadlineExceeded, Unavailable, ServerError: see `sightline_client.errors`.
        """
        return self._run(self._session.send_events(events))

    @property
    def info(self) -> ModelInfo | None:
        """What the server said about its model; None before the first `rank`."""
        return self._session.info

    def close(self) -> None:
        """Close the connection."""
        self._server.close()

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    result = self._perform(step)
                except InferenceServerException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as stop:
            answer: T = stop.value
            return answer

    def _perform(self, step: Ask | Pause) -> Any:
        if isinstance(step, Pause):
            return time.sleep(step.seconds)
        if step.inputs is None:
            return self._server.get_model_config(step.model, client_timeout=step.timeout)
        return self._server.infer(**step.infer_arguments)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncRankClient:
    """`RankClient` for asyncio: the same arguments, results and errors."""

    def __init__(self, url: str, *, timeout: float = 10.0, retries: int = 3, tls: TLS | None = None) -> None:
        self._session = Session(timeout=timeout, retries=retries)
        self._server = tritonclient.grpc.aio.InferenceServerClient(url, **_tls_arguments(tls))

    async def rank(
        self,
        user_id: int,
        media: Sequence[bytes],
        *,
        item_ids: Sequence[int] | None = None,
        context: Mapping[str, int] | None = None,
        caption_timeout: float | None = None,
    ) -> list[Ranked]:
        """See `RankClient.rank`."""
        return await self._run(self._session.rank(user_id, media, item_ids, context, caption_timeout))

    async def rank_items(
        self,
        user_id: int,
        item_ids: Sequence[int] | npt.NDArray[Any],
        *,
        context: Mapping[str, int] | None = None,
    ) -> RankedItems:
        """See `RankClient.rank_items`."""
        return await self._run(self._session.rank_items(user_id, item_ids, context))

    async def retrieve(
        self, media: Sequence[bytes] | None = None, *, vectors: npt.NDArray[Any] | None = None, k: int = 10
    ) -> list[Retrieved]:
        """See `RankClient.retrieve`."""
        return await self._run(self._session.retrieve(media, vectors, k))

    async def send_events(self, events: Sequence[Event]) -> list[str]:
        """See `RankClient.send_events`."""
        return await self._run(self._session.send_events(events))

    @property
    def info(self) -> ModelInfo | None:
        """What the server said about its model; None before the first `rank`."""
        return self._session.info

    async def close(self) -> None:
        """Close the connection."""
        await self._server.close()

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                try:
                    result = await self._perform(step)
                except InferenceServerException as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(result)
        except StopIteration as stop:
            answer: T = stop.value
            return answer

    async def _perform(self, step: Ask | Pause) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if step.inputs is None:
            return await self._server.get_model_config(step.model, client_timeout=step.timeout)
        return await self._server.infer(**step.infer_arguments)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def _tls_arguments(tls: TLS | None) -> dict[str, Any]:
    if tls is None:
        return {}
    names = {"root_certificates": tls.ca, "certificate_chain": tls.cert, "private_key": tls.key}
    return {"ssl": True} | {name: str(path) for name, path in names.items() if path is not None}
