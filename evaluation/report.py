"""An evaluation for people: Markdown tables, a forest plot of lifts, lift by item frequency, reliability."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

__all__ = ["write_report"]

CUTS = ("head", "torso", "tail", "cold")


def write_report(report: dict[str, Any], out: Path) -> list[Path]:
    """Write report.json, report.md, lifts.png, frequency.png (where items were warm) and reliability.png to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    pictures = [_forest(report, out / "lifts.png"), _reliability(report, out / "reliability.png")]
    if set(report["rows"]) > {"all"}:
        pictures.append(_frequency(report, out / "frequency.png"))
    (out / "report.md").write_text(_markdown(report, pictures))
    return [out / "report.json", out / "report.md", *pictures]


def _lifted(report: dict[str, Any]) -> list[str]:
    return [arm for arm, cuts in report["arms"].items() if "lift_percent" in cuts.get("all", {})]


def _markdown(report: dict[str, Any], pictures: list[Path]) -> str:
    base = next(iter(report["arms"]))
    lines = [
        f"# {report['name']}, split `{report['split']}`", "",
        f"{report['folds']} fold(s), {report['seeds']} seeds; means over both. Lifts of AUC and GAUC over `{base}` "
        "with 95 % intervals that resample users and items (two-way); of AUC with users alone, too.", "",
        "| cut | rows | arm | AUC | GAUC | NE | calibration | lift | two-way 95 % | users alone | RelaImpr | GAUC lift "
        "| two-way 95 % |",
        "|---|--:|---|--:|--:|--:|--:|--:|---|---|--:|--:|---|",
    ]  # fmt: skip
    for cut, rows in report["rows"].items():
        for arm, cuts in report["arms"].items():
            e = cuts[cut]
            lift = ("",) * 6 if arm == base else (
                f"{e['lift_percent']:+.2f} %", _interval(e["lift_ci95"]), _interval(e["lift_ci95_users"]),
                "none" if e["relaimpr_percent"] is None else f"{e['relaimpr_percent']:+.1f} %",
                f"{e['gauc_lift_percent']:+.2f} %", _interval(e["gauc_lift_ci95"]),
            )  # fmt: skip
            figures = [f"{e[key]:.4f}" for key in ("auc", "gauc", "ne", "calibration")]
            lines.append("| " + " | ".join([cut, f"{rows:,}", arm, *figures, *lift]) + " |")
    lines += ["", *(f"![{picture.stem}]({picture.name})" for picture in pictures), ""]
    lines += [f"Made with `{report['command']}`.", ""] if "command" in report else []
    return "\n".join(lines)


def _interval(pair: list[float]) -> str:
    return f"[{pair[0]:+.2f}, {pair[1]:+.2f}]"


def _forest(report: dict[str, Any], path: Path) -> Path:
    arms = _lifted(report)
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(arms) + 1.4))
    for row, arm in enumerate(reversed(arms)):
        entry = report["arms"][arm]["all"]
        low, high = entry["lift_ci95"]
        axis.plot([low, high], [row, row], color="tab:blue", lw=2)
        axis.plot(entry["lift_ci95_users"], [row - 0.16] * 2, color="tab:grey", lw=1)
        axis.plot(entry["lift_percent"], row, "o", color="tab:blue")
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(arms)), list(reversed(arms)))
    axis.set_xlabel("AUC lift over ids, %  (blue: users and items resampled, grey: users alone)")
    axis.set_title(f"{report['name']}, {report['split']}")
    return _save(figure, path)


def _frequency(report: dict[str, Any], path: Path) -> Path:
    cuts = [cut for cut in CUTS if cut in report["rows"]]
    figure, axis = plt.subplots(figsize=(7, 3.6))
    for offset, arm in enumerate(_lifted(report)):
        values = [report["arms"][arm][cut] for cut in cuts]
        at = [index + 0.08 * (offset - len(_lifted(report)) / 2) for index in range(len(cuts))]
        middle = [value["lift_percent"] for value in values]
        spread = [[m - v["lift_ci95"][0] for m, v in zip(middle, values, strict=True)],
                  [v["lift_ci95"][1] - m for m, v in zip(middle, values, strict=True)]]  # fmt: skip
        axis.errorbar(at, middle, yerr=[[max(0.0, s) for s in side] for side in spread], fmt="o", ms=4, lw=1, label=arm)
    axis.axhline(0, color="black", lw=0.8)
    axis.set_xticks(range(len(cuts)), [f"{cut}\n{report['rows'][cut]:,} rows" for cut in cuts])
    axis.set_ylabel("AUC lift, %")
    axis.legend(fontsize=7)
    return _save(figure, path)


def _reliability(report: dict[str, Any], path: Path) -> Path:
    figure, axis = plt.subplots(figsize=(4.6, 4.4))
    for arm, points in report["reliability"].items():
        axis.plot([p["predicted"] for p in points], [p["observed"] for p in points], "o-", ms=3, lw=1, label=arm)
    axis.plot([0, 1], [0, 1], color="black", lw=0.8)
    axis.set_xlabel("mean prediction")
    axis.set_ylabel("share of positives")
    axis.legend(fontsize=7)
    return _save(figure, path)


def _save(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
