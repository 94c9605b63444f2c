"""BentoML.

    bentoml serve benchmarks.hot.peers.bentoml_service:Rank

As its documentation advises: the model is loaded in the service's constructor, `workers` for CPU-bound work, typed
inputs and outputs; what is not JSON comes through an ASGI app that is mounted in the service.
"""

from __future__ import annotations

import bentoml
import numpy as np
from fastapi import FastAPI, Request, Response

from benchmarks.hot.peers.settings import DESIGN, FOLDER, THREADS, WORKERS, RankResponse
from benchmarks.hot.wire import pack_answer, unpack
from benchmarks.hot.work import load

app = FastAPI()


@bentoml.service(workers=WORKERS, logging={"access": {"enabled": False}})
@bentoml.asgi_app(app)
class Rank:
    def __init__(self) -> None:
        self.ranker = load(DESIGN, FOLDER, THREADS)

    @bentoml.api(route="/json")
    async def json(self, user_id: int, item_ids: list[int], context: list[int]) -> RankResponse:
        found = self.ranker(user_id, np.array(item_ids), np.array(context))
        return RankResponse(scores=found.scores.tolist(), status=found.status.tolist())

    @app.post("/binary")
    async def binary(self, request: Request) -> Response:
        found = self.ranker(*unpack(await request.body()))
        return Response(pack_answer(*found), media_type="application/octet-stream")
