"""No secret is shown: they are planted wherever one can be set, and what a mount shows is searched."""

from __future__ import annotations

import base64
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from modelfs.testing.hub import TOKEN, HubServer
from modelfs.testing.s3 import SECRET, S3Server
from tests.mount.harness import Mounted, alone, mounted, open_directory, raw_server
from tests.stores.site import Reply, Request, file_reply, scripted

DATA = b"weights " * 2048
MODELS = ("userinfo", "query", "headers", "netrc", "bucket", "hub")


def canary(place: str) -> str:
    """Return a secret that tells where it was planted."""
    return f"canary-{place}-7f3a"


def forms(secret: str) -> set[bytes]:
    """Return how a secret may be written."""
    plain = secret.encode()
    pairs = [base64.b64encode(f"{user}:{secret}".encode()) for user in ("me", "")]
    return {plain, quote(plain, safe="").encode(), base64.b64encode(plain).rstrip(b"="), *pairs}


SECRETS = {form: secret for secret in (SECRET, TOKEN) for form in forms(secret)} | {
    form: place
    for place in (*MODELS, "session", "signature", "wrong-key", "wrong-token", "proxy")
    for form in forms(canary(place))
}


def leaks(shown: bytes) -> set[str]:
    """Return which secrets can be found in `shown`."""
    return {name for form, name in SECRETS.items() if form in shown}


def everything_shown(mount: Mounted) -> Iterator[tuple[str, bytes]]:
    """Yield everything that a mount shows to anybody: its name and its bytes."""
    yield "log", mount.log.read_bytes()
    status = mount.status()
    for word in ("refresh", "status"):
        result = mount.cli(word, str(mount.path))
        yield word, (result.stdout + result.stderr).encode()
    (control,) = Path(mount.env["MODELFS_RUNTIME_DIR"]).glob("*.sock")
    for path in ("metrics", "v1/status", "healthz", "readyz", "openapi.json"):
        for where in (["--unix-socket", str(control), "http://modelfs"], [status["http"]]):
            answer = ["curl", "-sSi", "--noproxy", "*", *where[:-1], f"{where[-1]}/{path}"]
            yield f"{path} at {where[-1]}", subprocess.run(answer, check=True, capture_output=True).stdout
    for pid in {status["pid"], status["holder_pid"]} - {None}:
        yield f"cmdline of {pid}", Path(f"/proc/{pid}/cmdline").read_bytes()
    for path in (*files_below(mount.cache), *files_below(control.parent)):
        yield str(path), os.fsencode(path) + path.read_bytes()
    yield "metadata", mount.run("cat", str(mount.path / "model-metadata.yaml")).stdout.encode()
    find = mount.run("find", str(mount.path), "-type", "f", "-printf", "%p %l\\n", check=False)
    yield "names", (find.stdout + find.stderr).encode()
    attributes = mount.run(
        "getfattr", "-R", "-d", "-m", "-", "--absolute-names", str(mount.path), check=False
    )
    yield "attributes", (attributes.stdout + attributes.stderr).encode()


def files_below(directory: Path) -> Iterator[Path]:
    yield from (path for path in directory.rglob("*") if path.is_file())


def assert_nothing_leaks(mount: Mounted) -> None:
    found = {what: names for what, shown in everything_shown(mount) if (names := leaks(shown))}
    assert found == {}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with S3Server() as server:
        server.client().create_bucket(Bucket="models")
        server.client().put_object(Bucket="models", Key="bert/model.bin", Body=DATA)
        yield server


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add("org/private", {"config.json": b"{}", "model.bin": DATA}, private=True)
        yield server


def basic(place: str) -> str:
    return "Basic " + base64.b64encode(f"me:{canary(place)}".encode()).decode()


WANTED: Mapping[str, Callable[[Request], bool]] = {
    "userinfo": lambda r: r.headers.get("authorization") == basic("userinfo"),
    "headers": lambda r: r.headers.get("x-token") == canary("headers"),
    "netrc": lambda r: r.headers.get("authorization") == basic("netrc"),
    "query": lambda r: r.target.endswith(f"?X-Amz-Signature={canary('query')}"),
}
"""Model → what a request for it must hold."""


def guarded(request: Request) -> Reply:
    """Answer like a server that wants the secret of the model that is asked for."""
    model = request.target.split("/")[1]
    if not WANTED[model](request):
        return Reply(401)
    if request.target.partition("?")[0].endswith("/model.bin"):
        return file_reply(DATA, request)
    listing = b'{"version": 1, "files": [{"path": "model.bin", "size": %d}]}' % len(DATA)
    return Reply(200, {"Content-Type": "application/json"}, listing)


def with_secret(url: str, place: str) -> str:
    """Return `url` with a password in it."""
    return url.replace("://", f"://me:{canary(place)}@")


def environment(place: Path, hub: HubServer, s3: S3Server) -> dict[str, str]:
    netrc = place / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login me password {canary('netrc')}\n")
    proxy = f"http://me:{canary('proxy')}@127.0.0.1:9"
    return {
        **alone(place),
        **hub.env(),
        **s3.env(),
        "AWS_SESSION_TOKEN": canary("session"),
        "HF_TOKEN": TOKEN,
        "NETRC": str(netrc),
        "HTTP_PROXY": proxy,
        "http_proxy": proxy,
        "https_proxy": proxy,
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }


@pytest.fixture(scope="module")
def working(hub: HubServer, s3: S3Server) -> Iterator[Mounted]:
    """A mount whose stores all want a secret and get it."""
    with open_directory() as place, scripted(guarded) as (url, _):
        config = f"""
http: 127.0.0.1:0
models:
  userinfo: {with_secret(url, "userinfo")}userinfo/
  query: {url}query/model.bin?X-Amz-Signature={canary("query")}
  headers: {{source: {url}headers/, options: {{headers: {{X-Token: {canary("headers")}}}}}}}
  netrc: {url}netrc/
  bucket: s3://models/bert/
  hub: hf://org/private
"""
        env = environment(place, hub, s3)
        with mounted(place, "--log-level", "debug", config=config, env=env, transport="kernel") as mount:
            for model in MODELS:
                shown = mount.run("cat", str(mount.path / model / "model.bin"), check=False)
                assert shown.returncode == 0, f"{model}: {shown.stderr}"
            yield mount


def test_working_stores_show_no_secret(working: Mounted) -> None:
    for model in MODELS:  # what is pinned is noted on disk
        working.client().pin(model)
    assert_nothing_leaks(working)


def test_the_search_finds_what_is_there(working: Mounted) -> None:
    # The environment is the user's own way to hand secrets over, and only the user can read it.
    environment = Path(f"/proc/{working.status()['holder_pid']}/environ")
    assert environment.stat().st_mode & 0o777 == 0o400
    assert leaks(environment.read_bytes()) >= {SECRET, TOKEN, "session", "proxy"}


# -- stores that fail ----------------------------------------------------------------------------------


def echoing(request: Request) -> Reply:
    """List a model, and refuse its bytes with an answer that repeats what was asked."""
    said = request.headers.get("authorization", "") + request.target
    if request.target.endswith("modelfs-manifest.json"):
        listing = b'{"version": 1, "files": [{"path": "model.bin", "size": 16384, "etag": "\\"1\\""}]}'
        return Reply(200, {"Content-Type": "application/json"}, listing)
    if "redirect" in request.target:
        return Reply(302, {"Location": f"http://127.0.0.1:9/?X-Amz-Signature={canary('signature')}"})
    return Reply(403, {"X-Said": said, "WWW-Authenticate": said}, said.encode())


def test_failing_stores_show_no_secret(place: Path, hub: HubServer, s3: S3Server) -> None:
    with scripted(echoing) as (url, _), raw_server(lambda received: received) as noise:
        token = place / "token"
        token.write_text(canary("wrong-token"))
        config = f"""
http: 127.0.0.1:0
keep_going: true
read_deadline: 2s
models:
  nobody: {with_secret("http://127.0.0.1:9/", "userinfo")}
  proxied: {with_secret("http://models.invalid/", "userinfo")}
  signed: http://models.invalid/model.bin?X-Amz-Signature={canary("query")}
  noise: {noise}model.bin?token={canary("query")}
  refused: {with_secret(url, "userinfo")}refused/
  redirected: {with_secret(url, "userinfo")}redirect/
  hub: {{source: hf://org/private, options: {{token_file: {token}}}}}
  absent: s3://none-such/
  bucket: s3://models/bert/
"""
        env = {**environment(place, hub, s3), "AWS_SECRET_ACCESS_KEY": canary("wrong-key")}
        with mounted(place, "--log-level", "debug", config=config, env=env, transport="kernel") as mount:
            for model in ("refused", "redirected"):
                shown = mount.run("cat", str(mount.path / model / "model.bin"), check=False)
                assert shown.returncode != 0
            why = {model["name"]: model["why"] for model in mount.status()["models"]}
            assert {name for name, reason in why.items() if reason} == set(why) - {"refused", "redirected"}
            assert_nothing_leaks(mount)
