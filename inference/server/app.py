"""The server: all endpoints, and what stands around them."""

from __future__ import annotations

import asyncio
import logging

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from inference.server.chat import chat_completions
from inference.server.completions import completions
from inference.server.embeddings import embeddings
from inference.server.errors import ApiError, error_body, error_response
from inference.server.guard import BodyLimit, Key, RequestLog
from inference.server.service import Service

VERSION = "0.1.0"
MAX_BODY = 1 << 20


def make_app(
    service: Service, *, api_key: str | None = None, cors_origins: tuple[str, ...] = (), max_body: int = MAX_BODY
) -> FastAPI:
    """The application of ASGI.

    Args:
        api_key: what `Authorization: Bearer ...` must say for /v1; None lets everybody in.
        cors_origins: web pages that may use it from a browser, e.g. http://localhost:3000, or "*" for all.
        max_body: bytes of a request.
    """
    # The pages /docs and /redoc would load scripts from the internet; /openapi.json stays.
    app = FastAPI(title="MiniMind", version=VERSION, docs_url=None, redoc_url=None)
    app.state.service, app.state.embedding_lock = service, asyncio.Lock()
    app.add_api_route("/v1/models", models)
    app.add_api_route("/v1/models/{model:path}", model)
    app.add_api_route("/v1/chat/completions", chat_completions, methods=["POST"])
    app.add_api_route("/v1/completions", completions, methods=["POST"])
    app.add_api_route("/v1/embeddings", embeddings, methods=["POST"])
    app.add_api_route("/health", health)
    app.add_api_route("/metrics", metrics)
    app.add_api_route("/version", version)
    app.add_exception_handler(HTTPException, refuse)
    app.add_exception_handler(RequestValidationError, refuse_invalid)
    app.add_exception_handler(Exception, apologise)
    # Each is put around those before: a request passes the log first.
    app.add_middleware(BodyLimit, limit=max_body)
    if api_key:
        app.add_middleware(Key, key=api_key)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(RequestLog)
    return app


async def models(http: Request) -> dict:
    """GET /v1/models"""
    return {"object": "list", "data": http.app.state.service.models()}


async def model(http: Request, model: str) -> dict:
    """GET /v1/models/{model}"""
    service: Service = http.app.state.service
    service.adapter_of(model)
    return next(entry for entry in service.models() if entry["id"] == model)


async def health(http: Request) -> Response:
    """GET /health: 200, or 503 when the engine has failed."""
    if http.app.state.service.engine.is_alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "the engine has failed"}, 503)


async def metrics(http: Request) -> Response:
    """GET /metrics, for Prometheus."""
    return Response(generate_latest(http.app.state.service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


async def version() -> dict:
    """GET /version"""
    return {"version": VERSION}


async def refuse(http: Request, error: HTTPException) -> Response:
    """Every error in OpenAI's form, those of the framework included."""
    return error_response(error)


async def refuse_invalid(http: Request, error: RequestValidationError) -> Response:
    """A request whose fields are wrong: the first of them, and how many more. 400 as with OpenAI, not 422."""
    first, *others = error.errors()
    place = first["loc"][1:]  # without "body"
    if first["type"] == "json_invalid":
        return error_response(ApiError(400, f"the body is no JSON: {first.get('ctx', {}).get('error', '')}"))
    # Of a union pydantic names the alternative that it tried, such as "list[str]": no field.
    fields = [str(part) for part in place if not any(sign in str(part) for sign in "[(-") and part not in KINDS]
    param = ".".join(fields) or None
    more = f" ({len(others)} more)" if others else ""
    message = f"{param or 'the body'}: {first['msg']}{more}"
    return error_response(ApiError(400, message, param=param))


KINDS = ("str", "int", "float", "bool", "ToolChoice")


async def apologise(http: Request, error: Exception) -> Response:
    """Our own mistake. The answer says nothing of files and lines; the log has it all."""
    logging.getLogger("minimind.server").error("an internal error", exc_info=error)
    return JSONResponse(error_body(500, "an internal error; the server's log says why"), 500)
