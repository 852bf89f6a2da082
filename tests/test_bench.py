"""The benchmark of mounts: its S3 origin is one to boto3, and its verdicts follow from its numbers."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from bench import report
from bench.report import LOCAL, OURS, RAWS, RIVAL
from bench.s3_origin import Origin, s3_origin

KEYS = ["a b+c.txt", "deep/er/file", "deep/x", "deep/y", "deeper", "é/ü", "z"]
LARGE = os.urandom(300_000)


@pytest.fixture(scope="module")
def origin() -> Iterator[Origin]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        root.chmod(0o755)  # nginx is another user
        for key in KEYS:
            path = root / "models" / key
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(LARGE if key == "z" else key.encode())
        (root / "many").mkdir()
        for index in range(2_345):
            (root / "many" / f"{index:05}").touch()
        with s3_origin(root) as server:
            yield server


@pytest.fixture(scope="module", params=["plain", "shaped"])
def s3(origin: Origin, request: pytest.FixtureRequest) -> Iterator[Any]:
    client = boto3.client(
        "s3",
        endpoint_url=getattr(origin, request.param),
        region_name="us-east-1",
        aws_access_key_id="any",
        aws_secret_access_key="any",
        config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )
    yield client
    client.close()


@pytest.mark.parametrize("operation", ["list_objects_v2", "list_objects"])
@pytest.mark.parametrize("size", [1, 2, 1000])
@pytest.mark.parametrize(
    ("prefix", "delimiter", "keys", "prefixes"),
    [
        ("", "", KEYS, []),
        ("", "/", ["a b+c.txt", "deeper", "z"], ["deep/", "é/"]),
        ("deep/", "/", ["deep/x", "deep/y"], ["deep/er/"]),
        ("deep", "/", ["deeper"], ["deep/"]),
        ("none", "/", [], []),
    ],
)
def test_listings_come_whole_in_pages_of_any_size(
    s3: Any,
    operation: str,
    size: int,
    prefix: str,
    delimiter: str,
    keys: list[str],
    prefixes: list[str],
) -> None:
    pages = list(
        s3.get_paginator(operation).paginate(
            Bucket="models", Prefix=prefix, Delimiter=delimiter, PaginationConfig={"PageSize": size}
        )
    )
    assert sorted(each["Key"] for page in pages for each in page.get("Contents", [])) == sorted(keys)
    assert [each["Prefix"] for page in pages for each in page.get("CommonPrefixes", [])] == prefixes
    assert all(len(page.get("Contents", [])) + len(page.get("CommonPrefixes", [])) <= size for page in pages)


def test_large_buckets_are_listed(s3: Any) -> None:
    pages = list(s3.get_paginator("list_objects_v2").paginate(Bucket="many"))
    assert [page["KeyCount"] for page in pages] == [1000, 1000, 345]
    assert [each["Key"] for page in pages for each in page["Contents"]] == [f"{n:05}" for n in range(2_345)]


@pytest.mark.parametrize("key", KEYS)
def test_objects_have_the_size_and_etag_of_the_listing(s3: Any, key: str) -> None:
    (listed,) = [e for e in s3.list_objects_v2(Bucket="models")["Contents"] if e["Key"] == key]
    head = s3.head_object(Bucket="models", Key=key)
    assert (head["ETag"], head["ContentLength"]) == (listed["ETag"], listed["Size"])
    got = s3.get_object(Bucket="models", Key=key, IfMatch=listed["ETag"])
    assert got["Body"].read() == (LARGE if key == "z" else key.encode())
    with pytest.raises(ClientError, match="412"):
        s3.get_object(Bucket="models", Key=key, IfMatch='"another"')


def test_presigned_urls_serve_ranges(s3: Any) -> None:
    url = s3.generate_presigned_url("get_object", Params={"Bucket": "models", "Key": "z"})
    wanted = {"Range": "bytes=100000-199999"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=wanted)) as answer:
        assert answer.status == 206
        assert answer.read() == LARGE[100_000:200_000]


def test_buckets_answer_for_themselves(s3: Any) -> None:
    s3.head_bucket(Bucket="models")
    assert s3.get_bucket_location(Bucket="models")["LocationConstraint"] is None
    for call in (s3.head_bucket, s3.list_objects_v2):
        with pytest.raises(ClientError, match=r"404|NoSuchBucket"):
            call(Bucket="none")


@pytest.mark.parametrize("key", ["none", "deep", "deep/", "deep/none"])
def test_what_is_no_object_is_not_found(s3: Any, key: str) -> None:
    with pytest.raises(ClientError, match="404"):
        s3.head_object(Bucket="models", Key=key)
    with pytest.raises(ClientError, match="NoSuchKey"):
        s3.get_object(Bucket="models", Key=key)


def test_what_objects_have_besides_bytes_is_refused(s3: Any) -> None:
    with pytest.raises(ClientError, match="NotImplemented"):
        s3.get_object_acl(Bucket="models", Key="z")


def test_requests_are_counted(origin: Origin) -> None:
    before = origin.requests()
    for _ in range(3):
        urllib.request.urlopen(f"{origin.plain}/models/z").close()
    assert origin.requests() - before - 1 == 3


class Sender(BaseHTTPRequestHandler):
    """Answers with as many zeros as the path says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        size = int(self.path[1:])
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        self.wfile.write(bytes(size))

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_the_relay_delays_requests_and_limits_answers() -> None:
    with HTTPServer(("127.0.0.1", 0), Sender) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        command = [sys.executable, "-m", "bench.relay", str(server.server_address[1]), "0.1", "10e6"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as relay:
            assert relay.stdout is not None
            url = f"http://127.0.0.1:{int(relay.stdout.readline())}"
            try:
                for size, least in ((1, 0.1), (3_000_000, 0.1 + 0.3 * 0.6)):
                    started = time.monotonic()
                    with urllib.request.urlopen(f"{url}/{size}") as answer:
                        assert answer.read() == bytes(size)
                    assert time.monotonic() - started >= least
            finally:
                relay.terminate()
                server.shutdown()
                thread.join()


def test_medians_are_taken_but_of_memory_the_most() -> None:
    samples = {("mount", OURS): [3.0, 1.0, 2.0], ("peak RSS of the daemon", OURS): [3.0, 1.0, 2.0]}
    assert list(report.medians(samples).values()) == [2.0, 3.0]


FOUND: report.Medians = {
    ("warm sequential read", LOCAL): 10e9,
    ("warm sequential read", OURS): 9.5e9,
    ("warm sequential read", RIVAL): 1.2e9,
    ("cold sequential read", RAWS[0]): 0.9e9,
    ("cold sequential read", RAWS[1]): 1e9,
    ("cold sequential read", OURS): 0.79e9,
    ("cold from_pretrained", RAWS[0]): 2.0,
    ("cold from_pretrained", RAWS[1]): 2.2,
    ("cold from_pretrained", OURS): 1.8,
    ("store requests for missing names", OURS): 0,
    ("peak RSS of the daemon", OURS): 201 * report.MIB,
}


@pytest.mark.parametrize(
    ("work", "value", "met"),
    [
        ("warm sequential read ÷ local file", "0.95", True),
        ("warm sequential read ÷ rclone", "7.92", False),
        ("cold sequential read ÷ fastest raw download", "0.79", False),
        ("cold from_pretrained ÷ download, then load", "0.90", False),
        ("store requests for missing names", "0", True),
        ("peak RSS of the daemon, MiB", "201", False),
        ("missing names ÷ rclone", "–", None),
    ],
)
def test_verdicts_follow_from_the_medians(work: str, value: str, met: bool | None) -> None:
    (verdict,) = [each for each in report.verdicts(FOUND) if each.work == work]
    assert (verdict.value, verdict.met) == (value, met)


def test_every_target_is_about_something_that_is_measured() -> None:
    for target in report.TARGETS:
        for side in (target.ours, target.theirs):
            assert side is None or side.figure in report.FIGURES


def test_tables_show_what_was_measured_and_nothing_else() -> None:
    held = [report.Verdict("work", "≥ 8", "7.92", False), report.Verdict("other", "≥ 5", "–", None)]
    assert report.targets_table(held).splitlines()[2:] == [
        "| work | ≥ 8 | 7.92 | **missed** |",
        "| other | ≥ 5 | – | not measured |",
    ]
    assert report.full_table(FOUND, [LOCAL, OURS, "s3fs"]).splitlines() == [
        "| work | | local file | modelfs kernel |",
        "|---|---|---:|---:|",
        "| cold sequential read | GB/s |  | 0.79 |",
        "| warm sequential read | GB/s | 10.00 | 9.50 |",
        "| cold from_pretrained | s |  | 1.80 |",
        "| store requests for missing names | requests |  | 0 |",
        "| peak RSS of the daemon | MiB |  | 201 |",
    ]
