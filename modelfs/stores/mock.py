"""``mock://NAME``: tiny models made on the spot, that real loaders load; for tests that need no network.

===================================  =================================================================
``mock://bert`` or any other name    a BERT with two layers and a sentiment head, for ``transformers``
``mock://sklearn``                   a logistic regression and a scaler, for ``pickle`` and ``joblib``
``mock://random?files=N&size=BYTES`` files of random bytes
===================================  =================================================================

``?seed=TEXT`` makes another model. The same URL always gives the same bytes, on every machine and with every
version of the libraries: nothing but Python makes them.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import string
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import trio

from modelfs.errors import ConfigError, Stale, Unavailable
from modelfs.stores import Options, checked_options, entry_in, redact
from modelfs.stores.file import token_of, url_of
from modelfs.types import Digest, Entry, Location, Snapshot

TINY = 256 * 1024
"""Bytes up to which content travels in a ``data:`` URL; larger content is written to a temporary file."""

MTIME = 1_700_000_000.0
"""Modification time of every file."""

_CHUNK = 1 << 20
_THREADS = trio.CapacityLimiter(2)


@dataclass(frozen=True)
class _File:
    size: int
    chunks: Callable[[], Iterable[bytes]]

    @classmethod
    def of(cls, data: bytes) -> _File:
        return cls(len(data), lambda: [data])


class MockStore:
    """A model made of its own name; implements :class:`modelfs.stores.Store`, takes no options.

    Published digests are right, modification times constant. Temporary files end with the store.
    """

    def __init__(self, url: str, options: Options) -> None:
        checked_options(url, options, {})
        self.url, self._make = _parsed(url)
        self._lock = threading.Lock()
        self._made: tuple[Mapping[str, _File], Snapshot] | None = None
        self._directory: Path | None = None

    async def snapshot(self) -> Snapshot:
        """Return the only snapshot there is; the first call makes the model, in a thread."""
        _, snapshot = await self._model()
        return snapshot

    async def entry(self, path: str) -> Entry:
        """Return the entry at `path`; NotFound if there is none."""
        return entry_in(await self.snapshot(), path)

    async def locate(self, entry: Entry) -> Location:
        """Return tiny content itself, and else the URL of a temporary file, written when first asked for.

        Raises:
            Stale: `entry` is not of this model.
            Unavailable: the temporary file cannot be written.

        """
        files, snapshot = await self._model()
        if entry.path not in files or snapshot.entries[entry.path].version != entry.version:
            raise Stale(f"{self.url}: there is no such version of {entry.path!r}: refresh the model")
        file = files[entry.path]
        if file.size <= TINY:
            return Location.inline(b"".join(file.chunks()))
        return await trio.to_thread.run_sync(
            self._written, file, entry.version, abandon_on_cancel=True, limiter=_THREADS
        )

    async def _model(self) -> tuple[Mapping[str, _File], Snapshot]:
        if self._made is None:
            return await trio.to_thread.run_sync(self._once, abandon_on_cancel=True, limiter=_THREADS)
        return self._made

    def _once(self) -> tuple[Mapping[str, _File], Snapshot]:
        with self._lock:
            if self._made is None:
                files = self._make()
                entries = [_entry(path, file) for path, file in files.items()]
                self._made = files, Snapshot.of(self.url, "", entries)
            return self._made

    def _written(self, file: _File, name: str) -> Location:
        with self._lock:
            try:
                if self._directory is None:
                    self._directory = Path(tempfile.mkdtemp(prefix="modelfs-mock-"))
                    weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
                path = self._directory / name
                if not path.exists():
                    partial_path = path.with_suffix(".partial")
                    with partial_path.open("wb") as target:
                        target.writelines(file.chunks())
                    partial_path.replace(path)
                return Location(url_of(path), token=token_of(path.stat()))
            except OSError as error:
                raise Unavailable(f"{self.url}: {error.strerror}: free the temporary directory") from error


def _entry(path: str, file: _File) -> Entry:
    hasher = hashlib.sha256()
    for chunk in file.chunks():
        hasher.update(chunk)
    value = hasher.hexdigest()
    return Entry(path, file.size, value, Digest("sha256", value), MTIME)


Parameters = Mapping[str, str]
"""What the query of the URL says, defaults filled in."""


def _parsed(url: str) -> tuple[str, Callable[[], Mapping[str, _File]]]:
    """Return the canonical URL, and what makes its files."""
    try:
        parts = urlsplit(url)
        given = dict(
            parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True) if parts.query else []
        )
    except ValueError as error:
        raise ConfigError(f"{redact(url)}: malformed URL: {error}") from error
    name = (parts.netloc + parts.path).strip("/")
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", name) or parts.fragment:
        raise ConfigError(f"{redact(url)}: write mock://NAME with a name of letters, digits and -._/")
    make, defaults = _MODELS.get(name, (_bert, {"seed": "0"}))
    if surplus := given.keys() - defaults:
        accepted = ", ".join(sorted(defaults))
        raise ConfigError(f"mock://{name}: unknown parameter {min(surplus)!r}; accepted are: {accepted}")
    for number in ("files", "size"):
        if number in given and not re.fullmatch("[0-9]{1,12}", given[number]):
            raise ConfigError(f"mock://{name}: {number} must be a number")
    query = urlencode(sorted((key, value) for key, value in given.items() if value != defaults[key]))
    return f"mock://{name}{'?' if query else ''}{query}", partial(make, name, {**defaults, **given})


# ---- random bytes


def _random(name: str, parameters: Parameters) -> dict[str, _File]:
    count, size = int(parameters["files"]), int(parameters["size"])
    paths = (f"part-{number:05}.bin" for number in range(count))
    return {path: _File(size, partial(_noise, f"{parameters['seed']}/{path}", size)) for path in paths}


def _noise(seed: str, size: int) -> Iterator[bytes]:
    source = random.Random(seed)  # noqa: S311  # not a secret
    for start in range(0, size, _CHUNK):
        yield source.randbytes(min(_CHUNK, size - start))


# ---- a BERT for transformers

_WIDTH, _LAYERS, _INNER, _POSITIONS = 32, 2, 64, 128
_SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
_CHARACTERS = string.ascii_lowercase + string.digits
_VOCABULARY = [
    *_SPECIAL.values(),
    *string.punctuation,
    *_CHARACTERS,
    *(f"##{character}" for character in _CHARACTERS),
    *("the", "is", "was", "this", "it", "not", "very", "movie", "good", "great", "bad", "love", "hate"),
]


def _bert(name: str, parameters: Parameters) -> dict[str, _File]:
    documents = {
        "config.json": {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            "vocab_size": len(_VOCABULARY),
            "hidden_size": _WIDTH,
            "num_hidden_layers": _LAYERS,
            "num_attention_heads": 2,
            "intermediate_size": _INNER,
            "max_position_embeddings": _POSITIONS,
            "type_vocab_size": 2,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 0,
            "id2label": {"0": "NEGATIVE", "1": "POSITIVE"},
            "label2id": {"NEGATIVE": 0, "POSITIVE": 1},
        },
        "tokenizer.json": _tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": True,
            "model_max_length": _POSITIONS,
            **{f"{role}_token": token for role, token in _SPECIAL.items()},
        },
        "special_tokens_map.json": {f"{role}_token": token for role, token in _SPECIAL.items()},
    }
    files = {path: json.dumps(document, indent=1).encode() for path, document in documents.items()}
    files["vocab.txt"] = "".join(f"{token}\n" for token in _VOCABULARY).encode()
    files["model.safetensors"] = _safetensors(f"{name}/{parameters['seed']}")
    return {path: _File.of(data) for path, data in files.items()}


def _tokenizer() -> dict[str, Any]:
    """Return the document of the ``tokenizers`` library for lower-case WordPiece, as BERT has it."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    ids = {token: number for number, token in enumerate(_VOCABULARY)}
    return {
        "version": "1.0",
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in _SPECIAL.values()],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "BertProcessing",
            "sep": ["[SEP]", ids["[SEP]"]],
            "cls": ["[CLS]", ids["[CLS]"]],
        },
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": ids,
        },
    }


def _tensors() -> Iterator[tuple[str, list[int]]]:
    """Yield name and shape of every tensor of ``BertForSequenceClassification``."""

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, list[int]]]:
        yield f"{name}.weight", [rows, columns]
        yield f"{name}.bias", [rows]

    def norm(name: str) -> Iterator[tuple[str, list[int]]]:
        yield f"{name}.LayerNorm.weight", [_WIDTH]
        yield f"{name}.LayerNorm.bias", [_WIDTH]

    for kind, rows in {"word": len(_VOCABULARY), "position": _POSITIONS, "token_type": 2}.items():
        yield f"bert.embeddings.{kind}_embeddings.weight", [rows, _WIDTH]
    yield from norm("bert.embeddings")
    for layer in (f"bert.encoder.layer.{number}" for number in range(_LAYERS)):
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            yield from linear(f"{layer}.attention.{part}", _WIDTH, _WIDTH)
        yield from norm(f"{layer}.attention.output")
        yield from linear(f"{layer}.intermediate.dense", _INNER, _WIDTH)
        yield from linear(f"{layer}.output.dense", _WIDTH, _INNER)
        yield from norm(f"{layer}.output")
    yield from linear("bert.pooler.dense", _WIDTH, _WIDTH)
    yield from linear("classifier", 2, _WIDTH)


def _safetensors(seed: str) -> bytes:
    """Return small random float32 weights in the format of https://github.com/huggingface/safetensors."""
    source = random.Random(seed)  # noqa: S311  # not a secret
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = bytearray()
    for name, shape in _tensors():
        count = shape[0] * (shape[1] if len(shape) == 2 else 1)
        middle = 1.0 if name.endswith("LayerNorm.weight") else 0.0
        data = struct.pack(f"<{count}f", *(source.uniform(middle - 0.2, middle + 0.2) for _ in range(count)))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# ---- pickles of scikit-learn

_FEATURES = 13


@dataclass(frozen=True)
class _Global:
    """What unpickling finds under this name in this module: a class, a function, a constant."""

    module: str
    name: str


@dataclass(frozen=True)
class _Call:
    """The result of a call made while unpickling, and the state it is then given."""

    function: _Global
    arguments: tuple[Any, ...] = ()
    state: Mapping[str, Any] | None = None


def _sklearn(name: str, parameters: Parameters) -> dict[str, _File]:
    """Return pickles that make their objects with whatever scikit-learn reads them; none is needed here."""
    source = random.Random(f"{name}/{parameters['seed']}")  # noqa: S311  # not a secret

    def array(*values: Any) -> _Call:
        return _Call(_Global("numpy", "array"), (list(values),))

    def estimator(module: str, kind: str, **state: Any) -> _Call:
        # The version is that of the reader: it is told about no difference, because there is none.
        fitted = {"n_features_in_": _FEATURES, "_sklearn_version": _Global("sklearn", "__version__")}
        return _Call(_Global(f"sklearn.{module}", kind), (), {**fitted, **state})

    scales = [source.uniform(0.5, 20.0) for _ in range(_FEATURES)]
    scaler = estimator(
        "preprocessing",
        "StandardScaler",
        mean_=array(*(source.uniform(-1.0, 150.0) for _ in range(_FEATURES))),
        scale_=array(*scales),
        var_=array(*(scale * scale for scale in scales)),
        n_samples_seen_=303,
    )
    model = estimator(
        "linear_model",
        "LogisticRegression",
        coef_=array([source.uniform(-1.0, 1.0) for _ in range(_FEATURES)]),
        intercept_=array(source.uniform(-0.5, 0.5)),
        classes_=array(0, 1),
        n_iter_=array(7),
    )
    return {
        "best_model.pkl": _File.of(_pickled(model)),
        "preprocessor.pkl": _File.of(_pickled(scaler)),
    }


def _pickled(value: Any) -> bytes:
    """Return the pickle (protocol 2) of a value made of what `_opcodes` knows."""
    return b"\x80\x02" + _opcodes(value) + b"."


def _opcodes(value: Any) -> bytes:
    """Return the instructions of :mod:`pickletools` that push `value`."""
    match value:
        case str():
            raw = value.encode()
            return b"X" + struct.pack("<I", len(raw)) + raw
        case int():
            return b"J" + struct.pack("<i", value)
        case float():
            return b"G" + struct.pack(">d", value)
        case list() | tuple():
            return b"(" + b"".join(map(_opcodes, value)) + (b"l" if isinstance(value, list) else b"t")
        case dict():
            return b"(" + b"".join(_opcodes(key) + _opcodes(item) for key, item in value.items()) + b"d"
        case _Global(module, name):
            return f"c{module}\n{name}\n".encode()
        case _Call(function, arguments, state):
            made = _opcodes(function) + _opcodes(arguments) + b"R"
            return made + _opcodes(state) + b"b" if state else made
    raise TypeError(f"cannot pickle {value!r}")


_MODELS: dict[str, tuple[Callable[[str, Parameters], dict[str, _File]], dict[str, str]]] = {
    "sklearn": (_sklearn, {"seed": "0"}),
    "random": (_random, {"files": "1", "size": "1024", "seed": "0"}),
}
"""What makes the files of a name, and the parameters it takes with their defaults; other names are BERTs."""
