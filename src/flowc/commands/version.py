"""The version, printed; apart from the other commands, so that it takes no time."""

from __future__ import annotations

from flowc import __version__

__all__ = ["show_version"]


def show_version() -> int:
    """Prints the version; the exit code."""
    print(f"flowc {__version__}")
    return 0
