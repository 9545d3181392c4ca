"""From a live Python function to a graph: the entry of the frontend."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, Protocol

from flowc.ir.builder import Builder
from flowc.ir.core import Graph, Scope
from flowc.ir.errors import CaptureError
from flowc.ir.types import Type

from .liveness import RETURN_VALUE, Liveness, binds
from .names import Guard, Resolver
from .purity import Site
from .source import FunctionSource, function_source, scope_name
from .statements import Statements


class Captured(Protocol):
    """What the frontend needs of a workflow object."""

    fn: Any  # the plain function
    name: str
    signature: inspect.Signature
    is_async: bool
    max_iterations: int


@dataclass
class Callee:
    """A workflow in a session; `graph` is None while it is being captured (a recursive call)."""

    name: str
    graph: Graph | None = None
    is_declared: bool = False  # its result's type rests on an annotation that nobody checks


@dataclass
class Session:
    """One capture: the entry workflow and every workflow that it calls, each once for each set of argument types."""

    callees: dict[tuple[int, tuple[Type, ...]], Callee] = field(default_factory=dict)
    scopes: dict[str, Scope] = field(default_factory=dict)
    symbols: dict[str, Any] = field(default_factory=dict)
    guards: dict[tuple[int, str], Guard] = field(default_factory=dict)
    keep: list[Any] = field(default_factory=list)  # objects whose ids are keys somewhere

    def callee(self, workflow: Captured, types: tuple[Type, ...]) -> Callee:
        """The graph of a workflow for these argument types."""
        key = (id(workflow), types)
        found = self.callees.get(key)
        if found is None:
            self.keep.append(workflow)
            taken = {c.name for c in self.callees.values()}
            name, n = workflow.name, 1
            while name in taken:
                n += 1
                name = f"{workflow.name}_{n}"
            found = self.callees[key] = Callee(name)
            found.graph, found.is_declared = self._lower(workflow, name, types)
        return found

    def _lower(self, workflow: Captured, name: str, types: tuple[Type, ...]) -> tuple[Graph, bool]:
        src = function_source(workflow.fn)
        _check(src, workflow)
        body = src.node.body
        declared = {n for s in ast.walk(src.node) if isinstance(s, (ast.Global, ast.Nonlocal)) for n in s.names}
        parameters = list(workflow.signature.parameters)
        own = frozenset(parameters) | binds(body, appends=False)
        local = frozenset(own - declared)
        inner = _inner_names(src.node)
        has_walrus = any(isinstance(n, ast.NamedExpr) for n in ast.walk(src.node))
        live = Liveness(body)
        scope = self._scope(workflow.fn)
        tainted: frozenset[Site] = frozenset()
        while True:
            resolver = Resolver(workflow.fn, local | inner, frozenset(declared))
            builder = Builder(name, list(zip(parameters, types, strict=True)), scope=scope, loc=src.loc(src.node))
            builder.scopes, builder.symbols = self.scopes, self.symbols
            lowering = Statements(
                self,
                src,
                resolver,
                live,
                builder,
                local,
                isinstance(src.node, ast.AsyncFunctionDef),
                tainted,
                workflow.max_iterations,
            )
            lowering.has_walrus = has_walrus
            lowering.outer_names = frozenset(declared)
            lowering.binding_counts, lowering.bound_in_loops = _bindings(src.node, parameters)
            lowering.env = dict(zip(parameters, builder.params, strict=True))
            lowering.block(body, frozenset({RETURN_VALUE}), tail=True)
            if lowering.escaped <= tainted:
                break
            tainted |= lowering.escaped  # these lists are shared with opaque code after all: again, as mutable objects
        self.guards.update(resolver.guards)
        result = lowering.env.get(RETURN_VALUE)
        if result is None:  # every path raises
            result = builder.const(None, "result")
        return builder.finish(result), lowering.fact(result).is_declared

    def _scope(self, fn: FunctionType) -> str:
        cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        scope = Scope(fn.__globals__, cells, fn.__code__.co_filename, fn.__name__)
        stem = name = scope_name(fn)
        n = 1
        while name in self.scopes and not _same_scope(self.scopes[name], scope):
            n += 1
            name = f"{stem}#{n}"
        self.scopes[name] = scope
        return name


def _same_scope(a: Scope, b: Scope) -> bool:
    return (
        a.globals is b.globals and a.cells.keys() == b.cells.keys() and all(a.cells[k] is b.cells[k] for k in a.cells)
    )


def capture(workflow: Captured, types: Sequence[Type]) -> tuple[Graph, tuple[Guard, ...]]:
    """The graph of a workflow for arguments of these types, and the guards under which it stays true.

    Raises CaptureError with the source line, the reason and what to write instead.
    """
    session = Session()
    entry = session.callee(workflow, tuple(types))
    assert entry.graph is not None
    others = tuple(c.graph for c in session.callees.values() if c is not entry and c.graph is not None)
    return replace(entry.graph, callees=others), tuple(session.guards.values())


def _check(src: FunctionSource, workflow: Captured) -> None:
    node = src.node

    def fail(at: ast.AST, code: str, message: str, hint: str) -> None:
        loc = src.loc(at)
        raise CaptureError(message, code=code, loc=loc, hint=hint, source=src.line(loc.line))

    pending: list[ast.AST] = list(node.body)
    while pending:
        n = pending.pop()
        if isinstance(n, (ast.Yield, ast.YieldFrom)):
            fail(
                n,
                "F012",
                "`yield` cannot be captured in a workflow",
                "return the list, and read tokens as they come with `workflow.stream(...)`",
            )
        if not isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            pending.extend(ast.iter_child_nodes(n))
    for p in workflow.signature.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            given = node.args.vararg if p.kind == p.VAR_POSITIONAL else node.args.kwarg
            fail(
                given or node,
                "F018",
                f"`*{p.name}` in the signature of a workflow cannot be captured",
                "take a list or a dict as one parameter",
            )


def _inner_names(node: ast.AST) -> set[str]:
    """What comprehensions and lambdas of a function call their own; outside them the names may mean others."""
    found: set[str] = set()
    for n in ast.walk(node):
        if isinstance(n, ast.comprehension):
            found.update(x.id for x in ast.walk(n.target) if isinstance(x, ast.Name))
        elif isinstance(n, ast.Lambda):
            found.update(a.arg for a in ast.walk(n.args) if isinstance(a, ast.arg))
    return found


def _bindings(
    node: ast.FunctionDef | ast.AsyncFunctionDef, parameters: Sequence[str]
) -> tuple[dict[str, int], frozenset[str]]:
    """How many places bind each variable, and which are bound inside a loop."""
    counts = dict.fromkeys(parameters, 1)
    in_loops: set[str] = set()

    def bind(name: str, in_loop: bool) -> None:
        counts[name] = counts.get(name, 0) + 1
        if in_loop:
            in_loops.add(name)

    def visit(n: ast.AST, in_loop: bool) -> None:
        match n:
            case ast.Name(ctx=ast.Store() | ast.Del()):
                bind(n.id, in_loop)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                bind(n.name, in_loop)
                return
            case ast.Lambda():
                return
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                for walrus in (x for x in ast.walk(n) if isinstance(x, ast.NamedExpr)):
                    bind(walrus.target.id, True)
                return
            case ast.ExceptHandler() | ast.MatchAs() | ast.MatchStar() if n.name:
                bind(n.name, in_loop)
            case ast.MatchMapping() if n.rest:
                bind(n.rest, in_loop)
            case ast.Import() | ast.ImportFrom():
                for a in n.names:
                    bind(a.asname or a.name.split(".")[0], in_loop)
            case _:
                pass
        inside = in_loop or isinstance(n, (ast.For, ast.AsyncFor, ast.While))
        for child in ast.iter_child_nodes(n):
            visit(child, inside)

    for s in node.body:
        visit(s, False)
    return counts, frozenset(in_loops)
