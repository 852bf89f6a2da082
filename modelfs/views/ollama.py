"""The layout of Ollama's models: what a directory holds that ``OLLAMA_MODELS`` names.

``manifests/HOST/NAMESPACE/MODEL/TAG`` is the manifest of an artifact, ``blobs/sha256-DIGEST`` are the layers
and the configuration that it names (https://github.com/ollama/ollama, ``manifest/paths.go`` and
``types/model/name.go``). Ollama makes these directories where they are missing, and ``manifests-v2`` as well,
which is empty here: what is not there is looked for in ``manifests``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from modelfs.types import Entry, Snapshot

PLACE = ".ollama"
"""Name at the root of the mount; ``models`` in it is to be given as ``OLLAMA_MODELS``."""

EMPTY = "manifests-v2"
"""Directory that has to be there."""

MANIFEST = ".oci/manifest.json"
"""Entry of an artifact that holds its manifest."""

_KIND = "application/vnd.ollama.image."
_URL = re.compile(
    r"oci://(?P<host>[^/@]+)/(?:(?P<namespace>[^/@:]+)/)?(?P<model>[^/@:]+)(?::(?P<tag>[^/@:]+))?(?:@.+)?"
)


def manifest_of(url: str) -> str | None:
    """Return where the manifest of the artifact `url`, canonical, is expected, from ``models`` on.

    None if Ollama cannot name it: its names have exactly a host, a namespace, a model and a tag.
    """
    found = _URL.fullmatch(url)
    if found is None:
        return None
    namespace, tag = found["namespace"] or "library", found["tag"] or "latest"
    return "/".join(("manifests", found["host"], namespace, found["model"], tag))


def is_artifact(manifest: str) -> bool:
    """Return whether a manifest is of a model as Ollama packs them."""
    try:
        layers = json.loads(manifest)["layers"]
        return any(layer["mediaType"].startswith(_KIND) for layer in layers)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def blobs(snapshot: Snapshot) -> Iterator[tuple[str, Entry]]:
    """Yield what an artifact consists of, the manifest too, each with its path from ``models`` on."""
    for entry in snapshot.entries.values():
        if entry.digest is not None and entry.digest.algorithm == "sha256":
            yield f"blobs/sha256-{entry.digest.value}", entry
