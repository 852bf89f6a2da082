"""fs-verity: a file that the kernel itself compares with a hash tree at every read, also reads it does alone.

https://docs.kernel.org/filesystems/fsverity.html and linux/fsverity.h. Such a file cannot be changed any
more, by nobody; it can be removed. ext4, f2fs and btrfs offer it where the kernel (CONFIG_FS_VERITY) and
the file system (``tune2fs -O verity``) were made for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_ENABLE = 0x40806685  # _IOW('f', 133, struct fsverity_enable_arg)
_GET_FLAGS = 0x80086601  # FS_IOC_GETFLAGS, _IOR('f', 1, long)
_VERITY_FL = 0x00100000
_SHA256 = 1
_HASH_BLOCK = 4096
# struct fsverity_enable_arg: version, hash_algorithm, block_size, salt_size, salt_ptr, sig_size, reserved,
# sig_ptr, 11 reserved.
_ARGUMENT = struct.pack("=IIIIQIIQ88x", 1, _SHA256, _HASH_BLOCK, 0, 0, 0, 0, 0)


def enable(fd: int) -> None:
    """Let the kernel check the file of `fd` from now on; reads all of it to build the hash tree.

    `fd` must be open for reading only, of a file that its mode lets us write and that nobody has open for
    writing. Raises OSError: EOPNOTSUPP or ENOTTY if the file system or the kernel has no fs-verity, ETXTBSY
    if somebody could write, EACCES if we could not.
    """
    fcntl.ioctl(fd, _ENABLE, _ARGUMENT)


def is_enabled(fd: int) -> bool:
    """Return whether the kernel checks the file of `fd`."""
    try:
        flags = fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("l")))
    except OSError:  # a file system without flags has no fs-verity either
        return False
    return bool(struct.unpack("=I", flags[:4])[0] & _VERITY_FL)


def refusal(directory: Path) -> str | None:
    """Try fs-verity on a file of its own in `directory`; return why there is none, None if there is."""
    path = directory / "verity"
    try:
        path.write_bytes(bytes(_HASH_BLOCK))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enable(fd)
        finally:
            os.close(fd)
            path.unlink()
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            return "the kernel or the file system has no fs-verity"
        return f"it is refused: {error.strerror}"
    return None
