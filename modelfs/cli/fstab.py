"""``mount.modelfs``: what mount(8) runs for ``mount -t modelfs SPEC DIR`` and for lines of /etc/fstab.

It is called as mount(8) describes under "External helpers"::

    mount.modelfs SPEC DIR [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]

SPEC is a configuration file, or ``none`` for what ``modelfs mount DIR`` shows by itself, or the URL of a
store, which is shown besides that. Options are the flags of ``modelfs mount``.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from modelfs import cli, control
from modelfs.errors import ConfigError
from modelfs.fuse import mountpoint
from modelfs.stores import redact

USAGE_ERROR, MOUNT_FAILURE = 1, 32
"""Exit codes that mount(8) gives a meaning."""

FLAGS = ("allow_other", "keep_going", "locked")
"""Options that stand alone; ``no_allow_other`` and so on turn them off."""

VALUES = ("cache_dir", "cache_size", "lock", "log_file", "log_level", "refresh", "source", "transport")
"""Options that need a value."""

_OTHERS = re.compile(
    r"(defaults|(no)?auto|(no)?users?|owner|group|_netdev|nofail|ro|rw|(no)?(suid|dev|exec|iversion|symfollow)"
    r"|(a?sync)|((no)?(dir|rel|lazy)?|strict)atime|[xX]-.*|comment=.*|(uhelper|helper)=.*)"
)
"""What mount(8), systemd and the kernel see to themselves; the mount is ro, nosuid and nodev in any case."""


def words(arguments: Sequence[str]) -> list[str]:
    """Return the command line of ``modelfs`` that does what `arguments` ask.

    It is empty if there is nothing to do: with -f, and for what ``mount -a`` has mounted before.

    Raises:
        ConfigError: an option or SPEC that we cannot do anything with.
        SystemExit: it is no call that mount(8) makes.

    """
    parser = argparse.ArgumentParser(prog="mount.modelfs", description="Mount models; called by mount(8).")
    parser.add_argument("spec", metavar="SPEC", help="configuration file, URL of a store, or none")
    parser.add_argument("directory", metavar="DIR", help="the directory to mount on")
    parser.add_argument("-o", dest="options", action="append", default=[], help="options, with commas")
    parser.add_argument("-s", dest="sloppy", action="store_true", help="ignore unknown options")
    parser.add_argument("-f", dest="fake", action="store_true", help="check the options and do not mount")
    parser.add_argument("-n", "-v", dest="ignored", action="store_true", help="nothing of ours")
    parser.add_argument("-t", dest="type", help="the type, which is ours")
    asked = parser.parse_args(arguments)
    given = dict(_parted(",".join(asked.options)))
    name = given.pop("name", None)
    flags = [word for option, value in given.items() for word in _flag(option, value, sloppy=asked.sloppy)]
    if asked.fake or _is_mounted(asked.directory):
        return []
    return ["mount", asked.directory, *_spec(asked.spec, name), *flags]


def _is_mounted(directory: str) -> bool:
    place = mountpoint.canonical(Path(directory))
    mount = mountpoint.mount_at(place)
    return mount is not None and mount.ours and control.find(place) is not None


def _parted(options: str) -> Iterator[tuple[str, str | None]]:
    """Yield name and value of each option; a value in double quotes may hold commas, as for mount(8)."""
    for option in re.findall(r'(?:[^,"]|"[^"]*")+', options):
        name, equals, value = option.partition("=")
        yield name, value.replace('"', "") if equals else None


def _flag(option: str, value: str | None, *, sloppy: bool) -> list[str]:
    """Return the words for ``modelfs mount`` that are the option of the line; none for those of others."""
    if _OTHERS.fullmatch(option if value is None else f"{option}={value}"):
        return []
    plain = option.replace("-", "_")
    if plain.removeprefix("no_") in FLAGS and value is None:
        return [f"--{plain.replace('_', '-')}"]
    if plain in VALUES and value:
        return [f"--{plain.replace('_', '-')}={value}"]
    if sloppy:
        return []
    known = [*FLAGS, *(f"{each}=…" for each in ("name", *VALUES))]
    raise ConfigError(
        f"mount option '{option}' is not one of {', '.join(known)}: correct the line in /etc/fstab"
    )


def _spec(spec: str, name: str | None) -> list[str]:
    """Return the words for ``modelfs mount`` that say what to show."""
    if spec == "none":
        return []
    if "://" not in spec:
        return [f"--config={Path(spec)}"]
    name = name or Path(urlsplit(spec).path.partition("@")[0]).name
    if not name:
        raise ConfigError(f"{redact(spec)}: a model needs a name: add the mount option name=NAME")
    return [f"--source={name}={spec}"]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Do what mount(8) asks and exit as it expects: 0, 1 for a wrong line, 32 for a mount that failed."""
    command: list[str] = []
    try:
        command = words(sys.argv[1:] if arguments is None else arguments)
        if command:
            cli.main(command)
    except ConfigError as error:
        print(f"mount.modelfs: {error}", file=sys.stderr)
        sys.exit(USAGE_ERROR)
    except SystemExit as end:
        sys.exit((MOUNT_FAILURE if command else USAGE_ERROR) if end.code else 0)
    sys.exit(0)
