"""What tests of and with modelfs use: stores in memory, stores that fail on cue, the contract of a store.

Nothing here needs more than modelfs itself; modules of this package that do (a Hub, an S3 server) are
imported by name and say what to install.
"""

from modelfs.testing.contract import check_store, read_span
from modelfs.testing.store import FaultyStore, MemoryStore

__all__ = ["FaultyStore", "MemoryStore", "check_store", "read_span"]
