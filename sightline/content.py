"""Media → content vectors: what an item looks like to a captioner's vision tower.

    bytes ──MediaSpec──► frames ──vision_encoder──► pooled_features [frames, W] ──mean, length 1──► content vector [W]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sightline.errors import DataError, MediaError, ReleaseError
from sightline.media import MediaSpec, load
from sightline.prompt import captioner_version

__all__ = ["Encoder", "LocalEncoder", "captioner_folder", "content_vector", "encode", "unit"]

Frames = NDArray[np.float32]
POOLED = "pooled_features"
Encoder = Callable[[Sequence[bytes]], list[NDArray[np.float32] | MediaError]]
"""Images and videos → the content vector float32 [W] of each, of length 1, or why it cannot be used."""


def unit(vectors: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of [N, D] at length 1. Raises DataError for a row that has no direction."""
    vectors = np.asarray(vectors, np.float32)
    lengths: NDArray[Any] = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not (np.isfinite(lengths) & (lengths > 0)).all():
        row = int(np.argmin(np.where(np.isfinite(lengths[:, 0]), lengths[:, 0], -1)))
        raise DataError(f"vectors: expected finite ones that are not 0, got length {lengths[row, 0]} in row {row}")
    found: NDArray[np.float32] = np.ascontiguousarray(vectors / lengths)
    return found


def content_vector(pooled: NDArray[Any]) -> NDArray[np.float32]:
    """A medium's pooled features [frames, W] → its content vector float32 [W], of length 1."""
    mean: NDArray[np.float32] = unit(np.asarray(pooled, np.float32).mean(0, keepdims=True))[0]
    return mean


def encode(
    media: Sequence[bytes], spec: MediaSpec, pool: Callable[[Frames], NDArray[Any]]
) -> list[NDArray[np.float32] | MediaError]:
    """Content vectors of media; `pool` is given all their frames [n, 3, H, W] and answers pooled features [n, W]."""
    loaded = [_load(data, spec) for data in media]
    frames = [one for one in loaded if not isinstance(one, MediaError)]
    if not frames:
        return [one for one in loaded if isinstance(one, MediaError)]
    pooled = iter(np.split(pool(np.concatenate(frames)), np.cumsum([len(one) for one in frames])[:-1]))
    return [one if isinstance(one, MediaError) else content_vector(next(pooled)) for one in loaded]


def captioner_folder(release_dir: Path) -> Path:
    """Where a release keeps its captioner's preprocessing and version."""
    return release_dir / "model_repository" / "caption" / "1"


class LocalEncoder:
    """A release's vision tower in this process; an `Encoder`.

    Attributes:
        version: of the captioner.
        width: W.
    """

    def __init__(self, release_dir: Path, *, threads: int = 0, batch: int = 32) -> None:
        """`threads`: onnxruntime's, 0 for one per core. Raises ReleaseError for a release without a vision tower."""
        import onnxruntime

        folder = captioner_folder(release_dir)
        model = release_dir / "model_repository" / "vision_encoder" / "1" / "model.onnx"
        if not model.is_file():
            raise ReleaseError(
                f"{model}: missing; expected a release of lane cpu or trtllm, whose vision tower is a model of its own"
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._batch, self.spec, self.version = batch, MediaSpec.from_pretrained(folder), captioner_version(folder)
        self.width = int(self._session.get_outputs()[1].shape[-1])

    def __call__(self, media: Sequence[bytes]) -> list[NDArray[np.float32] | MediaError]:
        """As `Encoder`."""
        return encode(media, self.spec, self._pool)

    def _pool(self, frames: Frames) -> NDArray[Any]:
        parts = (frames[at : at + self._batch] for at in range(0, len(frames), self._batch))
        return np.concatenate([self._session.run([POOLED], {"pixel_values": part})[0] for part in parts])


def _load(data: bytes, spec: MediaSpec) -> Frames | MediaError:
    try:
        return load(data, spec)
    except MediaError as error:
        return error
