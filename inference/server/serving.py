"""Listen at an address, and answer until somebody says that it is enough."""

from __future__ import annotations

import signal
import socket

import uvicorn
from fastapi import FastAPI

from inference.engine import Engine
from inference.server.service import Service


def listen(host: str, port: int) -> socket.socket:
    """A socket that is bound. Raises ValueError if the address is taken, or none of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another --port or --host"
        ) from error


def announce(listening: socket.socket, service: Service, has_key: bool) -> None:
    """Say where the server is."""
    host, port = listening.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    print(f"http://{host}:{port}/v1", "  ".join(model["id"] for model in service.models()), sep="  ", flush=True)
    if host not in ("127.0.0.1", "[::1]") and not has_key:
        print("anybody who can reach this address can use it: set a key with --api_key", flush=True)


def run(app: FastAPI, engine: Engine, listening: socket.socket, shutdown_timeout: int) -> None:
    """Serve until SIGTERM or Ctrl-C; then nothing new is accepted, and running answers have so many seconds."""
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # the application's own log has one line for each request
        timeout_graceful_shutdown=shutdown_timeout,
        server_header=False,
    )
    # uvicorn sends itself the signal once more when everything is over; that should be no death but an ordinary end.
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print()
    finally:
        signal.signal(signal.SIGTERM, before)
        engine.close(timeout=0)
