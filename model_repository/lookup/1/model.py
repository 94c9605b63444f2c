"""User and item ids → rows of the ranker's tables, and the user's profile at the time of training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray


class Table:
    """A Parquet file whose first column is a sorted key; row 0 has key 0 and answers for unknown keys."""

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path).combine_chunks()
        key, *rest = table.column_names
        self.keys: NDArray[np.int64] = table.column(key).to_numpy()
        if len(self.keys) == 0 or self.keys[0] != 0 or (np.diff(self.keys) <= 0).any():
            raise ValueError(
                f"{path}: expected {key} in ascending order, starting with 0 (the row of unknown ids)"
            )
        self.columns = {name: self._values(table.column(name)) for name in rest}

    @staticmethod
    def _values(column: Any) -> NDArray[Any]:
        """Numbers → [rows]; lists of one length → [rows, length]."""
        if not hasattr(column.type, "value_type"):
            return column.to_numpy()
        chunk = column.chunk(0)
        return chunk.flatten().to_numpy().reshape(len(chunk), -1)

    def rows(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of the keys [N], 0 where a key is unknown."""
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, found, 0)


class TritonPythonModel:
    """Reads `users.parquet` and `items.parquet` of its version folder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load both tables into memory."""
        folder = Path(args["model_repository"], args["model_version"])
        self.users, self.items = Table(folder / "users.parquet"), Table(folder / "items.parquet")

    def execute(self, requests: list[Any]) -> list[Any]:
        """USER_ID, ITEM_ID INT64 [rows, 1] → the rows' indices and profiles."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        def ids(name: str) -> NDArray[np.int64]:
            return pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0]

        user, item = self.users.rows(ids("USER_ID")), self.items.rows(ids("ITEM_ID"))
        columns = self.users.columns
        outputs = {
            "USER_INDEX": columns["user_index"][user][:, None],
            "ITEM_INDEX": self.items.columns["item_index"][item][:, None],
            "PROFILE_TOKENS": columns["profile_tokens"][user],
            "PROFILE_WEIGHTS": columns["profile_weights"][user].astype(np.float32),
            "PROFILE_NEGATIVE_TOKENS": columns["profile_negative_tokens"][user],
            "PROFILE_NEGATIVE_WEIGHTS": columns["profile_negative_weights"][user].astype(np.float32),
            "DENSE": columns["dense"][user].astype(np.float32),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
