"""How many requests per second does each model of a release answer, how fast, and what does Triton add?

Why: the media path has to fit a latency budget. Its language model takes most of it; the rest has to stay out
    of the way. Each part is measured alone and in the ensemble, so that a figure points at the part to mend.
Regime: one server, closed loop over gRPC on the same machine, one row per request, real held-out images and
    videos, everything warm. perf_analyzer shares the cores with the server.
Ceiling: benchmarks/ceiling.py, from arithmetic and bandwidth measured in the same run.
Method: count windows, warm-up left out, several runs with all models interleaved; every figure is the median
    over the runs, with its spread. Shared machines are noisy: compare within a report, not across reports.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton

from benchmarks import perf_analyzer
from benchmarks.ceiling import Machine, ceilings
from benchmarks.environment import describe
from benchmarks.inputs import Tensors, held_out_requests, infer, walk_stages, write_json
from benchmarks.perf_analyzer import Measurement
from benchmarks.report import write_report
from serving.triton import TritonServer
from sightline import release
from sightline.errors import ConfigError

FLUSHED = 2.5  # seconds after which a model's metrics are at the server
MODELS = ("rank_media", "caption", "vision_encoder", "tensorrt_llm", "tokenize", "lookup", "embed", "score")
PATH = ("caption", "tokenize", "embed", "score")  # lookup runs beside caption
STAND_IN_BACKENDS = ("onnxruntime", "tensorrtllm")
# Three windows make a measurement. On a slow or busy machine a window holds fewer requests than asked for, so that
# the whole stays a matter of minutes; the report says how many there were.
WINDOW_SECONDS, MIN_REQUESTS = 1.5, 5


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """What to measure. The defaults take about five minutes on two cores."""

    data: Path = Path("artifacts/data/synthetic")
    """Data set whose newest items are sent."""
    releases: Path = Path("artifacts/releases")
    """Its current release is served."""
    out: Path = Path("artifacts/bench")
    """Each run writes a folder of its own here, named by the time."""
    concurrency: tuple[int, ...] = (1, 2, 4, 8)
    runs: int = 3
    window_requests: int = 20
    """Requests in a window; fewer for a model that would take more than `WINDOW_SECONDS` for them."""
    images: int = 12
    videos: int = 4

    def __post_init__(self) -> None:
        if self.concurrency[:1] != (1,) or list(self.concurrency) != sorted(set(self.concurrency)):
            raise ConfigError(f"--concurrency: got {self.concurrency}, expected ascending numbers that begin "
                              "with 1 (the unloaded latency), like 1 2 4 8")
        for name, low in (("runs", 1), ("window_requests", MIN_REQUESTS), ("images", 0), ("videos", 0)):
            if getattr(self, name) < low:
                flag = "--" + name.replace("_", "-")
                raise ConfigError(f"{flag}: got {getattr(self, name)}, expected {low} or more")
        if self.images + self.videos == 0:
            raise ConfigError("--images, --videos: got 0 and 0, expected at least one item to send")

    @classmethod
    def quick(cls, **options: Any) -> BenchOptions:
        """One short run that shows that everything works; its figures mean little."""
        short = {"concurrency": (1, 2), "runs": 1, "window_requests": 5, "images": 2, "videos": 1}
        return cls(**{**short, **options})


def bench(options: BenchOptions, *, progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Serve the current release, measure it, write the report; returns the report's JSON document.

    Raises:
        ReleaseError: nothing is published, or the release is damaged.
        ServingError: the server does not start, perf_analyzer is missing, or a request failed.
        DataError: the data set does not fit the release.
    """
    perf_analyzer.version()  # before anything that takes long
    folder = release.current(options.releases)
    with TritonServer(folder, progress=progress) as server:
        return measure(server, options, progress=progress)


def measure(
    server: TritonServer, options: BenchOptions, *, progress: Callable[[str], None] = print
) -> dict[str, Any]:
    """Like `bench`, on a server that runs already."""
    started = time.monotonic()
    folder = options.out / datetime.now().strftime("%Y%m%d-%H%M%S-%f")[:-3]
    folder.mkdir(parents=True)
    with triton.InferenceServerClient(server.url) as client:
        configs = {model: client.get_model_config(model, as_json=True)["config"] for model in MODELS}
        context = json.loads(configs["rank_media"]["parameters"]["context"]["string_value"])
        names = [column["name"] for column in context]
        requests = held_out_requests(options.data, names, options.images, options.videos)
        rows, pace = walk_stages(client, server.release_dir, requests)
        for model in MODELS:
            write_json(folder / f"{model}.json", rows[model])
        machine = Machine.measure()
        best = ceilings(machine, server.release_dir, rows)
        for model in MODELS:
            if model in best:
                progress(f"ceiling  {model:<15} {best[model].per_second:>10,.0f} /s   "
                         f"{best[model].alone_ms:>8.2f} ms alone")

        points: dict[tuple[str, int], list[Measurement]] = {}
        profiles = [_walk(server, client, rows["rank_media"]) for _ in range(options.runs)]
        for run, concurrency, model in itertools.product(range(options.runs), options.concurrency, MODELS):
            point = perf_analyzer.measure(
                model, url=server.url, inputs=folder / f"{model}.json", concurrency=concurrency,
                window_requests=max(MIN_REQUESTS, min(options.window_requests, round(pace[model] * WINDOW_SECONDS))))
            pace[model] = point.per_second
            points.setdefault((model, concurrency), []).append(point)
            progress(f"run {run + 1}/{options.runs}  {model:<15} concurrency {concurrency:<3} "
                     f"{point.per_second:>8,.1f} /s   p50 {point.p50:>8.2f} ms   p99 {point.p99:>8.2f} ms")

    record = describe()
    record["hardware"]["gflops"] = round(machine.flops / 1e9, 1)
    record["hardware"]["gb_per_s"] = round(machine.bandwidth / 1e9, 1)
    record["versions"] |= {"perf_analyzer": perf_analyzer.version()}
    document = {
        "benchmark": "throughput",
        "at": datetime.now().astimezone().isoformat(timespec="seconds"),
        **record,
        "release": server.manifest.release,
        "stand_ins": server.manifest.stand_ins,
        "inputs": {kind: sum(r.media_type == kind for r in requests) for kind in ("image", "video")},
        "runs": options.runs,
        "models": {
            model: {
                "backend": configs[model].get("backend") or configs[model]["platform"],
                "stand_in": configs[model].get("backend") in STAND_IN_BACKENDS,
                "ceiling_per_s": round(best[model].per_second, 1) if model in best else None,
                "ceiling_alone_ms": round(best[model].alone_ms, 4) if model in best else None,
                "sweep": [_median(points[model, concurrency]) for concurrency in options.concurrency],
            }
            for model in MODELS
        },
        "overhead": {key: round(statistics.median(p[key] for p in profiles), 3) for key in profiles[0]},
        "seconds": round(time.monotonic() - started, 1),
        "report": str(folder),
    }
    write_report(folder, document)
    return document


def _median(points: list[Measurement]) -> dict[str, float]:
    """One line of the sweep: medians over the runs, the lowest and highest throughput, requests in all."""
    middle = {name: round(statistics.median(getattr(point, name) for point in points), 3)
              for name in ("per_second", "p50", "p95", "p99")}
    rates = [point.per_second for point in points]
    return {
        "concurrency": points[0].concurrency,
        "per_s": middle["per_second"],
        "per_s_low": round(min(rates), 3),
        "per_s_high": round(max(rates), 3),
        "p50_ms": middle["p50"],
        "p95_ms": middle["p95"],
        "p99_ms": middle["p99"],
        "requests": sum(point.requests for point in points),
    }


Totals = dict[str, tuple[int, int]]
"""Per model since the server's start: nanoseconds in all, nanoseconds in queues."""


def _walk(server: TritonServer, client: Any, rows: list[Tensors]) -> dict[str, float]:
    """Send `rows` through `rank_media` one after the other, with nothing else going on; where did the time go?

    perf_analyzer leaves requests half-way when it ends, so the server's statistics would not match its own.
    """
    before, start = _totals(server, client), time.perf_counter()
    for row in rows:
        infer(client, "rank_media", row)
    spent = (time.perf_counter() - start) * 1e3
    return _profile(spent, len(rows), before, _totals(server, client))


def _totals(server: TritonServer, client: Any) -> Totals:
    """Nanoseconds by model: of answers, and in the queue. Triton takes `caption` for done when it has taken a request,
    so its time comes from its own metrics, which it sends every second.
    """
    time.sleep(FLUSHED)
    def part(model: dict[str, Any], name: str) -> int:
        return int(model.get("inference_stats", {}).get(name, {}).get("ns", 0))

    models = client.get_inference_statistics(as_json=True)["model_stats"]
    found = {model["name"]: (part(model, "success"), part(model, "queue")) for model in models}
    with urllib.request.urlopen(server.metrics_url) as page:
        lines = page.read().decode().splitlines()
    captions = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("sightline_caption_seconds_sum{")]
    return found | {"caption": (int(sum(captions) * 1e9), found["caption"][1])}


def _profile(client_ms: float, requests: int, before: Totals, after: Totals) -> dict[str, float]:
    """Means in milliseconds per request, from `client_ms` for all requests and the server's statistics."""
    total, queued = ({model: (after[model][part] - before[model][part]) / requests / 1e6 for model in MODELS}
                     for part in (0, 1))
    path = sum(total[model] for model in PATH)
    return {
        "client_ms": client_ms / requests,
        "path_ms": path,
        "overhead_ms": client_ms / requests - path,
        "wire_ms": client_ms / requests - total["rank_media"],
        "queue_ms": sum(queued[model] for model in PATH),
        **{f"{model}_ms": total[model] for model in MODELS},
    }


def opening(options: BenchOptions) -> str:
    """What the benchmark says before it measures."""
    assert __doc__ is not None
    sweep = ", ".join(map(str, options.concurrency))
    return f"{__doc__.strip()}\nNow: concurrency {sweep}; {options.runs} run(s)."
