"""Commands about what is cached of the models: clients of the control API of its daemon."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from modelfs import control
from modelfs.cli import show
from modelfs.config import parse_duration
from modelfs.errors import ConfigError, MountError, StoreError
from modelfs.fuse import mountpoint

app = typer.Typer(rich_markup_mode=None)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="Its name, as modelfs status has it.", show_default=False)
]
Place = Annotated[
    Path | None,
    typer.Option("--mountpoint", metavar="DIR", help="Needed if you have several mounts.", parser=Path),
]
Paths = Annotated[
    list[str] | None,
    typer.Option(
        "--path", metavar="GLOB", help="Only these files of it, like onnx/ or '*.json'; repeatable."
    ),
]


def print_json(data: Any) -> None:
    """Print `data` for programs."""
    print(json.dumps(data, indent=2))


def client_of(place: Path | None, otherwise: str = "mount first") -> control.ControlClient:
    """Return the client of the daemon that serves `place`, or this user's only mount.

    Args:
        place: the mountpoint; None if there is only one.
        otherwise: what to do if nothing is mounted.

    Raises:
        MountError: there is none, or more than one.

    """
    path = _only_mount(otherwise) if place is None else mountpoint.canonical(place)
    if control.find(path) is None:
        raise MountError(f"{path} is not mounted by you: modelfs status lists what is")
    return control.ControlClient(control.socket_path(path))


def _only_mount(otherwise: str) -> Path:
    places = [record.mountpoint for record in control.mounts()]
    if not places:
        raise MountError(f"nothing is mounted: {otherwise}")
    if len(places) > 1:
        raise MountError(f"name one of your mounts with --mountpoint: {', '.join(map(str, places))}")
    return places[0]


@app.command(
    epilog="""\b
Examples:
  modelfs verify                                 everything in the cache of your one mount
  modelfs verify finbert --mountpoint /models
  modelfs verify --cache-dir /var/cache/modelfs  while nothing is mounted

Exits with 1 if something bad was found."""
)
def verify(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="By default everything that is cached.")
    ] = None,
    place: Place = None,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A cache directory that no mount uses.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Read the cache again from the disk, and discard what is bad: it is fetched again when it is read.

    Every block is compared with its checksum, and every complete file with the digest its store published.
    """
    if cache_dir is not None and (model is not None or place is not None):
        raise ConfigError("--cache-dir checks a whole directory: leave MODEL and --mountpoint away")
    with show.progress("verifying") as progress:
        if cache_dir is not None:
            from modelfs.cli import direct  # the cache and more: other commands do not pay for it

            answer = direct.verify_directory(cache_dir, progress)
        else:
            client = client_of(place, "name a directory with --cache-dir, or mount first")
            answer = client.verify(model, progress)
    if as_json:
        print_json(answer)
    else:
        show.verified(show.console(), answer)
    if answer["bad"]:
        raise SystemExit(1)


@app.command(
    epilog="""\b
Examples:
  modelfs prefetch finbert --wait                a bar, and an exit code that says whether all is there
  modelfs prefetch finbert                       begins, and goes on in the daemon
  modelfs prefetch sdxl --path unet/ --path '*.json' --wait
  modelfs prefetch hf/ProsusAI/finbert --wait    found on demand

Readers go first: prefetching takes what connections they leave. What is there is not fetched again, so an
interrupted one goes on where it was. To keep it there, also say modelfs pin.
Exits with 6 if some files could not be fetched."""
)
def prefetch(
    model: Model,
    path: Paths = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when all is in the cache; Ctrl-C ends it.")
    ] = False,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Fetch a model into the cache before anybody reads it."""
    with show.progress("fetching") as progress:
        answer = client_of(place).prefetch(model, path or (), progress, wait=wait)
    if as_json:
        print_json(answer)
    else:
        show.prefetched(show.console(), model, answer, done=wait)
    if answer["failed"]:
        count = f"{len(answer['failed'])} of {answer['files']} files"
        raise StoreError(f"{model}: {count} could not be fetched: run it again; what is there stays")


@app.command(
    epilog="""\b
Examples:
  modelfs pin finbert
  modelfs pin hf/ProsusAI/finbert    found on demand

Pinning fetches nothing. It is noted in the cache directory, so it lasts whatever is restarted, and goes over
to new revisions of the model. In a configuration the same is pin: true."""
)
def pin(model: Model, place: Place = None, as_json: Json = False) -> None:
    """Keep what is cached of a model, now and later, whatever else needs room."""
    answer = client_of(place).pin(model)
    if as_json:
        print_json(answer)
        return
    (pinned,) = answer["models"]
    print(f"pinned {show.printable(model)}: {show.share(pinned)} cached")


@app.command(
    epilog="""\b
Examples:
  modelfs unpin finbert

What the configuration pins (pin: true) is unpinned there."""
)
def unpin(model: Model, place: Place = None, as_json: Json = False) -> None:
    """Let what is cached of a model be evicted again when there is need for room."""
    answer = client_of(place).unpin(model)
    if as_json:
        print_json(answer)
    else:
        print(f"unpinned {show.printable(model)}")


@app.command(
    epilog="""\b
Examples:
  modelfs evict finbert
  modelfs evict sdxl --path '*.ckpt' --path text_encoder/

The model stays mounted: what is read of it is fetched again. What is open or pinned stays, and is named.
Files that other models have too are one object in the cache, and go from them as well."""
)
def evict(model: Model, path: Paths = None, place: Place = None, as_json: Json = False) -> None:
    """Remove what is cached of a model, and say how many bytes of disk that freed."""
    answer = client_of(place).evict(model, path or ())
    if as_json:
        print_json({"freed": _freed(answer["evicted"]), **answer})
    else:
        show.evicted(show.console(), answer, _freed(answer["evicted"]))


@app.command(
    epilog="""\b
Examples:
  modelfs gc --older-than 7d --dry-run    what would go, the longest unused first
  modelfs gc --older-than 7d

What is open or pinned stays. The cache makes room by itself when it is full: this is for room for others.
A file counts as used when it is opened, closed, or read through the daemon."""
)
def gc(
    older_than: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long nobody used it, like 7d or 12h.", show_default=False),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing, only say what would go.")
    ] = False,
    place: Place = None,
    as_json: Json = False,
) -> None:
    """Remove what nobody has used for a while from the cache, of whatever model or earlier revision."""
    try:
        seconds = parse_duration(older_than)
    except ValueError as error:
        raise ConfigError(f"--older-than: {error}") from None
    answer = client_of(place).collect(seconds, dry_run=dry_run)
    if as_json:
        print_json({"freed": 0 if dry_run else _freed(answer["evicted"]), **answer})
    else:
        show.collected(show.console(), answer, _freed(answer["evicted"]))


def _freed(evicted: Sequence[dict[str, Any]]) -> int:
    return sum(each["bytes"] for each in evicted)
