"""On-demand namespaces: which models a name that nobody configured may stand for. Pure rules, no I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Names:
    """Resolver of a directory whose names are parts of models' URLs.

    Attributes:
        path: of the directory.
        url: what comes before a name.
        between: what comes behind it and behind each of the next, before the name that completes the URL.

    """

    path: str
    url: str
    between: str = ""

    def below(self, name: str) -> Names:
        """Return the resolver of the directory `name`, which does not complete a URL yet."""
        return Names(f"{self.path}/{name}", f"{self.url}{name}{self.between[0]}", self.between[1:])


@dataclass(frozen=True)
class Repositories:
    """Resolver of a Hub cache: its directories are those of the models of `namespace`."""

    namespace: str


NAMESPACES: Mapping[str, Names] = {
    "hf": Names("hf", "hf://", "/"),
    "s3": Names("s3", "s3://"),
    "github": Names("github", "github://", "/@"),
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
        case Names(path, url, between):
            known = _REVISED if url.startswith("hf:") and not between else _PLAIN
            return f"{path}/{name}" if known.fullmatch(name) else None
        case Repositories(namespace) if found := _FOLDER.fullmatch(name):
            return "/".join((namespace, *found.groups()))
    return None
