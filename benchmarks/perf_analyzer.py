"""One measurement with the real perf_analyzer."""

from __future__ import annotations

import csv
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sightline.errors import ServingError

TOOL = Path(__file__).parents[1] / ".tools" / "perf_analyzer" / "perf_analyzer"
# perf_analyzer looks at its windows once a second and reports the last three together, so a measurement takes
# three seconds or more. Windows that differ are no reason to measure longer here: the runs are repeated.
WINDOWS = ["--measurement-mode", "count_windows", "--max-trials", "3", "--stability-percentage", "999"]

# perf_analyzer waits for ever for a server that hangs.
LIMIT_SECONDS = 120


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Closed loop with `concurrency` requests of one row in flight; latencies in ms, seen by the client."""

    concurrency: int
    requests: int
    per_second: float
    p50: float
    p95: float
    p99: float


def version() -> str:
    """The tool's version. Raises ServingError where it does not run, with what to do."""
    if not TOOL.exists():
        raise ServingError(f"{TOOL}: perf_analyzer is not there; run `make setup`")
    result = subprocess.run([str(TOOL), "--version"], capture_output=True, text=True, check=False)
    words = (result.stdout + result.stderr).strip()
    found = re.search(r"\d+\.\d+\.\d+", words)
    if result.returncode != 0 or found is None:
        raise ServingError(f"{TOOL}: does not run here: {words}")
    return found[0]


def measure(model: str, *, url: str, inputs: Path, concurrency: int, window_requests: int) -> Measurement:
    """Drive `model` on `url` (gRPC) with the rows of `inputs`, `window_requests` or more in a window.

    Two requests per slot warm up first and are not counted.

    Raises:
        ServingError: perf_analyzer failed, or a request did (the message ends with its own words), or the
            server does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "latency.csv"
        command = [
            str(TOOL), "-m", model, "-u", url, "-i", "grpc", "--async", "--input-data", str(inputs),
            "--request-parameter", "fresh:1:int",  # captions are made, not read
            "--concurrency-range", str(concurrency), "--warmup-request-count", str(2 * concurrency),
            *WINDOWS, "--measurement-request-count", str(window_requests), "-f", str(table),
        ]  # fmt: skip
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ServingError(f"{model}: no measurement at concurrency {concurrency} within {LIMIT_SECONDS} s; "
                               "the server has stopped answering, see its log") from error
        if result.returncode != 0 or not table.exists():
            words = " ".join((result.stderr or result.stdout).split())[-500:]
            raise ServingError(f"{model}: perf_analyzer failed at concurrency {concurrency} with code "
                               f"{result.returncode}: {words}")
        return parse(table.read_text(), result.stdout)


def parse(table: str, output: str) -> Measurement:
    """perf_analyzer's CSV (microseconds) and printed summary → Measurement."""
    row = next(csv.DictReader(table.splitlines()))
    count = re.search(r"Request count: (\d+)", output)
    if count is None:
        raise ServingError(f"perf_analyzer: expected a line 'Request count: …', got {output[-300:]!r}")
    p50, p95, p99 = (float(row[f"p{percent} latency"]) / 1000 for percent in (50, 95, 99))
    return Measurement(concurrency=int(row["Concurrency"]), requests=int(count[1]),
                       per_second=float(row["Inferences/Second"]), p50=p50, p95=p95, p99=p99)
