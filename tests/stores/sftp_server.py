"""An SFTP server on loopback in a process of its own: asyncssh, with a directory as its root.

``python -m tests.stores.sftp_server DIRECTORY USER PASSWORD`` prints its port and its public key, and ends
with its standard input.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncssh

USER, PASSWORD = "reader", "s3cr3t-pass"


@dataclass(frozen=True)
class Sftp:
    """A running server; `known_hosts` is the file with its key."""

    port: int
    known_hosts: Path

    @property
    def url(self) -> str:
        return f"fsspec+sftp://{USER}@127.0.0.1:{self.port}"


@contextmanager
def sftp(root: Path, directory: Path) -> Iterator[Sftp]:
    """Serve `root`; files of our own go to `directory`."""
    command = [sys.executable, "-m", __name__, str(root), USER, PASSWORD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin
        assert child.stdout
        try:
            port, key = child.stdout.readline().split(" ", 1)
            known = directory / "known_hosts"
            known.write_text(f"[127.0.0.1]:{port} {key}")
            yield Sftp(int(port), known)
        finally:
            child.stdin.close()


async def serve(root: str, user: str, password: str) -> None:
    class Server(asyncssh.SSHServer):
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, given: str) -> bool:
            return (username, given) == (user, password)

    def chrooted(channel: asyncssh.SSHServerChannel) -> asyncssh.SFTPServer:
        return asyncssh.SFTPServer(channel, chroot=root.encode())

    key = asyncssh.generate_private_key("ssh-ed25519")
    listener = await asyncssh.listen(
        "127.0.0.1", 0, server_factory=Server, server_host_keys=[key], sftp_factory=chrooted
    )
    print(listener.get_port(), key.export_public_key().decode().strip(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    listener.close()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
