"""What every caption model does around its captioning: rows → unique media → answers → responses.

Equal bytes within a batch are captioned once. A row that cannot be used is `rejected` with a reason while the
other rows are answered; a request with no usable row fails with INVALID_ARG and the reasons.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import numpy as np

from sightline.annotation import plain
from sightline.media import content_hash

__all__ = ["Answer", "DownstreamError", "answer"]


class Answer(NamedTuple):
    """What one row gets: an annotated caption (sightline/annotation.py), or why there is none."""

    annotation: str = ""
    error: str = ""


class DownstreamError(Exception):
    """A model behind this one failed: neither the caller's fault nor that of one row's media."""


async def answer(
    requests: list[Any], caption: Callable[[dict[str, bytes]], Awaitable[list[Answer]]], pb_utils: Any
) -> list[Any]:
    """Triton responses to requests with MEDIA BYTES [rows, 1]; `caption` gets the unique media by content hash.

    `pb_utils` is triton_python_backend_utils, which exists inside a Triton stub alone.
    """
    rows = [
        [bytes(row) for row in pb_utils.get_input_tensor_by_name(request, "MEDIA").as_numpy().reshape(-1)]
        for request in requests
    ]
    hashes = [[content_hash(row) for row in request] for request in rows]
    unique = {
        digest: row
        for batch, digests in zip(rows, hashes, strict=True)
        for digest, row in zip(digests, batch, strict=True)
    }
    try:
        answers = dict(zip(unique, await caption(unique), strict=True))
    except DownstreamError as error:
        failure = pb_utils.TritonError(str(error), pb_utils.TritonError.INTERNAL)
        return [pb_utils.InferenceResponse(error=failure) for _ in requests]
    return [_response([answers[digest] for digest in digests], pb_utils) for digests in hashes]


def _response(answers: list[Answer], pb_utils: Any) -> Any:
    errors = [one.error for one in answers]
    if answers and all(errors):
        reasons = "; ".join(dict.fromkeys(errors))
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(f"MEDIA: no row can be used: {reasons}", pb_utils.TritonError.INVALID_ARG)
        )
    columns = {
        "CAPTION": [plain(one.annotation) for one in answers],
        "ANNOTATION": [one.annotation for one in answers],
        "CAPTION_SOURCE": ["rejected" if error else "model" for error in errors],
        "CAPTION_ERROR": errors,
    }
    return pb_utils.InferenceResponse(
        [
            pb_utils.Tensor(name, np.array([[value.encode()] for value in values], dtype=object))
            for name, values in columns.items()
        ]
    )
