"""Interaction events → the users' histories and profiles in the feature store."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sightline.errors import DataError, StoreError
from sightline.events import Event, EventRules, Outcome, apply
from sightline.metrics import Metrics
from sightline.store import open_store

INPUTS = ("USER_ID", "ITEM_ID", "STRENGTH", "TIMESTAMP")


class TritonPythonModel:
    """Reads `ranker.json` and `token_spec.json` of its version folder; writes to the store."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the store that SIGHTLINE_STORE names."""
        self.rules = EventRules.read(Path(args["model_repository"], args["model_version"]))
        self.store = open_store(os.environ["SIGHTLINE_STORE"])
        self.store.register(self.rules.versions.users)
        self.items = self.rules.versions.accept(self.store)
        self.metrics = Metrics(pb_utils, model="events")

    def finalize(self) -> None:
        """Close the store, send the last counts."""
        self.store.close()
        self.metrics.close()

    def execute(self, requests: list[Any]) -> list[Any]:
        """USER_ID, ITEM_ID INT64 [rows, 1], STRENGTH FP32 [rows, 1], TIMESTAMP INT64 [rows, 1] → APPLIED UINT8
        [rows, 1]; all requests in one transaction, but those with an event that is none are refused alone.
        """
        read = [_events(request) for request in requests]
        events = [event for part in read if isinstance(part, list) for event in part]
        try:
            outcomes = apply(
                self.store, events, items=self.items, users=self.rules.versions.users.version,
                affinities=self.rules.affinities,
            )  # fmt: skip
        except StoreError as error:
            message = f"store: {error}; send the events again"
            return [
                _refused(message, pb_utils.TritonError.UNAVAILABLE) if isinstance(part, list) else part for part in read
            ]
        for outcome, count in Counter(outcomes).items():
            self.metrics.count("sightline_events_total", count, result=outcome.name)
        rest = iter(outcomes)
        return [_response([next(rest) for _ in part]) if isinstance(part, list) else part for part in read]


def _events(request: Any) -> list[Event] | Any:
    """The events of a request, or the response that refuses it."""
    columns = (pb_utils.get_input_tensor_by_name(request, name).as_numpy()[:, 0].tolist() for name in INPUTS)
    try:
        return [
            Event(user_id=user, item_id=item, strength=strength, time=time)
            for user, item, strength, time in zip(*columns, strict=True)
        ]
    except DataError as error:
        return _refused(str(error), pb_utils.TritonError.INVALID_ARG)


def _response(outcomes: list[Outcome]) -> Any:
    return pb_utils.InferenceResponse([pb_utils.Tensor("APPLIED", np.array(outcomes, np.uint8)[:, None])])


def _refused(message: str, code: Any) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))
