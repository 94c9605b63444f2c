"""User and item ids → rows of the ranker's tables, and the user's profile from the feature store."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sightline.lookup import Lookup
from sightline.metrics import Metrics
from sightline.store import open_store


class TritonPythonModel:
    """Reads `ranker.json`, `users.parquet` and `items.parquet` of its version folder, and the store."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tables, open the store that SIGHTLINE_STORE names."""
        self.store = open_store(os.environ["SIGHTLINE_STORE"])
        self.lookup = Lookup(Path(args["model_repository"], args["model_version"]), self.store)
        self.metrics = Metrics(pb_utils, model="lookup")

    def finalize(self) -> None:
        """Close the store, send the last counts."""
        self.store.close()
        self.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """USER_ID, ITEM_ID INT64 [rows, 1] → the rows' indices and profiles."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        users, items = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0] for name in ("USER_ID", "ITEM_ID")
        )
        outputs = self.lookup(users, items)
        for kind, rows in (("user", outputs["USER_INDEX"]), ("item", outputs["ITEM_INDEX"])):
            known = np.count_nonzero(rows)  # row 0 is nobody's
            self.metrics.count("sightline_lookup_rows_total", known, kind=kind, result="known")
            self.metrics.count("sightline_lookup_rows_total", len(rows) - known, kind=kind, result="unknown")
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
