"""`mote serve`: open the socket, run the application, shut down gracefully."""

import signal
import socket
import sys
import threading

import uvicorn

from mote.core.errors import UserError
from mote.inference.model import Model
from mote.serve.app import make_app
from mote.serve.jobs import Jobs
from mote.serve.server_settings import ServeSettings

_FLUSH = 5.0  # seconds to send the error to clients whose answers were cut off


class Server(uvicorn.Server):
    """A server with graceful shutdown: answers in flight get `grace` seconds, then they end with an error.

    Args:
        model: Generates the answers.
        settings: Settings of the server.
    """

    def __init__(self, model: Model, settings: ServeSettings) -> None:
        self.jobs = Jobs(model, settings)
        super().__init__(
            uvicorn.Config(
                make_app(self.jobs),
                http="h11",
                ws="none",
                lifespan="off",
                log_level="warning",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=int(settings.grace + _FLUSH),
            )
        )

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new requests and wait for those in flight."""
        self.jobs.close()
        await super().shutdown(sockets)


def listen(settings: ServeSettings) -> socket.socket:
    """A socket bound to the server's address.

    Raises:
        UserError: The address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
    except OSError as error:
        listening.close()
        raise UserError(
            f"port: {settings.host}:{settings.port} cannot be listened on ({error.strerror}); give another --port or "
            "--host"
        ) from error
    return listening


def serve(model: Model, settings: ServeSettings, listening: socket.socket) -> None:
    """Serve until SIGTERM or Ctrl-C."""
    server = Server(model, settings)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"mote: {settings.name} at {address} (chat page), {address}/v1 (API); Ctrl-C stops it", flush=True)
    if threading.current_thread() is threading.main_thread():
        # uvicorn re-raises the signal once it has stopped; nothing is left to do then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)
    server.run(sockets=[listening])
    model.batcher.wait()
    cut = server.jobs.cut
    print(f"mote: stopped; {cut or 'no'} answer{'' if cut == 1 else 's'} cut off", file=sys.stderr)
