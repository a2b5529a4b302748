"""The application: the APIs, health, metrics, and how errors are told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from diffusion_runtime.serve import guard, pages
from diffusion_runtime.serve.apis import controlnet, openai_images, score, web_ui
from diffusion_runtime.serve.metrics import MEDIA_TYPE
from diffusion_runtime.serve.orders import Busy, Cancelled, Closing, Late, Lost, Refused
from diffusion_runtime.serve.service import Service

CLIENT_CLOSED = 499  # nginx's: nobody is there to read it
RETRY_SECONDS = 5
STATUSES: Mapping[type[Exception], int] = {
    Refused: 400,
    Busy: 429,
    Closing: 503,
    Lost: 503,
    Late: 504,
    Cancelled: CLIENT_CLOSED,
}


class Fault(BaseModel):
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """Every error, in OpenAI's form and in FastAPI's."""

    error: Fault
    detail: str


class Health(BaseModel):
    status: str


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 405, 408, 413, 421, 422, 429, 500, 503, 504)
}


def build(service: Service, rules: guard.Rules, ui: bool = False) -> guard.App:
    """The application, behind its guard, and with ``ui`` the page. Whoever runs it starts and stops the engine."""
    app = FastAPI(
        title="coreml-sd",
        version=version("coreml-sd"),
        description="Pictures from Stable Diffusion models that coreml-sd converted.",
        responses=ERRORS,
        docs_url=None,  # FastAPI's pages load scripts from elsewhere
        redoc_url=None,
    )
    for api in (score, openai_images, web_ui, controlnet):
        app.include_router(api.routes(service))
    _add_health(app, service)
    _add_errors(app)

    @app.middleware("http")
    async def count(request: Request, call: Callable[[Request], Awaitable[Response]]) -> Response:
        answer = await call(request)
        route = request.scope.get("route")
        service.engine.metrics.requests.labels(getattr(route, "path", "other"), str(answer.status_code)).inc()
        return answer

    if ui:
        from diffusion_runtime.serve.page.mount import mount

        mount(app, service, rules.most)
    # Before the guard: a browser asks without a key whether it may send one, and reads refusals too.
    return CORSMiddleware(guard.Guard(app, rules), rules.origins, ("GET", "POST"), ("*",))


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live", tags=["Health"])
    async def live() -> Health:
        """The server answers."""
        return Health(status="live")

    @app.get("/health/ready", tags=["Health"])
    async def ready() -> Health:
        """Models are loaded, and the server is not going down."""
        if not service.engine.is_ready:
            raise Closing("not ready")
        return Health(status="ready")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(pages.reference(app.openapi()))

    @app.get("/metrics", tags=["Health"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def told() -> Response:
        """For Prometheus."""
        return Response(service.engine.metrics.text(), media_type=MEDIA_TYPE)


def _add_errors(app: FastAPI) -> None:
    async def ours(_: Request, error: Exception) -> JSONResponse:
        status = STATUSES[type(error)]
        headers = {}
        if isinstance(error, Busy):
            headers["Retry-After"] = str(error.seconds)
        if isinstance(error, Closing):
            headers["Retry-After"] = str(RETRY_SECONDS)
        return answer(status, str(error), headers=headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        first = error.errors()[0] if isinstance(error, RequestValidationError) else {}
        place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query")]
        param = ".".join(place) or None
        if first.get("type") == "extra_forbidden":
            return answer(400, f"Unknown parameter: '{param}'.", param, "unknown_parameter")
        said = f"{param}: {first.get('msg')}" if param else str(first.get("msg"))
        return answer(400 if request.url.path.startswith("/v1/") else 422, said, param)

    async def plain(_: Request, error: Exception) -> JSONResponse:
        status = error.status_code if isinstance(error, HTTPException) else 500
        return answer(status, str(error.detail) if isinstance(error, HTTPException) else "a bug of the server")

    for kind in STATUSES:
        app.add_exception_handler(kind, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, plain)
    app.add_exception_handler(Exception, plain)


def answer(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    fault = Fault(message=message, type=kind, param=param, code=code)
    content = ErrorAnswer(error=fault, detail=message).model_dump()
    return JSONResponse(content, status, headers=dict(headers or {}))
