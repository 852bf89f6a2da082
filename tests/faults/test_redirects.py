"""Where stores may lead: the Hub to its content network, nobody to other schemes or nearer addresses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from modelfs.errors import BadAnswer
from modelfs.stores.reach import Reach
from modelfs.testing.faults import Asked, Fault, FaultProxy
from tests.faults.rig import Site


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), {"x.bin": b"content"}) as own:
        yield own


@pytest.mark.parametrize(
    "target", ["http://169.254.169.254/latest/meta-data/", "file:///etc/passwd", "ftp://127.0.0.1/x"]
)
def test_a_hub_that_leads_astray_is_not_followed(site: Site, target: str) -> None:
    def plan(asked: Asked) -> Fault | None:
        return Fault("redirect", target=target) if "/resolve/" in asked.path else None

    async def main() -> None:
        with site.behind("hf") as (proxy, store):
            entry = (await store.snapshot()).entries["x.bin"]
            assert (await store.locate(entry)).url.startswith(proxy.url.replace("127.0.0.1", "localhost"))
            proxy.follow(plan)
            with pytest.raises(BadAnswer):
                await store.locate(entry)
            assert proxy.injected == {"redirect": 1}

    trio.run(main)


@pytest.mark.parametrize("link", [Reach.PUBLIC, Reach.PRIVATE])
def test_a_hub_on_the_internet_leads_to_no_private_address(
    site: Site, monkeypatch: pytest.MonkeyPatch, link: Reach
) -> None:
    async def main() -> None:
        with site.behind("hf") as (proxy, store):
            reaches = {proxy.url: Reach.PUBLIC}
            monkeypatch.setattr("modelfs.stores.hf.resolved_reach", lambda url: reaches.get(url, link))
            entry = (await store.snapshot()).entries["x.bin"]
            if link is Reach.PUBLIC:
                assert (await store.locate(entry)).public  # the client looks again when it connects
            else:
                with pytest.raises(BadAnswer, match="private address"):
                    await store.locate(entry)

    trio.run(main)


def test_a_proxy_that_is_closed_refuses(site: Site) -> None:
    proxy = FaultProxy(site.origin.url)
    with pytest.raises(RuntimeError):
        print(proxy.url)
