"""Redirects lead to no address that is nearer than the server that redirects."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modelfs.errors import BadAnswer
from modelfs.stores.reach import Reach, allowed, leads, peer_reach, reach_of, resolved_reach


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("host", "reach"),
    [
        ("8.8.8.8", Reach.PUBLIC),
        ("2606:4700::1111", Reach.PUBLIC),
        ("huggingface.co", Reach.PUBLIC),
        ("10.0.0.1", Reach.PRIVATE),
        ("172.16.9.9", Reach.PRIVATE),
        ("192.168.1.1", Reach.PRIVATE),
        ("100.100.100.200", Reach.PRIVATE),  # metadata of Alibaba Cloud
        ("fd00:ec2::254", Reach.PRIVATE),  # metadata of AWS
        ("127.0.0.1", Reach.PRIVATE),
        ("::1", Reach.PRIVATE),
        ("[::1]", Reach.PRIVATE),
        ("0.0.0.0", Reach.PRIVATE),
        ("::", Reach.PRIVATE),
        ("::ffff:127.0.0.1", Reach.PRIVATE),
        ("127.1", Reach.PRIVATE),
        ("0x7f000001", Reach.PRIVATE),
        ("2130706433", Reach.PRIVATE),
        ("LocalHost.", Reach.PRIVATE),
        ("a.localhost", Reach.PRIVATE),
        ("169.254.169.254", Reach.LINK),
        ("::ffff:169.254.169.254", Reach.LINK),
        ("0xa9fea9fe", Reach.LINK),
        ("64:ff9b::a9fe:a9fe", Reach.LINK),
        ("64:ff9b::808:808", Reach.PUBLIC),
        ("fe80::1%eth0", Reach.LINK),
    ],
)
def test_every_address_has_its_reach(host: str, reach: Reach) -> None:
    assert reach_of(host) is reach


@pytest.mark.parametrize("store", Reach)
@pytest.mark.parametrize("target", Reach)
def test_a_redirect_leads_nowhere_nearer(store: Reach, target: Reach) -> None:
    if target > store:
        with pytest.raises(BadAnswer, match="configure this URL") as caught:
            allowed("http://u:s3cret@inside/x?sig=s3cret", target, store)
        assert "s3cret" not in str(caught.value)
    else:
        assert allowed("http://inside/x", target, store) is target


def test_behind_a_proxy_the_host_counts_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peer_reach("http://example.com/", "127.0.0.1") is Reach.PRIVATE
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    monkeypatch.setenv("no_proxy", "corp.example")
    assert peer_reach("http://example.com/", "127.0.0.1") is Reach.PUBLIC
    assert peer_reach("http://169.254.169.254/", "127.0.0.1") is Reach.LINK
    assert peer_reach("http://corp.example/", "127.0.0.1") is Reach.PRIVATE
    assert resolved_reach("http://localhost/") is Reach.PRIVATE
    assert resolved_reach("http://not-asked.invalid/") is Reach.PUBLIC


@pytest.mark.parametrize(
    ("origin", "url"),
    [
        ("https://127.0.0.1/", "http://127.0.0.1/"),
        ("http://127.0.0.1/", "http://169.254.169.254/"),
        ("http://8.8.8.8/", "http://127.0.0.1/"),
        ("http://8.8.8.8/", "ftp://8.8.4.4/"),
        ("http://8.8.8.8/", "http:///"),
        ("http://8.8.8.8/", "http://[::1"),
        ("http://8.8.8.8/", ""),
    ],
)
def test_a_server_does_not_lead_where_it_must_not(origin: str, url: str) -> None:
    with pytest.raises(BadAnswer):
        leads(origin, url)


def test_a_server_may_lead_away() -> None:
    assert leads("https://8.8.8.8/", "https://8.8.4.4/")
    assert not leads("http://127.0.0.1/", "https://8.8.8.8/")
    assert not leads("http://127.0.0.1/", "http://10.0.0.1/")


def test_names_are_resolved() -> None:
    assert resolved_reach("http://localhost:1/") is Reach.PRIVATE
    assert resolved_reach("http://127.0.0.1:1/") is Reach.PRIVATE
    assert resolved_reach("http://nowhere.invalid/") is Reach.PUBLIC


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="needs root, unshare and ip, for a network of its own with public addresses",
)
def test_a_public_store_cannot_lead_inside() -> None:
    setup = "ip link set lo up; for a in 11.0.0.1 11.0.0.2 10.0.0.1; do ip addr add $a/32 dev lo; done"
    result = subprocess.run(
        ["unshare", "-n", "sh", "-ec", f'{setup}; exec "$0" -m tests.stores.public_store', sys.executable],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
    )
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines == {
        "http://11.0.0.1/->http://11.0.0.2/": "followed by both",
        "http://11.0.0.1/->http://10.0.0.1/": "refused by both, and nothing was asked of it",
        "http://11.0.0.1/->http://localhost/": "refused by both, and nothing was asked of it",
        "http://11.0.0.1/->http://[::ffff:127.0.0.1]/": "refused by both, and nothing was asked of it",
        "http://11.0.0.1/->http://169.254.169.254/": "refused by both, and nothing was asked of it",
        "http://10.0.0.1/->http://11.0.0.2/": "followed by both",
        "http://10.0.0.1/->http://127.0.0.1/": "followed by both",
        "http://10.0.0.1/->http://169.254.169.254/": "refused by both, and nothing was asked of it",
    }
