"""modelfs: remote model stores as a local, read-only ``/models`` tree."""

__version__ = "0.1.0"
