"""Readers of single values: sizes, durations, paths, choices.

Each takes what a file, an environment variable or a flag holds and raises ValueError with the reason.
"""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from modelfs.stores import redact
from modelfs.types import BLOCK

_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": factor**power
    for power, letter in enumerate("kmgtp", start=1)
    for suffix, factor in (("", 1000), ("b", 1000), ("i", 1024), ("ib", 1024))
}
_SECONDS = {"": 1.0, "s": 1.0, "ms": 0.001, "m": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]*)\s*", re.ASCII)


def parse_archives(value: Any) -> bool | tuple[str, ...]:
    """Return which archives are shown as directories: all, none, or those that fit one of some globs.

    Raises:
        ValueError: if `value` is none of these.

    """
    if isinstance(value, bool):
        return value
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, list) or not all(isinstance(one, str) and one for one in patterns):
        raise ValueError(f"{quoted(value)} is neither true, false nor globs: write it like ['data/*.zip']")
    return tuple(patterns)


def parse_count(value: Any) -> int:
    """Return a whole number above zero.

    Raises:
        ValueError: if `value` is none.

    """
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,12}", value):
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{quoted(value)} is not a whole number above zero")
    return value


def parse_size(value: Any) -> int:
    """Return a size in bytes: a whole number, or text like ``50GiB``, ``500MB``, ``20Gi``, ``20G``.

    ``KiB`` and ``Ki`` are 1024 bytes, ``KB`` and ``K`` are 1000 (as in Kubernetes); case does not matter.

    Raises:
        ValueError: if `value` is not a size.

    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{quoted(value)} is not a size: write it like 50GiB, 500MB or in bytes")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def parse_share(value: Any) -> int | float:
    """Return bytes (int) like `parse_size`, or for a percentage like ``5%`` the fraction (float).

    Raises:
        ValueError: if `value` is neither, or more than 100 %.

    """
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2] != "%":
        try:
            return parse_size(value)
        except ValueError:
            raise ValueError(
                f"{quoted(value)} is neither a size nor a percentage: write it like 10GiB or 5%"
            ) from None
    fraction = float(match[1]) / 100
    if fraction > 1:
        raise ValueError(f"{quoted(value)} is more than 100%")
    return fraction


def parse_duration(value: Any) -> float:
    """Return seconds: a number, or text like ``60s``, ``500ms``, ``5m``, ``2h``, ``1d``.

    Raises:
        ValueError: if `value` is not a duration.

    """
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    match = _NUMBER.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _SECONDS:
        raise ValueError(f"{quoted(value)} is not a duration: write it like 60s, 5m, 2h or in seconds")
    return float(match[1]) * _SECONDS[match[2].lower()]


def parse_cache_size(value: Any) -> int:
    """Return the size of a cache in bytes, one block or more."""
    size = parse_size(value)
    if size < BLOCK:
        raise ValueError(f"{quoted(value)} is less than one block: give the cache at least 8MiB")
    return size


def parse_rate(value: Any) -> int:
    """Return bytes per second: a size with or without ``/s``; 0 for ``off``."""
    if value is False or value in ("off", 0):  # YAML takes off for false
        return 0
    try:
        rate = parse_size(value.removesuffix("/s") if isinstance(value, str) else value)
    except ValueError:
        rate = 0
    if rate == 0:
        raise ValueError(f"{quoted(value)} is neither a rate nor off: write it like 20MiB/s")
    return rate


def parse_deadline(value: Any) -> float:
    """Return seconds, more than 0."""
    seconds = parse_duration(value)
    if seconds == 0:
        raise ValueError("a deadline of 0 would fail every read: write it like 300s")
    return seconds


_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def parse_boolean(value: Any) -> bool:
    """Return a truth value; text as in an environment variable."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _BOOLEANS:
        return _BOOLEANS[value.lower()]
    raise ValueError(f"{quoted(value)} is neither true nor false")


def parse_connections(value: Any) -> int:
    """Return a number of connections, 1 to 256."""
    text = "" if isinstance(value, bool) else str(value)
    if not re.fullmatch(r"[1-9]\d{0,2}", text, re.ASCII) or int(text) > 256:
        raise ValueError(f"{quoted(value)} is not a whole number from 1 to 256")
    return int(text)


def parse_http(value: Any) -> str | None:
    """Return ``IP:PORT``, or None for ``off``; what others can reach needs ``public`` before it."""
    if value is False or value == "off":  # YAML takes off for false
        return None
    fault = ValueError(f"{quoted(value)} is no address: write it like 127.0.0.1:9180 or [::1]:9180")
    if not isinstance(value, str):
        raise fault
    public, address = re.fullmatch(r"(public )?\s*(.*)", value.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host[1:-1] if host.startswith("[") and host.endswith("]") else host)
    except ValueError:
        raise fault from None
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535 or (ip.version == 6) != ("[" in host):
        raise fault
    if not ip.is_loopback and public is None:
        raise ValueError(
            f"{address} can be reached from outside, and whoever reaches it sees the status: "
            f"if that is meant, write 'public {address}'"
        )
    return address


def parse_text(value: Any) -> str:
    """Return text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{quoted(value)} is not text" + (QUOTE_IT if value else ""))
    return value


def parse_path(value: Any) -> Path:
    """Return a path, with ``~`` expanded."""
    if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
        raise ValueError(f"{quoted(value)} is not a path")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{quoted(value)}: {error}") from None


def choice(*choices: str) -> Callable[[Any], str]:
    """Return a reader that accepts exactly these words."""

    def read(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"{quoted(value)} is not one of {', '.join(choices)}{meant(value, choices)}")
        return str(value)

    return read


parse_pickles = choice("allow", "warn", "deny")
"""Return a :data:`modelfs.types.PicklePolicy`."""


def parse_globs(value: Any) -> tuple[str, ...]:
    """Return globs of paths: one, or a list of them."""
    return tuple(map(parse_text, value if isinstance(value, list) else [value]))


def parse_namespaces(known: Mapping[str, str]) -> Callable[[Any], tuple[str, ...]]:
    """Return a reader of a list, or of comma-separated text, of namespaces and patterns of models in them.

    Args:
        known: namespace → a URL that has as many components as its models' names.

    """
    one = choice(*known)

    def pattern(word: Any) -> str:
        name, slash, rest = str(word).partition("/")
        one(name)
        most = known[name].partition("://")[2].count("/") + 1
        if slash and (rest.count("/") >= most or not re.fullmatch(r"[\w.*?-]+(/[\w.*?-]+)*", rest, re.ASCII)):
            example = f"{name}/{'ORG/bert-*' if most > 1 else 'bert-*'}"
            raise ValueError(f"{quoted(word)} is no pattern of models in {name}: write it like {example}")
        return str(word)

    def read(value: Any) -> tuple[str, ...]:
        words = [word.strip() for word in value.split(",")] if isinstance(value, str) else value
        if not isinstance(words, list):
            raise ValueError(f"{quoted(value)} is not a list of {', '.join(known)}")
        return tuple(dict.fromkeys(map(pattern, words)))

    return read


QUOTE_IT = ": put it in quotes"
"""What helps when YAML took a word for a number, a truth value or a date."""


def quoted(value: Any) -> str:
    """Return `value` for a message: short, on one line, a URL redacted, of a collection only what it is."""
    if value is None or isinstance(value, dict | list):
        return kind_of(value)
    text = repr(without_secrets(str(value)))
    return text if len(text) <= 80 else f"{text[:77]}…'"


def kind_of(value: Any) -> str:
    """Return what `value` is, for a message about one that may be a secret."""
    match value:
        case None:
            return "nothing"
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return "text"
    return "a single value"


def without_secrets(key: str) -> str:
    """Return `key` for a message: names are as they are written, but a URL may hold a password."""
    return redact(key) if "://" in key else key


def meant(word: Any, known: Iterable[str]) -> str:
    """Return the end of a message that names the closest of `known`; empty if none is close."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
