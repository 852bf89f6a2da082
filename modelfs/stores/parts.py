"""Files that were split because a store limits the size of one: which names are parts of which file.

===================================  ===========================================================
``NAME.001``, ``NAME.002`` …         7-Zip and its like; three digits
``NAME.part1``, ``NAME.part-01`` …   ``split -d``; a ``-``, ``_`` or nothing before the number
``NAME.part-aa``, ``NAME.part-ab``…  ``split``
``NAME.aa``, ``NAME.ab`` …           ``split`` with the name and a dot as prefix, from ``aa`` to ``zz``
===================================  ===========================================================

Numbers begin at 0 or 1. One part alone is a file like any other: nothing shows that it was split.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_PART = re.compile(
    r"(?P<name>.+)\.(?:(?P<kind>part[-_]?)(?P<index>[0-9]{1,6}|[a-z]{2,3})|(?P<bare>[0-9]{3}|[a-z]{2}))"
)


@dataclass(frozen=True)
class Split:
    """A file that lies in several.

    Attributes:
        name: of the file.
        parts: names of its parts, in order.
        fault: why it cannot be put together, "" if it can.

    """

    name: str
    parts: Sequence[str]
    fault: str = ""


def splits(names: Iterable[str]) -> list[Split]:
    """Return the files that those of `names` which are parts make up, sorted by name.

    What misses a part at its end looks complete: no name tells how many parts there were.
    """
    families: dict[tuple[str, str, bool], list[tuple[int, str]]] = defaultdict(list)
    for name in sorted(names):
        if match := _PART.fullmatch(name):
            index = match["index"] or match["bare"]
            # aa and aaa are two ways of counting, 9 and 10 are one.
            kind = f"{match['kind'] or ''}{'' if index.isdigit() else len(index)}"
            families[match["name"], kind, index.isdigit()].append((_number(index), name))
    found = []
    for (name, kind, counted), members in sorted(families.items()):
        members.sort()
        numbers = [number for number, _ in members]
        # Endings of two letters are common; only an unbroken run from aa on was made by split.
        bare_letters = not counted and not kind.startswith("part")
        if len(members) < 2 or (bare_letters and numbers != list(range(len(numbers)))):
            continue
        found.append(Split(name, [part for _, part in members], _fault(numbers, counted)))
    return found


def _number(index: str) -> int:
    if index.isdigit():
        return int(index)
    value = 0
    for letter in index:
        value = value * 26 + ord(letter) - ord("a")
    return value


def _fault(numbers: Sequence[int], counted: bool) -> str:
    """Return why parts with these numbers, sorted, are not all there is of a file."""
    if len({*numbers}) < len(numbers):
        return "two of its parts have the same number"
    first = 1 if counted and numbers[0] else 0
    count = numbers[-1] - first + 1
    missing = count - len(numbers)
    if not missing:
        return ""
    gap = next(place for place, number in enumerate(numbers) if number != first + place)
    return f"{missing} of its {count} parts are missing, the first of them is part {gap + 1}"
