"""Interaction events, as the server's model `events` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sightline_client.errors import InvalidArgument, ServerError

__all__ = ["OUTCOMES", "Event"]

MODEL = "events"
OUTPUT = "APPLIED"
OUTCOMES = ("applied", "duplicate", "late", "damaged")
"""Meaning of the server's codes 0, 1, …: `duplicate` changed nothing, because the user's last events have it already;
`late` was applied, though later events were before it; `damaged` changed nothing, because the user's record cannot be
continued."""
# Input → its datatype, in the order of Event's fields.
_INPUTS = {"USER_ID": "INT64", "ITEM_ID": "INT64", "STRENGTH": "FP32", "TIMESTAMP": "INT64"}
_TYPES = {"INT64": np.int64, "FP32": np.float32}


class Event(NamedTuple):
    """A user met an item. Item and time tell a user's events apart."""

    user_id: int
    """Above 0."""
    item_id: int
    """Above 0; it need not be known to the server."""
    strength: float
    """How the user took it, −1 … 1. Who only knows of clicks sends 1 for a click and −1 for none."""
    time: int
    """Microseconds since 1970, UTC."""


def check(events: Sequence[Event]) -> None:
    """Raises InvalidArgument for the first event that the server would refuse."""
    for index, (user_id, item_id, strength, time) in enumerate(events):
        for name, value in (("user_id", user_id), ("item_id", item_id)):
            if not 0 < value < 2**63:
                raise InvalidArgument(f"events[{index}].{name}: expected an id above 0, got {value}")
        if not -1 <= strength <= 1:
            raise InvalidArgument(f"events[{index}].strength: expected a number from -1 to 1, got {strength}")
        if not 0 <= time < 2**63:
            raise InvalidArgument(f"events[{index}].time: expected microseconds since 1970, got {time}")


def columns(events: Sequence[Event]) -> list[tuple[str, str, np.ndarray[Any, Any]]]:
    """Name, datatype and values [n, 1] of each input."""
    return [
        (name, datatype, np.array(values, _TYPES[datatype]).reshape(-1, 1))
        for (name, datatype), values in zip(_INPUTS.items(), zip(*events, strict=True), strict=True)
    ]


def parse(result: Any, count: int) -> list[str]:
    """One of OUTCOMES per event. Raises ServerError for an answer of another form."""
    codes = result.as_numpy(OUTPUT)
    if codes is None or codes.size != count or (codes >= len(OUTCOMES)).any():
        got = "nothing" if codes is None else f"{codes.size} values up to {codes.max(initial=0)}"
        raise ServerError(f"{MODEL}: expected {count} codes below {len(OUTCOMES)} in {OUTPUT}, got {got}")
    return [OUTCOMES[code] for code in codes.reshape(-1).tolist()]
