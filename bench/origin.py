"""An origin for benchmarks: nginx on loopback serving one directory, plain and over TLS."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import trustme

_CONF = """\
daemon off;
master_process on;
worker_processes 2;
pid {run}/nginx.pid;
error_log stderr error;
events {{ worker_connections 256; }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    keepalive_requests 1000000;
    client_body_temp_path {run}/body;
    proxy_temp_path {run}/proxy;
    fastcgi_temp_path {run}/fastcgi;
    uwsgi_temp_path {run}/uwsgi;
    scgi_temp_path {run}/scgi;
    server {{
        listen 127.0.0.1:{plain};
        listen 127.0.0.1:{tls} ssl;
        ssl_certificate {run}/chain.pem;
        ssl_certificate_key {run}/key.pem;
        ssl_protocols TLSv1.2 TLSv1.3;
        root {root};
    }}
}}
"""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a running origin can be reached: base URLs without trailing slash, and the CA to trust."""

    http: str
    https: str
    ca: Path


@contextlib.contextmanager
def origin(root: Path) -> Iterator[Origin]:
    """Serve the files of `root` while the context is open.

    Raises:
        RuntimeError: nginx is not installed or does not start.

    """
    nginx = find_nginx()
    plain, tls = free_ports(2)
    with tempfile.TemporaryDirectory(prefix="modelfs-origin-") as directory:
        run = Path(directory)
        run.chmod(0o755)  # the workers are not root
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1", "localhost")
        authority.cert_pem.write_to_path(run / "ca.pem")
        certificate.private_key_pem.write_to_path(run / "key.pem")
        (run / "chain.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        (run / "nginx.conf").write_text(_CONF.format(run=run, root=root, plain=plain, tls=tls))
        process = subprocess.Popen([nginx, "-p", directory, "-c", str(run / "nginx.conf")])
        try:
            await_port(process, tls)
            yield Origin(f"http://127.0.0.1:{plain}", f"https://127.0.0.1:{tls}", run / "ca.pem")
        finally:
            process.terminate()
            process.wait(timeout=10)


def find_nginx() -> str:
    """Return the path of nginx.

    Raises:
        RuntimeError: it is not installed.

    """
    nginx = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
    if nginx is None:
        raise RuntimeError("nginx is not installed: apt-get install nginx-light")
    return nginx


def free_ports(count: int) -> list[int]:
    """Return ports of 127.0.0.1 that nobody listened on just now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def await_port(process: subprocess.Popen[bytes], port: int) -> None:
    """Return when nginx listens on `port` of 127.0.0.1.

    Raises:
        RuntimeError: it has ended, or 10 seconds have passed.

    """
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise RuntimeError(f"nginx did not start on 127.0.0.1:{port} (exit code {process.poll()})")
