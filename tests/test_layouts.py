"""Nodes of a repository: the files of the model under other names and numbers."""

from __future__ import annotations

from collections.abc import Iterator

from modelfs.layouts import Holder, repository
from modelfs.tree import Branch, Change, Directory, File, Folder, Node, Text, Tree, grow, numbers
from modelfs.types import Entry, Snapshot

PATH = ".hub/models--org--name"
OLD, NEW = "0" * 40, "1" * 40


def snapshot(commit: str, *names: str) -> Snapshot:
    entries = [Entry(name, 10, f"version {commit}", mtime=5.0) for name in names]
    return Snapshot.of("hf://org/name@main", commit, entries).packed()


def holders(*snapshots: Snapshot, model: str = "model") -> list[Holder[str]]:
    return [Holder(model, "main", snapshots)]


def walk(node: Node, path: str = "") -> Iterator[tuple[str, Node]]:
    yield path, node
    if isinstance(node, Directory):
        for name, below in node.children.items():
            yield from walk(below, f"{path}/{name}")


def text(folder: Folder, *path: str) -> bytes | None:
    node = folder.at(path)
    return node.content if isinstance(node, Text) else None


def test_files_are_those_of_the_model() -> None:
    listed = snapshot(NEW, "config.json", "1_Pooling/config.json")
    folder = repository(PATH, holders(listed))
    file = folder.at(["snapshots", NEW, "1_Pooling", "config.json"])
    assert isinstance(file, File)
    assert (file.model, file.entry) == ("model", listed.entries["1_Pooling/config.json"])
    assert text(folder, "refs", "main") == NEW.encode()
    assert text(folder, ".no_exist", NEW, "adapter_config.json") == b""
    assert text(folder, ".no_exist", NEW, "config.json") is None
    assert folder.mtime == 5.0


def test_numbers_are_the_same_in_the_next_process_and_nobody_elses() -> None:
    listed = snapshot(NEW, "config.json", "a/b")
    seen = {path: node.ino for path, node in walk(repository(PATH, holders(listed)))}
    assert {path: node.ino for path, node in walk(repository(PATH, holders(listed)))} == seen
    plain = {node.ino for _, node in walk(grow("org/name", listed, "model"))}
    assert len({*seen.values(), *plain}) == len(seen) + len(plain)


def test_what_was_before_stays_until_there_is_something_newer() -> None:
    tree = Tree()
    place = (".hub", "models--org--name")
    one, two, three = (snapshot(digit * 40, "config.json") for digit in "012")
    tree.put(place, repository(PATH, holders(one)))
    first = tree.root.at([*place, "snapshots", one.revision])
    assert isinstance(first, Branch)
    tree.remember(first)
    changes = tree.put(place, repository(PATH, holders(two, one)))
    refs, snapshots = tree.root.at([*place, "refs"]), tree.root.at([*place, "snapshots"])
    assert isinstance(refs, Folder)
    assert isinstance(snapshots, Folder)
    assert {Change(refs.ino, "main"), Change(snapshots.ino, two.revision)} <= set(changes)
    assert snapshots.children[one.revision] is first
    tree.put(place, repository(PATH, holders(three, two)))
    assert set(snapshots.children) == {two.revision, three.revision}
    assert tree.node(first.ino) is first  # somebody is in it


def test_nothing_changes_when_the_same_is_put_again() -> None:
    tree = Tree()
    listed = snapshot(NEW, "config.json")
    tree.put((".hub", "r"), repository(".hub/r", holders(listed)))
    assert tree.put((".hub", "r"), repository(".hub/r", holders(listed))) == []


def test_two_models_in_one_repository() -> None:
    tagged = Holder("tagged", "v1", [snapshot(OLD, "config.json")])
    folder = repository(PATH, [tagged, *holders(snapshot(NEW, "config.json"))])
    assert text(folder, "refs", "v1") == OLD.encode()
    assert text(folder, "refs", "main") == NEW.encode()
    models = {commit: folder.at(["snapshots", commit, "config.json"]) for commit in (OLD, NEW)}
    assert {c: node.model for c, node in models.items() if isinstance(node, File)} == {
        OLD: "tagged",
        NEW: "model",
    }


def test_a_successor_answers_for_the_numbers_of_a_repository() -> None:
    tree = Tree()
    listed = snapshot(NEW, "config.json")
    tree.put((".hub", "models--org--name"), repository(PATH, holders(listed)))
    (root,) = tree.branches()
    tree.expect(root, numbers(root))
    file = root.children["config.json"]
    found = tree.node(file.ino)
    assert isinstance(found, File)
    assert found.entry.path == "config.json"


def test_a_directory_can_be_found_without_being_listed() -> None:
    tree = Tree()
    tree.put((".hub",), Folder(77, listed=False))
    tree.put((".hub", "a"), repository(".hub/a", holders(snapshot(NEW, "config.json"))))
    tree.put(("model",), grow("model", snapshot(NEW, "config.json"), "model"))
    assert [name for name, _, _ in tree.root.names()(0)] == ["model"]
    assert tree.root.links == 3
    assert ".hub" in tree.root.children
