"""Configuration: defaults, a YAML file, the environment and flags become one frozen :class:`Settings`.

Later ones win: defaults < file < ``MODELFS_*`` variables < flags. :data:`KEYS` is the one table of what can
be set; docs/configuration.md is checked against it. Every error is a ``ConfigError`` of one line that starts
with the place: ``FILE:LINE``, ``$VARIABLE`` or ``--flag``.

Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from modelfs.archives import Limits
from modelfs.config.document import (
    Mapped,
    mapping_at,
    options_at,
    parse_option,
    read_at,
    read_file,
    refuse_unknown,
)
from modelfs.config.values import (
    choice,
    meant,
    parse_archives,
    parse_boolean,
    parse_cache_size,
    parse_connections,
    parse_count,
    parse_deadline,
    parse_duration,
    parse_globs,
    parse_http,
    parse_namespaces,
    parse_path,
    parse_pickles,
    parse_rate,
    parse_share,
    parse_size,
    parse_text,
    quoted,
)
from modelfs.errors import ConfigError
from modelfs.stores import is_known, known_schemes, open_store, scheme_of, spelled
from modelfs.stores.file import path_of
from modelfs.types import PicklePolicy, path_fault
from modelfs.views import Face, hub, ollama

__all__ = [
    "KEYS",
    "NAMESPACES",
    "RESERVED",
    "CacheSettings",
    "Key",
    "ModelSettings",
    "Settings",
    "StoreOptions",
    "find_file",
    "load",
    "options_for",
    "parse_duration",
    "parse_option",
    "parse_share",
    "parse_size",
    "store_options",
]

SEARCH = (Path("modelfs.yaml"), Path("/etc/modelfs/config.yaml"))
"""Where a configuration file is looked for when neither ``--config`` nor ``$MODELFS_CONFIG`` names one."""

NAMESPACES: Mapping[str, str] = {
    "hf": "hf://org/name",
    "s3": "s3://bucket",
    "github": "github://owner/repo@tag",
}
"""On-demand namespace → a URL like those it makes: for the options of the scheme, and the depth of names."""

RESERVED = frozenset({*NAMESPACES, "oci", "model-metadata.yaml", hub.PLACE, ollama.PLACE})
"""First components that a model's name must not have: the tree uses or will use them itself."""

LOCK = "modelfs.lock"
"""Name of the lock file of whoever does not choose one, beside the configuration file."""

_LIMITS = Limits()

StoreOptions = Mapping[str, Mapping[str, Any]]
"""URL prefix → options of the stores under it."""


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One model of the mount.

    Attributes:
        name: ``NAME`` or ``ORG/NAME``, its directory in the mount.
        sources: store URLs, in the order they are tried.
        options: for the first store: those of its URL prefixes, then the model's own. May hold secrets.
        fallback_options: the same for each of the stores after it.
        optional: the mount succeeds although the model cannot be resolved.
        pin: its content is never evicted from the cache.
        pickles: ``allow``, ``warn`` or ``deny``: what becomes of suspicious ones.
        face: what of it is shown, and how.

    """

    name: str
    sources: tuple[str, ...] = field(repr=False)
    options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    optional: bool = False
    pin: bool = False
    pickles: PicklePolicy = "allow"
    face: Face = field(default_factory=Face)
    fallback_options: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)

    @property
    def fallbacks(self) -> tuple[tuple[str, Mapping[str, Any]], ...]:
        """URL and options of each store after the first."""
        return tuple(zip(self.sources[1:], self.fallback_options, strict=True))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSettings:
        """Return the settings that `Settings.to_json` wrote of a model."""
        face = data.get("face", {})
        globs = {name: tuple(face[name]) for name in face if isinstance(face[name], list)}
        lists = {name: tuple(data.get(name, ())) for name in ("sources", "fallback_options")}
        return cls(**{**data, **lists, "face": Face(**{**face, **globs})})


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where the cache is and how much it may take.

    Attributes:
        directory: absolute; no other daemon may use it.
        size: limit of the cached content in bytes.
        min_free: what stays free on the disk: bytes (int) or a fraction of the disk (float).

    """

    directory: Path
    size: int
    min_free: int | float


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything one mount needs to know; paths are absolute.

    Attributes:
        mountpoint: where the tree appears.
        cache: see `CacheSettings`.
        models: in the order they were written.
        namespaces: the on-demand namespaces the mount offers, or patterns of the models in them.
        store_options: options by URL prefix, for stores opened on demand. May hold secrets.
        transport: how requests reach us from the kernel.
        allow_other: other users may read the mount.
        refresh: seconds between two resolutions of every model; 0 = never.
        read_deadline: seconds after which a read that gets no bytes fails.
        scrub: bytes per second at which the cache is read again in the background; 0 = never.
        keep_going: mount although models that are not optional cannot be resolved.
        pickles: what becomes of suspicious pickles in models that do not say it themselves.
        archives: what no archive that is shown as a directory may exceed.
        connections: how many requests to stores run at once.
        http: ``IP:PORT`` where what only reads of the control API is served too; None = nowhere.
        locked: models must be what the lock says.
        lock: the lock file.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        log_file: where the daemon's log goes; None = standard error.
        source_file: the configuration file that was read, if any.

    """

    mountpoint: Path
    cache: CacheSettings
    models: tuple[ModelSettings, ...]
    namespaces: tuple[str, ...]
    store_options: StoreOptions = field(repr=False)
    transport: Literal["auto", "kernel", "pyfuse3"]
    allow_other: bool
    refresh: float
    read_deadline: float
    scrub: int
    keep_going: bool
    pickles: PicklePolicy
    archives: Limits
    connections: int
    http: str | None
    locked: bool
    lock: Path
    log_level: str
    log_file: Path | None
    source_file: Path | None

    def to_json(self) -> dict[str, Any]:
        """Return a form for the daemon's process, secrets included; `from_json` reverses it."""
        data = asdict(self)
        data["cache"]["directory"] = str(self.cache.directory)
        for name in _PATHS:
            data[name] = None if data[name] is None else str(data[name])
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Settings:
        """Return the settings that `to_json` wrote; what an older modelfs did not write is as by default.

        Raises:
            ConfigError: a newer one wrote what is not known here.

        """
        defaults = {key.name: key.default for key in KEYS if "." not in key.name}
        data = {**defaults, "lock": LOCK, **data}
        try:
            cache = CacheSettings(**{**data["cache"], "directory": Path(data["cache"]["directory"])})
            models = tuple(map(ModelSettings.from_json, data["models"]))
            data["archives"] = Limits(**data.get("archives", {}))
            paths = {name: None if data[name] is None else Path(data[name]) for name in _PATHS}
            given = {"cache": cache, "models": models, "namespaces": tuple(data["namespaces"])}
            return cls(**{**data, **given, **paths})
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"another version of modelfs made this mount, with settings not known here ({error}): "
                "unmount it and mount it again"
            ) from error


@dataclass(frozen=True, slots=True)
class Key:
    """One thing that can be set.

    Attributes:
        name: in the file; a dot separates the section from the key.
        read: turns what was written into the value, or raises ValueError with the reason.
        default: the value if nobody says anything.
        text: what it does, for the documentation.

    """

    name: str
    read: Callable[[Any], Any]
    default: Any
    text: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "MODELFS_" + self.name.upper().replace(".", "_")

    @property
    def flag(self) -> str:
        """The flag of ``modelfs mount`` that sets it, where there is one."""
        return "--" + self.name.replace(".", "-").replace("_", "-")


KEYS: tuple[Key, ...] = (
    Key("cache.dir", parse_path, None, "directory of the cache; no other daemon may use it"),
    Key("cache.size", parse_cache_size, 50 * 1024**3, "limit of the cached content"),
    Key("cache.min_free", parse_share, 0.05, "what stays free on the cache's disk"),
    Key("namespaces", parse_namespaces(NAMESPACES), None, "on-demand namespaces to offer"),
    Key("transport", choice("auto", "kernel", "pyfuse3"), "auto", "how requests reach us from the kernel"),
    Key("allow_other", parse_boolean, False, "let other users read the mount"),
    Key("refresh", parse_duration, 60.0, "time between two looks for new revisions; 0 = never"),
    Key("read_deadline", parse_deadline, 300.0, "a read that gets no bytes for so long fails"),
    Key("scrub", parse_rate, 20 * 1024**2, "how fast the cache is read again to find bad blocks, or off"),
    Key("keep_going", parse_boolean, False, "mount although some models cannot be resolved"),
    Key("pickles", parse_pickles, "allow", "what becomes of suspicious pickles: allow, warn or deny"),
    Key("archives.members", parse_count, _LIMITS.members, "most members of an archive that is a directory"),
    Key("archives.size", parse_size, _LIMITS.size, "most bytes of all members of such an archive"),
    Key("archives.ratio", parse_count, _LIMITS.ratio, "most unpacked bytes for each packed one"),
    Key("archives.depth", parse_count, _LIMITS.depth, "most components of a member's path"),
    Key("connections", parse_connections, 16, "requests to stores at once"),
    Key("http", parse_http, None, "address for status, health and metrics, like 127.0.0.1:9180, or off"),
    Key("locked", parse_boolean, False, "refuse models that are not what the lock says"),
    Key("lock", parse_path, None, "the lock that modelfs lock writes"),
    Key("log_level", choice("debug", "info", "warning", "error"), "info", "how much is logged"),
    Key("log_file", parse_path, None, "file of the daemon's log"),
)
_FACE: Mapping[str, Callable[[Any], Any]] = {
    "include": parse_globs,
    "exclude": parse_globs,
    "formats": choice("all", "production"),
    "latest": parse_text,
    "layout": choice("plain", "hub"),
    "archives": parse_archives,
}
"""Key of a model → reader, of what makes up its face."""
_PATHS = ("mountpoint", "lock", "log_file", "source_file")
_BY_NAME = {key.name: key for key in KEYS}
_SECTIONS = {key.name.partition(".")[0] for key in KEYS if "." in key.name}


def default_cache_directory(env: Mapping[str, str]) -> Path:
    """Return the cache directory of whoever does not choose one: root's, or the user's own."""
    if os.geteuid() == 0:
        return Path("/var/cache/modelfs")
    try:
        return _absolute(Path(env.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "modelfs")
    except RuntimeError:
        raise ConfigError("you have no home directory for a cache: name one with --cache-dir") from None


def load(
    *,
    mountpoint: Path | None,
    config_file: Path | None = None,
    env: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
) -> Settings:
    """Return the settings of one mount; reads the configuration file and nothing else.

    Args:
        mountpoint: where the tree shall appear; None if the settings are only to be checked.
        config_file: the file to read; None looks where docs/configuration.md says.
        env: the environment, by default this process's; an empty variable counts as not set.
        flags: by name of the key (``cache.size``); None values count as not given.
        sources: models given as ``NAME=URL``, besides those of the file.

    Raises:
        ConfigError: naming the place and what to do.

    """
    env = os.environ if env is None else env
    file = find_file(config_file, env)
    document = read_file(file) if file else Mapped("")
    folder = file.parent if file else Path()  # a relative path in a file starts where the file is
    given = [
        *((name, value, place, folder) for name, value, place in _flat(document)),
        *((key.name, env[key.variable], f"${key.variable}", Path()) for key in KEYS if env.get(key.variable)),
        *((name, v, _BY_NAME[name].flag, Path()) for name, v in (flags or {}).items() if v is not None),
    ]
    values = {key.name: key.default for key in KEYS}
    for name, value, place, base in given:
        try:
            values[name] = _BY_NAME[name].read(value)
        except ValueError as error:
            raise ConfigError(f"{place}: {name}: {error}") from None
        if isinstance(values[name], Path):
            values[name] = _absolute(base / values[name])

    if values["lock"] is None:
        values["lock"] = _absolute(folder / LOCK)
    stores = _stores(document)
    models = _models(document, sources, stores, values["pickles"])
    namespaces = values["namespaces"]
    if namespaces is None:
        namespaces = () if models else tuple(NAMESPACES)
    if not models and not namespaces:
        raise ConfigError(
            f"{file or '--source'}: there is nothing to mount: add a model, or a name to 'namespaces'"
        )
    settings = Settings(
        mountpoint=_absolute(mountpoint or Path("/")),
        cache=CacheSettings(
            values["cache.dir"] or default_cache_directory(env),
            values["cache.size"],
            values["cache.min_free"],
        ),
        models=models,
        namespaces=namespaces,
        store_options={prefix: options for prefix, (options, _) in stores.items()},
        archives=Limits(**{name: values[f"archives.{name}"] for name in asdict(_LIMITS)}),
        source_file=file,
        **{key.name: values[key.name] for key in KEYS if "." not in key.name and key.name != "namespaces"},
    )
    if mountpoint is not None:
        _refuse_overlaps(settings)
    return settings


def find_file(config_file: Path | None, env: Mapping[str, str]) -> Path | None:
    """Return the absolute path of the configuration file to read; None if there is none to read."""
    if config_file is not None:
        return _absolute(config_file)
    if env.get("MODELFS_CONFIG"):
        return _absolute(Path(env["MODELFS_CONFIG"]))
    # os.path: a directory we may not search holds no file for us, where Path.exists() would raise.
    return next((_absolute(path) for path in SEARCH if os.path.exists(path)), None)  # noqa: PTH110


def store_options(config_file: Path | None = None, env: Mapping[str, str] | None = None) -> StoreOptions:
    """Return the ``stores`` table of the configuration file that `load` would read.

    Raises:
        ConfigError: as `load`, for that part of the file.

    """
    file = find_file(config_file, os.environ if env is None else env)
    if file is None:
        return {}
    return {prefix: options for prefix, (options, _) in _stores(read_file(file)).items()}


def options_for(url: str, store_options: StoreOptions) -> dict[str, Any]:
    """Return the options of every prefix in `store_options` that covers `url`; longer prefixes win.

    A prefix covers whole components: ``s3://models`` covers ``s3://models/x`` and not ``s3://models-2/x``.
    """
    merged: dict[str, Any] = {}
    for prefix in _covering(url, store_options):
        merged |= store_options[prefix]
    return merged


def _flat(document: Mapped) -> Iterator[tuple[str, Any, str]]:
    """Yield ``(name, value, place)`` of everything in `document` that is one of KEYS; refuse unknown keys."""
    top = {"models", "stores", *_SECTIONS, *(name for name in _BY_NAME if "." not in name)}
    refuse_unknown(document, top)
    for name, value in document.items():
        if name in _SECTIONS:
            section = mapping_at(document, name)
            refuse_unknown(section, {key.partition(".")[2] for key in _BY_NAME if key.startswith(f"{name}.")})
            yield from ((f"{name}.{key}", section[key], section.place(key)) for key in section)
        elif name in _BY_NAME:
            yield name, value, document.place(name)


# -- Stores and models.


def _stores(document: Mapped) -> dict[str, tuple[dict[str, Any], str]]:
    """Return prefix → (options, place), checked as far as a prefix alone allows."""
    table = mapping_at(document, "stores")
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for written in table:
        place = table.place(written)
        try:
            scheme, prefix = scheme_of(written), _normal(written)
        except ConfigError as error:
            raise ConfigError(f"{place}: stores: {error}") from None
        if not is_known(scheme):
            hint = meant(scheme, known_schemes()) or f"; known are {', '.join(known_schemes())}"
            raise ConfigError(f"{place}: stores: unknown scheme {scheme}://{hint}")
        if prefix in found:
            raise ConfigError(f"{place}: stores: {quoted(prefix)} is there twice")
        found[prefix] = (options_at(table, written), place)
    for prefix, (_, place) in found.items():
        sample = NAMESPACES.get(scheme_of(prefix))
        if sample is not None:
            layers = [found[shorter] for shorter in _covering(prefix, found)]
            _open(sample, layers, place)
    return found


def _models(
    document: Mapped,
    sources: Sequence[str],
    stores: Mapping[str, tuple[dict[str, Any], str]],
    pickles: PicklePolicy,
) -> tuple[ModelSettings, ...]:
    places: dict[str, str] = {}
    models = []
    for name, place, model in [*_models_of_file(document), *_models_of_flags(sources)]:
        _refuse_name(name, place, places)
        places[name] = place
        options = []
        for url, own in zip(model["sources"], model.pop("own"), strict=True):
            try:
                layers = [stores[prefix] for prefix in _covering(url, stores)]
            except ConfigError as error:
                raise ConfigError(f"{place}: model {quoted(name)}: {error}") from None
            options.append(_open(url, [*layers, own], f"{place}: model {quoted(name)}"))
        first, *others = options
        chosen = {"pickles": pickles, "options": first, "fallback_options": tuple(others), **model}
        models.append(ModelSettings(name=name, **chosen))
    return tuple(models)


def _models_of_file(document: Mapped) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield ``(name, place, fields)`` of each model in the file."""
    table = mapping_at(document, "models")
    for name, written in table.items():
        place = table.place(name)
        if isinstance(written, str | list):
            body = Mapped(table.file)
            body["source"], body.lines["source"] = written, table.lines[name]
        else:
            body = mapping_at(table, name)
        refuse_unknown(body, {"source", "options", "optional", "pin", "pickles", *_FACE})
        if "source" not in body:
            raise ConfigError(f"{place}: model {quoted(name)} has no source: write 'source: URL'")
        chain = _chain(name, place, body)
        fields: dict[str, Any] = {
            "sources": tuple(url for url, _ in chain),
            "own": [own for _, own in chain],
        }
        for key in ("optional", "pin"):
            if key in body:
                fields[key] = read_at(body, key, parse_boolean, body[key])
        if "pickles" in body:
            fields["pickles"] = read_at(body, "pickles", parse_pickles, body["pickles"])
        face = {key: read_at(body, key, read, body[key]) for key, read in _FACE.items() if key in body}
        fields["face"] = Face(**face)
        if fields["face"].layout == "hub" and not hub.repositories(name, "", alone=True):
            reason = "the name of the model cannot be that of a repository: rename it"
            raise ConfigError(f"{body.place('layout')}: model {quoted(name)}: layout: {reason}")
        yield name, place, fields


def _chain(name: str, place: str, body: Mapped) -> list[tuple[str, tuple[dict[str, Any], str]]]:
    """Return URL, and own options with their place, of each store of the model `name`, in their order."""
    source = body["source"]
    links = source if isinstance(source, list) else [source]
    at = f"{body.place('source')}: model {quoted(name)}: source"
    if not links:
        raise ConfigError(f"{at}: the list is empty: name one source")
    if "options" in body and len(links) > 1:
        raise ConfigError(
            f"{body.place('options')}: model {quoted(name)}: options: say for which store: "
            "write 'source: [{source: URL, options: {…}}, …]'"
        )
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for link in links:
        if isinstance(source, list) and isinstance(link, Mapped):
            refuse_unknown(link, {"source", "options"})
            if "source" not in link:
                raise ConfigError(f"{at}: an entry of the list has no source: write 'source: URL'")
            part, url = link, link["source"]
        else:
            part, url = body, link
        url = read_at(part, "source", parse_text, url)
        if url in found:
            raise ConfigError(f"{at}: a store is there twice: remove one of them")
        found[url] = options_at(part, "options"), part.place("options") if "options" in part else place
    return list(found.items())


def _models_of_flags(sources: Sequence[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    chains: dict[str, list[str]] = {}
    for text in sources:
        name, separator, url = text.partition("=")
        if not separator or not url or "://" in name:
            raise ConfigError("--source: write it as NAME=URL, for example finbert=hf://ProsusAI/finbert")
        chain = chains.setdefault(name, [])
        if url in chain:
            raise ConfigError(f"--source: model {quoted(name)}: a store is there twice: remove one of them")
        chain.append(url)
    for name, urls in chains.items():
        yield name, "--source", {"sources": tuple(urls), "own": [({}, "--source")] * len(urls)}


def _refuse_name(name: str, place: str, places: Mapping[str, str]) -> None:
    """Raise ConfigError if no model may have this `name`, or not beside those already in `places`."""
    first = name.partition("/")[0]
    fault = path_fault(name)
    if fault is None and name.count("/") > 1:
        fault = "it has more than one slash: write NAME or ORG/NAME"
    if fault is None and first in RESERVED:
        fault = f"{first!r} is a name the mount uses itself: choose another"
    if fault is None and name in places:
        fault = f"it is there twice, first at {places[name]}: rename one of them"
    if fault is None:
        other = next((o for o in places if o.startswith(f"{name}/") or name.startswith(f"{o}/")), None)
        if other is not None:
            fault = f"the model {other!r} ({places[other]}) would be inside or around it: rename one of them"
    if fault is not None:
        raise ConfigError(f"{place}: model name {quoted(name)}: {fault}")


def _normal(url: str) -> str:
    return f"{scheme_of(url)}://{spelled(url).partition('://')[2]}"


def _covering(url: str, prefixes: Iterable[str]) -> list[str]:
    """Return those `prefixes` that cover `url`, shortest first."""
    url = _normal(url)

    def covers(prefix: str) -> bool:
        if not url.startswith(prefix):
            return False
        # After a bare host, "@" would make it the user name of another host.
        ends = "/?#@" if "/" in prefix.partition("://")[2] else "/?#"
        return prefix.endswith("/") or url == prefix or url[len(prefix)] in ends

    return sorted(filter(covers, prefixes), key=len)


def _open(url: str, layers: Sequence[tuple[Mapping[str, Any], str]], place: str) -> dict[str, Any]:
    """Return the merged options of `layers` after opening the store `url` with them.

    Raises:
        ConfigError: starting with the place of the layer that brought the fault in, else with `place`.

    """

    def attempt(count: int) -> str | None:
        try:
            open_store(url, merged(count))
        except ConfigError as error:
            return str(error)
        return None

    def merged(count: int) -> dict[str, Any]:
        return {name: value for options, _ in layers[:count] for name, value in options.items()}

    fault = attempt(len(layers))
    if fault is not None:
        culprit = next(count for count in range(len(layers) + 1) if attempt(count) == fault)
        raise ConfigError(f"{layers[culprit - 1][1] if culprit else place}: {fault}")
    return merged(len(layers))


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  # resolve() follows links, also into a dead mount


def _refuse_overlaps(settings: Settings) -> None:
    """Raise ConfigError where the daemon would have to read through its own mount."""
    mountpoint = settings.mountpoint
    for what, own in {
        "the cache directory": settings.cache.directory,
        "the log file": settings.log_file,
    }.items():
        if own is not None and Path(os.path.realpath(own)).is_relative_to(mountpoint):
            raise ConfigError(f"{what} {own} is inside the mountpoint {mountpoint}: choose another place")
    for model in settings.models:
        for url in model.sources:
            if scheme_of(url) != "file":
                continue
            path = Path(os.path.realpath(path_of(url)))
            if path.is_relative_to(mountpoint) or mountpoint.is_relative_to(path):
                raise ConfigError(
                    f"model {model.name!r}: {path} and the mountpoint {mountpoint} lie inside one another: "
                    "mount somewhere else"
                )
