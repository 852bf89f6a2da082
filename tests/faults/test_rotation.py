"""Credentials are rotated while a model is in use."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio

from modelfs.errors import AccessDenied
from modelfs.fetch.source import Source
from modelfs.testing.s3 import KEY_ID, S3Server
from tests.faults.rig import Site, fetching, noise, outcome

FILES = {name: noise(5000, name) for name in ("before", "located", "later", "denied")}


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with Site(tmp_path, FILES) as own:
        for name, value in own.environment().items():
            monkeypatch.setenv(name, value)
        yield own


@pytest.mark.parametrize("key_id", [KEY_ID, "AKIAMODELFSTEST00002"])
def test_rotated_credentials_are_taken_up(site: Site, tmp_path: Path, key_id: str) -> None:
    fresh = "the/next+secret/of/these+tests0000000000"

    async def test(successor: S3Server) -> None:
        async with fetching(tmp_path / "cache", site.ca_bundle, deadline=60) as (fetcher, _, metrics):
            with site.behind("s3") as (proxy, store):
                source = Source(store, metrics)
                entries = (await store.snapshot()).entries

                async def read(name: str) -> str:
                    return await outcome(fetcher, source, entries[name], FILES[name])

                assert await read("before") == "right"
                await source.location(entries["located"])  # signed with what is about to go
                proxy.upstream = successor.url
                assert await read("denied") == AccessDenied.__name__
                site.sign_with(key_id, fresh)
                assert await read("located") == "right"
                assert await read("later") == "right"
                assert await read("denied") == "right"

    with S3Server(key_id=key_id, secret=fresh) as successor:
        successor.client().create_bucket(Bucket="models")
        for name, data in FILES.items():
            successor.client().put_object(Bucket="models", Key=name, Body=data)
        trio.run(partial(test, successor))
