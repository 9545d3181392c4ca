"""Tracebacks without the frames of flowc.

A function that must not show up in its callers' tracebacks ends so:

    except BaseException as error:
        clean(error)
        raise                     # a bare `raise` adds no frame
"""

from __future__ import annotations

import os
from types import FrameType, TracebackType

SHOW_ALL = bool(os.environ.get("FLOWC_FULL_TRACEBACK"))  # for those who debug flowc itself


def _is_own(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "flowc" or name.startswith("flowc.")


def without_own_frames(tb: TracebackType | None) -> TracebackType | None:
    """The traceback less the frames of flowc; the same object if there are none."""
    if SHOW_ALL:
        return tb
    kept: list[TracebackType] = []
    dropped = False
    here = tb
    while here is not None:
        if _is_own(here.tb_frame):
            dropped = True
        else:
            kept.append(here)
        here = here.tb_next
    if not dropped:
        return tb
    result: TracebackType | None = None
    for entry in reversed(kept):
        result = TracebackType(result, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return result


def clean(error: BaseException) -> None:
    """Takes the frames of flowc out of the error's traceback."""
    error.__traceback__ = without_own_frames(error.__traceback__)
