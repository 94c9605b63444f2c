"""The one exception tree.

SightlineClientError
├── InvalidArgument    the request is wrong
├── DeadlineExceeded   no answer within the client's timeout
├── Unavailable        the server cannot be reached or does not serve the model, after all retries
└── ServerError        the server failed, or answered something that this client does not understand
"""

__all__ = ["DeadlineExceeded", "InvalidArgument", "ServerError", "SightlineClientError", "Unavailable"]


class SightlineClientError(Exception):
    """Base of all errors that the client raises on purpose."""


class InvalidArgument(SightlineClientError):
    """The request is wrong; the message says what was expected. Bad media are no error but rejected rows."""


class DeadlineExceeded(SightlineClientError):
    """No answer within the client's timeout."""


class Unavailable(SightlineClientError):
    """The server cannot be reached or does not serve the model, after all retries."""


class ServerError(SightlineClientError):
    """The server failed, or answered something that this client does not understand."""
