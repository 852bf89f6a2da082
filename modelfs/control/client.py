"""Ask a daemon: its state, a refresh, its end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelfs import errors
from modelfs.control.runtime import peer_pid
from modelfs.errors import ModelfsError, MountError


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

    def stop(self, seconds: float = 10.0) -> None:
        """Ask the daemon to unmount and end; returns when it has heard, not when it is done."""
        self._call("POST", "/v1/shutdown", seconds, {})

    def hand_over(self, seconds: float = 10.0) -> None:
        """Ask the daemon to leave its mount to a successor; returns when it has heard."""
        self._call("POST", "/v1/handover", seconds, {})

    def _call(self, method: str, path: str, seconds: float, body: Any = None) -> dict[str, Any]:
        where = f"the daemon on {self._socket}"
        if peer_pid(self._socket) is None:
            raise MountError(f"no daemon listens on {self._socket}: is it mounted? see modelfs status")
        import httpx  # the holder uses this package too, and needs no HTTP client

        transport = httpx.HTTPTransport(uds=str(self._socket))
        try:
            with httpx.Client(
                transport=transport, base_url="http://modelfs", timeout=seconds, trust_env=False
            ) as client:
                response = client.request(method, path, json=body)
            answer = response.json()
        except httpx.TimeoutException as error:
            raise MountError(f"{where} did not answer within {seconds:g} s: see its log") from error
        except (httpx.HTTPError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise MountError(f"{where} gave no valid answer: see its log") from error
        if not isinstance(answer, dict):
            raise MountError(f"{where} gave no valid answer: see its log")
        if response.is_error:
            raise error_of(answer)
        return answer


def error_of(answer: Mapping[str, Any]) -> ModelfsError:
    """Return the error that a daemon told as ``{"error": message, "kind": class}``, in its own class."""
    kind = getattr(errors, str(answer.get("kind")), None)
    message = str(answer.get("error", "the daemon refused: see its log"))
    if isinstance(kind, type) and issubclass(kind, ModelfsError):
        return kind(message)
    return ModelfsError(message)
