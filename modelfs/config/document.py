"""The YAML file as plain values that know on which line they stand."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from modelfs.config.values import QUOTE_IT, kind_of, meant, quoted, without_secrets
from modelfs.errors import ConfigError

MAX_FILE = 4 * 1024 * 1024
"""Bytes of the largest configuration file that is read."""

T = TypeVar("T")


class Mapped(dict[str, Any]):
    """A mapping of the file that knows on which line each key stands."""

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file
        self.lines: dict[str, int] = {}

    def place(self, key: str) -> str:
        """Return ``FILE:LINE`` of `key`."""
        return f"{self.file}:{self.lines[key]}"


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with lines, without duplicate keys, and with dates left as the text they are."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # the shape the base class has
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def mapping(self, node: yaml.MappingNode) -> Generator[Mapped, None, None]:
        data = Mapped(str(self.name))
        yield data  # before it is filled: a mapping may refer to itself
        written = set()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in written:
                raise ConstructorError(
                    None, None, f"the key {quoted(key.value)} is there twice", key.start_mark
                )
            written.add(name)
        self.flatten_mapping(node)
        for key, value in node.value:
            if not key.tag.endswith(":str"):
                what = f"the key {quoted(key.value)} is not text{QUOTE_IT}"
                raise ConstructorError(None, None, what, key.start_mark)
            data[key.value] = self.construct_object(value)
            data.lines[key.value] = key.start_mark.line + 1


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)


def read_file(file: Path) -> Mapped:
    """Return what stands in `file`; nothing counts as an empty mapping.

    Raises:
        ConfigError: naming file and line.

    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}: name another with --config") from error
    if len(raw) > MAX_FILE:
        raise ConfigError(f"{file}: is larger than 4 MiB: this is no configuration file")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: is not UTF-8: save the file as UTF-8") from None
    document = _parse(text, str(file))
    if document is None:
        return Mapped(str(file))
    if not isinstance(document, Mapped):
        raise ConfigError(f"{file}:1: {kind_of(document)} stands where 'models:' or another key is expected")
    return document


def _parse(text: str, file: str) -> Any:
    try:
        loader = _Loader(text)
        loader.name = file
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        # A value that begins with *, & or ! is a name to YAML, and may be half of a secret.
        problem = re.sub(
            r"(alias|anchor|tag|handle) ['\"].*", rf"\1{QUOTE_IT}", str(error.problem or error.context)
        )
        raise ConfigError(f"{place}: {problem}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        found = f"U+{ord(text[error.position]):04X}"
        raise ConfigError(f"{file}:{line}: the character {found} is not allowed: remove it") from None
    except RecursionError:
        raise ConfigError(f"{file}: is nested too deeply") from None
    except ValueError as error:  # a number that Python refuses to convert
        raise ConfigError(f"{file}: {error}") from None


def parse_option(text: str) -> tuple[str, Any]:
    """Return name and value of an option written ``NAME=VALUE``; VALUE is read as YAML.

    Raises:
        ConfigError: if `text` is not of that form; the value is not repeated, it may be a secret.

    """
    name, separator, value = text.partition("=")
    if not separator or not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError("--option …: write it as NAME=VALUE")
    fault = ConfigError(f"--option {name}: write it as NAME=VALUE")
    try:
        return name, _json_value(_parse(value, "--option"))
    except (ConfigError, ValueError, RecursionError):
        raise fault from None


def refuse_unknown(mapping: Mapped, known: Iterable[str]) -> None:
    """Raise ConfigError if `mapping` has a key that is not one of `known`."""
    for key in mapping:
        if key not in known:
            hint = meant(key, known) or f"; known are {', '.join(sorted(known))}"
            raise ConfigError(f"{mapping.place(key)}: unknown key {quoted(key)}{hint}")


def mapping_at(parent: Mapped, key: str) -> Mapped:
    """Return the mapping under `key`; empty if nothing is written there.

    Raises:
        ConfigError: something else is written there.

    """
    value = parent.get(key)
    if value is None:
        return Mapped(parent.file)
    if not isinstance(value, Mapped):
        raise ConfigError(
            f"{parent.place(key)}: {without_secrets(key)}: {kind_of(value)} is not a mapping: "
            "write 'NAME: …' lines"
        )
    return value


def options_at(parent: Mapped, key: str) -> dict[str, Any]:
    """Return the store options under `key` in plain JSON types; empty if nothing is written there.

    Raises:
        ConfigError: not a mapping, or it holds what JSON cannot say.

    """
    options = mapping_at(parent, key)
    try:
        return {name: _json_value(value) for name, value in options.items()}
    except (ValueError, RecursionError):
        accepted = "options are text, numbers, true/false, lists and mappings"
        raise ConfigError(f"{parent.place(key)}: {without_secrets(key)}: {accepted}") from None


def read_at(mapping: Mapped, key: str, read: Callable[[Any], T], value: Any) -> T:
    """Return ``read(value)``, whose ValueError becomes a ConfigError that names the place of `key`."""
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{mapping.place(key)}: {key}: {error}") from None


def _json_value(value: Any) -> Any:
    """Return `value` in plain JSON types; raise ValueError if it holds anything else."""
    match value:
        case dict():
            return {key: _json_value(item) for key, item in value.items()}
        case list():
            return [_json_value(item) for item in value]
        case None | str() | int():
            return value
        case float() if math.isfinite(value):
            return value
    raise ValueError(f"not a JSON value: {type(value).__name__}")
