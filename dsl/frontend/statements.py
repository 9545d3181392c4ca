"""Statements: straight code, branches and early exits as structured control flow.

A statement that may leave its block in the middle (`return`, `break`, `continue` in one arm of an `if`) puts the rest
of the block into the arm that goes on; where both arms may go on, a flag says whether the rest still runs.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

from flowc.ir.core import Value
from flowc.ir.types import (
    ANY,
    BOOL,
    BYTES,
    FLOAT,
    INT,
    NEVER,
    NONE,
    TEXT,
    Type,
    is_immutable,
    is_scalar,
    item_type,
    join,
)

from .handlers import Handlers, runs_through
from .liveness import (
    RETURN_VALUE,
    Liveness,
    appended,
    binds,
    exits,
    falls_through,
    surely_binds,
)
from .purity import READS, WRITES, Info, may_hold_lists
from .source import synthetic
from .state import BREAK, CONTINUE, EXIT, NORMAL, RETURN


class Statements(Handlers):
    """Lowers blocks of statements."""

    # -- blocks
    def block(
        self, stmts: Sequence[ast.stmt], live_out: frozenset[str], *, tail: bool = False, want_exit: bool = False
    ) -> None:
        """Lowers a block.

        `tail`: the function ends with it. `want_exit`: the variable EXIT must say how it was left.
        """
        outer, self.started = self.started, []
        try:
            self._block(stmts, live_out, tail, want_exit)
        finally:
            self.started = outer

    def _block(self, stmts: Sequence[ast.stmt], live_out: frozenset[str], tail: bool, want_exit: bool) -> None:
        first = 0  # of the operations since the first of the tasks that have not started was made
        is_straight = False
        for i, s in enumerate(stmts):
            if not is_straight:
                self.started = []
            is_straight = self.is_async and runs_through(s)
            if not is_straight and self.started:  # here tasks start
                self.together(first, self.started)
            elif not self.started:
                first = len(self.builder.block.ops)
            rest = stmts[i + 1 :]
            leaves = exits(s)
            if isinstance(s, ast.Return):
                with self.at(s):
                    value = self.lower(s.value, "result") if s.value is not None else self.builder.const(None, "result")
                    if self.fact(value).is_task:
                        self.fail(s, "F016", "a coroutine or task that is not awaited is returned", "await it first")
                    self.assign(RETURN_VALUE, value)
                    if want_exit:
                        self.set_exit(RETURN)
                return
            if isinstance(s, (ast.Break, ast.Continue)):
                self.set_exit(BREAK if isinstance(s, ast.Break) else CONTINUE)
                return
            if isinstance(s, ast.Raise):
                self._raise(s)
                return
            if leaves and isinstance(s, ast.If):
                self._leaving_if(s, rest, live_out, tail, want_exit)
                return
            self.statement(s)
            if isinstance(s, (ast.For, ast.While)) and "return" not in leaves:
                continue  # break and continue ended inside
            if leaves:
                self._go_on(rest, live_out, tail, want_exit)
                return
            if not falls_through([s]):
                return
        if is_straight:
            self.together(first, self.started)
        if tail:
            self.assign(RETURN_VALUE, self.builder.const(None, "result"))
        if want_exit:
            self.set_exit(NORMAL)

    def _leaving_if(
        self, s: ast.If, rest: Sequence[ast.stmt], live_out: frozenset[str], tail: bool, want_exit: bool
    ) -> None:
        then_goes, else_goes = falls_through(s.body), falls_through(s.orelse)
        with self.at(s):
            test = self.lower(s.test, "test")
            if not (then_goes and else_goes):
                then = [*s.body, *rest] if then_goes else s.body
                other = [*s.orelse, *rest] if else_goes else s.orelse
                both = [*then, *other]
                returns = tail or "return" in exits(both)
                outs = self._outs(both, live_out, returns=returns, want_exit=want_exit)
                self.select(
                    test,
                    lambda: self.block(then, live_out, tail=tail, want_exit=want_exit),
                    lambda: self.block(other, live_out, tail=tail, want_exit=want_exit),
                    outs,
                )
                return
            live = self.live.after[id(s)]
            outs = self._outs([s], live, returns="return" in exits(s), want_exit=True)
            self.select(
                test,
                lambda: self.block(s.body, live, want_exit=True),
                lambda: self.block(s.orelse, live, want_exit=True),
                outs,
            )
        self._go_on(rest, live_out, tail, want_exit)

    def _go_on(self, rest: Sequence[ast.stmt], live_out: frozenset[str], tail: bool, want_exit: bool) -> None:
        """The rest of a block after a statement that may have left it; EXIT says whether it did."""
        if not rest and not tail:
            return
        left = self.env[EXIT]
        (running,) = self.builder.emit("equals", (left,), [("running", BOOL)], {"value": NORMAL})
        returns = tail or "return" in exits(rest) or RETURN_VALUE in self.env
        outs = self._outs(rest, live_out, returns=returns, want_exit=want_exit)
        self.select(running, lambda: self.block(rest, live_out, tail=tail, want_exit=want_exit), lambda: None, outs)

    # -- one statement
    def statement(self, s: ast.stmt) -> None:
        """A statement that control passes through, or a loop or `try` that sets EXIT."""
        with self.at(s):
            if self._stays_python(s):
                self.python(s)
                return
            match s:
                case ast.Expr(value=ast.Constant()):
                    return
                case ast.Expr():
                    if (name := appended(s)) is not None and self._is_list(name):
                        self._append(s, name)
                    else:
                        self.lower(s.value, "v")
                case ast.Assign():
                    self._assign(s)
                case ast.AnnAssign():
                    if s.value is not None:
                        hint = s.target.id if isinstance(s.target, ast.Name) else "v"
                        self.bind_target(s.target, self.lower(s.value, hint))
                case ast.AugAssign():
                    self._aug_assign(s)
                case ast.If():
                    test = self.lower(s.test, "test")
                    live = self.live.after[id(s)]
                    outs = self._outs([s], live, returns=False, want_exit=False)
                    self.select(test, lambda: self.block(s.body, live), lambda: self.block(s.orelse, live), outs)
                case ast.For():
                    self._for(s)
                case ast.While():
                    self._while(s)
                case ast.Try():
                    self._try(s)
                case ast.AsyncWith() if self._is_task_group(s):
                    self._task_group(s)
                case ast.Assert():
                    self._assert(s)
                case ast.Delete():
                    self._delete(s)
                case ast.Pass() | ast.Global() | ast.Nonlocal():
                    return
                case _:
                    self._refuse(s)

    def _refuse(self, s: ast.stmt) -> None:
        what, hint = {
            ast.With: (
                "`with` around operations",
                "do the operations outside the block, or put it into a plain function",
            ),
            ast.AsyncWith: (
                "`async with` around operations",
                "do the operations outside the block, or use asyncio.TaskGroup",
            ),
            ast.AsyncFor: ("`async for` over operations", "collect the items first: items = [x async for x in ...]"),
            ast.Match: ("`match` with operations or early exits", "write if/elif/else"),
            ast.TryStar: ("`except*` around operations", "use `except`"),
        }.get(type(s), (f"`{type(s).__name__}` with operations", "put it into a plain function"))
        self.fail(s, "F013", f"{what} cannot be captured", hint)

    def _stays_python(self, s: ast.stmt) -> bool:
        """Can the whole statement be one `py` operation?"""
        if (
            exits(s)
            or self.has_op(s)
            or isinstance(s, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass, ast.Global, ast.Nonlocal))
        ):
            if isinstance(s, (ast.Assign, ast.AugAssign, ast.AnnAssign)) and not self.has_op(s):
                return self._writes_outer(s)
            return False
        if isinstance(s, ast.Delete):
            return not all(isinstance(t, ast.Name) for t in s.targets)
        if self.handled and _reraises(s):
            return False  # a bare `raise` means the error that the graph handles
        if isinstance(s, (ast.If, ast.For, ast.While, ast.Try)):
            if any(frame.keys() & binds(s) for frame in self.cells):
                return False  # a handler sees what it had bound when the error came
            if any((name := appended(n)) is not None and self._is_list(name) for n in ast.walk(s)):
                return False
            if any(
                isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name) and self._is_list(n.target.id)
                for n in ast.walk(s)
            ):
                return False
        return True

    def _writes_outer(self, s: ast.stmt) -> bool:
        """Does it assign a variable declared global or nonlocal?"""
        return bool(self.outer_names) and bool(binds(s, appends=False) & self.outer_names)

    outer_names: frozenset[str] = frozenset()  # declared `global` or `nonlocal`

    def python(self, s: ast.stmt) -> None:
        """A statement without operations as one `py` operation that binds what it binds."""
        own = sorted(n for n in binds(s) if n in self.locals)
        a = self.analyzer()
        env: dict[str, Info] = {}
        info = a.stmts([s], env)
        self.settle(a)
        live = self.live.after.get(id(s), frozenset())
        outs = [n for n in own if n in live]
        unbinds = _may_unbind(s)
        definite = _definitely_binds(s) - unbinds
        read_first = Liveness([s]).at_entry  # what is read before it is bound here
        inputs: list[tuple[str, Value]] = []
        for name in sorted((read_first | set(outs)) & self.locals):
            if name not in read_first and name in definite:
                continue
            if name not in outs and self.is_maybe_unbound(name):
                outs.append(name)  # an out of that name makes the mark of an unbound variable unbound again
            inputs.append((name, self.outgoing(name)))
        text = self.text(s)
        outer = sorted(n for n in binds(s) if n in self.outer_names)
        if outer:
            nonlocals = [n for n in outer if n in self.resolver.cells]
            globals_ = [n for n in outer if n not in self.resolver.cells]
            lines = [
                f"{word} {', '.join(names)}" for word, names in (("global", globals_), ("nonlocal", nonlocals)) if names
            ]
            text = "; ".join([*lines, text])
            info = Info(NONE, WRITES, True, is_async=info.is_async)
        given = dict(inputs)
        types = [
            join(env[n].type if n in env else NEVER, given[n].type if n in given and n not in definite else NEVER)
            if n in env or n not in own
            else ANY
            for n in outs
        ]
        results = self.py(text, inputs, info, outs=list(zip(outs, types, strict=True)))
        for name, value in zip(outs, results, strict=True):
            before = given.get(name)
            unbound = name in unbinds or (name not in definite and before is not None and self.fact(before).is_unbound)
            sites = env[name].sites if name in env else self.fact(before).sites if before is not None else frozenset()
            self.assign(
                name,
                self.know(value, sites=sites, is_unbound=unbound, is_declared=a.trusts or self.fact(value).is_declared),
            )

    # -- assignments
    def _assign(self, s: ast.Assign) -> None:
        target = s.targets[0]
        if (
            len(s.targets) == 1
            and isinstance(target, (ast.Tuple, ast.List))
            and isinstance(s.value, (ast.Tuple, ast.List))
            and len(target.elts) == len(s.value.elts)
            and all(isinstance(t, ast.Name) for t in target.elts)
            and not any(isinstance(v, ast.Starred) for v in s.value.elts)
        ):
            values = [
                self.lower(v, t.id) for t, v in zip(target.elts, s.value.elts, strict=True) if isinstance(t, ast.Name)
            ]
            for t, v in zip(target.elts, values, strict=True):
                self.bind_target(t, v)
            return
        hint = target.id if isinstance(target, ast.Name) else "v"
        value = self.lower(s.value, hint)
        for t in s.targets:
            self.bind_target(t, value)

    def _aug_assign(self, s: ast.AugAssign) -> None:
        if not isinstance(s.target, ast.Name):
            if self.has_op(s):
                self.fail(
                    s,
                    "F013",
                    "an augmented assignment to an attribute or item with an operation cannot be captured",
                    "assign in two steps",
                )
            self.python(s)
            return
        name = s.target.id
        if isinstance(s.op, ast.Add) and self._is_list(name):
            current = self.read(name)
            value = self.lower(s.value, "more")
            if value.type.name == "list" and not self._is_shared(name, current):
                (joined,) = self.builder.emit("concat", (current, value), [(name, join(current.type, value.type))])
                inner = self.fact(value).sites if may_hold_lists(item_type(value.type)) else frozenset()
                self.assign(name, self.know(joined, sites=self.fact(current).sites | inner))
                return
            self.escaped |= self.fact(current).sites | self.fact(value).sites
        probe = synthetic(ast.BinOp(ast.Name(name, ast.Load()), s.op, s.value), s)
        if not self.has_op(s):
            current_info = self._info(name)
            if current_info is not None and not (
                is_immutable(current_info.type) and _fails_alike(s.op, current_info.type, self.analyze(s.value).type)
            ):
                self.python(s)
                return
            self.assign(name, self.lower(probe, name))
            return
        current = self.read(name)
        value = self.lower(s.value, "more")
        other = "more" if name != "more" else "more_"
        if is_immutable(current.type) and _fails_alike(s.op, current.type, value.type):
            whole = synthetic(ast.BinOp(ast.Name(name, ast.Load()), s.op, ast.Name(other, ast.Load())), s)
            self.assign(name, self.py_expr(whole, name, {name: current, other: value}))
            return
        aug = ast.AugAssign(ast.Name(name, ast.Store()), s.op, ast.Name(other, ast.Load()))
        self.escaped |= self.fact(current).sites | self.fact(value).sites
        (result,) = self.py(
            ast.unparse(ast.fix_missing_locations(aug)),
            [(name, current), (other, value)],
            Info(ANY, READS if is_scalar(current.type) else WRITES, True),
            outs=[(name, ANY)],
        )
        self.assign(name, result)


def _reraises(s: ast.stmt) -> bool:
    """Does it hold a bare `raise` that belongs to a handler around it?"""
    if isinstance(s, ast.Raise):
        return s.exc is None
    if isinstance(s, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    blocks = (
        [s.body, s.orelse, s.finalbody]
        if isinstance(s, ast.Try)
        else [getattr(s, name, []) for name in ("body", "orelse")]
    )
    return any(_reraises(inner) for block in blocks for inner in block)


def _may_unbind(s: ast.stmt) -> set[str]:
    """Variables that a statement may leave unbound by `del`, or as the name of an error that it handled."""
    deleted = {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Del)}
    return deleted | {n.name for n in ast.walk(s) if isinstance(n, ast.ExceptHandler) and n.name}


def _definitely_binds(s: ast.stmt) -> set[str]:
    """Variables that a statement has surely bound when it ends without an error."""
    match s:
        case ast.If():
            then, other = _all_bind(s.body), _all_bind(s.orelse)
            return surely_binds(s.test) | (then & other)
        case ast.For() | ast.AsyncFor():
            return surely_binds(s.iter)
        case ast.While():
            return surely_binds(s.test)
        case ast.Try() | ast.TryStar():
            body = _all_bind([*s.body, *s.orelse])
            for h in s.handlers:
                body &= _all_bind(h.body)
            return body | _all_bind(s.finalbody)
        case ast.With() | ast.AsyncWith():
            return {n for i in s.items if i.optional_vars is not None for n in binds(i.optional_vars)}
        case ast.Match():
            return set()
        case _:
            walruses = {n.target.id for n in ast.walk(s) if isinstance(n, ast.NamedExpr)}
            return (binds(s) - walruses) | surely_binds(s)


def _all_bind(stmts: Sequence[ast.stmt]) -> set[str]:
    return set().union(*(_definitely_binds(s) for s in stmts))


__all__ = ["Statements"]


def _fails_alike(op: ast.operator, left: Type, right: Type) -> bool:
    """Does `left + right`, where it fails, say what `left += right` says?"""
    numbers = (INT, FLOAT, BOOL)
    return (left in numbers and right in numbers) or (isinstance(op, ast.Add) and left in (TEXT, BYTES))
