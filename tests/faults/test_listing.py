"""Each kind of fault against the listing of each network store: the right snapshot, or one clean error."""

from __future__ import annotations

import ssl
from collections.abc import Iterator

import pytest
import trio
import trustme

from modelfs.errors import StoreError, Unavailable
from modelfs.fetch.source import retrying
from modelfs.testing.faults import Fault, FaultProxy, Plan
from modelfs.types import Snapshot
from tests.faults.rig import SECRETS, Site, noise

STORES = ("http", "s3", "hf", "oci")
FILES = {"config.json": b"{}", "sub/model.bin": noise(5000, "model")}
STRUCK = {"http": 0, "s3": 0, "hf": 1, "oci": 1}
"""Which request is struck when it is only one: the one whose answer is the listing."""

METADATA = Fault("redirect", target="http://169.254.169.254/latest/meta-data/")

PASSING = [
    Fault("reset"),
    Fault("reset-in-body"),
    Fault("closed"),
    Fault("truncated"),
    Fault("silence", seconds=0.3),
    Fault("silence-in-body", seconds=0.3),
    Fault("trickle", seconds=0.3),
    Fault("status-429", seconds=1),
    Fault("status-500"),
    Fault("status-503"),
    Fault("no-http"),
    Fault("extra-bytes"),
    Fault("dns-failure"),
    Fault("tls-failure"),
]
"""What a second attempt cures."""

REFUSING = [
    Fault("gone"),
    Fault("expired"),
    Fault("rotated"),
    Fault("unauthorized"),
    Fault("redirect", target="file:///etc/passwd"),
    METADATA,
    Fault("redirect-loop"),
]
"""What the store means: at most the libraries of the stores try again."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with (
        pytest.MonkeyPatch.context() as patch,
        Site(tmp_path_factory.mktemp("site"), FILES) as own,
    ):
        for name, value in own.environment().items():
            patch.setenv(name, value)
        yield own


async def listed(site: Site, store: str, plan: Plan, seconds: float) -> Snapshot | StoreError:
    """Return the snapshot, retried as the daemon does, or the error after checking that it may be shown."""
    with site.behind(store, plan) as (proxy, own):
        try:
            return await retrying(own.snapshot, trio.current_time() + seconds)
        except StoreError as error:
            message = str(error)
            assert not [secret for secret in SECRETS if secret in message], message
            return error
        finally:
            assert proxy.injected.total() > 0


@pytest.mark.parametrize("store", STORES)
def test_a_listing_is_right_after_a_fault_that_passes(site: Site, store: str) -> None:
    async def one(fault: Fault) -> None:
        plan = [None] * STRUCK[store] + [fault]
        found = await listed(site, store, plan, 60)
        assert isinstance(found, Snapshot), (fault, found)
        sizes = {path: entry.size for path, entry in found.entries.items() if entry.kind == "file"}
        assert sizes == {path: len(data) for path, data in FILES.items()}, fault

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for fault in PASSING:
                nursery.start_soon(one, fault)

    trio.run(main)


@pytest.mark.parametrize("store", STORES)
def test_a_listing_that_always_fails_is_one_clean_error(site: Site, store: str) -> None:
    async def one(fault: Fault) -> None:
        if (store, fault) == ("hf", METADATA):
            return  # huggingface_hub follows it: not to be tried where there is such a service
        found = await listed(site, store, lambda _: fault, 1)
        if fault.kind not in ("trickle", "extra-bytes"):  # slow or odd, but right
            assert isinstance(found, StoreError), fault
            assert found.retryable or fault in REFUSING, (fault, found)

    async def main() -> None:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for fault in PASSING + REFUSING:
                    nursery.start_soon(one, fault)

    trio.run(main)


@pytest.mark.parametrize("store", STORES)
def test_a_store_whose_name_is_unknown_is_one_clean_error(site: Site, store: str) -> None:
    own = site.store(store, "http://modelfs-test.invalid")
    with pytest.raises(Unavailable) as caught:
        trio.run(retrying, own.snapshot, 0)
    assert not [secret for secret in SECRETS if secret in str(caught.value)]


@pytest.mark.parametrize("store", STORES)
def test_a_store_whose_certificate_nobody_vouches_for_is_asked_nothing(site: Site, store: str) -> None:
    stranger, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    stranger.issue_cert("127.0.0.1").configure_cert(context)
    with FaultProxy(site.upstream(store), tls=context) as proxy:
        with pytest.raises(Unavailable) as caught:
            trio.run(retrying, site.store(store, proxy.url).snapshot, 0)
        assert not [secret for secret in SECRETS if secret in str(caught.value)]
        assert proxy.asked == []
