"""SFTP for fsspec, as far as its own is too trusting or too slow: known hosts, time-outs, requests ahead."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

TIMEOUT = 30
"""Seconds for a connection, a login, and without an answer."""


class UnknownHostKey(paramiko.SSHException):  # type: ignore[misc]  # paramiko has no types
    """Nobody vouches for the key of the server."""


class _Refusal(paramiko.MissingHostKeyPolicy):  # type: ignore[misc]
    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        raise UnknownHostKey(hostname)


class Sftp(SFTPFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Talks only to servers whose keys are known.

    Args:
        host: name or address.
        known_hosts: file with the keys of servers, as OpenSSH has it; by default the user's and the system's.
        more: of ``paramiko.SSHClient.connect``: ``port``, ``username``, ``password``, ``key_filename`` …

    """

    def __init__(self, host: str, known_hosts: str | None = None, **more: Any) -> None:
        self._known_hosts = known_hosts
        super().__init__(host, **more)

    def _connect(self) -> None:
        self.client = paramiko.SSHClient()
        if self._known_hosts:
            self.client.load_host_keys(self._known_hosts)
        else:
            for place in (Path("/etc/ssh/ssh_known_hosts"), Path("~/.ssh/known_hosts").expanduser()):
                if place.exists():
                    self.client.load_system_host_keys(str(place))
        self.client.set_missing_host_key_policy(_Refusal())
        times = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout"), TIMEOUT)
        self.client.connect(self.host, **{**times, **self.ssh_kwargs})
        self.ftp = self.client.open_sftp()
        self.ftp.get_channel().settimeout(TIMEOUT)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """Return the bytes ``[start, end)``, of which up to a MiB is asked for before any has come."""
        with self.ftp.open(self._strip_protocol(path)) as file:
            first = start or 0
            last = file.stat().st_size if end is None else end
            return b"".join(file.readv([(first, last - first)]))
