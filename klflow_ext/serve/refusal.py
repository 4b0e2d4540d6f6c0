"""An error as the client reads it: OpenAI's object."""

from __future__ import annotations

from typing import Any

TYPES = {404: "not_found_error", 429: "rate_limit_error"}  # else by the hundreds of the status
CODES = {
    404: "not_found", 405: "method_not_allowed", 408: "timeout", 413: "request_too_large", 429: "queue_full",
    500: "server_error", 503: "stopping", 504: "timeout",
}  # fmt: skip
LONGEST = 500  # characters of what the client is told: an error may quote all that it sent


class Refusal(Exception):
    """What a request is refused with.

    Args:
        status: of HTTP. message: for a reader. param: the field that it is about. code: a word for programs; None: that of the status.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        self.code = code or CODES.get(status)

    @classmethod
    def of(cls, error: Exception, status: int = 400) -> Refusal:
        """Of an error of this package's checks, whose message begins with the name of what is wrong."""
        name, colon, _ = str(error).partition(":")
        return cls(status, str(error)[:LONGEST], name if colon and name.isidentifier() else None)

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}
