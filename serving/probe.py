"""The canary: one small inference through the whole ensemble. A server that answers it can do its job.

    python -m serving.probe HOST:PORT     exit code 0, or 1 with the reason (the container's health check)
"""

from __future__ import annotations

import io
import sys

import numpy as np
from PIL import Image

from sightline.errors import ServingError


def canary(url: str, *, timeout: float = 60.0) -> float:
    """Rank a grey square for an unknown user through `rank_media` on `url` (gRPC); returns its score.

    Raises:
        ServingError: no answer within `timeout` seconds, an error, or a score that is no probability.
    """
    # Here, because gRPC costs a third of a second to import and `sightline --help` does not need it.
    import tritonclient.grpc as triton

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
    try:
        with triton.InferenceServerClient(url) as client:
            context = client.get_model_config("rank_media").config.input[3].dims[0]
            inputs = {
                "MEDIA": np.array([[buffer.getvalue()]], dtype=object),
                "USER_ID": np.zeros((1, 1), dtype=np.int64),
                "ITEM_ID": np.zeros((1, 1), dtype=np.int64),
                "CONTEXT": np.zeros((1, context), dtype=np.int64),
            }
            tensors = []
            for name, value in inputs.items():
                tensor = triton.InferInput(
                    name, list(value.shape), "BYTES" if value.dtype == object else "INT64"
                )
                tensor.set_data_from_numpy(value)
                tensors.append(tensor)
            # A new caption: with a stored one the canary would not notice a dead captioner.
            answer = client.infer("rank_media", tensors, client_timeout=timeout, parameters={"fresh": True})
    except triton.InferenceServerException as error:
        raise ServingError(f"rank_media: the canary inference on {url} failed: {error.message()}") from error
    score = float(answer.as_numpy("SCORE")[0, 0])
    if not 0 <= score <= 1:
        raise ServingError(f"rank_media: the canary's score is {score}, expected a probability")
    return score


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("expected one argument, HOST:PORT of the server's gRPC endpoint")
    try:
        print(f"score {canary(sys.argv[1]):.4f}")
    except ServingError as failure:
        sys.exit(f"error: {failure}")
