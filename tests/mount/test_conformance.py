"""The parts of fsx, fio and xfstests that a read-only file system can have, on real mounts.

What a local file system answers is asked of one: a read-only bind mount of the same tree.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.actor import Actor
from tests.mount.harness import DEADLINE, Mounted, eventually, mounted, open_directory
from tests.origin import Origin

MIB = 1 << 20
BLOCK = 8 * MIB
FILES = {"one.dat": BLOCK, "odd.safetensors": 2 * BLOCK + 4097, "small.json": 5001, "empty": 0}
READERS = 2
"""Of each file, at the same time."""


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """A tree with what the tests of names ask for."""
    with open_directory() as parent:
        root = parent / "original"
        (root / "directory" / "sub").mkdir(parents=True)
        (root / "other").mkdir()
        (root / "crowd").mkdir()
        noise = random.Random(8)
        for name, size in FILES.items():
            (root / name).write_bytes(noise.randbytes(size))
        (root / "directory" / "file").write_text("x")
        (root / "directory" / ("n" * 255)).write_text("the longest name")
        (root / "to-directory").symlink_to("directory")
        for number in range(700):
            (root / "crowd" / f"{number:04}").touch()
        yield root


@pytest.fixture(scope="module")
def mount(original: Path, patterned: Path, transport: str) -> Iterator[Mounted]:
    """A mount with nothing in its cache when the first test begins."""
    with open_directory() as place:
        sources = {"m": original.as_uri(), "patterned": patterned.as_uri()}
        with mounted(place, sources=sources, transport=transport) as own:
            yield own


@pytest.fixture(scope="module")
def local(original: Path) -> Iterator[Path]:
    """The tree on the local file system, mounted read-only."""
    with open_directory() as place:
        words = ["mount", "--bind", "-o", "ro", str(original), str(place)]
        subprocess.run(words, check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", str(place)], check=True)


# -- fsx: random reads in every way there is --------------------------------------------------------------


def test_random_reads_in_every_way_by_several_processes(mount: Mounted, original: Path) -> None:
    names = [name for name in FILES if name != "empty"]
    words = {
        name: [sys.executable, "-m", "tests.mount.fsx", str(mount.path / "m" / name), str(original / name)]
        for name in names
    }
    readers = [
        subprocess.Popen(
            [*words[name], str(seed), "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for seed in range(READERS)
        for name in names
    ]
    found = [reader.communicate(timeout=DEADLINE) for reader in readers]
    assert found == [("60\n", "")] * len(readers)


def test_direct_reads_that_are_not_aligned(mount: Mounted, original: Path) -> None:
    """As on a disk: the right bytes, or ``EINVAL``; never others."""
    code = (
        "import mmap, os, sys\n"
        "fds = [os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), os.open(sys.argv[2], os.O_RDONLY)]\n"
        "room = mmap.mmap(-1, 1 << 20)\n"
        "spans = [(1, 0, 4096), (0, 1, 4096), (0, 0, 511), (4096, 512, 512), (511, 3, 77)]\n"
        "for offset, skip, length in spans:\n"
        "    view = memoryview(room)[skip:skip + length]\n"
        "    try: got = os.preadv(fds[0], [view], offset)\n"
        "    except OSError as error: assert error.errno == 22, error\n"
        "    else: assert view[:got] == os.pread(fds[1], length, offset) and got == length\n"
    )
    for name in ("one.dat", "odd.safetensors", "small.json"):
        mount.python(code, str(mount.path / "m" / name), str(original / name))


# -- fio: patterns that were written into the files beforehand ---------------------------------------------

_NO_RINGS = Path("/proc/sys/kernel/io_uring_disabled")
RINGS = not _NO_RINGS.exists() or _NO_RINGS.read_text().strip() == "0"
ENGINES = (
    *(("psync", 0), ("psync", 1), ("pvsync2", 0), ("mmap", 0), ("libaio", 0), ("libaio", 1)),
    *((("io_uring", 0), ("io_uring", 1)) if RINGS else ()),
)
"""fio's I/O engines, and whether they read with O_DIRECT."""


def fio(*words: str) -> subprocess.CompletedProcess[str]:
    block = ["--bs=64k", "--size=12m", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
    return subprocess.run(
        ["fio", *block, *words], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


@pytest.fixture(scope="module")
def patterned() -> Iterator[Path]:
    """A model of files that fio wrote, one for each way to read: every 64 KiB have a checksum."""
    with open_directory() as root:
        first = root / "job.dat"
        written = fio("--name=job", f"--filename={first}", "--rw=write", "--do_verify=0", "--ioengine=psync")
        assert written.returncode == 0, written.stderr
        for engine, direct in ENGINES:
            shutil.copy(first, root / f"{engine}-{direct}.dat")
        yield root


def test_fio_verifies_what_it_wrote_by_all_engines_at_once(mount: Mounted) -> None:
    jobs = [
        word
        for engine, direct in ENGINES
        for word in (
            *(f"--name={engine}-{direct}", f"--filename={mount.path}/patterned/{engine}-{direct}.dat"),
            *(f"--ioengine={engine}", f"--direct={direct}"),
        )
    ]
    found = fio("--rw=randread", "--iodepth=8", "--readonly", *jobs)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("err= 0") == len(ENGINES)


def test_fio_notices_a_wrong_byte(place: Path, patterned: Path) -> None:
    shutil.copy(patterned / "job.dat", place / "fio.dat")
    with (place / "fio.dat").open("r+b") as file:
        file.seek(5 * MIB + 5000)  # behind the header of a block
        file.write(b"wrong")
    found = fio(
        "--name=job", f"--filename={place}/fio.dat", "--ioengine=psync", "--rw=randread", "--readonly"
    )
    assert found.returncode
    assert "verify failed" in found.stdout + found.stderr


# -- xfstests: what cannot be, side by side with a local file system ----------------------------------------

DIFFERENT: dict[str, tuple[str, str]] = {}
"""Call → what the local file system answers, and what we answer instead."""


def test_calls_answer_as_on_a_read_only_disk(mount: Mounted, local: Path) -> None:
    def answers(root: Path) -> dict[str, str]:
        printed = mount.run(sys.executable, "-m", "tests.mount.calls", str(root)).stdout
        return dict(line.split(": ", 1) for line in printed.splitlines())

    expected, found = answers(local), answers(mount.path / "m")
    assert len(expected) > 90
    different = {call: (answer, found[call]) for call, answer in expected.items() if found[call] != answer}
    assert different == DIFFERENT


@pytest.mark.parametrize("room", [64, 500, 32768])
def test_positions_in_a_directory_lead_back(mount: Mounted, room: int) -> None:
    with Actor() as actor:
        names = actor.do("pieces", str(mount.path / "m" / "crowd"), room, [0, 1, 350, 698, 699])
    assert names == [f"{number:04}" for number in range(700)]


def test_telldir_and_seekdir_of_libc(mount: Mounted) -> None:
    code = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
libc.opendir.restype = libc.readdir64.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
for function in (libc.readdir64, libc.telldir, libc.rewinddir, libc.closedir):
    function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
directory = libc.opendir(os.fsencode(sys.argv[1]))
def name():
    entry = libc.readdir64(directory)
    return entry and ctypes.string_at(entry + 19).decode()
places, names = [libc.telldir(directory)], []
while (found := name()) is not None and found:
    names.append(found); places.append(libc.telldir(directory))
for index in (699, 0, 350, 3, 698):
    libc.seekdir(directory, places[index])
    assert name() == names[index], index
libc.rewinddir(directory)
assert name() == names[0]
libc.closedir(directory)
print(len(names))
"""
    assert mount.python(code, str(mount.path / "m" / "crowd")).strip() == "700"


# -- readers that are killed -------------------------------------------------------------------------------

KILLED = {
    "buffered": "os.pread(os.open(sys.argv[1], os.O_RDONLY), 4096, 0)",
    "direct": "os.preadv(os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), [mmap.mmap(-1, 4096)], 0)",
    "mapped": "mmap.mmap(os.open(sys.argv[1], os.O_RDONLY), 0, prot=mmap.PROT_READ)[0]",
}


def test_readers_that_are_killed_while_the_store_hangs_end(place: Path, transport: str) -> None:
    """At once; with pyfuse3, which is told of no signal, a direct read ends at ``read_deadline``."""
    with Origin({f"{way}.dat": bytes(2 * BLOCK) for way in KILLED}) as origin:
        origin.silent.set()
        env = {"MODELFS_READ_DEADLINE": "3s"}
        with mounted(place, sources={"m": origin.url}, env=env, transport=transport) as mount:
            words = {
                way: (f"import mmap, os, sys\n{code}", str(mount.path / "m" / f"{way}.dat"))
                for way, code in KILLED.items()
            }
            readers = [subprocess.Popen([sys.executable, "-c", *each]) for each in words.values()]
            eventually(lambda: len({path for _, path, _ in origin.contents()}) == len(KILLED))
            for reader in readers:
                reader.send_signal(signal.SIGKILL)
            assert [reader.wait(30) for reader in readers] == [-signal.SIGKILL] * len(KILLED)
            origin.silent.clear()
            origin.silence_over.set()
            for code, path in words.values():
                assert mount.python(code + "\nprint('read')", path) == "read\n"
