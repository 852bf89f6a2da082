"""How the demo looks: headings, commands, a tree and rows of numbers; plain text where nobody watches."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from demo.session import Loaded
from modelfs.cli.show import printable, size

INDENT = "   "
COLUMNS = "{:<15}{:<25}{:>7}{:>11}{:>10}{:>11}"


class Screen:
    """Standard output, as a story with numbered steps."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False)
        if not self._console.is_terminal:
            self._console.width = 120
        self._step = 0

    def _print(self, text: str = "", style: str = "") -> None:
        self._console.print(Text(printable_lines(text), style), soft_wrap=True)

    def title(self, text: str) -> None:
        """Print what this is."""
        self._print(text, "bold")

    def step(self, text: str) -> None:
        """Begin the next step."""
        self._step += 1
        self._print()
        self._print(f"{self._step}  {text}", "bold cyan")

    def say(self, text: str) -> None:
        """Print one or more lines of the story."""
        self._print(indented(text))

    def command(self, text: str, output: str = "") -> None:
        """Print a command and what it printed."""
        self._print(indented(f"$ {text}"), "bold")
        if output:
            self._print(indented(output.rstrip()))

    def wait(self, text: str) -> AbstractContextManager[Any]:
        """Return a context in which a terminal shows that something is going on."""
        return self._console.status(f"{INDENT}{text}") if self._console.is_terminal else nullcontext()

    def tree(self, directory: Path) -> None:
        """Print what is below `directory`, with sizes."""
        self._print(indented("\n".join([f"{directory.name}/", *_branches(directory)])))

    def header(self) -> None:
        """Print the head of the rows of `load`."""
        head = COLUMNS.format("MODEL", "LOADED BY", "TIME", "FETCHED", "REQUESTS", "IN CACHE")
        self._print(indented(head), "dim")

    def load(self, model: str, call: str, loaded: Loaded, *, answer: bool) -> None:
        """Print one load; its answer too if wanted."""
        numbers = (f"{loaded.seconds:.2f} s", size(loaded.fetched), loaded.requests, size(loaded.cached))
        self._print(indented(COLUMNS.format(model, call, *numbers)))
        if answer:
            self._print(indented(f"  {loaded.answer}"), "green")


def _branches(directory: Path) -> Iterator[str]:
    entries = sorted(os.scandir(directory), key=lambda entry: (entry.is_dir(), entry.name))
    for entry in entries:
        stem, below = ("└── ", "    ") if entry is entries[-1] else ("├── ", "│   ")
        if entry.is_dir():
            yield f"{stem}{entry.name}/"
            yield from (f"{below}{line}" for line in _branches(Path(entry.path)))
        else:
            yield f"{stem}{entry.name}  {size(entry.stat().st_size)}"


def indented(text: str) -> str:
    """Return `text` with every line moved to where the story stands."""
    return "\n".join(f"{INDENT}{line}" for line in text.splitlines())


def printable_lines(text: str) -> str:
    """Return `text` with nothing in it that could steer a terminal but ends of lines."""
    return "\n".join(map(printable, text.split("\n")))
