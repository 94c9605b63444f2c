"""A generated catalogue, a ranker of the demo's shape with random weights, its store, its release, and requests.

    <folder>/captioner, ranker      what a release is built from
    <folder>/graphs                 embed, score, items and rank as ONNX, with the tables of ids
    <folder>/store                  LMDB with all items and users, fresh
    <folder>/releases               one published release, for Triton

What a ranker knows does not change how fast it is; its sizes do.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from benchmarks.hot.wire import Request
from benchmarks.hot.work import GRAPHS, STORE
from catalogue.attributes import SLOTS, Attributes
from sightline.features import FEATURES, HISTORY, Versions
from sightline.profile import DENSE, Profile, ProfileConfig
from sightline.store import Items, UserRecord, open_store
from sightline.store.transfer import item_table, load, user_table
from sightline.tokens import TokenSpec

CONTEXT = {"hour": 24, "position": 20}
ZIPF = 1.0  # weight of the item of rank r: r ** -ZIPF
REQUESTS = 512
_ROOT = Path(__file__).parents[2]
_MADE_FROM = ("build", "model_repository", "sightline", "trainer", "benchmarks/hot/data.py")
_LOOKS, _CHUNK = 20_000, 50_000
_UNTRAINED = "untrained"
_BATCH = 8192  # rows of one durable write


def prepare(
    folder: Path, items: int, users: int, progress: Callable[[str], None], *, with_release: bool = True
) -> dict[str, float]:
    """Make what is not there yet, or was made by other code; the seconds that it took, by step."""
    made, current = folder / "made.json", key(items, users)
    known = json.loads(made.read_text()) if made.exists() else {}
    if known.get("key") != current:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        known = {"key": current, "seconds": {}}
    for name, step in (("ranker", _ranker), ("graphs", _graphs), ("store", _store), ("release", _release)):
        if name in known["seconds"] or (name == "release" and not with_release):
            continue
        progress(f"data: {name} of {items:,} items and {users:,} users")
        began = time.monotonic()
        step(folder, items, users)
        known["seconds"][name] = round(time.monotonic() - began, 1)
        made.write_text(json.dumps(known))
    seconds: dict[str, float] = known["seconds"]
    return seconds


def requests(items: int, users: int, candidates: int, *, count: int = REQUESTS, seed: int = 0) -> list[Request]:
    """Users drawn evenly, and for each so many different items, drawn by Zipf's law."""
    rng = np.random.default_rng([seed, items, users])
    ids = rng.permutation(items) + 1  # by falling popularity: the popular ones lie scattered in the store
    heap = np.cumsum(np.arange(1, items + 1) ** -ZIPF)
    found = []
    for _ in range(count):
        ranks = np.zeros(0, np.int64)
        while len(ranks) < candidates:
            more = np.searchsorted(heap, rng.uniform(0, heap[-1], 4 * candidates))
            both = np.concatenate([ranks, more])
            _, first = np.unique(both, return_index=True)
            ranks = both[np.sort(first)]
        context = np.array([rng.integers(size) for size in CONTEXT.values()])
        found.append(Request(int(rng.integers(1, users + 1)), ids[ranks[:candidates]], context))
    return found


def release(folder: Path) -> Path:
    """The release for Triton."""
    from sightline.release import current

    return current(folder / "releases")


def key(items: int, users: int) -> str:
    """Changes when anything does that the data is made with."""
    digest = hashlib.sha256(f"{items} {users}".encode())
    for name in _MADE_FROM:
        path = _ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in (".py", ".pbtxt"):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _looks() -> list[str]:
    """Captions of random looks, in the demo's grammar."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_LOOKS):
        slots: dict[str, Any] = {slot: values[rng.integers(len(values))] for slot, values in SLOTS.items()}
        if rng.random() < 0.75:  # an image
            slots["motion"] = None
        found.append(Attributes(**slots).caption())
    return found


def _ranker(folder: Path, items: int, users: int) -> None:
    import torch

    from trainer.ranker import ARMS, RankerConfig
    from trainer.ranker_model import RankerShape, new_ranker

    out, config, looks = folder / "ranker", RankerConfig(), _looks()
    (out / FEATURES).mkdir(parents=True, exist_ok=True)
    spec = TokenSpec.fit(looks, families=config.families, length=config.token_length, rows=config.token_rows)
    shape = RankerShape(
        users=users + 1, items=items + 1, context=CONTEXT, token_rows=spec.rows, dense=len(DENSE), dim=config.dim,
        model=config.model, **dict.fromkeys(ARMS["tokens"], True),
    )  # fmt: skip
    torch.save(new_ranker(shape, seed=0).state_dict(), out / "model.pt")
    spec.save(out / "token_spec.json")
    document = {
        "version": _UNTRAINED, "token_spec_version": spec.version, "captioner_version": _UNTRAINED,
        "context": [{"name": name, "cardinality": size} for name, size in CONTEXT.items()],
        "token_length": spec.length, "profile": asdict(ProfileConfig(length=config.profile_length)),
        "dense": list(DENSE), "features": len(shape.features), "dim": shape.dim, "shape": shape.to_json(),
    }  # fmt: skip
    (out / "ranker.json").write_text(json.dumps(document))
    for name, count in (("user", users), ("item", items)):
        rows = np.arange(count + 1)
        pq.write_table(pa.table({f"{name}_id": rows, f"{name}_index": rows}), out / f"{name}s.parquet")
    versions = Versions.of(document)
    described, known = _items(spec, looks, items), _users(spec, config.profile_length, items, users)
    _write(out / FEATURES / "items.parquet", (item_table(versions.items, part) for part in described))
    _write(out / FEATURES / "users.parquet", (user_table(versions.users, part) for part in known))


def _write(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _items(spec: TokenSpec, looks: list[str], count: int) -> Iterator[Items]:
    rng, tokens = np.random.default_rng(1), spec.encode_batch(looks)
    for start in range(1, count + 1, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, count + 1))
        look = rng.integers(len(looks), size=len(ids))
        yield Items(ids=ids, tokens=tokens[look], captions=[looks[one] for one in look],
                    media_hashes=[None] * len(ids))  # fmt: skip


def _users(spec: TokenSpec, length: int, items: int, count: int) -> Iterator[list[UserRecord]]:
    """With full lists and histories: nothing is faster than for a busy user."""
    rng = np.random.default_rng(2)
    for start in range(1, count + 1, _CHUNK):
        ids = range(start, min(start + _CHUNK, count + 1))
        tokens = rng.permuted(np.tile(np.arange(1, spec.rows), (len(ids), 1)), axis=1)
        weights = -np.sort(-rng.uniform(0.01, 1, (2, len(ids), length)).astype(np.float32))
        dense = rng.normal(size=(len(ids), len(DENSE))).astype(np.float32)
        history = rng.integers(1, items + 1, (len(ids), HISTORY))
        strengths = rng.uniform(-1, 1, (len(ids), HISTORY)).astype(np.float32)
        times = np.arange(HISTORY) * 10**6
        yield [
            UserRecord(
                id=user, items=history[row], times=times, strengths=strengths[row],
                profile=Profile(
                    tokens=tokens[row, :length], weights=weights[0, row], dense=dense[row],
                    negative_tokens=tokens[row, length : 2 * length], negative_weights=weights[1, row],
                ),
            )
            for row, user in enumerate(ids)
        ]  # fmt: skip


def _graphs(folder: Path, items: int, users: int) -> None:
    from build.ranker_onnx import export_ranker

    export_ranker(folder / "ranker", folder / GRAPHS)
    for name in ("ranker.json", "users.parquet", "items.parquet"):
        shutil.copy(folder / "ranker" / name, folder / GRAPHS)


def _store(folder: Path, items: int, users: int) -> None:
    with open_store(str(folder / STORE)) as store:
        for name, total in (("items", items), ("users", users)):
            with tqdm(total=total, desc=f"store: {name}", unit="row", mininterval=2, leave=False) as bar:
                load(store, folder / "ranker" / FEATURES / f"{name}.parquet", bar.update, batch=_BATCH)


def _release(folder: Path, items: int, users: int) -> None:
    """With the demo's captioner, untrained: a release has one, and nothing here asks it."""
    from build.assemble import build_release
    from trainer.captioner_model import new_captioner, save_captioner, train_tokenizer

    tokenizer = train_tokenizer(_looks()[:500])
    save_captioner(new_captioner("tiny", tokenizer), tokenizer, folder / "captioner", version=_UNTRAINED, frames=4,
                   max_new_tokens=24)  # fmt: skip
    build_release(folder / "captioner", folder / "ranker", folder / "releases")
