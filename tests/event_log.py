"""A log of interactions for tests: moments that several events share, gaps, items seen again, items without tokens."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa

from sightline.events import Event
from sightline.schema import INTERACTIONS, ITEMS, TIMESTAMP, write_dataset

START = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000


def simulate(events: int, *, users: int, items: int, seed: int = 0, first_user: int = 1) -> list[Event]:
    """In the order of time; no user meets one item twice in one moment."""
    rng = np.random.default_rng(seed)
    gaps = rng.choice([0, 1, 10**6, 10**9, 86_400 * 10**6], events, p=[0.3, 0.1, 0.3, 0.29, 0.01])
    drawn = zip(
        (first_user + rng.zipf(1.3, events) % users).tolist(),
        rng.integers(1, items + 1, events).tolist(),
        np.where(rng.random(events) < 0.5, rng.choice([-1, 1], events), rng.uniform(-1, 1, events)),
        (START + np.cumsum(gaps)).tolist(),
        strict=True,
    )
    found: dict[tuple[int, int, int], Event] = {}
    for user, item, strength, time in drawn:
        event = Event(user_id=user, item_id=item, strength=float(np.float32(strength)), time=time)
        found.setdefault((user, item, time), event)
    return list(found.values())


def write_log(folder: Path, events: Sequence[Event]) -> pa.Table:
    """A data set with these interactions; returns them."""
    columns = {name: [getattr(event, name) for event in events] for name in ("user_id", "item_id", "time", "strength")}
    strength = np.array(columns["strength"], np.float32)
    log = pa.table(
        {
            "user_id": columns["user_id"],
            "item_id": columns["item_id"],
            "timestamp": pa.array(columns["time"], pa.int64()).cast(TIMESTAMP),
            "label": (strength > 0).astype(np.float32),
            "strength": strength,
            "context_hour": np.zeros(len(events), np.int32),
        }
    )
    log = log.cast(pa.schema([*INTERACTIONS, *(pa.field(name, log[name].type) for name in log.column_names[4:])]))
    ids = np.unique(columns["item_id"])
    created = pa.array([START - 1] * len(ids), pa.int64()).cast(TIMESTAMP)
    items = pa.table([pa.array(ids), *(pa.nulls(len(ids), kind) for kind in ITEMS.types[1:4]), created,
                      pa.nulls(len(ids), pa.string())], ITEMS)  # fmt: skip
    write_dataset(folder, items, log, {"name": "events"})
    return log
