"""What cannot be mounted is refused in one line that says where and what to do, and leaves nothing behind."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from modelfs.testing.hub import TOKEN, HubServer
from modelfs.testing.s3 import S3Server
from tests.mount.harness import alone, left_behind, modelfs, mounted, raw_server

CONFIG, MOUNT, CACHE, STORE = 3, 4, 5, 6
"""Exit codes of docs/cli.md."""


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.client().create_bucket(Bucket="models")
        server.client().put_object(Bucket="models", Key="bert/config.json", Body=b"{}")
        yield server


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/open", {"config.json": b"{}"})
        server.add("org/gated", {"config.json": b"{}"}, gated=True)
        yield server


@pytest.fixture
def good(place: Path) -> str:
    """The words that add a model which can be mounted."""
    (place / "good").mkdir()
    (place / "good" / "config.json").write_text("{}")
    return f"--source=good=file://{place}/good"


def refusal(place: Path, *words: str, code: int, env: Mapping[str, str] | None = None) -> str:
    """Mount below `place`, which must be refused with `code`; return the line that says why."""
    command = ["mount", f"{place}/models", f"--cache-dir={place}/cache", f"--log-file={place}/log", *words]
    result = modelfs(*command, env={**alone(place), **(env or {})}, check=False)
    if result.returncode == 0:
        modelfs("umount", f"{place}/models", env=alone(place))
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    assert re.fullmatch(r"modelfs: [^\n]+\n", result.stderr), result.stderr
    assert left_behind(place) == []
    log = place / "log"
    assert "Traceback" not in (log.read_text() if log.exists() else "")
    return result.stderr.removeprefix("modelfs: ").rstrip("\n")


# -- stores


def test_an_unknown_scheme_is_named_with_the_known_ones(place: Path) -> None:
    (place / "models").mkdir()
    line = refusal(place, "--source=m=nope://x", code=CONFIG)
    assert re.search(r"^--source: model 'm': .*nope://.*file, .*hf, .*s3", line), line


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://none-such/bert/", r"s3://none-such/bert/?: .*bucket.*: check "),
        ("s3://models/none-such/", r"s3://models/none-such/?: .*: check "),
        (
            "hf://org/none-such",
            r"hf://org/none-such@main: no such repository, .*: check the name and HF_TOKEN",
        ),
        ("hf://org/open@v9", r"hf://org/open@v9: there is no revision 'v9': check the URL"),
        ("hf://org/gated", r"hf://org/gated@main is gated: accept .* at http\S+/org/gated and set HF_TOKEN"),
        ("file:///none/such", r"file:///none/such: .*: check "),
    ],
)
def test_what_a_store_does_not_have_or_give_is_refused(
    url: str, said: str, place: Path, s3: S3Server, hub: HubServer
) -> None:
    (place / "models").mkdir()
    line = refusal(place, f"--source=m={url}", code=STORE, env={**s3.env(), **hub.env()})
    assert re.match(rf"model m: {said}", line), line


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "the secret key is wrong: check "),
        ("AWS_ACCESS_KEY_ID", "the access key is unknown here: check "),
    ],
)
def test_wrong_credentials_are_refused_and_not_repeated(
    wrong: str, said: str, place: Path, s3: S3Server
) -> None:
    (place / "models").mkdir()
    env = {**s3.env(), wrong: "AKIAHUSHHUSHHUSH0000"}
    line = refusal(place, "--source=m=s3://models/bert/", code=STORE, env=env)
    assert re.match(rf"model m: s3://models/bert/?: .*{said}", line), line
    assert "HUSH" not in line + (place / "log").read_text()


def test_the_conditions_of_a_gated_repository_are_still_to_be_accepted(place: Path, hub: HubServer) -> None:
    (place / "models").mkdir()
    env = {**hub.env(), "HF_TOKEN": TOKEN}
    line = refusal(place, "--source=m=hf://org/gated", code=STORE, env=env)
    assert "accept " in line
    assert TOKEN not in line + (place / "log").read_text()


def test_a_page_that_lists_nothing_is_refused(place: Path) -> None:
    (place / "models").mkdir()
    page = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 6\r\n\r\n<p>hi!"
    with raw_server(lambda _: page) as url:
        line = refusal(place, f"--source=m={url}", code=STORE)
    assert re.match(rf"model m: {url}: lists no files: check the URL", line), line


JSON = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("scheme", "answer"),
    [
        ("http", b"\x00\x01 this is not HTTP\r\n\r\n"),
        ("http", JSON + b"Content-Length: 4\r\n\r\n{[}]"),
        ("http", JSON + b"Content-Length: 999\r\n\r\n{}"),
        ("hf", JSON + b"Content-Length: 4\r\n\r\n{[}]"),
        ("s3", b"\x00\x01 this is not HTTP\r\n\r\n"),
    ],
    ids=["http: not HTTP", "http: not JSON", "http: cut off", "hf: not JSON", "s3: not HTTP"],
)
def test_garbage_is_one_line(scheme: str, answer: bytes, place: Path) -> None:
    # A mount would ask again for a minute: such answers can pass.
    with raw_server(lambda _: answer) as url:
        store = {"http": url, "hf": "hf://org/name", "s3": "s3://bucket/prefix/"}[scheme]
        env = {"HF_ENDPOINT": url.rstrip("/"), "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a"}
        result = modelfs("ls", store, env={**env, "AWS_SECRET_ACCESS_KEY": "b"}, check=False)
    assert result.returncode == STORE, result.stderr
    assert re.fullmatch(rf"modelfs: [^\n]*{store.rstrip('/')}[^\n]*: [^\n]+\n", result.stderr), result.stderr
    assert result.stdout == ""


# -- the cache directory


def test_a_file_where_the_cache_should_be_is_refused(place: Path, good: str) -> None:
    (place / "models").mkdir()
    (place / "cache").write_text("mine")
    line = refusal(place, good, code=CACHE)
    assert line.startswith(f"{place}/cache")
    assert "name another directory as cache.dir" in line
    assert (place / "cache").read_text() == "mine"


def test_a_cache_on_a_read_only_file_system_is_refused(place: Path, good: str) -> None:
    (place / "models").mkdir()
    (place / "cache").mkdir()
    subprocess.run(["mount", "--bind", place / "cache", place / "cache"], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", place / "cache"], check=True)
        line = refusal(place, good, code=CACHE)
    finally:
        subprocess.run(["umount", place / "cache"], check=True)
    assert line.startswith(f"{place}/cache")
    assert "name another directory as cache.dir" in line


def test_the_cache_of_another_mount_is_refused(place: Path, good: str) -> None:
    other, own = place / "other", place / "own"
    (own / "models").mkdir(parents=True)
    other.mkdir()
    with mounted(other, sources={"m": f"file://{place}/good"}, transport="auto") as first:
        line = refusal(own, good, f"--cache-dir={first.cache}", code=CACHE)
        pid = first.status()["pid"]
    assert line.startswith(f"{first.cache} is in use by process {pid}; stop it or name another directory")


# -- the mountpoint


def test_a_mountpoint_that_is_missing_is_refused(place: Path, good: str) -> None:
    assert refusal(place, good, code=MOUNT) == f"{place}/models does not exist: mkdir -p {place}/models"


def test_a_mountpoint_that_is_not_empty_is_refused(place: Path, good: str) -> None:
    (place / "models" / "mine").mkdir(parents=True)
    assert refusal(place, good, code=MOUNT) == f"{place}/models is not empty: choose an empty directory"


def test_a_mountpoint_that_is_a_file_is_refused(place: Path, good: str) -> None:
    (place / "models").write_text("")
    line = refusal(place, good, code=MOUNT)
    assert line == f"{place}/models is not a directory: choose a directory to mount on"


# -- the configuration


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("models:\n  a: s3://x/\n b: [\n", 3, ""),
        ("models:\n  a: s3://x/\n  b: [s3://y/\n", 4, ""),
        ("models:\n\ta: s3://x/\n", 2, ""),
        ("models:\n  a: s3://x/\ncash: 1\n", 3, "unknown key 'cash'; did you mean 'cache'?"),
        (
            "models:\n  a:\n    source: s3://x/\n    pinned: 1\n",
            4,
            "unknown key 'pinned'; did you mean 'pin'?",
        ),
        ("models:\n  a: s3://x/\n  a: s3://y/\n", 3, "'a' is there twice"),
        ("models:\n  ..: s3://x/\n", 2, r"model name '\.\.': "),
        ("models:\n  a/b/c: s3://x/\n", 2, "model name 'a/b/c': .*: write NAME or ORG/NAME"),
        ('models:\n  "a\\0b": s3://x/\n', 2, r"model name 'a\\x00b': "),
        ("models:\n  a\0b: s3://x/\n", 2, r"U\+0000 is not allowed"),
    ],
)
def test_a_mistake_in_the_file_is_refused_with_its_line(text: str, line: int, said: str, place: Path) -> None:
    (place / "models").mkdir()
    file = place / "modelfs.yaml"
    file.write_text(text)
    assert re.match(rf"{file}:{line}: .*{said}", refusal(place, f"--config={file}", code=CONFIG))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source=a=s3://x/", "--source=a/b=s3://y/"], "model name 'a/b': the model 'a'"),
        (["--source=..=s3://x/"], r"model name '\.\.': "),
        (["--source=../a=s3://x/"], r"model name '\.\./a': "),
        (["--source=/a=s3://x/"], "model name '/a': "),
        (["--source=a\nb=s3://x/"], "model name 'a"),
        (["--source=s3://x/"], "write it as NAME=URL"),
    ],
)
def test_a_mistake_in_the_words_is_refused(words: list[str], said: str, place: Path) -> None:
    (place / "models").mkdir()
    assert re.match(f"--source: .*{said}", refusal(place, *words, code=CONFIG))
