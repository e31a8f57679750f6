"""What a request fails with, in the shapes of both APIs. Messages name fields and limits, never a path."""

import logging
import os
import re
from typing import Any

from starlette.responses import JSONResponse

from ..engine.errors import UserError

KINDS = {  # status: OpenAI's type, Anthropic's type, code
    400: ("invalid_request_error", "invalid_request_error", "invalid_value"),
    401: ("invalid_request_error", "authentication_error", "invalid_api_key"),
    403: ("invalid_request_error", "permission_error", "forbidden"),
    404: ("invalid_request_error", "not_found_error", "not_found"),
    405: ("invalid_request_error", "invalid_request_error", "method_not_allowed"),
    408: ("server_error", "timeout_error", "timeout"),
    413: ("invalid_request_error", "request_too_large", "request_too_large"),
    415: ("invalid_request_error", "invalid_request_error", "unsupported_media_type"),
    429: ("rate_limit_error", "overloaded_error", "rate_limit_exceeded"),
    500: ("server_error", "api_error", "internal_error"),
    503: ("server_error", "api_error", "unavailable"),
}
OVERLOADED = 529  # Anthropic's status where OpenAI has 429
log = logging.getLogger("lazulite.server")
PATH = re.compile(r"(?<![\w:/.])[~.]{0,2}(?:/[^\s/:'\"]+){2,}")


class ApiError(Exception):
    """A refusal or failure: an HTTP status, a sentence, and OpenAI's `param` (the field) and `code`."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        retry_after: float | None = None, **more: Any,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after, self.more = status, message, param, retry_after, more
        self.code = code or KINDS[status][2]

    def openai(self) -> dict[str, Any]:
        kind = KINDS[self.status][0]
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code, **self.more}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        message = f"{self.param}: {self.message}" if self.param and self.param not in self.message else self.message
        return {"type": "error", "error": {"type": KINDS[self.status][1], "message": message}, "request_id": request_id}

    def response(self, path: str, request_id: str) -> JSONResponse:
        """The answer in the shape of the API that `path` belongs to."""
        headers = {"retry-after": str(max(1, round(self.retry_after)))} if self.retry_after is not None else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if not path.startswith("/v1/messages"):
            return JSONResponse(self.openai(), self.status, headers)
        return JSONResponse(self.anthropic(request_id), OVERLOADED if self.status == 429 else self.status, headers)


def refused(error: UserError, param: str | None = None) -> ApiError:
    """What the parts below refuse is the request's fault: 400."""
    named = re.match(r"[\w.\[\]]+(?=: )", error.what)  # the field itself: `messages[0].content: …`
    place = named[0] if named and named[0].startswith(param or "") else param
    return ApiError(400, PATH.sub("…", " ".join(filter(None, [error.what, error.hint]))), param=place)


def too_long(prompt: int, wanted: int, context: int, param: str) -> ApiError:
    """Clients know an overflow by its code (Codex) or by one of two phrases (litellm, Aider): all of them are here."""
    asked = f"{prompt} tokens in the prompt" + (f" and {wanted} for the answer" if wanted else "")
    message = (
        f"This model's maximum context length is {context} tokens. However, your request has {asked}, "
        f"which exceeds the available context size ({context} tokens): prompt is too long."
    )
    sizes = {"n_prompt_tokens": prompt, "n_ctx": context}
    return ApiError(400, message, param=param, code="context_length_exceeded", **sizes)


def invalid(errors: list[Any]) -> ApiError:
    """The first of pydantic's errors, deepest first: the field as a path like `tools[0].function.name`."""
    if errors[0]["type"] == "json_invalid":
        return ApiError(400, f"The body is not JSON: {errors[0]['ctx']['error']}", code="invalid_json")
    error = max(errors, key=lambda e: len(e["loc"]))
    words = [w for w in error["loc"] if isinstance(w, int) or re.fullmatch(r"[\w.-]{1,64}", w)]
    param = "".join(f"[{w}]" if isinstance(w, int) else f".{w}" for w in words).lstrip(".")
    if error["type"] == "missing":
        return ApiError(400, f"{param} is missing", param=param, code="missing_required_parameter")
    if error["type"] == "none_required":
        return ApiError(400, f"{param} is not supported by this server", param=param, code="unsupported_parameter")
    message = error["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}", param=param)


def complain(where: str, error: BaseException) -> None:
    """A bug, in the log: its place, and its message (which may quote a prompt) only when debugging."""
    shown = bool(os.environ.get("LAZULITE_DEBUG"))
    trace, place = error.__traceback__, ""
    while trace:
        place, trace = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}", trace.tb_next
    log.error("%s: %s at %s", where, type(error).__name__, place, exc_info=error if shown else None)
