"""Tracebacks that show the user's program: its files, lines and functions, and no frame of flowc.

An operation that is no Python of the user's (a search, a tool call, a nested workflow) gets a frame all the same, one
that stands at the operation's line, as Jinja2 does for templates.
"""

from __future__ import annotations

import ast
from functools import lru_cache
from types import CodeType, TracebackType

from flowc.ir.errors import FlowcError, Loc
from flowc.ir.tracebacks import clean, without_own_frames

__all__ = ["blame", "chain", "clean", "locate", "with_frame_at", "without_own_frames"]


class _Here(Exception):
    pass


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


def blame(error: BaseException, label: str | None, loc: Loc | None, function: str, workflow: str) -> None:
    """Puts the operation's line on top of the error's traceback, and a note that names it, if it has a label."""
    error.__traceback__ = with_frame_at(without_own_frames(error.__traceback__), loc, function)
    if isinstance(error, FlowcError) and error.raised_at is None:
        error.raised_at = loc
    if label is None:
        return
    where = f" at {loc.file}:{loc.line}" if loc is not None and loc.line else ""
    note = f"in `{label}`{where}, workflow {workflow}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def locate(error: BaseException | None) -> None:
    """Says in the error's text where it was raised. For one that leaves its workflow: a handler inside must see the
    text that plain Python gives it.
    """
    if isinstance(error, FlowcError) and error.loc is None:
        error.loc = error.raised_at


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
