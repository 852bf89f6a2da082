"""What configuration promises: precedence, and one line with the place for everything that is wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from modelfs import config, stores
from modelfs.config import (
    KEYS,
    Settings,
    load,
    options_for,
    parse_duration,
    parse_option,
    parse_share,
    parse_size,
)
from modelfs.errors import ConfigError
from modelfs.types import Entry, Location, Snapshot
from modelfs.views import Face

MiB, GiB = 1024**2, 1024**3
KNOWN = {"endpoint_url": str, "profile": str, "retries": int, "headers": dict}


class FakeStore:
    """A store that only checks its URL and options, as every store does when it is made."""

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url = stores.redact(url)
        stores.checked_options(url, options, KNOWN)
        if url.endswith("://"):
            raise ConfigError(f"{url}: names nothing: write fake://NAME")
        if "needs" in url and "profile" not in options:
            raise ConfigError(f"{url}: needs the option profile")

    async def snapshot(self) -> Snapshot:
        raise AssertionError("configuration does no I/O")

    async def entry(self, path: str) -> Entry:
        raise AssertionError("configuration does no I/O")

    async def locate(self, entry: Entry) -> Location:
        raise AssertionError("configuration does no I/O")


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no MODELFS variables, no system-wide file, and the scheme fake://."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config, "SEARCH", (Path("modelfs.yaml"), tmp_path / "etc" / "config.yaml"))
    for name in [name for name in os.environ if name.startswith("MODELFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setitem(stores.SCHEMES, "fake", f"{__name__}:FakeStore")  # type: ignore[arg-type]
    return tmp_path


def loaded(text: str | bytes | None = None, **more: Any) -> Settings:
    if text is not None:
        Path("modelfs.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load(**{"mountpoint": Path("/models"), "env": {}, **more})


def refused(text: str | bytes | None = None, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        loaded(text, **more)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(f"{Path.cwd()}/", "")


MODEL = "models: {m: {source: 'fake://m'}}\n"


# -- what comes from where


def test_without_a_file_the_on_demand_namespaces_are_offered() -> None:
    settings = loaded()
    assert settings.models == ()
    assert settings.namespaces == ("hf", "s3", "github")
    assert settings.source_file is None
    assert (settings.refresh, settings.read_deadline, settings.connections) == (60, 300, 16)
    assert (settings.cache.size, settings.cache.min_free) == (50 * GiB, 0.05)


def test_a_mount_with_models_offers_no_namespaces_unless_asked() -> None:
    assert loaded(MODEL).namespaces == ()
    assert loaded(MODEL + "namespaces: [s3]\n").namespaces == ("s3",)
    assert loaded(sources=["m2=fake://x"], env={"MODELFS_NAMESPACES": "hf, s3"}).namespaces == ("hf", "s3")
    patterns = ("hf/org", "hf/ProsusAI/fin*", "s3/models-?")
    assert loaded(env={"MODELFS_NAMESPACES": ",".join(patterns)}).namespaces == patterns


def test_flags_win_over_environment_over_file_over_defaults() -> None:
    text = MODEL + "cache: {size: 1GiB}\nrefresh: 10s\nconnections: 5\nlog_level: debug\n"
    env = {"MODELFS_CACHE_SIZE": "2GiB", "MODELFS_REFRESH": "20s", "MODELFS_LOG_LEVEL": ""}
    settings = loaded(text, env=env, flags={"cache.size": "3GiB", "refresh": None})
    assert settings.cache.size == 3 * GiB  # flag
    assert settings.refresh == 20  # environment: a flag that is None was not given
    assert settings.connections == 5  # file
    assert settings.log_level == "debug"  # file: an empty variable is not set
    assert settings.transport == "auto"  # default


EXAMPLES: Mapping[str, tuple[str, Any]] = {
    "cache.dir": ("/c", Path("/c")),
    "cache.size": ("1GiB", GiB),
    "cache.min_free": ("7%", 0.07),
    "namespaces": ("s3", ("s3",)),
    "transport": ("pyfuse3", "pyfuse3"),
    "allow_other": ("yes", True),
    "refresh": ("5m", 300.0),
    "read_deadline": ("9s", 9.0),
    "scrub": ("5MiB/s", 5 * 1024**2),
    "http": ("127.0.0.1:9180", "127.0.0.1:9180"),
    "keep_going": ("true", True),
    "pickles": ("warn", "warn"),
    "archives.members": ("7", 7),
    "archives.size": ("2GiB", 2 * GiB),
    "archives.ratio": ("9", 9),
    "archives.depth": ("5", 5),
    "connections": ("3", 3),
    "locked": ("true", True),
    "lock": ("/k", Path("/k")),
    "log_level": ("warning", "warning"),
    "log_file": ("/l", Path("/l")),
}


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_every_key_can_be_set_in_file_environment_and_flags(key: config.Key) -> None:
    text, value = EXAMPLES[key.name]
    section, _, name = key.name.rpartition(".")
    line = f"{section}: {{{name}: {text}}}\n" if section else f"{name}: {text}\n"
    in_file = loaded(MODEL + line)
    in_environment = loaded(MODEL, env={key.variable: text})
    by_flag = loaded(MODEL, flags={key.name: text})
    for settings in (in_file, in_environment, by_flag):
        owner = getattr(settings, section) if section else settings
        found = getattr(owner, {"dir": "directory"}.get(name, name))
        assert found == value
        assert type(found) is type(value)


def test_files_are_looked_for_in_the_documented_order(world: Path) -> None:
    for name in ("flag.yaml", "variable.yaml", "modelfs.yaml", "etc/config.yaml"):
        path = world / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(MODEL)
    env = {"MODELFS_CONFIG": "variable.yaml"}
    assert loaded(config_file=Path("flag.yaml"), env=env).source_file == world / "flag.yaml"
    assert loaded(env=env).source_file == world / "variable.yaml"
    assert loaded().source_file == world / "modelfs.yaml"
    (world / "modelfs.yaml").unlink()
    assert loaded().source_file == world / "etc/config.yaml"


def test_a_relative_path_in_a_file_starts_where_the_file_is(world: Path) -> None:
    (world / "sub").mkdir()
    (world / "sub/f.yaml").write_text(MODEL + "cache: {dir: ../cache}\nlog_file: log\n")
    settings = loaded(config_file=Path("sub/f.yaml"), flags={"log_file": "here"})
    assert settings.lock == world / "sub/modelfs.lock"
    assert loaded(MODEL, flags={"lock": "mine"}).lock == world / "mine"
    assert load(mountpoint=None, env={}).lock == world / "modelfs.lock"
    assert settings.cache.directory == world / "cache"
    assert settings.log_file == world / "here"


def test_root_and_users_have_caches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert loaded().cache.directory == Path("/var/cache/modelfs")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert loaded(env={"XDG_CACHE_HOME": "/x"}).cache.directory == Path("/x/modelfs")
    monkeypatch.setenv("HOME", "/home/someone")
    assert loaded().cache.directory == Path("/home/someone/.cache/modelfs")


def test_models_come_from_file_and_flags_in_order() -> None:
    text = """
models:
  b: fake://b
  org/a: {source: "fake://a", optional: true, pin: true, options: {retries: 2}}
  c: {source: ["fake://c"]}
"""
    settings = loaded(text, sources=["d=fake://d?x=y"])
    assert [model.name for model in settings.models] == ["b", "org/a", "c", "d"]
    assert [model.sources for model in settings.models][2:] == [("fake://c",), ("fake://d?x=y",)]
    assert dataclasses.replace(settings.models[1]) == config.ModelSettings(
        "org/a", ("fake://a",), {"retries": 2}, optional=True, pin=True
    )


def test_a_list_of_stores_is_a_chain_each_with_options_of_its_own() -> None:
    text = """
models:
  a:
    source:
      - fake://a
      - {source: "fake://b/x", options: {retries: 2}}
      - fake://c
    pin: true
  b: [{source: "fake://b/x"}, fake://a]
stores:
  "fake://b/": {profile: p}
"""
    settings = loaded(text, sources=["c=fake://1", "d=fake://2", "c=fake://b/3"])
    first, second, third, fourth = settings.models
    assert first.sources == ("fake://a", "fake://b/x", "fake://c")
    assert first.options == {}
    assert first.fallbacks == (("fake://b/x", {"profile": "p", "retries": 2}), ("fake://c", {}))
    assert (second.options, second.fallbacks) == ({"profile": "p"}, (("fake://a", {}),))
    assert (third.sources, third.fallback_options) == (("fake://1", "fake://b/3"), ({"profile": "p"},))
    assert (fourth.sources, fourth.fallbacks) == (("fake://2",), ())
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_survive_the_way_to_the_daemon() -> None:
    text = MODEL + "stores: {'fake://': {headers: {a: [1, null, 2.5]}}}\ncache: {min_free: 0%}\nlog_file: l\n"
    for settings in (
        loaded(text),
        loaded(text, flags={"cache.min_free": "1GiB"}),
        load(mountpoint=None, env={}),
    ):
        again = Settings.from_json(json.loads(json.dumps(settings.to_json())))
        assert again == settings
        assert type(again.cache.min_free) is type(settings.cache.min_free)


def test_settings_that_an_older_modelfs_wrote_are_completed() -> None:
    written = loaded(MODEL).to_json()
    for name in ("scrub", "http", "locked", "lock"):
        del written[name]
    for model in written["models"]:
        del model["face"], model["fallback_options"]
    settings = Settings.from_json(json.loads(json.dumps(written)))
    assert (settings.scrub, settings.locked) == (20 * 1024**2, False)
    assert settings.models[0].face == Face()


@pytest.mark.parametrize("section", [(), ("cache",), ("models", 0), ("models", 0, "face"), ("archives",)])
def test_settings_of_a_newer_version_are_refused(section: tuple[str | int, ...]) -> None:
    written = loaded(MODEL).to_json()
    place: Any = written
    for name in section:
        place = place[name]
    place["invented later"] = True
    with pytest.raises(ConfigError, match=r"another version of modelfs made this mount.*mount it again"):
        Settings.from_json(json.loads(json.dumps(written)))


def test_the_face_of_a_model() -> None:
    text = "source: 'fake://m', include: ['*.json', '*.safetensors'], exclude: onnx/, formats: production"
    settings = loaded(f"models: {{m: {{{text}, latest: v1}}, n: fake://n}}\n")
    face = Face(("*.json", "*.safetensors"), ("onnx/",), "production", "v1")
    assert [model.face for model in settings.models] == [face, Face()]
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_show_no_options_and_urls() -> None:
    text = "models: {m: {source: 'fake://u:hush1@m', options: {profile: hush2}}}\n"
    assert "hush" not in repr(loaded(text + "stores: {'fake://': {endpoint_url: hush3}}\n"))


# -- options by prefix


def test_longer_prefixes_win_and_the_models_own_options_last() -> None:
    text = """
models: {m: {source: "fake://bucket/models/m", options: {retries: 3}}}
stores:
  "fake://bucket/models/": {profile: narrow, retries: 2}
  "FAKE://": {endpoint_url: everywhere, profile: wide, retries: 1}
  "fake://other": {profile: other}
"""
    settings = loaded(text)
    assert settings.models[0].options == {"endpoint_url": "everywhere", "profile": "narrow", "retries": 3}
    assert options_for("fake://other/x", settings.store_options)["profile"] == "other"
    assert config.store_options(env={}) == settings.store_options


@pytest.mark.parametrize(
    ("prefix", "url", "covered"),
    [
        ("s3://models", "s3://models", True),
        ("s3://models", "s3://models/x", True),
        ("s3://models", "S3://models/x", True),
        ("s3://models", "s3://models-secret/x", False),
        ("s3://models/a", "s3://models/ab", False),
        ("s3://models/a/", "s3://models/a/b", True),
        ("hf://org/name", "hf://org/name@main", True),
        ("https://host", "https://host@evil.example/x", False),
        ("https://host", "https://host.evil.example/x", False),
        ("https://host", "https://host:8443/x", False),
        ("https://host", "https://host?x", True),
        ("s3://", "http://s3://", False),
    ],
)
def test_a_prefix_covers_whole_components_only(prefix: str, url: str, covered: bool) -> None:
    assert (options_for(url, {prefix: {"token": 1}}) == {"token": 1}) is covered


# -- values


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("10b", 10),
        ("1KiB", 1024),
        ("1Ki", 1024),
        ("1k", 1000),
        ("1kB", 1000),
        ("1.5 GiB", GiB * 3 // 2),
        ("500MB", 500_000_000),
        ("2tib", 2 * 1024**4),
        (" 1G ", 10**9),
    ],
)
def test_sizes(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "1 GiB B", "-1", -1, "1e3", "5%", "1XB", True, None, 1.5, [], "١GiB"]
)
def test_what_is_no_size_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_shares_are_bytes_or_a_fraction() -> None:
    assert (parse_share("5%"), parse_share("12.5 %"), parse_share("100%")) == (0.05, 0.125, 1.0)
    assert parse_share("5GiB") == 5 * GiB
    for wrong in ("101%", "%", "5 percent", 0.05):
        with pytest.raises(ValueError, match=r"percentage|100%"):
            parse_share(wrong)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        (0, 0),
        (60, 60),
        (1.5, 1.5),
        ("60", 60),
        ("60s", 60),
        ("250ms", 0.25),
        ("5m", 300),
        ("2h", 7200),
        ("1D", 86400),
    ],
)
def test_durations(text: Any, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "s", "-1s", -1, "1 week", True, None, float("inf"), float("nan"), "1m30s"]
)
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)


def test_options_of_the_command_line_are_yaml_values() -> None:
    assert parse_option("a=1") == ("a", 1)
    assert parse_option("a=true") == ("a", True)
    assert parse_option("a=x=y") == ("a", "x=y")
    assert parse_option("a=2024-01-01") == ("a", "2024-01-01")
    for wrong in ("a", "=1", "", "a=[hush", "a=!!python/object:hush.hush {}", "a=.nan"):
        with pytest.raises(ConfigError) as caught:
            parse_option(wrong)
        assert "hush" not in str(caught.value)


# -- everything that is wrong, with its place

WRONG: Mapping[str, tuple[str | bytes, str]] = {
    "malformed": ("models:\n  a: [1\n", r"modelfs\.yaml:3: .*expected ',' or ']'"),
    "tab": ("models:\n\ta: b\n", r"modelfs\.yaml:2: found character '\\t'"),
    "control character": ("models:\n  a: \x01\n", r"modelfs\.yaml:2: the character U\+0001"),
    "not UTF-8": (b"models:\n  a: \xff\n", r"modelfs\.yaml:2: is not UTF-8"),
    "two documents": ("a: 1\n---\nb: 2\n", r"modelfs\.yaml:2: .*another document"),
    "a list": ("- a\n- b\n", r"modelfs\.yaml:1: a list stands where"),
    "text": ("models\n", r"modelfs\.yaml:1: text stands where"),
    "code": (
        "models: !!python/object/apply:os.system [id]\n",
        r"modelfs\.yaml:1: could not determine a constr",
    ),
    "too deep": ("models: " + "[" * 5000, r"modelfs\.yaml: is nested too deeply"),
    "too large": (b"#" * (4 * MiB + 1), r"modelfs\.yaml: is larger than 4 MiB"),
    "huge number": ("connections: " + "9" * 5000, r"modelfs\.yaml: .*4300 digits"),
    "unknown key": ("\nmodles:\n", r"modelfs\.yaml:2: unknown key 'modles'; did you mean 'models'\?"),
    "unknown key, far off": (
        "xyzzy: 1",
        r"modelfs\.yaml:1: unknown key 'xyzzy'; known are allow_other, archives, cache",
    ),
    "unknown cache key": (
        "cache:\n  sise: 1GiB\n",
        r"modelfs\.yaml:2: unknown key 'sise'; did you mean 'size'",
    ),
    "unknown model key": (
        "models:\n  a:\n    source: fake://a\n    optinal: true\n",
        r"modelfs\.yaml:4: unknown key 'optinal'; did you mean 'optional'",
    ),
    "globs": (
        "models:\n  a:\n    source: fake://a\n    include: ['*.json', 5]\n",
        r"modelfs\.yaml:4: include: '5' is not text: put it in quotes",
    ),
    "an empty glob": (
        "models:\n  a:\n    source: fake://a\n    exclude: ''\n",
        r"modelfs\.yaml:4: exclude: '' is not text",
    ),
    "formats": (
        "models:\n  a: {source: fake://a, formats: productoin}\n",
        r"modelfs\.yaml:2: formats: 'productoin' is not one of all, production; did you mean 'production'",
    ),
    "a name that is no repository": (
        "models:\n  a--b: {source: fake://a, layout: hub}\n",
        r"modelfs\.yaml:2: model 'a--b': layout: the name of the model cannot be that of a repository",
    ),
    "a name that the mount uses": (
        "models:\n  .hub/a: {source: fake://a}\n",
        r"modelfs\.yaml:2: model name '\.hub/a': '\.hub' is a name the mount uses itself",
    ),
    "a version that is a number": (
        "models:\n  a: {source: fake://a, latest: 1.1}\n",
        r"modelfs\.yaml:2: latest: '1\.1' is not text: put it in quotes",
    ),
    "duplicate key": (
        "refresh: 1\ncache: {}\nrefresh: 2\n",
        r"modelfs\.yaml:3: the key 'refresh' is there twice",
    ),
    "duplicate model": (
        "models:\n  a: fake://a\n  a: fake://b\n",
        r"modelfs\.yaml:3: the key 'a' is there twice",
    ),
    "number as key": (
        "models:\n  1.5: fake://a\n",
        r"modelfs\.yaml:2: the key '1.5' is not text: put it in quotes",
    ),
    "truth value as key": ("models:\n  on: fake://a\n", r"modelfs\.yaml:2: the key 'on' is not text"),
    "list as key": ("models:\n  ? [a]\n  : fake://a\n", r"modelfs\.yaml:2: the key a list is not text"),
    "models is a list": ("models: [a]\n", r"modelfs\.yaml:1: models: a list is not a mapping"),
    "cache is text": ("cache: big\n", r"modelfs\.yaml:1: cache: text is not a mapping"),
    "size": ("cache:\n\n  size: 50GX\n", r"modelfs\.yaml:3: cache.size: '50GX' is not a size"),
    "small cache": ("cache: {size: 1MiB}\n", r"modelfs\.yaml:1: cache.size: '1MiB' is less than one block"),
    "share": ("cache: {min_free: a lot}\n", r"modelfs\.yaml:1: cache.min_free: 'a lot' is neither"),
    "no value": ("refresh:\n", r"modelfs\.yaml:1: refresh: nothing is not a duration"),
    "infinite": ("refresh: .inf\n", r"modelfs\.yaml:1: refresh: 'inf' is not a duration"),
    "deadline": ("read_deadline: 0\n", r"modelfs\.yaml:1: read_deadline: a deadline of 0"),
    "transport": (
        "transport: pyfuse\n",
        r"transport: 'pyfuse' is not one of auto, kernel, pyfuse3; did you mean 'pyfuse3'",
    ),
    "boolean": ("allow_other: maybe\n", r"allow_other: 'maybe' is neither true nor false"),
    "many connections": ("connections: 257\n", r"connections: '257' is not a whole number"),
    "no connection": ("connections: 0\n", r"connections: '0' is not a whole number"),
    "true connections": ("connections: true\n", r"connections: 'True' is not a whole number"),
    "directory": ("cache: {dir: 5}\n", r"cache.dir: '5' is not a path"),
    "pattern": (
        "namespaces: [hf/a/b/c]\n",
        r"namespaces: 'hf/a/b/c' is no pattern of models in hf: write it ",
    ),
    "buckets": (
        "namespaces: [s3/a/b]\n",
        r"namespaces: 's3/a/b' is no pattern of models in s3: write it like s3/",
    ),
    "empty pattern": ("namespaces: [hf/]\n", r"namespaces: 'hf/' is no pattern of models in hf"),
    "namespace": ("namespaces: [hg]\n", r"namespaces: 'hg' is not one of hf, s3, github"),
    "namespaces": ("namespaces: {hf: 1}\n", r"namespaces: a mapping is not a list"),
    "nothing to mount": ("namespaces: []\n", r"modelfs\.yaml: there is nothing to mount"),
    "no source": ("models:\n  a: {pin: true}\n", r"modelfs\.yaml:2: model 'a' has no source"),
    "no body": ("models:\n  a:\n", r"modelfs\.yaml:2: model 'a' has no source"),
    "empty source": ("models: {a: {source: ''}}\n", r"modelfs\.yaml:1: source: '' is not text"),
    "source is a number": (
        "models: {a: {source: 5}}\n",
        r"modelfs\.yaml:1: source: '5' is not text: put it in q",
    ),
    "no sources": ("models: {a: []}\n", r"modelfs\.yaml:1: model 'a': source: the list is empty"),
    "a chain with options of nobody": (
        "models:\n  a:\n    source: ['fake://a', 'fake://b']\n    options: {profile: hush}\n",
        r"modelfs\.yaml:4: model 'a': options: say for which store: write 'source: \[\{source: URL, opt",
    ),
    "a store twice": (
        "models:\n  a: ['fake://a?hush', 'fake://b', 'fake://a?hush']\n",
        r"modelfs\.yaml:2: model 'a': source: a store is there twice: remove one of them",
    ),
    "a fallback that is no URL": (
        "models:\n  a: [fake://a, b]\n",
        r"modelfs\.yaml:2: model 'a': 'b' is not a store URL",
    ),
    "a fallback that is a list": (
        "models:\n  a: [fake://a, [fake://b]]\n",
        r"modelfs\.yaml:2: source: a list is not text",
    ),
    "a fallback without a source": (
        "models:\n  a:\n    - fake://a\n    - options: {retries: 1}\n",
        r"modelfs\.yaml:2: model 'a': source: an entry of the list has no source: write 'source: URL'",
    ),
    "an option of a fallback": (
        "models:\n  a:\n    - fake://a\n    - source: fake://b\n      options: {endpiont: hush}\n",
        r"modelfs\.yaml:5: fake://b: unknown option 'endpiont'",
    ),
    "a key of a fallback": (
        "models:\n  a:\n    - source: fake://a\n      pin: true\n",
        r"modelfs\.yaml:4: unknown key 'pin'",
    ),
    "pin": ("models: {a: {source: 'fake://a', pin: 3}}\n", r"modelfs\.yaml:1: pin: '3' is neither"),
    "no URL": ("models:\n  a: /srv/a\n", r"modelfs\.yaml:2: model 'a': '/srv/a' is not a store URL"),
    "unknown scheme": (
        "models:\n  a: s4://b\n",
        r"modelfs\.yaml:2: model 'a': unknown scheme s4://: known are",
    ),
    "bad URL": ("models:\n  a: 'fake://'\n", r"modelfs\.yaml:2: model 'a': fake://: names nothing"),
    "missing option": (
        "models:\n  a: fake://needs\n",
        r"modelfs\.yaml:2: model 'a': fake://needs: needs the opt",
    ),
    "unknown option": (
        "models:\n  a:\n    source: fake://a\n    options:\n      endpiont: hush\n",
        r"modelfs\.yaml:4: fake://a: unknown option 'endpiont'",
    ),
    "type of option": (
        "models: {a: {source: 'fake://a', options: {profile: 5}}}",
        r"modelfs\.yaml:1: .*'profile' has the wrong type \(int\)",
    ),
    "options are a list": (
        "models: {a: {source: 'fake://a', options: [x]}}",
        r"options: a list is not a mapping",
    ),
    "options are not JSON": (
        "models: {a: {source: 'fake://a', options: {retries: .nan}}}",
        r"options are text, num",
    ),
    "option of a prefix": (
        "models:\n  a: fake://a\nstores:\n  'fake://':\n    profile: x\n  'fake://a':\n    profil: hush\n",
        r"modelfs\.yaml:6: fake://a: unknown option 'profil'",
    ),
    "option of an unused prefix": (
        "stores:\n  's3://nobody/': {endpiont_url: hush}\n",
        r"modelfs\.yaml:2: .*unknown option 'endpiont_url'",
    ),
    "prefix": ("stores: {s3: {}}\n", r"modelfs\.yaml:1: stores: 's3' is not a store URL"),
    "scheme of a prefix": (
        "stores: {'s33://': {}}\n",
        r"modelfs\.yaml:1: stores: unknown scheme s33://; did you",
    ),
    "prefix twice": (
        "stores:\n  'fake://': {}\n  'FAKE://': {}\n",
        r"modelfs\.yaml:3: stores: 'fake://' is there tw",
    ),
    "inside one another": (
        "models:\n  a/b: fake://a\n  a: fake://a\n",
        r"modelfs\.yaml:3: .*'a/b' \(.*:2\) would be",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_refused_with_its_place(case: str) -> None:
    text, expected = WRONG[case]
    message = refused(text)
    assert re.search(expected, message), message
    assert "hush" not in message


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        "a/b/c",
        "hf",
        "s3/x",
        "github",
        "model-metadata.yaml",
        "x" * 256,
        "nul\0",
        "bell\a",
        "line\nbreak",
        "escape\x1b[31m",
        "\udcff\ud800",
    ],
)
def test_names_that_cannot_be_directories_are_refused(name: str) -> None:
    message = refused(sources=[f"{name}=fake://x"])
    assert message.startswith("--source: model name ")
    assert message.isprintable()
    if not any(ord(c) >= 0xD800 for c in name):
        in_file = refused(f"models:\n  {json.dumps(name)}: fake://x\n")
        assert in_file.startswith("modelfs.yaml:2: model name ")


def test_a_name_is_refused_twice_across_file_and_flags() -> None:
    message = refused(MODEL, sources=["m=fake://other"])
    assert (
        message == "--source: model name 'm': it is there twice, first at modelfs.yaml:1: rename one of them"
    )
    Path("modelfs.yaml").unlink()
    assert "'m': a store is there twice" in refused(sources=["m=fake://a", "m=fake://b", "m=fake://a"])


@pytest.mark.parametrize("text", ["finbert", "finbert=", "hf://org/name?x=hush"])
def test_a_source_flag_has_a_name_and_a_url(text: str) -> None:
    assert refused(sources=[text]).startswith("--source: write it as NAME=URL")


def test_variables_and_flags_are_named_when_they_are_wrong() -> None:
    assert refused(env={"MODELFS_CACHE_SIZE": "big"}).startswith(
        "$MODELFS_CACHE_SIZE: cache.size: 'big' is not"
    )
    assert refused(flags={"cache.size": "big"}).startswith("--cache-size: cache.size: 'big' is not a size")
    assert refused(flags={"log_level": "loud"}).startswith(
        "--log-level: log_level: 'loud' is not one of debug"
    )


def test_a_file_that_cannot_be_read_is_named(world: Path) -> None:
    assert refused(config_file=Path("none.yaml")).startswith("none.yaml: cannot be read: No such file")
    assert refused(config_file=world).endswith("cannot be read: Is a directory: name another with --config")
    assert "none.yaml: cannot be read" in refused(env={"MODELFS_CONFIG": "none.yaml"})


def test_an_empty_file_is_an_empty_configuration() -> None:
    assert loaded("# nothing\n").namespaces == ("hf", "s3", "github")
    assert loaded("models:\nstores:\ncache:\n").models == ()


def test_merged_mappings_keep_their_lines() -> None:
    text = "models:\n  a: &a {source: 'fake://a'}\n  b:\n    <<: *a\n    pin: 7\n"
    assert refused(text).startswith("modelfs.yaml:5: pin:")
    assert loaded(text.replace("pin: 7", "pin: true")).models[1].sources == ("fake://a",)


def test_dates_stay_text() -> None:
    assert loaded("models: {a: {source: 'fake://a', options: {profile: 2024-01-01}}}").models[0].options == {
        "profile": "2024-01-01"
    }


def test_nothing_may_lie_inside_the_mountpoint(world: Path) -> None:
    (world / "link").symlink_to("/models")
    assert "is inside the mountpoint" in refused(MODEL + "cache: {dir: /models/cache}\n")
    assert "is inside the mountpoint" in refused(MODEL + "cache: {dir: link/cache}\n")
    assert "is inside the mountpoint" in refused(MODEL + "log_file: /models/log\n")
    Path("modelfs.yaml").unlink()
    assert "lie inside one another" in refused(sources=["a=file:///models/x"])
    assert "lie inside one another" in refused(sources=["a=file:///srv"], mountpoint=Path("/srv/models"))
    assert loaded(sources=["a=file:///models-2/x"]).models[0].name == "a"
    assert load(mountpoint=None, env={}, sources=["a=file:///srv"]).models[0].name == "a"


# -- the documentation

DOCS = Path(config.__file__).parents[2] / "docs"


def test_a_model_has_the_policy_for_pickles_of_the_mount_or_its_own() -> None:
    settings = loaded("pickles: deny\nmodels:\n  a: file:///a\n  b: {source: file:///b, pickles: warn}\n")
    assert [model.pickles for model in settings.models] == ["deny", "warn"]
    assert config.Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(
        ConfigError, match=r"modelfs\.yaml:2: pickles: 'maybe' is not one of allow, warn, deny"
    ):
        loaded("models:\n  b: {source: file:///b, pickles: maybe}\n")


def test_a_model_says_which_archives_are_directories() -> None:
    text = "models:\n  a: file:///a\n  b: {source: file:///b, archives: true}\n"
    text += "  c: {source: file:///c, archives: '*.zip'}\n  d: {source: file:///d, archives: [a.tar, b/*]}\n"
    settings = loaded(text)
    assert [m.face.archives for m in settings.models] == [None, True, ("*.zip",), ("a.tar", "b/*")]
    assert config.Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    with pytest.raises(ConfigError, match=r"modelfs\.yaml:2: archives: '7' is neither true, false nor globs"):
        loaded("models:\n  b: {source: file:///b, archives: 7}\n")


def test_the_documented_settings_are_those_there_are() -> None:
    text = (DOCS / "configuration.md").read_text()
    rows = re.findall(r"^\| `([a-z_.]+)` \| `(MODELFS_\w+)` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
    assert [(name, variable, words) for name, variable, _, words in rows] == [
        (key.name, key.variable, key.text) for key in KEYS
    ]
    for key, (_, _, default, _) in zip(KEYS, rows, strict=True):
        assert default.startswith("see ") if key.default is None else key.read(default) == key.default


def test_the_documented_example_is_a_configuration() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", (DOCS / "configuration.md").read_text(), re.DOTALL)
    settings = loaded(example)
    assert [model.name for model in settings.models] == ["finbert", "research/cryptobert"]
    assert settings.models[1].options == {
        "endpoint_url": "http://localhost:9000",
        "profile": "minio",
        "region": "eu-central-1",
    }


@pytest.mark.parametrize(
    ("written", "rate"),
    [("off", 0), ("'off'", 0), ("0", 0), ("1MB", 10**6), ("20MiB/s", 20 * 1024**2), ("4096", 4096)],
)
def test_the_pace_of_the_scrubber_is_a_rate_or_off(written: str, rate: int) -> None:
    assert loaded(f"{MODEL}scrub: {written}\n").scrub == rate


@pytest.mark.parametrize("written", ["fast", "on", "20MiB/h", "0MiB/s", "[]"])
def test_another_pace_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"scrub: .* is neither a rate nor off: write it like 20MiB/s$"):
        loaded(f"{MODEL}scrub: {written}\n")


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1:9180", "127.0.0.1:9180"),
        ('"[::1]:9180"', "[::1]:9180"),
        ("public 0.0.0.0:9180", "0.0.0.0:9180"),
        ("off", None),
    ],
)
def test_http_is_an_address(written: str, address: str | None) -> None:
    assert loaded(f"{MODEL}http: {written}\n").http == address


@pytest.mark.parametrize(
    "written", ["9180", "localhost", "1.2.3:80", '"127.0.0.1:"', "127.0.0.1:70000", '"::1:80"']
)
def test_http_that_is_no_address_is_refused(written: str) -> None:
    with pytest.raises(ConfigError, match=r"http: .* is no address: write it like 127\.0\.0\.1:9180"):
        loaded(f"{MODEL}http: {written}\n")


@pytest.mark.parametrize("written", ["0.0.0.0:9180", '"[::]:9180"', "192.168.1.5:80"])
def test_http_that_others_could_reach_has_to_be_marked(written: str) -> None:
    with pytest.raises(ConfigError, match=r"http: .* can be reached from outside, .* write 'public "):
        loaded(f"{MODEL}http: {written}\n")
