"""User and item ids → rows of the ranker's tables, and the user's profile at the time of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from sightline.lookup import Lookup


class TritonPythonModel:
    """Reads `users.parquet` and `items.parquet` of its version folder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load both tables into memory."""
        self.lookup = Lookup(Path(args["model_repository"], args["model_version"]))

    def execute(self, requests: list[Any]) -> list[Any]:
        """USER_ID, ITEM_ID INT64 [rows, 1] → the rows' indices and profiles."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        users, items = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0] for name in ("USER_ID", "ITEM_ID")
        )
        outputs = self.lookup(users, items)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
