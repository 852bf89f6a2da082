"""What the control socket says while no daemon serves the mount: one answer to every request.

It is the holder that says it, so there is neither an event loop nor a web server here.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from modelfs.control.runtime import Record, listening, socket_path, write_record
from modelfs.errors import MountError

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 1.0
"""How long one who asks may take to send a request; the next one waits meanwhile."""

_MOST = 65536


class Notice:
    """Listens on a control socket; every request is answered with status 503 and `body` as JSON."""

    def __init__(self, listener: socket.socket, body: Mapping[str, Any]) -> None:
        self._listener = listener
        content = json.dumps(body).encode()
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        )
        self._answer = head.encode() + content

    def fileno(self) -> int:
        """Return what is readable when somebody asks."""
        return self._listener.fileno()

    def answer(self) -> None:
        """Answer one who asks; whoever is too slow or goes away gets no answer."""
        with suppress(OSError), self._listener.accept()[0] as connection:
            connection.settimeout(PATIENCE_SECONDS)
            asked = b""
            while b"\r\n\r\n" not in asked and len(asked) < _MOST:
                part = connection.recv(_MOST)
                if not part:
                    return
                asked += part
            connection.sendall(self._answer)


@contextmanager
def posted(record: Record, body: Mapping[str, Any]) -> Iterator[Notice | None]:
    """Listen on the control socket of ``record.mountpoint`` as its daemon would; yield None if that fails."""
    notice = None
    with ExitStack() as stack:
        try:
            path = socket_path(record.mountpoint)
            listener = stack.enter_context(listening(path))
            write_record(path, record)
            notice = Notice(listener, body)
        except (MountError, OSError) as error:
            log.error("modelfs status cannot tell that: %s", error)
        yield notice
