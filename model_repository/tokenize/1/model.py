"""Caption → categorical token ids, by the same code and specification as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sightline.tokens import TokenSpec


class TritonPythonModel:
    """Reads `token_spec.json` of its version folder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the specification; a damaged one refuses to load."""
        self.spec = TokenSpec.load(Path(args["model_repository"], args["model_version"], "token_spec.json"))

    def execute(self, requests: list[Any]) -> list[Any]:
        """CAPTION BYTES [rows, 1] → ITEM_TOKENS INT64 [rows, L], all requests in one pass."""
        captions = [
            pb_utils.get_input_tensor_by_name(request, "CAPTION").as_numpy().reshape(-1)
            for request in requests
        ]
        # A caption is UTF-8; bytes that are not become U+FFFD and so unknown tokens, not an error.
        tokens = self.spec.encode_batch([row.decode(errors="replace") for part in captions for row in part])
        ends = np.cumsum([len(part) for part in captions])
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("ITEM_TOKENS", np.ascontiguousarray(part))])
            for part in np.split(tokens, ends[:-1])
        ]
