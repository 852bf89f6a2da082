"""The command line: each command gathers values, calls the layer below, prints; errors are one line.

docs/cli.md lists commands and exit codes.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import trio
import typer

from modelfs import __version__, config, control, holder
from modelfs.cli import contents, launch, show
from modelfs.cli.contents import Json, client_of, print_json
from modelfs.errors import CacheError, ConfigError, ModelfsError, MountError, NotFound, StoreError
from modelfs.fuse import mountpoint
from modelfs.fuse.ledger import Held
from modelfs.stores import open_store, redact
from modelfs.types import Entry, Snapshot

EXIT_CODES: tuple[tuple[type[Exception], int], ...] = (
    (ConfigError, 3),
    (MountError, 4),
    (CacheError, 5),
    (StoreError, 6),
    (Exception, 1),
)
"""Exit code of each class of errors; the first that fits counts. 2 is a wrong command line, 130 Ctrl-C."""

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    name="modelfs",
    help="Show remote model stores as a local, read-only directory tree.",
    epilog="""\b
Examples:
  modelfs mount /models                     what modelfs.yaml says, or hf/, s3/, github/ on demand
  modelfs mount /models --source finbert=hf://ProsusAI/finbert
  modelfs status
  modelfs umount /models""",
    context_settings=SETTINGS,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(
    help="Work with configuration files.",
    context_settings=SETTINGS,
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(config_app, name="config")
app.add_typer(contents.app)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line `args`, by default the process's, and exit."""
    try:
        app(args=args, prog_name="modelfs")
    except Exception as error:
        if os.environ.get("MODELFS_LOG_LEVEL") == "debug":
            traceback.print_exc()
        text = str(error)
        if not isinstance(error, ModelfsError):
            text = (
                f"unexpected {type(error).__name__}: {error}: set MODELFS_LOG_LEVEL=debug for the traceback"
            )
        print(f"modelfs: {show.printable(' '.join(text.split()))}", file=sys.stderr)
        sys.exit(next(code for kind, code in EXIT_CODES if isinstance(error, kind)))
    sys.exit(0)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"modelfs {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# parser: left to itself, typer looks at the path, and waits with all others if nobody serves the mount there.
Mountpoint = Annotated[
    Path,
    typer.Argument(metavar="MOUNTPOINT", help="The directory to mount on.", show_default=False, parser=Path),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Configuration file. Without it: $MODELFS_CONFIG, ./modelfs.yaml, /etc/modelfs/config.yaml.",
    ),
]


@app.command(
    epilog="""\b
Examples:
  modelfs mount /models
  modelfs mount /models --source finbert=hf://ProsusAI/finbert --cache-size 20GiB
  modelfs mount /models --config fleet.yaml --foreground

Everything a flag says can also stand in the configuration file or in MODELFS_… variables."""
)
def mount(
    place: Mountpoint,
    config_file: ConfigFile = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL", help="A model to show, besides those of the file.")
    ] = None,
    cache_dir: Annotated[str | None, typer.Option(metavar="DIR", help="Directory of the cache.")] = None,
    cache_size: Annotated[str | None, typer.Option(metavar="SIZE", help="Its limit, like 50GiB.")] = None,
    transport: Annotated[str | None, typer.Option(metavar="auto|kernel|pyfuse3", help="How to.")] = None,
    allow_other: Annotated[
        bool | None, typer.Option("--allow-other/--no-allow-other", help="Let other users read the mount.")
    ] = None,
    refresh: Annotated[
        str | None, typer.Option(metavar="TIME", help="Look for new revisions so often, like 60s; 0 = never.")
    ] = None,
    keep_going: Annotated[
        bool | None,
        typer.Option("--keep-going/--no-keep-going", help="Mount although some models cannot be resolved."),
    ] = None,
    locked: Annotated[
        bool | None,
        typer.Option("--locked/--no-locked", help="Refuse models that are not what the lock says."),
    ] = None,
    lock_file: Annotated[
        str | None, typer.Option("--lock", metavar="FILE", help="The lock; by default modelfs.lock.")
    ] = None,
    foreground: Annotated[
        bool, typer.Option("--foreground", help="Stay, log to standard error, unmount on Ctrl-C or SIGTERM.")
    ] = False,
    log_file: Annotated[str | None, typer.Option(metavar="FILE", help="Where the daemon logs.")] = None,
    log_level: Annotated[
        str | None, typer.Option(metavar="debug|info|warning|error", help="How much is logged.")
    ] = None,
) -> None:
    """Show the models on MOUNTPOINT and return when they can be read."""
    path = mountpoint.canonical(place)
    flags = {
        "cache.dir": cache_dir,
        "cache.size": cache_size,
        "transport": transport,
        "allow_other": allow_other,
        "refresh": refresh,
        "keep_going": keep_going,
        "locked": locked,
        "lock": lock_file,
        "log_file": log_file,
        "log_level": log_level,
    }
    settings = config.load(mountpoint=path, config_file=config_file, flags=flags, sources=source or ())
    owner = control.find(path)
    if owner is not None and mountpoint.mount_at(path) is not None:
        raise MountError(f"{path} is already mounted, by pid {owner.pid}: modelfs umount {path} first")
    if not (foreground and holder.left_behind(path)):
        mountpoint.prepare(path, allow_other=settings.allow_other)
    if foreground:
        launch.foreground(settings)
        return
    count = len(settings.models)
    what = f"mounting {path}" + (f": resolving {count} model{'s' * (count > 1)}" if count else "")
    errors = show.console(stderr=True)
    if errors.is_terminal:
        with errors.status(what):
            data = launch.background(settings)
    else:
        data = launch.background(settings)
    print(show.mounted(data))
    for model in data["models"]:
        if model["state"] != "ready" and model["why"]:
            errors.print(show.printable(f"modelfs: {model['name']}: {model['why']}"))


@app.command("daemon", hidden=True)
def _daemon(
    ready_fd: Annotated[int | None, typer.Option()] = None,
    device_fd: Annotated[int | None, typer.Option()] = None,
    ledger_fd: Annotated[int | None, typer.Option()] = None,
    kept: Annotated[bool, typer.Option("--kept")] = False,
) -> None:
    """Be the daemon of a mount in the background; started by modelfs mount, not by people."""
    held = None if device_fd is None or ledger_fd is None else Held(device_fd, ledger_fd, kept)
    launch.serve_background(ready_fd, held)


@app.command()
def umount(
    place: Mountpoint,
    lazy: Annotated[
        bool,
        typer.Option("--lazy", help="Do so although it is in use; open files stay readable until closed."),
    ] = False,
) -> None:
    """Take the mount on MOUNTPOINT away and return when its daemon has ended."""
    print(launch.end(mountpoint.canonical(place), lazy=lazy))


@app.command()
def status(
    place: Annotated[
        Path | None, typer.Argument(metavar="[MOUNTPOINT]", show_default=False, parser=Path)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show models, cache and traffic of the mount on MOUNTPOINT, or of all your mounts."""
    if place is not None:
        data = client_of(place).status()
        if as_json:
            print_json(data)
        else:
            show.status(show.console(), data)
        return
    found, silent = [], []
    for record in control.mounts():
        try:
            found.append(control.ControlClient(control.socket_path(record.mountpoint)).status())
        except MountError as error:
            silent.append(str(error))
    if as_json:
        print_json(found)
    elif not found and not silent:
        print("nothing is mounted")
    else:
        for number, data in enumerate(found):
            if number:
                print()
            show.status(show.console(), data)
    if silent:  # the others are shown all the same
        raise MountError("; ".join(silent))


@app.command()
def refresh(
    place: Mountpoint,
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="By default all.")] = None,
    as_json: Json = False,
) -> None:
    """Look for new revisions of one model, or of all, on MOUNTPOINT now."""
    answer = client_of(place).refresh(model)
    if as_json:
        print_json(answer)
    else:
        show.models(show.console(), answer["models"])


@app.command(
    epilog="""\b
Examples:
  modelfs lock                                   writes modelfs.lock beside modelfs.yaml
  modelfs lock --source finbert=hf://ProsusAI/finbert --output finbert.lock
  modelfs mount /models --locked                 refuses anything else"""
)
def lock(
    config_file: ConfigFile = None,
    source: Annotated[
        list[str] | None, typer.Option(metavar="NAME=URL", help="A model to lock, besides those of the file.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="By default modelfs.lock beside the configuration."
        ),
    ] = None,
    download: Annotated[
        bool,
        typer.Option(
            "--download/--no-download",
            help="Fetch files without a published SHA-256 to compute it; without, they are pinned by the "
            "digest or version that their store does publish.",
        ),
    ] = True,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where what is fetched stays; no mount may use it now.")
    ] = None,
) -> None:
    """Write the size and digest of every file of every configured model to a lock, for mount --locked.

    Files with a published SHA-256 or SHA-512 are not fetched. All others are, through the cache, because
    other digests (MD5, SHA-1, CRC) only find accidents.
    """
    from modelfs.cli import direct  # the cache and more: other commands do not pay for it

    flags = {"lock": output, "cache.dir": cache_dir}
    settings = config.load(mountpoint=None, config_file=config_file, flags=flags, sources=source or ())
    with show.progress("fetching") as progress:
        made = direct.lock(settings, progress, download=download)
    made.write()
    print(show.locked(made))


@app.command()
def upgrade(place: Mountpoint) -> None:
    """Let a daemon of the modelfs that is installed now take over MOUNTPOINT; readers only wait a second."""
    path = mountpoint.canonical(place)
    client_of(path)
    print(launch.upgrade(path))


@app.command(
    epilog="""\b
Examples:
  modelfs env          production, test, ci or local, and how models are had there
  modelfs env --json
  MODELFS_ENVIRONMENT=test modelfs env"""
)
def env(as_json: Json = False) -> None:
    """Show what modelfs.detect() finds: where this is, and how modelfs.local_path() gets models here."""
    from modelfs import environment  # the cache and more: other commands do not pay for it

    found = environment.detect()
    if as_json:
        place = str(found.mountpoint) if found.mountpoint else None
        row = {"environment": found.environment, "way": found.way, "mountpoint": place, "why": found.why}
        print_json(row)
    else:
        print(show.environment(found.environment, found.way, found.mountpoint, found.why))


@app.command(
    epilog="""\b
Examples:
  modelfs ls hf://ProsusAI/finbert
  modelfs ls s3://models/bert --option endpoint_url=http://localhost:9000
  modelfs ls --long file:///srv/models/bert onnx"""
)
def ls(
    url: Annotated[str, typer.Argument(metavar="URL", help="The store.", show_default=False)],
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="List only what is there.")] = "",
    long: Annotated[bool, typer.Option("--long", "-l", help="Add revision, digests and times.")] = False,
    as_json: Json = False,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="An option for the store.")
    ] = None,
    config_file: ConfigFile = None,
) -> None:
    """List what the store at URL holds, without mounting it."""
    options = config.options_for(url, config.store_options(config_file))
    options |= dict(map(config.parse_option, option or ()))
    store = open_store(url, options)
    snapshot = trio.run(store.snapshot)
    entries = _below(snapshot, path.strip("/"))
    if not entries and path.strip("/"):
        if snapshot.complete:
            raise NotFound(f"{snapshot.url} has no {path}")
        entries = [trio.run(store.entry, path.strip("/"))]
    if as_json:
        head = {"url": snapshot.url, "revision": snapshot.revision, "complete": snapshot.complete}
        rejected = [{"path": name, "why": why} for name, why in snapshot.rejected]
        print_json({**head, "entries": list(map(_entry_json, entries)), "rejected": rejected})
        return
    show.listing(show.console(), snapshot, entries, long=long)
    if not snapshot.complete and not path:
        show.console(stderr=True).print("the store is too large to list: name a PATH")


@app.command(
    epilog="""\b
Examples:
  modelfs bench s3://models/finbert
  modelfs bench hf://ProsusAI/finbert model.safetensors --size 256MiB --json"""
)
def bench(
    url: Annotated[str, typer.Argument(metavar="URL", help="The store.", show_default=False)],
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="Which file; by default the largest.")] = "",
    most: Annotated[str, typer.Option("--size", metavar="SIZE", help="Read this much at the most.")] = "1GiB",
    transport: Annotated[str | None, typer.Option(metavar="auto|kernel|pyfuse3", help="How to.")] = None,
    cache_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Measure on the disk of this directory.")
    ] = None,
    as_json: Json = False,
    config_file: ConfigFile = None,
) -> None:
    """Measure how fast a store is from here: downloaded, through a mount, and from the cache.

    Everything happens in a temporary directory beside the cache, which is removed in the end.
    """
    from modelfs.cli import speed  # libcurl and more: only this command pays for them

    flags = {"transport": transport, "cache.dir": cache_dir}
    sources = [f"{speed.MODEL}={url}"]
    settings = config.load(mountpoint=Path("/nowhere"), config_file=config_file, flags=flags, sources=sources)
    settings = replace(
        settings, models=tuple(model for model in settings.models if model.name == speed.MODEL)
    )
    with show.progress("measuring") as progress:
        found = speed.measure(settings, path, config.parse_size(most), progress)
    if as_json:
        print_json(found)
        return
    show.measured(show.console(), found)


def _below(snapshot: Snapshot, path: str) -> list[Entry]:
    """Return the entry at `path` and those below it; all for an empty path."""
    return [
        e for e in snapshot.entries.values() if not path or e.path == path or e.path.startswith(f"{path}/")
    ]


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "path": entry.path,
        "kind": entry.kind,
        "size": entry.size,
        "version": entry.version,
        "digest": str(entry.digest) if entry.digest else None,
        "mtime": entry.mtime,
        "target": entry.target or None,
    }


@config_app.command()
def check(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="By default the one mount would read.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a configuration file and the MODELFS_… variables; print what a mount would use.

    Nothing is fetched and nothing is mounted. Values of store options are not printed: they may be secrets.
    """
    settings = config.load(mountpoint=None, config_file=file)
    data = settings.to_json()
    del data["mountpoint"]
    names: dict[str, set[str]] = {}
    for prefix, options in settings.store_options.items():
        names.setdefault(redact(prefix), set()).update(options)
    data["store_options"] = {prefix: sorted(options) for prefix, options in names.items()}
    for model in data["models"]:
        model["options"] = sorted({*model["options"]}.union(*model.pop("fallback_options")))
        model["sources"] = [redact(url) for url in model["sources"]]
    if as_json:
        print_json(data)
    else:
        show.settings(show.console(), data)
