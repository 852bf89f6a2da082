"""What is seen of several layers: files replaced, removed by whiteouts, and hidden with their directories."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelfs.types import Entry
from modelfs.views.layers import merged


def layer(*paths: str, version: str = "") -> list[Entry]:
    """Return entries: a directory for a path that ends in a slash, a link for ``a -> b``, files otherwise."""
    found = []
    for path in paths:
        name, _, target = path.partition(" -> ")
        if target:
            found.append(Entry(name, kind="symlink", target=target))
        elif name.endswith("/"):
            found.append(Entry(name[:-1], kind="directory"))
        else:
            found.append(Entry(name, 1, version))
    return found


def seen(*layers: list[Entry]) -> list[str]:
    return sorted(entry.path + ("/" if entry.kind == "directory" else "") for entry in merged(layers))


@pytest.mark.parametrize(
    ("layers", "meant"),
    [
        ([["a", "b"]], ["a", "b"]),
        ([["a"], ["b"]], ["a", "b"]),
        ([["a", "b"], [".wh.a"]], ["b"]),
        ([["d/", "d/a", "d/b"], ["d/.wh.a"]], ["d/", "d/b"]),
        ([["d/", "d/a", "d/x/y"], [".wh.d"]], []),
        ([["d/", "d/a"], [".wh.d", "d/", "d/b"]], ["d/", "d/b"]),
        ([["d/", "d/a", "d/x/", "d/x/y"], ["d/", "d/.wh..wh..opq", "d/b"]], ["d/", "d/b"]),
        ([["a", "d/b"], [".wh..wh..opq", "c"]], ["c"]),
        ([["a"], [".wh.a"], ["a"]], ["a"]),
        ([["a"], ["a", ".wh.a"]], ["a"]),
        ([["d/", "d/a"], ["d"]], ["d"]),
        ([["d/", "d/a"], ["d -> e"]], ["d"]),
        ([["d"], ["d/", "d/a"]], ["d/", "d/a"]),
        ([["d"], ["d/a"]], ["d/a"]),
        ([["d/a"], ["d/"]], ["d/", "d/a"]),
        ([["d/a", "d2/a"], [".wh.d"]], ["d2/a"]),
        ([["a"], [".wh..wh.plnk", ".wh..wh.aufs"]], ["a"]),
        ([["a", ".no.prefetch.landmark", "stargz.index.json"], [".prefetch.landmark"]], ["a"]),
        ([["d/stargz.index.json"]], ["d/stargz.index.json"]),
        ([["a"], [".wh.a"], [".wh.a"], ["b"]], ["b"]),
        ([["d/a"], [".wh.d"], ["d/b"]], ["d/b"]),
        ([["d/a"], ["d"], ["d/b"]], ["d/b"]),
    ],
)
def test_upper_layers_win(layers: list[list[str]], meant: list[str]) -> None:
    assert seen(*(layer(*paths) for paths in layers)) == sorted(meant)


def test_the_upper_of_two_files_is_the_one_that_is_read() -> None:
    (entry,) = merged([layer("a", version="low"), layer("a", version="high")])
    assert entry.version == "high"


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
STEPS = st.lists(st.tuples(st.sampled_from(["write", "mkdir", "remove", "empty"]), PATHS), max_size=6)


@given(st.lists(STEPS, max_size=4), st.randoms(use_true_random=False))
def test_merging_is_applying_one_layer_after_the_other(
    changes: list[list[tuple[str, str]]], chance: random.Random
) -> None:
    """What `merged` makes top down is what unpacking makes bottom up, as the specification describes it."""
    layers = [made_of(steps) for steps in changes]
    tree: dict[str, Entry] = {}
    for entries in layers:
        apply(tree, entries)
    shuffled = [chance.sample(entries, len(entries)) for entries in layers]
    assert {entry.path: entry for entry in merged(shuffled)} == tree


def made_of(steps: list[tuple[str, str]]) -> list[Entry]:
    """Return a layer without contradictions: no path twice, nothing inside of a file."""
    layer: dict[str, Entry] = {}
    for number, (what, path) in enumerate(steps):
        directory, _, name = path.rpartition("/")
        added = {
            "write": Entry(path, 1, str(number)),
            "mkdir": Entry(path, kind="directory"),
            "remove": Entry(f"{directory}/.wh.{name}".lstrip("/")),
            "empty": Entry(f"{path}/.wh..wh..opq"),
        }[what]
        parts = path.split("/")
        above = ["/".join(parts[:depth]) for depth in range(1, len(parts) + (what == "empty"))]
        inside = any(one in layer and layer[one].kind == "file" for one in above)
        taken = any(known == path or known.startswith(f"{path}/") for known in layer)
        if not inside and not (taken and what == "write"):
            layer.setdefault(added.path, added)
            for one in above:  # tars name the directories of what they hold
                layer.setdefault(one, Entry(one, kind="directory"))
    return list(layer.values())


def apply(tree: dict[str, Entry], layer: list[Entry]) -> None:
    """Change `tree` as unpacking `layer` over it does."""

    def drop(path: str, *, itself: bool = True) -> None:
        for known in [known for known in tree if known.startswith(f"{path}/") or (itself and known == path)]:
            del tree[known]

    for entry in layer:
        directory, _, name = entry.path.rpartition("/")
        if name == ".wh..wh..opq":
            drop(directory, itself=False)
        elif name.startswith(".wh."):
            drop(f"{directory}/{name[4:]}".lstrip("/"))
    for entry in sorted(layer, key=lambda entry: entry.path):
        if not entry.path.rpartition("/")[2].startswith(".wh."):
            if entry.kind != "directory" or tree.get(entry.path, entry).kind != "directory":
                drop(entry.path)
            tree[entry.path] = entry
