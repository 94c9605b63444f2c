"""The running server's `caption` model as a function: media → answers."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import tritonclient.grpc as triton

from sightline.errors import ReleaseError, ServingError
from sightline.item_records import Reply, Unavailable

__all__ = ["NEARLINE", "ServedCaptioner"]

NEARLINE = 2
"""Triton's priority of requests that nobody waits for; interactive ones have 1."""
# What says nothing about the media: no connection, no room, no model yet; a stub that died under somebody's request.
_LATER = ("StatusCode.UNAVAILABLE", "StatusCode.CANCELLED")
_NO_ROW = "MEDIA: no row can be used: "  # of a request without a single row to answer


class ServedCaptioner:
    """Asks the `caption` model of a server at low priority, without a deadline; a `sightline.item_records.Captioner`.

    Every answer is of `release`: captions of another release's captioner must not be kept under this one's version.
    """

    def __init__(self, url: str, release: str, *, timeout: float = 600.0) -> None:
        """`url` is host:port of gRPC; `timeout` in seconds, after which a request counts as failed."""
        self._url, self._release, self._timeout = url, release, timeout
        self._client: Any = triton.InferenceServerClient(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def __call__(self, media: list[bytes]) -> list[Reply]:
        """Raises Unavailable, ServingError (see `Captioner`), and ReleaseError where another release is served."""
        try:
            answers = self._ask(media)
            # Afterwards: the server that answered was there before the one that says now what it serves.
            config = self._client.get_model_config("rank_media", client_timeout=self._timeout).config
        except triton.InferenceServerException as error:
            kind = Unavailable if error.status() in _LATER else ServingError
            raise kind(f"{self._url}: caption: {error.message()}") from error
        served = config.parameters["release"].string_value
        if served != self._release:
            raise ReleaseError(
                f"{self._url}: expected release {self._release}, it serves {served}; start again with that --release"
            )
        return answers

    def _ask(self, media: list[bytes]) -> list[Reply]:
        tensor = triton.InferInput("MEDIA", [len(media), 1], "BYTES")
        tensor.set_data_from_numpy(np.array([[one] for one in media], object))
        try:
            answer = self._client.infer(
                "caption", [tensor], priority=NEARLINE, parameters={"nearline": True}, client_timeout=self._timeout
            )
        except triton.InferenceServerException as error:
            if len(media) == 1 and error.message().startswith(_NO_ROW):
                return [Reply(error=error.message().removeprefix(_NO_ROW))]
            raise
        columns = [answer.as_numpy(name).reshape(-1) for name in ("ANNOTATION", "CAPTION_SOURCE", "CAPTION_ERROR")]
        if {b"deadline", b"previous"} & set(columns[1]):  # as of a server that gives every request one
            raise Unavailable(f"{self._url}: caption: media were answered without a caption of this release")
        return [
            Reply(annotation.decode(), error.decode(), source == b"store")
            for annotation, source, error in zip(*columns, strict=True)
        ]
