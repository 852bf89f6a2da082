"""The layout of the Hugging Face cache: what a directory holds that ``HF_HUB_CACHE`` names.

Libraries that are told a repository's name find there, without asking the Hub,

- ``models--ORG--NAME/refs/REVISION``: 40 hexadecimal digits, the commit, and nothing behind them: a newline
  would become part of a path;
- ``models--ORG--NAME/snapshots/COMMIT/…``: the files. They need not be links to ``blobs/``;
- ``models--ORG--NAME/.no_exist/COMMIT/…``: an empty file for each name that the commit is known not to have.
  Without them every optional file is asked for, where nothing says ``HF_HUB_OFFLINE=1``.

Written down in https://huggingface.co/docs/huggingface_hub/guides/manage-cache, read by
``try_to_load_from_cache`` and ``snapshot_download`` of huggingface_hub.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from modelfs.types import Snapshot, path_fault

PLACE = ".hub"
"""Name at the root of the mount, to be given as ``HF_HUB_CACHE``."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.))(?:{_PART}/)?{_PART}")
_SOURCE = re.compile(
    rf"hf://(?:models/)?(?P<repository>(?:{_PART}/)?{_PART})@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+)"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")

OPTIONAL = (
    "adapter_config.json",
    "added_tokens.json",
    "additional_chat_templates",
    "audio_tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "custom_generate/generate.py",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "model.safetensors.index.json",
    "modules.json",
    "preprocessor_config.json",
    "processor_config.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What transformers and sentence-transformers look for and do without."""


@dataclass(frozen=True, slots=True)
class Revision:
    """What a repository has under one name.

    Attributes:
        name: of the branch or tag; None if the store has no such names.
        snapshot: what is there.

    """

    name: str | None
    snapshot: Snapshot


def repositories(name: str, *urls: str, alone: bool = False) -> tuple[str, ...]:
    """Return the repositories as which a model is found, the most certain first.

    Args:
        name: of the model; it counts if it is ``ORG/NAME`` and could be a repository.
        urls: of its stores, canonical; each counts that is a whole repository of a Hub.
        alone: ``NAME`` counts too.

    """
    found = [name] if _REPOSITORY.fullmatch(name) and (alone or "/" in name) else []
    found += [source["repository"] for url in urls if (source := _SOURCE.fullmatch(url))]
    return tuple(dict.fromkeys(found))


def revision_in(url: str) -> str | None:
    """Return the branch, tag or commit in the canonical URL of a repository; None if `url` is of another."""
    source = _SOURCE.fullmatch(url)
    return source["revision"] if source else None


def folder_of(repository: str) -> str:
    """Return the name of the directory of a repository: ``models--ORG--NAME``."""
    return "--".join(("models", *repository.split("/")))


def commit_of(snapshot: Snapshot) -> str:
    """Return the commit of a snapshot: its revision, or a hash of it; what is hidden does not matter."""
    if _COMMIT.fullmatch(snapshot.revision):
        return snapshot.revision
    return sha256(snapshot.revision.encode("utf-8", "surrogateescape")).hexdigest()[:40]


def refs(revisions: Iterable[Revision]) -> dict[str, str]:
    """Return the commits by names of branches and tags; the first of `revisions` win.

    There is always a ``main``: what loaders ask for who name no revision. A revision without a name is it.
    """
    held = list(revisions)
    found: dict[str, str] = {}
    for revision in held:
        name = revision.name or "main"
        if not _COMMIT.fullmatch(name) and path_fault(name) is None:
            found.setdefault(name, commit_of(revision.snapshot))
    if held:
        found.setdefault("main", commit_of(held[0].snapshot))
    return found


def absent(snapshot: Snapshot) -> Iterator[str]:
    """Yield the names that loaders look for and a snapshot does not have."""
    return (name for name in OPTIONAL if snapshot.listing.line(name) is None)
