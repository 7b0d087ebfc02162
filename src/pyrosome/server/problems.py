"""What goes wrong, in the words of whoever asked: one exception to a status and a body for each protocol."""

from __future__ import annotations

import dataclasses
import json
import logging
import traceback
from collections.abc import Mapping
from typing import Any

from pyrosome.chat.request import InvalidRequest
from pyrosome.errors import ContextTooLong, DoesNotFit, EngineError, PyrosomeError, RequestError

log = logging.getLogger(__name__)

OPENAI, ANTHROPIC = "openai", "anthropic"
LONGEST_MESSAGE = 2000  # characters; what a client sent may be repeated in one, and is not given back whole

# OpenAI's type and code by status, then Anthropic's type.
_KINDS = {
    400: ("invalid_request_error", "invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "invalid_api_key", "authentication_error"),
    402: ("insufficient_quota", "insufficient_quota", "billing_error"),
    403: ("permission_error", "permission_denied", "permission_error"),
    404: ("invalid_request_error", "not_found", "not_found_error"),
    405: ("invalid_request_error", "method_not_allowed", "invalid_request_error"),
    408: ("timeout_error", "request_timeout", "timeout_error"),
    409: ("conflict_error", "conflict", "invalid_request_error"),
    413: ("invalid_request_error", "request_too_large", "request_too_large"),
    415: ("invalid_request_error", "unsupported_media_type", "invalid_request_error"),
    422: ("invalid_request_error", "invalid_request_error", "invalid_request_error"),
    429: ("rate_limit_error", "rate_limit_exceeded", "rate_limit_error"),
    431: ("invalid_request_error", "headers_too_large", "invalid_request_error"),
    500: ("server_error", "internal_error", "api_error"),
    503: ("server_error", "overloaded", "overloaded_error"),
    504: ("server_error", "timeout", "timeout_error"),
}


class Refused(RequestError):
    """A request the server does not carry out, with its status; `headers` go with the answer."""

    def __init__(self, status: int, message: str, *, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        self.status, self.code, self.headers = status, code, dict(headers or {})
        super().__init__(message)


@dataclasses.dataclass(frozen=True)
class Problem:
    """An answer to a request that went wrong."""

    status: int
    message: str
    code: str = ""
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    official: str | None = None  # the official API's body, where it has one

    def body(self, shape: str) -> dict[str, Any]:
        """The JSON body, in OpenAI's or Anthropic's shape."""
        kind, code, anthropic = _KINDS.get(self.status, _KINDS[400 if self.status < 500 else 500])
        if shape == ANTHROPIC:
            if self.official:
                return {"type": "error", **json.loads(self.official)}
            return {"type": "error", "error": {"type": anthropic, "message": self.message}}
        if self.official:
            found: dict[str, Any] = json.loads(self.official)
            return found
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code or code}}


def problem_of(error: BaseException, request_id: str = "") -> Problem:
    """What an exception means to the client; a fault of ours is told to the log, with the request's id."""
    if isinstance(error, Refused):
        return Problem(error.status, _message(error), error.code, error.headers)
    if isinstance(error, InvalidRequest):
        return Problem(error.status, str(error), official=error.body)
    if isinstance(error, ContextTooLong):
        return Problem(400, _message(error), "context_length_exceeded")
    if isinstance(error, RequestError):
        return Problem(400, _message(error))
    if isinstance(error, DoesNotFit):
        return Problem(503, str(error), headers={"Retry-After": "5"})
    if isinstance(error, EngineError):
        return Problem(500, f"{error} (request {request_id})" if request_id else str(error))
    if isinstance(error, PyrosomeError):
        log.error("request %s: %s", request_id or "-", type(error).__name__)
    else:
        log.error("request %s: %s at\n%s", request_id or "-", type(error).__name__, where(error))
    return Problem(500, f"an error of the server, not of the request; its log has more under {request_id}")


def where(error: BaseException) -> str:
    """Where an exception was raised, for the log; without its message, which may repeat what a client sent."""
    return "".join(traceback.format_tb(error.__traceback__)).rstrip()


def _message(error: BaseException) -> str:
    text, half = str(error), LONGEST_MESSAGE // 2
    return text if len(text) <= LONGEST_MESSAGE else f"{text[:half]} ... {text[-half:]}"


def shape_of(path: str) -> str:
    """The shape of errors on a path."""
    return (
        ANTHROPIC
        if path.startswith("/anthropic/")
        or path.split("?")[0].rstrip("/").endswith(("/messages", "/messages/count_tokens", "/messages/render"))
        else OPENAI
    )
