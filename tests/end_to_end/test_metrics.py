"""What the real server shows at its metrics address."""

from __future__ import annotations

import time
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from serving.triton import TritonServer
from tests.end_to_end.test_serving import infer


def scrape(server: TritonServer) -> dict[str, float]:
    """Series with its labels → value; Sightline's only."""
    with urllib.request.urlopen(server.metrics_url) as response:
        lines = response.read().decode().splitlines()
    series = (line.rsplit(" ", 1) for line in lines if line.startswith("sightline_"))
    return {name: float(value) for name, value in series}


def grown(server: TritonServer, before: dict[str, float], wanted: dict[str, int]) -> dict[str, float]:
    """How much the wanted series grew, waiting until all have; they reach the server within a second."""
    until = time.monotonic() + 10
    while True:
        now = scrape(server)
        found = {series: now.get(series, 0) - before.get(series, 0) for series in wanted}
        if found == wanted or time.monotonic() > until:
            return found
        time.sleep(0.1)


def test_requests_are_counted_exactly(server: TritonServer) -> None:
    time.sleep(1.5)  # counts of earlier requests reach the server within a second
    before = scrape(server)
    with triton.InferenceServerClient(server.url) as client:
        for _ in range(5):
            infer(client, "tokenize", CAPTION=np.array([[b"red mug"], [b"blue shoe"]], object))
        with pytest.raises(InferenceServerException):
            infer(client, "tokenize", CAPTION=np.array([[b"red mug\x1fq 1"]], object))
        ids = np.array([[42], [8], [0]], np.int64)
        infer(client, "lookup", USER_ID=ids, ITEM_ID=ids)
    wanted = {
        'sightline_tokenize_captions_total{model="tokenize",result="encoded"}': 10,
        'sightline_tokenize_captions_total{model="tokenize",result="refused"}': 1,
        'sightline_lookup_rows_total{kind="user",model="lookup",result="known"}': 1,
        'sightline_lookup_rows_total{kind="user",model="lookup",result="unknown"}': 2,
    }
    assert grown(server, before, wanted) == wanted
