"""The HTTP clients that compete to be the data plane, each doing the same job in the way it does it best.

The job: fetch one file in ranges over a number of connections and put every byte at its place in a sparse
file with ``pwrite``. ``python -m bench.candidates NAME JOB`` runs one of them in a process of its own and
prints one JSON object, so that CPU time and peak memory are its own.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import urlsplit

BUFFER = 512 * 1024


@dataclass(frozen=True, slots=True)
class Job:
    """What to fetch: the first `length` of `size` bytes at `url`, in ranges of `block` bytes."""

    url: str
    ca: str
    size: int
    length: int
    block: int
    connections: int
    destination: str


@dataclass(frozen=True, slots=True)
class Result:
    """What it took: wall and CPU seconds (user + system), peak resident bytes of the process."""

    seconds: float
    cpu: float
    rss: int


Get = Callable[[int, int], None]
"""Fetches the half-open range and writes it in place."""


def threads(job: Job, connect: Callable[[], Get]) -> None:
    """Run one thread per connection; they share the list of ranges."""
    ranges = [(start, min(start + job.block, job.length)) for start in range(0, job.length, job.block)][::-1]
    failures: list[BaseException] = []

    def work() -> None:
        try:
            get = connect()
            while ranges:
                try:
                    start, stop = ranges.pop()
                except IndexError:
                    return
                get(start, stop)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work) for _ in range(job.connections)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failures:
        raise failures[0]


def _curl(job: Job) -> Any:
    import pycurl

    curl = pycurl.Curl()
    curl.setopt(pycurl.URL, job.url)
    curl.setopt(pycurl.CAINFO, job.ca)
    curl.setopt(pycurl.BUFFERSIZE, BUFFER)
    curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
    curl.setopt(pycurl.NOSIGNAL, 1)
    return curl


def run_pycurl_direct(job: Job, fd: int) -> None:
    """Curl easy handles in threads; the callback writes each 16 KiB piece as it comes."""
    import pycurl

    def connect() -> Get:
        curl = _curl(job)

        def get(start: int, stop: int) -> None:
            offset = start

            def write(data: memoryview) -> None:
                nonlocal offset
                os.pwrite(fd, data, offset)
                offset += len(data)

            curl.setopt(pycurl.WRITEFUNCTION, write, use_memoryview=True)
            curl.setopt(pycurl.RANGE, f"{start}-{stop - 1}")
            curl.perform()
            assert curl.getinfo(pycurl.RESPONSE_CODE) == 206
            assert offset == stop

        return get

    threads(job, connect)


def run_pycurl_gather(job: Job, fd: int) -> None:
    """Curl easy handles in threads; the callback gathers pieces in a buffer and writes it when it is full."""
    import pycurl

    def connect() -> Get:
        curl = _curl(job)
        buffer = memoryview(bytearray(BUFFER))

        def get(start: int, stop: int) -> None:
            offset, fill = start, 0

            def write(data: memoryview) -> None:
                nonlocal offset, fill
                if fill + len(data) > BUFFER:
                    os.pwrite(fd, buffer[:fill], offset)
                    offset, fill = offset + fill, 0
                buffer[fill : fill + len(data)] = data
                fill += len(data)

            curl.setopt(pycurl.WRITEFUNCTION, write, use_memoryview=True)
            curl.setopt(pycurl.RANGE, f"{start}-{stop - 1}")
            curl.perform()
            assert curl.getinfo(pycurl.RESPONSE_CODE) == 206
            os.pwrite(fd, buffer[:fill], offset)
            assert offset + fill == stop

        return get

    threads(job, connect)


def run_pycurl_multi(job: Job, fd: int) -> None:
    """One curl multi handle that drives all connections from a single thread."""
    import pycurl

    ranges = [(start, min(start + job.block, job.length)) for start in range(0, job.length, job.block)][::-1]
    multi = pycurl.CurlMulti()

    def begin(curl: Any) -> None:
        offset, stop = ranges.pop()

        def write(data: memoryview) -> None:
            nonlocal offset
            os.pwrite(fd, data, offset)
            offset += len(data)

        curl.setopt(pycurl.WRITEFUNCTION, write, use_memoryview=True)
        curl.setopt(pycurl.RANGE, f"{offset}-{stop - 1}")
        multi.add_handle(curl)

    handles = [_curl(job) for _ in range(min(job.connections, len(ranges)))]
    for curl in handles:
        begin(curl)
    running = len(handles)
    while running:
        multi.perform()
        _, done, failed = multi.info_read()
        assert not failed, failed
        for curl in done:
            assert curl.getinfo(pycurl.RESPONSE_CODE) == 206
            multi.remove_handle(curl)
            running -= 1
            if ranges:
                begin(curl)
                running += 1
        if running and not done:
            multi.select(1.0)


def run_modelfs(job: Job, fd: int) -> None:
    """What came of it: the range client of modelfs with all its checks, under trio."""
    import trio

    from modelfs.cache import Data, Pipe
    from modelfs.fetch.client import RangeClient
    from modelfs.metrics import Metrics
    from modelfs.types import Location, Span

    class Sink:
        def begin(self, span: Span) -> None:
            assert len(span) <= job.block

        def write(self, offset: int, data: Data) -> None:
            if isinstance(data, Pipe):
                data.move(fd, offset, len(data))
            else:
                os.pwrite(fd, data, offset)

    async def main() -> None:
        starts = list(range(0, job.length, job.block))[::-1]
        client = RangeClient(metrics=Metrics(), connections=job.connections, ca_bundle=job.ca)

        async def work() -> None:
            while starts:
                start = starts.pop()
                span = Span(start, min(start + job.block, job.length))
                await client.fetch(Location(job.url), span, job.size, Sink())

        async with client, trio.open_nursery() as nursery:
            for _ in range(job.connections):
                nursery.start_soon(work)

    trio.run(main)


def run_http_client(job: Job, fd: int) -> None:
    """The standard library: ``readinto`` a reused buffer."""
    import http.client
    import ssl

    parts = urlsplit(job.url)
    context = ssl.create_default_context(cafile=job.ca)

    def connect() -> Get:
        assert parts.hostname is not None
        connection = (
            http.client.HTTPSConnection(parts.hostname, parts.port, context=context)
            if parts.scheme == "https"
            else http.client.HTTPConnection(parts.hostname, parts.port)
        )
        buffer = memoryview(bytearray(BUFFER))

        def get(start: int, stop: int) -> None:
            connection.request("GET", parts.path, headers={"Range": f"bytes={start}-{stop - 1}"})
            response = connection.getresponse()
            assert response.status == 206
            while count := response.readinto(buffer):
                os.pwrite(fd, buffer[:count], start)
                start += count
            assert start == stop

        return get

    threads(job, connect)


def run_urllib3(job: Job, fd: int) -> None:
    """What requests and botocore move bytes with."""
    import urllib3

    pool = urllib3.PoolManager(maxsize=job.connections, block=True, ca_certs=job.ca)

    def connect() -> Get:
        buffer = memoryview(bytearray(BUFFER))

        def get(start: int, stop: int) -> None:
            headers = {"Range": f"bytes={start}-{stop - 1}"}
            response = pool.request("GET", job.url, headers=headers, preload_content=False)
            assert response.status == 206
            while count := response.readinto(buffer):
                os.pwrite(fd, buffer[:count], start)
                start += count
            response.release_conn()
            assert start == stop

        return get

    threads(job, connect)


def run_httpx(job: Job, fd: int) -> None:
    """What huggingface_hub moves bytes with; its synchronous client, which needs no event loop."""
    import ssl

    import httpx

    context = ssl.create_default_context(cafile=job.ca)
    client = httpx.Client(verify=context, limits=httpx.Limits(max_connections=job.connections))

    def get(start: int, stop: int) -> None:
        with client.stream("GET", job.url, headers={"Range": f"bytes={start}-{stop - 1}"}) as response:
            assert response.status_code == 206
            for chunk in response.iter_raw():
                os.pwrite(fd, chunk, start)
                start += len(chunk)
        assert start == stop

    with client:
        threads(job, lambda: get)


def _obstore(job: Job) -> tuple[Any, str]:
    from obstore.store import HTTPStore

    parts = urlsplit(job.url)
    with open(job.ca, "rb") as file:
        options = {"allow_http": True, "root_certificate": file.read()}
    return HTTPStore.from_url(f"{parts.scheme}://{parts.netloc}", client_options=options), parts.path[1:]


def run_obstore_get_range(job: Job, fd: int) -> None:
    """Rust's object_store; each range arrives as one buffer."""
    import obstore

    store, path = _obstore(job)

    def get(start: int, stop: int) -> None:
        data = obstore.get_range(store, path, start=start, end=stop)
        assert os.pwrite(fd, memoryview(data), start) == stop - start

    threads(job, lambda: get)


def run_obstore_stream(job: Job, fd: int) -> None:
    """Rust's object_store; each range arrives as a stream of chunks."""
    import obstore

    store, path = _obstore(job)

    def get(start: int, stop: int) -> None:
        answer = obstore.get(store, path, options={"range": (start, stop)})
        for chunk in answer.stream(min_chunk_size=BUFFER):
            os.pwrite(fd, memoryview(chunk), start)
            start += len(chunk)
        assert start == stop

    threads(job, lambda: get)


CANDIDATES: dict[str, Callable[[Job, int], None]] = {
    "pycurl": run_pycurl_gather,
    "pycurl, pieces": run_pycurl_direct,
    "pycurl, multi": run_pycurl_multi,
    "http.client": run_http_client,
    "urllib3": run_urllib3,
    "httpx": run_httpx,
    "obstore get_range": run_obstore_get_range,
    "obstore stream": run_obstore_stream,
    "modelfs": run_modelfs,
}


def peak_rss() -> int:
    """Return the most bytes this process ever had resident.

    From ``/proc``: ``ru_maxrss`` would also count the process that started this one.
    """
    with open("/proc/self/status") as file:
        match = re.search(r"VmHWM:\s+(\d+) kB", file.read())
    assert match
    return int(match[1]) * 1024


def run(name: str, job: Job) -> Result:
    """Run one candidate in this process, after one block to warm up: imports are not compared."""
    fd = os.open(job.destination, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        CANDIDATES[name](replace(job, length=min(job.block, job.length)), fd)
        os.ftruncate(fd, 0)
        os.ftruncate(fd, job.size)
        started, cpu = time.perf_counter(), time.process_time()
        CANDIDATES[name](job, fd)
        return Result(time.perf_counter() - started, time.process_time() - cpu, peak_rss())
    finally:
        os.close(fd)


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[1], Job(**json.loads(sys.argv[2]))))))
