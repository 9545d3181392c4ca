"""Tracebacks that show the user's program: its files, lines and functions, and no frame of flowc.

An operation that is no Python of the user's (a search, a tool call, a nested workflow) gets a frame all the same, one
that stands at the operation's line, as Jinja2 does for templates.
"""

from __future__ import annotations

import ast
import os
from functools import lru_cache
from types import CodeType, FrameType, TracebackType

from flowc.ir.errors import FlowcError, Loc

SHOW_ALL = bool(os.environ.get("FLOWC_FULL_TRACEBACK"))  # for those who debug flowc itself


class _Here(Exception):
    pass


def _is_own(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__", ""))
    return name == "flowc" or name.startswith("flowc.")


def without_own_frames(tb: TracebackType | None) -> TracebackType | None:
    """The traceback less the frames of flowc. The same object if there are none.

    In a function that must not show up itself, set `error.__traceback__` to this and end with a bare `raise`: that
    adds no frame.
    """
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


@lru_cache(maxsize=1024)
def _raiser(filename: str, function: str, line: int, col: int, end_col: int) -> CodeType:
    col, end_col = (col, end_col) if end_col > col else (-1, -1)
    where = {"lineno": line, "end_lineno": line, "col_offset": col, "end_col_offset": end_col}
    tree = ast.Module([ast.Raise(ast.Name("__flowc_here__", ast.Load(), **where), None, **where)], [])
    code = compile(tree, filename, "exec")
    return code.replace(co_name=function, co_qualname=function)


def with_frame_at(tb: TracebackType | None, loc: Loc | None, function: str) -> TracebackType | None:
    """The traceback below one more frame: the line `loc`, in a function of that name."""
    if loc is None or not loc.line:
        return tb
    try:
        scope = {"__name__": "__main__", "__file__": loc.file, "__flowc_here__": _Here}
        exec(_raiser(loc.file, function, loc.line, loc.col, loc.end_col), scope)
    except _Here as here:
        frame = here.__traceback__ and here.__traceback__.tb_next
        here.__traceback__ = None
        if frame is not None:
            return TracebackType(tb, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return tb


def clean(error: BaseException) -> None:
    """Takes the frames of flowc out of the error's traceback."""
    error.__traceback__ = without_own_frames(error.__traceback__)


def blame(error: BaseException, label: str | None, loc: Loc | None, function: str, workflow: str) -> None:
    """Puts the operation's line on top of the error's traceback, and a note that names it, if it has a label."""
    error.__traceback__ = with_frame_at(without_own_frames(error.__traceback__), loc, function)
    if isinstance(error, FlowcError) and error.loc is None:
        error.loc = loc
    if label is None:
        return
    where = f" at {loc.file}:{loc.line}" if loc is not None and loc.line else ""
    note = f"in `{label}`{where}, workflow {workflow}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def chain(error: BaseException, handled: BaseException) -> None:
    """Notes that `error` was raised while `handled` was being handled, as Python does by itself within one frame."""
    seen: BaseException | None = error
    while seen is not None:
        if seen is handled:
            return
        if seen.__context__ is None:
            break
        seen = seen.__context__
    last, there = handled, handled.__context__
    while there is not None:  # never make a ring: cut it where the handled error already leads back to this one
        if there is error:
            last.__context__ = None
            break
        last, there = there, there.__context__
    if seen is not None and seen is not handled:
        seen.__context__ = handled
