"""The terminal's view of a nearline worker: what it needs from a release, progress, end on Ctrl-C or SIGTERM."""

from __future__ import annotations

import os
import signal
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from serving.captioner import ServedCaptioner
from serving.exposition import exposed
from serving.nearline import Worker, WorkerConfig
from sightline.features import Versions
from sightline.item_records import Recorder
from sightline.metrics import Metrics
from sightline.queue import Bounds, open_queue
from sightline.release import read_manifest
from sightline.store import open_store
from sightline.tokens import TokenSpec


def run_worker(
    queue: str, store: str, release_dir: Path, url: str, config: WorkerConfig, *, lease_seconds: float,
    metrics: tuple[str, int] | None, until_empty: bool,
) -> dict[str, int]:  # fmt: skip
    """Work in the foreground until the first Ctrl-C or SIGTERM, and then to the end of the batch.

    Args:
        queue, store: their locations.
        release_dir: the release that the server at `url` (gRPC) serves: its item version is written.
        metrics: host and port to expose them.

    Returns how many events ended how.
    """
    models = release_dir / "model_repository"
    schema, spec = Versions.read(models / "lookup" / "1").items, TokenSpec.load(models / "tokenize/1/token_spec.json")
    counted, ended = Metrics(model="nearline"), Counter[str]()
    with ExitStack() as stack:
        events = stack.enter_context(open_queue(queue, Bounds(lease_seconds=lease_seconds)))
        recorder = Recorder(stack.enter_context(open_store(store)), schema, spec)
        caption = stack.enter_context(ServedCaptioner(url, read_manifest(release_dir).release))
        bar = stack.enter_context(tqdm(desc="nearline", unit=" items", disable=None))
        stack.enter_context(logging_redirect_tqdm())
        if metrics is not None:
            port = stack.enter_context(exposed(counted, metrics[1], metrics[0]))
            bar.write(f"metrics: http://{metrics[0]}:{port}/metrics", file=sys.stderr)

        def tell(result: str) -> None:
            ended[result] += 1
            bar.set_postfix(
                dict(ended) | {"waiting": int(counted.value("sightline_nearline_queue_events"))}, refresh=False
            )
            bar.update(result != "retried")

        worker = Worker(events, caption, recorder, config, metrics=counted, tell=tell)

        def stop(number: int, frame: FrameType | None) -> None:
            os.write(2, b"ends after the batch\n")  # printing is not for signal handlers
            worker.stop()
            for one in (signal.SIGINT, signal.SIGTERM):
                signal.signal(one, before[one])  # the second one does not wait

        before = {one: signal.signal(one, stop) for one in (signal.SIGINT, signal.SIGTERM)}
        try:
            worker.run(until_empty=until_empty)
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)
    return dict(ended)
