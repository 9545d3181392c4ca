"""What one walk over a function's syntax tree finds out: facts that every part of the frontend asks for."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .source import children

_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Survey:
    """Facts about a function. A variable is *its own* name in a comprehension or lambda that binds it."""

    outer: set[str] = field(default_factory=set)  # declared global or nonlocal, here or in a nested function
    inner: set[str] = field(default_factory=set)  # bound by comprehensions and lambdas: may mean something else outside
    binding_counts: dict[str, int] = field(default_factory=dict)  # how many places bind or delete each variable
    bound_in_loops: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)  # all that occur
    has_walrus: bool = False
    first_yield: ast.expr | None = None  # makes the function a generator
    rebound_within: dict[str, ast.AST] = field(default_factory=dict)  # by a nested function's `nonlocal`

    def bind(self, name: str, in_loop: bool) -> None:
        self.binding_counts[name] = self.binding_counts.get(name, 0) + 1
        if in_loop:
            self.bound_in_loops.add(name)


def survey(node: ast.FunctionDef | ast.AsyncFunctionDef, parameters: Sequence[str]) -> Survey:
    """The facts about a function with these parameters. Linear in its size."""
    found = Survey(binding_counts=dict.fromkeys(parameters, 1))
    pending: list[tuple[ast.AST, bool, bool]] = [(s, False, False) for s in reversed(node.body)]
    while pending:
        n, in_loop, is_nested = pending.pop()  # nested: inside a function or class of its own
        kind = type(n)
        if kind is ast.Constant:
            continue
        if kind is ast.Name:
            assert isinstance(n, ast.Name)
            found.names.add(n.id)
            if not is_nested and not isinstance(n.ctx, ast.Load):
                found.bind(n.id, in_loop)
            continue
        _note(found, n, in_loop, is_nested)
        if isinstance(n, _COMPREHENSIONS):
            pending += ((c, True, is_nested) for c in _parts(n))
            continue
        is_nested = is_nested or isinstance(n, (*_FUNCTIONS, ast.Lambda))
        in_loop = in_loop or isinstance(n, _LOOPS)
        pending += ((c, in_loop, is_nested) for c in children(n))
    return found


def _note(found: Survey, n: ast.AST, in_loop: bool, is_nested: bool) -> None:
    match n:
        case ast.Global():
            found.outer.update(n.names)
        case ast.Nonlocal() if is_nested:
            found.rebound_within.update(dict.fromkeys(n.names, n))
        case ast.Nonlocal():
            found.outer.update(n.names)
        case ast.NamedExpr():
            found.has_walrus = True
        case ast.Yield() | ast.YieldFrom() if not is_nested and found.first_yield is None:
            found.first_yield = n
        case ast.Lambda():
            found.inner.update(a.arg for a in ast.walk(n.args) if isinstance(a, ast.arg))
        case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
            for g in n.generators:
                found.inner.update(x.id for x in ast.walk(g.target) if isinstance(x, ast.Name))
        case _ if is_nested:
            pass
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            found.bind(n.name, in_loop)
        case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if n.name:
            found.bind(n.name, in_loop)
        case ast.MatchMapping() if n.rest:
            found.bind(n.rest, in_loop)
        case ast.Import() | ast.ImportFrom():
            for a in n.names:
                found.bind(a.asname or a.name.split(".")[0], in_loop)
        case _:
            pass


def _parts(n: ast.AST) -> Iterator[ast.AST]:
    """Of a comprehension, what may bind variables of the function: all but its own targets."""
    for child in children(n):
        if isinstance(child, ast.comprehension):
            yield child.iter
            yield from child.ifs
        else:
            yield child


__all__ = ["Survey", "survey"]
