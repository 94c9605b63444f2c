"""`sightline data generate`: a product-like catalogue with images, videos and a log of impressions."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from catalogue.attributes import (
    COLOURS,
    COUNTS,
    MOTIONS,
    OBJECTS,
    PATTERNS,
    SETTINGS,
    SIZES,
    Attributes,
    held_out_pairs,
)
from catalogue.render import render
from catalogue.simulate import DAY, SECOND, LogConfig, simulate_log
from sightline.errors import ConfigError
from sightline.schema import write_dataset

START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 60
CUT_DAY = 48  # training ends here; what was created later is cold
BORN_BEFORE_START = 0.55  # share of items older than the log
HELD_OUT_SHARE = 0.4  # of the items created after the cut


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Size of the generated data set. The defaults are the demo's."""

    items: int = 9000
    users: int = 1200
    sessions_per_user: int = 32
    video_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("items", 100), ("users", 1), ("sessions_per_user", 1), ("seed", 0)):
            if getattr(self, name) < least:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} is {getattr(self, name)}; expected at least {least}")
        if not 0 <= self.video_share <= 1:
            raise ConfigError(f"--video-share is {self.video_share}; expected a share from 0 to 1")


def generate(out: Path, config: SyntheticConfig) -> dict[str, Any]:
    """Write a data set to `out`; the same config always gives the same bytes.

    Returns:
        The record that also lands in `dataset.json`, with the Bayes-optimal AUC of the log: over all rows
        after the cut and over those of cold items (created after the cut).
    """
    created_at, items, held_out = _catalogue(config)
    media = _render_all(items, config.seed)
    table = pa.table(
        {
            "item_id": pa.array(range(1, len(items) + 1), pa.int64()),
            "media": pa.array(media, pa.binary()),
            "media_uri": pa.nulls(len(items), pa.string()),
            "media_type": pa.array(["video" if item.motion else "image" for item in items]),
            "created_at": pa.array(created_at, pa.timestamp("us", tz="UTC")),
            "text": pa.array([item.caption() for item in items]),
        }
    )
    log_config = LogConfig(
        users=config.users, sessions_per_user=config.sessions_per_user, start=START, days=DAYS
    )
    interactions, probability = simulate_log(items, created_at, log_config, config.seed)

    cut = _cut()
    time = interactions["timestamp"].cast(pa.int64()).to_numpy()
    label = interactions["label"].to_numpy()
    after = time >= cut
    cold = after & (created_at[interactions["item_id"].to_numpy() - 1] >= cut)
    record = {
        "name": "synthetic",
        "grammar": "product",
        **asdict(config),
        "log": asdict(log_config) | {"start": START.isoformat()},
        "train_until": (START + timedelta(days=CUT_DAY)).isoformat(),
        "held_out": sorted(map(list, held_out)),
        "rows": len(label),
        "click_rate": float(label.mean()),
        "auc_bayes": float(roc_auc_score(label[after], probability[after])),
        "auc_bayes_cold": float(roc_auc_score(label[cold], probability[cold])),
    }
    write_dataset(out, table, interactions, record)
    pq.write_table(pa.table({"probability": probability}), out / "oracle.parquet")
    return record


def _cut() -> int:
    return int((START + timedelta(days=CUT_DAY)).timestamp()) * SECOND


def _catalogue(
    config: SyntheticConfig,
) -> tuple[np.ndarray, list[Attributes], frozenset[tuple[str, str]]]:
    """Creation times (ascending), attributes, and the pairs that appear only after the cut."""
    rng = np.random.default_rng([config.seed, 0])
    held_out = held_out_pairs(config.seed)
    start = int(START.timestamp()) * SECOND
    old = rng.uniform(size=config.items) < BORN_BEFORE_START
    born = np.where(
        old,
        start - rng.integers(1, 120 * DAY, config.items),
        start + rng.integers(0, DAYS * DAY, config.items),
    )
    created_at = np.sort(born)
    seen = [(o, c) for o in OBJECTS for c in COLOURS if (o, c) not in held_out]
    unseen = sorted(held_out)
    items = []
    for time in created_at:
        pairs = unseen if time >= _cut() and rng.uniform() < HELD_OUT_SHARE else seen
        object_, colour = pairs[rng.integers(len(pairs))]
        items.append(
            Attributes(
                object=object_,
                colour=colour,
                pattern=PATTERNS[rng.integers(len(PATTERNS))],
                size=SIZES[rng.integers(len(SIZES))],
                count=COUNTS[rng.integers(len(COUNTS))],
                setting=SETTINGS[rng.integers(len(SETTINGS))],
                motion=MOTIONS[rng.integers(len(MOTIONS))] if rng.uniform() < config.video_share else None,
            )
        )
    return created_at, items, held_out


def _render_one(job: tuple[Attributes, int, int]) -> bytes:
    attributes, seed, index = job
    return render(attributes, np.random.default_rng([seed, 3, index]))


def _render_all(items: list[Attributes], seed: int) -> list[bytes]:
    jobs = [(item, seed, index) for index, item in enumerate(items)]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        done = pool.map(_render_one, jobs, chunksize=64)
        return list(tqdm(done, total=len(jobs), desc="render", unit="item", mininterval=1))
