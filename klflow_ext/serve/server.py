"""The server itself: its socket, the signals that end it, and the end."""

from __future__ import annotations

import socket
from typing import Any

import uvicorn

from klflow_ext.checks import check_int
from klflow_ext.files import reason
from klflow_ext.serve.app import App


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0: one that is free.

    Raises:
        ValueError: the port is taken, or there is no such host here.
    """
    port = check_int("port", port, 0, 65535, "an integer in [0, 65535]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"port: got {port} on {host!r}, allowed is one that is free: {reason(error)}") from None


def address(listening: socket.socket) -> str:
    """As a client names it."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves an App. At SIGINT and SIGTERM it listens no more, refuses what waits, and finishes what runs."""

    def __init__(self, app: App, **options: Any):
        config = uvicorn.Config(
            app.asgi, log_config=None, access_log=False, ws="none", lifespan="on", server_header=False, **options
        )
        super().__init__(config)
        self.app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.batcher.close()
        await super().shutdown(sockets)
