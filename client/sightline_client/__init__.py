"""Client of a Sightline server. Imports neither torch nor transformers nor sightline."""

from sightline_client.client import AsyncRankClient, RankClient
from sightline_client.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ServerError,
    SightlineClientError,
    Unavailable,
)
from sightline_client.events import OUTCOMES, Event
from sightline_client.items import STATUS, RankedItems
from sightline_client.protocol import TLS, ContextField, ModelInfo, Ranked
from sightline_client.retrieval import Retrieved

__version__ = "0.1.0"
__all__ = [
    "OUTCOMES",
    "STATUS",
    "TLS",
    "AsyncRankClient",
    "ContextField",
    "DeadlineExceeded",
    "Event",
    "InvalidArgument",
    "ModelInfo",
    "RankClient",
    "Ranked",
    "RankedItems",
    "Retrieved",
    "ServerError",
    "SightlineClientError",
    "Unavailable",
]
