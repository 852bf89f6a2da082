"""The daemon's side of the control API: a Starlette application on a Unix socket, served by trio."""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import hypercorn.config
import hypercorn.trio
import trio
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from modelfs.errors import AccessDenied, ConfigError, ModelfsError, NotFound
from modelfs.metrics import Metrics

log = logging.getLogger(__name__)

STATUS_CODES: tuple[tuple[type[ModelfsError], int], ...] = (
    (ConfigError, 400),
    (AccessDenied, 403),
    (NotFound, 404),
    (ModelfsError, 502),
)
"""HTTP status of each class of errors; the first that fits counts."""


Tell = Callable[[dict[str, Any]], Awaitable[None]]
"""Takes a line of progress."""

Work = Callable[[Tell], Awaitable[dict[str, Any]]]
"""Something that takes long: called with where its progress goes, returns the answer."""


class Daemon(Protocol):
    """What the control API shows and drives."""

    metrics: Metrics

    async def status(self) -> dict[str, Any]:
        """Return the state as docs/status.md describes it."""

    async def refresh(self, model: str | None) -> dict[str, Any]:
        """Resolve `model`, or every model, again; return ``{"models": [...]}`` as in docs/status.md.

        Raises:
            NotFound: there is no model of this name.

        """

    def verification(self, model: str | None) -> Work:
        """Return what reads the cached content of `model`, or everything in the cache, again.

        It may be cancelled; what was bad until then has been dropped.

        Raises:
            NotFound: there is no model of this name.

        """

    def stop(self) -> None:
        """Begin to unmount and end; returns at once."""

    def check_successor(self) -> None:
        """Return if a successor would be started when this daemon left.

        Raises:
            MountError: the mount would be lost.

        """

    def leave(self) -> None:
        """Begin to leave the mount to a successor; returns at once."""


def application(daemon: Daemon) -> Starlette:
    """Return the control API of `daemon` as an ASGI application."""

    async def status(request: Request) -> Response:
        return JSONResponse(await daemon.status())

    async def refresh(request: Request) -> Response:
        return JSONResponse(await daemon.refresh(await _model(request)))

    async def verify(request: Request) -> Response:
        return _Lines(daemon.verification(await _model(request)))

    async def shutdown(request: Request) -> Response:
        async def stop() -> None:
            daemon.stop()

        # After the answer is out: whoever asked shall hear it.
        return JSONResponse({"stopping": True}, background=BackgroundTask(stop))

    async def handover(request: Request) -> Response:
        async def leave() -> None:
            daemon.leave()

        daemon.check_successor()
        return JSONResponse({"leaving": True}, background=BackgroundTask(leave))

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def metrics(request: Request) -> Response:
        return Response(generate_latest(daemon.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(
        routes=[
            Route("/v1/status", status),
            Route("/v1/refresh", refresh, methods=["POST"]),
            Route("/v1/verify", verify, methods=["POST"]),
            Route("/v1/shutdown", shutdown, methods=["POST"]),
            Route("/v1/handover", handover, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/metrics", metrics),
        ],
        exception_handlers={ModelfsError: _refusal, Exception: _bug},
    )


async def _model(request: Request) -> str | None:
    """Return what the body ``{"model": NAME}`` names; None for an empty body or object."""
    body = await request.body()
    try:
        asked = json.loads(body or b"{}")
    except ValueError:
        raise ConfigError('the body is not JSON: send {"model": "NAME"} or nothing') from None
    if not isinstance(asked, dict) or asked.keys() - {"model"}:
        raise ConfigError('the body is not understood: send {"model": "NAME"} or nothing')
    model = asked.get("model")
    if model is not None and not isinstance(model, str):
        raise ConfigError("model is not text")
    return model


class _Lines(Response):
    """Lines of JSON as `work` tells its progress, the last one its answer; it ends when nobody listens."""

    def __init__(self, work: Work) -> None:
        self._work = work
        super().__init__(media_type="application/x-ndjson")
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def tell(line: dict[str, Any]) -> None:
            body = json.dumps(line).encode() + b"\n"
            await send({"type": "http.response.body", "body": body, "more_body": True})

        async def work() -> None:
            try:
                await tell({"answer": await self._work(tell)})
            except ModelfsError as error:
                await tell(_told(error))
            nursery.cancel_scope.cancel()

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            while (await receive())["type"] != "http.disconnect":
                pass
            nursery.cancel_scope.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _told(error: Exception) -> dict[str, Any]:
    return {"error": str(error), "kind": type(error).__name__}


async def _refusal(request: Request, error: Exception) -> Response:
    code = next(code for kind, code in STATUS_CODES if isinstance(error, kind))
    return JSONResponse(_told(error), status_code=code)


async def _bug(request: Request, error: Exception) -> Response:
    # The server logs the traceback.
    return JSONResponse({"error": "internal error: see the daemon's log"}, status_code=500)


async def serve(
    daemon: Daemon,
    listener: socket.socket,
    *,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control API of `daemon` on `listener` until cancelled; for ``nursery.start``."""
    # hypercorn takes the descriptor over and closes it.
    config = _server_config(listener.detach())
    await hypercorn.trio.serve(application(daemon), config, task_status=task_status)  # type: ignore[arg-type]


def _server_config(descriptor: int) -> hypercorn.config.Config:
    # hypercorn tells at level INFO where it runs; its errors are ours to log.
    logger = logging.getLogger("modelfs.control.server")
    logger.setLevel(logging.WARNING)
    config = hypercorn.config.Config()
    config.bind = [f"fd://{descriptor}"]
    config.accesslog = None
    config.errorlog = logger
    config.include_server_header = False
    config.graceful_timeout = 1.0
    return config
