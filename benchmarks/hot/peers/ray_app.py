"""Ray Serve.

    python -m benchmarks.hot.peers.ray_app

As its documentation advises: a deployment with one replica per worker, `async` methods, the Starlette request itself;
RAY_SERVE_ENABLE_HA_PROXY and RAY_SERVE_THROUGHPUT_OPTIMIZED where the sweep asks for them.
"""

from __future__ import annotations

import signal

import numpy as np
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.hot.peers.settings import DESIGN, FOLDER, PORT, SCRATCH, THREADS, WORKERS, RankRequest, RankResponse
from benchmarks.hot.wire import pack_answer, unpack
from benchmarks.hot.work import load

OBJECT_STORE = 100 << 20  # bytes; requests do not go through it


@serve.deployment(
    num_replicas=WORKERS, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1},
    logging_config={"enable_access_log": False, "log_level": "WARNING"},
)  # fmt: skip
class Rank:
    def __init__(self) -> None:
        self.ranker = load(DESIGN, FOLDER, THREADS)

    async def __call__(self, request: Request) -> Response:
        content = await request.body()
        if DESIGN == "tricked":
            return Response(pack_answer(*self.ranker(*unpack(content))), media_type="application/octet-stream")
        body = RankRequest.model_validate_json(content)
        found = self.ranker(body.user_id, np.array(body.item_ids), np.array(body.context))
        answer = RankResponse(scores=found.scores.tolist(), status=found.status.tolist())
        return Response(answer.model_dump_json(), media_type="application/json")


if __name__ == "__main__":
    ray.init(
        num_cpus=WORKERS, include_dashboard=False, object_store_memory=OBJECT_STORE, log_to_driver=False,
        logging_level="WARNING", _temp_dir=str(SCRATCH),
    )  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    serve.run(Rank.bind())
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
