"""A comparison for people: Markdown tables and curves over the backfilled fraction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from evaluation.backfilling.curves import METRICS

__all__ = ["write_report"]


def write_report(report: dict[str, Any], out: Path) -> list[Path]:
    """Write report.json, report.md and curves.png to `out`.

    `report["methods"]` is method → order → what `curves.summarise` returns; `notes`, sentences, and `reference`,
    ranking without a model → metric → value, may be there.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (out / "report.md").write_text(markdown(report) + "\n![curves](curves.png)\n")
    _curves(report, out / "curves.png")
    return [out / name for name in ("report.json", "report.md", "curves.png")]


def markdown(report: dict[str, Any]) -> str:
    """The tables: one row per method and order."""
    first = next(iter(next(iter(report["methods"].values())).values()))
    lines = [
        f"# Online backfilling: {report['set']}", "",
        f"{first['queries']:,} queries; old alone: " + _ends(first, "old") + "; new alone: " + _ends(first, "new")
        + ". AUC is the mean over 22 equally spaced fractions, relative gain (AUC − old) / (new − old) in per cent; "
        "its own share the same with the curve's own end for the new model; intervals are 95 % over queries.", "",
        *(line for note in _notes(report) for line in (note, "")),
        "| method | order | runs | mAP AUC | relative gain | own share | M₀ − old | M₁ − new | CMC@1 AUC "
        "| relative gain | CMC@5 AUC | negative flips, mean, most | drops of mAP (significant) | deepest |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]  # fmt: skip
    for method, orders in report["methods"].items():
        for order, found in orders.items():
            precision, first_hit = found["mAP"], found["CMC@1"]
            drop = precision["drop"]
            lines.append("| " + " | ".join([
                method, order, str(found["runs"]), _percent(precision["auc"]["value"], 2),
                _share(precision["relative_gain"]), _share(precision["own_gain"]),
                f"{100 * precision['start_over_old']['value']:+.2f}",
                f"{100 * precision['end_over_new']['value']:+.2f}",
                _percent(first_hit["auc"]["value"], 2), _share(first_hit["relative_gain"]),
                _percent(found["CMC@5"]["auc"]["value"], 2),
                f"{_percent(found['negative_flips']['mean'], 1)}, {_percent(found['negative_flips']['most'], 1)}",
                f"{drop['steps']} ({drop['significant']})", _percent(drop["most"], 2),
            ]) + " |")  # fmt: skip
    lines += ["", f"Made with `{report['command']}`.", ""] if "command" in report else [""]
    return "\n".join(lines)


def _notes(report: dict[str, Any]) -> list[str]:
    by_name = [
        f"{name} " + ", ".join(f"{metric} {_percent(value, 2)}" for metric, value in found.items())
        for name, found in report.get("reference", {}).items()
    ]
    return [*report.get("notes", ()), *(["Without a model: " + "; ".join(by_name) + "."] if by_name else [])]


def _ends(found: dict[str, Any], end: str) -> str:
    return ", ".join(f"{metric} {_percent(found[metric][end], 2)}" for metric in METRICS)


def _percent(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}"


def _share(found: dict[str, Any]) -> str:
    if found["value"] is None:
        return "none"
    interval = "" if found["ci95"] is None else " [{:.1f}, {:.1f}]".format(*(100 * v for v in found["ci95"]))
    return f"{100 * found['value']:.1f}{interval}"


def _curves(report: dict[str, Any], path: Path) -> None:
    """mAP and CMC@1 in the random order, and in each method's own where it has one."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 5), layout="constrained")
    methods = report["methods"]
    colours = plt.get_cmap("tab20")(range(len(methods)))
    shown = (("mAP", "random"), ("CMC@1", "random"), ("mAP", "uncertainty"))
    for axis, (metric, order) in zip(axes, shown, strict=True):
        for colour, (method, orders) in zip(colours, methods.items(), strict=True):
            if order in orders:
                curve: Sequence[float] = orders[order][metric]["curve"]
                share = [k / (len(curve) - 1) for k in range(len(curve))]
                axis.plot(share, [100 * v for v in curve], color=colour, label=method, marker=".", markersize=3)
        axis.set(xlabel="share that is backfilled", ylabel=f"{metric}, %", title=f"{metric}, {order} order")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
