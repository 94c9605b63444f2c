"""Client of a Sightline server. Imports neither torch nor transformers nor sightline."""

from sightline_client.client import AsyncRankClient, RankClient
from sightline_client.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ServerError,
    SightlineClientError,
    Unavailable,
)
from sightline_client.protocol import TLS, ContextField, ModelInfo, Ranked

__version__ = "0.1.0"
__all__ = [
    "TLS",
    "AsyncRankClient",
    "ContextField",
    "DeadlineExceeded",
    "InvalidArgument",
    "ModelInfo",
    "RankClient",
    "Ranked",
    "ServerError",
    "SightlineClientError",
    "Unavailable",
]
