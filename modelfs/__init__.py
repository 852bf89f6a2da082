"""modelfs: remote model stores as a local, read-only ``/models`` tree."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Detected", "__version__", "detect", "local_path"]

if TYPE_CHECKING:
    from modelfs.environment import Detected, detect, local_path


def __getattr__(name: str) -> Any:
    # Lazily: commands and daemons that only want the version do not pay for a cache and all stores.
    if name in ("Detected", "detect", "local_path"):
        from modelfs import environment

        return getattr(environment, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
