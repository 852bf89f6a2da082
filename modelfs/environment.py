"""Where this process runs, and how it gets its models there: from a mount, made up, or in a directory.

The same line of code, ``modelfs.local_path("finbert")``, serves a node in production, a test, a pipeline of
continuous integration and a laptop.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from modelfs import config, control, local
from modelfs.config import ModelSettings, Settings
from modelfs.errors import ConfigError, MountError, NotFound
from modelfs.fuse import mountpoint
from modelfs.stores import redact, scheme_of, spelled
from modelfs.tree import METADATA

Environment = Literal["production", "test", "ci", "local"]
"""``production``: a node with a mount; ``test``: unit tests; ``ci``: a pipeline; ``local``: all else."""

Way = Literal["mount", "mock", "directory"]
"""How models are had: from a mount, made by ``mock://``, or in a directory that is filled when asked for."""

ENVIRONMENTS: tuple[str, ...] = get_args(Environment)

VARIABLE = "MODELFS_ENVIRONMENT"
"""Environment variable that says it outright."""

PLACES = (Path("/app/models"), Path("/models"))
"""Where a node in production has its mount, unless ``$MODELFS_MOUNTPOINT`` names another place."""

ANSWER_SECONDS = 2.0
"""A mount that does not answer for so long is none."""


@dataclass(frozen=True, slots=True)
class Detected:
    """What `detect` found.

    Attributes:
        environment: where this process runs.
        way: how it gets its models.
        mountpoint: of the mount, if that is the way.
        why: what decided about the environment.

    """

    environment: Environment
    way: Way
    mountpoint: Path | None
    why: str


def detect(env: Mapping[str, str] | None = None) -> Detected:
    """Return where this process runs; looks at the environment and for mounts, and changes nothing.

    The first that holds decides:

    1. ``MODELFS_ENVIRONMENT`` is ``production``, ``test``, ``ci`` or ``local``.
    2. ``production``: ``model-metadata.yaml`` can be read at ``$MODELFS_MOUNTPOINT``, else at ``/app/models``
       or ``/models``.
    3. ``test``: ``PYTEST_CURRENT_TEST`` is set, or ``TESTING`` is true.
    4. ``ci``: ``CI`` or ``GITHUB_ACTIONS`` is true.
    5. ``local``.

    Tests get ``mock`` models. All others use a mount, where there is one: that of production, or else one
    of this user's; without any, a directory.

    Raises:
        ConfigError: ``MODELFS_ENVIRONMENT`` is something else.

    """
    env = os.environ if env is None else env
    place = _production(env)
    environment, why = _environment(env, place)
    if environment == "test":
        return Detected(environment, "mock", None, why)
    if place is None:
        place = next((record.mountpoint for record in _mounts() if _answers(record.mountpoint)), None)
    return Detected(environment, "directory" if place is None else "mount", place, why)


def _environment(env: Mapping[str, str], place: Path | None) -> tuple[Environment, str]:
    told = env.get(VARIABLE)
    for environment in get_args(Environment):
        if told == environment:
            return environment, f"{VARIABLE} says so"
    if told:
        raise ConfigError(f"${VARIABLE}: {told!r} is none of {', '.join(ENVIRONMENTS)}")
    if place is not None:
        return "production", f"{place / METADATA} is there"
    for name, environment in _SIGNS:
        value = env.get(name, "")
        if value.lower() in ("1", "true") or (value and name == "PYTEST_CURRENT_TEST"):
            return environment, f"{name} is set"
    return "local", "nothing tells of another"


_SIGNS: tuple[tuple[str, Environment], ...] = (
    ("PYTEST_CURRENT_TEST", "test"),
    ("TESTING", "test"),
    ("GITHUB_ACTIONS", "ci"),
    ("CI", "ci"),
)


def _production(env: Mapping[str, str]) -> Path | None:
    told = env.get("MODELFS_MOUNTPOINT")
    return next((place for place in ([Path(told)] if told else PLACES) if _answers(place)), None)


def _answers(place: Path) -> bool:
    """Return whether the metadata of a mount can be read at `place`; a dead mount answers never."""
    try:
        return mountpoint.within(ANSWER_SECONDS, (place / METADATA).is_file)
    except (TimeoutError, OSError):
        return False


def _mounts() -> list[control.Record]:
    try:
        return control.mounts()
    except MountError:  # there is no place for control sockets, hence no daemon of ours
        return []


def local_path(
    model: str,
    *,
    config_file: Path | None = None,
    sources: Sequence[str] = (),
    cache_dir: Path | None = None,
    environment: Environment | None = None,
) -> Path:
    """Return a directory with the files of `model`, for a loader: ``from_pretrained(local_path("finbert"))``.

    Where a mount serves the model that is its place in the mount. Elsewhere it is a directory that holds
    every file complete and verified: hard links into the cache where that is one file system, else copies;
    do not change them. A test gets a model of ``mock://``, in a directory that ends with the process.

    Args:
        model: a name of the configuration, a path of an on-demand namespace such as ``hf/ORG/NAME``, or the
            URL of a store.
        config_file: instead of the one that ``modelfs mount`` would read.
        sources: more models, each ``NAME=URL``.
        cache_dir: instead of the one of the configuration.
        environment: instead of the one that `detect` finds.

    Raises:
        ConfigError: the configuration is wrong, or the store of the model is too large to list.
        NotFound: there is no such model.
        StoreError: it cannot be resolved, or a file cannot be had.
        CacheError: the cache cannot be used, or a daemon uses it that does not show the model.

    """
    found = detect({**os.environ, VARIABLE: environment} if environment else None)
    if found.way == "mock":
        settings = _mocked(model)
    else:
        if found.mountpoint is not None and "://" not in model and (found.mountpoint / model).exists():
            return found.mountpoint / model
        flags = {"cache.dir": None if cache_dir is None else str(cache_dir)}
        everything = config.load(mountpoint=None, config_file=config_file, flags=flags, sources=sources)
        settings = only(everything, model)
    name = settings.models[0].name if settings.models else model
    with local.opened(settings) as opened:
        return opened.materialise(name)


def only(settings: Settings, model: str) -> Settings:
    """Return `settings` with nothing but `model`: a name, a path of an on-demand namespace, or a URL.

    Raises:
        NotFound: there is no such model.
        ConfigError: it is a URL that no store accepts.

    """
    named = tuple(row for row in settings.models if row.name == model)
    if named:
        return replace(settings, models=named, namespaces=())
    if "://" in spelled(model):
        options = config.options_for(model, settings.store_options)
        row = ModelSettings(name_of(model), (model,), options, pickles=settings.pickles)
        return replace(settings, models=(row,), namespaces=())
    if model.partition("/")[0] in {name.partition("/")[0] for name in settings.namespaces}:
        return replace(settings, models=())
    known = ", ".join(row.name for row in settings.models) or "none"
    raise NotFound(f"no model {model!r}; configured are: {known}")


def name_of(url: str) -> str:
    """Return a name for the model of a store URL: it without scheme, slashes and secrets."""
    return redact(spelled(url)).partition("://")[2].strip("/").replace("/", "--") or scheme_of(url)


def _mocked(model: str) -> Settings:
    url = spelled(model)
    if not url.startswith("mock://"):
        bare = redact(url).rpartition("://")[2].partition("@")[0].strip("/")
        url = f"mock://{bare}"
    name = name_of(url)
    flags = {"cache.dir": str(_scratch())}
    nothing = Path(os.devnull)  # the configuration of what is tested is not that of the test
    settings = config.load(mountpoint=None, config_file=nothing, flags=flags, sources=[f"{name}={url}"])
    return only(settings, name)


@cache
def _scratch() -> Path:
    """Return a directory for mock models that ends with this process."""
    path = Path(tempfile.mkdtemp(prefix="modelfs-mock-models-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path
