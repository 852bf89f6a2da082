"""Filters: a snapshot without the files that nobody here wants to load.

What is not shown is not fetched, not prefetched and not counted. Globs mean what ``allow_patterns`` and
``ignore_patterns`` of huggingface_hub mean: they are held against the whole path, ``*`` stands for slashes
too, and one that ends in a slash covers the directory
(https://huggingface.co/docs/huggingface_hub/guides/download#filter-files-to-download).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fnmatch import translate
from functools import cache as remember

from modelfs.listing import Listing
from modelfs.stores.manifest import LAYERS
from modelfs.types import Snapshot
from modelfs.views import Face

_WEIGHTS = re.compile(
    r"(?P<folder>(?:.*/)?)(?P<name>[^/]+?)"
    r"(?:\.fp16)?(?:-(?P<shard>\d{5})-of-(?P<shards>\d{5}))?(?:\.fp16)?"
    r"\.(?P<format>safetensors|bin|ckpt|msgpack|h5)(?P<index>\.index(?:\.fp16)?\.json)?"
)
"""Names of weights as transformers and diffusers write them: ``model.fp16-00001-of-00002.safetensors`` …"""

_SAME = {
    "pytorch_model": "model",
    "tf_model": "model",
    "flax_model": "model",
    "diffusion_flax_model": "diffusion_pytorch_model",
}
"""Name of weights in one framework → their name as safetensors."""


@remember
def shows(face: Face) -> Callable[[str], bool]:
    """Return whether the globs of `face` show a path."""
    include, exclude = _matcher(face.include or ("*",)), _matcher(face.exclude)
    return lambda path: bool(include(path)) and not exclude(path)


def _matcher(globs: Iterable[str]) -> Callable[[str], object]:
    whole = (f"{glob}*" if glob.endswith("/") else glob for glob in globs)
    return re.compile("|".join(map(translate, whole)) or r"(?!)").match


def filtered(face: Face, snapshot: Snapshot) -> Snapshot:
    """Return `snapshot` with only what `face` shows, and the number of files that are hidden.

    Of a store too large to list nothing is known that could be filtered here: ask `shows` about each entry.
    With many entries this takes a while: call it in a thread.
    """
    if not snapshot.complete or not (face.include or face.exclude or face.formats == "production"):
        return snapshot
    is_shown = shows(face)
    # The layers of an image are not what is shown: what they hold is filtered when it is known.
    inside = f"{LAYERS}/"
    kept = [e for e in snapshot.entries.values() if is_shown(e.path) or e.path.startswith(inside)]
    if face.formats == "production":
        hidden = duplicates(entry.path for entry in kept if entry.kind != "directory")
        kept = [entry for entry in kept if entry.path not in hidden]
    listing = Listing.of(kept)
    files = snapshot.listing.totals.files - listing.totals.files
    return replace(snapshot, entries=listing, hidden=snapshot.hidden + files)


@dataclass
class _Files:
    """The files of one set of weights in one format and precision."""

    paths: list[str] = field(default_factory=list)
    shards: set[str | None] = field(default_factory=set)
    expected: int = 0

    @property
    def whole(self) -> bool:
        """Whether a loader finds all of the weights in them."""
        return None in self.shards or 0 < self.expected <= len(self.shards)


def duplicates(paths: Iterable[str]) -> set[str]:
    """Return those `paths` that hold weights which others of them hold in a format for production.

    That is safetensors; without them, half precision (``fp16``). They win over ``.bin``, ``.ckpt``,
    ``.msgpack`` and ``.h5`` of the same name in the same directory, where ``pytorch_model``, ``tf_model`` and
    ``flax_model`` are the same name as ``model``. Safetensors of another precision are no duplicates:
    loaders ask for them by name. Shards win only if all of them are there.
    """
    weights: dict[tuple[str, str], dict[tuple[str, bool], _Files]] = defaultdict(lambda: defaultdict(_Files))
    for path in paths:
        found = _WEIGHTS.fullmatch(path)
        if found is None:
            continue
        name = _SAME.get(found["name"], found["name"])
        is_half = ".fp16" in path[found.end("name") :]
        files = weights[found["folder"], name][found["format"], is_half]
        files.paths.append(path)
        if not found["index"]:
            files.shards.add(found["shard"])
            files.expected = max(files.expected, int(found["shards"] or 0))
    hidden: set[str] = set()
    for kinds in weights.values():
        whole = {kind for kind, files in kinds.items() if files.whole}
        is_safe = any(format == "safetensors" for format, _ in whole)
        has_half = any(is_half for _, is_half in whole)
        for (format, is_half), files in kinds.items():
            if format != "safetensors" and (is_safe or (has_half and not is_half)):
                hidden.update(files.paths)
    return hidden
