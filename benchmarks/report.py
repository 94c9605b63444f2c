"""One benchmark document → report.json, report.md and report.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_report(folder: Path, document: dict[str, Any]) -> None:
    """Write the three files of one run into `folder`; `document` is what `throughput.measure` returns."""
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(document))
    plot(folder / "report.png", document)


def caveat(document: dict[str, Any]) -> str:
    """What a reader must know before quoting a figure; empty where nothing stands in for anything."""
    if not document["stand_ins"]:
        return ""
    return ("Taken with CPU stand-ins: " + ", ".join(document["stand_ins"]) + ". "
            "These are not figures of ONNX Runtime's C++ backend, of TensorRT or of TensorRT-LLM.")


def markdown(document: dict[str, Any]) -> str:
    """The report as a page: the answer first, then the sweep, the overhead and what was measured on."""
    models, overhead, hardware = document["models"], document["overhead"], document["hardware"]
    lines = [
        f"# Throughput and latency of release {document['release']}",
        "",
        "**Question.** How many requests per second does each model and the whole ensemble answer, at what "
        "latency, and what does Triton add to the work itself?",
        "",
        f"**Regime.** One server, closed loop over gRPC on the same machine ({hardware['cores']} cores of "
        f"{hardware['cpu']}, shared with the load generator), one row per request, "
        f"{document['inputs']['image']} images and {document['inputs']['video']} videos of held-out items, "
        "warm. "
        f"perf_analyzer {document['versions']['perf_analyzer']}, count windows, warm-up excluded, medians of "
        f"{document['runs']} run(s) with all models interleaved.",
        "",
        f"**Ceiling.** {hardware['gflops']} GFLOP/s float32 and {hardware['gb_per_s']} GB/s, measured in the "
        "same run; `benchmarks/ceiling.py` says how each ceiling follows. It is never reached: it leaves out "
        "everything but arithmetic and memory.",
        "",
    ]
    if caveat(document):
        lines += [f"**{caveat(document)}** Models marked † run on one, directly or inside.", ""]

    lines += ["## Best throughput, unloaded latency", "",
              "| model | backend | best /s | spread | at concurrency | p99 there, ms "
              "| alone: p50 / p95 / p99, ms | ceiling /s | of ceiling |",
              "|---|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, model in models.items():
        best, alone = max(model["sweep"], key=lambda point: point["per_s"]), model["sweep"][0]
        ceiling = model["ceiling_per_s"]
        lines.append(
            f"| {name}{mark(document, name)} | {model['backend']} | {best['per_s']:,.1f} "
            f"| {spread(best)} | {best['concurrency']} | {best['p99_ms']:.2f} "
            f"| {alone['p50_ms']:.2f} / {alone['p95_ms']:.2f} / {alone['p99_ms']:.2f} "
            + (f"| {ceiling:,.0f} | {best['per_s'] / ceiling:.1%} |" if ceiling else "| – | – |"))

    lines += ["", "![Throughput against p99](report.png)", "",
              "## What Triton adds", "",
              "All inputs once through `rank_media`, one at a time, nothing else going on: "
              f"{overhead['client_ms']:.2f} ms at the client (means per request). Its models, one after the "
              f"other, take {overhead['path_ms']:.2f} ms by the server's own statistics, of which "
              f"{overhead['queue_ms']:.2f} ms waiting in queues. The difference, "
              f"**{overhead['overhead_ms']:.2f} ms**, is what the ensemble, gRPC and the client add; gRPC "
              f"and the client alone add {overhead['wire_ms']:.2f} ms. (A stage's time includes its cleaning up, "
              "which overlaps the next stage: the sum can exceed the whole by a little.)", "",
              "| stage | ms per request |", "|---|--:|"]
    for name, note in (("caption", ""), ("vision_encoder", "inside caption"),
                       ("tensorrt_llm", "inside caption"), ("lookup", "beside caption"), ("tokenize", ""),
                       ("embed", ""), ("score", ""), ("rank_media", "the whole, in the server")):
        lines.append(f"| {name}{f' ({note})' if note else ''} | {overhead[f'{name}_ms']:.3f} |")

    lines += ["", "## Sweep", "",
              "| model | concurrency | /s | spread | p50 ms | p95 ms | p99 ms | requests |",
              "|---|--:|--:|--:|--:|--:|--:|--:|"]
    for name, model in models.items():
        for point in model["sweep"]:
            lines.append(
                f"| {name}{mark(document, name)} | {point['concurrency']} | {point['per_s']:,.1f} "
                f"| {spread(point)} | {point['p50_ms']:.2f} "
                f"| {point['p95_ms']:.2f} | {point['p99_ms']:.2f} | {point['requests']} |")
    lines += ["", "With fewer than 100 requests in a run, p99 is their slowest."]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["", "## Made with", "",
              f"Commit {document['commit']}, `{document['command']}`, {document['at']}; load average before: "
              f"{hardware['load_before']}; {versions}.", ""]
    return "\n".join(lines)


def spread(point: dict[str, Any]) -> str:
    """Lowest and highest throughput of the runs."""
    return f"{point['per_s_low']:,.1f}–{point['per_s_high']:,.1f}"


def mark(document: dict[str, Any], model: str) -> str:
    """A dagger beside a model that runs on a stand-in, itself or through the models that it calls."""
    models = document["models"]
    inside = ("vision_encoder", "tensorrt_llm")
    calls = {"caption": inside, "rank_media": (*inside, "embed", "score")}
    return "†" if any(models[name]["stand_in"] for name in (model, *calls.get(model, ()))) else ""


def plot(path: Path, document: dict[str, Any]) -> None:
    """Throughput against p99, one line per model, one point per concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name, model in document["models"].items():
        points = model["sweep"]
        axes.plot([p["per_s"] for p in points], [p["p99_ms"] for p in points], marker="o", markersize=4,
                  linewidth=2.5 if name == "rank_media" else 1.2, label=name + mark(document, name))
        for point in points:
            axes.annotate(str(point["concurrency"]), (point["per_s"], point["p99_ms"]), fontsize=7,
                          textcoords="offset points", xytext=(4, 3))
    axes.set(xscale="log", yscale="log", xlabel="requests per second, one row each", ylabel="p99 latency, ms",
             title=f"{document['release']} on {document['hardware']['cores']} cores; numbers: concurrency")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(fontsize=8)
    figure.text(0.01, -0.03, "† " + caveat(document) if caveat(document) else "", fontsize=7)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    pyplot.close(figure)
