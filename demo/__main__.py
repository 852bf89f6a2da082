"""Two stores, one mount, every model loaded twice: ``make demo``, or ``python -m demo -h``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from demo.models import MODELS, STORES
from demo.screen import Screen
from demo.session import MODELFS, Failure, Loaded, Session
from modelfs.cli.show import size
from modelfs.errors import ModelfsError
from modelfs.fuse import mountpoint

ONE_LINER = (
    "HF_HUB_OFFLINE=1 {python} -c 'from transformers import AutoTokenizer as T; "
    """print(T.from_pretrained("{place}/minilm").tokenize("mountable"))'"""
)


def main(words: Sequence[str] | None = None) -> int:
    """Tell the story and return the exit status; what was started has ended then, unless it is to be kept."""
    wanted = arguments(words)
    started = time.monotonic()
    try:
        place = mountpoint.canonical(wanted.mountpoint)
        if mountpoint.mount_at(place) is None:
            place.mkdir(parents=True, exist_ok=True)
        mountpoint.prepare(place)
        tell(Screen(), place, wanted.models, keep=wanted.keep)
    except (ModelfsError, Failure, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        if isinstance(error, ModelfsError):
            print(f"demo: modelfs is {here(MODELFS)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    print(f"\n{time.monotonic() - started:.0f} seconds")
    return 0


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line, checked."""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--mountpoint", type=Path, default=Path("models"), metavar="DIR")
    keep = os.environ.get("KEEP", "") not in ("", "0")
    parser.add_argument("--keep", action="store_true", default=keep, help="leave it mounted (also KEEP=1)")
    wanted = parser.parse_args(words)
    if unknown := set(wanted.models) - set(MODELS):
        parser.error(f"no such model: {', '.join(sorted(unknown))}")
    wanted.models = wanted.models or list(MODELS)
    return wanted


def tell(screen: Screen, place: Path, names: Sequence[str], *, keep: bool) -> None:
    """Tell the whole story.

    Raises:
        Failure: it cannot go on, or did not end as it must.

    """
    with ExitStack() as stack:
        screen.title("modelfs: models of remote stores as files of this machine")
        screen.step("Two stores, played by this machine")
        with screen.wait("making the models, starting the stores"):
            session = stack.enter_context(Session(place, names))
        for kind, url in session.urls.items():
            held = ", ".join(MODELS[name].what for name in names if MODELS[name].scheme == kind)
            screen.say(f"{url}  {STORES[kind]}: {held or 'nothing'}")

        screen.step("Mount them")
        mount(screen, session, names)
        look(screen, session)

        screen.step("Load them, with code that knows nothing of modelfs, each in a process of its own")
        first = load_all(screen, session, names)

        screen.step("Load them again: mounted anew, in new processes, with both stores switched off")
        with screen.wait("unmounting, switching the stores off, mounting"):
            session.modelfs("umount", str(place))
            session.stores("stop")
            session.mount(sources(names))
        check(first, load_all(screen, session, names, answers=False))
        screen.say("The same answers; not one byte and not one request went to a store.")

        if keep:
            session.stores("start")
            session.modelfs("refresh", str(place))
            session.keep()
            farewell(screen, place, names)
        else:
            screen.step("Unmount")
            screen.command(f"modelfs umount {here(place)}", session.modelfs("umount", str(place)))
            screen.say("To look around yourself: make demo KEEP=1")


def sources(names: Sequence[str]) -> dict[str, str]:
    """Return name → URL."""
    return {name: MODELS[name].source for name in names}


def mount(screen: Screen, session: Session, names: Sequence[str]) -> None:
    """Mount and show how."""
    wanted = sources(names)
    with screen.wait("mounting"):
        output = session.mount(wanted)
    flags = "".join(f" \\\n    --source {name}={url}" for name, url in wanted.items())
    screen.command(f"modelfs mount {here(session.place)}{flags}", output)


def look(screen: Screen, session: Session) -> None:
    """Show what is there, and that looking costs nothing."""
    screen.say("")
    screen.tree(session.place)
    fetched = size(session.status()["fetch"]["bytes"])
    screen.say(f"Names and sizes come from the listings of the stores: {fetched} of content fetched so far.")
    screen.say("")
    metadata = session.place / "model-metadata.yaml"
    head = metadata.read_text().splitlines()[:8]
    screen.command(f"head -n 8 {here(metadata)}", "\n".join(head))


def load_all(
    screen: Screen, session: Session, names: Sequence[str], *, answers: bool = True
) -> dict[str, Loaded]:
    """Run every load, show it, and return them by the module that did it."""
    done = {}
    screen.header()
    for name in names:
        for module, call in MODELS[name].loads.items():
            with screen.wait(f"{name}: {call}"):
                done[module] = session.load(module, name)
            screen.load(name, call, done[module], answer=answers)
    return done


def check(first: dict[str, Loaded], second: dict[str, Loaded]) -> None:
    """Raise Failure unless the second time gave the same, from the cache alone."""
    for module, loaded in second.items():
        if loaded.answer != first[module].answer:
            raise Failure(f"{module}: {loaded.answer!r} the second time, {first[module].answer!r} the first")
        if loaded.fetched or loaded.requests:
            raise Failure(f"{module}: {loaded.requests} requests, {loaded.fetched} bytes the second time")


def farewell(screen: Screen, place: Path, names: Sequence[str]) -> None:
    """Say how to look around, and how to end it."""
    screen.step(f"Left mounted on {place}; the stores are on again")
    directory, modelfs = here(place), here(MODELFS)
    screen.command(f"ls -l {directory}/*")
    screen.command(f"{modelfs} status {directory}")
    if "minilm" in names:
        screen.command(ONE_LINER.format(python=here(Path(sys.executable)), place=directory))
    screen.command(f"{modelfs} umount {directory}")
    screen.say("The last one ends everything: the stores go with the mount, and so does its cache.")


def here(path: Path) -> str:
    """Return `path` as one would type it in the working directory."""
    return min(str(path), os.path.relpath(path), key=len)


if __name__ == "__main__":
    sys.exit(main())
