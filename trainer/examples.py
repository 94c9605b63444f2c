"""Interactions + captions → training examples, in one streaming pass in time order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from sightline.errors import DataError
from sightline.profile import DENSE, UserProfiles
from sightline.schema import CONTEXT_PREFIX, context_columns, stream_interactions
from trainer.splits import TRAIN, Rows

BATCH_ROWS = 16384
GROUP_ROWS = 4096  # of a row group of examples: the least that a process reads


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Ids that occur in training, ascending; index 1 + position, 0 for everything else."""

    ids: np.ndarray

    def index(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n] ids → int64 [n] indices."""
        at = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[at] == ids, at + 1, 0)

    @property
    def rows(self) -> int:
        return len(self.ids) + 1


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What is known of a data set's columns: context names with cardinalities, the two id vocabularies, and the mean
    strength of the events."""

    context: dict[str, int]
    users: Vocabulary
    items: Vocabulary
    met: np.ndarray  # int64 ids of all items of rows that may be fitted on; the others are cold
    mean_strength: float

    @classmethod
    def of(cls, interactions: pa.Table, split: Rows) -> Columns:
        """All from training rows: a table row that no training row has would stay as it was drawn, and early stopping
        would look at it. Larger values of context are clipped.
        """
        time = np.asarray(interactions["timestamp"].cast(pa.int64()).to_numpy())
        rows = split.assign(0, time)
        train = interactions.filter(pa.array(rows.part == TRAIN))
        met = np.unique(interactions["item_id"].to_numpy()[rows.fitted])
        context = {
            name.removeprefix(CONTEXT_PREFIX): int(pc.max(train[name]).as_py()) + 1
            for name in context_columns(interactions)
        }
        if not context:
            raise DataError(
                f"interactions.parquet: expected at least one {CONTEXT_PREFIX}<name> column, got "
                f"{interactions.column_names}; add one, as {CONTEXT_PREFIX}hour, or use `sightline data import`"
            )
        users, items = (
            Vocabulary(ids=np.sort(pc.unique(train[column]).to_numpy())) for column in ("user_id", "item_id")
        )
        mean = float(np.mean(strengths(train)))
        return cls(context=context, users=users, items=items, met=met, mean_strength=mean)


def strengths(rows: pa.Table | pa.RecordBatch) -> np.ndarray:
    """float64 [rows]: how the user took it, −1 … 1; where the log does not say, 2 · label − 1."""
    logged = "strength" in rows.schema.names
    return (rows["strength"] if logged else pc.subtract(pc.multiply(rows["label"], 2), 1)).to_numpy().astype(np.float64)


def context_of(batch: pa.RecordBatch, columns: Columns) -> np.ndarray:
    """int64 [rows, C]: the logged context columns, each clipped to what training saw."""
    values = [batch[CONTEXT_PREFIX + name].to_numpy() for name in columns.context]
    return np.stack(
        [np.clip(v, 0, n - 1) for v, n in zip(values, columns.context.values(), strict=True)], 1
    ).astype(np.int64)


def write_examples(
    data: Path,
    out: Path,
    columns: Columns,
    split: Rows,
    item_tokens: dict[int, np.ndarray],
    profiles: UserProfiles,
    history_tokens: dict[int, np.ndarray] | None = None,
) -> None:
    """Write `examples.parquet`: one row per interaction, with the user's profile as it was just before it.

    Labels that `split` hides are written as NaN.

    Args:
        item_tokens: item_id → int64 [L]; items without a caption are absent.
        history_tokens: the same for items in histories, where they are others.
        profiles: empty; afterwards it holds every user's state at the end of the log.
    """
    nothing = np.zeros(0, dtype=np.int64)
    remembered = item_tokens if history_tokens is None else history_tokens
    start = 0
    length = profiles.config.length
    part = out.with_suffix(".part")
    writer: pq.ParquetWriter | None = None
    last = np.iinfo(np.int64).min
    pending: list[tuple[int, np.ndarray, float]] = []
    progress = tqdm(desc="examples", unit="row", mininterval=1)
    try:
        for batch in stream_interactions(data, BATCH_ROWS):
            time = batch["timestamp"].cast(pa.int64()).to_numpy()
            if (np.diff(time) < 0).any() or time[0] < last:
                raise DataError(
                    f"{data}/interactions.parquet: expected rows in time order; sort them by timestamp"
                )
            users, items, labels = (batch[c].to_numpy() for c in ("user_id", "item_id", "label"))
            tokens, negative_tokens = (np.zeros((len(users), length), np.int32) for _ in range(2))
            weights, negative_weights = (np.zeros((len(users), length), np.float32) for _ in range(2))
            dense = np.zeros((len(users), len(DENSE)), np.float32)
            rows = split.assign(start, time)
            start += len(time)
            for row, (now, user, item, strength) in enumerate(
                zip(time.tolist(), users.tolist(), items.tolist(), strengths(batch).tolist(), strict=True)
            ):
                if now > last:  # events of one instant do not see each other
                    for event in pending:
                        profiles.observe(event[0], event[1], strength=event[2])
                    pending, last = [], now
                profile = profiles.read(user)
                tokens[row], weights[row], dense[row] = profile.tokens, profile.weights, profile.dense
                negative_tokens[row], negative_weights[row] = profile.negative_tokens, profile.negative_weights
                if rows.history[row]:
                    pending.append((user, remembered.get(item, nothing), strength))
            table = pa.table(
                {
                    "user_id": users,
                    "item_id": items,
                    "label": np.where(rows.hidden, np.float32("nan"), labels.astype(np.float32)),
                    "part": rows.part,
                    "user_index": columns.users.index(users),
                    "item_index": columns.items.index(items),
                    "context": _fixed(context_of(batch, columns)),
                    "profile_tokens": _fixed(tokens),
                    "profile_weights": _fixed(weights),
                    "profile_negative_tokens": _fixed(negative_tokens),
                    "profile_negative_weights": _fixed(negative_weights),
                    "dense": _fixed(dense),
                }
            )
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table, row_group_size=GROUP_ROWS)
            progress.update(len(users))
        for event in pending:
            profiles.observe(event[0], event[1], strength=event[2])
    finally:
        progress.close()
        if writer:
            writer.close()
    part.replace(out)


def _fixed(values: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Dense arrays of B examples; token arrays are padded with 0. One process's part of a batch of all processes."""

    user_index: np.ndarray  # int64 [B]
    item_index: np.ndarray  # int64 [B]
    context: np.ndarray  # int64 [B, C]
    item_tokens: np.ndarray  # int64 [B, L]
    profile_tokens: np.ndarray  # int64 [B, K]
    profile_weights: np.ndarray  # FP32 [B, K]
    profile_negative_tokens: np.ndarray  # int64 [B, K]
    profile_negative_weights: np.ndarray  # FP32 [B, K]
    dense: np.ndarray  # FP32 [B, n]
    item_vector: np.ndarray  # FP32 [B, V]
    label: np.ndarray  # FP32 [B], or [B, tasks] where NaN says that a task's label is not known
    user_id: np.ndarray  # int64 [B]
    item_id: np.ndarray  # int64 [B]
    place: np.ndarray  # int64 [B], number of the row in the batch of all processes
    rows: int  # of the batch of all processes


# Arrays by item id: ids int64 [n] ascending, and a row for each [n, …].
ItemTable = tuple[np.ndarray, np.ndarray]


def stream_examples(
    path: Path,
    parts: Sequence[int],
    token_table: ItemTable,
    batch_size: int,
    shuffle: np.random.Generator | None = None,
    buffer_rows: int = 131_072,
    vectors: ItemTable | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Stream batches; with `shuffle`, row groups come in random order and rows are mixed within a buffer.

    Batches are those of one process, whatever the number of processes: each is the union of its parts. The row groups
    of a buffer are dealt to the processes, and a process reads its own ones and `part` of all. All get as many parts,
    and equally long ones: what is missing is filled with rows of zeros whose label is not known (NaN).

    Args:
        token_table: items' tokens, int64 [n, L]; items that are not in it get zeros.
        vectors: items' dense content vectors, FP32 [n, V]; likewise. Without it V is 0.
        shard: number of this process, and how many there are; all give the same `shuffle`.
    """
    rank, ranks = shard
    with pq.ParquetFile(path) as file:
        ends = np.cumsum([file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)])
        wanted = np.split(np.isin(file.read(columns=["part"])["part"].to_numpy(), parts), ends[:-1])
        counts = np.array([rows.sum() for rows in wanted])
        groups = np.arange(len(ends))
        if shuffle is not None:
            shuffle.shuffle(groups)
        for block in _blocks(groups, counts, buffer_rows):
            owners = _deal(counts[block], ranks)
            mine = block[owners == rank].tolist()
            rows = np.concatenate([np.zeros(0, bool), *(wanted[group] for group in mine)])
            table = file.read_row_groups(mine)
            table = (table if rows.all() else table.filter(pa.array(rows))).combine_chunks()
            columns = {name: _array(table[name]) for name in table.column_names if name != "part"}
            owner = np.repeat(owners, counts[block])
            row = np.cumsum(owner == rank) - 1  # in `table`
            order = np.arange(len(owner)) if shuffle is None else shuffle.permutation(len(owner))
            for start in range(0, len(order), batch_size):
                take = order[start : start + batch_size]
                place = np.flatnonzero(owner[take] == rank)
                missing = np.bincount(owner[take], minlength=ranks).max() - len(place)
                chosen = {name: _padded(values[row[take[place]]], missing) for name, values in columns.items()}
                chosen["label"][len(place) :] = np.nan
                for name in ("profile_tokens", "profile_negative_tokens"):
                    chosen[name] = chosen[name].astype(np.int64)
                items = chosen["item_id"]
                vector = np.zeros((len(items), 0), np.float32) if vectors is None else _rows_of(vectors, items)
                yield Batch(
                    item_tokens=_rows_of(token_table, items), item_vector=vector, place=_padded(place, missing),
                    rows=len(take), **chosen,
                )  # fmt: skip


def _blocks(groups: np.ndarray, counts: np.ndarray, rows: int) -> Iterator[np.ndarray]:
    """Runs of row groups that hold at least this many rows, but for the last run; groups without any are left out."""
    block: list[int] = []
    for group in groups[counts[groups] > 0].tolist():
        block.append(group)
        if counts[block].sum() >= rows:
            yield np.array(block)
            block = []
    if block:
        yield np.array(block)


def _deal(counts: np.ndarray, ranks: int) -> np.ndarray:
    """Owner of each row group, int64 [groups]: the largest first, to who has the fewest rows."""
    load, owners = np.zeros(ranks, np.int64), np.zeros(len(counts), np.int64)
    for group in np.argsort(-counts, kind="stable"):
        owners[group] = load.argmin()
        load[owners[group]] += counts[group]
    return owners


def _padded(values: np.ndarray, missing: int) -> np.ndarray:
    """`values` with rows of zeros behind it."""
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)]) if missing else values


def _rows_of(table: ItemTable, items: np.ndarray) -> np.ndarray:
    """Rows of the items, zeros for those that are not in the table."""
    ids, values = table
    at = np.minimum(np.searchsorted(ids, items), len(ids) - 1)
    return values[at] * (ids[at] == items)[:, None]


def _array(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        flat = column.combine_chunks().flatten() if column.num_chunks != 1 else column.chunk(0).flatten()
        return np.asarray(flat.to_numpy()).reshape(len(column), column.type.list_size)
    return np.asarray(column.to_numpy())
