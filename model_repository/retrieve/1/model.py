"""Media or content vectors → the nearest items of the gallery that SIGHTLINE_GALLERY names."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.content import POOLED, encode
from sightline.errors import DataError, GalleryError, MediaError, ServingError
from sightline.gallery import open_gallery
from sightline.media import MediaSpec
from sightline.metrics import Metrics
from sightline.prompt import captioner_version
from sightline.retrieval import Retriever

MOST = 4096  # items of one answer


class TritonPythonModel:
    """Searches in its own process; media go through `vision_encoder` of the same server."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the gallery for reading; preprocessing and version are those of the release's captioner."""
        folder = Path(args["model_repository"]).parent / "caption" / "1"
        self.spec = MediaSpec.from_pretrained(folder)
        parameters = json.loads(args["model_config"])["parameters"]
        self.rows = int(parameters["vision_encoder_max_batch_size"]["string_value"])
        self.gallery = open_gallery(os.environ["SIGHTLINE_GALLERY"], readonly=True)
        self.retriever = Retriever(self.gallery, captioner_version(folder))
        self.metrics = Metrics(pb_utils, model="retrieve")

    def finalize(self) -> None:
        """Close the gallery, send the last counts."""
        self.gallery.close()
        self.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """K INT32 [rows, 1] and either MEDIA BYTES [rows, 1] or VECTOR FP32 [rows, W] → ITEM_IDS INT64 [rows, K], −1
        where there are fewer, DISTANCES FP32 [rows, K], VERSIONS BYTES [rows, K].
        """
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        began, codes = time.perf_counter(), pb_utils.TritonError
        try:
            count = self._count(request)
            vectors = self._vectors(request)
            looked = time.perf_counter()
            found = self.retriever(vectors, count)
        except (DataError, MediaError) as error:
            return _error(str(error), codes.INVALID_ARG)
        except GalleryError as error:
            return _error(str(error), codes.UNAVAILABLE)
        except ServingError as error:
            return _error(str(error), codes.INTERNAL)
        self.metrics.observe("sightline_retrieve_seconds", looked - began, stage="vector")
        self.metrics.observe("sightline_retrieve_seconds", time.perf_counter() - looked, stage="search")
        for name in {name for row in found.versions for name in row if name}:
            total = sum(row.count(name) for row in found.versions)
            self.metrics.count("sightline_retrieve_items_total", total, version=name)
        return pb_utils.InferenceResponse([
            pb_utils.Tensor("ITEM_IDS", found.ids),
            pb_utils.Tensor("DISTANCES", found.distances),
            pb_utils.Tensor("VERSIONS", np.array(found.versions, object)),
        ])  # fmt: skip

    def _count(self, request: Any) -> int:
        counts = _input(request, "K").reshape(-1)
        if not (counts == counts[0]).all() or not 1 <= counts[0] <= MOST:
            raise DataError(f"K: expected one number from 1 to {MOST} for all rows, got {counts[:8].tolist()}")
        return int(counts[0])

    def _vectors(self, request: Any) -> NDArray[np.float32]:
        media, vectors = (_input(request, name) for name in ("MEDIA", "VECTOR"))
        if (media is None) == (vectors is None):
            raise DataError("expected either MEDIA or VECTOR, got " + ("none" if media is None else "both"))
        if vectors is not None:
            return vectors
        found = encode([bytes(row) for row in media.reshape(-1)], self.spec, self._pooled)
        for row, one in enumerate(found):
            if isinstance(one, MediaError):
                raise MediaError(f"MEDIA: row {row}: {one.reason}")
        return np.stack([one for one in found if not isinstance(one, MediaError)])

    def _pooled(self, frames: NDArray[np.float32]) -> NDArray[Any]:
        """Frames [n, 3, H, W] → pooled features [n, W]."""
        return np.concatenate([_encode(frames[at : at + self.rows]) for at in range(0, len(frames), self.rows)])


def _encode(frames: NDArray[np.float32]) -> NDArray[Any]:
    response = pb_utils.InferenceRequest(
        model_name="vision_encoder", requested_output_names=[POOLED],
        inputs=[pb_utils.Tensor("pixel_values", np.ascontiguousarray(frames))],
    ).exec()  # fmt: skip
    if response.has_error():
        raise ServingError(f"vision_encoder: {response.error().message()}")
    found: NDArray[Any] = pb_utils.get_output_tensor_by_name(response, POOLED).as_numpy()
    return found


def _input(request: Any, name: str) -> Any:
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def _error(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
