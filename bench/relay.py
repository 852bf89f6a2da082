"""A relay that makes loopback look like a network: a delay to the first byte, a speed per connection.

nginx can do neither exactly: it has no delay, and its ``limit_rate`` counts in whole seconds, so that the
first second's worth of every answer passes at full speed, which is all of a range of 8 MiB. Here the bytes
move from socket to socket by ``splice(2)`` without being copied, and the kernel paces them; each connection
has two threads, one for each direction. ``python -m bench.relay PORT DELAY_SECONDS BYTES_PER_SECOND`` prints
the port it listens on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import threading
import time

PIPE = 1 << 20
"""Bytes a pipe may hold, so the most that is moved at once."""

SO_MAX_PACING_RATE = 47
"""socket(7) has no text on it: bytes per second at which TCP sends at the most, from asm-generic/socket.h."""


def serve(listener: socket.socket, upstream: int, delay: float, rate: float) -> None:
    """Relay each connection of `listener` to 127.0.0.1:`upstream`, for ever.

    Args:
        listener: a listening socket.
        upstream: the port to connect to.
        delay: seconds that every request waits.
        rate: bytes per second and connection of the answers; 0 is no limit.

    """
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", upstream))
        for sock in (client, server):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if rate:
            client.setsockopt(socket.SOL_SOCKET, SO_MAX_PACING_RATE, int(rate))
        threading.Thread(target=_converse, args=(client, server, delay), daemon=True).start()


def _converse(client: socket.socket, server: socket.socket, delay: float) -> None:
    """Relay both ways until one side has ended; only then are the two closed, for both threads use them."""
    with client, server:
        answers = threading.Thread(target=_answers, args=(server, client), daemon=True)
        answers.start()
        _requests(client, server, delay)
        answers.join()


def _requests(client: socket.socket, server: socket.socket, delay: float) -> None:
    """Hand over what the client says, `delay` later: a request without a body comes in one piece."""
    with contextlib.suppress(ConnectionError):
        while data := client.recv(65536):
            time.sleep(delay)
            server.sendall(data)
    _end(server)


def _answers(server: socket.socket, client: socket.socket) -> None:
    """Hand over what the server says, as fast as the kernel sends it on."""
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE)
        with contextlib.suppress(ConnectionError):
            while held := os.splice(server.fileno(), into, PIPE):
                while held:
                    held -= os.splice(out, client.fileno(), held)
    finally:
        os.close(out)
        os.close(into)
    _end(client)


def _end(sock: socket.socket) -> None:
    """Tell the other side, and the thread that reads it, that nothing more comes."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Listen on a free port, print it, relay until the process is ended."""
    upstream, delay, rate = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    with socket.create_server(("127.0.0.1", 0), backlog=256) as listener:
        print(listener.getsockname()[1], flush=True)
        serve(listener, upstream, delay, rate)


if __name__ == "__main__":
    main()
