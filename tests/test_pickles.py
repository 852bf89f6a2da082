"""What pickles would import is told without executing them, and what cannot be told is said."""

from __future__ import annotations

import bz2
import collections
import gzip
import io
import lzma
import pickle
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from modelfs import pickles
from modelfs.pickles import Imports, is_pickle, scan


class Evil:
    def __reduce__(self) -> Any:
        import os

        return os.system, ("true",)


def of(data: bytes) -> Imports:
    return scan(io.BytesIO(data))


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_pickle_imports_is_found_in_every_protocol(protocol: int) -> None:
    value = {"a": collections.OrderedDict(x=1), "b": [Evil()] * 3, "c": b"x" * 100_000, "d": 2**100, "e": 1.5}
    found = of(pickle.dumps(value, protocol))
    assert {"posix.system", "collections.OrderedDict"} <= set(found.globals)
    assert found.fault is None
    assert "posix.system" in str(found.suspicion)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_is_harmless(protocol: int) -> None:
    value = [None, True, 1, 2**70, -3.5, "text", "\n'", {"k": ("t", [1, 2])}, np.arange(10), np.float32(1)]
    found = of(pickle.dumps(value, protocol))
    assert found.suspicion is None, found


@pytest.mark.parametrize("zipped", [True, False])
def test_weights_that_torch_saved_are_harmless(zipped: bool) -> None:
    weights = {
        "w": torch.ones(3, 4),
        "h": torch.ones(2, dtype=torch.float16),
        "p": torch.nn.Parameter(torch.ones(2)),
    }
    found = of(saved(weights, _use_new_zipfile_serialization=zipped))
    assert found.suspicion is None, found
    assert "torch._utils._rebuild_tensor_v2" in found.globals


@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_would_execute_is_found(zipped: bool) -> None:
    found = of(saved({"w": torch.ones(3), "x": Evil()}, _use_new_zipfile_serialization=zipped))
    assert "posix.system" in found.globals


def test_every_pickle_of_several_is_scanned() -> None:
    assert "posix.system" in of(pickle.dumps([1]) + pickle.dumps(Evil())).globals


def test_a_joblib_file_without_arrays_is_understood(tmp_path: Path) -> None:
    joblib.dump({"threshold": 0.5, "labels": ["a"]}, tmp_path / "m.joblib")
    assert of((tmp_path / "m.joblib").read_bytes()).suspicion is None


@pytest.mark.parametrize("compress", [0, 3])
def test_a_joblib_file_with_arrays_is_not_called_harmless(tmp_path: Path, compress: int) -> None:
    joblib.dump({"w": np.arange(1000), "x": Evil()}, tmp_path / "m.joblib", compress=compress)
    found = of((tmp_path / "m.joblib").read_bytes())
    assert found.suspicion is not None


@pytest.mark.parametrize(
    ("program", "name"),
    [
        (b"cposix\nsystem\n.", "posix.system"),
        (b"(iposix\nsystem\n.", "posix.system"),
        (b"\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93.", "posix.system"),
        # from the memo, in the other order
        (b"\x80\x04\x8c\x06system\x940\x8c\x05posix\x940h\x01h\x00\x93.", "posix.system"),
        # computed: neither is on top as text
        (b"\x80\x04\x8c\x05posix\x8c\x06system2\x93.", pickles.UNKNOWN),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x8c\x01x0\x93.", pickles.UNKNOWN),
        (b"\x80\x04h\x07h\x08\x93.", pickles.UNKNOWN),
        (b"\x80\x02\x82\x01.", "an extension registered with copyreg"),
    ],
)
def test_ways_to_import_are_known(program: bytes, name: str) -> None:
    found = of(program)
    assert found.globals == (name,)
    assert found.suspicion is not None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x04",
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # 2**63 - 1 bytes
        b"\x80\x04T\xff\xff\xff\xff.",  # -1 bytes
        b"\x80\x04p-\n.",
        b"\x80\x04V" + b"1" * 100_000,
        b"\x80\x04" + b"\xff" * 10,
        b"GGUF\x03\0\0\0",
        bytes(4096),
    ],
)
def test_where_every_unpickler_fails_before_it_imports_there_is_no_harm(data: bytes) -> None:
    assert of(data) == Imports()
    with pytest.raises(Exception, match=r".*"):
        pickle.loads(data)


@pytest.mark.parametrize(
    "data",
    [
        b"PK\x03\x04" + b"\0" * 100,
        zlib.compress(pickle.dumps(1)),
        gzip.compress(pickle.dumps(1), mtime=0),
        lzma.compress(pickle.dumps(1)),
        bz2.compress(pickle.dumps(1)),
        b"\x80\x06N.",
        b"p" + b"0" * 4200 + b"1\n.",
        b"cjoblib.numpy_pickle\nNumpyArrayWrapper\n\xff\xff",
    ],
)
def test_what_is_not_understood_is_said(data: bytes) -> None:
    assert of(data).fault is not None


def test_the_archives_of_the_oldest_torch_are_not_understood() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    assert of(buffer.getvalue()).fault is not None


def test_a_pickle_that_is_too_long_is_not_scanned_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_OPCODES", 100)
    assert "opcodes" in str(of(pickle.dumps(list(range(1000)))).fault)


def test_payloads_are_skipped_unread() -> None:
    class Counting(io.BytesIO):
        total = 0

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(size)
            self.total += len(data)
            return data

    content = Counting(pickle.dumps([b"x" * 10_000_000, Evil()], 4))
    assert "posix.system" in scan(content).globals
    assert content.total < 10_000


def test_every_pickle_of_an_archive_is_scanned() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}))
        archive.writestr("a/CONSTANTS.PKL", pickle.dumps(Evil()))
    assert of(buffer.getvalue()).globals == ("posix.system",)


def test_names_of_a_file_cannot_break_a_line() -> None:
    found = of(b"\x80\x04\x8c\x05a\nb\x1bc\x8c\x06\xe2\x80\xa8xyz\x93.")
    assert str(found.suspicion).isprintable()
    assert "\n" not in str(found.suspicion)


def test_names_tell_pickles() -> None:
    assert is_pickle("a/pytorch_model.BIN")
    assert is_pickle("m.joblib")
    assert not is_pickle("model.safetensors")
