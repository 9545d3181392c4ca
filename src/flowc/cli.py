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
        from flowc.commands.version import show_version

        return show_version()
    from flowc.commands.app import run

    return run(args)
