"""Cached bytes that go bad on the disk: found, told, discarded, and right again at the next read."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cache import damage, data_file
from tests.mount.harness import Mounted, alone, eventually, modelfs, mounted
from tests.origin import Origin

BLOCK = 8 * 1024 * 1024
CONTENT = b"".join(i.to_bytes(4, "little") for i in range((BLOCK + 4096) // 4))
CONFIG = b'{"hidden": 1}'
FOUND = r"ERROR modelfs\.fetch\.scrub"


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin({"weights.bin": CONTENT, "config.json": CONFIG}) as origin:
        origin.digests["weights.bin"] = hashlib.sha256(CONTENT).hexdigest()
        yield origin


def read(mount: Mounted, name: str = "weights.bin") -> bytes:
    return (mount.path / "m" / name).read_bytes()


def fill(mount: Mounted) -> Path:
    """Read everything and return the data file of the weights, which are verified by then."""
    assert read(mount) == CONTENT
    assert read(mount, "config.json") == CONFIG
    for name, size in (("weights.bin", len(CONTENT)), ("config.json", len(CONFIG))):
        path = mount.path / "m" / name
        eventually(lambda: int(os.getxattr(path, "user.modelfs.cached_bytes")) == size)  # noqa: B023
    return data_file(mount.cache, f"sha256-{hashlib.sha256(CONTENT).hexdigest()}")


def verified(mount: Mounted, *words: str, code: int) -> dict[str, Any]:
    result = mount.cli("verify", *words, "--json", check=False)
    assert result.returncode == code, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def metrics(mount: Mounted, *names: str) -> list[float]:
    code = (
        "import httpx, sys\n"
        "from pathlib import Path\n"
        "from modelfs import control\n"
        "transport = httpx.HTTPTransport(uds=str(control.socket_path(Path(sys.argv[1]))))\n"
        "print(httpx.Client(transport=transport).get('http://modelfs/metrics').text)\n"
    )
    text = mount.python(code, str(mount.path), env=mount.env)
    return [float(value) for name in names for value in re.findall(rf"^{name} (\S+)$", text, re.MULTILINE)]


def test_a_flipped_bit_is_found_and_fetched_again(place: Path, transport: str, origin: Origin) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        file = fill(mount)
        assert verified(mount, code=0) == {"objects": 2, "bytes": len(CONTENT) + len(CONFIG), "bad": []}
        damage(file, 12345)
        mount.allowed_errors.append(FOUND)
        document = verified(mount, "m", "--mountpoint", str(mount.path), code=1)
        assert document["bad"] == [
            {
                "key": file.stem,
                "name": "m/weights.bin",
                "faults": ["block 0 does not match its checksum"],
                "dropped": BLOCK,
            }
        ]
        found = metrics(mount, "modelfs_bad_blocks_total", "modelfs_verified_bytes_total")
        assert found == [1, 2 * (len(CONTENT) + len(CONFIG))]
        origin.log.clear()
        assert read(mount) == CONTENT
        assert origin.contents() == [("GET", "weights.bin", f"bytes=0-{BLOCK - 1}")]


def test_a_bad_block_heals_under_a_reader_that_keeps_the_file_open(
    place: Path, transport: str, origin: Origin
) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place), transport=transport) as mount:
        file = fill(mount)
        with open(mount.path / "m" / "weights.bin", "rb") as reader:  # the kernel may read it by itself
            damage(file, 12345)
            mount.allowed_errors.append(FOUND)
            assert verified(mount, code=1)["objects"] == 2
            assert read(mount) == CONTENT

            def is_right() -> bool:
                mount.drop_pages()
                reader.seek(0)
                return reader.read() == CONTENT

            eventually(is_right)


def test_content_with_other_bytes_and_right_checksums_is_discarded(place: Path, origin: Origin) -> None:
    with mounted(place, sources={"m": origin.url}, env=alone(place)) as mount:
        file = fill(mount)
    # Somebody who knows the format exchanged the content.
    forge = (
        "import sys\n"
        "from pathlib import Path\n"
        "from modelfs.cache import Cache\n"
        "from modelfs.metrics import Metrics\n"
        "key, size = sys.argv[2], int(sys.argv[3])\n"
        "cache = Cache(Path(sys.argv[1]), metrics=Metrics())\n"
        "item = cache.object(key, size)\n"
        "item.punch([0])\n"
        "item.write(0, b'x' * (8 << 20))\n"
        "item.commit(0)\n"
        "item.close()\n"
        "cache.close()\n"
    )
    mount.python(forge, str(mount.cache), file.stem, str(len(CONTENT)))
    with mounted(place, sources={"m": origin.url}, env=alone(place)) as mount:
        mount.allowed_errors.append(FOUND)
        (bad,) = verified(mount, code=1)["bad"]
        assert bad["name"] == "m/weights.bin"
        assert bad["faults"] == [f"the content does not have its digest sha256:{file.stem[7:]}"]
        assert read(mount) == CONTENT


def test_an_unmounted_cache_is_verified_offline(place: Path, origin: Origin) -> None:
    sources, env = {"m": origin.url}, alone(place)
    with mounted(place, sources=sources, env=env) as mount:
        file = fill(mount)
        words = ("verify", "--cache-dir", str(mount.cache))
        refused = mount.cli(*words, check=False)
        assert refused.returncode == 5
        assert "in use by process" in refused.stderr
    assert modelfs(*words).stdout == f"verified {_size()} in 2 objects: all good\n"
    damage(file.with_suffix(".table"), 64)
    result = modelfs(*words, check=False)
    assert (result.returncode, result.stderr) == (1, "")
    first, second = result.stdout.splitlines()
    assert first.endswith(": 1 object bad, 8.0 MiB discarded, to be fetched again")
    assert second.startswith(f"{file.stem}: the block table is damaged: {BLOCK} bytes are lost")
    origin.log.clear()
    with mounted(place, sources=sources, env=env) as mount:
        assert read(mount) == CONTENT
        assert origin.contents() == [("GET", "weights.bin", f"bytes=0-{BLOCK - 1}")]
    nothing = modelfs("verify", "--cache-dir", str(place / "none"), check=False)
    assert (nothing.returncode, (place / "none").exists()) == (5, False)
    assert "is no cache" in nothing.stderr


def _size() -> str:
    return f"{(len(CONTENT) + len(CONFIG)) / 1024**2:.1f} MiB"


# -- a lock


def test_a_locked_mount_shows_what_is_locked_and_nothing_else(place: Path, origin: Origin) -> None:
    config = f'models: {{m: "{origin.url}"}}\n'
    (place / "modelfs.yaml").write_text(config)
    lock = place / "modelfs.lock"
    words = ("--config", str(place / "modelfs.yaml"), "--cache-dir", str(place / "cache"))
    assert modelfs("lock", *words).stdout == f"locked 1 model, 2 files: {lock}\n"
    origin.log.clear()
    with mounted(place, "--locked", config=config, env=alone(place), transport="kernel") as mount:
        assert read(mount) == CONTENT
        assert read(mount, "config.json") == CONFIG
        assert {path for _, path, _ in origin.contents()} == {"weights.bin"}  # the other was fetched before
        assert mount.status()["lock"] == str(lock)
        # The store has something else from now on.
        origin.files["config.json"] = b'{"hidden": 2}'
        mount.cli("refresh", str(mount.path))
        mount.drop_pages()
        assert read(mount, "config.json") == CONFIG
        origin.files["config.json"] = b"{}"
        mount.cli("refresh", str(mount.path))
        (model,) = mount.status()["models"]
        assert model["why"].startswith("config.json: expected 13 bytes, found 2 bytes: ")
        assert read(mount, "config.json") == CONFIG
    refused = mount.cli(*mount.words, f"--cache-dir={place}/other", check=False)
    assert refused.returncode == 6
    assert refused.stderr.startswith("modelfs: model m: config.json: expected 13 bytes, found 2 bytes: ")
    assert refused.stderr.count("\n") == 1


def test_bytes_are_compared_with_the_digest_of_the_lock(place: Path, origin: Origin) -> None:
    config = f'models: {{m: "{origin.url}"}}\n'
    (place / "modelfs.yaml").write_text(config)
    words = ("--config", str(place / "modelfs.yaml"), "--cache-dir", str(place / "cache"))
    modelfs("lock", *words)
    origin.files["config.json"] = CONFIG[::-1]  # of the same size, and without a published digest
    with mounted(
        place, "--locked", config=config, env=alone(place), cache=place / "other", transport="pyfuse3"
    ) as mount:
        mount.allowed_errors.append("do not have the published digest")
        with pytest.raises(OSError, match="Input/output error"):
            read(mount, "config.json")
        assert read(mount) == CONTENT
