"""The running server's vision tower as a function: media → content vectors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from sightline.content import POOLED, captioner_folder, encode
from sightline.errors import MediaError, ServingError
from sightline.media import MediaSpec
from sightline.prompt import captioner_version
from sightline.release import read_manifest

__all__ = ["ServedEncoder"]

MODEL = "vision_encoder"


class ServedEncoder:
    """Asks `vision_encoder` of a server that serves a release; media are decoded here. A `sightline.content.Encoder`.

    Attributes:
        version: of the release's captioner.
        width: numbers of a content vector.
    """

    def __init__(self, url: str, release_dir: Path, *, timeout: float = 600.0) -> None:
        """`url` is host:port of gRPC. Raises ServingError where another release or none is served there."""
        folder = captioner_folder(release_dir)
        self.spec, self.version = MediaSpec.from_pretrained(folder), captioner_version(folder)
        self._url, self._timeout = url, timeout
        self._client: Any = triton.InferenceServerClient(url)
        try:
            served = self._client.get_model_config("rank_media", client_timeout=timeout).config
            config = self._client.get_model_config(MODEL, client_timeout=timeout).config
        except triton.InferenceServerException as error:
            raise ServingError(f"{url}: expected a server: {error.message()}") from error
        wanted, found = read_manifest(release_dir).release, served.parameters["release"].string_value
        if found != wanted:
            raise ServingError(f"{url}: expected release {wanted}, it serves {found}; name the one that is served")
        self._batch = max(config.max_batch_size, 1)
        self.width = next(int(output.dims[0]) for output in config.output if output.name == POOLED)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]:
        """Raises ServingError where the server does not answer."""
        return encode(media, self.spec, self._pool)

    def _pool(self, frames: NDArray[np.float32]) -> NDArray[Any]:
        parts = (frames[at : at + self._batch] for at in range(0, len(frames), self._batch))
        return np.concatenate([self._ask(part) for part in parts])

    def _ask(self, frames: NDArray[np.float32]) -> NDArray[Any]:
        tensor = triton.InferInput("pixel_values", list(frames.shape), "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(frames))
        outputs = [triton.InferRequestedOutput(POOLED)]
        try:
            answer = self._client.infer(MODEL, [tensor], outputs=outputs, client_timeout=self._timeout)
        except triton.InferenceServerException as error:
            raise ServingError(f"{self._url}: {MODEL}: {error.message()}") from error
        found: NDArray[Any] = answer.as_numpy(POOLED)
        return found
