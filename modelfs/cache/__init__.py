"""Blocks on disk: presence, checksums, verification, eviction, pins, and small JSON values beside them.

::

    DIR/            0700
        lock        flock of the one daemon that uses the directory, and its process id
        format      version of this layout
        clean       the index, left by a clean stop; the next start reads and removes it
        session     the id of the boot in which the last start trusted what was there
        objects/XX/KEY.data     the bytes, a sparse file of the object's size; 0600, 0400 once complete
        objects/XX/KEY.table    which blocks are there, and their checksums: modelfs.cache.table
        local/      models as plain directories, of modelfs.local, with hard links to data files
        meta/       listings, manifests, pins: JSON in a diskcache

**A block is present only after its bytes are written**: ``write`` puts bytes into the data file, ``commit``
computes the checksum from the file and writes the 8-byte record of the block.

**A crash costs time, never truth.** The order of two writes says nothing after a power failure, so without
the file ``clean`` every block is compared with its checksum before it is first served. A clean stop writes
that file after everything else is on the disk (syncfs); one that does not wait for the disk notes the boot
id of the machine, and is believed only within that boot. If only the process died (the file ``session``
tells), everything it had written is there, and nothing is checked. An object of which some block is still
unchecked when it is closed stays unchecked in the next session.

Concurrency
===========

Many threads write, commit, drop and evict while the event loop looks up and reads. The loop never waits:

1. *Looking is lock-free.* What the loop asks (``has``, ``covers``, ``missing``, ``read_now``, the index) are
   single look-ups in dicts and attributes, each atomic under the GIL. All changes are made under a lock:
   the generation's for one object, the index's for the sums. The generation's lock is held while a
   record of the table is written and while a hole is punched, so only worker threads ever take it; the
   index's lock is never held across I/O.
2. *A read never returns zeros of a hole.* A block disappears in this order: out of memory, epoch + 1, table,
   hole, epoch + 1. A read notes the epoch, then sees the block present, then reads, then compares the
   epoch. If it is unchanged, no block had begun to disappear before the bytes were read; else the
   read starts over (``read``) or gives up (``read_now``).
3. *A write is not lost in a hole.* A write notes how often its block was dropped, writes, takes the lock and
   counts its bytes as arrived only if that number is unchanged; else it writes them again, or fails if
   they came out of a pipe. A hole is punched under that lock and between two steps of the number, so a
   write that overlaps it sees a change.
4. *A descriptor is never reused under an operation.* The files belong to a ``Generation``; every operation
   holds a reference to it, and the last reference closes the files. ``discard`` puts new files in the place
   of the old, ``close`` nothing: an operation that is still running finishes on what it began with, and may
   not change the table any more (``dead``). Where the data file is opened in another way, or replaced because
   it is sealed, dup3 changes what the same descriptor stands for; the second happens between two epochs.
5. *Opening, discarding, evicting and closing one key exclude each other* by a guard, one of 64 by key. It is
   held across the I/O of these operations; only threads take it, and other keys mostly have another.
6. *The limit is kept under concurrency*: space is counted before it is used, under one lock (``_room``)
   that is held while something is evicted.

**A sealed file** (fs-verity) cannot be changed by anybody. It counts as sealed before the kernel begins to
read it, which takes no lock; to lose a block then means to lose all, and to get a new file. Loans have
descriptors of their own, and go on with the old one.

Locks are taken in the order room, guard, generation, index; nobody holds a guard or a generation when
asking for room. Loans (``CacheObject.lend``) keep the object open and its data unpunched.
"""

from modelfs.cache.audit import Audit
from modelfs.cache.directory import Cache, Unused, Usage
from modelfs.cache.disk import Data, Pipe
from modelfs.cache.objects import CacheObject, Loan, Place, Verifier

__all__ = ["Audit", "Cache", "CacheObject", "Data", "Loan", "Pipe", "Place", "Unused", "Usage", "Verifier"]
