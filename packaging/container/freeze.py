"""Write constraints.txt: the versions that are installed here of everything the image needs.

Run it in the environment of the tests after dependencies have changed: python packaging/container/freeze.py
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
EXTRAS = ("az", "fsspec", "gs", "zstd")


def closure() -> set[str]:
    """Return the names of all packages that modelfs with the image's extras needs, on this Python and system.

    Raises:
        importlib.metadata.PackageNotFoundError: one of them is not installed.

    """
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for e in EXTRAS for r in project["optional-dependencies"][e])]
    waiting = [Requirement(text) for text in wanted]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        needed = map(Requirement, metadata.requires(requirement.name) or ())
        extras = ("", *requirement.extras)
        waiting += [r for r in needed if not r.marker or any(r.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, _ in seen}


def main() -> None:
    """Write the file."""
    lines = [f"{name}=={metadata.version(name)}" for name in sorted(closure())]
    title = "# What the image installs: the versions that the tests ran with. Made by freeze.py beside it."
    (HERE / "constraints.txt").write_text("\n".join([title, *lines, ""]))


if __name__ == "__main__":
    main()
