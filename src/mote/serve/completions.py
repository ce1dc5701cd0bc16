"""`/v1/chat/completions`: a request is read, never more of it than is allowed, and its answers are queued."""

import asyncio

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mote.serve.faults import Fault
from mote.serve.jobs import Jobs
from mote.serve.metrics import Metrics
from mote.serve.request import read_asked
from mote.serve.response import Answering


async def complete(request: Request, jobs: Jobs, metrics: Metrics) -> Response:
    """Read a request for answers and queue them.

    Raises:
        Fault: It is refused.
    """
    data = await _body(request, jobs.settings.max_request_bytes, jobs.settings.timeout)
    asked = read_asked(data, jobs.settings, jobs.model.modes)
    try:
        job = await jobs.begin(asked)
    except Fault as fault:
        metrics.requests.labels(asked.mode, fault.status).inc()
        raise
    return Answering(jobs, job, asked, metrics)


async def _body(request: Request, most: int, timeout: float) -> bytes:
    """The body of a request, never more of it than is allowed."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Fault(415, "the request must have the content type application/json")
    too_long = Fault(413, f"the request has more than {most} bytes", headers={"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length) > most:
        raise too_long
    data = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async for part in request.stream():
                data += part
                if len(data) > most:
                    raise too_long
    except TimeoutError as error:
        raise Fault(408, f"the request did not arrive within {timeout:g} s", headers={"Connection": "close"}) from error
    except ClientDisconnect as error:
        raise Fault(400, "the request ended early") from error
    return bytes(data)
