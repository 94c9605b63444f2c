"""What the location of a store, queue or gallery is: a folder or file, or the address of a server."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["PASSWORD", "absolute", "is_address", "is_server", "without_secrets"]

PASSWORD = "SIGHTLINE_STORE_PASSWORD"
"""Environment variable with a server's password, for those who keep it out of the address."""


def is_server(location: str) -> bool:
    """`redis://…` or `rediss://…` (TLS); everything else is a folder."""
    return location.startswith(("redis://", "rediss://"))


def is_address(location: str) -> bool:
    """Of any server."""
    return "://" in location


def absolute(location: str) -> str:
    """The location for a process that runs in another folder."""
    return location if is_address(location) else str(Path(location).absolute())


def without_secrets(location: str) -> str:
    """The location as it may be shown: a server's without user and password."""
    if not is_server(location):
        return location
    parts = urlsplit(location)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
