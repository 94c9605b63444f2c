"""The hot path's document → report.json, report.md, report.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.hot.servers import OURS
from benchmarks.hot.summary import CPU_RATE

AIMS = {
    "throughput_over_best_peer": ("throughput, × the best plain peer's", "at least", 2.0),
    "throughput_over_best_tricked_peer": ("throughput, × that of the best peer with our engine", "at least", 1.0),
    "p50_over_floor": ("p50 alone, × our engine's with no server", "at most", 1.5),
    "p50_over_plain_floor": ("p50 alone, × the plain work's with no server", None, None),
}
_GRPC = f"{OURS}, gRPC"


def write_report(folder: Path, document: dict[str, Any]) -> None:
    """Write the three files of one run."""
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(document))
    plot(folder / "report.png", document)


def markdown(document: dict[str, Any]) -> str:
    """The report as a page: the answer first."""
    hardware, client = document["hardware"], document["client"]
    sections = [
        f"# {document['candidates']} items per request: {hardware['cores']} cores of {hardware['cpu']}",
        _answers(document),
        f"{document['items']:,} items, {document['users']:,} users. Medians of {document['rounds']} round(s), "
        f"{document['window_s']:g} s per measurement; load average before: {hardware['load_before']}"
        f"{'; in more than one sitting' if document['resumed'] else ''}. The load generator takes "
        f"{client['cpu_us']:.0f} µs of a core per request and reaches {client['capacity']:,.0f} requests/s from a "
        f"server that does nothing (p50 {client['alone_ms']:.3f} ms).",
        f"## Requests per second with p99 ≤ {document['limit_ms']:g} ms",
        _capacities(document),
        "![Latency against rate](report.png)",
        "## Latency at fixed rates",
        "p50 / p95 / p99 in ms; – where the server fell behind. gRPC for information: the Python client is much of it.",
        _fixed(document),
        "## Where the time goes",
        _stages(document),
    ]
    if any(found["sweep"] for found in document["contenders"].values()):
        sections += ["## Settings tried", _sweeps(document)]
    if document["problems"]:
        sections += ["## Left out", "\n".join(f"- {name}: {why}" for name, why in document["problems"].items())]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    sections += ["## Made with", f"Commit {document['commit']}, `{document['command']}`, {document['at']}; {versions}."]
    return "\n\n".join(sections) + "\n"


def _answers(document: dict[str, Any]) -> str:
    rows = []
    for name, (what, side, aim) in AIMS.items():
        found = document[name]
        if found is None:
            verdict = "not measured"
        elif aim is None:
            verdict = ""
        else:
            met = found >= aim if side == "at least" else found <= aim
            verdict = f"aim: {side} {aim:g}, {'met' if met else 'missed'}"
        rows.append([what, _number(found, 2), verdict])
    plain, tricked = (document[name] or "none" for name in ("best_peer", "best_tricked_peer"))
    return f"{_table(['', 'found', ''], rows)}\n\nBest plain peer: {plain}; best peer with our engine: {tricked}."


def _capacities(document: dict[str, Any]) -> str:
    rows = []
    for name, found in sorted(document["contenders"].items(), key=lambda item: -item[1]["capacity"]):
        memory = found["memory_mb"]
        rows.append([
            _name(name), _setting(found["setting"]), f"{found['capacity']:,.0f}",
            f"{found['capacity_low']:,.0f}–{found['capacity_high']:,.0f}", _latency(found["alone"]),
            _number(found["cpu_s_per_1000"], 2), f"{memory['rss']:,.0f} / {memory['pss']:,.0f}",
        ])  # fmt: skip
    for name, floor in document["floors"].items():
        rows.append([f"no server, {name}", "–", "–", "–", _latency(floor), "–", "–"])
    return _table(["server", "workers × threads", "requests/s", "lowest–highest", "alone: p50 / p95 / p99 ms",
                   f"CPU s per 1,000, at {CPU_RATE}", "RSS / PSS MB"], rows)  # fmt: skip


def _fixed(document: dict[str, Any]) -> str:
    rates = document["rates"]
    rows = []
    for name, found in document["contenders"].items():
        rows.append([_name(name), *(_latency(found["fixed"][rate]) for rate in rates)])
        if "grpc" in found:
            rows.append([_GRPC, *(_latency(found["grpc"]["fixed"][rate]) for rate in rates)])
    return _table(["server", *(f"{rate:,.0f}/s ({name})" for name, rate in rates.items())], rows)


def _stages(document: dict[str, Any]) -> str:
    lines = []
    for design, stages in document["stages"].items():
        whole = document["floors"][design]["p50"] * 1e3
        parts = ", ".join(f"{stage} {taken:,.0f}" for stage, taken in stages.items())
        lines.append(f"- {design}, no server: {whole:,.0f} µs: {parts}")
    if (found := document["contenders"].get(OURS)) and found.get("server_us"):
        inside, engine = found["server_us"], document["floors"]["tricked"]["p50"] * 1e3
        alone = 1e6 / found["alone"]["per_s"]
        lines.append(
            f"- {OURS}, alone, means: {alone:,.0f} µs at the client; by Triton's statistics {inside['total']:,.0f} in "
            f"the server, of which {inside['queue']:,.0f} waiting and {inside['compute']:,.0f} in the python backend. "
            f"Its model is the engine ({engine:,.0f} with no server), so {inside['compute'] - engine:,.0f} are for "
            f"passing tensors between processes, and {alone - inside['total']:,.0f} for HTTP, sockets and client"
        )
    return "\n".join(lines)


def _sweeps(document: dict[str, Any]) -> str:
    rows = []
    for name, found in document["contenders"].items():
        for setting, result in found["sweep"].items():
            rows.append([name, setting, result if isinstance(result, str) else f"{result:,.0f}"])
    return _table(["server", "workers × threads", "requests/s, coarsely"], rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _name(name: str) -> str:
    return f"**{name}**" if name == OURS else name


def _setting(setting: dict[str, int] | None) -> str:
    return f"{setting['workers']} × {setting['threads']}" if setting else "–"


def _latency(window: dict[str, float | None]) -> str:
    return " / ".join(_number(window[part], 2) for part in ("p50", "p95", "p99"))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def plot(path: Path, document: dict[str, Any]) -> None:
    """p99 against rate: medians at the fixed rates as lines, every measurement of the searches a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    peers = sorted({found["peer"] for found in document["contenders"].values() if found["peer"]})
    for name, found in document["contenders"].items():
        colour = f"C{peers.index(found['peer']) + 1}" if found["peer"] else "C0"
        fixed = sorted((window["rate"], window["p99"]) for window in found["fixed"].values() if window["p99"])
        probes = [(window["rate"], window["p99"]) for window in found["probes"] if window["p99"]]
        axes.plot(
            *zip(*fixed, strict=True) if fixed else ([], []), color=colour, linewidth=2.5 if name == OURS else 1.2,
            label=name, linestyle="--" if found["design"] == "plain" else "-",
        )  # fmt: skip
        axes.scatter(*zip(*probes, strict=True) if probes else ([], []), color=colour, s=8)
    axes.axhline(document["limit_ms"], color="grey", linewidth=1, linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="requests per second", ylabel="p99 latency, ms, from the time due",
             ylim=(None, 20 * document["limit_ms"]),
             title=f"{document['candidates']} items per request, {document['hardware']['cores']} cores")  # fmt: skip
    axes.grid(True, which="both", alpha=0.2)
    if document["contenders"]:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
