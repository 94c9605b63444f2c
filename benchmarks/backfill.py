"""How good is retrieval while a gallery moves from an old model to a new one, method by method?

Why: re-embedding a gallery takes days; until it is done, every query meets items of both versions. Methods differ in
    what they do then: compare, merge, transform the query, the gallery, or both (docs/backfilling_methods.md).
Regime: an old model that knows the first half of the classes, a new and wider one that knows all; retrieval of images
    that neither was trained on. Generated images by default, so that this runs on a bare machine. The catalogue is the
    recommender's own case: content vectors of new items by two captioners, and clicks say what is relevant.
Method: backbones and transforms see training images only, and settings are chosen on a tenth of those; the test images
    are asked and found, the query itself left out. 22 fractions of the gallery from 0 to 1, plain mean over them; one
    backbone per seed and version, several orders each; intervals over queries.
Ends that a curve should keep: the old model alone at 0, the new model alone at 1.

    python -m benchmarks.backfill [--set cifar100 --data FOLDER]      the last line of stdout is JSON
    python -m benchmarks.backfill --set catalogue --data DATASET --captioners OLD,NEW

Each stage is kept under --out and found again: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.backfill_catalogue import NOTES, catalogue
from benchmarks.backfill_data import Asked, Case, ImageSet, class_folders, emoji, generated
from benchmarks.environment import describe
from benchmarks.program import add_options, run, say
from evaluation.backfilling import orders, ranks
from evaluation.backfilling.curves import METRICS, ends, evaluate, summarise
from evaluation.backfilling.orders import random_orders
from evaluation.backfilling.ranks import Outcomes, Relevance, Side
from evaluation.backfilling.report import markdown, write_report
from sightline.errors import ConfigError
from trainer.backfill import fit as fitting
from trainer.backfill import losses, methods, transforms
from trainer.backfill.backbone import ARCHITECTURES, BackboneConfig
from trainer.backfill.fit import Fit
from trainer.backfill.methods import GRIDS, METHODS, Embeddings, farthest_order, popularity_order
from trainer.backfill.versions import FIT, Version, train_versions

Array = NDArray[np.float32]
CATALOGUE = "catalogue"
OURS, BASELINE = "two-way", "FastFill"
ENDS = 0.001  # of mAP and CMC@1: how far a curve's end may lie below the model alone


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What one set is measured with."""

    old: BackboneConfig | None = None
    new: BackboneConfig | None = None
    """None where vectors are ready made."""
    fit: Fit


PROFILES = {
    "generated": Profile(
        old=BackboneConfig(width=8, dim=32, epochs=4), new=BackboneConfig(width=16, dim=64, epochs=8),
        fit=Fit(hidden=128, epochs=20, batch=256),
    ),
    "cifar100": Profile(
        old=BackboneConfig(width=24, dim=64, epochs=12), new=BackboneConfig(width=48, dim=128, epochs=15),
        fit=Fit(),
    ),
    "emoji": Profile(
        old=BackboneConfig(width=16, dim=32, epochs=30, batch=64, lr=0.1),
        new=BackboneConfig(width=32, dim=64, epochs=40, batch=64, lr=0.1),
        fit=Fit(hidden=128, epochs=40, batch=256),
    ),
    CATALOGUE: Profile(fit=Fit()),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class BackfillOptions:
    set: str = "generated"
    data: str = ""
    """Folder of the set: classes for cifar100, emoji.csv for emoji, a data set with clicks for the catalogue; the
    generated one needs none."""
    captioners: str = ""
    """Folders of the old and the new captioner, with a comma, for the catalogue alone."""
    seeds: int = 3
    """Backbones and transforms are trained anew for each; captioners are not."""
    orders: int = 3
    """Random ones, per seed."""
    arch: str = "small"
    threads: int = 1
    bf16: bool = False
    quick: bool = False
    """The generated set in a size that only tries the program out."""
    methods: str = ""
    """Some of them, with commas; all without."""
    out: Path = Path("artifacts/bench/backfill")

    def __post_init__(self) -> None:
        if self.set not in PROFILES:
            raise ConfigError(f"--set: got {self.set!r}, expected one of {', '.join(PROFILES)}")
        if (self.set == "generated") == bool(self.data):
            need = "no --data" if self.set == "generated" else "--data with its folder"
            raise ConfigError(f"--set {self.set}: got --data {self.data!r}, expected {need}")
        wanted, folders = (2, "OLD,NEW, folders") if self.set == CATALOGUE else (0, "none")
        if len(self.versions) != wanted:
            raise ConfigError(f"--set {self.set}: got --captioners {self.captioners!r}, expected {folders}")
        if self.quick and self.set != "generated":
            raise ConfigError(f"--quick: got --set {self.set}, expected the generated one")
        if self.arch not in ARCHITECTURES:
            raise ConfigError(f"--arch: got {self.arch!r}, expected one of {', '.join(ARCHITECTURES)}")
        if self.set == CATALOGUE and (self.bf16 or self.arch != "small"):
            raise ConfigError(f"--set {CATALOGUE}: got --arch or --bf16, expected neither; no backbone is trained")
        for name, low, high in (("seeds", 1, 100), ("orders", 1, 100), ("threads", 1, 1024)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"--{name}: got {getattr(self, name)}, expected {low} to {high}")
        if unknown := sorted(set(self.chosen) - set(METHODS)):
            raise ConfigError(f"--methods: {unknown[0]!r} is none of {'; '.join(METHODS)}")
        if self.set == CATALOGUE and "BCT" in self.chosen:
            raise ConfigError(f"--methods: got BCT, which --set {CATALOGUE} trains no compatible model for")

    @property
    def chosen(self) -> Sequence[str]:
        if self.methods:
            return [name.strip() for name in self.methods.split(";")]
        return [name for name in METHODS if name != "BCT" or self.set != CATALOGUE]

    @property
    def versions(self) -> Sequence[Path]:
        """Folders of the captioners, old and new."""
        return [Path(folder.strip()) for folder in self.captioners.split(",") if folder.strip()]


def measure(options: BackfillOptions) -> dict[str, Any]:
    """Train what is not there yet, measure, write the report; the document that the program prints."""
    torch.set_num_threads(options.threads)
    folder = options.out / (options.set + ("-quick" if options.quick else ""))
    runs = [_seed(options, seed, folder) for seed in range(options.seeds)]
    summaries: dict[str, dict[str, Any]] = {}
    alone = [run["alone"] for run in runs]
    for name in options.chosen:
        summaries[name] = {}
        for order in _order_names(runs[0]["outcomes"][name]):
            found = [
                (one, *end) for run, end in zip(runs, alone, strict=True)
                for label, one in run["outcomes"][name].items() if _kind(label) == order
            ]  # fmt: skip
            summaries[name][order] = summarise(*([each[i] for each in found] for i in range(3)))
    report = {
        "set": options.set, "seeds": options.seeds, "orders": options.orders, "quick": options.quick,
        "relative_gain": {
            name: {order: one["mAP"]["relative_gain"]["value"] for order, one in by_order.items()}
            for name, by_order in summaries.items()
        },
        "aims": _aims(summaries), "chosen": [run["settings"] for run in runs], "sizes": runs[0]["sizes"],
        "methods": summaries, **describe(),
    }  # fmt: skip
    if options.set == CATALOGUE:
        report |= {"reference": runs[0]["reference"], "notes": NOTES}
    for path in write_report(report, folder):
        say(f"wrote {path}")
    say(markdown(report))
    short = {key: value for key, value in report.items() if key != "methods"}
    areas = {
        name: {metric: round(one["random"][metric]["auc"]["value"], 5) for metric in METRICS}
        for name, one in summaries.items()
    }
    return short | {"auc": areas, "broken": []}


def _seed(options: BackfillOptions, seed: int, folder: Path) -> dict[str, Any]:
    """One seed's outcomes per method and order, and of the two models alone."""
    profile, case = _profile(options), _case(options, seed, folder)
    queries, gallery, relevance = case.test.queries, case.test.gallery, case.test.relevance
    found: dict[str, Any] = {"outcomes": {}, "settings": {}, "sizes": case.sizes, "reference": case.reference}
    shared_orders = random_orders(len(gallery.labels), range(options.orders)) | {
        "popularity": popularity_order(gallery.old, case.validation.queries.old),
        "farthest from class mean": farthest_order(gallery.old, case.fit),
    }
    found["alone"] = ends(
        Side(queries=queries.old, gallery=gallery.old), Side(queries=queries.new, gallery=gallery.new), relevance
    )
    for name in options.chosen:
        key = [case.keys[one] for one in ("old", "new", *(["bct"] if name == "BCT" else []))]
        stem = f"{name.replace(' ', '_')}-{_key([*key, asdict(profile), options.orders, seed])}"
        cached = folder / "outcomes" / f"{stem}.npz"
        if not cached.exists():
            settings, fit = _chosen(name, replace(profile.fit, seed=seed), case)
            say(f"seed {seed}: {name} {settings or ''}")
            method = METHODS[name](case.fit, case.head, fit)(queries, gallery)
            _keep(cached, evaluate({name: method}, relevance, shared_orders)[name], settings)
        found["outcomes"][name], found["settings"][name] = _kept(cached)
    return found


def _chosen(name: str, fit: Fit, case: Case) -> tuple[dict[str, Any], Fit]:
    """A method's settings: those of its grid with the largest mAP AUC on the validation part, in a random order."""
    if name not in GRIDS:
        return {}, fit
    asked = case.validation
    order = random_orders(len(asked.gallery.labels), [fit.seed])
    tried = []
    for settings in GRIDS[name]:
        one = replace(fit, **{"epochs": max(1, int(fit.epochs * case.trial)), **settings})
        method = METHODS[name](case.fit, case.head, one)(asked.queries, asked.gallery)
        found = evaluate({name: method}, asked.relevance, order)[name][f"random {fit.seed}"]
        tried.append((float(found.precision.mean()), settings))
    best = dict(max(tried, key=lambda pair: pair[0])[1])
    return best, replace(fit, **best)


def _case(options: BackfillOptions, seed: int, folder: Path) -> Case:
    if options.set == CATALOGUE:
        return catalogue(Path(options.data), options.versions, seed, folder / "vectors")
    profile, images = _profile(options), _images(options, seed)
    assert profile.old
    assert profile.new
    shared: dict[str, Any] = {"arch": options.arch, "bf16": options.bf16, "seed": seed}
    versions = train_versions(
        images.parts, replace(profile.old, classes=images.classes // 2, **shared),
        replace(profile.new, classes=images.classes, **shared), folder / "backbones",
        compatible="BCT" in options.chosen, say=say,
    )  # fmt: skip
    parts = {part: _embeddings(versions, part, one.labels) for part, one in images.parts.items()}

    def asked(part: str) -> Asked:
        queries, gallery = (parts[name] for name in images.names(part))
        return Asked(queries=queries, gallery=gallery, relevance=_relevance(queries, gallery))

    return Case(
        fit=parts[FIT], validation=asked("validation"), test=asked("test"), head=versions["new"].head,
        keys={name: one.key for name, one in versions.items()},
        sizes={part: len(one) for part, one in images.parts.items()} | {"classes": images.classes},
    )  # fmt: skip


def _images(options: BackfillOptions, seed: int) -> ImageSet:
    if options.set == "generated":
        return generated(*((8, 30, 12, 24) if options.quick else (60, 60, 30, 32)))
    return (class_folders if options.set == "cifar100" else emoji)(Path(options.data), seed)


def _profile(options: BackfillOptions) -> Profile:
    profile = PROFILES[options.set]
    if not options.quick:
        return profile
    assert profile.old
    assert profile.new
    small: dict[str, Any] = {"epochs": 2, "batch": 32, "width": 4}
    return replace(
        profile, old=replace(profile.old, **small), new=replace(profile.new, **small),
        fit=replace(profile.fit, epochs=3, batch=64),
    )  # fmt: skip


def _embeddings(versions: Mapping[str, Version], part: str, labels: NDArray[np.int64]) -> Embeddings:
    return Embeddings(**{name: one.vectors[part] for name, one in versions.items()}, labels=labels)


def _relevance(queries: Embeddings, gallery: Embeddings) -> Relevance:
    """Of one class; where one set is both, a query is no answer to itself."""
    itself = np.arange(len(queries.labels)) if queries is gallery else None
    return Relevance(query_labels=queries.labels, gallery_labels=gallery.labels, itself=itself)


def _aims(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the issue wants of the methods that were measured, told as it came out."""
    def area(name: str) -> float:
        return float(max(one["mAP"]["auc"]["value"] for one in _comparable(summaries[name])))

    aims: dict[str, Any] = {}
    if {"DRM", "RQT", "MCL"} <= summaries.keys():
        aims["DRM < RQT < MCL"] = bool(area("DRM") < area("RQT") < area("MCL"))
    for name in ("MCL", OURS):
        for order, one in summaries.get(name, {}).items():
            aims[f"{name}, {order}"] = {
                "start": all(one[m]["start_over_old"]["value"] >= -ENDS for m in ("mAP", "CMC@1")),
                "end": all(one[m]["end_over_new"]["value"] >= -ENDS for m in ("mAP", "CMC@1")),
                "no significant drop": all(one[m]["drop"]["significant"] == 0 for m in METRICS),
            }
    if {OURS, BASELINE} <= summaries.keys():
        aims[f"{OURS} > {BASELINE}"] = bool(area(OURS) > area(BASELINE))
    return aims


def _comparable(by_order: Mapping[str, Any]) -> Iterator[Any]:
    """Random, and a method's own orders; the others need more than a method knows."""
    return (one for name, one in by_order.items() if name in ("random", "uncertainty", "spread"))


def _kind(order: str) -> str:
    return "random" if order.startswith("random ") else order


def _order_names(found: Mapping[str, Outcomes]) -> list[str]:
    return list(dict.fromkeys(_kind(name) for name in found))


_SOURCE = [
    hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
    for module in (fitting, losses, methods, orders, ranks, transforms)
]


def _key(parts: Sequence[Any]) -> str:
    """Of what a method's outcomes depend on, its source among it."""
    return hashlib.sha256(json.dumps([parts, _SOURCE], default=str).encode()).hexdigest()[:12]


def _keep(path: Path, found: Mapping[str, Outcomes], settings: Mapping[str, Any]) -> None:
    arrays = {f"{order}/{name}": value for order, one in found.items() for name, value in vars(one).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, settings=np.array(json.dumps(settings)), orders=np.array(list(found)), **arrays)
    os.replace(part, path)


def _kept(path: Path) -> tuple[dict[str, Outcomes], dict[str, Any]]:
    with np.load(path) as arrays:
        found = {
            str(order): Outcomes(**{name: arrays[f"{order}/{name}"] for name in ("precision", "before", "queries")})
            for order in arrays["orders"]
        }
        return found, json.loads(str(arrays["settings"]))


OPTIONS = {
    "set": ", ".join(PROFILES), "data": "folder of the set, where it has one",
    "captioners": "OLD,NEW: folders of two captioners, for the catalogue",
    "seeds": "backbones and transforms trained", "orders": "random orders per seed",
    "arch": "backbones: " + ", ".join(ARCHITECTURES), "threads": "of torch", "methods": "some, with semicolons",
    "out": "folder of everything that is kept",
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    question = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backfill", description=question)
    add_options(parser, BackfillOptions(), OPTIONS)
    parser.add_argument("--bf16", action="store_true", help="train the backbones in bfloat16")
    parser.add_argument("--quick", action="store_true", help="a size that only tries the program out")
    arguments = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        return measure(BackfillOptions(**vars(arguments)))

    return run("bench-backfill", __doc__, measured)


if __name__ == "__main__":
    sys.exit(main())
