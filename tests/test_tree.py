"""The tree against a dict: names, inode numbers, refreshes and what the kernel still holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modelfs.tree import (
    Branch,
    Change,
    Directory,
    File,
    Folder,
    Link,
    Node,
    Text,
    Tree,
    difference,
    grow,
    inode,
    metadata,
    numbers,
)
from modelfs.types import Entry, Snapshot

NAMES = st.sampled_from(["a", "b", "config.json", "sub", "ü"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
LISTINGS = st.dictionaries(PATHS, st.integers(1, 3), max_size=8)


def snapshot(listing: dict[str, int], url: str = "mock://x") -> Snapshot:
    entries = [Entry(path, size=n, version=f"v{n}", mtime=float(n)) for path, n in listing.items()]
    return Snapshot.of(url, "", entries)


def shown(node: Node, prefix: str = "") -> dict[str, Entry]:
    """Return the files under `node` by path."""
    if isinstance(node, File):
        return {prefix: node.entry}
    assert isinstance(node, Directory)
    found: dict[str, Entry] = {}
    for name, child in node.children.items():
        found |= shown(child, f"{prefix}/{name}" if prefix else name)
    return found


def below(node: Node) -> list[Node]:
    """Return `node` and everything in it."""
    inside = list(node.children.values()) if isinstance(node, Directory) else []
    return [node, *(deeper for child in inside for deeper in below(child))]


@settings(deadline=None)
@given(LISTINGS)
def test_directories_carry_the_latest_time_and_count_their_directories(listing: dict[str, int]) -> None:
    for node in below(grow("m", snapshot(listing), None)):
        if isinstance(node, Directory):
            inside = node.children.values()
            assert node.mtime == max((child.mtime for child in inside), default=0.0)
            assert node.links == 2 + sum(isinstance(child, Directory) for child in inside)


@settings(deadline=None)
@given(LISTINGS)
def test_a_model_shows_exactly_its_snapshot(listing: dict[str, int]) -> None:
    snap = snapshot(listing)
    assert shown(grow("m", snap, None)) == dict(snap.entries)


@settings(deadline=None)
@given(LISTINGS)
def test_the_same_snapshot_gets_the_same_numbers(listing: dict[str, int]) -> None:
    def numbers(node: Node) -> dict[str, int]:
        assert isinstance(node, Directory)
        return {name: child.ino for name, child in node.children.items()}

    assert numbers(grow("m", snapshot(listing), None)) == numbers(grow("m", snapshot(listing), None))


def test_a_new_version_is_a_new_inode_and_a_directory_stays_itself() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"d/w": 1, "d/same": 1}), None))
    model = tree.root.children["m"]
    assert isinstance(model, Directory)
    directory = model.children["d"]
    assert isinstance(directory, Directory)
    old = {name: node.ino for name, node in directory.children.items()}
    changes = tree.put(("m",), grow("m", snapshot({"d/w": 2, "d/same": 1}), None))
    assert tree.root.children["m"] is model
    assert model.children["d"].ino == directory.ino
    assert directory.children["same"].ino == old["same"]
    assert directory.children["w"].ino != old["w"]
    # Its directory has a new time, and so has the model.
    assert changes[0] == Change(directory.ino, "w")
    assert {*changes[1:]} == {Change(directory.ino, ""), Change(model.ino, "")}


def test_the_kernel_is_told_of_names_below_a_directory_that_went_or_came() -> None:
    """It keeps those of open files, and finds them below the same inode when the directory is back."""
    tree = Tree()
    directory, deeper = inode("m", "f", "directory"), inode("m", "f/e", "directory")
    inside = {Change(directory, "d"), Change(directory, "e"), Change(deeper, "w")}
    tree.put(("m",), grow("m", snapshot({"f/d": 1, "f/e/w": 1, "z": 1}), None))
    assert inside <= {*tree.put(("m",), grow("m", snapshot({"f": 1, "z": 1}), None))}
    assert inside <= {*tree.put(("m",), grow("m", snapshot({"f/d/w": 1, "f/e/w": 1, "z": 1}), None))}


def test_the_kernel_is_told_of_names_below_a_model_that_can_no_longer_be_listed() -> None:
    tree = Tree()
    listed, later = snapshot({"d/w": 1}), snapshot({})
    tree.put(("m",), grow("m", listed, None))
    told = tree.put(
        ("m",), Folder(inode("m", "", "directory")), difference("m", listed.listing, later.listing)
    )
    assert {Change(1, "m"), Change(inode("m", "d", "directory"), "w")} <= {*told}


def test_the_kernel_is_told_of_names_below_a_folder_that_went() -> None:
    tree = Tree()
    tree.put(("a", "b", "c"), Text(inode("c"), content=b"1"))
    folders = [tree.root, tree.root.at(["a"]), tree.root.at(["a", "b"])]
    wanted = {Change(node.ino, name) for node, name in zip(folders, "abc", strict=True) if node}
    assert wanted == {*tree.put(("a",), Text(inode("a"), content=b"1"))}


def test_putting_the_same_file_again_changes_nothing() -> None:
    tree = Tree()
    assert tree.put(("x",), Text(inode("x"), content=b"1")) == [Change(1, "x")]
    again = Text(inode("x"), mtime=2.0, content=b"1")
    assert tree.put(("x",), again) == []
    assert tree.node(again.ino) is again


def test_what_the_kernel_holds_outlives_a_refresh_until_it_is_forgotten() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"w": 1, "x": 1}), None))
    model = tree.root.children["m"]
    assert isinstance(model, Directory)
    held, loose = model.children["w"], model.children["x"]
    tree.remember(held, 2)
    tree.put(("m",), grow("m", snapshot({"w": 2}), None))
    assert tree.node(held.ino) is held
    assert tree.node(loose.ino) is None
    tree.forget(held.ino, 1)
    assert tree.node(held.ino) is held
    tree.forget(held.ino, 1)
    assert tree.node(held.ino) is None


def test_a_listing_may_teach_a_number_that_already_left_the_tree() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"w": 1}), None))
    model = tree.root.children["m"]
    assert isinstance(model, Directory)
    node = model.children["w"]
    tree.put(("m",), grow("m", snapshot({"w": 2}), None))
    tree.remember(node)
    assert tree.node(node.ino) is node
    tree.forget(node.ino, 1)
    assert tree.node(node.ino) is None


def test_a_version_that_comes_back_is_the_old_inode_again() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"w": 1}), None))
    model = tree.root.children["m"]
    assert isinstance(model, Directory)
    node = model.children["w"]
    tree.remember(node)
    tree.put(("m",), grow("m", snapshot({"w": 2}), None))
    tree.put(("m",), grow("m", snapshot({"w": 1}), None))
    assert model.children["w"].ino == node.ino
    tree.remember(model.children["w"])
    tree.forget(node.ino, 1)
    assert tree.node(node.ino) is not None
    tree.forget(node.ino, 1)
    assert tree.node(node.ino) is None


def test_a_successor_answers_for_every_number_its_predecessor_gave() -> None:
    listing = {"a": 1, "d/b": 1, "d/e/c": 1}
    before, after = Tree(), Tree()
    for tree in (before, after):
        tree.put(("m",), grow("m", snapshot(listing), None))
    root = after.root.children["m"]
    assert isinstance(root, Branch)
    after.expect(root, numbers(root))
    after.put(("m",), grow("m", snapshot({"a": 2}), None))
    for node in below(before.root):
        known = after.node(node.ino)
        assert type(known) is type(node)
        assert not isinstance(known, File) or known.entry == node.entry  # type: ignore[attr-defined]
        after.remember(node)
        after.forget(node.ino, 1)
        assert after.node(node.ino) is not None, "it gave the number more often than we know"


def test_two_things_with_one_number_are_refused() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"a": 1, "b": 1}), None))
    one, other = (node for node in below(tree.root) if isinstance(node, File))
    other.ino = one.ino
    tree.remember(one)
    with pytest.raises(ValueError, match="two nodes have the inode number"):
        tree.remember(other)


@settings(deadline=None)
@given(LISTINGS, st.integers(0, 8))
def test_a_listing_goes_on_where_it_was_left(listing: dict[str, int], cut: int) -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot(listing), None))
    for node in below(tree.root):
        if isinstance(node, Directory):
            names = node.names()
            whole = list(names(0))
            assert [name for name, _, _ in whole] == sorted(node.children)
            if cut < len(whole):
                rest = [name for name, _, _ in names(whole[cut].next)]
                assert rest == [name for name, _, _ in whole[cut + 1 :]]


def test_a_listing_stays_as_it_was_when_it_began() -> None:
    tree = Tree()
    tree.put(("m",), grow("m", snapshot({"a": 1, "b": 1}), None))
    model = tree.root.children["m"]
    assert isinstance(model, Directory)
    names = model.names()
    tree.put(("m",), grow("m", snapshot({"c": 1}), None))
    assert [name for name, _, _ in names(0)] == ["a", "b"]
    assert list(model.children) == ["c"]


def test_names_of_two_parts_share_their_organisation() -> None:
    tree = Tree()
    tree.put(("org", "a"), grow("org/a", snapshot({"w": 1}), None))
    tree.put(("org", "b"), grow("org/b", snapshot({"w": 1}), None))
    assert sorted(shown(tree.root)) == ["org/a/w", "org/b/w"]
    tree.remove(("org", "a"))
    assert sorted(shown(tree.root)) == ["org/b/w"]
    tree.remove(("org", "b"))
    assert tree.root.children == {}


def test_a_symbolic_link_is_shown_and_one_that_leaves_the_model_is_not() -> None:
    entries = [
        Entry("v1/w", 1, "x"),
        Entry("latest", kind="symlink", target="v1"),
        Entry("out", kind="symlink", target="../other"),
        Entry("abs", kind="symlink", target="/etc/passwd"),
    ]
    snap = Snapshot.of("mock://x", "", entries)
    root = grow("m", snap, None)
    link = root.children["latest"]
    assert isinstance(link, Link)
    assert link.target == "v1"
    assert sorted(root.children) == ["latest", "v1"]
    assert {path for path, _ in snap.rejected} == {"out", "abs"}


def test_inode_numbers_leave_the_root_alone() -> None:
    assert all(inode(str(n)) > 1 for n in range(1000))
    assert all(inode(str(n)) < 2**63 for n in range(1000))


def test_metadata_is_yaml_and_names_every_model() -> None:
    import yaml

    rows: list[dict[str, Any]] = [{"name": 'org/"x"', "source": "hf://a/b", "size": 3, "digest": "sha256:00"}]
    read = yaml.safe_load(metadata("modelfs 1", rows))
    assert read["models"] == {'org/"x"': {"source": "hf://a/b", "size": 3, "digest": "sha256:00"}}
    assert yaml.safe_load(metadata("modelfs 1", [])) == {"generator": "modelfs 1", "models": {}}


@pytest.mark.parametrize("path", ["../x", "/abs", "a//b", "a/./b", "nul\0", "x" * 256, "new\nline", ""])
def test_a_hostile_name_never_reaches_the_tree(path: str) -> None:
    snap = Snapshot.of("mock://x", "", [Entry(path, 1, "v"), Entry("good", 1, "v")])
    assert shown(grow("m", snap, None)).keys() == {"good"}
    assert [p for p, _ in snap.rejected] == [path]


class TreeModel(RuleBasedStateMachine):
    """Refreshes, lookups and forgets in any order; a dict says what must be seen."""

    def __init__(self) -> None:
        super().__init__()
        self.tree = Tree()
        self.listings: dict[str, dict[str, Entry]] = {}
        self.held: dict[int, tuple[Node, int]] = {}

    @rule(name=st.sampled_from(["m", "n", "org/m"]), listing=LISTINGS)
    def refresh(self, name: str, listing: dict[str, int]) -> None:
        snap = snapshot(listing)
        before = self._names()
        changes = self.tree.put(tuple(name.split("/")), grow(name, snap, None))
        self.listings[name] = dict(snap.entries)
        after = self._names()
        told = {(change.parent, change.name) for change in changes}
        for key, ino in before.items():
            assert after.get(key) == ino or key in told, "the kernel is told of every name that changed"

    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        nodes = [node for node in below(self.tree.root) if node is not self.tree.root]
        if nodes:
            node = data.draw(st.sampled_from(nodes))
            self.tree.remember(node)
            self.held[node.ino] = (node, self.held.get(node.ino, (node, 0))[1] + 1)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        if self.held:
            ino = data.draw(st.sampled_from(sorted(self.held)))
            count = data.draw(st.integers(1, self.held[ino][1]))
            self.tree.forget(ino, count)
            node, left = self.held[ino]
            if left == count:
                del self.held[ino]
            else:
                self.held[ino] = (node, left - count)

    @invariant()
    def shows_what_was_put(self) -> None:
        wanted = {
            f"{name}/{path}": e for name, entries in self.listings.items() for path, e in entries.items()
        }
        assert shown(self.tree.root) == wanted

    @invariant()
    def every_number_the_kernel_may_use_answers(self) -> None:
        for ino, (node, _) in self.held.items():
            known = self.tree.node(ino)
            assert type(known) is type(node)
            assert not isinstance(known, File) or known.entry == node.entry  # type: ignore[attr-defined]

    def _names(self) -> dict[tuple[int, str], int]:
        return {
            (node.ino, name): child.ino
            for node in below(self.tree.root)
            if isinstance(node, Directory)
            for name, child in node.children.items()
        }


TestTreeModel = TreeModel.TestCase
TestTreeModel.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
