"""Faces of a model: what of a snapshot is shown, and how it is laid out. Pure functions, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Formats = Literal["all", "production"]
"""Which files are shown of weights that a model holds in several formats."""

Layout = Literal["plain", "hub"]
"""How the files of a model lie in its directory."""


@dataclass(frozen=True, slots=True)
class Face:
    """How one model is to be shown.

    Attributes:
        include: globs, as of `filters.filtered`; empty shows everything.
        exclude: globs of what is not shown, even if it is included.
        formats: see :data:`Formats`.
        archives: which archives are shown as directories: all, none, or those whose path or name fits a glob;
            None for the one that the source itself is.
        latest: the directory that the link ``latest`` leads to; None to find it out.
        layout: see :data:`Layout`.

    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    formats: Formats = "all"
    latest: str | None = None
    archives: bool | tuple[str, ...] | None = None
    layout: Layout = "plain"
