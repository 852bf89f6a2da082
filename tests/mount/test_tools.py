"""The tools of a shell see a mounted tree as they see the original, and cannot change it."""

from __future__ import annotations

import hashlib
import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.harness import Mounted, mounted, open_directory

BLOCK = 8 * 1024 * 1024
MANY = 600

Tree = dict[str, tuple[str, int | str, int]]
"""Path → kind, size or target, and modification time in whole milliseconds."""


@pytest.fixture(scope="module")
def original() -> Iterator[Path]:
    """A model as people leave them: shards, empty things, links, odd names and a crowded directory."""
    with open_directory() as parent:
        root = parent / "model"
        for name in ("1_Pooling", "variables/deep/er", "empty-directory", "crowd"):
            (root / name).mkdir(parents=True)
        noise = random.Random(5)
        (root / "config.json").write_text('{"model_type": "bert"}\n')
        (root / "1_Pooling" / "config.json").write_text("{}\n")
        (root / "empty").touch()
        (root / "model.safetensors").write_bytes(noise.randbytes(2 * BLOCK + 4097))
        (root / "one-block.bin").write_bytes(noise.randbytes(BLOCK))
        (root / "variables" / "deep" / "er" / "data-00000-of-00001").write_bytes(noise.randbytes(100_000))
        (root / "with space & ünïcode ☃.txt").write_text("x\n")
        for number in range(MANY):
            (root / "crowd" / f"vocabulary-{number:05}.txt").write_text(f"{number}\n")
        (root / "latest.safetensors").symlink_to("model.safetensors")
        (root / "current").symlink_to("variables/deep")
        for number, path in enumerate(sorted(root.rglob("*"), reverse=True)):
            when = 1_500_000_000_000_500_000 + number * 86_400_123_000_000
            os.utime(path, ns=(when, when), follow_symlinks=False)
        yield root


@pytest.fixture(scope="module")
def mount(original: Path, transport: str) -> Iterator[Mounted]:
    with open_directory() as place:
        sources = {"m": original.as_uri()}
        with mounted(place, "--allow-other", sources=sources, transport=transport) as own:
            yield own


@pytest.fixture
def model(mount: Mounted) -> Path:
    return mount.path / "m"


def tree_of(root: Path) -> Tree:
    """Return what is below `root`; links to files as the files they are shown as."""
    found: Tree = {}
    for path in root.rglob("*"):
        status = path.lstat()
        if stat.S_ISDIR(status.st_mode):
            row: tuple[str, int | str] = ("directory", 0)
        elif stat.S_ISLNK(status.st_mode) and path.is_dir():
            row = ("link", os.readlink(path))
        else:
            status = path.stat()
            row = ("file", status.st_size)
        found[str(path.relative_to(root))] = (*row, status.st_mtime_ns // 1_000_000)
    return found


def with_times_of_content(tree: Tree) -> Tree:
    """Return `tree` as modelfs shows it: each directory with the latest time of what is in it."""
    found = dict(tree)
    for path, (kind, _, _) in sorted(tree.items(), key=lambda row: -row[0].count("/")):
        if kind == "directory":
            inside = [time for name, (_, _, time) in found.items() if os.path.dirname(name) == path]
            found[path] = (kind, 0, max(inside, default=0))
    return found


def sums(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


# -- reading -------------------------------------------------------------------------------------------


def test_sha256sum_of_every_file_is_the_originals(mount: Mounted, model: Path, original: Path) -> None:
    paths = sorted(sums(original).items())
    listed = mount.run("sha256sum", *(str(model / path) for path, _ in paths)).stdout.splitlines()
    assert [line.split()[0] for line in listed] == [value for _, value in paths]


def test_find_finds_names_kinds_sizes_and_times(mount: Mounted, model: Path, original: Path) -> None:
    assert tree_of(model) == with_times_of_content(tree_of(original))
    out = mount.run("find", str(model), "-type", "f", "-name", "vocabulary-*", "-size", "-2k").stdout
    assert len(out.splitlines()) == MANY
    out = mount.run("find", str(model), "-empty", "-printf", "%P\\n").stdout
    assert sorted(out.splitlines()) == ["empty", "empty-directory"]


def test_ls_lists_what_it_lists_in_the_original(mount: Mounted, model: Path, original: Path) -> None:
    command = ("env", "-C")
    names = ("ls", "-1AR")
    assert mount.run(*command, str(model), *names).stdout == mount.run(*command, str(original), *names).stdout
    long = mount.run("ls", "-lR", "--time-style=full-iso", str(model))
    assert long.stderr == ""
    rows = [line.split() for line in long.stdout.splitlines() if line.endswith(" model.safetensors")]
    assert ["-r--r--r--", "1", str(2 * BLOCK + 4097)] in [[row[0], row[1], row[4]] for row in rows]


@pytest.mark.parametrize(
    "command",
    [
        "rsync -a {source}/ {copy}/",
        "cp -a {source}/. {copy}/",
        "tar -C {source} --format=posix -cf - . | tar -C {copy} -xf -",
    ],
    ids=["rsync", "cp", "tar"],
)
def test_a_copy_has_the_same_tree_bytes_and_times(
    command: str, mount: Mounted, model: Path, original: Path, place: Path
) -> None:
    copy = place / "copy"
    copy.mkdir()
    mount.run("sh", "-euc", command.format(source=model, copy=copy))
    assert tree_of(copy) == tree_of(model)
    assert sums(copy) == sums(original)


def test_rsync_finds_nothing_to_do_between_mount_and_original(
    mount: Mounted, model: Path, original: Path
) -> None:
    # The link to a file is shown as that file, and directories have times of their own.
    same = [
        "--recursive",
        "--links",
        "--times",
        "--omit-dir-times",
        "--checksum",
        "--delete",
        "--exclude=latest.safetensors",
    ]
    out = mount.run("rsync", *same, "--dry-run", "--itemize-changes", f"{model}/", f"{original}/").stdout
    assert out == ""


def test_du_counts_the_bytes_of_files(mount: Mounted, model: Path, original: Path) -> None:
    sizes = {str(model / path): (original / path).stat().st_size for path in sums(original)}
    out = mount.run("du", "--apparent-size", "--block-size=1", "--all", str(model)).stdout
    shown = {path: int(size) for size, _, path in (line.partition("\t") for line in out.splitlines())}
    assert {path: shown[path] for path in sizes} == sizes
    link = len(os.readlink(original / "current"))
    assert shown[str(model)] == sum(sizes.values()) + link
    used = int(mount.run("du", "--block-size=512", "--summarize", str(model)).stdout.split()[0])
    assert used == sum(-(-size // 512) for size in [*sizes.values(), link])


def test_stat_and_df_tell_what_it_is(mount: Mounted, model: Path) -> None:
    form = "%F %s %A %h %U"
    out = mount.run("stat", "-c", form, str(model / "one-block.bin"), str(model), str(model / "current"))
    file, directory, link = out.stdout.splitlines()
    assert file == f"regular file {BLOCK} -r--r--r-- 1 root"
    assert directory.startswith("directory ")
    assert " dr-xr-xr-x " in directory
    assert link.startswith("symbolic link ")
    columns = "--output=source,fstype,avail,pcent,target"
    row = mount.run("df", "--block-size=1", columns, str(model)).stdout.splitlines()[1].split()
    assert row == ["modelfs", "fuse.modelfs", "0", "100%", str(mount.path)]


def test_getfattr_shows_where_a_file_comes_from(mount: Mounted, model: Path, original: Path) -> None:
    mount.run("cksum", str(model / "one-block.bin"))
    out = mount.run("getfattr", "--absolute-names", "-d", str(model / "one-block.bin")).stdout
    rows = dict(line.split("=", 1) for line in out.splitlines() if line.startswith("user."))
    assert rows["user.modelfs.source"] == f'"{original.as_uri()}"'
    assert rows["user.modelfs.cached_bytes"] == f'"{BLOCK}"'
    assert set(rows) >= {"user.modelfs.version"}


@pytest.mark.parametrize(
    "command",
    [
        "tail -c 5000 {file} | sha256sum",
        "head -c 8388700 {file} | sha256sum",
        "dd if={file} bs=100k skip=81 count=3 status=none | sha256sum",
        "dd if={file} bs=1M iflag=direct status=none | sha256sum",
        "od -A d -t x1 -j 8388600 -N 64 {file}",
        "wc -c < {file}",
        "cmp {file} {original}/model.safetensors",
        "grep -c . {directory}/crowd/vocabulary-00042.txt",
        "cat {directory}/crowd/* | sha256sum",
        "cp {file} {scratch}/copy && sha256sum < {scratch}/copy",
        "cd {directory}/variables/deep/../.. && sha256sum < current/er/data-00000-of-00001",
    ],
)
def test_reading_in_parts_gives_the_bytes_of_the_original(
    command: str, mount: Mounted, model: Path, original: Path, place: Path
) -> None:
    outputs = []
    for directory in (original, model):
        file = directory / "model.safetensors"
        words = command.format(file=file, directory=directory, original=original, scratch=place)
        outputs.append(mount.run("sh", "-euc", words).stdout)
    assert outputs[0] == outputs[1]


def test_another_user_reads_and_lists_everything(mount: Mounted, model: Path, original: Path) -> None:
    paths = sorted(sums(original))
    listed = mount.run("find", str(model), "-type", "f", "-readable", user="nobody").stdout.splitlines()
    assert len(listed) == len(paths)
    out = mount.run("sha256sum", str(model / "model.safetensors"), user="nobody").stdout
    assert out.split()[0] == sums(original)["model.safetensors"]


# -- changing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", [None, "nobody"])
@pytest.mark.parametrize(
    "command",
    [
        "touch {file}",
        "touch {model}/new",
        "rm -f {file}",
        "rm -rf {model}/crowd",
        "mkdir {model}/new",
        "rmdir {model}/empty-directory",
        "mv {file} {model}/other",
        "mv {model} {model}-renamed",
        "cp /etc/hostname {file}",
        "cp /etc/hostname {model}/new",
        "ln {file} {model}/new",
        "ln -s config.json {model}/new",
        "truncate -s 0 {file}",
        "chmod 777 {file}",
        "chown 1:1 {file}",
        "sed -i s/bert/gpt/ {file}",
        "setfattr -n user.mine -v 1 {file}",
        "echo x > {file}",
        "echo x >> {file}",
        "mkfifo {model}/new",
        "mkdir {model}/../new",
    ],
)
def test_no_tool_can_change_anything(command: str, user: str | None, mount: Mounted, model: Path) -> None:
    before = sums(model / "1_Pooling"), sorted(os.listdir(model)), (model / "config.json").read_bytes()
    words = command.format(file=model / "config.json", model=model)
    result = mount.run("sh", "-c", words, user=user, check=False, env={"LC_ALL": "C"})
    assert result.returncode != 0
    refusals = (
        ["Read-only file system"] if user is None else ["Read-only file system", "not permitted", "denied"]
    )
    assert any(refusal in result.stderr for refusal in refusals), result.stderr
    assert before == (
        sums(model / "1_Pooling"),
        sorted(os.listdir(model)),
        (model / "config.json").read_bytes(),
    )
