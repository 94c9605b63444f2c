"""Does ranking suffer while the captioner is exchanged?

Why: an upgrade re-captions items for hours, and the new ranker reads items of both captioners meanwhile. Its AUC must
    not fall below that of the worse end: no item described by the new captioner, or all.
Regime: the generated catalogue and the demo's captioner and ranker (`make demo`) as the new release; as the old
    captioner one of the same kind that was trained for a part of the steps (`--tower_steps`, `--steps`). Items without
    a new caption have the old one's in the ranker's tokens (`sightline store carry-over`), and so have profiles.
Method: rows after the split; items move in one random order; AUC of all rows and of cold items, and the two-way
    interval (users and items) of the lift over the worse end.
Control: the same without carry-over, that is with no caption for items that the new captioner has not described.

    python -m benchmarks.migration [--run artifacts/demo/synthetic] [--points 11]
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import describe
from benchmarks.program import add_options, run, say
from sightline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class MigrationOptions:
    """What to measure."""

    run: Path = Path("artifacts/demo/synthetic")
    data: Path = Path("artifacts/data/synthetic")
    out: Path = Path("artifacts/bench/migration")
    tower_steps: int = 450
    steps: int = 280
    points: int = 11
    draws: int = 200

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ConfigError(f"--points: got {self.points}, expected at least 2")
        if not (self.run / "ranker" / "ranker.json").is_file():
            raise ConfigError(f"--run {self.run}: expected captioner/ and ranker/ there; `make demo` makes them")


def measure(options: MigrationOptions) -> dict[str, Any]:
    """Train and caption what is not there yet, then the curve."""
    from evaluation.migration import curve
    from sightline.prompt import captioner_version
    from trainer.captioner import CaptionerConfig, train_captioner
    from trainer.captioning import caption_items, caption_quality, read_captions, write_captions

    old_dir = options.out / f"captioner-{options.tower_steps}-{options.steps}"
    config = CaptionerConfig(tower_steps=options.tower_steps, steps=options.steps)
    old_version = str(train_captioner(options.data, old_dir, config)["version"])
    kept = options.out / f"captions-{old_version}.parquet"
    if not kept.exists():
        write_captions(kept, caption_items(old_dir, options.data), old_version)
    new_version = captioner_version(options.run / "captioner")
    old, new = (read_captions(path)[0] for path in (kept, options.run / f"captions-{new_version}.parquet"))
    quality = {
        name: {cut: round(values["attribute_f1"], 4) for cut, values in caption_quality(options.data, one, 0).items()}
        for name, one in (("old", old), ("new", new))
    }
    fractions = {"points": np.linspace(0, 1, options.points).tolist(), "without_carry_over": [0.0, 0.5]}
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in fractions}
    with tempfile.TemporaryDirectory(dir=options.out) as work:
        for name, before in (("points", old), ("without_carry_over", dict[int, str]())):
            for point in curve(
                options.data, options.run / "ranker", before, new, fractions[name], Path(work), draws=options.draws
            ):
                found[name].append(point)
                say(json.dumps({name: point}))
    points = found["points"]
    broken = [
        f"{cut} at {point['fraction']}: AUC {point[cut]['auc']:.4f}, {point[cut]['lift_ci95']} % over the worse end"
        for point in points for cut in ("all", "cold") if point[cut]["lift_ci95"][1] < 0
    ]  # fmt: skip
    report = {"attribute_f1": quality, **found, "broken": broken, "made_with": describe()}
    draw(found, options.out / "auc.png")
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """AUC against the share of items that the new captioner has described."""
    ways = {"carry-over": found["points"], "without": [*found["without_carry_over"], found["points"][-1]]}
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    for axis, cut in zip(figure.subplots(1, 2), ("all", "cold"), strict=True):
        for way, points in ways.items():
            axis.plot([one["fraction"] for one in points], [one[cut]["auc"] for one in points], marker="o", label=way)
        axis.legend()
        axis.set(title=f"{cut} rows" if cut == "all" else "cold items", xlabel="share of items moved", ylabel="AUC")
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> int:
    """The program."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.migration", description=(__doc__ or "").split("\n")[0])
    defaults = {name: field.default for name, field in MigrationOptions.__dataclass_fields__.items()}
    add_options(parser, argparse.Namespace(**defaults), {
        "run": "folder of the demo's run", "data": "its data set", "out": "folder of the report",
        "tower_steps": "of the old captioner", "steps": "of the old captioner", "points": "fractions, ends included",
        "draws": "of the bootstrap",
    })  # fmt: skip
    chosen = vars(parser.parse_args(arguments))
    return run("migration", __doc__, lambda: measure(MigrationOptions(**chosen)))


if __name__ == "__main__":
    sys.exit(main())
