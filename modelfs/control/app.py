"""The daemon's side of the control API: a Starlette application on a Unix socket, served by trio.

What only reads is also served on TCP, if there is a listener for it.
"""

from __future__ import annotations

import json
import logging
import math
import socket
from collections.abc import Awaitable, Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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

from modelfs import __version__
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

    async def unready(self) -> str | None:
        """Return why the mount does not answer; None if it does. Takes a few seconds at the most."""

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

    def prefetching(self, model: str, globs: Sequence[str], *, wait: bool) -> Work:
        """Return what fetches the files of `model` that `globs` match, or all, into the cache.

        With `wait` it is done then, and may be cancelled; without, it has begun. It raises NotFound if there
        is no such model or file, and other errors if they cannot be had at all.
        """

    async def pin(self, model: str) -> dict[str, Any]:
        """Keep what is cached of `model` from eviction, after restarts too; return ``{"models": [...]}``.

        Raises:
            NotFound: there is no model of this name.

        """

    async def unpin(self, model: str) -> dict[str, Any]:
        """Undo `pin`; return ``{"model": NAME, "pinned": false}``.

        Raises:
            NotFound: there is no model of this name.
            ConfigError: the configuration pins it.

        """

    async def evict(self, model: str, globs: Sequence[str]) -> dict[str, Any]:
        """Evict files of `model` that `globs` match, or all, but for those that are open or pinned.

        Raises:
            NotFound: there is no such model or file.

        """

    async def collect(self, older_than: float, *, dry_run: bool) -> dict[str, Any]:
        """Evict what nobody used for `older_than` seconds, but for what is open or pinned.

        With `dry_run` only say what that would be.
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


class Call(NamedTuple):
    """One thing that can be asked for: what answers it, and what the OpenAPI document says of it."""

    method: str
    path: str
    answer: Callable[[Request], Awaitable[Response]]
    text: str
    media: str = "application/json"
    takes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


_STRING = {"type": "string"}
_MEMBERS: Mapping[str, tuple[Callable[[Any], bool], Mapping[str, Any]]] = {
    "model": (lambda value: isinstance(value, str), _STRING),
    "paths": (
        lambda value: isinstance(value, list) and all(isinstance(each, str) for each in value),
        {"type": "array", "items": _STRING},
    ),
    "wait": (lambda value: isinstance(value, bool), {"type": "boolean"}),
    "older_than": (
        lambda value: (
            isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf
        ),
        {"type": "number", "minimum": 0},
    ),
    "dry_run": (lambda value: isinstance(value, bool), {"type": "boolean"}),
}
"""Members of bodies: whether a value is one, and its JSON schema."""


def application(daemon: Daemon, *, read_only: bool = False) -> Starlette:
    """Return the control API of `daemon` as an ASGI application; with `read_only` only what is a GET."""

    async def status(request: Request) -> Response:
        return JSONResponse(await daemon.status())

    async def refresh(request: Request) -> Response:
        return JSONResponse(await daemon.refresh((await asked(request)).get("model")))

    async def verify(request: Request) -> Response:
        return _Lines(daemon.verification((await asked(request)).get("model")))

    async def prefetch(request: Request) -> Response:
        body = await asked(request)
        wait = body.get("wait", False)
        return _Lines(daemon.prefetching(body["model"], body.get("paths", ()), wait=wait))

    async def pin(request: Request) -> Response:
        return JSONResponse(await daemon.pin((await asked(request))["model"]))

    async def unpin(request: Request) -> Response:
        return JSONResponse(await daemon.unpin((await asked(request))["model"]))

    async def evict(request: Request) -> Response:
        body = await asked(request)
        return JSONResponse(await daemon.evict(body["model"], body.get("paths", ())))

    async def collect(request: Request) -> Response:
        body = await asked(request)
        return JSONResponse(await daemon.collect(body["older_than"], dry_run=body.get("dry_run", False)))

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

    async def readyz(request: Request) -> Response:
        why = await daemon.unready()
        return PlainTextResponse(f"{why or 'ok'}\n", 503 if why else 200)

    async def metrics(request: Request) -> Response:
        daemon.metrics.ready.set(await daemon.unready() is None)
        text = await trio.to_thread.run_sync(generate_latest, daemon.metrics.registry)  # it asks the disk
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def openapi(request: Request) -> Response:
        return JSONResponse(_openapi(calls))

    calls = [
        Call("GET", "/v1/status", status, "The state of the mount"),
        Call("POST", "/v1/refresh", refresh, "Look for new revisions", takes=("model",)),
        Call("POST", "/v1/verify", verify, "Read the cache again", _LINES, takes=("model",)),
        Call(
            "POST",
            "/v1/prefetch",
            prefetch,
            "Fetch files of a model into the cache",
            _LINES,
            takes=("paths", "wait"),
            needs=("model",),
        ),
        Call("POST", "/v1/pin", pin, "Keep what is cached of a model", needs=("model",)),
        Call("POST", "/v1/unpin", unpin, "Let what is cached of a model be evicted", needs=("model",)),
        Call("POST", "/v1/evict", evict, "Evict files of a model", takes=("paths",), needs=("model",)),
        Call("POST", "/v1/gc", collect, "Evict what is unused", takes=("dry_run",), needs=("older_than",)),
        Call("POST", "/v1/shutdown", shutdown, "Unmount and end"),
        Call("POST", "/v1/handover", handover, "Leave the mount to a successor"),
        Call("GET", "/healthz", healthz, "Whether the daemon lives", "text/plain"),
        Call("GET", "/readyz", readyz, "Whether the mount answers; 503 with the reason if not", "text/plain"),
        Call("GET", "/metrics", metrics, "Counters for Prometheus", "text/plain"),
        Call("GET", "/openapi.json", openapi, "This document"),
    ]
    calls = [call for call in calls if call.method == "GET" or not read_only]
    by_path = {call.path: call for call in calls}

    async def asked(request: Request) -> dict[str, Any]:
        call = by_path[request.url.path]
        return _members(await request.body(), call.takes, call.needs)

    return Starlette(
        routes=[Route(call.path, call.answer, methods=[call.method]) for call in calls],
        exception_handlers={ModelfsError: _refusal, Exception: _bug},
    )


_LINES = "application/x-ndjson"


def _openapi(calls: Iterable[Call]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of `calls` (https://spec.openapis.org/oas/v3.1.0)."""
    paths: dict[str, Any] = {}
    for call in calls:
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        operation: dict[str, Any] = {
            "summary": call.text,
            "responses": {
                "200": {"description": "Done", "content": {call.media: {}}},
                "default": {"description": "Refused", "content": error},
            },
        }
        if call.path == "/readyz":
            operation["responses"]["503"] = {"description": "Not ready", "content": {call.media: {}}}
        if names := (*call.needs, *call.takes):
            schema: dict[str, Any] = {"type": "object", "properties": {n: _MEMBERS[n][1] for n in names}}
            schema |= {"required": list(call.needs)} if call.needs else {}
            content = {"application/json": {"schema": {**schema, "additionalProperties": False}}}
            operation["requestBody"] = {"content": content}
        paths.setdefault(call.path, {})[call.method.lower()] = operation
    texts = {"error": {"type": "string"}, "kind": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "The control API of modelfs", "version": __version__},
        "paths": paths,
        "components": {"schemas": {"Error": {"type": "object", "properties": texts, "required": ["error"]}}},
    }


def _members(body: bytes, takes: Sequence[str], needs: Sequence[str]) -> dict[str, Any]:
    """Return the members of `body`, a JSON object with all that it `needs` and nothing that it does not take.

    Raises:
        ConfigError: it is something else.

    """
    try:
        found = json.loads(body or b"{}")
    except ValueError:
        raise ConfigError("the body is not JSON: see /openapi.json") from None
    if not isinstance(found, dict) or found.keys() - {*takes, *needs} or {*needs} - found.keys():
        known = ", ".join((*needs, *(f"[{name}]" for name in takes)))
        raise ConfigError(f"the body is not understood: send a JSON object with {known}")
    for name, value in found.items():
        if not _MEMBERS[name][0](value):
            raise ConfigError(f"{name} in the body is not of type {_MEMBERS[name][1]['type']}")
    return found


class _Lines(Response):
    """Lines of JSON as `work` tells its progress, the last one its answer; it ends when nobody listens."""

    def __init__(self, work: Work) -> None:
        self._work = work
        super().__init__(media_type=_LINES)
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = trio.Lock()

        async def tell(line: dict[str, Any]) -> None:
            body = json.dumps(line).encode() + b"\n"
            async with sending:
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
    web: socket.socket | None = None,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control API of `daemon` until cancelled; for ``nursery.start``.

    Args:
        daemon: what is shown and driven.
        listener: where all of it is served; it is taken over.
        web: where only what reads is served; it is taken over too.
        task_status: is told when everything is served.

    """
    served = {_place(sock) for sock in (listener, web) if sock is not None}
    async with trio.open_nursery() as nursery:
        try:
            for sock, read_only in ((listener, False), (web, True)):
                if sock is not None:
                    # hypercorn takes the descriptor over and closes it.
                    config = _server_config(sock.detach())
                    api = application(daemon, read_only=read_only)
                    await nursery.start(hypercorn.trio.serve, api, config)
            task_status.started()
            await trio.sleep_forever()
        finally:
            _hang_up(served)


def _place(sock: socket.socket) -> str | int:
    """Return what a listener and the connections accepted there have in common: a path, or a port."""
    address = sock.getsockname()
    port: str | int = address[1] if isinstance(address, tuple) else address
    return port


def _hang_up(served: Container[str | int]) -> None:
    """End all connections that were accepted at these places.

    hypercorn shields what it sends from being cancelled: a client that takes nothing, because it was stopped,
    would keep the daemon alive. It does not say which connections it has.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # no socket, or closed meanwhile
            sock = socket.socket(fileno=int(descriptor.name))
            try:
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if not listens and _place(sock) in served:
                    sock.shutdown(socket.SHUT_RDWR)
            finally:
                sock.detach()


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
