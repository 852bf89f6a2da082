"""docs/semantics.md, promise by promise: each test has the name the page gives."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.mount.harness import Mounted, mounted
from tests.origin import Origin

BLOCK = 8 * 1024 * 1024
PAGE = Path(__file__).parents[2] / "docs" / "semantics.md"


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def errno_of(mount: Mounted, code: str, *args: str) -> str:
    """Run `code` in a reader; return the name of the errno it failed with, or what it printed."""
    wrapped = (
        "import errno, os, sys\ntry:\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "except OSError as e:\n    print(errno.errorcode[e.errno])\n"
    )
    return mount.python(wrapped, *args).strip()


@pytest.fixture
def tree(place: Path) -> Path:
    """A model in a directory: small files, a file of several blocks, an empty file and directory."""
    root = place / "origin"
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "empty-directory").mkdir()
    (root / "config.json").write_text('{"a": 1}')
    (root / "empty").write_bytes(b"")
    (root / "sub" / "deep" / "ünïcode.txt").write_text("x")
    (root / "weights.dat").write_bytes(noise(2 * BLOCK + 12345))
    for path in root.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return root


@pytest.fixture
def mount(place: Path, tree: Path, transport: str) -> Iterator[Mounted]:
    with mounted(place, "--allow-other", sources={"m": f"file://{tree}"}, transport=transport) as own:
        yield own


def test_every_promise_has_its_test() -> None:
    promised = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert promised == {name for name in globals() if name.startswith("test_")} - {
        "test_every_promise_has_its_test"
    }


# -- bytes ---------------------------------------------------------------------------------------------


def test_a_file_has_the_bytes_of_its_store(mount: Mounted, tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file():
            shown = mount.path / "m" / path.relative_to(tree)
            out = mount.run("sha256sum", str(shown)).stdout.split()[0].lstrip("\\")
            assert out == sha256(path.read_bytes()), path


def test_a_reader_is_served_before_the_file_is_complete(place: Path, transport: str) -> None:
    data = noise(3 * BLOCK)
    with Origin({"big.dat": data}) as origin:
        origin.held["big.dat"] = (1024 * 1024, threading.Event())
        with mounted(place, sources={"m": origin.url}, transport=transport) as mount:
            code = (
                "import sys; f=open(sys.argv[1],'rb',0); sys.stdout.buffer.write(f.read(4096).hex().encode())"
            )
            assert mount.python(code, str(mount.path / "m" / "big.dat")) == data[:4096].hex()
            origin.held["big.dat"][1].set()


def test_bytes_with_a_wrong_digest_are_an_error(place: Path, transport: str) -> None:
    small, big = noise(1000), noise(2 * BLOCK + 5)
    with Origin({"small.json": small, "big.safetensors": big, "good.bin": small}) as origin:
        origin.digests = {
            "small.json": sha256(b"another"),
            "big.safetensors": sha256(b"another"),
            "good.bin": sha256(small),
        }
        with mounted(place, sources={"m": origin.url}, transport=transport) as mount:
            mount.allowed_errors.append("do not have the published digest")
            model = mount.path / "m"
            read = "print(len(open(sys.argv[1], 'rb').read()))"
            assert errno_of(mount, read, str(model / "small.json")) == "EIO"
            assert errno_of(mount, read, str(model / "big.safetensors")) == "EIO"
            assert errno_of(mount, read, str(model / "good.bin")) == "1000"
            # What was cached of it is gone; once the store is right again, so are reads.
            origin.digests["small.json"] = sha256(small)
            origin.digests["big.safetensors"] = sha256(big)
            assert mount.status()["reads"]["errors"].get("Corrupt", 0) >= 2
            mount.cli("refresh", str(mount.path))
            assert errno_of(mount, read, str(model / "small.json")) == str(len(small))
            assert errno_of(mount, read, str(model / "big.safetensors")) == str(len(big))


def test_bytes_that_are_gone_are_estale(place: Path, transport: str) -> None:
    old, new = noise(3 * BLOCK, 1), noise(3 * BLOCK, 2)
    with (
        Origin({"w.dat": old}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        reader = subprocess.Popen(
            [
                sys.executable,
                "-c",
                "import os,sys,errno\n"
                "fd=os.open(sys.argv[1],os.O_RDONLY)\n"
                "print(os.pread(fd,4096,0).hex(),flush=True)\n"
                "sys.stdin.readline()\n"
                "try: print(os.pread(fd,4096,17000000).hex(),flush=True)\n"
                "except OSError as e: print(errno.errorcode[e.errno],flush=True)\n",
                str(mount.path / "m" / "w.dat"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert reader.stdin is not None
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == old[:4096].hex()
        origin.files["w.dat"] = new
        out, _ = reader.communicate("go\n", timeout=60)
        assert out.strip() == "ESTALE"


def test_a_read_fails_after_its_deadline(place: Path, transport: str) -> None:
    with Origin({"w.dat": noise(1000)}) as origin:
        origin.silent.set()
        env = {"MODELFS_READ_DEADLINE": "2s"}
        with mounted(place, sources={"m": origin.url}, env=env, transport=transport) as mount:
            result = errno_of(mount, "open(sys.argv[1], 'rb').read()", str(mount.path / "m" / "w.dat"))
            assert result == "EIO"
            origin.silence_over.set()


def test_cached_bytes_need_no_store(place: Path, transport: str) -> None:
    data = noise(2 * BLOCK + 7)
    digest = sha256(data)
    with Origin({"w.bin": data, "config.json": b"{}"}) as origin:
        with mounted(place, sources={"m": origin.url}, transport=transport) as mount:
            for name in ("w.bin", "config.json"):
                mount.run("sha256sum", str(mount.path / "m" / name))
            before = len(origin.contents())
            mount.drop_pages()
            assert mount.run("sha256sum", str(mount.path / "m" / "w.bin")).stdout.split()[0] == digest
            assert len(origin.contents()) == before
            mount.umount()
        url = origin.url
    with mounted(place, sources={"m": url}, transport=transport) as mount:
        mount.drop_pages()
        assert mount.run("sha256sum", str(mount.path / "m" / "w.bin")).stdout.split()[0] == digest
        assert mount.run("cat", str(mount.path / "m" / "config.json")).stdout == "{}"
        model = mount.status()["models"][0]
        assert model["offline"] is True
        assert mount.requests() == 0


def test_mmap_and_direct_reads_see_the_same_bytes(mount: Mounted, tree: Path) -> None:
    code = """
import hashlib, mmap, os, sys
path = sys.argv[1]
size = os.path.getsize(path)
fd = os.open(path, os.O_RDONLY)
for flags, prot in ((mmap.MAP_SHARED, mmap.PROT_READ), (mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)):
    with mmap.mmap(fd, size, flags, prot) as mapped:
        print(hashlib.sha256(mapped).hexdigest())
direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
buffer = mmap.mmap(-1, 1 << 20)
hasher, offset = hashlib.sha256(), 0
while got := os.preadv(direct, [buffer], offset):
    hasher.update(memoryview(buffer)[:got])
    offset += got
print(hasher.hexdigest())
"""
    wanted = sha256((tree / "weights.dat").read_bytes())
    assert mount.python(code, str(mount.path / "m" / "weights.dat")).split() == [wanted] * 3


def test_eviction_does_not_harm_open_files(place: Path, transport: str) -> None:
    files = {f"{n}.dat": noise(BLOCK + n, n) for n in range(6)}
    with (
        Origin(files) as origin,
        mounted(place, "--cache-size", "20MiB", sources={"m": origin.url}, transport=transport) as mount,
    ):
        code = """
import hashlib, os, sys
paths = sys.argv[1:]
fds = [os.open(path, os.O_RDONLY) for path in paths]
for _ in range(2):
    for fd in fds:
        size, offset, hasher = os.fstat(fd).st_size, 0, hashlib.sha256()
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        while data := os.pread(fd, 1 << 20, offset):
            hasher.update(data)
            offset += len(data)
        print(hasher.hexdigest())
"""
        out = mount.python(code, *(str(mount.path / "m" / name) for name in files)).split()
        assert out == [sha256(data) for data in files.values()] * 2
        assert mount.status()["cache"]["used"] <= 20 * 1024 * 1024


# -- versions ------------------------------------------------------------------------------------------


def test_an_open_file_keeps_its_version(place: Path, transport: str) -> None:
    old, new = noise(5000, 1), noise(5000, 2)
    with (
        Origin({"w.dat": old}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        path = mount.path / "m" / "w.dat"
        code = (
            "import os,sys\nfd=os.open(sys.argv[1],os.O_RDONLY)\n"
            "print(os.pread(fd,9999,0).hex(),flush=True)\n"
            "sys.stdin.readline()\nos.posix_fadvise(fd,0,0,os.POSIX_FADV_DONTNEED)\n"
            "print(os.pread(fd,9999,0).hex())\nprint(open(sys.argv[1],'rb').read().hex())"
        )
        reader = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert reader.stdout is not None
        assert reader.stdout.readline().strip() == old.hex()
        origin.files["w.dat"] = new
        mount.cli("refresh", str(mount.path))
        out, _ = reader.communicate("go\n", timeout=60)
        assert out.split() == [old.hex(), new.hex()]


def test_new_opens_see_the_refreshed_version(place: Path, transport: str) -> None:
    with (
        Origin({"a.json": b"1", "b.json": b"1", "gone.json": b"1"}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        model = mount.path / "m"
        names = (
            "import os,sys; d=sys.argv[1]; print({n: open(d+'/'+n).read() for n in sorted(os.listdir(d))})"
        )
        assert mount.python(names, str(model)).strip() == "{'a.json': '1', 'b.json': '1', 'gone.json': '1'}"
        assert errno_of(mount, "os.stat(sys.argv[1])", str(model / "new.json")) == "ENOENT"
        origin.files = {"a.json": b"22", "b.json": b"22", "new.json": b"22"}
        mount.cli("refresh", str(mount.path))
        assert mount.python(names, str(model)).strip() == "{'a.json': '22', 'b.json': '22', 'new.json': '22'}"
        assert errno_of(mount, "os.stat(sys.argv[1])", str(model / "gone.json")) == "ENOENT"


def test_directories_have_the_times_and_links_of_what_is_shown(place: Path, transport: str) -> None:
    with (
        Origin({"sub/a.json": b"1"}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        for name in ("", "sub"):
            path = str(mount.path / "m" / name)
            code = "import os,sys; os.chdir(sys.argv[1]); print(*os.stat('.')[3:9:5], len(os.listdir()))"
            links, _, names = map(int, mount.python(code, path).split())
            origin.files = {**origin.files, os.path.join(name, "new/b.json"): b"2"}
            mount.cli("refresh", str(mount.path))
            assert list(map(int, mount.python(code, path).split())) == [links + 1, 0, names + 1]


def test_a_new_version_is_a_new_inode(place: Path, transport: str) -> None:
    with (
        Origin({"w.dat": b"1", "sub/same.dat": b"1"}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        code = "import os,sys; print([os.stat(p).st_ino for p in sys.argv[1:]])"
        paths = [str(mount.path / "m" / name) for name in ("w.dat", "sub/same.dat", "sub", "")]
        before = json.loads(mount.python(code, *paths))
        origin.files["w.dat"] = b"2"
        mount.cli("refresh", str(mount.path))
        after = json.loads(mount.python(code, *paths))
        assert before[0] != after[0]
        assert before[1:] == after[1:]


def test_sizes_and_times_are_stable(mount: Mounted, tree: Path) -> None:
    code = "import os,sys; s=os.stat(sys.argv[1]); print(s.st_size, s.st_mtime_ns, s.st_ino)"
    shown = mount.path / "m" / "weights.dat"
    first = mount.python(code, str(shown))
    assert first.split()[:2] == [str(2 * BLOCK + 12345), "1600000000000000000"]
    mount.run("sha256sum", str(shown))
    assert mount.python(code, str(shown)) == first


# -- names ---------------------------------------------------------------------------------------------


def test_a_missing_name_costs_no_request(place: Path, transport: str) -> None:
    with (
        Origin({"config.json": b"{}", "sub/x": b""}) as origin,
        mounted(place, "--refresh", "0", sources={"m": origin.url}, transport=transport) as mount,
    ):
        before = len(origin.log)
        code = (
            "import os,sys\nfor n in range(200): assert not os.path.exists(f'{sys.argv[1]}/{n}/adapter.json')"
        )
        mount.python(code, str(mount.path / "m"))
        mount.python(code, str(mount.path / "m" / "sub"))
        mount.python(code, str(mount.path))
        assert len(origin.log) == before


def test_the_tree_is_read_only(mount: Mounted) -> None:
    file, directory = str(mount.path / "m" / "config.json"), str(mount.path / "m")
    attempts = {
        "os.open(sys.argv[1], os.O_WRONLY)": "EROFS",
        "os.open(sys.argv[1], os.O_RDWR)": "EROFS",
        "os.open(sys.argv[1], os.O_RDONLY | os.O_TRUNC)": "EROFS",
        "os.open(sys.argv[2] + '/new', os.O_CREAT | os.O_WRONLY)": "EROFS",
        "os.truncate(sys.argv[1], 0)": "EROFS",
        "os.unlink(sys.argv[1])": "EROFS",
        "os.rename(sys.argv[1], sys.argv[1] + 'x')": "EROFS",
        "os.mkdir(sys.argv[2] + '/new')": "EROFS",
        "os.rmdir(sys.argv[2] + '/sub')": "EROFS",
        "os.symlink('x', sys.argv[2] + '/new')": "EROFS",
        "os.link(sys.argv[1], sys.argv[2] + '/new')": "EROFS",
        "os.chmod(sys.argv[1], 0o777)": "EROFS",
        "os.chown(sys.argv[1], 1, 1)": "EROFS",
        "os.utime(sys.argv[1])": "EROFS",
        "os.setxattr(sys.argv[1], 'user.x', b'1')": "EROFS",
    }
    assert {code: errno_of(mount, code, file, directory) for code in attempts} == attempts


def test_hostile_names_are_not_shown(place: Path, transport: str) -> None:
    hostile = ["../escape", "/etc/passwd", "a/../../b", "new\nline", "nul\0", "a//b", "x" * 300]
    with (
        Origin({"good.json": b"{}", **dict.fromkeys(hostile, b"bad")}) as origin,
        mounted(place, sources={"m": origin.url}, transport=transport) as mount,
    ):
        code = "import os,sys; print([n for _, d, f in os.walk(sys.argv[1]) for n in d + f])"
        assert mount.python(code, str(mount.path / "m")).strip() == "['good.json']"
        assert mount.status()["models"][0]["rejected"] == len(hostile)


def test_other_users_may_read(mount: Mounted, tree: Path) -> None:
    path = str(mount.path / "m" / "weights.dat")
    assert mount.run("sha256sum", path, user="nobody").stdout.split()[0] == sha256(
        (tree / "weights.dat").read_bytes()
    )
    listing = mount.run("ls", str(mount.path / "m"), user="nobody").stdout.split()
    assert listing == ["config.json", "empty", "empty-directory", "sub", "weights.dat"]


def test_the_root_says_what_is_mounted(mount: Mounted, tree: Path) -> None:
    document = yaml.safe_load(mount.run("cat", str(mount.path / "model-metadata.yaml")).stdout)
    model = document["models"]["m"]
    assert model["source"] == f"file://{tree}"
    assert model["revision"] == mount.status()["models"][0]["revision"]
    assert model["size"] == sum(p.stat().st_size for p in tree.rglob("*") if p.is_file())
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", model["digest"])


def test_extended_attributes_say_where_a_file_comes_from(place: Path, transport: str) -> None:
    data = noise(5000)
    with Origin({"w.bin": data}) as origin:
        origin.digests["w.bin"] = sha256(data)
        with mounted(place, sources={"m": origin.url}, transport=transport) as mount:
            path = str(mount.path / "m" / "w.bin")
            mount.run("sha256sum", path)
            code = (
                "import os,sys; p=sys.argv[1]; print({n: os.getxattr(p,n).decode() for n in os.listxattr(p)})"
            )
            found = eval(mount.python(code, path))
            assert found["user.modelfs.source"] == origin.url
            assert found["user.modelfs.sha256"] == sha256(data)
            assert found["user.modelfs.cached_bytes"] == "5000"
            assert found["user.modelfs.version"]
            assert (
                errno_of(mount, "os.getxattr(sys.argv[1], 'user.other')", path)
                == errno.errorcode[errno.ENODATA]
            )


def test_statfs_counts_the_models(mount: Mounted, tree: Path) -> None:
    code = "import os,sys; s=os.statvfs(sys.argv[1]); print(s.f_frsize * s.f_blocks, s.f_bavail, s.f_files)"
    size, available, files = map(int, mount.python(code, str(mount.path)).split())
    total = sum(p.stat().st_size for p in tree.rglob("*") if p.is_file())
    assert total <= size < total + 4096
    assert available == 0
    assert files >= 4
