"""Give up what root can do and a mount does not need: capabilities(7), for good.

What is kept is still much: whoever takes over a process with CAP_SYS_ADMIN can become root in most ways. The
kernel asks for it in mount(2), umount2(2) and ``FUSE_DEV_IOC_BACKING_OPEN`` (fs/fuse/backing.c), with which
each complete file is lent to the kernel: it cannot be given up after the start.
"""

from __future__ import annotations

import ctypes
import enum
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)


class Capability(enum.IntEnum):
    """Those that a mount can need, with their numbers of linux/capability.h."""

    DAC_OVERRIDE = 1
    """Write to a cache directory of another user."""
    DAC_READ_SEARCH = 2
    """Read ``file://`` stores, tokens and certificates whoever owns them."""
    SYS_ADMIN = 21
    """Mount, unmount, and lend files to the kernel."""


_libc = ctypes.CDLL(None, use_errno=True)
_VERSION_3 = 0x20080522
_CAPBSET_DROP, _SET_NO_NEW_PRIVS, _CAP_AMBIENT, _AMBIENT_CLEAR_ALL = 24, 38, 47, 4


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Sets(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def needed(cache: Path) -> frozenset[Capability]:
    """Return what a process needs that serves a mount with the cache directory `cache`, made yet or not."""
    place = next(path for path in (cache, *cache.parents) if path.exists())
    foreign = place.stat().st_uid != os.geteuid()
    kept = {Capability.SYS_ADMIN, Capability.DAC_READ_SEARCH}
    return frozenset(kept | ({Capability.DAC_OVERRIDE} if foreign else set()))


def limit(keep: frozenset[Capability]) -> None:
    """Give up every capability but `keep` for good: of this thread, those it starts, and all children.

    To be called before there are other threads: each has capabilities of its own. Without root there is
    nothing to give up, and ``fusermount3``, which is set-uid, must stay of use: then nothing is done. What
    cannot be given up is logged.
    """
    if os.geteuid() != 0:
        return
    for number in range(_last() + 1):
        if number not in keep and _libc.prctl(_CAPBSET_DROP, number, 0, 0, 0):
            # No CAP_SETPCAP, as under a holder: what comes now binds all the same, also children.
            log.debug("the bounding set of capabilities stays: %s", os.strerror(ctypes.get_errno()))
            break
    allowed = _held("CapPrm") & sum(1 << capability for capability in keep)
    halves = (_Sets * 2)(*(_Sets(half, half, 0) for half in (allowed & 0xFFFFFFFF, allowed >> 32)))
    for doing, failed in (
        ("ambient capabilities", _libc.prctl(_CAP_AMBIENT, _AMBIENT_CLEAR_ALL, 0, 0, 0)),
        ("capabilities", _libc.capset(ctypes.byref(_Header(_VERSION_3, 0)), halves)),
        ("new privileges", _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0)),
    ):
        if failed:
            log.warning("%s cannot be given up: %s", doing, os.strerror(ctypes.get_errno()))


def held() -> list[str]:
    """Return the names of the capabilities that this thread can use, ``CAP_NUMBER`` of unexpected ones."""
    mask = _held("CapEff")
    names = {capability.value: capability.name for capability in Capability}
    return [f"CAP_{names.get(number, number)}" for number in range(mask.bit_length()) if mask >> number & 1]


def _held(which: str) -> int:
    for line in Path("/proc/thread-self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == which:
            return int(value, 16)
    return 0


def _last() -> int:
    return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
