"""Ids → what the ranker's graphs read: rows of its tables, and the user's profile in the feature store."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sightline.errors import StoreError
from sightline.features import Versions
from sightline.profile import Affinities, Profile, UserState
from sightline.store import FeatureStore, Status

__all__ = ["Complaint", "Index", "Lookup", "Tables", "tensors"]

_log = logging.getLogger(__name__)


class Index:
    """A Parquet file of two columns, an id and its row in a table of the ranker; id 0 is nobody, and has row 0.

    Raises:
        ValueError: the ids are not in ascending order, or do not begin with 0.
    """

    def __init__(self, path: Path) -> None:
        table = pq.read_table(path)
        key, value = table.column_names
        self.keys: NDArray[np.int64] = table.column(key).to_numpy()
        self.values: NDArray[np.int64] = table.column(value).to_numpy()
        if len(self.keys) == 0 or self.keys[0] != 0 or (np.diff(self.keys) <= 0).any():
            raise ValueError(f"{path}: expected {key} in ascending order, starting with 0 (the row of unknown ids)")

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the ids int64 [N], 0 where an id is unknown."""
        at = np.minimum(np.searchsorted(self.keys, ids), len(self.keys) - 1)
        return np.where(self.keys[at] == ids, self.values[at], 0)


def tensors(profile: Profile) -> dict[str, NDArray[Any]]:
    """A profile as the contract has it, with one row: PROFILE_… [1, K] and DENSE [1, n]."""
    return {
        "PROFILE_TOKENS": profile.tokens[None], "PROFILE_WEIGHTS": profile.weights[None],
        "PROFILE_NEGATIVE_TOKENS": profile.negative_tokens[None],
        "PROFILE_NEGATIVE_WEIGHTS": profile.negative_weights[None], "DENSE": profile.dense[None],
    }  # fmt: skip


class Complaint:
    """An error that may come with every request, and is logged once a second."""

    def __init__(self, log: logging.Logger) -> None:
        self._log, self._next = log, 0.0

    def __call__(self, message: str, *arguments: object) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 1
            self._log.error(message, *arguments)


class Tables:
    """`ranker.json`, `users.parquet` and `items.parquet` of a folder; `Index` and `Versions.read` say what is raised.

    Attributes:
        users, items: ids → rows of the ranker's tables.
        stranger: the profile of a user of whom nothing is known.
    """

    def __init__(self, folder: Path) -> None:
        self.versions = Versions.read(folder)
        self.users, self.items = Index(folder / "users.parquet"), Index(folder / "items.parquet")
        nothing = np.zeros(1, np.int64)
        self.stranger = Affinities(self.versions.profile, nothing, nothing.astype(np.float32)).read(UserState())


class Lookup(Tables):
    """Tables, and the feature store with the users' profiles.

    An unknown user has a stranger's profile; so has everybody while the store cannot be read, which is logged: a
    request is answered all the same.
    """

    def __init__(self, folder: Path, store: FeatureStore) -> None:
        super().__init__(folder)
        self._store, self._complain = store, Complaint(_log)
        store.register(self.versions.users)

    def profile(self, user: int) -> tuple[Profile, Status | None]:
        """The user's profile, and whether it is there; None: the store could not be read."""
        try:
            read = self._store.read_user(user, [self.versions.users.version])
        except StoreError as error:
            self._complain("user %d is ranked as a stranger: %s", user, error)
            return self.stranger, None
        return (read.record.profile if read.record else self.stranger), read.status

    def __call__(self, users: NDArray[np.int64], items: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """ids [N] each → tensors of the Triton contract with N rows; an unknown id gives the row of id 0."""
        different, place = np.unique(users, return_inverse=True)
        profiles = [tensors(self.profile(user)[0]) for user in different.tolist()]
        found = {name: np.concatenate([one[name] for one in profiles])[place] for name in profiles[0]}
        return found | {"USER_INDEX": self.users(users)[:, None], "ITEM_INDEX": self.items(items)[:, None]}
