"""What every part of the frontend shares: variables as SSA values, regions, plain Python as `py` operations, errors."""

from __future__ import annotations

import ast
import itertools
import textwrap
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NoReturn

from flowc.ir.builder import Block, Builder
from flowc.ir.core import Attr, Region, Value
from flowc.ir.errors import CaptureError, Loc
from flowc.ir.types import ANY, NEVER, NONE, Type, join

from .liveness import RETURN_VALUE, Liveness
from .names import Resolver
from .purity import READS, WRITES, Analyzer, Info, Site, free_names
from .source import FunctionSource

if TYPE_CHECKING:
    from .capture import Session

EXIT = "<exit>"  # why a block was left: one of the codes below
NORMAL, CONTINUE, BREAK, RETURN = 0, 1, 2, 3
HINTS = {
    EXIT: "exit",
    RETURN_VALUE: "result",
    "<ok>": "ok",
    "<value>": "v",
    "<chunk>": "chunk",
}  # how internal variables print


@dataclass(frozen=True, slots=True)
class Fact:
    """What the frontend knows of an SSA value beyond its type."""

    sites: frozenset[Site] = frozenset()  # the lists it may be or hold
    is_unbound: bool = False  # may be the mark of an unbound variable
    is_declared: bool = False  # its type rests on an annotation that nobody checked
    is_task: bool = False  # stands for a coroutine or task: has to be awaited


NO_FACT = Fact()


def either(a: Fact, b: Fact) -> Fact:
    """What is possible of one or the other."""
    return Fact(a.sites | b.sites, a.is_unbound or b.is_unbound, a.is_declared or b.is_declared, a.is_task or b.is_task)


@dataclass
class State:
    """The lowering of one function, in progress.

    The mixins `Expressions`, `Calls` and `Statements` add what each says.
    """

    session: Session
    src: FunctionSource
    resolver: Resolver
    live: Liveness
    builder: Builder
    locals: frozenset[str]
    is_async: bool
    tainted: frozenset[Site]
    loop_limit: int
    env: dict[str, Value] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)
    cells: list[dict[str, Value]] = field(default_factory=list)  # variables that a handler may read, innermost last
    cell_types: dict[str, Type] = field(default_factory=dict)
    cell_facts: dict[str, Fact] = field(default_factory=dict)
    handled: list[Value] = field(default_factory=list)  # errors being handled, innermost last
    escaped: set[Site] = field(default_factory=set)
    started: list[Value] = field(default_factory=list)  # by the tasks that were made since the last `await`
    group_count: int = 0  # of operations that run at once
    loop_types: dict[int, tuple[tuple[Type, ...], tuple[Fact, ...]]] = field(default_factory=dict)
    has_op_memo: dict[int, tuple[ast.AST, bool]] = field(
        default_factory=dict
    )  # holds the node, so that its id stays its own
    names: frozenset[str] = frozenset()  # every name in the function: the frontend's own names are others
    has_walrus: bool = True  # does the function hold a `:=` anywhere?
    binding_counts: dict[str, int] = field(default_factory=dict)
    bound_in_loops: frozenset[str] = frozenset()

    # -- errors
    def fail(self, node: ast.AST, code: str, message: str, hint: str) -> NoReturn:
        loc = self.src.loc(node)
        raise CaptureError(message, code=code, loc=loc, hint=hint, source=self.src.line(loc.line))

    def fail_here(self, code: str, message: str, hint: str) -> NoReturn:
        """As `fail`, at the source of the operation that is being built."""
        loc = self.builder.loc
        raise CaptureError(message, code=code, loc=loc, hint=hint, source=self.src.line(loc.line) if loc else None)

    # -- facts
    def fact(self, value: Value) -> Fact:
        return self.facts.get(value.name, NO_FACT)

    def know(self, value: Value, **facts: Any) -> Value:
        return self.know_fact(value, Fact(**facts))

    def know_fact(self, value: Value, fact: Fact) -> Value:
        if fact != NO_FACT:
            self.facts[value.name] = fact
        return value

    def merged(self, value: Value, parts: Sequence[Value]) -> Value:
        """`value` may be any of `parts`: what is possible of one is possible of it."""
        facts = [self.fact(p) for p in parts]
        for p, f in zip(parts, facts, strict=True):
            if f.is_task:
                name = p.name.partition(".")[0]
                self.fail_here(
                    "F016",
                    f"the task `{name}` leaves a branch or loop without being awaited",
                    f"write `await {name}` there",
                )
        return self.know_fact(value, reduce(either, facts, NO_FACT))

    # -- variables
    def read(self, name: str) -> Value:
        """The current value of a local variable, checked where it may be unbound."""
        value = self.env.get(name)
        if value is not None and not self.fact(value).is_unbound:
            return value
        if value is None:
            value = self.unbound(name)
        fact = self.fact(value)
        (bound,) = self.builder.emit(
            "bound", (value,), [(name, value.type if value.type != NEVER else ANY)], {"variable": name}
        )
        self.know(bound, sites=fact.sites, is_declared=fact.is_declared)
        self.env[name] = bound
        return bound

    def unbound(self, name: str) -> Value:
        (value,) = self.builder.emit("undef", (), [(HINTS.get(name, name), NEVER)])
        return self.know(value, is_unbound=name not in HINTS)

    def assign(self, name: str, value: Value) -> None:
        self.env[name] = value
        for frame in self.cells:
            cell = frame.get(name)
            if cell is not None:
                self.builder.emit("store", (cell, value), [("stored", NONE)])
                self.cell_types[cell.name] = join(self.cell_types.get(cell.name, NEVER), value.type)
                self.cell_facts[cell.name] = either(self.cell_facts.get(cell.name, NO_FACT), self.fact(value))

    def outgoing(self, name: str) -> Value:
        """What a region yields for a variable: its value, or the mark of an unbound one."""
        value = self.env.get(name)
        return value if value is not None else self.unbound(name)

    def set_exit(self, code: int) -> None:
        self.env[EXIT] = self.builder.const(code, "exit")

    @contextmanager
    def scoped_env(self) -> Iterator[None]:
        saved = dict(self.env)
        try:
            yield
        finally:
            self.env = saved

    @contextmanager
    def at(self, node: ast.AST) -> Iterator[None]:
        """New operations come from this piece of source."""
        saved = self.builder.loc
        self.builder.loc = self.src.loc(node)
        try:
            yield
        finally:
            self.builder.loc = saved

    def region(
        self, fill: Callable[[tuple[Value, ...]], Sequence[Value]], params: Sequence[tuple[str, Type]] = ()
    ) -> tuple[Region, Block]:
        """A region filled by `fill(params)`, which returns what it yields; variables bound inside stay inside."""
        with self.scoped_env(), self.builder.region(params) as block:
            block.yields = tuple(fill(block.params))
        return block.done(), block

    def select(
        self, condition: Value, then: Callable[[], None], orelse: Callable[[], None], outs: Sequence[str]
    ) -> None:
        """An `if` operation over two ways to go on; the variables `outs` leave it."""

        def arm(run: Callable[[], None]) -> Callable[[tuple[Value, ...]], list[Value]]:
            def fill(_: tuple[Value, ...]) -> list[Value]:
                run()
                return [self.outgoing(n) for n in outs]

            return fill

        a, _ = self.region(arm(then))
        b, _ = self.region(arm(orelse))
        results = self.builder.if_(condition, a, b, [HINTS.get(n, n) for n in outs])
        for name, value, x, y in zip(outs, results, a.yields, b.yields, strict=True):
            self.env[name] = self.merged(value, (x, y))

    # -- plain Python
    def analyzer(self) -> Analyzer:
        return Analyzer(self.resolver, self._info, self.tainted)

    def _info(self, name: str) -> Info | None:
        if name not in self.locals:
            return None
        value = self.env.get(name)
        if value is None:
            return Info(ANY)
        return Info(value.type, sites=self.fact(value).sites)

    def analyze(self, node: ast.expr) -> Info:
        a = self.analyzer()
        info = a.expr(node)
        self.settle(a)
        return info

    def settle(self, a: Analyzer) -> None:
        """Takes over what an analysis found: lists that escaped, variables that closures hold on to."""
        self.escaped |= a.escaped
        for holder, name in a.captures:
            if self.binding_counts.get(name, 0) > 1 or name in self.bound_in_loops or name not in self.env:
                what = "a generator expression" if isinstance(holder, ast.GeneratorExp) else "a nested function"
                self.fail(
                    holder,
                    "F015",
                    f"{what} holds on to the variable `{name}`, which the workflow binds more than once or later",
                    f"bind its value now: a default argument (`{name}={name}`) or a list instead of a generator",
                )

    def py(
        self,
        source: str,
        inputs: Sequence[tuple[str, Value]],
        info: Info,
        *,
        hint: str = "v",
        outs: Sequence[tuple[str, Type]] | None = None,
        scope: str | None = None,
    ) -> tuple[Value, ...]:
        """A `py` operation over named inputs, with the effects that the analysis found."""
        for name, value in inputs:
            if self.fact(value).is_task:
                self.fail_here(
                    "F016", f"`{name}` is a coroutine or task that is not awaited here", f"write `await {name}`"
                )
        results = [(hint, info.type)] if outs is None else list(outs)
        is_declared = any(self.fact(v).is_declared for _, v in inputs)
        attrs: dict[str, Attr] = {
            "source": source,
            "params": tuple(n for n, _ in inputs),
            "outs": tuple(n for n, _ in outs) if outs is not None else None,
            "reads": ("py",) if info.level >= READS else None,
            "writes": ("py",) if info.level >= WRITES else None,
            "raises": True if info.raises or is_declared else None,
            "is_async": True if info.is_async else None,
            "scope": scope,
        }
        values = self.builder.emit("py", [v for _, v in inputs], results, attrs)
        for v in values if is_declared else ():
            self.know(v, is_declared=True)
        return values

    def py_expr(self, node: ast.expr, hint: str = "v", placeholders: dict[str, Value] | None = None) -> Value:
        """An expression without operations (but for placeholders that stand for their values) as one `py` operation."""
        placeholders = placeholders or {}
        names = [n for n in free_names(node) if n in self.locals or n in placeholders]
        unbound = [n for n in names if n not in placeholders and self.is_maybe_unbound(n)]
        a = self.analyzer()
        known = {n: Info(v.type, sites=self.fact(v).sites) for n, v in placeholders.items()}
        lookup = a.lookup
        a.lookup = lambda name: known[name] if name in known else lookup(name)
        info = a.expr(node)
        self.settle(a)
        text = self.spliced(node) if placeholders else self.text(node)
        inputs = [(n, placeholders[n] if n in placeholders else self.outgoing(n)) for n in names]
        if not unbound:
            (value,) = self.py(text, inputs, info, hint=hint)
            return self.know(value, sites=info.sites, is_declared=a.trusts or self.fact(value).is_declared)
        result = self.own_name("value", placeholders)
        outs = [(result, info.type), *((n, dict(inputs)[n].type) for n in unbound)]
        value, *rest = self.py(f"{result} = {text}", inputs, replace(info, raises=True), outs=outs)
        for n, v in zip(
            unbound, rest, strict=True
        ):  # the expression has read it, so it is bound; but perhaps not every arm
            self.env[n] = self.know(v, sites=self.fact(dict(inputs)[n]).sites, is_unbound=True)
        return self.know(value, sites=info.sites, is_declared=a.trusts or self.fact(value).is_declared)

    def own_name(self, stem: str, taken: Container[str] = ()) -> str:
        """A name for the text of a `py` operation that the function does not use itself."""
        candidates = chain([stem], (f"{stem}_{i}" for i in itertools.count(1)))
        return next(n for n in candidates if n not in self.names and n not in self.locals and n not in taken)

    def binds_inside(self, node: ast.AST) -> bool:
        """Does an expression bind a variable with `:=`?"""
        return self.has_walrus and any(isinstance(n, ast.NamedExpr) for n in ast.walk(node))

    def is_maybe_unbound(self, name: str) -> bool:
        value = self.env.get(name)
        return value is None or self.fact(value).is_unbound

    def spliced(self, node: ast.expr) -> str:
        """The source of an expression whose parts were replaced by names; text over several lines keeps them."""
        cuts: dict[ast.expr, str] = getattr(node, "cuts", {})
        first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if getattr(node, "is_synthetic", False) or not first or first == last:
            return ast.unparse(node)
        lines = [line.encode() for line in self.src.lines[first - 1 : last]]
        starts = [0, *accumulate(map(len, lines))]
        text = b"".join(lines)

        def offset(line: int, col: int) -> int:
            return starts[line - first] + col

        pieces: list[bytes] = []
        at = offset(first, node.col_offset)
        for old in sorted(cuts, key=lambda n: (n.lineno, n.col_offset)):
            begin, end = offset(old.lineno, old.col_offset), offset(old.end_lineno or 0, old.end_col_offset or 0)
            pieces += [text[at:begin], cuts[old].encode(), b"\n" * text.count(b"\n", begin, end)]
            at = end
        pieces.append(text[at : offset(last, node.end_col_offset or 0)])
        candidate = b"".join(pieces).decode()
        try:
            if ast.dump(ast.parse(f"({candidate})", mode="eval").body) == ast.dump(node):
                return f"({candidate})"
        except SyntaxError:
            pass
        return ast.unparse(node)

    def text(self, node: ast.AST) -> str:
        """The source of an expression or statement as the user wrote it, so that its lines stay its lines."""
        if getattr(node, "is_synthetic", False):
            return ast.unparse(node)
        first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 0) or 0
        if not first or last > len(self.src.lines):
            return ast.unparse(node)
        if isinstance(node, ast.expr):
            segment = self.src.segment(node)
            if first == last:
                return segment
            candidate = f"({segment})"
        else:
            candidate = textwrap.dedent("".join(self.src.lines[first - 1 : last])).rstrip("\n")
        try:
            parsed = ast.parse(candidate, mode="eval").body if isinstance(node, ast.expr) else ast.parse(candidate)
            wanted = node if isinstance(node, ast.expr) else ast.Module([node], [])  # type: ignore[list-item]
            if ast.dump(parsed) == ast.dump(wanted):
                return candidate
        except SyntaxError:
            pass
        return ast.unparse(node)

    def list_value(self, items: Sequence[Value], node: ast.AST, hint: str = "items") -> Value:
        """A fresh list of the given values."""
        inner: frozenset[Site] = frozenset().union(*(self.fact(v).sites for v in items))
        t, sites = self.analyzer().fresh(node, join(*(v.type for v in items)) if items else NEVER, inner)
        if t == ANY:
            self.escaped |= inner
        value = self.builder.list_of(*items, hint=hint)
        if value.type != t:
            block = self.builder.block
            op = block.ops.pop()
            value = Value(value.name, t)
            block.ops.append(type(op)(op.name, op.operands, (value,), op.attrs, op.regions, op.loc))
        return self.know(value, sites=sites, is_declared=any(self.fact(v).is_declared for v in items))

    def loc(self, node: ast.AST) -> Loc:
        return self.src.loc(node)


__all__ = [
    "BREAK", "CONTINUE", "EXIT", "NORMAL", "RETURN", "Fact", "State",
]  # fmt: skip
