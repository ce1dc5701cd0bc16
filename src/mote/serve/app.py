"""The server's addresses, and who may use them."""

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
from mote.serve.completions import complete
from mote.serve.faults import Fault
from mote.serve.jobs import Jobs
from mote.serve.metrics import Metrics
from mote.serve.schema import Served, ServedList
from mote.serve.settings import LOOPBACK, ServeSettings

_OPEN = ("/", "/health")  # what needs no key: the page asks for it
_LOG = logging.getLogger("mote.serve")

Endpoint = Callable[[Request], Awaitable[Response]]


def make_app(jobs: Jobs) -> Starlette:
    """The server as an ASGI application."""
    settings, metrics, began = jobs.settings, Metrics(jobs.model.batcher), int(time.time())
    page, page_headers = _page()

    async def chat(request: Request) -> Response:
        return await complete(request, jobs, metrics)

    async def models(request: Request) -> Response:
        return JSONResponse(ServedList(data=served(settings.name, jobs.model, began)).model_dump())

    async def model(request: Request) -> Response:
        for entry in served(settings.name, jobs.model, began):
            if entry.id == request.path_params["id"]:
                return JSONResponse(entry.model_dump())
        raise Fault(404, f"model: '{request.path_params['id'][:80]}' is not served here", "model", "model_not_found")

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "stopping" if jobs.closing else "ok"}, 503 if jobs.closing else 200)

    async def numbers(request: Request) -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def home(request: Request) -> Response:
        return Response(page, headers=page_headers, media_type="text/html")

    guarded: list[tuple[str, Endpoint, str]] = [
        ("/v1/chat/completions", chat, "POST"),
        ("/v1/models", models, "GET"),
        ("/v1/models/{id:path}", model, "GET"),
        ("/health", health, "GET"),
        ("/metrics", numbers, "GET"),
        ("/", home, "GET"),
    ]
    return Starlette(
        routes=[Route(path, _guard(endpoint, settings), methods=[method]) for path, endpoint, method in guarded],
        exception_handlers={Fault: _fault, HTTPException: _http, Exception: _unexpected},
    )


def served(name: str, model: Model, created: int) -> list[Served]:
    """The name alone, which is adaptive, and one entry a mode."""
    names = [name, *(f"{name}:{mode}" for mode in reversed(model.modes))]
    return [Served(id=name, created=created) for name in names]


def _guard(endpoint: Endpoint, settings: ServeSettings) -> Endpoint:
    """Only for requests that bring the key, where there is one, and name this machine, where it alone is served."""

    async def guarded(request: Request) -> Response:
        # A page of another site can make a browser send requests here under its own name (DNS rebinding).
        host = request.headers.get("host", "")
        if settings.local and _name(host) not in LOOPBACK:
            raise Fault(403, f"host: '{host[:80]}' is not this machine; call the server as {settings.host}")
        if settings.api_key is not None and request.url.path not in _OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ").encode("latin-1")
            if not hmac.compare_digest(given, settings.api_key.encode()):
                message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
                raise Fault(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        response = await endpoint(request)
        response.headers["X-Content-Type-Options"] = "nosniff"
        return response

    return guarded


def _name(host: str) -> str:
    """The host of a `Host` header, without the port."""
    match = re.fullmatch(r"(?:\[(?P<six>[^\]]+)\]|(?P<name>[^:]+))(?::\d+)?", host)
    return (match["six"] or match["name"]).lower() if match else ""


def _page() -> tuple[bytes, dict[str, str]]:
    """The chat page, and headers that let it run its own script and style and call this server, and nothing else."""
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


async def _fault(request: Request, error: Exception) -> Response:
    assert isinstance(error, Fault)
    return error.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Fault(error.status_code, f"{request.method} {request.url.path[:80]}: {error.detail}").response()


async def _unexpected(request: Request, error: Exception) -> Response:
    _LOG.error("a request failed", exc_info=error)
    return Fault(500, "the server failed; its log says why").response()
