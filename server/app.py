"""The routes. A body is read into its pydantic model, becomes a Job, and is answered whole or as a stream."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response

from ..engine.errors import UserError
from . import text
from .anthropic import CountRequest, MessagesRequest, MessagesWriter
from .chat import ChatRequest, ChatWriter
from .completions import CompletionRequest, CompletionWriter
from .errors import ApiError, complain, invalid, refused
from .responses import ResponsesRequest, ResponsesWriter
from .safety import Guard, Safety
from .service import Service
from .stream import EventStream, collect

LARGE = 2**16  # bytes of a body from which on it is read on a thread
GENERATE: dict[str, tuple[Any, Any]] = {
    "/v1/chat/completions": (ChatRequest, ChatWriter),
    "/v1/completions": (CompletionRequest, CompletionWriter),
    "/v1/responses": (ResponsesRequest, ResponsesWriter),
    "/v1/messages": (MessagesRequest, MessagesWriter),
}
COMPUTE: dict[str, tuple[Any, Any]] = {  # path: body, what is made of it on a thread
    "/v1/messages/count_tokens": (CountRequest, text.count),
    "/tokenize": (text.TokenizeRequest, text.tokenize),
    "/detokenize": (text.DetokenizeRequest, text.detokenize),
    "/apply-template": (text.TemplateRequest, text.template),
}
BODIES = {path: row[0] for path, row in {**GENERATE, **COMPUTE}.items()}


def create_app(service: Service, guard: Guard | None = None) -> Safety:
    """The ASGI application."""
    app = FastAPI(title="Lazulite", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    app.openapi = lambda: openapi(app)  # type: ignore[method-assign]
    for path, (body, writer) in GENERATE.items():
        app.add_api_route(path, generating(service, body, writer), methods=["POST"], name=path)
    for path, (body, function) in COMPUTE.items():
        app.add_api_route(path, computing(service, body, function), methods=["POST"], name=path)

    @app.get("/health")
    async def health() -> dict[str, str]:
        service.check_alive()
        return {"status": "ok"}

    @app.get("/metrics")
    def metrics() -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        service.adapter(model)
        return next(row for row in service.models() if model in (row["id"], f"{row['parent']}:{row['id']}"))

    for kind in (ApiError, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, explain)
    return Safety(app, guard or Guard(), complain)


def generating(service: Service, model: Any, writer: Any) -> Any:
    async def answer(request: Request) -> Response:
        body = await read(request, model, service)
        generation = await service.start(body.job)
        made = writer(body, generation, service)
        if body.stream:
            return EventStream(generation, made)
        await collect(generation, request.receive, made.take)
        return JSONResponse(made.whole())

    return answer


def computing(service: Service, model: Any, function: Any) -> Any:
    async def answer(request: Request) -> Response:
        body = await read(request, model, service)
        return JSONResponse(await service.work(function, service, body))

    return answer


async def read(request: Request, model: type[BaseModel], service: Service) -> Any:
    """The body as its model: a small one at once, a large one on a thread."""
    raw = await request.body()
    return parse(model, raw) if len(raw) < LARGE else await service.work(parse, model, raw)


def parse(model: type[BaseModel], raw: bytes) -> BaseModel:
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


async def explain(request: Request, error: Any) -> Response:
    """An exception as the API's error."""
    if isinstance(error, UserError):
        error = refused(error)
    elif isinstance(error, HTTPException):
        known = error.status_code if error.status_code in (404, 405) else 400
        error = ApiError(known, "There is no such page" if known == 404 else str(error.detail))
    elif not isinstance(error, ApiError):
        error = ApiError(500, "The server failed at this request")  # Safety logs it
    return error.response(request.url.path, request.scope["request_id"])


def openapi(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with the bodies, which `read` reads without its help."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version="1", routes=app.routes)
        wanted: Any = [(model, "validation") for model in BODIES.values()]
        _, shared = models_json_schema(wanted, ref_template="#/components/schemas/{model}")
        schema["components"] = {"schemas": shared["$defs"]}
        for path, model in BODIES.items():
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
    return app.openapi_schema
