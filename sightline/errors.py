"""The one exception tree.

    SightlineError
    ├── ConfigError       an option has an impossible value
    ├── DataError         a data set breaks its schema
    ├── MediaError        an image or video cannot be used
    ├── TokenSpecError    a token specification is invalid or does not match
    ├── ReleaseError      a release is incomplete, tampered with or mixed
    ├── ServingError      the server cannot start or does not answer
    ├── StoreError        a feature store cannot be reached, or holds what it should not
    └── GalleryError      a gallery cannot be reached, or is asked for what it cannot do

Every message says what was expected, what came and what to do.
"""

__all__ = [
    "ConfigError",
    "DataError",
    "GalleryError",
    "MediaError",
    "ReleaseError",
    "ServingError",
    "SightlineError",
    "StoreError",
    "TokenSpecError",
]


class SightlineError(Exception):
    """Base of all errors that Sightline raises on purpose."""


class ConfigError(SightlineError):
    """An option has an impossible value; the message names the flag, the value and the range."""


class DataError(SightlineError):
    """A data set breaks its schema; the message names file, column, row and expectation."""


class MediaError(SightlineError):
    """An image or video cannot be used. `reason` is one line, safe to send to a caller."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class TokenSpecError(SightlineError):
    """A token specification is invalid, or two parts were made with different ones."""


class ReleaseError(SightlineError):
    """A release is incomplete, tampered with or mixed; the message names the file."""


class ServingError(SightlineError):
    """The server cannot start, or a probe through it failed."""


class StoreError(SightlineError):
    """A feature store cannot be reached or written, lacks a version, or holds one under another schema."""


class GalleryError(SightlineError):
    """A gallery cannot be reached or written, lacks a version, or was given vectors that do not fit."""
