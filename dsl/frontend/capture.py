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

from .liveness import RETURN_VALUE, Liveness
from .names import Guard, Resolver
from .purity import Site
from .source import FunctionSource, function_source, scope_name
from .statements import Statements
from .survey import Survey, survey


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
        body = src.node.body
        parameters = list(workflow.signature.parameters)
        facts = survey(src.node, parameters)
        local = frozenset(facts.binding_counts.keys() - facts.outer)
        _check(src, workflow, facts, local)
        live = Liveness(body)
        scope = self._scope(workflow.fn)
        tainted: frozenset[Site] = frozenset()
        while True:
            resolver = Resolver(workflow.fn, local | facts.inner, frozenset(facts.outer))
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
            lowering.names = frozenset(facts.names)
            lowering.has_walrus = facts.has_walrus
            lowering.outer_names = frozenset(facts.outer)
            lowering.binding_counts = facts.binding_counts
            lowering.bound_in_loops = frozenset(facts.bound_in_loops)
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


def _check(src: FunctionSource, workflow: Captured, facts: Survey, local: frozenset[str]) -> None:
    node = src.node

    def fail(at: ast.AST, code: str, message: str, hint: str) -> None:
        loc = src.loc(at)
        raise CaptureError(message, code=code, loc=loc, hint=hint, source=src.line(loc.line))

    if facts.first_yield is not None:
        fail(
            facts.first_yield,
            "F012",
            "`yield` cannot be captured in a workflow",
            "return the list, and read tokens as they come with `workflow.stream(...)`",
        )
    for name, at in facts.rebound_within.items():
        if name in local:
            fail(
                at,
                "F015",
                f"a nested function rebinds the variable `{name}` of the workflow",
                f"let it return the new value: `{name} = f({name})`",
            )
    for p in workflow.signature.parameters.values():
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
            given = node.args.vararg if p.kind == p.VAR_POSITIONAL else node.args.kwarg
            fail(
                given or node,
                "F018",
                f"`*{p.name}` in the signature of a workflow cannot be captured",
                "take a list or a dict as one parameter",
            )
