"""`sightline demo`: the main job from end to end, on generated data or on a data set of your own."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from sightline.errors import DataError

if TYPE_CHECKING:
    from sightline_client import Ranked

console = Console(width=int(os.environ.get("COLUMNS", "110")))
RANKED_IMAGES, RANKED_VIDEOS = 24, 8
CALLS = 200  # of rank_items that the latency is taken from
CANDIDATES = 500


@dataclass
class _Clock:
    """Seconds per phase, printed as they pass."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        console.rule(phase, align="left")
        began = time.monotonic()
        yield
        self.seconds[phase] = round(time.monotonic() - began, 1)
        console.print(f"{phase}: {self.seconds[phase]} s", style="dim")


def run_demo(data: Path | None, root: Path, *, seed: int = 0, small: bool = False) -> dict[str, Any]:
    """Data → captioner → captions → ranker → release → server → a ranking.

    Finished phases are kept under `root` and not repeated; an interrupted one continues.

    Args:
        data: a folder in the MovieLens layout or in Sightline's own; None generates one.
        root: `artifacts/`.
        seed: of the generated data and of all training.
        small: a few steps of everything, to see that it works; its figures mean nothing.

    Returns:
        The figures, also in `<root>/demo/<name>/demo.json`.
    """
    from build.assemble import build_release
    from serving.triton import TritonServer
    from trainer.captioner import train_captioner
    from trainer.captioning import caption_items, caption_quality, read_captions, write_captions
    from trainer.ranker import bayes_auc, train_ranker

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    clock = _Clock()
    with clock("data"):
        folder = _data(data, root, seed, small)
        console.print(f"{folder}: {json.loads((folder / 'dataset.json').read_text())['name']}")
    run = root / "demo" / (folder.name if data is None else folder.name + "-small" * small)
    captioner_config, ranker_config = _configs(seed, small)
    with clock("captioner"):
        captioner = train_captioner(folder, run / "captioner", captioner_config)
    with clock("captions"):
        kept = run / f"captions-{captioner['version']}.parquet"
        if not kept.exists():
            write_captions(kept, caption_items(run / "captioner", folder), captioner["version"])
        captions, _ = read_captions(kept)
        quality = caption_quality(folder, captions, seed)
        console.print(_quality_table(quality))
    with clock("ranker"):
        ranker = train_ranker(folder, captions, captioner["version"], run / "ranker", ranker_config)
        bayes = bayes_auc(folder)
        console.print(_ranker_table(ranker, bayes))
    with clock("build"):
        release = build_release(
            run / "captioner",
            run / "ranker",
            root / "releases",
            progress=lambda line: console.print(line, style="dim"),
        )
    with (
        clock("serve"),
        TritonServer(
            root / "releases" / release, progress=lambda line: console.print(line, style="dim")
        ) as server,
    ):
        latency, stand_ins = _rank(server, folder, run), server.manifest.stand_ins
    figures = _figures(quality, ranker, bayes) | {
        "latency_ms": latency,
        "stand_ins": stand_ins,
        "captioned_items": len(captions),
        "release": release,
        "seconds": clock.seconds | {"total": round(sum(clock.seconds.values()), 1)},
        "data": str(folder),
        "cpus": os.cpu_count(),
    }
    (run / "demo.json").write_text(json.dumps(figures, indent=2))
    return figures


def _configs(seed: int, small: bool) -> tuple[Any, Any]:
    from trainer.captioner import CaptionerConfig
    from trainer.ranker import RankerConfig

    if small:
        return (
            CaptionerConfig(seed=seed, tower_steps=6, steps=6, batch=8, eval_every=3),
            RankerConfig(seed=seed, seeds=1, epochs=1, families=("word",)),
        )
    return CaptionerConfig(seed=seed), RankerConfig(seed=seed)


def _data(source: Path | None, root: Path, seed: int, small: bool) -> Path:
    from catalogue.synthetic import SyntheticConfig, generate

    if source is None:
        config = (
            SyntheticConfig(seed=seed, items=240, users=40, sessions_per_user=8)
            if small
            else SyntheticConfig(seed=seed)
        )
        name = "synthetic" if seed == 0 else f"synthetic-{seed}"
        folder = root / "data" / (name + "-small" * small)
        if not _holds(folder, {"seed": seed, "items": config.items, "users": config.users}):
            generate(folder, config)
        return folder
    return data_folder(source, root)


def data_folder(source: Path, root: Path) -> Path:
    """A data set in Sightline's layout: `source` itself, or what is imported under `root` from the MovieLens layout.

    Raises:
        DataError: neither layout.
    """
    from catalogue.importers import import_movielens

    if (source / "items.parquet").exists():
        return source
    if (source / "ratings.csv").exists():
        folder = root / "data" / source.resolve().name
        if not _holds(folder, {"grammar": "movie"}):
            import_movielens(source, folder)
        return folder
    raise DataError(
        f"{source}: expected ratings.csv (MovieLens layout) or items.parquet (Sightline layout), found neither; "
        "see `sightline data --help` for imports"
    )


def _holds(folder: Path, wanted: dict[str, Any]) -> bool:
    path = folder / "dataset.json"
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    return all(record.get(key) == value for key, value in wanted.items())


def _quality_table(quality: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Captions of items that the captioner never saw")
    for column in ("cut", "captions", "attribute F1", "exact match", "token F1", "recall per slot"):
        table.add_column(column)
    for name, values in quality.items():
        recall = list(values["recall"].items())
        per_slot = ", ".join(f"{slot} {value:.2f}" for slot, value in recall[:8]) + " …" * (len(recall) > 8)
        figures = [f"{values[key]:.3f}" for key in ("attribute_f1", "exact_match", "token_f1")]
        table.add_row(name, str(values["captions"]), *figures, per_slot)
    return table


def _ranker_table(record: dict[str, Any], bayes: dict[str, float] | None) -> Table:
    table = Table(title="Click prediction after the split (means over seeds)")
    for column in ("cut", "arm", "AUC", "GAUC", "NE", "calibration", "AUC lift (95 %)"):
        table.add_column(column)
    for cut, rows in record["cuts"].items():
        for arm, result in record["arms"].items():
            values = [f"{result['cuts'][cut][key]:.4f}" for key in ("auc", "gauc", "ne", "calibration")]
            lift = record["lift_percent"].get(arm, {}).get(cut)
            shown = f"{lift['lift']:+.2f} % [{lift['ci95'][0]:+.2f}, {lift['ci95'][1]:+.2f}]" if lift else ""
            table.add_row(f"{cut} ({rows})", arm, *values, shown)
        if bayes and cut in bayes:
            table.add_row(f"{cut} ({rows})", "Bayes-optimal", f"{bayes[cut]:.4f}")
    return table


def _figures(
    quality: dict[str, Any], ranker: dict[str, Any], bayes: dict[str, float] | None
) -> dict[str, Any]:
    """The headline figures; AUCs are those of cold items."""
    base, best = (ranker["arms"][arm]["cuts"] for arm in ("ids", "tokens"))
    cut = "cold" if "cold" in base else "all"
    lift = ranker["lift_percent"]["tokens"]
    figures = {
        "caption_attribute_f1": quality.get("combinations", quality.get("items", {})).get("attribute_f1"),
        "caption_attribute_f1_items": quality.get("items", {}).get("attribute_f1"),
        "cut": cut,
        "auc_ids": base[cut]["auc"],
        "auc_tokens": best[cut]["auc"],
        "lift_percent": lift[cut]["lift"],
        "lift_ci95": lift[cut]["ci95"],
        "auc_bayes": bayes[cut] if bayes else None,
        "auc": {
            arm: {c: v["auc"] for c, v in result["cuts"].items()} for arm, result in ranker["arms"].items()
        },
        "lifts": lift,
    }
    if bayes:
        figures["gap_closed"] = (best[cut]["auc"] - base[cut]["auc"]) / (bayes[cut] - base[cut]["auc"])
    return figures


def _rank(server: Any, data: Path, run: Path) -> dict[str, Any]:
    """Rank held-out media for the busiest user through the server; returns latencies in milliseconds."""
    from sightline_client import RankClient

    from sightline.schema import MediaReader, read_interactions, read_items

    items, interactions = read_items(data), read_interactions(data)
    newest = items.sort_by([("created_at", "descending")])
    chosen: list[int] = []
    for kind, wanted in (("image", RANKED_IMAGES), ("video", RANKED_VIDEOS)):
        rows = newest.filter(pc.equal(newest["media_type"], kind))
        chosen += rows["item_id"].to_pylist()[:wanted]
    reader = MediaReader(data, items)
    media = [found for item in chosen if (found := reader[item])]
    users, counts = np.unique(interactions["user_id"].to_numpy(), return_counts=True)
    user = int(users[counts.argmax()])
    candidates = items["item_id"].to_numpy()[-CANDIDATES:]
    before = server.statistics()
    with RankClient(server.url, timeout=60) as client:
        new, stored = (_milliseconds([partial(client.rank, user, [one]) for one in media]) for _ in range(2))
        after = server.statistics()
        ranked = client.rank(user, media)
        by_id = _milliseconds([partial(client.rank_items, user, candidates)] * CALLS)
    table = Table(title=f"{len(media)} held-out images and videos for user {user}")
    for column in ("rank", "item", "score", "caption", "from"):
        table.add_column(column)
    for place, one in enumerate(ranked, 1):
        score = "–" if one.score is None else f"{one.score:.3f}"
        table.add_row(str(place), str(chosen[one.index]), score, one.caption, one.source)
    console.print(table)
    picture = run / "ranking.png"
    draw_ranking(media, ranked, user, picture)
    console.print(f"picture: {picture}")

    def stage(name: str) -> float:
        (n0, ms0), (n1, ms1) = ((s[name]["inferences"], s[name]["total_ms"]) for s in (before, after))
        return round(float((n1 * ms1 - n0 * ms0) / max(1, n1 - n0)), 3)

    return {
        "rank_media": new,
        "rank_media_stored": stored,
        "rank_items": by_id | {"candidates": len(candidates)},
        "stages": {name: stage(name) for name in sorted(after) if name != "rank_media"},
    }


def _milliseconds(calls: Sequence[Callable[[], object]]) -> dict[str, Any]:
    """Percentiles of the time of one call, as the client sees it."""
    times = []
    for call in calls:
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    p50, p95 = np.percentile(times, [50, 95])
    return {"p50": round(float(p50), 2), "p95": round(float(p95), 2), "calls": len(calls), "seen_by": "client"}


def draw_ranking(media: list[bytes], ranked: list[Ranked], user: int, path: Path, shown: int = 16) -> None:
    """The best and the worst of a ranking as one picture."""
    import textwrap

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from sightline.media import MediaSpec, decode

    spec = MediaSpec(frames=1)
    half = shown // 2
    picked = ranked if len(ranked) <= shown else [*ranked[:half], *ranked[-half:]]
    columns = min(half, len(picked))
    rows = -(-len(picked) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.75 * columns, 2.5 * rows), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, one in zip(axes.flat, picked, strict=False):
        axis.imshow(decode(media[one.index], spec)[0])
        score = "rejected" if one.score is None else f"{one.score:.2f}"
        axis.set_title(f"#{ranked.index(one) + 1}   {score}", fontsize=9, fontweight="bold")
        axis.text(
            0.5,
            -0.06,
            textwrap.fill(one.caption, 22),
            transform=axis.transAxes,
            ha="center",
            va="top",
            fontsize=7,
        )
    figure.suptitle(
        f"Held-out images and videos ranked for user {user}: first and last, with the captions that were scored"
    )
    figure.tight_layout(h_pad=2.2)
    figure.savefig(path, dpi=110)
    plt.close(figure)
