"""Who we are to a container registry: Docker's ``config.json``, credential helpers, and registry tokens.

- ``config.json``: https://docs.docker.com/reference/cli/docker/login/ (``auths``, ``credHelpers``,
  ``credsStore``), in ``$DOCKER_CONFIG`` or ``~/.docker``.
- Helpers: https://github.com/docker/docker-credential-helpers: ``docker-credential-NAME get``, the server on
  stdin, ``{"Username": …, "Secret": …}`` on stdout; the user ``<token>`` means an identity token.
- Tokens: https://distribution.github.io/distribution/spec/auth/token/ and ``…/oauth/`` for identity tokens.

Nothing is kept here: who asks again gets what file and helper say now.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import trio

from modelfs.errors import AccessDenied, BadAnswer
from modelfs.stores import redact
from modelfs.stores.reach import leads
from modelfs.stores.web import Answer, Web, basic_auth, failure

HUB = "https://index.docker.io/v1/"
"""What Docker Hub is called where credentials are kept."""

HELPER_SECONDS = 30.0
MAX_ANSWER = 1 << 20

_CHALLENGE = re.compile(r"""([!#$%&'*+.^_`|~0-9A-Za-z-]+)(?:[ ]*=[ ]*("(?:[^"\\]|\\.)*"|[^\s,"]*))?""")
_TOKEN = re.compile(r"[!-~]+")
_LEAST, _LONGEST = 60, 86_400
"""Seconds that every token is good for by the specification, and that any is believed to be."""
_BASIC_LIFE = 600.0
"""Seconds after which passwords are read again."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a user has to show; either a password, an identity token, or a registry's own token."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity: str = field(default="", repr=False)
    bearer: str = field(default="", repr=False)


@dataclass(frozen=True, slots=True)
class Grant:
    """What opens a repository, for a while.

    Attributes:
        headers: to be sent to the registry; secrets.
        expires: seconds since the epoch.
        renew: when a new one should be asked for: early enough to finish what was begun with this one.

    """

    headers: Mapping[str, str] = field(repr=False)
    expires: float
    renew: float

    @classmethod
    def lasting(cls, authorization: str, seconds: float) -> Grant:
        """Return what is good for `seconds` from now."""
        now = time.time()
        return cls({"authorization": authorization}, now + seconds, now + seconds - min(60.0, seconds / 2))


async def grant(
    answer: Answer, server: str, scope: str, connect: Callable[[str, Mapping[str, str]], Web]
) -> Grant | None:
    """Return what the 401 `answer` of a registry asks for: a token or a password; None if we have neither.

    Args:
        answer: with a ``WWW-Authenticate`` (RFC 9110, 11.6.1).
        server: whose credentials to use.
        scope: to ask for where the challenge names none.
        connect: makes a connection to a URL that sends headers to its origin.

    Raises:
        AccessDenied: our credentials are refused or cannot be read.
        StoreError: the token server fails, or is where the registry must not lead us.

    """
    asked = challenges(answer.headers.get("www-authenticate", ""))
    ours = await credentials(server)
    if ours and ours.bearer:
        return Grant.lasting(f"Bearer {ours.bearer}", _BASIC_LIFE)
    if "bearer" in asked:
        return await _token(asked["bearer"], ours or Credentials(), scope, str(answer.url), connect)
    if "basic" in asked and ours and ours.user:
        return Grant.lasting(basic_auth(ours.user, ours.password), _BASIC_LIFE)
    return None


def challenges(text: str) -> dict[str, dict[str, str]]:
    """Return scheme → parameters of a ``WWW-Authenticate``, all names in lower case."""
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    for name, value in _CHALLENGE.findall(text):
        if value:
            parameters[name.lower()] = re.sub(r"\\(.)", r"\1", value[1:-1]) if value[0] == '"' else value
        else:
            parameters = found.setdefault(name.lower(), {})
    return found


async def _token(
    challenge: Mapping[str, str],
    ours: Credentials,
    scope: str,
    registry: str,
    connect: Callable[[str, Mapping[str, str]], Web],
) -> Grant:
    """Ask the token server that the registry names."""
    realm = challenge.get("realm", "")
    await trio.to_thread.run_sync(leads, registry, realm)
    scopes = (challenge.get("scope") or scope).split()
    asked = [("service", challenge["service"])] if challenge.get("service") else []
    if ours.identity:
        form = {**dict(asked), "scope": " ".join(scopes), "client_id": "modelfs"}
        form |= {"grant_type": "refresh_token", "refresh_token": ours.identity}
        async with connect(realm, {}) as web:
            answer = await web.ask("POST", realm, MAX_ANSWER, form=form, follow=False)
    else:
        parts = urlsplit(realm)
        query = urlencode([*parse_qsl(parts.query), *asked, *(("scope", one) for one in scopes)])
        secrets = {"authorization": basic_auth(ours.user, ours.password)} if ours.user else {}
        async with connect(realm, secrets) as web:
            answer = await web.ask("GET", urlunsplit(parts._replace(query=query)), MAX_ANSWER)
    place = redact(realm)
    if answer.status in (400, 401, 403):
        raise AccessDenied(f"{place}: refuses our credentials ({answer.status}): run docker login again")
    if answer.status != 200:
        raise failure(answer, realm)
    return _granted(answer.body, place)


def _granted(body: bytes, place: str) -> Grant:
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{place}: the token server's answer is not JSON: check the registry") from error
    data = data if isinstance(data, dict) else {}
    token, seconds = data.get("token") or data.get("access_token"), data.get("expires_in")
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise BadAnswer(f"{place}: the token server's answer holds no token: check the registry")
    life = seconds if isinstance(seconds, int | float) and _LEAST <= seconds <= _LONGEST else _LEAST
    return Grant.lasting(f"Bearer {token}", float(life))


async def credentials(server: str) -> Credentials | None:
    """Return what Docker's configuration has for `server` (`HUB`, or a host with its port if it has one).

    Cancelled, it ends the helper.

    Raises:
        AccessDenied: file or helper fail; names which.

    """
    path, config = await trio.to_thread.run_sync(_configuration)
    helpers = config.get("credHelpers")
    helper = (helpers.get(server) if isinstance(helpers, dict) else None) or config.get("credsStore")
    found = await _helped(helper, server, path) if helper else None
    return found or _written(config, server, path)


def _configuration() -> tuple[str, Mapping[str, Any]]:
    """Return Docker's configuration and where it is."""
    directory = os.environ.get("DOCKER_CONFIG") or "~/.docker"
    try:
        path = Path(directory).expanduser() / "config.json"
        data = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: the user has no home
        return directory, {}
    except OSError as error:
        raise AccessDenied(f"{path}: {error.strerror}: let the daemon's user read it") from error
    except (ValueError, RecursionError) as error:
        raise AccessDenied(f"{path}: is not JSON: correct it") from error
    return str(path), data if isinstance(data, dict) else {}


async def _helped(helper: Any, server: str, path: str) -> Credentials | None:
    """Return what a credential helper has; None if it has nothing for `server`."""
    if not isinstance(helper, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", helper):
        raise AccessDenied(f"{path}: names a credential helper that cannot be one: correct it")
    program = f"docker-credential-{helper}"
    run = functools.partial(
        trio.run_process, stdin=server.encode(), capture_stdout=True, stderr=subprocess.DEVNULL, check=False
    )
    done = None
    try:
        with trio.move_on_after(HELPER_SECONDS):
            done = await run([program, "get"])
    except OSError as error:
        raise AccessDenied(f"{path}: cannot run {program} ({error.strerror}): install it") from error
    if done is None:
        raise AccessDenied(f"{program}: no answer within {HELPER_SECONDS:g} s: run it by hand")
    if done.returncode:
        if b"credentials not found" in done.stdout:
            return None
        raise AccessDenied(f"{program}: fails ({done.returncode}) for {server}: run it by hand")
    try:
        data = json.loads(done.stdout)
        user, secret = data["Username"], data["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise AccessDenied(f"{program}: its answer is not that of a credential helper") from error
    if not isinstance(user, str) or not isinstance(secret, str):
        raise AccessDenied(f"{program}: its answer is not that of a credential helper")
    return Credentials(identity=secret) if user == "<token>" else Credentials(user, secret)


def _written(config: Mapping[str, Any], server: str, path: str) -> Credentials | None:
    """Return what the file itself has; servers may be written as URLs there."""
    table = config.get("auths")
    table = table if isinstance(table, dict) else {}
    row = table.get(server) or next((table[key] for key in table if _host(key) == _host(server)), None)
    if not isinstance(row, dict):
        return None
    texts = {name: text for name, text in row.items() if isinstance(text, str)}
    user, password = texts.get("username", ""), texts.get("password", "")
    if texts.get("auth"):
        try:
            user, _, password = base64.b64decode(texts["auth"], validate=True).decode().partition(":")
        except ValueError as error:
            raise AccessDenied(f"{path}: 'auth' of {server} is not base64: run docker login again") from error
    found = Credentials(
        user, password.rstrip("\0"), texts.get("identitytoken", ""), texts.get("registrytoken", "")
    )
    return found if found != Credentials() else None


def _host(server: str) -> str:
    return server.partition("://")[2].partition("/")[0] or server.partition("/")[0]
