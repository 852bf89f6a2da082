"""What the commands print, from plain values: tables for people, without colours where nobody looks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelfs.lockfile import Lock
from modelfs.types import Entry, Snapshot

if TYPE_CHECKING:  # rich is imported by what prints: a daemon never does
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

STATE_STYLES = {"ready": "green", "resolving": "yellow", "unavailable": "red"}


def console(*, stderr: bool = False) -> Console:
    """Return where to print: the terminal as wide as it is, a file or pipe without any width."""
    from rich.console import Console

    made = Console(stderr=stderr, markup=False, highlight=False, emoji=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = 10_000
    return made


def size(count: float) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least 1: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} PiB"


def duration(seconds: float) -> str:
    """Return seconds in the two largest units: ``2h 5m``."""
    left = int(max(0.0, seconds))
    words: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (words and len(words) < 2):
            words.append(f"{count}{unit}")
    return " ".join(words[:2]) or "0s"


def printable(text: str) -> str:
    """Return `text` with everything escaped that could steer a terminal or is not text at all."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _table(*columns: str, right: Sequence[str] = ()) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def _text(words: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(words, style)


def _counted(count: int, one: str) -> str:
    return f"{count} {one}" if count == 1 else f"{count} {one}s"


def status(out: Console, data: Mapping[str, Any], now: float | None = None) -> None:
    """Print one daemon's status as docs/status.md describes it."""
    transport, cache, reads, fetch = data["transport"], data["cache"], data["reads"], data["fetch"]
    now = time.time() if now is None else now
    up = duration(now - data["started"])
    out.print(_text(printable(data["mountpoint"]), style="bold"))
    out.print(f"  modelfs {data['modelfs']}, pid {data['pid']}, up {up}, {size(data['rss_bytes'])} of memory")
    out.print(f"  transport  {transport['name']}: {transport['why']}")
    if data["config"]:
        out.print(f"  config     {printable(data['config'])}")
    if data.get("lock"):
        out.print(f"  lock       {printable(data['lock'])}: nothing else is shown")
    if data["log"]:
        out.print(f"  log        {printable(data['log'])}")
    unclean = ", checking blocks after an unclean stop" if cache["unclean_start"] else ""
    held = f"{size(cache['used'])} of {size(cache['limit'])} in {_counted(cache['objects'], 'object')}"
    out.print(f"  cache      {held}, {size(cache['free'])} free, {printable(cache['directory'])}{unclean}")
    if "verity" in cache:  # an older daemon does not tell
        why = f"off: {cache['verity']['why']}"
        on = "on: the kernel checks complete files with a published digest at every read"
        out.print(f"  fs-verity  {on if cache['verity']['available'] else why}")
    if "scrub" in cache:
        out.print(f"  scrub      {_scrub(cache['scrub'], now)}")
    hits = "" if reads["hit_ratio"] is None else f", {reads['hit_ratio']:.0%} of it cached before"
    handles = _counted(data["open_handles"], "open file")
    out.print(f"  reads      {size(reads['bytes'])}{hits}, {handles}, errors: {_kinds(reads['errors'])}")
    out.print(
        f"  fetches    {size(fetch['bytes'])} in {_counted(fetch['requests'], 'request')}, "
        f"{fetch['in_flight']} under way, {fetch['retries']} tried again, errors: {_kinds(fetch['errors'])}"
    )
    if data["namespaces"]:
        out.print(f"  on demand  {_on_demand(data['namespaces'])}")
    out.print()
    models(out, data["models"])


def _scrub(scrub: Mapping[str, Any], now: float) -> str:
    """Return what the scrubber does and has found."""
    if not scrub["rate"]:
        return "off"
    began, finished = scrub["began"], scrub["finished"]
    if began is None:
        when = "not begun yet"
    elif finished is None or finished < began:
        when = f"reading everything for {duration(now - began)}"
    else:
        when = f"read everything {duration(now - finished)} ago"
    bad = f"{_counted(scrub['bad'], 'object')} bad" if scrub["bad"] else "nothing bad"
    return f"{when}, {bad}, at most {size(scrub['rate'])}/s"


def models(out: Console, found: Sequence[Mapping[str, Any]]) -> None:
    """Print models as the status document lists them, and why those are missing that are."""
    if not found:
        out.print("no models yet: they appear when their path is first used")
        return
    table = _table(
        "MODEL", "STATE", "REVISION", "FILES", "SIZE", "CACHED", "SOURCE", right=("FILES", "SIZE", "CACHED")
    )
    for model in found:
        state = "offline" if model["offline"] and model["state"] == "ready" else model["state"]
        share = f" {model['cached_bytes'] / model['size']:.0%}" if model["size"] else ""
        known = model["revision"] is not None
        table.add_row(
            _text(printable(model["name"])),
            _text(state, style=STATE_STYLES.get(state, "yellow")),
            _text(printable(model["revision"] or "-")[:12]),
            _text(str(model["files"]) if known else "-"),
            _text(size(model["size"]) if known else "-"),
            _text(size(model["cached_bytes"]) + share if known else "-"),
            _text(printable(model["source"])),
        )
    out.print(table)
    for model in found:
        if model["why"]:
            out.print(f"{printable(model['name'])}: {printable(model['why'])}")
        if len(model.get("sources", ())) > 1:  # an older daemon does not tell
            out.print(f"{printable(model['name'])}: {'; '.join(map(_link, model['sources']))}")
        for path, why in model.get("suspicious", {}).items():  # an older daemon does not tell
            out.print(
                f"{printable(model['name'])}: {printable(path)} is a suspicious pickle: {printable(why)}"
            )
        if model.get("pinned"):
            out.print(f"{printable(model['name'])}: pinned, what is cached of it stays")
        if model.get("hidden"):  # an older daemon does not tell
            files = _counted(model["hidden"], "file")
            out.print(f"{printable(model['name'])}: {files} of the store hidden by its filters")
        if model["rejected"]:
            paths = _counted(model["rejected"], "path")
            out.print(
                f"{printable(model['name'])}: {paths} of the store cannot be shown: "
                "modelfs ls --long says which"
            )


def _link(source: Mapping[str, Any]) -> str:
    """Return what a store of a chain does, and why."""
    role = "serves" if source["serving"] else f"is {source['state']}"
    why = f" ({printable(source['why'])})" if source["why"] else ""
    return f"{printable(source['url'])} {role}{why}"


def _on_demand(namespaces: Sequence[str]) -> str:
    return ", ".join(name if "/" in name else f"{name}/" for name in namespaces)


def _kinds(errors: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(errors.items())) or "none"


@contextmanager
def progress(doing: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Give what shows ``{"name": …, "done": bytes, "total": bytes}`` as a bar, on a terminal only."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn(doing),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TextColumn("{task.fields[name]}", markup=False),
    )
    errors = console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(doing, total=None, name="")

        def show(line: Mapping[str, Any]) -> None:
            bar.update(task, completed=line["done"], total=line["total"], name=printable(line["name"]))

        yield show


def share(model: Mapping[str, Any]) -> str:
    """Return how much of a model, as the status document has it, is cached."""
    part = f" ({model['cached_bytes'] / model['size']:.0%})" if model["size"] else ""
    return f"{size(model['cached_bytes'])} of {size(model['size'])}{part}"


def prefetched(out: Console, model: str, answer: Mapping[str, Any], *, done: bool) -> None:
    """Print what came of fetching a model ahead, or that it has begun if it is not `done`."""
    what = f"{printable(model)}: {_counted(answer['files'], 'file')}, {size(answer['bytes'])}"
    if not done:
        out.print(f"prefetching {what}; modelfs status says how far it is")
        return
    out.print(f"prefetched {what}, {size(answer['fetched'])} of it fetched now")
    for failed in answer["failed"]:
        out.print(f"{printable(failed['name'])}: {printable(failed['why'])}")


def evicted(out: Console, answer: Mapping[str, Any], freed: int) -> None:
    """Print what was evicted, and what was not."""
    out.print(f"evicted {_counted(len(answer['evicted']), 'file')}: {size(freed)} freed")
    for kept in answer["kept"]:
        out.print(f"{printable(kept['name'])}: stays, it is {kept['why']}")


def collected(out: Console, answer: Mapping[str, Any], freed: int, now: float | None = None) -> None:
    """Print what was evicted, or would be, because nobody used it."""
    now = time.time() if now is None else now
    for each in answer["evicted"]:
        unused = duration(now - each["used"])
        out.print(f"{printable(each['name'])}: {size(each['bytes'])}, unused for {unused}")
    done = "would go" if answer["dry_run"] else "evicted"
    end = "to be freed" if answer["dry_run"] else "freed"
    out.print(f"{_counted(len(answer['evicted']), 'file')} {done}: {size(freed)} {end}")


def verified(out: Console, answer: Mapping[str, Any]) -> None:
    """Print what came of reading the cache again."""
    read = f"{size(answer['bytes'])} in {_counted(answer['objects'], 'object')}"
    if not answer["bad"]:
        out.print(f"verified {read}: all good")
        return
    dropped = sum(bad["dropped"] for bad in answer["bad"])
    objects = _counted(len(answer["bad"]), "object")
    out.print(f"verified {read}: {objects} bad, {size(dropped)} discarded, to be fetched again")
    for bad in answer["bad"]:
        for fault in bad["faults"]:
            out.print(f"{printable(bad['name'])}: {printable(fault)}")


def measured(out: Console, found: Mapping[str, Any]) -> None:
    """Print how fast a store and its mount are."""
    out.print(f"{size(found['bytes'])} of {printable(found['path'])} in {printable(found['url'])}")
    out.print(f"the store answers after {found['answer_seconds'] * 1000:.0f} ms")
    table = _table("", "speed", "compared", right=("speed", "compared"))
    rows = (
        ("download, without a mount", "download", None),
        ("first read through the mount", "cold", "download"),
        ("local copy on the cache's disk", "local", None),
        ("read from the cache", "warm", "local"),
    )
    for label, name, other in rows:
        compared = f"{found[name] / found[other]:.2f} × {other}" if other else ""
        table.add_row(label, f"{size(found[name])}/s", compared)
    out.print(table)
    out.print(_text(f"transport {found['transport']}: {found['why']}", "dim"))


_WAYS = {"mount": "from the mount on", "mock": "made by mock://", "directory": "in a directory of the cache"}


def environment(name: str, way: str, mountpoint: Path | None, why: str) -> str:
    """Return what ``modelfs env`` says."""
    place = f" {mountpoint}" if mountpoint else ""
    return f"{name}: models come {_WAYS[way]}{place} ({why})"


def locked(lock: Lock) -> str:
    """Return the one line that says what a new lock holds."""
    files = [pinned for model in lock.models.values() for pinned in model.files.values()]
    weak = sum(not pinned.target and not pinned.strong for pinned in files)
    but = f"; {_counted(weak, 'file')} without a SHA-256" if weak else ""
    models, all_files = _counted(len(lock.models), "model"), _counted(len(files), "file")
    return f"locked {models}, {all_files}{but}: {printable(str(lock.path))}"


def mounted(data: Mapping[str, Any]) -> str:
    """Return the one line that says what a new mount offers."""
    states = [model["state"] for model in data["models"]]
    ready = states.count("ready")
    what = [_counted(len(states), "model")] if states else []
    if ready != len(states):
        what[0] += f" ({ready} ready)"
    if data["namespaces"]:
        what.append(f"on demand: {_on_demand(data['namespaces'])}")
    place = printable(data["mountpoint"])
    return (
        f"mounted {place}: {', '.join(what)}; status: modelfs status {place}, unmount: modelfs umount {place}"
    )


def listing(out: Console, snapshot: Snapshot, entries: Sequence[Entry], *, long: bool) -> None:
    """Print entries of a snapshot; `long` adds digests, times and what cannot be shown."""
    columns = ("SIZE", "MODIFIED", "DIGEST", "PATH") if long else ("SIZE", "PATH")
    table = _table(*columns, right=("SIZE",))
    for entry in entries:
        path = printable(entry.path) + {"directory": "/", "symlink": f" -> {printable(entry.target)}"}.get(
            entry.kind, ""
        )
        if long:
            modified = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(entry.mtime)) if entry.mtime else "-"
            table.add_row(str(entry.size), modified, str(entry.digest or "-"), _text(path))
        else:
            table.add_row(size(entry.size), _text(path))
    files = [entry for entry in entries if entry.kind != "directory"]
    total = size(sum(entry.size for entry in files))
    if long:
        out.print(f"{printable(snapshot.url)} at revision {printable(snapshot.revision)}")
    if entries:
        out.print(table)
    if long:
        out.print(f"{_counted(len(files), 'file')}, {total}")
        for path, reason in snapshot.rejected:
            out.print(f"not shown: {printable(path)}: {reason}")


def settings(out: Console, data: Mapping[str, Any]) -> None:
    """Print checked settings: `data` is their JSON form, with names instead of values of store options."""
    cache = data["cache"]
    share = cache["min_free"]
    free = f"{share:.0%} of the disk" if isinstance(share, float) else size(share)
    out.print(f"{printable(data['source_file'] or 'no configuration file')}: ok")
    out.print(f"  cache      {size(cache['size'])} in {printable(cache['directory'])}, leaving {free} free")
    out.print(f"  transport  {data['transport']}")
    out.print(f"  refresh    {duration(data['refresh']) if data['refresh'] else 'never'}")
    if data["namespaces"]:
        out.print(f"  on demand  {_on_demand(data['namespaces'])}")
    if data["models"]:
        out.print()
        table = _table("MODEL", "SOURCE", "OPTIONS")
        for model in data["models"]:
            names = [*model["options"], *(word for word in ("optional", "pin") if model[word])]
            words = (model["name"], ", ".join(model["sources"]), ", ".join(names))
            table.add_row(*(_text(printable(word)) for word in words))
        out.print(table)
