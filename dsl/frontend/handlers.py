"""Errors and tasks: `raise`, `assert`, `try` with its handlers and `finally`, `asyncio.TaskGroup`."""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from flowc.ir.core import Attr, Value
from flowc.ir.types import ANY, BOOL, NONE, is_immutable, join

from .liveness import RETURN_VALUE, binds, exits, reads
from .loops import Loops
from .names import MISSING
from .purity import PURE, READS, Info
from .state import EXIT, HINTS, NO_FACT, NORMAL

Handler = tuple[str, list[tuple[str, Value]], Callable[[Value], None]]  # exception types, names in them, what to do


class Handlers(Loops):
    """Lowers what raises and what handles errors."""

    # -- errors
    def _raise(self, s: ast.Raise) -> None:
        with self.at(s):
            if s.exc is None and self.handled:
                self.py("raise error", [("error", self.handled[-1])], Info(NONE, PURE, True), outs=())
                return
            placeholders: dict[str, Value] = {}
            parts = [e for e in (s.exc, s.cause) if e is not None]
            level, is_async = PURE, False
            rebuilt: ast.Raise = s
            if any(map(self.has_op, parts)):
                new = []
                for e in parts:
                    value = self.lower(e, "error")
                    name = f"error_{len(placeholders)}"
                    placeholders[name] = value
                    new.append(ast.Name(name, ast.Load()))
                rebuilt = ast.Raise(new[0], new[1] if len(new) > 1 else None)
            else:
                a = self.analyzer()
                for e in parts:
                    i = a.expr(e)
                    level, is_async = max(level, i.level), is_async or i.is_async
                    self.escaped |= i.sites
                self.settle(a)
            names = sorted(n for n in reads(rebuilt) if n in self.locals or n in placeholders)
            inputs = [(n, placeholders[n] if n in placeholders else self.read(n)) for n in names]
            self.py(
                ast.unparse(rebuilt) if placeholders else self.text(s),
                inputs,
                Info(NONE, level, True, is_async=is_async),
                outs=(),
            )

    def _assert(self, s: ast.Assert) -> None:
        if s.msg is not None and self.has_op(s.msg):
            self.fail(s, "F013", "an assertion message with an operation cannot be captured", "use if and raise")
        test = self.lower(s.test, "test")
        name = self.own_name("test")
        rebuilt = ast.Assert(ast.Name(name, ast.Load()), s.msg)
        inputs = [(name, test)]
        info = Info(NONE, READS if not is_immutable(test.type) else PURE, True)
        if s.msg is not None:
            m = self.analyze(s.msg)
            info = Info(NONE, max(info.level, m.level), True, is_async=m.is_async)
            inputs += [(n, self.read(n)) for n in sorted(reads(s.msg)) if n in self.locals]
        self.py(ast.unparse(ast.fix_missing_locations(rebuilt)), inputs, info, outs=())

    def _delete(self, s: ast.Delete) -> None:
        for t in s.targets:
            assert isinstance(t, ast.Name)
            self.read(t.id)
            self.assign(t.id, self.unbound(t.id))

    def _try(self, s: ast.Try) -> None:
        if exits(s.finalbody):
            self.fail(
                s,
                "F013",
                "a `finally` block that returns, breaks or continues cannot be captured",
                "leave after the try statement",
            )
        if not s.finalbody:
            self._try_except(s)
            return
        live = frozenset(reads(s.finalbody)) | self.live.after[id(s)]
        leaves = exits([*s.body, *s.handlers, *s.orelse])
        parts: list[ast.stmt] = [*s.body, *s.orelse, *(x for h in s.handlers for x in h.body)]
        outs = self._outs(parts, live, returns="return" in leaves, want_exit=bool(leaves))

        def body() -> None:
            if s.handlers:
                self._try_except(s)
                if leaves and EXIT not in self.env:
                    self.set_exit(NORMAL)
            else:
                self.block([*s.body, *s.orelse], live, want_exit=bool(leaves))

        def on_error(error: Value) -> None:
            self.block(s.finalbody, live)
            self.py("raise error", [("error", error)], Info(NONE, PURE, True), outs=())

        final_reads = frozenset(reads(s.finalbody))
        self._make_try(body, [("BaseException", [], on_error)], outs, sorted(binds(parts) & final_reads & self.locals))
        left = self.env.get(EXIT)
        self.block(s.finalbody, self.live.after[id(s)] | ({EXIT, RETURN_VALUE} if leaves else frozenset()))
        if left is not None:  # loops inside may have used it
            self.env[EXIT] = left

    def _try_except(self, s: ast.Try) -> None:
        live = self.live.after[id(s)] | frozenset(reads(s.finalbody))
        leaves = exits([*s.body, *s.handlers, *s.orelse])
        want_exit = bool(leaves)
        parts: list[ast.stmt] = [*s.body, *s.orelse, *(x for h in s.handlers for x in h.body)]
        inner_live = live | frozenset(reads(s.orelse))
        outs = self._outs(parts, inner_live, returns="return" in leaves, want_exit=want_exit)
        outs += [h.name for h in s.handlers if h.name and h.name in live and h.name not in outs]
        if s.orelse:
            outs.append("<ok>")

        def body() -> None:
            self.block(s.body, inner_live, want_exit=want_exit)
            if s.orelse:
                self.env["<ok>"] = (
                    self.builder.emit("equals", (self.env[EXIT],), [("ok", BOOL)], {"value": NORMAL})[0]
                    if want_exit and EXIT in self.env
                    else self.builder.const(True, "ok")
                )

        handlers = [self._handler(h, live, want_exit, bool(s.orelse)) for h in s.handlers]
        saved = sorted(binds(s.body) & self.live.handlers[id(s)] & self.locals)
        self._make_try(body, handlers, outs, saved)
        if not s.orelse:
            return
        ok = self.env.pop("<ok>")
        outs = self._outs(s.orelse, live, returns="return" in leaves, want_exit=want_exit)
        if exits(s.orelse) or want_exit:
            self.select(ok, lambda: self.block(s.orelse, live, want_exit=want_exit), lambda: None, outs)
        else:
            self.select(ok, lambda: self.block(s.orelse, live), lambda: None, outs)

    def _handler(self, h: ast.ExceptHandler, live: frozenset[str], want_exit: bool, has_orelse: bool) -> Handler:
        if h.type is not None and self.has_op(h.type):
            self.fail(
                h,
                "F013",
                "an exception type with an operation cannot be captured",
                "compute it before the try statement",
            )
        names = sorted(n for n in reads(h.type) if n in self.locals) if h.type is not None else []

        def run(error: Value) -> None:
            if h.name:
                self.assign(h.name, error)
            self.handled.append(error)
            try:
                self.block(h.body, live, want_exit=want_exit)
            finally:
                self.handled.pop()
            if h.name:
                self.assign(h.name, self.unbound(h.name))
            if has_orelse:
                self.env["<ok>"] = self.builder.const(False, "ok")

        text = ast.unparse(h.type) if h.type is not None else "BaseException"
        return text, [(n, self.read(n)) for n in names], run

    def _make_try(
        self, body: Callable[[], None], handlers: Sequence[Handler], outs: Sequence[str], saved: Sequence[str]
    ) -> None:
        """A `try` operation.

        Variables in `saved` live in cells, so that a handler finds what they were when the error came.
        """
        cells: dict[str, Value] = {}
        for n in saved:
            before = self.env.get(n)
            value = before if before is not None else self.unbound(n)
            (cell,) = self.builder.emit("cell", (value,), [(n, ANY)])
            cells[n] = cell
            self.cell_types[cell.name] = value.type

        def protected(_: tuple[Value, ...]) -> list[Value]:
            self.cells.append(cells)
            try:
                body()
            finally:
                self.cells.pop()
            return [self.outgoing(n) for n in outs]

        regions = []
        region, block = self.region(protected)
        yields = [block.yields]
        regions.append(region)
        for _, _, run in handlers:

            def handle(params: tuple[Value, ...], run: Callable[[Value], None] = run) -> list[Value]:
                for n, cell in cells.items():
                    before = self.env.get(n)
                    (value,) = self.builder.emit("load", (cell,), [(n, self.cell_types[cell.name])])
                    held = self.cell_facts.get(cell.name, NO_FACT)
                    maybe = before is None or self.fact(before).is_unbound or held.is_unbound
                    sites = self._cell_sites(n, before)
                    self.env[n] = self.know(value, is_unbound=maybe, sites=sites, is_declared=held.is_declared)
                run(params[0])
                return [self.outgoing(n) for n in outs]

            region, block = self.region(handle, [("error", ANY)])
            yields.append(block.yields)
            regions.append(region)
        inputs = {n: v for _, names, _ in handlers for n, v in names}
        attrs: dict[str, Attr] = {
            "handlers": tuple("" if t == "Exception" and self._is_builtin("Exception") else t for t, _, _ in handlers),
            "params": tuple(inputs) or None,
        }
        hints = [(HINTS.get(n, n), join(*(y[i].type for y in yields))) for i, n in enumerate(outs)]
        results = self.builder.emit("try", list(inputs.values()), hints, attrs, regions)
        for i, (n, v) in enumerate(zip(outs, results, strict=True)):
            self.env[n] = self.merged(v, [y[i] for y in yields])

    def _cell_sites(self, name: str, before: Value | None) -> Any:
        """A list that was changed in the body may be read by the handler: it is no value any more."""
        sites = self.fact(before).sites if before is not None else frozenset()
        self.escaped |= sites
        return frozenset()

    # -- asyncio.TaskGroup
    def _is_task_group(self, s: ast.AsyncWith) -> bool:
        if len(s.items) != 1 or not isinstance(s.items[0].optional_vars, ast.Name):
            return False
        call = s.items[0].context_expr
        group = getattr(asyncio, "TaskGroup", None)
        return (
            isinstance(call, ast.Call)
            and not call.args
            and self.resolver.resolve(call.func) in (group,)
            and group is not MISSING
        )

    def _task_group(self, s: ast.AsyncWith) -> None:
        """`async with asyncio.TaskGroup() as group`: what it starts; errors come as an ExceptionGroup."""
        variable = s.items[0].optional_vars
        assert isinstance(variable, ast.Name)
        name = variable.id
        for inner in s.body:
            call = inner.value if isinstance(inner, (ast.Expr, ast.Assign)) else None
            if not (isinstance(call, ast.Call) and self._started_in(call, name)):
                self.fail(
                    inner,
                    "F016",
                    "inside a TaskGroup with operations only `group.create_task(operation(...))` can be captured",
                    "move it out",
                )
        saved = self.groups
        self.groups |= {name}
        live = self.live.after[id(s)]
        outs = self._outs(s.body, live, returns=False, want_exit=False)

        def body() -> None:
            first = len(self.builder.block.ops)
            self.started = []
            for inner in s.body:
                self.statement(inner)
            if all(map(runs_through, s.body)):
                self.together(first, self.started)
            self.started = []
            for n in outs:
                if n in self.env:
                    self.awaited(self.env[n])

        def on_error(error: Value) -> None:
            text = "raise BaseExceptionGroup('unhandled errors in a TaskGroup', [error]) from None"
            self.py(text, [("error", error)], Info(NONE, PURE, True), outs=())

        try:
            self._make_try(body, [("BaseException", [], on_error)], outs, [])
        finally:
            self.groups = saved
        for n in outs:
            self._mark_task(n)

    def _mark_task(self, name: str) -> None:
        self.env[name] = self._as_task(self.env[name])

    def _started_in(self, call: ast.Call, group: str) -> bool:
        func = call.func
        is_start = (
            isinstance(func, ast.Attribute)
            and func.attr == "create_task"
            and isinstance(func.value, ast.Name)
            and func.value.id == group
        )
        return (
            is_start and len(call.args) == 1 and isinstance(call.args[0], ast.Call) and self.is_operation(call.args[0])
        )


def runs_through(s: ast.stmt) -> bool:
    """Does it run to its end before any other task runs?"""
    is_simple = isinstance(s, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Pass))
    return is_simple and not any(isinstance(n, (ast.Await, ast.comprehension)) and _suspends(n) for n in ast.walk(s))


def _suspends(node: ast.Await | ast.comprehension) -> bool:
    return isinstance(node, ast.Await) or bool(node.is_async)
