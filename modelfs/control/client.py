"""Ask a daemon: its state, a refresh, its end."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfs import errors
from modelfs.control.runtime import peer_pid
from modelfs.errors import ModelfsError, MountError

if TYPE_CHECKING:
    import httpx


class ControlClient:
    """A client of the daemon that listens on a control socket; each call is one connection.

    All calls raise MountError if no daemon answers in time, and what the daemon says if it refuses.
    """

    def __init__(self, socket_path: Path) -> None:
        self._socket = socket_path

    def status(self, seconds: float = 10.0) -> dict[str, Any]:
        """Return the daemon's state as docs/status.md describes it."""
        return self._call("GET", "/v1/status", seconds)

    def refresh(self, model: str | None = None, seconds: float = 600.0) -> dict[str, Any]:
        """Make the daemon resolve `model`, or every model, again; return what became of each."""
        return self._call("POST", "/v1/refresh", seconds, {} if model is None else {"model": model})

    def verify(
        self, model: str | None, progress: Callable[[dict[str, Any]], None], seconds: float = 600.0
    ) -> dict[str, Any]:
        """Make the daemon read the cached content of `model`, or everything in its cache, again.

        Args:
            model: its name; None for everything.
            progress: called with each line of progress.
            seconds: the longest wait for the next of them.

        Returns the answer as docs/status.md describes it. Whoever gives up ends it.

        """
        return self._watch("/v1/verify", {} if model is None else {"model": model}, progress, seconds)

    def prefetch(
        self,
        model: str,
        paths: Sequence[str],
        progress: Callable[[dict[str, Any]], None],
        *,
        wait: bool,
        seconds: float = 600.0,
    ) -> dict[str, Any]:
        """Make the daemon fetch files of `model` that the globs `paths` match, or all, into its cache.

        Args:
            model: its name.
            paths: globs.
            progress: called with each line of progress.
            wait: return when all is there; whoever gives up ends it. Without, when it has begun.
            seconds: the longest wait for the next line.

        """
        body = {"model": model, "paths": list(paths), "wait": wait}
        return self._watch("/v1/prefetch", body, progress, seconds)

    def pin(self, model: str, seconds: float = 60.0) -> dict[str, Any]:
        """Make the daemon keep what is cached of `model`; return what it says of the model."""
        return self._call("POST", "/v1/pin", seconds, {"model": model})

    def unpin(self, model: str, seconds: float = 60.0) -> dict[str, Any]:
        """Undo `pin`."""
        return self._call("POST", "/v1/unpin", seconds, {"model": model})

    def evict(self, model: str, paths: Sequence[str], seconds: float = 600.0) -> dict[str, Any]:
        """Make the daemon evict the files of `model` that the globs `paths` match, or all of it."""
        return self._call("POST", "/v1/evict", seconds, {"model": model, "paths": list(paths)})

    def collect(self, older_than: float, *, dry_run: bool, seconds: float = 600.0) -> dict[str, Any]:
        """Make the daemon evict what nobody used for `older_than` seconds, or say what that would be."""
        return self._call("POST", "/v1/gc", seconds, {"older_than": older_than, "dry_run": dry_run})

    def _watch(
        self, path: str, body: Any, progress: Callable[[dict[str, Any]], None], seconds: float
    ) -> dict[str, Any]:
        """Return the answer that follows lines of progress; `seconds` is the longest wait for the next."""
        with self._request("POST", path, seconds, body) as response:
            for text in response.iter_lines():
                line = json.loads(text)
                if "error" in line:
                    raise error_of(line)
                if "answer" in line:
                    answer: dict[str, Any] = line["answer"]
                    return answer
                progress(line)
        raise MountError(f"the daemon on {self._socket} broke off: see its log")

    def stop(self, seconds: float = 10.0) -> None:
        """Ask the daemon to unmount and end; returns when it has heard, not when it is done."""
        self._call("POST", "/v1/shutdown", seconds, {})

    def hand_over(self, seconds: float = 10.0) -> None:
        """Ask the daemon to leave its mount to a successor; returns when it has heard."""
        self._call("POST", "/v1/handover", seconds, {})

    def _call(self, method: str, path: str, seconds: float, body: Any = None) -> dict[str, Any]:
        with self._request(method, path, seconds, body) as response:
            return _mapping(response.read())

    @contextmanager
    def _request(self, method: str, path: str, seconds: float, body: Any) -> Iterator[httpx.Response]:
        """Send a request and give its answer, whose body is still to come, if the daemon does not refuse."""
        where = f"the daemon on {self._socket}"
        if peer_pid(self._socket) is None:
            raise MountError(f"no daemon listens on {self._socket}: is it mounted? see modelfs status")
        import httpx  # the holder uses this package too, and needs no HTTP client

        transport = httpx.HTTPTransport(uds=str(self._socket))
        try:
            with (
                httpx.Client(
                    transport=transport, base_url="http://modelfs", timeout=seconds, trust_env=False
                ) as client,
                client.stream(method, path, json=body) as response,
            ):
                if response.is_error:
                    raise error_of(_mapping(response.read()))
                yield response
        except httpx.TimeoutException as error:
            raise MountError(f"{where} did not answer within {seconds:g} s: see its log") from error
        except (httpx.HTTPError, ValueError) as error:
            raise MountError(f"{where} gave no valid answer: see its log") from error


def _mapping(content: bytes) -> dict[str, Any]:
    """Return the JSON mapping that `content` is; ValueError if it is none."""
    answer = json.loads(content)
    if not isinstance(answer, dict):
        raise ValueError("not a mapping")
    return answer


def error_of(answer: Mapping[str, Any]) -> ModelfsError:
    """Return the error that a daemon told as ``{"error": message, "kind": class}``, in its own class."""
    kind = getattr(errors, str(answer.get("kind")), None)
    message = str(answer.get("error", "the daemon refused: see its log"))
    if isinstance(kind, type) and issubclass(kind, ModelfsError):
        return kind(message)
    return ModelfsError(message)
