"""A ranker's tables of users and items: id → what the exported graphs read. One code for server and explanations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

__all__ = ["Lookup"]


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
            return np.asarray(column.to_numpy())
        chunk = column.chunk(0)
        return np.asarray(chunk.flatten().to_numpy()).reshape(len(chunk), -1)

    def rows(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers of the keys [N], 0 where a key is unknown."""
        found = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[found] == keys, found, 0)


class Lookup:
    """`users.parquet` and `items.parquet` of a folder.

    Raises:
        ValueError: a table is not in ascending order of its key, or lacks the row of unknown ids.
    """

    def __init__(self, folder: Path) -> None:
        self.users, self.items = Table(folder / "users.parquet"), Table(folder / "items.parquet")

    def __call__(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """ids [N] each → tensors of the Triton contract with N rows; an unknown id gives the row of id 0."""
        user, item = self.users.rows(users), self.items.rows(items)
        columns = self.users.columns
        found = {
            "USER_INDEX": columns["user_index"][user][:, None],
            "ITEM_INDEX": self.items.columns["item_index"][item][:, None],
        }
        for side in ("PROFILE", "PROFILE_NEGATIVE"):
            found[f"{side}_TOKENS"] = columns[f"{side}_TOKENS".lower()][user]
            found[f"{side}_WEIGHTS"] = columns[f"{side}_WEIGHTS".lower()][user].astype(np.float32)
        return found | {"DENSE": columns["dense"][user].astype(np.float32)}
