"""Caption → categorical token ids, by the same code and specification as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from sightline.errors import TokenSpecError
from sightline.metrics import Metrics
from sightline.tokens import TokenSpec


class TritonPythonModel:
    """Reads `token_spec.json` of its version folder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the specification; a damaged one refuses to load."""
        self.spec = TokenSpec.load(Path(args["model_repository"], args["model_version"], "token_spec.json"))
        self.metrics = Metrics(pb_utils, model="tokenize")

    def finalize(self) -> None:
        """Send the last counts."""
        self.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """CAPTION BYTES [rows, 1] → ITEM_TOKENS INT64 [rows, L], all requests in one pass.

        A caption may be annotated (sightline/annotation.py). A request with malformed fields is refused alone.
        """
        captions = [
            pb_utils.get_input_tensor_by_name(request, "CAPTION").as_numpy().reshape(-1)
            for request in requests
        ]
        # A caption is UTF-8; bytes that are not become U+FFFD and so unknown tokens, not an error.
        texts = [[row.decode(errors="replace") for row in part] for part in captions]
        try:
            tokens = self.spec.encode_batch([text for part in texts for text in part])
        except TokenSpecError:
            return [self._alone(part) for part in texts]
        self.metrics.count("sightline_tokenize_captions_total", len(tokens), result="encoded")
        ends = np.cumsum([len(part) for part in texts])
        return [_response(part) for part in np.split(tokens, ends[:-1])]

    def _alone(self, texts: list[str]) -> Any:
        try:
            tokens = self.spec.encode_batch(texts)
            self.metrics.count("sightline_tokenize_captions_total", len(texts), result="encoded")
            return _response(tokens)
        except TokenSpecError as error:
            self.metrics.count("sightline_tokenize_captions_total", len(texts), result="refused")
            return pb_utils.InferenceResponse(
                error=pb_utils.TritonError(f"CAPTION: {error}", pb_utils.TritonError.INVALID_ARG)
            )


def _response(tokens: NDArray[np.int64]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("ITEM_TOKENS", np.ascontiguousarray(tokens))])
