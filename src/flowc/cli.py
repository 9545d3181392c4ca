"""The command `flowc`.

Exit codes: 0 all went well; 1 it was started and failed (a run, a compilation, a comparison); 2 the command line, the
configuration or a target is wrong and nothing was started; 130 interrupted. Data goes to stdout, everything else to
stderr.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args in (["--version"], ["-V"]):
        return _version("--json" in args)
    from flowc.commands.app import run

    return run(args)


def _version(as_json: bool = False) -> int:
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("flowc")
    except PackageNotFoundError:  # run from a checkout that was never installed
        found = "0+unknown"
    print(f'{{"flowc": "{found}"}}' if as_json else f"flowc {found}")
    return 0
