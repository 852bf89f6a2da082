"""A model of what a mount shows, and random operations that are done to both and compared.

Two models are mounted: ``web`` over HTTP, through a proxy that breaks answers, and ``disk``, a directory. An
operation is a tuple, its name and plain values; files are chosen by an index that wraps around, so that
operations can be left out of a list and the rest still makes sense. `World` does each to the mount, the store
and the reference, which is a dict from path to content, and compares at once.

What a reader may get is exact: the bytes of the version that was shown when it opened the file. Errors need
an excuse: the store has other bytes now (``ESTALE``), it is out of order (the errno that docs/reliability.md
gives), or sent bytes with a wrong digest (``EIO``). Wrong bytes have none.

``python -m tests.mount.reference`` is the long run, ``make reference``.
"""
