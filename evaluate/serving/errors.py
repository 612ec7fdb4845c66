"""What a client is told of a failure, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

INVALID = "invalid_request_error"


class ApiError(Exception):
    """A request that is refused or has failed: an HTTP status, words, and the field at fault."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        *,
        status: int = 400,
        kind: str = INVALID,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status = message, param, status
        self.kind, self.code, self.retry_after = kind, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        """When to come again, where that helps."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def busy(waiting: int, seconds: int) -> ApiError:
    """Too many wait already."""
    return ApiError(
        f"{waiting} requests are under way or wait, which is all that are taken (--queue); try "
        f"again in {seconds} s",
        status=429,
        kind="rate_limit_error",
        code="queue_full",
        retry_after=seconds,
    )


def no_room() -> ApiError:
    """Calls that other requests must make fill the table of grammars."""
    return ApiError(
        "tool_choice: the schemas of other requests that must call take all room for them "
        "(--grammar-states); try again in 1 s",
        "tool_choice",
        status=429,
        kind="rate_limit_error",
        code="grammars_full",
        retry_after=1,
    )


def unknown_client() -> ApiError:
    """No key, or another one."""
    return ApiError(
        "send the server's key as `Authorization: Bearer KEY` (api_key of OpenAI's client)",
        status=401,
        kind="authentication_error",
        code="invalid_api_key",
    )


def out_of_time(seconds: float) -> ApiError:
    """The request took too long."""
    return ApiError(
        f"no answer within {seconds:g} s (--timeout); ask for fewer tokens or try again later",
        status=504,
        kind="timeout_error",
        code="timeout",
    )


def unavailable(why: str) -> ApiError:
    """The engine does not work, or not any more."""
    return ApiError(why, status=503, kind="server_error", code="unavailable")


def broken() -> ApiError:
    """A failure of ours; its details are in the log and not for clients."""
    return ApiError(
        "the request has failed in the server, whose log says why",
        status=500,
        kind="server_error",
        code="internal_error",
    )
