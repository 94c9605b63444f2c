"""Real inputs for every model of a release: held-out media walked through the stages of the running server.

perf_analyzer reads them from one JSON file per model; MEDIA holds the bytes of real images and videos.
"""

from __future__ import annotations

import base64
import json
import statistics
import struct
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import tritonclient.grpc as triton
from numpy.typing import NDArray
from tritonclient.utils import np_to_triton_dtype

from sightline.errors import DataError, ServingError
from sightline.media import MediaSpec, load
from sightline.prompt import CaptionPrompt
from sightline.schema import CONTEXT_PREFIX, MediaReader, read_interactions, read_items

Tensors = dict[str, NDArray[Any]]
"""Tensor name → values of one row, without the batch dimension; BYTES as object arrays."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """One thing to rank: media [bytes], ids, context [C]."""

    media: bytes
    media_type: str
    user_id: int
    item_id: int
    context: NDArray[np.int64]


def held_out_requests(data: Path, context: list[str], images: int, videos: int) -> list[Request]:
    """The newest items, which a split by time keeps from training, for users of the newest interactions.

    Fewer come back where the data set has fewer. `context` names the release's context columns in order.

    Raises:
        DataError: no item with media, or a context column that the release needs is missing.
    """
    items = read_items(data).sort_by([("created_at", "descending")])
    interactions = read_interactions(data).sort_by([("timestamp", "descending")]).slice(0, images + videos)
    columns = [CONTEXT_PREFIX + name for name in context]
    missing = set(columns) - set(interactions.column_names)
    if missing:
        raise DataError(f"{data}/interactions.parquet: the release's ranker expects {sorted(missing)}, got "
                        f"{interactions.column_names}; give the data set that it was trained on (--data)")
    reader = MediaReader(data, items)
    chosen = []
    for kind, count in (("image", images), ("video", videos)):
        chosen += items.filter(pc.equal(items["media_type"], kind)).slice(0, count).to_pylist()
    if not chosen:
        raise DataError(f"{data}/items.parquet: expected items with media, found none; give another data set "
                        "(--data)")
    events = interactions.to_pylist()
    requests = []
    for number, item in enumerate(chosen):
        event, media = events[number % len(events)], reader[item["item_id"]]
        assert media is not None, "this is a bug: an item with a media type has no media"
        requests.append(Request(
            media=media, media_type=item["media_type"], user_id=event["user_id"], item_id=item["item_id"],
            context=np.array([event[column] for column in columns], dtype=np.int64)))
    return requests


def walk_stages(
    client: Any, release: Path, requests: list[Request]
) -> tuple[dict[str, list[Tensors]], dict[str, float]]:
    """Send every request through the ensemble and then through its models, one by one.

    Returns:
        The inputs that each model got, and the requests per second that it answered (median).
    """
    folder = release / "model_repository" / "caption" / "1"
    spec, prompt = MediaSpec.from_pretrained(folder), CaptionPrompt.from_pretrained(folder)
    inputs: dict[str, list[Tensors]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)

    def step(model: str, tensors: Tensors) -> Tensors:
        inputs[model].append(tensors)
        start = time.perf_counter()
        answer = infer(client, model, tensors)
        seconds[model].append(time.perf_counter() - start)
        return answer

    for request in requests:
        media = {"MEDIA": np.array([request.media], dtype=object)}
        ids = {"USER_ID": np.array([request.user_id]), "ITEM_ID": np.array([request.item_id])}
        step("rank_media", media | ids | {"CONTEXT": request.context})

        frames = load(request.media, spec)  # [n, 3, H, W]
        table = np.concatenate(
            [step("vision_encoder", {"pixel_values": frame})["image_features"] for frame in frames])
        input_ids = prompt.ids(len(table))
        scalars = {"input_lengths": len(input_ids), "request_output_len": prompt.max_new_tokens,
                   "end_id": prompt.end_id, "pad_id": prompt.pad_id, "prompt_vocab_size": len(table)}
        step("tensorrt_llm", {"input_ids": input_ids, "prompt_embedding_table": table}
             | {name: np.array([value], dtype=np.int32) for name, value in scalars.items()})

        annotation = step("caption", media)["ANNOTATION"]
        tokens = step("tokenize", {"CAPTION": annotation})
        found = step("lookup", ids)
        dense = {"DENSE": found.pop("DENSE")}
        features = step("embed", found | tokens | {"CONTEXT": request.context})
        step("score", features | dense)
    return inputs, {model: 1 / statistics.median(times) for model, times in seconds.items()}


def infer(client: Any, model: str, tensors: Tensors) -> Tensors:
    """One row through one model. Raises ServingError with the server's message."""
    wire = []
    for name, value in tensors.items():
        tensor = triton.InferInput(name, [1, *value.shape], np_to_triton_dtype(value.dtype))
        tensor.set_data_from_numpy(value[None])
        wire.append(tensor)
    try:
        answer = client.infer(model, wire, parameters={"fresh": 1})  # captions are made, not read
    except triton.InferenceServerException as error:
        raise ServingError(f"{model}: {error.message()}") from error
    return {output.name: answer.as_numpy(output.name)[0] for output in answer.get_response().outputs}


def write_json(path: Path, rows: list[Tensors]) -> None:
    """perf_analyzer's input file: every tensor as base64 of its wire format."""
    data = [{name: {"content": {"b64": base64.b64encode(_wire(value)).decode()}, "shape": list(value.shape)}
             for name, value in row.items()} for row in rows]
    path.write_text(json.dumps({"data": data}))


def _wire(value: NDArray[Any]) -> bytes:
    """Raw little-endian values; each BYTES element after its length in four bytes."""
    if value.dtype == object:
        return b"".join(struct.pack("<I", len(element)) + element for element in value.reshape(-1))
    return np.ascontiguousarray(value).tobytes()
