"""Which HTTP client shall move the bytes? Throughput, CPU and memory of each candidate, measured in one run.

Every candidate fetches the same file from the same nginx on loopback, each time in a process of its own. The
rounds are interleaved, so that a machine that is busy for a while disturbs all of them alike; the table
holds medians. ``docs/data-plane.md`` says what followed from it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import crc32c

from bench.candidates import CANDIDATES, Job, Result
from bench.origin import origin

GIB = 1 << 30
MIB = 1 << 20


def main() -> None:
    options = _options()
    size = options.size * MIB
    names = options.only or list(CANDIDATES)
    results: dict[tuple[str, str], list[Result]] = {}
    with tempfile.TemporaryDirectory(prefix="modelfs-bench-", dir=options.dir or _scratch(size)) as scratch:
        root = Path(scratch)
        root.chmod(0o755)
        expected = _make_source(root / "source", size)
        with origin(root) as server:
            for _ in range(options.rounds):
                for scheme, base in (("http", server.http), ("https", server.https)):
                    for name in names:
                        job = Job(
                            url=f"{base}/source",
                            ca=str(server.ca),
                            size=size,
                            length=size,
                            block=options.block * MIB,
                            connections=options.connections,
                            destination=str(root / "destination"),
                        )
                        result = _measure(name, job)
                        if _checksum(root / "destination") != expected:
                            raise SystemExit(f"{name} over {scheme} delivered wrong bytes")
                        results.setdefault((scheme, name), []).append(result)
                        print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = [_row(scheme, name, rounds, size) for (scheme, name), rounds in results.items()]
    print(_table(rows))
    print(_conclusion(rows))
    if options.json:
        setting = {k: v for k, v in vars(options).items() if k not in ("json", "dir", "only")}
        report = {"setting": setting | {"cpus": os.cpu_count()}, "medians": rows}
        report["rounds"] = [
            {"scheme": scheme, "client": name} | asdict(result)
            for (scheme, name), rounds in results.items()
            for result in rounds
        ]
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.range_client",
        description=(__doc__ or "").partition("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="size of the file")
    parser.add_argument("--block", type=int, default=8, metavar="MIB", help="size of one range")
    parser.add_argument("--connections", type=int, default=8, metavar="N", help="ranges in flight at once")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="times each candidate runs")
    parser.add_argument("--only", nargs="+", choices=list(CANDIDATES), metavar="NAME", help="some candidates")
    parser.add_argument(
        "--dir",
        metavar="DIR",
        help="where both files live; /dev/shm if there is room, for disks are not compared",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round to this file")
    return parser.parse_args()


def _scratch(size: int) -> str:
    shm = "/dev/shm"
    roomy = os.access(shm, os.W_OK) and shutil.disk_usage(shm).free > 2.5 * size
    return shm if roomy else tempfile.gettempdir()


def _make_source(path: Path, size: int) -> int:
    """Write `size` incompressible bytes, no two MiB alike, and return their CRC-32C."""
    noise = os.urandom(MIB)
    with path.open("wb") as file:
        for index in range(size // MIB):
            file.write(index.to_bytes(8, "little") + noise[8:])
    path.chmod(0o644)
    return _checksum(path)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while data := file.read(8 * MIB):
            value = crc32c.crc32c(data, value)
    return value


def _measure(name: str, job: Job) -> Result:
    command = [sys.executable, "-m", "bench.candidates", name, json.dumps(asdict(job))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300)
    return Result(**json.loads(done.stdout))


def _row(scheme: str, name: str, rounds: list[Result], size: int) -> dict[str, str | float]:
    return {
        "scheme": scheme,
        "client": name,
        "gib_per_second": size / GIB / statistics.median(r.seconds for r in rounds),
        "cpu_seconds_per_gib": statistics.median(r.cpu for r in rounds) / (size / GIB),
        "peak_rss_mib": statistics.median(r.rss for r in rounds) / MIB,
    }


def _table(rows: list[dict[str, str | float]]) -> str:
    lines = [
        "| | client | throughput, GiB/s | CPU, s per GiB | peak RSS, MiB |",
        "|---|---|---:|---:|---:|",
    ]
    lines += [
        f"| {r['scheme']} | {r['client']} | {r['gib_per_second']:.2f} "
        f"| {r['cpu_seconds_per_gib']:.2f} | {r['peak_rss_mib']:.0f} |"
        for r in sorted(rows, key=lambda r: (r["scheme"], r["cpu_seconds_per_gib"]))
    ]
    return "\n".join(lines)


def _conclusion(rows: list[dict[str, str | float]]) -> str:
    """Say who needs the least CPU and who is fastest, by scheme, with the distance to the next."""
    lines = []
    for scheme in ("http", "https"):
        own = [r for r in rows if r["scheme"] == scheme]
        thrifty = sorted(own, key=lambda r: r["cpu_seconds_per_gib"])
        fast = sorted(own, key=lambda r: -float(r["gib_per_second"]))
        line = f"{scheme}: least CPU {thrifty[0]['client']}, fastest {fast[0]['client']}"
        if len(own) > 1:
            less = float(thrifty[1]["cpu_seconds_per_gib"]) / float(thrifty[0]["cpu_seconds_per_gib"])
            more = float(fast[0]["gib_per_second"]) / float(fast[1]["gib_per_second"])
            line += (
                f"; the next needs {less:.2f} × the CPU ({thrifty[1]['client']}), "
                f"the next fastest is {more:.2f} × slower ({fast[1]['client']})"
            )
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
