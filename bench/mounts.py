"""How fast is a mount? modelfs beside rclone mount and s3fs, the local file and the raw download, in one run.

An S3 origin on this machine serves a large file, a BERT and directories of small files. Every contender
does the same work in turn, round by round, so that a machine that is busy for a while disturbs all of
them alike; what is reported are medians. ``docs/performance.md`` says how to read the tables.

Before each cold measurement a file of the same size is written and deleted, and the disk is let come to
rest: memory that the machine has not used for a while is slow when it is first touched, and who comes first
should not pay for all.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.candidates import Job
from bench.contenders import CONTENDERS, missing, mounted
from bench.models import MIB
from bench.report import (
    FIGURES,
    GIB,
    LOCAL,
    RAWS,
    Samples,
    Verdict,
    full_table,
    medians,
    plot,
    targets_table,
    verdicts,
)
from bench.s3_origin import FIRST_BYTE, RATE, Origin, s3_origin

OUT = Path(__file__).parent / "out"
PUBLISHED = Path(__file__).parents[1] / "docs" / "performance"

BUCKET = "models"
SHARED = 8
"""Processes that share a descriptor."""
RANDOM = {"4 KiB": (4096, 4000), "1 MiB": (MIB, 200)}
"""Random reads: their length and number."""
MISS_SECONDS = 5.0
"""The longest that a contender is asked for missing names."""
SLOW_SECONDS = 60.0
"""A contender that needs longer for a group of works does it in no further round."""
WORK_SECONDS = 120.0
"""The longest that one work may take."""

ALL = (LOCAL, *RAWS, *CONTENDERS)
CONNECTIONS = dict(zip(RAWS, (8, 16), strict=True))


Work = Callable[..., list[float]]
"""Does what is named by the first argument to the path that is the second one."""


@dataclass(slots=True)
class Run:
    """One run: where things are, and what was measured so far."""

    origin: Origin
    work: Work
    bucket: Path
    disk: Path
    counts: list[int]
    names: int
    samples: Samples = field(default_factory=dict)
    checksums: dict[str, float] = field(default_factory=dict)

    @property
    def big(self) -> Path:
        """The large file, as it lies on the disk."""
        return self.bucket / "big" / "model.safetensors"

    def add(self, figure: str, contender: str, *values: float) -> None:
        """Take values of a figure, in its base unit."""
        assert figure in FIGURES
        self.samples.setdefault((figure, contender), []).extend(values)


def main() -> None:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if os.geteuid() != 0:
        sys.exit("python -m bench.mounts needs root: mounts of the kernel transport do")
    contenders = [name for name in options.contenders if not _absent(name)]
    counts = [10_000] if options.quick else [10_000, 100_000]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        root = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="modelfs-bench-", dir=options.dir))
        )
        root.chmod(0o755)
        bucket, disk = root / "origin" / BUCKET, root / "disk"
        disk.mkdir()
        _say("making the models")
        layers = "1" if options.quick else "12"
        sizes = [str(options.size * MIB), layers, *map(str, counts)]
        subprocess.run([sys.executable, "-m", "bench.models", str(bucket), *sizes], check=True)
        origin = stack.enter_context(s3_origin(root / "origin"))
        work = stack.enter_context(_workers())
        run = Run(origin, work, bucket, disk, counts, names=10_000 if options.quick else 100_000)
        run.checksums["source"] = run.work("checksum", run.big)[0]
        failures = _rounds(run, contenders, options.only, options.rounds)
    found = medians(run.samples)
    held = verdicts(found)
    minutes = (time.monotonic() - started) / 60
    report = {
        "setting": _setting(options, minutes),
        "targets": [asdict(each) for each in held],
        "medians": _nested(found),
        "samples": _nested(run.samples),
        "failures": failures,
    }
    tables = f"{targets_table(held)}\n\n{full_table(found, contenders)}\n"
    OUT.mkdir(exist_ok=True)
    written = [OUT / "mounts.json", OUT / "mounts.md"]
    written[0].write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    written[1].write_text(tables)
    written += plot(found, contenders, OUT)
    print(tables)
    for failure in failures:
        print(f"failed: {failure}")
    print(f"{_summary(held)} in {minutes:.0f} minutes; tables, plots and all samples: {OUT}")
    if options.publish:
        PUBLISHED.mkdir(exist_ok=True)
        for path in written:
            shutil.copy(path, PUBLISHED)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.mounts",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", type=int, metavar="MIB", help="size of the large file (1024, quick: 64)")
    parser.add_argument("--rounds", type=int, metavar="N", help="times each does everything (3, quick: 1)")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: does it all work?")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--contenders", nargs="+", choices=ALL, default=list(ALL), metavar="NAME")
    parser.add_argument("--dir", metavar="DIR", default=tempfile.gettempdir(), help="the disk to work on")
    parser.add_argument("--publish", action="store_true", help="copy tables and plots to docs/performance")
    options = parser.parse_args()
    options.size = options.size or (64 if options.quick else 1024)
    options.rounds = options.rounds or (1 if options.quick else 3)
    return options


def _rounds(run: Run, contenders: list[str], groups: Iterable[str], rounds: int) -> list[str]:
    """Let every contender do every group of works, round by round; return what failed."""
    failures = []
    given_up = set()
    for group in groups:
        works, able = GROUPS[group]
        for number in range(rounds):
            # Not always in the same order: who follows whom should not matter.
            for name in contenders[number % len(contenders) :] + contenders[: number % len(contenders)]:
                if name not in able or (group, name) in given_up:
                    continue
                _say(f"round {number + 1} of {rounds}: {group}: {name}")
                started = time.monotonic()
                try:
                    works(run, name)
                except (RuntimeError, OSError, subprocess.SubprocessError) as error:
                    failures.append(f"{group}: {name}: {error}")
                    _say(failures[-1])
                    given_up.add((group, name))
                if time.monotonic() - started > SLOW_SECONDS:
                    given_up.add((group, name))
    return failures


def read_plain(run: Run, name: str) -> None:
    """Cold read, then all that is read warm."""
    size = run.big.stat().st_size
    if name in RAWS:
        _touch_memory(run.disk, size)
        run.add(
            "cold sequential read", name, size / _download(run, name, run.origin.plain, run.big, run.disk)
        )
    elif name == LOCAL:
        _warm(run, name, run.big, lambda: 0.0)
    else:
        with mounted(name, run.origin.plain, BUCKET, "big", run.disk) as mount:
            path = mount.path / run.big.name
            _touch_memory(run.disk, size)
            before = mount.cpu()
            (seconds,) = run.work("read", path)
            run.add("cold sequential read", name, size / seconds)
            run.add("CPU of the daemon, cold read", name, (mount.cpu() - before) / (size / GIB))
            _verify(run, name, path)
            _warm(run, name, path, mount.cpu)
            run.add("peak RSS of the daemon", name, mount.peak_rss())


def _warm(run: Run, name: str, path: Path, cpu: Callable[[], float]) -> None:
    """All that is read warm, from a mount or from the local file."""
    size = path.stat().st_size
    before = cpu()
    seconds = run.work("read_again", path)
    run.add("warm sequential read", name, *(size / each for each in seconds))
    if name != LOCAL:
        run.add("CPU of the daemon, warm read", name, (cpu() - before) / (len(seconds) * size / GIB))
    run.add("warm mmap load of safetensors", name, *(size / each for each in run.work("map_again", path)))
    for words, count in {"1 process": 1, "8 processes": SHARED}.items():
        shared = run.work("share_again", path, count)
        run.add(f"warm read, {words}", name, *(size / each for each in shared))
    for words, (length, count) in RANDOM.items():
        seconds = run.work("random_again", path, length, count)
        run.add(f"warm random reads of {words}", name, *(count / each for each in seconds))


def read_shaped(run: Run, name: str) -> None:
    """Cold read of what comes as if over a network."""
    size = run.big.stat().st_size
    if name in RAWS:
        _touch_memory(run.disk, size)
        seconds = _download(run, name, run.origin.shaped, run.big, run.disk)
    else:
        with mounted(name, run.origin.shaped, BUCKET, "big", run.disk) as mount:
            _touch_memory(run.disk, size)
            (seconds,) = run.work("read", mount.path / run.big.name)
            _verify(run, name, mount.path / run.big.name)
            run.add("peak RSS of the daemon", name, mount.peak_rss())
    run.add("cold sequential read, shaped", name, size / seconds)


def shared(run: Run, name: str) -> None:
    """Cold read by processes that share a descriptor."""
    size = run.big.stat().st_size
    with mounted(name, run.origin.plain, BUCKET, "big", run.disk) as mount:
        _touch_memory(run.disk, size)
        (seconds,) = run.work("share", mount.path / run.big.name, SHARED)
        run.add("cold read, 8 processes", name, size / seconds)
        run.add("peak RSS of the daemon", name, mount.peak_rss())


def load_plain(run: Run, name: str) -> None:
    """``from_pretrained``, cold and warm."""
    _load(run, name, run.origin.plain, "", warm=True)


def load_shaped(run: Run, name: str) -> None:
    """``from_pretrained`` of what comes as if over a network."""
    _load(run, name, run.origin.shaped, ", shaped", warm=False)


def _load(run: Run, name: str, endpoint: str, variant: str, *, warm: bool) -> None:
    source = run.bucket / "bert"
    with contextlib.ExitStack() as stack:
        if name == LOCAL:
            run.add("warm from_pretrained", name, run.work("load", source)[0])
            return
        _touch_memory(run.disk, sum(path.stat().st_size for path in source.iterdir()))
        download = 0.0
        if name in RAWS:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=run.disk)))
            for file in source.iterdir():
                download += _download(run, name, endpoint, file, path)
        else:
            mount = stack.enter_context(mounted(name, endpoint, BUCKET, "bert", run.disk))
            path = mount.path
        loaded, answered = run.work("load", path)
        run.add(f"cold from_pretrained{variant}", name, download + loaded)
        run.add(f"cold from_pretrained and first answer{variant}", name, download + answered)
        if name not in RAWS:
            run.add("peak RSS of the daemon", name, mount.peak_rss())
            if warm:
                run.work("checksum", path / "model.safetensors")
                run.add("warm from_pretrained", name, run.work("load", path)[0])


def names(run: Run, name: str) -> None:
    """Many files: mount, list, list again, ask for names that are not there."""
    for count in run.counts:
        prefix = f"files-{count}"
        if name == LOCAL:
            _names(run, name, run.bucket / prefix, count)
        else:
            with mounted(name, run.origin.plain, BUCKET, prefix, run.disk) as mount:
                run.add("mount", name, mount.seconds)
                _names(run, name, mount.path, count)
                run.add("peak RSS of the daemon", name, mount.peak_rss())


def _names(run: Run, name: str, directory: Path, count: int) -> None:
    for order in ("first", "second"):
        started = time.perf_counter()
        command = ["ls", "-lR", str(directory)]
        listed = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=WORK_SECONDS).stdout
        seconds = time.perf_counter() - started
        if (shown := listed.count(b".json\n")) != count:
            raise RuntimeError(f"ls shows {shown} of {count} files")
        run.add(f"{order} ls -lR of {count:,} files", name, seconds)
    before = run.origin.requests()
    seconds, done = run.work("miss", directory / "part-0000", run.names, MISS_SECONDS)
    run.add("open and stat of missing names", name, done / seconds)
    run.add("store requests for missing names", name, run.origin.requests() - before - 1)


GROUPS: dict[str, tuple[Callable[[Run, str], None], tuple[str, ...]]] = {
    "read": (read_plain, ALL),
    "read-shaped": (read_shaped, (*RAWS, *CONTENDERS)),
    "shared": (shared, tuple(CONTENDERS)),
    "load": (load_plain, ALL),
    "load-shaped": (load_shaped, (*RAWS, *CONTENDERS)),
    "names": (names, (LOCAL, *CONTENDERS)),
}
"""The groups of works, and who does them."""


@contextlib.contextmanager
def _workers() -> Iterator[Work]:
    """Start the process that forks one for each work of `bench.work`; end it with the context."""
    command = [sys.executable, "-m", "bench.work"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        asked, answers = process.stdin, process.stdout
        assert asked
        assert answers

        def work(name: str, path: Path, *arguments: float) -> list[float]:
            try:
                asked.write(json.dumps([name, WORK_SECONDS, str(path), *arguments]) + "\n")
                asked.flush()
                answer: list[float] | str = json.loads(answers.readline())
            except KeyboardInterrupt:
                os.killpg(process.pid, signal.SIGKILL)  # who reads a mount would keep it from ending
                raise
            if isinstance(answer, str):
                raise RuntimeError(f"{name}: {answer}")
            return answer

        yield work
        asked.close()


def _download(run: Run, name: str, endpoint: str, source: Path, into: Path) -> float:
    """Return the seconds that a bare HTTP client needs for a file."""
    size = source.stat().st_size
    job = Job(
        url=f"{endpoint}/{BUCKET}/{source.relative_to(run.bucket)}",
        ca="/dev/null",
        size=size,
        length=size,
        block=8 * MIB,
        connections=CONNECTIONS[name],
        destination=str(into / source.name),
    )
    command = [sys.executable, "-m", "bench.candidates", "pycurl", json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=WORK_SECONDS)
    if (into / source.name).stat().st_size != size:
        raise RuntimeError(f"{name} did not deliver all of {source.name}")
    return float(json.loads(done.stdout)["seconds"])


def _verify(run: Run, name: str, path: Path) -> None:
    """Read the large file once more; so it is also in the cache as a whole."""
    if run.work("checksum", path)[0] != run.checksums["source"]:
        raise RuntimeError(f"{name} delivered wrong bytes")


def _touch_memory(disk: Path, size: int) -> None:
    """Make the machine have `size` bytes of memory at hand, and a disk that is not busy with earlier ones."""
    noise = os.urandom(MIB)
    with tempfile.TemporaryFile(dir=disk) as file:
        for _ in range(-(-2 * size // MIB)):
            file.write(noise)
    os.sync()


def _absent(name: str) -> bool:
    """Say that a contender is left out, if it is not installed."""
    why = missing(name)
    if why:
        print(f"left out: {why}", file=sys.stderr)
    return why is not None


def _setting(options: argparse.Namespace, minutes: float) -> dict[str, object]:
    return {
        "size_mib": options.size,
        "rounds": options.rounds,
        "cpus": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "first_byte_seconds": FIRST_BYTE,
        "bytes_per_second_and_connection": RATE,
        "minutes": round(minutes, 1),
        "versions": dict(_versions()),
    }


def _versions() -> Iterator[tuple[str, str]]:
    for command in (["modelfs", "--version"], ["rclone", "version"], ["s3fs", "--version"], ["nginx", "-v"]):
        path = shutil.which(command[0], path=f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin")
        if path:
            done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False)
            yield command[0], (done.stdout or done.stderr).partition("\n")[0]


def _nested(flat: Mapping[tuple[str, str], object]) -> dict[str, dict[str, object]]:
    nested: dict[str, dict[str, object]] = {}
    for (figure, contender), value in flat.items():
        nested.setdefault(figure, {})[contender] = value
    return nested


def _summary(held: list[Verdict]) -> str:
    measured = [each for each in held if each.met is not None]
    return f"{sum(each.met is True for each in measured)} of {len(measured)} targets met"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
