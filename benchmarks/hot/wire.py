"""The same request in three forms, and their answers: JSON, the peers' binary body, KServe v2 with binary tensors.

    json     {"user_id": u, "item_ids": [N], "context": [C]}              → {"scores": [N], "status": [N]}
    binary   int64, little-endian: u, C, context [C], item ids [N]        → FP32 [N], then uint8 [N]
    kserve   INT64 USER_ID [1, 1], ITEM_IDS [1, N], CONTEXT [1, C]        → SCORES FP32, FEATURE_STATUS UINT8 [1, N]

The peers' environment imports this, too.
"""

from __future__ import annotations

import json
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Form = Literal["json", "binary", "kserve"]
KSERVE_PATH = "/v2/models/rank_items/infer"


class Request(NamedTuple):
    """A user, the items to rank int64 [N], the context int64 [C]."""

    user: int
    items: NDArray[np.int64]
    context: NDArray[np.int64]


class Answer(NamedTuple):
    """scores FP32 [N]; status uint8 [N], `sightline.store.Status` of the items' features."""

    scores: NDArray[np.float32]
    status: NDArray[np.uint8]


def http(form: Form, path: str, request: Request) -> bytes:
    """The whole HTTP/1.1 request."""
    headers = {"Host": "localhost"}
    if form == "json":
        headers["Content-Type"] = "application/json"
        body = json.dumps({
            "user_id": request.user, "item_ids": request.items.tolist(), "context": request.context.tolist(),
        }).encode()  # fmt: skip
    elif form == "binary":
        headers["Content-Type"] = "application/octet-stream"
        body = pack(request)
    else:
        parts = tensors(request)
        header = json.dumps({
            "inputs": [
                {"name": name, "shape": value.shape, "datatype": "INT64",
                 "parameters": {"binary_data_size": value.nbytes}}
                for name, value in parts.items()
            ],
            "parameters": {"binary_data_output": True},
        }).encode()  # fmt: skip
        headers |= {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(header))}
        body = header + b"".join(value.astype("<i8").tobytes() for value in parts.values())
    headers["Content-Length"] = str(len(body))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + body


def tensors(request: Request) -> dict[str, NDArray[np.int64]]:
    """As `rank_items` takes them."""
    return {"USER_ID": np.array([[request.user]]), "ITEM_IDS": request.items[None], "CONTEXT": request.context[None]}


def answer(form: Form, body: bytes) -> Answer:
    """What an answer's body says."""
    if form == "json":
        document = json.loads(body)
        return Answer(np.array(document["scores"], np.float32), np.array(document["status"], np.uint8))
    if form == "binary":
        count = len(body) // 5
        return Answer(np.frombuffer(body, "<f4", count), np.frombuffer(body, "u1", count, 4 * count))
    header, at = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    found = {}
    for tensor in header["outputs"]:
        size = tensor["parameters"]["binary_data_size"]
        found[tensor["name"]] = body[at : at + size]
        at += size
    return Answer(np.frombuffer(found["SCORES"], "<f4"), np.frombuffer(found["FEATURE_STATUS"], "u1"))


def pack(request: Request) -> bytes:
    """A request's binary body."""
    head = [request.user, len(request.context)]
    return np.concatenate([head, request.context, request.items]).astype("<i8").tobytes()


def unpack(body: bytes) -> Request:
    """Inverse of `pack`."""
    numbers = np.frombuffer(body, "<i8")
    end = 2 + int(numbers[1])
    return Request(int(numbers[0]), numbers[end:], numbers[2:end])


def pack_answer(scores: NDArray[np.float32], status: NDArray[np.uint8]) -> bytes:
    """A binary answer's body."""
    return scores.astype("<f4").tobytes() + status.tobytes()
