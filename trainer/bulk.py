"""Caption a catalogue of any size: in blocks, so that a run may end at any moment and be continued.

    run.json                           what the blocks belong to: captioner, input, options
    blocks/00003-000002048.parquet     shard and first row; one file per finished block, there as a whole or not at all

A block is a range of rows of one Parquet file. It depends on nothing but these rows, its captioner and its options:
who captions it, in which order or how often, in one process or in many (trainer/bulk_ray.py), makes no difference.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from sightline.annotation import plain
from sightline.errors import ConfigError, DataError, MediaError
from sightline.features import item_schema
from sightline.item_records import CaptionedItem, Recorder
from sightline.media import MediaSpec, content_hash, decode, resize
from sightline.prompt import captioner_version
from sightline.schema import MediaReader, open_parquet
from sightline.store import open_store
from sightline.tokens import TokenSpec
from trainer.captioner_data import Pixels
from trainer.captioning import Captioner, write_caption_parts
from trainer.shards import Block, Catalogue, blocks_of

__all__ = ["BulkConfig", "Worker", "caption_catalogue"]

BLOCK = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("caption", pa.string()),
        pa.field("annotation", pa.string()),  # null where there is no media, or none that can be used
        pa.field("media_hash", pa.string()),
        pa.field("error", pa.string()),  # why the media cannot be used
    ]
)


@dataclass(frozen=True, kw_only=True)
class BulkConfig:
    """One run.

    Attributes:
        data: a data set, an items file, or a folder of such files (`Catalogue.find`).
        captioner: its folder.
        out: folder of the run; one that holds an unfinished run continues it.
        captions: file of all captions, as `trainer.captioning.write_captions` writes it.
        block: rows that are read, captioned and written together.
        batch: frames that the captioner sees at once.
        ray: where Ray is: `local` starts it here, anything else is for `ray.init(address=…)`; None: no Ray.
        workers: captioners on Ray.
        retry_failed: caption blocks again that have rows which failed.
        store, spec: feature store to fill and the token spec to do it with; both or none.
    """

    data: Path
    captioner: Path
    out: Path
    captions: Path
    block: int = 512
    batch: int = 128
    ray: str | None = None
    workers: int | None = None
    retry_failed: bool = False
    store: str | None = None
    spec: Path | None = None

    def __post_init__(self) -> None:
        for name in ("block", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name}: expected at least 1, got {getattr(self, name)}")
        if self.workers is not None and (self.workers < 1 or self.ray is None):
            raise ConfigError(f"--workers: expected at least 1, with --ray; got {self.workers} and --ray {self.ray}")
        if (self.store is None) != (self.spec is None):
            raise ConfigError(f"--store and --spec: expected both or none, got {self.store} and {self.spec}")


class Worker:
    """Captions blocks of one run with one captioner.

    Raises:
        ConfigError: the captioner is not of the run's version.
    """

    def __init__(self, config: BulkConfig, version: str) -> None:
        self._config, self._catalogue = config, Catalogue.find(config.data)
        self._captioner = Captioner(config.captioner)
        if self._captioner.version != version:
            raise ConfigError(
                f"--captioner {config.captioner}: expected version {version} on every worker, got "
                f"{self._captioner.version}; put the same folder there"
            )

    def __call__(self, block: Block) -> int:
        """Caption a block and write its file; returns its rows."""
        table, spec = self._catalogue.read(block), self._captioner.spec
        ids = table["item_id"].to_pylist()
        frames: dict[int, NDArray[np.uint8]] = {}
        hashes: dict[int, str] = {}
        errors: dict[int, str] = {}
        reader = MediaReader(self._catalogue.folder, table)
        for item in ids:
            try:
                if (data := reader[item]) is not None:
                    hashes[item] = content_hash(data)
                    frames[item] = resize(decode(data, spec), spec)
            except MediaError as error:
                errors[item] = error.reason
            except OSError as error:
                errors[item] = f"its file cannot be read: {error.strerror}"
            except DataError:
                errors[item] = f"its file is not there, or outside {self._catalogue.folder}"
        found = self._captioner.describe(_Decoded(frames, spec), self._config.batch, lambda count: None).annotations
        annotations = [found.get(item) for item in ids]
        captions = [None if text is None else plain(text) for text in annotations]
        rows = [ids, captions, annotations, list(map(hashes.get, ids)), list(map(errors.get, ids))]
        _write_whole(
            _blocks(self._config.out) / block.name,
            lambda part: pq.write_table(pa.table(rows, BLOCK.with_metadata({"failed": str(len(errors))})), part),
        )
        return block.rows


class _Decoded(Pixels):
    """Pixels of frames uint8 [n, H, W, 3] per item, decoded where refusals are written down."""

    def __init__(self, frames: Mapping[int, NDArray[np.uint8]], spec: MediaSpec) -> None:
        self.ids = list(frames)
        self.counts = np.array([len(one) for one in frames.values()], np.int64)
        self.starts = np.cumsum(self.counts) - self.counts
        self.frames = np.concatenate([np.zeros((0, *spec.size, 3), np.uint8), *frames.values()])
        self._mean = torch.tensor(spec.mean).view(3, 1, 1)
        self._std = torch.tensor(spec.std).view(3, 1, 1)


def caption_catalogue(config: BulkConfig) -> dict[str, Any]:
    """Caption what is not captioned yet, then make of all blocks what the rest of the project reads.

    Returns:
        captioner, items, captioned, without_media, failed, the commonest reasons, blocks and how many of them are new.

    Raises:
        ConfigError: the folder holds a run of another captioner, input or other options, or one that is going on.
        DataError: the catalogue breaks its layout, or none of its media could be used.
        StoreError, TokenSpecError: the store cannot be written, the file holds no token spec.
    """
    catalogue, version = Catalogue.find(config.data), captioner_version(config.captioner)
    with _recorder(config, version):  # a mistake there is better known before
        pass
    with _locked(config.out):
        shards = _same_run(config, catalogue, version)
        blocks = blocks_of(shards, config.block)
        todo = [block for block in blocks if not _finished(config, block)]
        total = sum(block.rows for block in blocks)
        done = total - sum(block.rows for block in todo)
        with tqdm(total=total, initial=done, desc="caption", unit="item", mininterval=1) as progress:
            for rows in _work(config, version, todo):
                progress.update(rows)
        counts: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        with _recorder(config, version) as record:
            parts = _captions(finished_blocks(config, blocks), counts, reasons, record)
            write_caption_parts(config.captions, parts, version)
    return {
        "captioner": version, "items": total, "captioned": counts["captioned"],
        "without_media": counts["without_media"], "failed": counts["failed"], "reasons": dict(reasons.most_common(5)),
        "blocks": len(blocks), "new_blocks": len(todo), "captions": str(config.captions),
    }  # fmt: skip


def finished_blocks(config: BulkConfig, blocks: Sequence[Block]) -> Iterator[pa.Table]:
    """What the blocks' files hold, in the catalogue's order."""
    for block in blocks:
        with open_parquet(_blocks(config.out) / block.name, "a finished block; run the same command again") as file:
            yield file.read()


def _work(config: BulkConfig, version: str, todo: Sequence[Block]) -> Iterator[int]:
    if config.ray is not None:
        from trainer.bulk_ray import caption_on_ray

        yield from caption_on_ray(config, version, todo)
    elif todo:
        yield from map(Worker(config, version), todo)


@contextmanager
def _recorder(config: BulkConfig, version: str) -> Iterator[Callable[[list[CaptionedItem]], object]]:
    """Writes captioned items to the store, if there is one."""
    if config.store is None or config.spec is None:
        yield lambda rows: None
        return
    spec = TokenSpec.load(config.spec)
    with open_store(config.store) as store:
        yield Recorder(store, item_schema(version, spec.version, spec.length), spec).write


def _captions(
    tables: Iterable[pa.Table], counts: Counter[str], reasons: Counter[str],
    record: Callable[[list[CaptionedItem]], object],
) -> Iterator[dict[int, str]]:  # fmt: skip
    """Item → annotated caption, table by table; counts what goes by. Raises DataError where all media failed."""
    for table in tables:
        good = table.filter(pc.is_valid(table["annotation"]))
        failed = table["error"].drop_null()
        counts.update(captioned=good.num_rows, failed=len(failed))
        counts["without_media"] += table.num_rows - good.num_rows - len(failed)
        reasons.update(failed.to_pylist())
        columns = (good[name].to_pylist() for name in ("item_id", "media_hash", "annotation"))
        rows = [CaptionedItem(*row) for row in zip(*columns, strict=True)]
        if rows:
            record(rows)
        yield {row.item_id: row.annotation for row in rows}
    if counts["failed"] and not counts["captioned"]:
        raise DataError(f"expected media that can be captioned, found none: {reasons.most_common(1)[0][0]}")


def _same_run(config: BulkConfig, catalogue: Catalogue, version: str) -> list[dict[str, Any]]:
    """The catalogue's shards; begins a run in an empty folder and refuses that of another."""
    path = config.out / "run.json"
    try:
        known = json.loads(path.read_text()) if path.exists() else None
        shards = catalogue.describe(known["input"]["shards"] if known else [])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: expected the JSON of a run: {error}; remove {config.out} to begin again") from error
    digest = hashlib.sha256("".join(f"{one['name']} {one['rows']} {one['sha256']}\n" for one in shards).encode())
    record: dict[str, Any] = {
        "captioner": version,
        "input": {"digest": digest.hexdigest(), "rows": sum(one["rows"] for one in shards), "shards": shards},
        "options": {"block": config.block, "batch": config.batch},
    }
    if known:
        ours, theirs = (
            {"captioner": one["captioner"], "input": one["input"]["digest"][:12], **one["options"]}
            for one in (record, known)
        )
        if wrong := [f"{name} {theirs.get(name)}, not {value}" for name, value in ours.items()
                     if theirs.get(name) != value]:  # fmt: skip
            raise ConfigError(
                f"--out {config.out}: holds a run with {', '.join(wrong)}; continue it with what it was begun with, "
                "give another folder, or remove this one to begin again"
            )
    if record != known:
        _write_whole(path, lambda part: part.write_text(json.dumps(record, indent=1)))
    return shards


def _finished(config: BulkConfig, block: Block) -> bool:
    path = _blocks(config.out) / block.name
    if not path.exists():
        return False
    try:
        with pq.ParquetFile(path) as file:
            failed = int(file.schema_arrow.metadata[b"failed"])
            return file.metadata.num_rows == block.rows and not (failed and config.retry_failed)
    except (OSError, pa.ArrowInvalid, KeyError, TypeError, ValueError):  # damaged: written again
        return False


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder is ours until the end of the process, however it ends; leftovers of earlier ones are removed."""
    _blocks(out).mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"--out {out}: a run is going on there; await its end or give another folder") from error
        for part in [*out.glob("*.part"), *_blocks(out).glob("*.part")]:
            part.unlink(missing_ok=True)
        yield


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Under its name a file is complete and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    write(part)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _blocks(out: Path) -> Path:
    return out / "blocks"
