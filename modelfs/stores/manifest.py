"""OCI manifests: what they hold, which one of an index is meant, and which files their layers are. Pure.

Images, indexes and descriptors: https://github.com/opencontainers/image-spec (``manifest.md``,
``image-index.md``, ``descriptor.md``); Docker's own forms have the same members. How layers that are no tar
name their files:

- ModelPack, KitOps and Docker Model Runner: the annotation ``org.cncf.model.filepath``
  (https://github.com/modelpack/model-spec, ``docs/annotations.md``), formerly ``org.cnai.model.filepath``;
- ORAS: the annotation ``org.opencontainers.image.title``; a directory is a tar that says
  ``io.deis.oras.content.unpack`` (https://oras.land/docs/how_to_guides/pushing_and_pulling);
- Ollama: the member ``name`` of some descriptors;
- otherwise the media type tells what it is (`NAMES`).
"""

from __future__ import annotations

import json
import platform as machine
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from modelfs.errors import BadAnswer, NotFound
from modelfs.types import Digest, Entry

INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFESTS = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.oci.artifact.manifest.v1+json",
)

MANIFEST = ".oci/manifest.json"
"""Where a snapshot shows the manifest: with it, a reader knows media type, digest and order of all layers."""
MANIFEST_VERSION = "manifest "
"""What precedes the digest in the version of the manifest, which is no blob of the registry."""
CONFIG = ".oci/config.json"
_OURS = ".oci/"
LAYERS = ".oci/layers"
"""Directory of the layers that are tars, in order: ``00-DIGEST.tar.gz``."""

NAMES: Mapping[str, str] = {
    "application/vnd.ollama.image.model": "model.gguf",
    "application/vnd.ollama.image.projector": "mmproj.gguf",
    "application/vnd.ollama.image.adapter": "adapter.gguf",
    "application/vnd.ollama.image.template": "template",
    "application/vnd.ollama.image.system": "system",
    "application/vnd.ollama.image.prompt": "prompt",
    "application/vnd.ollama.image.params": "params.json",
    "application/vnd.ollama.image.messages": "messages.json",
    "application/vnd.ollama.image.license": "LICENSE",
    "application/vnd.docker.ai.gguf.v3": "model.gguf",
    "application/vnd.docker.ai.model.file.v1+gguf": "model.gguf",
    "application/vnd.docker.ai.safetensors": "model.safetensors",
    "application/vnd.docker.ai.dduf": "model.dduf",
    "application/vnd.docker.ai.mmproj": "mmproj.gguf",
    "application/vnd.docker.ai.license": "LICENSE",
    "application/vnd.docker.ai.chat.template.jinja": "chat_template.jinja",
    "application/vnd.cncf.model.weight.v1.gguf": "model.gguf",
    "application/vnd.cncf.model.weight.v1.safetensors": "model.safetensors",
}
"""Media type → name of the file, for layers that tell none. Of several weights the n-th is a shard."""

MAX_LAYERS = 100_000

_PATHS = ("org.cncf.model.filepath", "org.cnai.model.filepath")
_METADATA = "org.cncf.model.file.metadata+json"
_TITLE, _UNPACK = "org.opencontainers.image.title", "io.deis.oras.content.unpack"
_CREATED = "org.opencontainers.image.created"
_ATTESTATION = "vnd.docker.reference.type"

_TAR = re.compile(r"[./+-]tar(?:[.+](gzip|zstd))?\Z")
_SUFFIX = {None: "tar", "gzip": "tar.gz", "zstd": "tar.zst"}
_SHARDED = (".gguf", ".safetensors")
_PLATFORM = re.compile(r"[!-.0-~]{1,32}")
_OFFERED = 10
"""Platforms of an index that a message names."""
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm"}
"""What Linux calls an architecture → what Go, hence OCI, does; others have one name."""


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A reference to a blob or manifest (``descriptor.md``).

    Attributes:
        media_type: without parameters.
        digest: of the content.
        size: bytes.
        annotations: what its maker says about it.
        platform: ``os/architecture`` or ``os/architecture/variant``; "" if it names none.
        name: of Ollama's descriptors; "" if there is none.

    """

    media_type: str
    digest: Digest
    size: int
    annotations: Mapping[str, str]
    platform: str = ""
    name: str = ""

    @property
    def tar(self) -> str | None:
        """``tar``, ``tar.gz`` or ``tar.zst`` if the blob is an archive whose members are the files."""
        found = _TAR.search(self.media_type)
        if found is None:
            return None
        # ORAS calls every file a tar that was not given another type.
        if _TITLE in self.annotations and self.annotations.get(_UNPACK) != "true" and not self._path:
            return None
        return _SUFFIX[found[1]]

    @property
    def path(self) -> str:
        """Where its maker wants the file; "" if nowhere. Not checked."""
        return self._path or self.annotations.get(_TITLE, "") or self.name

    @property
    def _path(self) -> str:
        return next((path for key in _PATHS if (path := self.annotations.get(key))), "")


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest, or an index of manifests.

    Attributes:
        manifests: of an index, otherwise empty.
        layers: of a manifest, bottom first; a file of one replaces that of the layers before.
        config: of a manifest, if it has one.
        created: seconds since the epoch, 0 if it does not say.

    """

    manifests: tuple[Descriptor, ...] = ()
    layers: tuple[Descriptor, ...] = ()
    config: Descriptor | None = None
    created: float = 0.0


def parse(body: bytes, place: str) -> Manifest:
    """Return the manifest or index that `body` is.

    Raises:
        BadAnswer: it is neither, or malformed; names `place` and the member.

    """
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"{place}: the manifest is not JSON ({type(error).__name__})") from error
    if not isinstance(data, dict) or data.get("schemaVersion") != 2:
        raise BadAnswer(f"{place}: not a manifest of schema 2: push it again with a current tool")
    listed = {name: data[name] for name in ("manifests", "layers", "blobs") if data.get(name) is not None}
    for name, rows in listed.items():
        if not isinstance(rows, list) or len(rows) > MAX_LAYERS:
            raise BadAnswer(f"{place}: {name} of the manifest is no list of at most {MAX_LAYERS}")
    rows = {
        name: tuple(_descriptor(row, f"{place}: {name}[{number}]") for number, row in enumerate(listed[name]))
        for name in listed
    }
    if not rows:
        raise BadAnswer(f"{place}: the manifest has neither layers nor manifests")
    config = data.get("config")
    return Manifest(
        rows.get("manifests", ()),
        rows.get("layers") or rows.get("blobs", ()),
        None if config is None else _descriptor(config, f"{place}: config"),
        _time(_texts(data.get("annotations")).get(_CREATED, "")),
    )


def choose(index: Manifest, wanted: str | None, place: str) -> Descriptor:
    """Return the manifest of `index` to use.

    That for the platform `wanted`. Without a wish: that for this machine, else the only one that is not an
    attestation, whatever its platform (a model runs anywhere), else the first that is of none, as artifacts
    are (``unknown/unknown``).

    Raises:
        NotFound: there is none; names those that there are.

    """
    able = [one for one in index.manifests if _ATTESTATION not in one.annotations]
    if wanted:
        found = [one for one in able if f"{one.platform}/".startswith(f"{wanted}/")]
    else:
        here = f"linux/{_ARCHITECTURES.get(machine.machine(), machine.machine())}"
        found = [one for one in able if f"{one.platform}/".startswith(f"{here}/")]
        found = found or [one for one in able if one.platform in ("", "unknown/unknown")]
        found = found or (able if len(able) == 1 else [])
    if not found:
        offered = ", ".join(sorted({one.platform or "none" for one in able})[:_OFFERED]) or "nothing"
        raise NotFound(f"{place}: is not there for {wanted or here}, but for {offered}: set option platform")
    return found[0]


def entries(
    manifest: Manifest, digest: Digest, size: int, directory: str = ""
) -> tuple[list[Entry], list[tuple[str, str]]]:
    """Return the entries of a manifest of `size` bytes: the files, and below ``.oci`` what is not a file.

    Also those that must not be shown, with the reason.

    The version of every other entry than the manifest is its digest. Paths are as their makers wrote them.
    Of a `directory` it is the files in it, relative to it, and the layers, which may hold more of them; that
    they stand for a directory only is told by their place, ``.oci/layers/DIRECTORY``.
    """
    created = manifest.created
    width = len(str(len(manifest.layers)))
    place = f"{LAYERS}/{directory}" if directory else LAYERS
    layers = [
        _entry(f"{place}/{number:0{width}}-{layer.digest.value[:12]}.{layer.tar}", layer, created)
        for number, layer in enumerate(manifest.layers)
        if layer.tar
    ]
    plain = [layer for layer in manifest.layers if not layer.tar]
    files = list(dict.fromkeys(_entry(path, layer, created) for path, layer in named(plain)))
    files = below(files, directory)
    taken = [(file.path, "this place is not for files") for file in files if file.path.startswith(_OURS)]
    files = [file for file in files if not file.path.startswith(_OURS)]
    if directory:
        return [*layers, *files], taken
    config = [_entry(CONFIG, manifest.config, created)] if manifest.config else []
    return [
        Entry(MANIFEST, size, f"{MANIFEST_VERSION}{digest}", digest, created),
        *config,
        *layers,
        *files,
    ], taken


def layers_in(paths: Iterable[str]) -> tuple[str, list[str]]:
    """Return the directory that the layers among `paths` stand for, "" for all, and these, bottom first."""
    found = sorted(path for path in paths if path.startswith(f"{LAYERS}/"))
    return found[0].rpartition("/")[0][len(LAYERS) + 1 :] if found else "", found


def below(listed: Iterable[Entry], directory: str) -> list[Entry]:
    """Return the entries below `directory`, with paths relative to it; all of them if it is empty."""
    prefix = f"{directory}/" if directory else ""
    return [
        replace(entry, path=entry.path.removeprefix(prefix))
        for entry in listed
        if entry.path.startswith(prefix)
    ]


def named(layers: Sequence[Descriptor]) -> Iterator[tuple[str, Descriptor]]:
    """Yield each of `layers`, which are files, with the path of its file."""
    unnamed = Counter(NAMES.get(layer.media_type, "") for layer in layers if not layer.path)
    seen: Counter[str] = Counter()
    for layer in layers:
        name = NAMES.get(layer.media_type, "")
        if layer.path:
            # ``./`` is what modctl and oras write for files of the working directory.
            yield layer.path.removeprefix("./"), layer
        elif not name:
            yield f"{layer.digest.algorithm}-{layer.digest.value[:12]}", layer
        else:
            seen[name] += 1
            yield _numbered(name, seen[name], unnamed[name]), layer


def _numbered(name: str, number: int, total: int) -> str:
    """Return the name of one of `total` files called `name`: of weights, that of a shard."""
    stem, dot, suffix = name.rpartition(".")
    if total == 1:
        return name
    if f".{suffix}" in _SHARDED:
        return f"{stem}-{number:05}-of-{total:05}.{suffix}"
    if number == 1:
        return name
    return f"{stem}-{number}.{suffix}" if dot else f"{name}-{number}"


def _entry(path: str, layer: Descriptor, created: float) -> Entry:
    mtime = created
    if _METADATA in layer.annotations:
        mtime = _metadata_time(layer.annotations[_METADATA]) or created
    return Entry(path, layer.size, str(layer.digest), layer.digest, mtime)


def _descriptor(row: Any, place: str) -> Descriptor:
    if not isinstance(row, dict):
        raise BadAnswer(f"{place} is no descriptor")
    size, name, platform = row.get("size"), row.get("name"), row.get("platform")
    try:
        digest = Digest.parse(row["digest"])
    except (KeyError, AttributeError, ValueError) as error:
        raise BadAnswer(f"{place} has no usable digest") from error
    if digest.algorithm not in ("sha256", "sha512"):
        raise BadAnswer(f"{place} has a digest that proves nothing ({digest.algorithm})")
    if type(size) is not int or not 0 <= size < 1 << 63:
        raise BadAnswer(f"{place} has no usable size")
    media_type = row.get("mediaType")
    return Descriptor(
        media_type.partition(";")[0].strip().lower() if isinstance(media_type, str) else "",
        digest,
        size,
        _texts(row.get("annotations")),
        _platform(platform) if isinstance(platform, dict) else "",
        name if isinstance(name, str) else "",
    )


def _platform(row: Mapping[str, Any]) -> str:
    parts = [row.get(key) for key in ("os", "architecture", "variant")]
    return "/".join(part for part in parts if isinstance(part, str) and _PLATFORM.fullmatch(part))


def _texts(row: Any) -> Mapping[str, str]:
    if not isinstance(row, dict):
        return {}
    return {name: text for name, text in row.items() if isinstance(text, str)}


def _time(text: str) -> float:
    """Return the seconds since the epoch of an RFC 3339 time, 0 if it is none."""
    try:
        moment = datetime.fromisoformat(text)
        return max(0.0, moment.timestamp()) if moment.tzinfo else 0.0
    except (ValueError, OverflowError):
        return 0.0


def _metadata_time(text: str) -> float:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return 0.0
    return _time(str(row.get("mtime"))) if isinstance(row, dict) else 0.0
