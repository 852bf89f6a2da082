"""On-demand namespaces: which models a name that nobody configured may stand for. Pure rules, no I/O."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Organisations:
    """Resolver of a namespace whose models have names of two parts, such as ``hf/ORG/NAME``."""

    namespace: str


@dataclass(frozen=True)
class Names:
    """Resolver of a directory whose next name completes a model's URL."""

    path: str
    url: str


@dataclass(frozen=True)
class Repositories:
    """Resolver of a Hub cache: its directories are those of the models of `namespace`."""

    namespace: str


NAMESPACES: Mapping[str, Callable[[str], Organisations | Names]] = {
    "hf": lambda name: Organisations(name),
    "s3": lambda name: Names(name, "s3://"),
}
"""On-demand namespaces: each resolves a name when it is first looked up."""

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FOLDER = re.compile(rf"models--(?!.*--.*--)({_PLAIN.pattern})--({_PLAIN.pattern})")
_REVISED = re.compile(rf"{_PLAIN.pattern}(@{_PLAIN.pattern})?")


def permits(patterns: Iterable[str], path: str) -> bool:
    """Return whether `path`, of a model or of a directory above models, fits one of `patterns`.

    A pattern is a path whose components may hold ``*`` and ``?``: ``hf``, ``hf/org``, ``hf/org/bert-*``. It
    covers what is below it. The revision of a model, after ``@``, does not matter.
    """
    parts = path.partition("@")[0].split("/")
    return any(all(map(fnmatchcase, parts, pattern.split("/"))) for pattern in patterns)


def path_in(resolver: object, name: str) -> str | None:
    """Return the path of `name` in an on-demand namespace; None if nothing there can be called so."""
    match resolver:
        case Organisations(namespace) if _PLAIN.fullmatch(name):
            return f"{namespace}/{name}"
        case Names(path, url) if (_REVISED if url.startswith("hf:") else _PLAIN).fullmatch(name):
            return f"{path}/{name}"
        case Repositories(namespace) if found := _FOLDER.fullmatch(name):
            return "/".join((namespace, *found.groups()))
    return None
