"""FastAPI behind uvicorn, one process per worker.

    uvicorn benchmarks.hot.peers.fastapi_app:app --workers 2

As its documentation advises: the model is loaded in the lifespan, CPU-bound work gets processes, and what a path
operation returns has a declared type, which Pydantic serialises without Python (since 0.130).
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
from fastapi import FastAPI, Request, Response

from benchmarks.hot.peers.settings import DESIGN, FOLDER, THREADS, RankRequest, RankResponse
from benchmarks.hot.wire import pack_answer, unpack
from benchmarks.hot.work import load


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.ranker = load(DESIGN, FOLDER, THREADS)
    yield


app = FastAPI(lifespan=lifespan)


# The work neither waits nor gives up the interpreter for long: a thread per request costs more than it brings.
@app.post("/json")
async def rank_json(body: RankRequest) -> RankResponse:
    found = app.state.ranker(body.user_id, np.array(body.item_ids), np.array(body.context))
    return RankResponse(scores=found.scores.tolist(), status=found.status.tolist())


@app.post("/binary")
async def rank_binary(request: Request) -> Response:
    found = app.state.ranker(*unpack(await request.body()))
    return Response(pack_answer(*found), media_type="application/octet-stream")
