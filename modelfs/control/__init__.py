"""The control API of one daemon: JSON over HTTP on a Unix socket that only its user can open.

What only reads is also served on TCP if the configuration says so. ``app`` is the daemon's side, ``client``
everybody else's, ``runtime`` where the sockets lie; ``ready`` finds out whether the mount answers.
docs/status.md describes what the API says. Only daemons import ``app``: a command would pay for a web server.
"""

from modelfs.control.client import ControlClient, error_of
from modelfs.control.runtime import Record, announced, find, mounts, runtime_dir, socket_path, web_listener

__all__ = [
    "ControlClient",
    "Record",
    "announced",
    "error_of",
    "find",
    "mounts",
    "runtime_dir",
    "socket_path",
    "web_listener",
]
