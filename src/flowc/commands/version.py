"""The version, printed; apart from the other commands, so that it takes no time."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["show_version"]


def show_version() -> int:
    """Prints the installed version; the exit code."""
    try:
        found = version("flowc")
    except PackageNotFoundError:  # run from a checkout that was never installed
        found = "0+unknown"
    print(f"flowc {found}")
    return 0
