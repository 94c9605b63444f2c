"""What a ranker brings into the feature store: items as captioned, users as they are at the end of the log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sightline.features import HISTORY, Versions
from sightline.profile import UserProfiles
from sightline.schema import read_interactions
from sightline.store import Items, UserRecord
from sightline.store.transfer import arrow_schema, item_table, user_table
from trainer.examples import ItemTable, strengths
from trainer.splits import micros

BATCH = 4096  # users per row group


def write_features(
    folder: Path, data: Path, versions: Versions, texts: Mapping[int, str], table: ItemTable, profiles: UserProfiles
) -> None:
    """Write `items.parquet` and `users.parquet`, from which `sightline store load` fills a store.

    Args:
        data: the data set, whose log has the users' last events.
        texts: item → caption. table: item ids int64 [n], tokens int64 [n, L].
        profiles: after the whole log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ids, tokens = table
    captions = [texts[item] for item in ids.tolist()]
    items = Items(ids=ids, tokens=tokens, captions=captions, media_hashes=[None] * len(ids))
    pq.write_table(item_table(versions.items, items), folder / "items.parquet", compression="zstd")

    events = read_interactions(data)
    of_user = events["user_id"].to_numpy()
    order = np.argsort(of_user, kind="stable")  # the log is in time order, and stays so within a user
    item, time, strength = events["item_id"].to_numpy(), micros(events["timestamp"]), strengths(events)
    users = np.array(sorted(profiles), np.int64)
    ends = np.searchsorted(of_user[order], users, side="right")
    starts = np.maximum(np.searchsorted(of_user[order], users), ends - HISTORY)
    with pq.ParquetWriter(folder / "users.parquet", arrow_schema(versions.users), compression="zstd") as writer:
        for first in range(0, len(users), BATCH):
            part = slice(first, first + BATCH)
            records = []
            for user, start, end in zip(users[part].tolist(), starts[part], ends[part], strict=True):
                rows = order[start:end]
                records.append(
                    UserRecord(
                        id=user, profile=profiles.read(user), state=profiles.dump(user), items=item[rows],
                        times=time[rows], strengths=strength[rows].astype(np.float32),
                    )
                )  # fmt: skip
            writer.write_table(user_table(versions.users, records))
