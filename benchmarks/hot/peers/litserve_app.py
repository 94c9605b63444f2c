"""LitServe: an HTTP process per worker before the processes that rank.

    python -m benchmarks.hot.peers.litserve_app

As its documentation advises: `setup` per worker, `workers_per_device` for more of them, `fast_queue` (ZeroMQ) for more
than a hundred requests per second.
"""

from typing import Annotated  # annotations stay objects here: LitServe reads them

import litserve
import numpy as np
from fastapi import Body, Response

from benchmarks.hot.peers.settings import DESIGN, FOLDER, PORT, THREADS, WORKERS, RankRequest, RankResponse
from benchmarks.hot.wire import Answer, Request, pack_answer, unpack
from benchmarks.hot.work import load


class Ranking(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.ranker = load(DESIGN, FOLDER, THREADS)

    def predict(self, request: Request) -> Answer:
        return self.ranker(*request)


class Json(Ranking):
    def decode_request(self, request: RankRequest) -> Request:
        return Request(request.user_id, np.array(request.item_ids), np.array(request.context))

    def encode_response(self, output: Answer) -> RankResponse:
        return RankResponse(scores=output.scores.tolist(), status=output.status.tolist())


class Binary(Ranking):
    def decode_request(self, request: Annotated[bytes, Body(media_type="application/octet-stream")]) -> Request:
        return unpack(request)

    def encode_response(self, output: Answer) -> Response:
        return Response(pack_answer(*output), media_type="application/octet-stream")


if __name__ == "__main__":
    api = Json(api_path="/json") if DESIGN == "plain" else Binary(api_path="/binary")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=WORKERS, fast_queue=True)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=WORKERS, log_level="warning", generate_client_file=False,
               access_log=False)  # fmt: skip
