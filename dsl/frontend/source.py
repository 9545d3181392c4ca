"""Finds the syntax tree of a live function: in files, notebooks, `python -c` and the interactive prompt."""

from __future__ import annotations

import ast
import inspect
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import TypeVar

from flowc.ir.errors import CaptureError, Loc

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class FunctionSource:
    """A function's syntax tree, whose line numbers are those of `lines` (the whole file, cell or entry)."""

    node: FunctionNode
    filename: str
    lines: tuple[str, ...]

    def line(self, number: int) -> str:
        return self.lines[number - 1].rstrip("\n") if 0 < number <= len(self.lines) else ""

    def segment(self, node: ast.expr) -> str:
        """The text of an expression."""
        first, last = node.lineno, node.end_lineno or node.lineno
        lines = self.lines[first - 1 : last]
        if first == last and lines[0].isascii():
            return lines[0][node.col_offset : node.end_col_offset]
        raw = [line.encode("utf-8", "surrogatepass") for line in lines]
        raw[-1] = raw[-1][: node.end_col_offset]
        raw[0] = raw[0][node.col_offset :]
        return b"".join(raw).decode("utf-8", "surrogatepass")

    def loc(self, node: ast.AST) -> Loc:
        """The place of a node; columns count characters, as Python's carets do."""
        line = getattr(node, "lineno", 0)
        col = getattr(node, "col_offset", 0)
        end = getattr(node, "end_col_offset", 0) or 0
        text = self.line(line)
        if not text.isascii():
            raw = text.encode("utf-8", "surrogatepass")
            col = len(raw[:col].decode("utf-8", "replace"))
            if getattr(node, "end_lineno", line) == line:
                end = len(raw[:end].decode("utf-8", "replace"))
        if getattr(node, "end_lineno", line) != line:
            end = len(text)
        return Loc(self.filename, line, col, end)


def children(node: ast.AST) -> Iterator[ast.AST]:
    """As `ast.iter_child_nodes`, without operators and contexts, and twice as fast."""
    for name in node._fields:
        value = getattr(node, name, None)
        if isinstance(value, list):
            for item in value:
                if isinstance(item, ast.AST):
                    yield item
        elif isinstance(value, ast.AST) and not isinstance(value, (ast.expr_context, ast.operator, ast.cmpop)):
            yield value


N = TypeVar("N", bound=ast.AST)


def synthetic(node: N, at: ast.AST) -> N:
    """A node that the frontend made itself, placed where `at` stands: its text is unparsed, not looked up in the
    source.
    """
    for part in ast.walk(node):
        if not hasattr(part, "lineno"):
            part.is_synthetic = True  # type: ignore[attr-defined]
    node.is_synthetic = True  # type: ignore[attr-defined]
    return ast.fix_missing_locations(ast.copy_location(node, at))


_PARSED: dict[str, tuple[tuple[str, ...], ast.Module]] = {}


def function_source(fn: FunctionType) -> FunctionSource:
    """The source of `fn`; CaptureError F011 if it cannot be found."""
    code = fn.__code__
    filename = code.co_filename
    lines = _lines(fn, filename)
    if lines:
        module = _parse(filename, lines)
        if module is not None:
            found = _find(module, code)
            if found is not None:
                return FunctionSource(found, filename, lines)
    raise CaptureError(
        f"the source of workflow `{fn.__qualname__}` cannot be found",
        code="F011",
        loc=Loc(filename, code.co_firstlineno),
        hint="flowc reads the function's source: define it in a file, a notebook cell or the interactive prompt, "
        "or build the graph with `flowc.ir.Builder`",
    )


def _lines(fn: FunctionType, filename: str) -> tuple[str, ...]:
    linecache.checkcache(filename)
    lines = linecache.getlines(filename, fn.__globals__)
    if lines:
        return tuple(lines)
    if filename == "<string>" and "-c" in sys.orig_argv[:-1]:
        return tuple(sys.orig_argv[sys.orig_argv.index("-c") + 1].splitlines(keepends=True))
    if filename == "<stdin>":
        return _from_prompt(fn)
    return ()


def _from_prompt(fn: FunctionType) -> tuple[str, ...]:
    """The entry typed at the classic interactive prompt, from readline's history.

    Line numbers of an entry start at 1. The newest entry whose code equals the function's is taken.
    """
    readline = sys.modules.get("readline")
    if readline is None:
        return ()
    history = [readline.get_history_item(i + 1) or "" for i in range(readline.get_current_history_length())]
    first = fn.__code__.co_firstlineno
    for start in range(len(history) - 1, -1, -1):
        if not history[start].lstrip().startswith(("@", "def ", "async def ")):
            continue
        for end in range(len(history), start, -1):
            lines = tuple("\n" * 0 + line + "\n" for line in history[start:end])
            padded = ("\n",) * (first - 1) + lines if first > 1 else lines
            try:
                module = ast.parse("".join(padded))
            except SyntaxError:
                continue
            node = _find(module, fn.__code__)
            if node is not None and _same_code(module, fn.__code__):
                return padded
            break
    return ()


def _same_code(module: ast.Module, code: CodeType) -> bool:
    pending = [compile(module, code.co_filename, "exec")]
    while pending:
        found = pending.pop()
        if found.co_name == code.co_name and found.co_code == code.co_code and found.co_names == code.co_names:
            return True
        pending += [c for c in found.co_consts if isinstance(c, CodeType)]
    return False


def _parse(filename: str, lines: tuple[str, ...]) -> ast.Module | None:
    known = _PARSED.get(filename)
    if known is not None and known[0] == lines:
        return known[1]
    try:
        module = ast.parse("".join(lines), filename)
    except SyntaxError:  # an edited file, or a notebook cell with magics
        try:
            cleaned = ["\n" if line.lstrip().startswith(("%", "!")) else line for line in lines]
            module = ast.parse("".join(cleaned), filename)
        except SyntaxError:
            return None
    _PARSED[filename] = (lines, module)
    return module


def _find(module: ast.Module, code: CodeType) -> FunctionNode | None:
    for node in ast.walk(module):
        if isinstance(node, FunctionNode) and node.name == code.co_name:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            if first == code.co_firstlineno:
                return node
    return None


def scope_name(fn: FunctionType) -> str:
    """How a plan refers to the Python scope of a function: `package.module:qualname`, or `path.py:qualname` of a
    script.
    """
    module = sys.modules.get(fn.__module__)
    if fn.__module__ == "__main__" or module is None or getattr(module, "__flowc_path__", None):
        path = getattr(module, "__flowc_path__", None) or inspect.getfile(fn)
        return f"{path}:{fn.__qualname__}"
    return f"{fn.__module__}:{fn.__qualname__}"
