"""What does it cost to search two versions of a gallery and merge, while items move from one to the other?

Question: is a merged search at most 1.1 × the two searches that it needs, and at least 0.9 × as fast as a single index
    of all items, at equal recall?
Regime: one process, one thread; generated vectors of length 1: a mixture of broad Gaussian clusters in 32 dimensions,
    seen through two random networks with noise of their own, the old version's and the new one's; random order of
    migration; the gallery as it is in the middle of a job, with hidden rows, fresh rows and snapshots where `compact`
    made them. Queries come in batches, and are new items.
Ways:
    gallery       `Gallery.search` of both versions: checks, log, both searches, rank merge
    two searches  plain FAISS, an index of exactly the items that are seen in each version; nothing is merged
    single        plain FAISS, one index of all items in the new version
    Peers at half of the way: hnswlib with two graphs, and the same gallery in Milvus Lite.
Method: efforts (nprobe, ef) are the smallest with which a way reaches the recall@10, against brute force; ways take
    turns, the first run is left out; medians of runs, and of the ratios within a run. Times are the processor's, of all
    threads of the process: what a query takes of a core, whatever else runs on the machine.
Memory: of a process of its own that opens the gallery and searches: anonymous, and mapped from files, which all
    readers on a machine share.

    python -m benchmarks.merge [--items 1000000]      the last line of stdout is JSON; exit code 1: a bound was broken
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.environment import describe
from benchmarks.program import add_options, run, say
from sightline.errors import ConfigError, GalleryError
from sightline.gallery import Gallery, GalleryVersion, open_gallery
from sightline.gallery.frozen import build, faiss
from sightline.gallery.merge import rank_merge

KINDS, FRACTIONS, K = ("flat", "ivf", "hnsw"), (0.25, 0.5, 0.75), 10
AIMS = {"merged_over_two_searches": ("at most", 1.1), "merged_over_single": ("at least", 0.9)}
HNSWLIB = "hnswlib==0.8.0"
_PEERS = Path(__file__).parents[1] / ".tools" / "merge"
_LATENT, _HIDDEN, _CLUSTERS, _NOISE = 32, 128, 500, (0.5, 0.2)
_CHUNK, _MOVED = 50_000, 2000
_HIGHEST = 4096  # effort
_USED = ("faiss-cpu", "lmdb", "numpy", "pymilvus", "milvus-lite")

Search = Callable[[slice, int], NDArray[np.int64]]
"""Queries and effort → ids [B, K]."""


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """What to measure. The defaults take about ten minutes on two cores."""

    items: int = 100_000
    dimension: int = 64
    queries: int = 512
    batch: int = 64
    runs: int = 9
    recall: float = 0.95
    out: Path = Path("artifacts/bench/merge")

    def __post_init__(self) -> None:
        for name, low, high in (
            ("items", 1000, 10**8), ("dimension", 2, 4096), ("queries", 1, 10**5), ("batch", 1, 4096),
            ("runs", 1, 1000), ("recall", 0.1, 0.999),
        ):  # fmt: skip
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected {low} to {high}")


@dataclass(frozen=True)
class Spaces:
    """Items [N, D] and queries [Q, D] in the old and in the new version."""

    items: tuple[NDArray[np.float32], NDArray[np.float32]]
    queries: tuple[NDArray[np.float32], NDArray[np.float32]]


def generate(options: MergeOptions) -> Spaces:
    """Seeded; queries are drawn as items are."""
    total = options.items + options.queries
    found = []
    for seed, noise in enumerate(_NOISE, 1):
        rng = np.random.default_rng(seed)
        first = rng.normal(size=(_LATENT, _HIDDEN)) / np.sqrt(_LATENT)
        second = rng.normal(size=(_HIDDEN, options.dimension))
        vectors = np.empty((total, options.dimension), np.float32)
        items = np.random.default_rng(0)
        centers = 0.7 * items.normal(size=(_CLUSTERS, _LATENT))
        for start in range(0, total, _CHUNK):
            size = min(_CHUNK, total - start)
            latent = centers[items.integers(0, _CLUSTERS, size)] + items.normal(size=(size, _LATENT))
            part = np.tanh((latent + noise * rng.normal(size=latent.shape)) @ first) @ second
            vectors[start : start + size] = part / np.linalg.norm(part, axis=1, keepdims=True)
        found.append(vectors)
    old, new = found
    return Spaces((old[: options.items], new[: options.items]), (old[options.items :], new[options.items :]))


def exact(spaces: Spaces, place: NDArray[np.int8]) -> NDArray[np.int64]:
    """The K nearest ids [Q, K] by brute force, each item in its version (0 or 1)."""
    lists = []
    for one, (items, queries) in enumerate(zip(spaces.items, spaces.queries, strict=True)):
        rows = np.flatnonzero(place == one)
        if len(rows) >= K:
            distances, nearest = faiss.knn(queries, np.ascontiguousarray(items[rows]), K)
            lists.append((rows[nearest], distances))
    return rank_merge(lists, K).ids


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the K nearest that were found."""
    return float((found[:, :, None] == truth[:, None, :]).any(2).mean())


@dataclass
class Way:
    """One way to search, at the smallest effort that is enough."""

    name: str
    search: Search
    truth: NDArray[np.int64]
    merged: Search | None = None
    """What its recall is taken from, where `search` leaves something out."""
    effort: int = 1
    recall: float = 0.0

    def tune(self, options: MergeOptions) -> None:
        """Double, then halve the interval."""
        everything = slice(0, options.queries)

        def reached(effort: int) -> bool:
            self.effort, self.recall = effort, recall((self.merged or self.search)(everything, effort), self.truth)
            return self.recall >= options.recall

        low, high = 0, 1
        while not reached(high):
            if high >= _HIGHEST:
                raise GalleryError(f"{self.name}: recall {self.recall:.3f} with effort {high}; --recall is too high")
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if reached(middle) else (middle, high)
        reached(high)

    def seconds(self, options: MergeOptions) -> float:
        """All queries once, batch by batch."""
        start = time.process_time()
        for first in range(0, options.queries, options.batch):
            self.search(slice(first, first + options.batch), self.effort)
        return time.process_time() - start


def measure(ways: Sequence[Way], options: MergeOptions) -> dict[str, dict[str, Any]]:
    """Way → microseconds per query, the median of runs in turns; `over`: of the first way's to its own, within runs."""
    for way in ways:
        way.tune(options)
    taken = np.empty((options.runs + 1, len(ways)))
    for turn, row in enumerate(taken):
        for place in np.roll(np.arange(len(ways)), turn).tolist():
            row[place] = ways[place].seconds(options)
    taken = taken[1:]
    scale = 1e6 / options.queries
    return {
        way.name: {
            "us": round(float(np.median(taken[:, place])) * scale, 2), "effort": way.effort,
            "recall": round(way.recall, 4), "over": round(float(np.median(taken[:, 0] / taken[:, place])), 3),
        }
        for place, way in enumerate(ways)
    }  # fmt: skip


def plain(version: GalleryVersion, vectors: NDArray[np.float32]) -> Callable[[NDArray[np.float32], int], Any]:
    """FAISS by itself: queries and effort → distances and rows [B, K]."""
    vectors = np.ascontiguousarray(vectors)
    if version.index == "flat":
        index = faiss.IndexFlatL2(version.dimension)
        index.add(vectors)
        return lambda queries, effort: index.search(queries, K)
    index = build(version, vectors)
    if version.index == "ivf":
        return lambda queries, effort: index.search(
            queries, K, params=faiss.SearchParametersIVF(nprobe=min(effort, index.nlist))
        )
    return lambda queries, effort: index.search(queries, K, params=faiss.SearchParametersHNSW(efSearch=max(effort, K)))


def single(version: GalleryVersion, spaces: Spaces) -> Way:
    """One plain index of all items in the new version."""
    items, queries = spaces.items[1], spaces.queries[1]
    search, truth = plain(version, items), exact(spaces, np.ones(len(items), np.int8))
    return Way("single", lambda rows, effort: search(queries[rows], effort)[1], truth)


def two(version: GalleryVersion, spaces: Spaces, place: NDArray[np.int8], truth: NDArray[np.int64]) -> Way:
    """Two plain indices, of the items seen in each version; both with the same effort."""
    rows = [np.flatnonzero(place == one) for one in (0, 1)]
    searches = [plain(version, items[each]) for items, each in zip(spaces.items, rows, strict=True)]

    def search(some: slice, effort: int) -> Any:
        return [each(queries[some], effort) for each, queries in zip(searches, spaces.queries, strict=True)]

    def merged(some: slice, effort: int) -> NDArray[np.int64]:
        found = search(some, effort)
        return rank_merge([(each[ids], distances) for each, (distances, ids) in zip(rows, found, strict=True)], K).ids

    return Way("two searches", search, truth, merged)


def ours(name: str, gallery: Gallery, spaces: Spaces, truth: NDArray[np.int64]) -> Way:
    """The gallery itself."""
    old, new = spaces.queries

    def search(rows: slice, effort: int) -> NDArray[np.int64]:
        return gallery.search({"old": old[rows], "new": new[rows]}, K, effort=effort).ids

    return Way(name, search, truth)


def move(gallery: Gallery, spaces: Spaces, ids: NDArray[np.int64]) -> float:
    """Items to the new version as a job does it; seconds that compaction took of it."""
    seconds = 0.0
    for start in range(0, len(ids), _MOVED):
        part = ids[start : start + _MOVED]
        gallery.put(part, {"new": spaces.items[1][part]}, "new")
        began = time.perf_counter()
        gallery.compact()
        seconds += time.perf_counter() - began
    return seconds


def fill(gallery: Gallery, kind: str, spaces: Spaces) -> None:
    """All items in the old version."""
    for name in ("old", "new"):
        gallery.create(GalleryVersion(name=name, dimension=spaces.items[0].shape[1], index=kind))
    for start in range(0, len(spaces.items[0]), _CHUNK):
        part = spaces.items[0][start : start + _CHUNK]
        gallery.put(np.arange(start, start + len(part)), {"old": part}, "old")
    gallery.compact(force=True)


def memory(path: Path, spaces: Spaces) -> dict[str, float]:
    """MB (10^6 bytes) that a process needs to search the gallery: anonymous, mapped, and on disk."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_reader, args=(path, spaces.queries, there))
    child.start()
    there.close()
    found = here.recv()
    child.join()
    disk = {file.stat().st_ino: file.stat().st_blocks * 512 for file in path.rglob("*") if file.is_file()}
    return found | {"disk": round(sum(disk.values()) / 1e6, 1)}


def _reader(path: Path, queries: tuple[NDArray[np.float32], NDArray[np.float32]], answer: Connection) -> None:
    old, new = queries
    rank_merge([(np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32))], 1)
    before = _resident()
    began = time.perf_counter()
    with open_gallery(str(path), readonly=True) as gallery:
        gallery.search({"old": old[:1], "new": new[:1]}, K)
        started = time.perf_counter() - began
        for first in range(0, len(old), 64):
            gallery.search({"old": old[first : first + 64], "new": new[first : first + 64]}, K)
        after = _resident()
    answer.send(
        {name: round((after[name] - before[name]) / 1e6, 1) for name in after} | {"start_s": round(started, 3)}
    )


def _resident() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {name: int(fields[field].split()[0]) * 1024 for name, field in names.items()}


def hnswlib_ways(spaces: Spaces, place: NDArray[np.int8], truth: NDArray[np.int64]) -> list[Way]:
    """hnswlib with two graphs and our merge, and with a single one. Raises ImportError where it is not there."""
    sys.path.insert(0, str(_PEERS))
    try:
        import hnswlib
    finally:
        sys.path.remove(str(_PEERS))

    def graph(vectors: NDArray[np.float32], ids: NDArray[np.int64]) -> Any:
        index = hnswlib.Index(space="l2", dim=vectors.shape[1])
        index.init_index(max_elements=len(ids), M=16, ef_construction=80)
        index.add_items(vectors[ids], ids)
        return index

    def search(index: Any, queries: NDArray[np.float32], effort: int) -> Any:
        index.set_ef(max(effort, K))
        ids, distances = index.knn_query(queries, k=K, num_threads=1)
        return ids.astype(np.int64), distances

    parts = [graph(items, np.flatnonzero(place == one)) for one, items in enumerate(spaces.items)]
    whole = graph(spaces.items[1], np.arange(len(place)))

    def merged(rows: slice, effort: int) -> NDArray[np.int64]:
        pairs = zip(parts, spaces.queries, strict=True)
        return rank_merge([search(index, queries[rows], effort) for index, queries in pairs], K).ids

    return [
        Way("hnswlib, two graphs", merged, truth),
        Way("hnswlib, single", lambda rows, effort: search(whole, spaces.queries[1][rows], effort)[0],
            exact(spaces, np.ones(len(place), np.int8))),
    ]  # fmt: skip


def install_hnswlib() -> str | None:
    """Into `.tools/merge`, where it is not yet; it is compiled. Why it cannot be, or None."""
    if (_PEERS / "installed").exists():
        return None
    say(f"{HNSWLIB} is compiled into {_PEERS} (once)")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet",
               "--no-deps", "--upgrade", "--target", str(_PEERS), HNSWLIB]  # fmt: skip
    result = subprocess.run(command, text=True, capture_output=True, check=False)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line.lower()] or ["no output"]
        return f"pip failed: {lines[-1].strip()}"
    (_PEERS / "installed").write_text(HNSWLIB)
    return None


class Bench:
    """One run: every kind of index at every fraction, then the peers."""

    def __init__(self, options: MergeOptions) -> None:
        self.options = options
        self.skipped: list[str] = []

    def run(self) -> dict[str, Any]:
        began, record, options = time.monotonic(), describe(), self.options
        faiss.omp_set_num_threads(1)
        spaces = generate(options)
        order = np.random.default_rng(7).permutation(options.items)
        points: list[dict[str, Any]] = []
        peers: dict[str, dict[str, Any]] = {}
        with tempfile.TemporaryDirectory() as folder:
            for kind in KINDS:
                points += self._kind(Path(folder) / kind, kind, spaces, order)
            place, truth = _half(spaces, order)
            peers = self._peers(Path(folder), spaces, place, truth, order)
        worst = {
            name: {
                kind: (max if side == "at most" else min)(point[name] for point in points if point["index"] == kind)
                for kind in KINDS
            }
            for name, (side, _) in AIMS.items()
        }  # fmt: skip
        broken = [
            f"{kind}: {name} is {value}, expected {AIMS[name][0]} {AIMS[name][1]}"
            for name, kinds in worst.items() for kind, value in kinds.items()
            if (value > AIMS[name][1] if AIMS[name][0] == "at most" else value < AIMS[name][1])
        ]  # fmt: skip
        record["versions"] |= {name: version(name) for name in _USED}
        document = {
            "benchmark": "merge", **record, "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "items": options.items, "dimension": options.dimension, "queries": options.queries,
            "batch": options.batch, "runs": options.runs, "recall_wanted": options.recall,
            "merged_over_two_searches": max(worst["merged_over_two_searches"].values()),
            "merged_over_single": min(worst["merged_over_single"].values()),
            "worst_by_index": worst, "rank_merge_us": merge_us(options), "points": points, "peers": peers,
            "skipped": self.skipped, "broken": broken, "seconds": round(time.monotonic() - began, 1),
        }  # fmt: skip
        write_report(options.out, document)
        return document

    def _kind(self, path: Path, kind: str, spaces: Spaces, order: NDArray[np.int64]) -> list[dict[str, Any]]:
        options, points, done, compaction = self.options, [], 0, 0.0
        place = np.zeros(options.items, np.int8)
        whole = None
        with open_gallery(str(path)) as gallery:
            fill(gallery, kind, spaces)
            before = memory(path, spaces)
            shape = gallery.version("old")
            whole = single(shape, spaces)
            for fraction in FRACTIONS:
                end = round(fraction * options.items)
                compaction += move(gallery, spaces, order[done:end])
                place[order[done:end]], done = 1, end
                truth = exact(spaces, place)
                ways = [ours("gallery", gallery, spaces, truth), two(shape, spaces, place, truth), whole]
                found = measure(ways, options)
                points.append({
                    "index": kind, "fraction": fraction, "ways": found,
                    "merged_over_two_searches": found["two searches"]["over"],
                    "merged_over_single": round(1 / found["single"]["over"], 3),
                    "memory_mb": memory(path, spaces), "memory_before_mb": before,
                    "compaction_s": round(compaction, 1), "rows": gallery.describe()["versions"],
                })  # fmt: skip
                say(line(points[-1]))
        return points

    def _peers(
        self, folder: Path, spaces: Spaces, place: NDArray[np.int8], truth: NDArray[np.int64], order: NDArray[np.int64]
    ) -> dict[str, dict[str, Any]]:
        options = self.options
        found: dict[str, dict[str, Any]] = {}
        try:
            if reason := install_hnswlib():
                raise ImportError(reason)
            found |= measure(hnswlib_ways(spaces, place, truth), options)
        except ImportError as error:
            self.skipped.append(f"hnswlib: {error}")
        few = replace(options, runs=min(2, options.runs), queries=min(64, options.queries))  # of milliseconds each
        for kind in ("flat", "hnsw"):
            try:
                with open_gallery(str(folder / f"{kind}.db")) as gallery:
                    fill(gallery, kind, spaces)
                    move(gallery, spaces, order[: round(0.5 * options.items)])
                    some = Spaces(spaces.items, (spaces.queries[0][: few.queries], spaces.queries[1][: few.queries]))
                    way = ours(f"Milvus Lite, {kind}", gallery, some, truth[: few.queries])
                    gallery.compact(force=True)
                    way.seconds(few)  # which makes it build its indices
                    found |= measure([way], few)
            except GalleryError as error:
                self.skipped.append(f"Milvus Lite, {kind}: {error}")
        for name, each in found.items():
            say(f"{name}: {each['us']:,.1f} µs per query, recall {each['recall']:.3f} at effort {each['effort']}")
        for reason in self.skipped:
            say(f"left out: {reason}")
        return found


def _half(spaces: Spaces, order: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.int64]]:
    place = np.zeros(len(order), np.int8)
    place[order[: round(0.5 * len(order))]] = 1
    return place, exact(spaces, place)


def merge_us(options: MergeOptions) -> float:
    """Microseconds per query of the rank merge alone: two lists of K."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, options.items, (2, options.batch, K))
    distances = np.sort(rng.random((2, options.batch, K)).astype(np.float32), axis=2)
    lists = list(zip(ids, distances, strict=True))
    taken = []
    for _ in range(200):
        start = time.perf_counter()
        rank_merge(lists, K)
        taken.append(time.perf_counter() - start)
    return round(float(np.median(taken)) * 1e6 / options.batch, 3)


def line(point: dict[str, Any]) -> str:
    """One fraction of one index, for people."""
    ways = ", ".join(
        f"{name} {each['us']:,.1f} µs (recall {each['recall']:.3f}, effort {each['effort']})"
        for name, each in point["ways"].items()
    )
    return (
        f"{point['index']} at {point['fraction']}: {ways}; {point['merged_over_two_searches']:.2f} × the two searches' "
        f"time, {point['merged_over_single']:.2f} × the single index's throughput"
    )


def markdown(document: dict[str, Any]) -> str:
    """The report as a page."""
    hardware = document["hardware"]
    lines = [
        f"# Merged search over two versions: {document['items']:,} items, {document['dimension']} dimensions",
        "",
        f"One core of {hardware['cpu']}; batches of {document['batch']} queries, k = {K}, recall@{K} of every way at "
        f"least {document['recall_wanted']}; medians of {document['runs']} runs in turns, processor time. The rank "
        f"merge alone: {document['rank_merge_us']} µs per query.",
        "",
        "| index | moved | gallery µs | two searches µs | single µs | × two searches (≤ 1.1) | × single (≥ 0.9) | "
        "recall: gallery, two, single | anonymous + mapped MB (before) | disk MB (before) |",
        "|---|--:|--:|--:|--:|--:|--:|---|---|---|",
    ]
    for point in document["points"]:
        ways, now, before = point["ways"], point["memory_mb"], point["memory_before_mb"]
        lines.append(
            f"| {point['index']} | {point['fraction']:.0%} | "
            + " | ".join(f"{ways[name]['us']:,.1f}" for name in ("gallery", "two searches", "single"))
            + f" | {point['merged_over_two_searches']:.2f} | {point['merged_over_single']:.2f} | "
            + ", ".join(f"{ways[name]['recall']:.3f}" for name in ("gallery", "two searches", "single"))
            + f" | {now['anonymous']:,.0f} + {now['mapped']:,.0f}"
            + f" ({before['anonymous']:,.0f} + {before['mapped']:,.0f}) | {now['disk']:,.0f} ({before['disk']:,.0f}) |"
        )
    lines += ["", "Peers, half of the items moved:", ""]
    lines += ["| way | µs per query | recall | effort |", "|---|--:|--:|--:|"]
    for name, each in document["peers"].items():
        lines.append(f"| {name} | {each['us']:,.1f} | {each['recall']:.3f} | {each['effort']} |")
    lines += [f"\nLeft out: {reason}" for reason in document["skipped"]]
    lines += [f"\nBelow the aim: {reason}" for reason in document["broken"]]
    versions = ", ".join(f"{name} {number}" for name, number in document["versions"].items())
    lines += ["", f"Commit {document['commit']}, `{document['command']}`, {document['at']}; {versions}."]
    return "\n".join(lines) + "\n"


def write_report(folder: Path, document: dict[str, Any]) -> None:
    """report.json and report.md, complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.json", json.dumps(document, indent=1) + "\n"), ("report.md", markdown(document))):
        unfinished = folder / f".{name}"
        unfinished.write_text(text)
        unfinished.replace(folder / name)


def parse(argv: Sequence[str] | None) -> MergeOptions:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merge", description=(__doc__ or "").partition("\n")[0])
    defaults = MergeOptions()
    add_options(parser, defaults, {
        "items": "in the gallery",
        "dimension": "of both versions",
        "queries": "per run",
        "batch": "queries per search",
        "runs": "counted ones",
        "recall": "that every way has to reach",
        "out": "folder for the report",
    })  # fmt: skip
    return MergeOptions(**vars(parser.parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    return run("merge", __doc__, lambda: Bench(parse(argv)).run())


if __name__ == "__main__":
    sys.exit(main())
