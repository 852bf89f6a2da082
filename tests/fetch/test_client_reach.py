"""Where the range client goes: redirects, authorities, proxies."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trustme

from modelfs.errors import (
    BadAnswer,
    ConfigError,
    Unavailable,
)
from modelfs.types import Location
from tests.fetch.basket import CONTENT, GOOD, SECRET, SECRETS, SPAN, fetch, refused
from tests.fetch.scripted import (
    Server,
    answer,
    tunnel,
)

pytestmark = pytest.mark.usefixtures("speaker")


def test_redirects_within_a_host_keep_the_headers() -> None:
    with Server(answer(302, location="b%20c/ü?q=1#x"), answer(308, location="/d"), GOOD) as server:
        basket = fetch(Location(f"{server.url}/a/", SECRETS))
    assert basket.span == SPAN
    assert [request.target for request in server.requests] == ["/a/", "/a/b%20c/%FC?q=1", "/d"]
    assert all(request.headers["private-token"] == SECRET for request in server.requests)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_to_another_host_drop_every_header_of_the_location_for_good(status: int) -> None:
    with Server(GOOD) as last, Server() as other, Server() as first:
        first._script = (answer(status, location=f"{other.url}/x"), answer(status, location=last.url))
        other._script = (answer(status, location=f"{first.url}/back"),)
        basket = fetch(Location(first.url, SECRETS, etag=None))
    assert basket.data == CONTENT[SPAN.start : SPAN.stop]
    requests = [first.requests[0], other.requests[0], first.requests[1], last.requests[0]]
    assert [SECRET in str(request.headers) for request in requests] == [True, False, False, False]
    assert all("range" in request.headers for request in requests)


def test_endless_redirects_are_given_up() -> None:
    with Server(answer(302, location="/again")) as server:
        refused(BadAnswer, server.url)
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "", None, "http://[::1"]
)
def test_redirects_to_anything_but_http_are_refused(target: str | None) -> None:
    with Server(answer(302, location=target)) as server:
        refused(BadAnswer, server.url)
    assert len(server.requests) == 1


def test_a_redirect_from_https_to_http_is_refused(tls: ssl.SSLContext, bundle: str) -> None:
    with Server(GOOD) as plain, Server(answer(302, location=plain.url), tls=tls) as server:
        refused(BadAnswer, server.url, ca_bundle=bundle)
    assert not plain.requests


@pytest.mark.parametrize("target", ["http://169.254.169.254/latest/meta-data/", "http://0xa9fea9fe/x"])
def test_a_redirect_to_the_metadata_service_is_refused(target: str) -> None:
    with Server(answer(302, location=target)) as server:
        url = f"{server.url}/model.bin"
        with pytest.raises(BadAnswer, match="link-local"):
            fetch(Location(url))


def test_a_url_that_a_public_store_chose_leads_to_no_private_address() -> None:
    with Server(GOOD) as server:
        with pytest.raises(BadAnswer, match="private address"):
            fetch(Location(server.url, public=True))
        assert not server.requests
        assert fetch(Location(server.url)).span == SPAN


def test_a_redirect_with_a_large_body_is_followed() -> None:
    with Server(answer(302, bytes(500_000), location="/b"), GOOD) as server:
        assert fetch(Location(server.url)).span == SPAN


def test_https_with_a_trusted_authority(tls: ssl.SSLContext, bundle: str) -> None:
    with Server(GOOD, tls=tls) as server:
        assert fetch(Location(server.url), ca_bundle=bundle).data == CONTENT[SPAN.start : SPAN.stop]


def test_the_environment_names_the_authorities(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", bundle)
    with Server(GOOD, tls=tls) as server:
        assert fetch(Location(server.url)).span == SPAN


def test_an_unknown_authority_and_a_wrong_name_are_refused(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger.pem"
    trustme.CA().cert_pem.write_to_path(stranger)
    with Server(GOOD, tls=tls) as server:
        assert "ca_bundle" in str(refused(Unavailable, server.url, ca_bundle=str(stranger)))
        with pytest.raises(Unavailable):
            fetch(Location(f"https://127.0.0.2:{server.port}"), ca_bundle=bundle)
    assert not server.requests


def test_a_missing_ca_bundle_is_a_configuration_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.pem"):
        fetch(Location("https://127.0.0.1"), ca_bundle=str(tmp_path / "none.pem"))


def test_http_goes_through_the_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with Server(GOOD) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        assert fetch(Location("http://models.invalid/x")).span == SPAN
    assert proxy.requests[0].target == "http://models.invalid/x"


def test_https_goes_through_a_tunnel(
    tls: ssl.SSLContext, bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(GOOD, tls=tls) as server, Server(tunnel) as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        basket = fetch(Location(server.url, SECRETS), ca_bundle=bundle)
    assert basket.data == CONTENT[SPAN.start : SPAN.stop]
    assert proxy.requests[0].method == "CONNECT"
    assert SECRET not in str(proxy.requests[0].headers)
