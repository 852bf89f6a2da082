"""What the command line promises where nothing has to be mounted."""

from __future__ import annotations

import _ctypes
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import trio
from rich.console import Console

import modelfs
from modelfs import cli, control, daemon
from modelfs.cli import launch, show
from modelfs.daemon import Ready
from modelfs.errors import CacheLocked, ConfigError, ModelfsError, MountError, NotFound, Unavailable
from modelfs.fuse import mountpoint
from tests.status_document import document
from tests.test_control import FakeDaemon, serve

ROOT = Path(modelfs.__file__).parents[1]


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory and no daemons but one's own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("MODELFS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MODELFS_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("MODELFS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # for processes of their own, if it is not installed
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line in this process; return its exit code, output and errors."""

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out, err

    return call


def one_line(err: str) -> str:
    assert err.startswith("modelfs: ")
    assert err.count("\n") == 1
    return err.removeprefix("modelfs: ").rstrip()


# -- help, version, wrong words


def test_the_version_is_the_packages(run: Any) -> None:
    assert run("--version") == (0, "modelfs 0.1.0\n", "")


@pytest.mark.parametrize(
    "command",
    [
        *("", "mount", "umount", "status", "refresh", "lock", "ls", "bench", "config", "config check"),
        *("verify", "prefetch", "pin", "unpin", "evict", "gc"),
    ],
)
def test_every_command_explains_itself(command: str, run: Any) -> None:
    for flag in ("-h", "--help"):
        code, out, err = run(*command.split(), flag)
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: modelfs {command}".rstrip())
        assert "Commands:" in out or command in ("config check",) or "Options:" in out


NAMED = (
    *("mount", "ls", "status", "umount", "lock", "verify"),
    *("prefetch", "pin", "unpin", "evict", "gc"),
)
"""Commands whose help has examples, or is named in those of others."""


def test_examples_in_the_help_are_commands_that_parse(run: Any) -> None:
    text = "".join(run(*words, "-h")[1] for words in ((), *((name,) for name in NAMED)))
    examples = re.findall(rf"^ +modelfs ((?:{'|'.join(NAMED)})\b.*)$", text, re.MULTILINE)
    assert len(examples) >= 25
    for example in examples:
        words = re.split(r"\s{3,}", example)[0].split()
        # A wrong option is refused before -h is acted on only if it stands in front of it.
        assert run(*words, "-h")[0] == 0, example


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["frob"], "No such command 'frob'"),
        (["mont", "/x"], "Did you mean 'mount'"),
        (["mount"], "Missing argument 'MOUNTPOINT'"),
        (["umount"], "Missing argument 'MOUNTPOINT'"),
        (["ls"], "Missing argument 'URL'"),
        (["mount", "/x", "--chache-dir", "y"], "--cache-dir"),
        (["status", "--jsno"], "--json"),
    ],
)
def test_a_wrong_command_line_exits_with_2(words: list[str], hint: str, run: Any) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("Usage: ")
    assert hint in err


# -- errors


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ConfigError("a\nb"), 3, "a b"),
        (MountError("m"), 4, "m"),
        (CacheLocked("c"), 5, "c"),
        (NotFound("n"), 6, "n"),
        (Unavailable("u", retry_after=3), 6, "u"),
        (ModelfsError("\x1b[31mred"), 1, r"\x1b[31mred"),
        (RuntimeError("r"), 1, "unexpected RuntimeError: r: set MODELFS_LOG_LEVEL=debug for the traceback"),
    ],
)
def test_each_class_of_errors_is_one_line_and_an_exit_code(
    error: Exception, code: int, text: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(control, "mounts", fail)
    found, out, err = run("status")
    assert (found, out, one_line(err)) == (code, "", text)


def test_debug_shows_the_traceback(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("r")

    monkeypatch.setattr(control, "mounts", fail)
    monkeypatch.setenv("MODELFS_LOG_LEVEL", "debug")
    assert "in fail" in run("status")[2]


def test_ctrl_c_exits_with_130(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(control, "mounts", interrupt)
    assert run("status") == (130, "", "")


def test_the_exit_codes_are_documented() -> None:
    text = (ROOT / "docs/cli.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text, re.MULTILINE))
    assert set(rows) == {"0", "1", "2", "130", "143", *(str(code) for _, code in cli.EXIT_CODES)}
    for kind, code in cli.EXIT_CODES:
        if kind is not Exception:
            assert f"`{kind.__name__}`" in rows[str(code)]


# -- mount, before there is a daemon


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["none"], 4, r"/none does not exist: mkdir -p .*/none$"),
        (["file"], 4, r"/file is not a directory: choose"),
        (["full"], 4, r"/full is not empty: choose an empty directory$"),
        (["empty", "--config", "none.yaml"], 3, r"none.yaml: cannot be read: No such file"),
        (["empty", "--config", "bad.yaml"], 3, r"bad.yaml:2: unknown key 'cach'; did you mean 'cache'\?$"),
        (["empty", "--source", "x"], 3, r"--source: write it as NAME=URL"),
        (["empty", "--source", "a=file:///x", "--source", "a=file:///x"], 3, r"'a': a store is there twice"),
        (["empty", "--source", "../a=file:///x"], 3, r"model name '../a': it holds the component '..'"),
        (["empty", "--source", "a=nope://x"], 3, r"unknown scheme nope://: known are .*s3"),
        (["empty", "--source", "a=file://host/x"], 3, r"names the host 'host'"),
        (["empty", "--cache-size", "lots"], 3, r"^--cache-size: cache.size: 'lots' is not a size"),
        (["empty", "--cache-dir", "empty/cache"], 3, r"the cache directory .* is inside the mountpoint"),
        (["empty", "--refresh", "often"], 3, r"^--refresh: refresh: 'often' is not a duration"),
        (
            ["empty", "--transport", "nfs"],
            3,
            r"^--transport: transport: 'nfs' is not one of auto, kernel, pyfuse3",
        ),
        (["empty", "--log-level", "loud"], 3, r"^--log-level: log_level: 'loud' is not one of debug"),
        (
            ["empty", "--log-file", "file/log"],
            4,
            r"the log .*/file/log cannot be written: File exists: use --log",
        ),
    ],
)
def test_a_mount_that_cannot_be_is_refused_in_one_line(
    words: list[str], code: int, text: str, run: Any, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process() -> int:
        raise AssertionError("a process was started")

    monkeypatch.setattr(os, "fork", no_process)
    (world / "file").touch()
    (world / "full/x").mkdir(parents=True)
    (world / "empty").mkdir()
    (world / "bad.yaml").write_text("models: {}\ncach: {}\n")
    if words[0] == "empty" and code == 4 and not Path("/dev/fuse").exists():
        pytest.skip("needs /dev/fuse")
    found, out, err = run("mount", *words)
    assert (found, out) == (code, "")
    assert re.search(text, one_line(err)), err


def not_found(ready: Ready) -> None:
    raise NotFound("no bucket: make it")


def bug(ready: Ready) -> None:
    raise KeyError("x")


def lie(ready: Ready) -> None:
    ready({})


def die(ready: Ready) -> None:
    os._exit(1)


@pytest.mark.parametrize(
    ("does", "error", "text"),
    [
        (not_found, NotFound, "^no bucket: make it$"),
        (bug, ModelfsError, "^unexpected KeyError: see .*/log$"),
        (lie, MountError, "is not a modelfs mount although its daemon says so$"),
        (die, MountError, "^the daemon ended before it was ready: it said nothing: see "),
    ],
)
def test_what_the_daemon_says_reaches_the_user(
    does: Callable[[Ready], None],
    error: type[ModelfsError],
    text: str,
    world: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (world / "empty").mkdir()
    (world / "log").write_text("of an earlier daemon\n")
    settings = cli.config.load(mountpoint=world / "empty", flags={"log_file": "log"})
    monkeypatch.setattr(daemon, "run", lambda settings, ready, held: does(ready))
    with pytest.raises(error, match=text) as caught:
        launch.background(settings)
    assert type(caught.value) is error


def test_logs_have_names_that_tell_the_mountpoint() -> None:
    names = [
        launch.default_log_file(Path(place), {}).name for place in ("/app/models", "/app-models", "/a b", "/")
    ]
    assert names == ["app-models.log", r"app\x2dmodels.log", r"a\x20b.log", "-.log"]
    assert len({launch.default_log_file(Path(f"/{n}/{'x' * 900}"), {}).name for n in range(2)}) == 2


def test_only_our_own_log_is_verbose(capfd: pytest.CaptureFixture[str]) -> None:
    root, ours = logging.getLogger(), logging.getLogger("modelfs")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    try:
        launch.log_to(None, "debug")
        logging.getLogger("httpx").info("GET https://bucket/x?signature=hush")
        logging.getLogger("modelfs.x").debug("seen")
    finally:
        for handler in root.handlers[:]:
            root.removeHandler(handler)
        for handler in handlers:
            root.addHandler(handler)
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
    assert re.fullmatch(r"\S+ \S+ DEBUG modelfs.x: seen\n", capfd.readouterr().err)


# -- umount


def test_unmounting_what_is_not_mounted_is_refused(run: Any, world: Path) -> None:
    code, _, err = run("umount", str(world))
    assert code == 4
    assert one_line(err) == f"{world} is not mounted: modelfs status lists what is"


def test_a_mount_of_something_else_is_left_alone(run: Any) -> None:
    code, _, err = run("umount", "/proc")
    assert code == 4
    assert one_line(err) == "/proc is a mount of type proc, not one of modelfs: umount /proc"


# -- mountpoints, as far as they can be looked at without mounting


def test_the_table_of_mounts_is_unescaped(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "36 35 98:0 /mnt1 /a\\040b\\134\\012 rw,noatime master:1 - ext3 /dev/root rw\n"
        "37 35 0:48 / /models ro,nosuid,nodev - fuse.modelfs modelfs ro,user_id=0\n"
    )
    first, second = mountpoint.mounts(table)
    assert (first.path, first.device, first.ours) == (Path("/a b\\\n"), "98:0", False)
    assert (second.path, second.device, second.ours) == (Path("/models"), "0:48", True)


def test_the_mounts_of_this_machine_can_be_read() -> None:
    found = mountpoint.mount_at(Path("/proc"))
    assert found is not None
    assert (found.fstype, found.ours) == ("proc", False)


def test_symbolic_links_to_a_mountpoint_are_followed(world: Path) -> None:
    (world / "link").symlink_to(world / "real")
    assert mountpoint.canonical(Path("link")) == world / "real"
    assert mountpoint.canonical(Path("none/../x")) == world / "x"
    assert mountpoint.canonical(Path("/")) == Path("/")


def test_a_call_that_does_not_return_is_given_up() -> None:
    read, write = os.pipe()
    try:
        with pytest.raises(TimeoutError):
            mountpoint.within(0.05, lambda: os.read(read, 1))
    finally:
        os.write(write, b"x")
        os.close(write)
    with pytest.raises(ZeroDivisionError):
        mountpoint.within(20, lambda: 1 // 0)
    assert mountpoint.within(20, lambda: None) is None
    os.close(read)


def test_those_who_use_a_directory_are_found(world: Path) -> None:
    (world / "used").mkdir()
    (world / "used/file").touch()
    shutil.copy(_ctypes.__file__, world / "used/library")
    code = {
        "cwd": "import os, sys; os.chdir(sys.argv[1])",
        "open": "import sys; f = open(sys.argv[1] + '/file')",
        "mapped": "import ctypes, sys; ctypes.CDLL(sys.argv[1] + '/library')",
    }
    for how, words in code.items():
        wait = "; print('up', flush=True); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", words + wait, "used"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            found = mountpoint.holders(world / "used")
            process.communicate()
        assert [pid for pid, _ in found] == [process.pid], how
    assert mountpoint.holders(world / "used") == []
    assert mountpoint.holders(world / "use") == []


# -- status and refresh


def with_daemon(words: list[str], mount: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own while a daemon says that it serves `mount`."""

    async def main() -> subprocess.CompletedProcess[str]:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve, FakeDaemon(str(mount)), control.socket_path(mount))
            command = [sys.executable, "-m", "modelfs", *words]
            raw = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
            nursery.cancel_scope.cancel()
        return subprocess.CompletedProcess(command, raw.returncode, raw.stdout.decode(), raw.stderr.decode())

    return trio.run(main)


def test_the_status_of_one_mount_and_of_all(world: Path) -> None:
    one = with_daemon(["status", "--json", str(world / "m")], world / "m")
    every = with_daemon(["status", "--json"], world / "m")
    assert (one.returncode, every.returncode) == (0, 0)
    assert json.loads(every.stdout) == [json.loads(one.stdout)]
    assert json.loads(one.stdout)["mountpoint"] == str(world / "m")
    assert with_daemon(["status"], world / "m").stdout.startswith(f"{world / 'm'}\n  modelfs 0.1.0, pid ")


def test_a_refresh_shows_what_became_of_the_models(world: Path) -> None:
    shown = with_daemon(["refresh", str(world / "m"), "finbert"], world / "m")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "finbert" in shown.stdout


def test_the_status_of_nothing(run: Any, world: Path) -> None:
    assert run("status") == (0, "nothing is mounted\n", "")
    assert run("status", "--json") == (0, "[]\n", "")
    code, out, err = run("status", str(world))
    assert (code, out) == (4, "")
    assert one_line(err) == f"{world} is not mounted by you: modelfs status lists what is"


def rendered(data: Mapping[str, Any], width: int = 200) -> str:
    out = Console(file=io.StringIO(), width=width, markup=False, highlight=False, emoji=False, soft_wrap=True)
    show.status(out, data, now=1_700_000_000 + 3725)
    assert isinstance(out.file, io.StringIO)
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines())


def test_a_status_says_everything_that_matters() -> None:
    assert (
        rendered(document())
        == """\
/models
  modelfs 0.1.0, pid 4242, up 1h 2m, 90.0 MiB of memory
  transport  pyfuse3: asked for
  config     /etc/modelfs/config.yaml
  log        /var/log/modelfs/models.log
  cache      3.0 GiB of 50.0 GiB in 1 object, 200.0 GiB free, /var/cache/modelfs
  fs-verity  off: the kernel or the file system has no fs-verity
  scrub      reading everything for 1h 0m, nothing bad, at most 20.0 MiB/s
  reads      5.0 MiB, 80% of it cached before, 2 open files, errors: Unavailable 3
  fetches    8.0 MiB in 12 requests, 0 under way, 1 tried again, errors: none
  on demand  hf/

MODEL    STATE        REVISION      FILES       SIZE         CACHED  SOURCE
finbert  ready        4556d1301521      9  953.7 MiB  238.4 MiB 25%  hf://ProsusAI/finbert@main
gone     unavailable  -                 -          -              -  s3://nobody/gone
finbert: s3://mirror/ is failing (s3://mirror/: no answer); hf://ProsusAI/finbert@main serves
finbert: pytorch_model.bin is a suspicious pickle: it imports posix.system
finbert: pinned, what is cached of it stays
finbert: 12 files of the store hidden by its filters
finbert: 2 paths of the store cannot be shown: modelfs ls --long says which
gone: s3://nobody/gone: no such bucket: check the name"""
    )


def test_a_status_without_the_optional_parts() -> None:
    reads = {"bytes": 0, "hit_bytes": 0, "hit_ratio": None, "errors": {}}
    text = rendered(document(models=[], namespaces=[], config=None, log=None, reads=reads))
    assert "config" not in text
    assert "log  " not in text
    assert "reads      0 B, 2 open files, errors: none" in text
    assert text.endswith("no models yet: they appear when their path is first used")


def test_names_from_stores_cannot_steer_the_terminal() -> None:
    model = document()["models"][1] | {
        "name": "[red]\x1b]0;x\x07",
        "why": "bad\r\x1b[2J",
        "revision": "\x9b31m",
    }
    text = rendered(document(models=[model]))
    assert re.search(r"\[red\]\\x1b\]0;x\\x07", text)
    assert all(c.isprintable() or c == "\n" for c in text)


def test_a_model_served_from_disk_is_called_offline() -> None:
    model = document()["models"][0] | {"offline": True}
    assert re.search(r"finbert +offline ", rendered(document(models=[model])))


def test_one_line_says_what_a_new_mount_offers() -> None:
    assert show.mounted(document()) == (
        "mounted /models: 2 models (1 ready), on demand: hf/; "
        "status: modelfs status /models, unmount: modelfs umount /models"
    )
    ready = document(models=document()["models"][:1], namespaces=[])
    assert show.mounted(ready).startswith("mounted /models: 1 model; status: ")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536 * 1024, "1.5 MiB"), (2**60, "1024.0 PiB")],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert show.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-5, "0s"), (59.9, "59s"), (3600, "1h 0m"), (90061, "1d 1h"), (61, "1m 1s")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


# -- ls


@pytest.fixture
def model(world: Path) -> Path:
    path = world / "model"
    (path / "onnx").mkdir(parents=True)
    (path / "config.json").write_text("{}")
    (path / "onnx/model.onnx").write_bytes(b"x" * 2048)
    (path / "onnx/[bold]").write_bytes(b"")
    return path


def test_ls_lists_files_with_their_sizes(model: Path, run: Any) -> None:
    code, out, err = run("ls", f"file://{model}")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert rows[0] == ["SIZE", "PATH"]
    assert ["2", "B", "config.json"] in rows
    assert ["2.0", "KiB", "onnx/model.onnx"] in rows
    assert ["0", "B", "onnx/[bold]"] in rows


def test_ls_long_adds_revision_and_totals(model: Path, run: Any) -> None:
    code, out, _ = run("ls", "--long", f"file://{model}", "onnx")
    assert code == 0
    assert re.match(rf"file://{model} at revision \w+\n", out)
    assert re.search(r"^2048 +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +- +onnx/model.onnx *$", out, re.MULTILINE)
    assert "config.json" not in out
    assert out.endswith("2 files, 2.0 KiB\n")


def test_ls_json_is_for_programs(model: Path, run: Any) -> None:
    code, out, _ = run("ls", "--json", f"file://{model}", "/config.json/")
    data = json.loads(out)
    assert code == 0
    assert (data["url"], data["complete"], data["rejected"]) == (f"file://{model}", True, [])
    (entry,) = data["entries"]
    assert (entry["path"], entry["kind"], entry["size"]) == ("config.json", "file", 2)
    assert set(entry) == {"path", "kind", "size", "version", "digest", "mtime", "target"}


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["file:///none/of/this"], 6, "/none/of/this"),
        (["file://{model}", "nothing"], 6, "file://{model} has no nothing$"),
        (["model"], 3, "'model' is not a store URL"),
        (["nope://x"], 3, "unknown scheme nope://"),
        (["file://{model}", "--option", "x=1"], 3, "unknown option 'x'"),
        (
            ["file://{model}", "--option", "x"],
            3,
            "^--option x: write it as NAME=VALUE$|^--option …: write it",
        ),
        (["file://{model}", "--config", "none"], 3, "none: cannot be read"),
    ],
)
def test_what_ls_cannot_list_is_one_line(
    words: list[str], code: int, text: str, model: Path, run: Any
) -> None:
    found, out, err = run("ls", *(word.format(model=model) for word in words))
    assert (found, out) == (code, "")
    assert re.search(text.format(model=model), one_line(err)), err


def test_ls_uses_the_store_options_of_the_configuration(model: Path, run: Any) -> None:
    Path("modelfs.yaml").write_text("stores:\n  'file://': {colour: hush}\n")
    code, _, err = run("ls", f"file://{model}")
    assert code == 3
    assert "unknown option 'colour'" in one_line(err)
    assert "hush" not in err


# -- config check


def test_a_good_configuration_is_shown_without_secrets(run: Any, world: Path) -> None:
    Path("c.yaml").write_text(
        "models:\n  a: {source: 'https://user:hush@host/dir/', pin: true}\n  b: s3://bucket/\n"
        "stores: {'s3://': {profile: hush}}\ncache: {dir: /c, size: 1GiB, min_free: 2GiB}\nrefresh: 0\n"
    )
    env = os.environ.pop("MODELFS_CACHE_DIR")
    try:
        code, out, err = run("config", "check", "c.yaml")
        as_json = run("config", "check", "c.yaml", "--json")[1]
    finally:
        os.environ["MODELFS_CACHE_DIR"] = env
    assert (code, err) == (0, "")
    assert out.startswith(f"{world}/c.yaml: ok\n  cache      1.0 GiB in /c, leaving 2.0 GiB free\n")
    assert "refresh    never" in out
    assert re.search(r"^a +https://host/dir/ +pin *$", out, re.MULTILINE)
    assert re.search(r"^b +s3://bucket/ +profile *$", out, re.MULTILINE)
    data = json.loads(as_json)
    assert data["store_options"] == {"s3://": ["profile"]}
    assert [model["sources"] for model in data["models"]] == [["https://host/dir/"], ["s3://bucket/"]]
    assert "hush" not in out + as_json


def test_a_bad_configuration_is_one_line_with_its_place(run: Any) -> None:
    Path("modelfs.yaml").write_text("models:\n  a: s3://x/\ncash: 1\n")
    code, out, err = run("config", "check")
    assert (code, out) == (3, "")
    assert one_line(err).endswith("modelfs.yaml:3: unknown key 'cash'; did you mean 'cache'?")


# -- the process


def test_the_module_is_the_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "modelfs", "umount", "/nowhere"], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (4, "")
    assert one_line(result.stderr) == "/nowhere is not mounted: modelfs status lists what is"


def test_a_reader_that_goes_away_is_no_error(model: Path) -> None:
    for number in range(1000):
        (model / f"{number:04}{'x' * 100}").touch()
    words = [sys.executable, "-m", "modelfs", "ls", f"file://{model}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


# -- verify


def test_verify_needs_to_know_which_mount(run: Any, world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("verify")
    assert (code, out) == (4, "")
    assert one_line(err) == "nothing is mounted: name a directory with --cache-dir, or mount first"
    found = [control.Record(Path(place), 1, 0.0, "0.1.0") for place in ("/a", "/b")]
    monkeypatch.setattr(control, "mounts", lambda: found)
    code, _, err = run("verify", "finbert")
    assert (code, one_line(err)) == (4, "name one of your mounts with --mountpoint: /a, /b")
    code, _, err = run("verify", "finbert", "--cache-dir", str(world))
    assert code == 3
    assert one_line(err).startswith("--cache-dir checks a whole directory: leave MODEL")


def test_what_a_verification_found_is_told_line_by_line() -> None:
    bad = {"name": "m/w\x1b.bin", "key": "k", "faults": ["block 1 is bad", "block 2 is bad"], "dropped": 2048}
    out = Console(file=io.StringIO(), width=200, markup=False, highlight=False, soft_wrap=True)
    show.verified(out, {"objects": 2, "bytes": 1024**2, "bad": [bad]})
    assert isinstance(out.file, io.StringIO)
    assert out.file.getvalue().splitlines() == [
        "verified 1.0 MiB in 2 objects: 1 object bad, 2.0 KiB discarded, to be fetched again",
        r"m/w\x1b.bin: block 1 is bad",
        r"m/w\x1b.bin: block 2 is bad",
    ]


# -- lock


def test_nothing_to_lock_is_told(run: Any) -> None:
    code, out, err = run("lock")
    assert (code, out) == (3, "")
    assert one_line(err).startswith(
        "there is no model to lock: name one in the configuration or with --source"
    )


def test_a_lock_that_is_not_there_is_told_by_mount(world: Path) -> None:
    (world / "empty").mkdir()
    settings = cli.config.load(
        mountpoint=world / "empty", flags={"log_file": "log", "locked": True}, sources=["m=mock://m"]
    )
    with pytest.raises(
        ConfigError, match=r"^/.*/modelfs\.lock: cannot be read: No such file or directory: make it"
    ):
        launch.background(settings)
