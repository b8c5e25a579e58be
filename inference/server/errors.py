"""What went wrong, as OpenAI's clients understand it: a status code, and {"error": {message, type, param, code}}."""

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from inference.engine import EngineClosed, EngineDead, QueueFull


class ApiError(HTTPException):
    """An answer that is an error.

    Args:
        status: of HTTP; clients of OpenAI try again by themselves after 408, 409, 429 and everything from 500 on.
        message: for a human being: the value, the limit, the remedy.
        param: the field of the request that is wrong.
        code: for a program, e.g. "model_not_found".
        retry_after: seconds after which it is worth trying again; None where it never is.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        headers: dict[str, str] | None = None,
    ):
        headers = dict(headers or {})
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict:
        """{"error": ...}, the JSON of the answer."""
        return error_body(self.status_code, self.detail, self.param, self.code)


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict:
    """The JSON of an answer that is an error."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    message = message.encode(errors="replace").decode()  # it may quote half a surrogate pair
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: HTTPException) -> JSONResponse:
    """The answer for an ApiError, or for what the framework itself raises (no such path, wrong method)."""
    body = error.body() if isinstance(error, ApiError) else error_body(error.status_code, str(error.detail))
    return JSONResponse(body, error.status_code, error.headers)


def from_engine(error: Exception) -> ApiError | None:
    """An exception of the engine as an answer; None for one that is nobody's fault but ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(503, f"the server is busy: {error}; try again soon", code="queue_full", retry_after=1)
    if isinstance(error, EngineClosed):
        return ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
    if isinstance(error, EngineDead):
        return ApiError(503, "the engine has failed: restart the server; its log says why", code="engine_dead")
    return None
