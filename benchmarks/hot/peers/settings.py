"""What the benchmark tells an app, through environment variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, cast

from pydantic import BaseModel, Field

from benchmarks.hot.work import Design

DESIGN = cast(Design, os.environ.get("HOT_DESIGN", "plain"))
"""`plain` is asked in JSON, `tricked` in the binary form of benchmarks/hot/wire.py."""
FOLDER = Path(os.environ.get("HOT_DATA", "artifacts/bench/hot/data"))
SCRATCH = Path(os.environ.get("HOT_SCRATCH", "/tmp"))
"""Gone when the app has ended."""
PORT = int(os.environ.get("HOT_PORT", "8000"))
WORKERS = int(os.environ.get("HOT_WORKERS", "1"))
"""Processes that rank."""
THREADS = int(os.environ.get("HOT_THREADS", "1"))
"""onnxruntime's, in each of them."""


class RankRequest(BaseModel):
    user_id: int
    item_ids: Annotated[list[int], Field(min_length=1, max_length=4096)]
    context: list[int]


class RankResponse(BaseModel):
    scores: list[float]
    status: list[int]
