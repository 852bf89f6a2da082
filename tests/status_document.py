"""A status document as a daemon gives it, for tests of what asks for it and shows it."""

from __future__ import annotations

import copy
from typing import Any

_DOCUMENT: dict[str, Any] = {
    "version": 1,
    "modelfs": "0.1.0",
    "holder_pid": None,
    "handovers": 0,
    "pid": 4242,
    "capabilities": ["CAP_DAC_READ_SEARCH", "CAP_SYS_ADMIN"],
    "mountpoint": "/models",
    "started": 1_700_000_000.0,
    "transport": {"name": "pyfuse3", "passthrough": False, "why": "asked for"},
    "config": "/etc/modelfs/config.yaml",
    "http": None,
    "lock": None,
    "log": "/var/log/modelfs/models.log",
    "models": [
        {
            "name": "finbert",
            "source": "hf://ProsusAI/finbert@main",
            "sources": [
                {
                    "url": "s3://mirror/",
                    "state": "failing",
                    "serving": False,
                    "why": "s3://mirror/: no answer",
                },
                {"url": "hf://ProsusAI/finbert@main", "state": "ready", "serving": True, "why": None},
            ],
            "state": "ready",
            "why": None,
            "revision": "4556d13015211d73dccd3fdd39d39232506f3e43",
            "resolved_at": 1_700_000_001.0,
            "offline": False,
            "files": 9,
            "size": 1_000_000_000,
            "cached_bytes": 250_000_000,
            "rejected": 2,
            "hidden": 12,
            "repositories": ["ProsusAI/finbert"],
            "pinned": True,
            "pickles": "deny",
            "suspicious": {"pytorch_model.bin": "it imports posix.system"},
            "archives": [],
        },
        {
            "name": "gone",
            "source": "s3://nobody/gone",
            "sources": [
                {
                    "url": "s3://nobody/gone",
                    "state": "failing",
                    "serving": True,
                    "why": "s3://nobody/gone: no such bucket: check the name",
                }
            ],
            "state": "unavailable",
            "why": "s3://nobody/gone: no such bucket: check the name",
            "revision": None,
            "resolved_at": None,
            "offline": False,
            "files": 0,
            "size": 0,
            "cached_bytes": 0,
            "rejected": 0,
            "hidden": 0,
            "repositories": [],
            "pinned": False,
            "pickles": "allow",
            "suspicious": {},
            "archives": [],
        },
    ],
    "namespaces": ["hf"],
    "cache": {
        "directory": "/var/cache/modelfs",
        "used": 3 * 1024**3,
        "limit": 50 * 1024**3,
        "free": 200 * 1024**3,
        "objects": 1,
        "unclean_start": False,
        "verity": {"available": False, "why": "the kernel or the file system has no fs-verity"},
        "scrub": {"rate": 20 * 1024**2, "began": 1_700_000_100.0, "finished": None, "bad": 0},
    },
    "reads": {"bytes": 5 * 1024**2, "hit_bytes": 4 * 1024**2, "hit_ratio": 0.8, "errors": {"Unavailable": 3}},
    "fetch": {"bytes": 8 * 1024**2, "requests": 12, "retries": 1, "errors": {}, "in_flight": 0},
    "open_handles": 2,
    "rss_bytes": 90 * 1024**2,
}


def document(**changed: Any) -> dict[str, Any]:
    """Return a status document of one's own, with some members replaced."""
    return copy.deepcopy(_DOCUMENT) | changed
