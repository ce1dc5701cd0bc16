"""The server's routes, and authentication."""

import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable
from importlib import resources

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mote.inference.model import Model
from mote.serve.api_error import ApiError
from mote.serve.completions import complete
from mote.serve.jobs import Jobs
from mote.serve.metrics import Metrics
from mote.serve.openai_schema import ModelEntry, ModelList
from mote.serve.server_settings import LOOPBACK, ServeSettings

_OPEN = ("/", "/health")  # no key needed: the page asks the user for it
_LOG = logging.getLogger("mote.serve")

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(jobs: Jobs) -> Starlette:
    """The server as an ASGI application."""
    settings = jobs.settings
    metrics = Metrics(jobs.model.batcher)
    started = int(time.time())
    page, page_headers = _page()

    async def chat(request: Request) -> Response:
        return await complete(request, jobs, metrics)

    async def models(request: Request) -> Response:
        return JSONResponse(ModelList(data=model_entries(settings.name, jobs.model, started)).model_dump())

    async def model(request: Request) -> Response:
        for entry in model_entries(settings.name, jobs.model, started):
            if entry.id == request.path_params["id"]:
                return JSONResponse(entry.model_dump())
        raise ApiError(404, f"model: '{request.path_params['id'][:80]}' is not served here", "model", "model_not_found")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "stopping" if jobs.closing else "ok"}, 503 if jobs.closing else 200)

    async def scrape(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def home(request: Request) -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    endpoints: list[tuple[str, Endpoint, str]] = [
        ("/v1/chat/completions", chat, "POST"),
        ("/v1/models", models, "GET"),
        ("/v1/models/{id:path}", model, "GET"),
        ("/health", health, "GET"),
        ("/metrics", scrape, "GET"),
        ("/", home, "GET"),
    ]
    return Starlette(
        routes=[Route(path, _guard(endpoint, settings), methods=[method]) for path, endpoint, method in endpoints],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _unexpected_error},
    )


def model_entries(name: str, model: Model, created: int) -> list[ModelEntry]:
    """The bare name (mode adaptive) and one entry per mode."""
    names = [name, *(f"{name}:{mode}" for mode in reversed(model.modes))]
    return [ModelEntry(id=name, created=created) for name in names]


def _guard(endpoint: Endpoint, settings: ServeSettings) -> Endpoint:
    """Check the API key and, on a loopback address, that the `Host` header names this machine."""

    async def guarded(request: Request) -> Response:
        # With DNS rebinding a page of another site can make a browser send requests here under its own host name.
        host = request.headers.get("host", "")
        if settings.local and _host_name(host) not in LOOPBACK:
            raise ApiError(403, f"host: '{host[:80]}' is not this machine; call the server as {settings.host}")
        if settings.api_key is not None and request.url.path not in _OPEN:
            scheme, _, key = request.headers.get("authorization", "").partition(" ")
            given = key.strip().encode("latin-1")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, settings.api_key.encode()):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        response = await endpoint(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return guarded


def _host_name(host: str) -> str:
    """The host name in a `Host` header, without the port."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<name>[^:]+))(?::\d+)?", host)
    return (match["six"] or match["name"]).lower() if match else ""


def _page() -> tuple[bytes, dict[str, str]]:
    """The chat page, with a content security policy that allows its own script and style and calls to this server."""
    page = (resources.files("mote") / "serve" / "page.html").read_bytes()

    def allowed(tag: bytes) -> str:
        (inside,) = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), page, re.DOTALL)
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed(b'script')}; style-src {allowed(b'style')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}
    return page, headers


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}").response()


async def _unexpected_error(request: Request, error: Exception) -> Response:
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed; its log says why").response()
