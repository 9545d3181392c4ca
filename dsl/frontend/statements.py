"""Statements: straight code, branches, loops, early exits and error handling as structured control flow.

A statement that may leave its block in the middle (`return`, `break`, `continue` in one arm of an `if`) puts the rest
of
the block into the arm that goes on; where both arms may go on, a flag says whether the rest still runs.
"""

from __future__ import annotations

import ast
import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from flowc.ir.core import Attr, Value
from flowc.ir.types import ANY, BOOL, NEVER, NONE, Type, is_immutable, item_type, join, list_of

from .calls import Calls
from .liveness import RETURN_VALUE, Liveness, appended, binds, exits, falls_through, reads
from .names import MISSING
from .purity import PURE, READS, WRITES, Info, may_hold_lists
from .source import synthetic
from .state import BREAK, CONTINUE, EXIT, HINTS, NO_FACT, NORMAL, RETURN, Fact, either

Handler = tuple[str, list[tuple[str, Value]], Callable[[Value], None]]  # exception types, names in them, what to do


class Statements(Calls):
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
            is_straight = _runs_through(s)
            if not is_straight:  # here tasks start
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

    def _outs(self, stmts: Sequence[ast.stmt], live: frozenset[str], *, returns: bool, want_exit: bool) -> list[str]:
        names = sorted(n for n in binds(stmts) if n in live and n in self.locals)
        return names + [RETURN_VALUE] * returns + [EXIT] * want_exit

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
            if current_info is not None and (current_info.type == ANY or not is_immutable(current_info.type)):
                self.python(s)
                return
            self.assign(name, self.lower(probe, name))
            return
        current = self.read(name)
        value = self.lower(s.value, "more")
        other = "more" if name != "more" else "more_"
        if is_immutable(current.type):
            whole = synthetic(ast.BinOp(ast.Name(name, ast.Load()), s.op, ast.Name(other, ast.Load())), s)
            self.assign(name, self.py_expr(whole, name, {name: current, other: value}))
            return
        aug = ast.AugAssign(ast.Name(name, ast.Store()), s.op, ast.Name(other, ast.Load()))
        self.escaped |= self.fact(current).sites | self.fact(value).sites
        (result,) = self.py(
            ast.unparse(ast.fix_missing_locations(aug)),
            [(name, current), (other, value)],
            Info(ANY, WRITES, True),
            outs=[(name, ANY)],
        )
        self.assign(name, result)

    # -- lists as values
    def _is_list(self, name: str) -> bool:
        value = self.env.get(name)
        return value is not None and value.type.name == "list" and not self.fact(value).is_unbound

    def _is_shared(self, name: str, value: Value) -> bool:
        """May another variable be, or hold, the same list?"""
        sites = self.fact(value).sites
        return any(other != name and self.fact(v).sites & sites for other, v in self.env.items())

    def _append(self, s: ast.Expr, name: str) -> None:
        call = s.value
        assert isinstance(call, ast.Call)
        item = self.lower(call.args[0], "item")
        current = self.read(name)
        fact = self.fact(current)
        if self._is_shared(name, current) or self.fact(item).sites & fact.sites:
            self.escaped |= fact.sites
        if self.fact(item).is_task:
            self.fail(s, "F016", "a coroutine or task that is not awaited is put into a list", "await it first")
        (longer,) = self.builder.emit(
            "append", (current, item), [(name, list_of(join(item_type(current.type), item.type)))]
        )
        inner = self.fact(item).sites if may_hold_lists(item.type) else frozenset()
        declared = fact.is_declared or self.fact(item).is_declared
        self.assign(name, self.know(longer, sites=fact.sites | inner, is_declared=declared))

    # -- loops
    def _for(self, s: ast.For) -> None:
        items = self.iterable(s.iter)
        held = f"<items {id(s)}>"  # the loop holds on to what it runs over: a list changed meanwhile is no value
        self.env[held] = items
        try:
            self._for_over(s, items)
        finally:
            self.env.pop(held, None)

    def _for_over(self, s: ast.For, items: Value) -> None:
        leaves = exits(s.body)
        breaks = bool(leaves & {"break", "return"})
        collected = self._collected(s)
        live = self.live.head[id(s)] | self.live.done[id(s)]
        bound = binds(s.body) | binds(s.target)
        carried = sorted(n for n in bound if n in live and n in self.locals and n not in collected)
        if "return" in leaves:
            carried.append(RETURN_VALUE)
        flags = bool("return" in leaves or (s.orelse and "break" in leaves))
        if flags:
            carried.append(EXIT)
            self.set_exit(NORMAL)
        inits = [self.outgoing(n) for n in carried]
        item = s.target.id if isinstance(s.target, ast.Name) else "item"

        def body(params: tuple[Value, ...]) -> list[Value]:
            first, *rest = params
            self.know(
                first,
                sites=self.fact(items).sites if may_hold_lists(first.type) else frozenset(),
                is_declared=self.fact(items).is_declared,
            )
            for n, v in zip(carried, rest, strict=True):
                self.env[n] = v
            for n in collected:
                self.env[n] = self.list_value([], s, n)
            if EXIT in carried:
                del self.env[EXIT]
            self.bind_target(s.target, first)
            self.block(s.body, live | collected, want_exit=bool(leaves))
            again = [self._again(leaves)] if breaks else []
            return [*again, *(self.outgoing(n) for n in carried), *(self.env[n] for n in sorted(collected))]

        results = self._loop(s, items, item, carried, inits, body, int(breaks), sorted(collected), breaks)
        self._after_loop(s, carried, collected, results, leaves)

    def _after_loop(
        self,
        s: ast.For | ast.While,
        carried: Sequence[str],
        collected: frozenset[str],
        results: Sequence[Value],
        leaves: set[str],
    ) -> None:
        for n, v in zip(carried, results[: len(carried)], strict=True):
            self.env[n] = v
        for n, v in zip(sorted(collected), results[len(carried) :], strict=True):
            before = self.env[n]
            (joined,) = self.builder.emit("concat", (before, v), [(n, join(before.type, v.type))])
            self.env[n] = self.merged(joined, (before, v))
        if s.orelse:
            self._orelse(s, leaves)
        elif "return" in leaves:  # a break or continue ended with the loop
            self._normalise()

    def _normalise(self) -> None:
        """EXIT after a loop: RETURN stays, everything else has ended there."""
        (returned,) = self.builder.emit("equals", (self.env[EXIT],), [("returned", BOOL)], {"value": RETURN})
        self.select(returned, lambda: None, lambda: self.set_exit(NORMAL), [EXIT])

    def _orelse(self, s: ast.For | ast.While, leaves: set[str]) -> None:
        """`else` of a loop: runs unless the loop was left by break or return."""
        live = self.live.after[id(s)]
        inner = exits(s.orelse)
        wants = bool(inner) or "return" in leaves
        if not leaves & {"break", "return"}:
            self.block(s.orelse, live, want_exit=wants)
            return
        left = self.env[EXIT]
        (done,) = self.py("exit < 2", [("exit", left)], Info(BOOL), hint="done")
        outs = self._outs(s.orelse, live, returns="return" in inner or "return" in leaves, want_exit=wants)
        self.select(done, lambda: self.block(s.orelse, live, want_exit=wants), lambda: None, outs)
        if "return" in leaves:
            inner_break = [k for k in ("break", "continue") if k in inner]
            if not inner_break:
                self._normalise()
        elif wants and not inner & {"break", "continue"}:
            self._normalise()

    def _again(self, leaves: set[str]) -> Value:
        left = self.env[EXIT]
        if "continue" in leaves:
            return self.py(f"exit < {BREAK}", [("exit", left)], Info(BOOL), hint="again")[0]
        return self.builder.emit("equals", (left,), [("again", BOOL)], {"value": NORMAL})[0]

    def _collected(self, s: ast.For) -> frozenset[str]:
        """Lists that the body only appends to: what they gain is collected, so that no turn waits for another."""
        found: set[str] = set()
        counts: dict[str, int] = {}
        for stmt in s.body:
            for n in ast.walk(stmt):
                if isinstance(n, ast.Name):
                    counts[n.id] = counts.get(n.id, 0) + 1
                if isinstance(n, ast.stmt) and (name := appended(n)) is not None:
                    found.add(name)
        appends = dict.fromkeys(found, 0)
        for stmt in s.body:
            for n in ast.walk(stmt):
                if isinstance(n, ast.stmt) and (name := appended(n)) is not None:
                    appends[name] += 1
        cells = {n for frame in self.cells for n in frame}
        return frozenset(
            n
            for n in found
            if counts[n] == appends[n]
            and n not in binds(s.target)
            and n not in cells
            and self._is_list(n)
            and not self._is_shared(n, self.env[n])
        )

    def _loop(
        self,
        s: ast.For | ast.While,
        items: Value | None,
        item: str,
        carried: Sequence[str],
        inits: Sequence[Value],
        body: Callable[[tuple[Value, ...]], list[Value]],
        flags: int,
        collected: Sequence[str],
        breaks: bool,
        cond: Callable[[tuple[Value, ...]], list[Value]] | None = None,
    ) -> tuple[Value, ...]:
        """Builds the loop operation; lowered again while types or aliases of the carried values still grow."""
        n = len(carried)
        known = self.loop_types.get(id(s))
        types = (
            [join(v.type, t) for v, t in zip(inits, known[0], strict=True)]
            if known and len(known[0]) == n
            else [v.type for v in inits]
        )
        facts = [
            either(self.fact(v), known[1][i]) if known and len(known[1]) == n else self.fact(v)
            for i, v in enumerate(inits)
        ]
        attempt = 0
        while True:
            params: list[tuple[str, Type]] = [(item, item_type(items.type))] if items is not None else []
            params += [(HINTS.get(name, name), t) for name, t in zip(carried, types, strict=True)]

            def fill(
                values: tuple[Value, ...],
                run: Callable[[tuple[Value, ...]], list[Value]] = body,
                facts: list[Fact] = facts,
            ) -> list[Value]:
                self.facts.update(zip((v.name for v in values[len(values) - n :]), facts, strict=True))
                return run(values)

            region, block = self.region(fill, params)
            nexts = block.yields[flags : flags + n]
            grown = [join(t, v.type) for t, v in zip(types, nexts, strict=True)]
            grown_facts = [either(a, self.fact(v)) for a, v in zip(facts, nexts, strict=True)]
            if grown == types and grown_facts == facts:
                break
            types = grown if attempt < 3 else [t if a == t else ANY for a, t in zip(grown, types, strict=True)]
            facts = grown_facts
            attempt += 1
        self.loop_types[id(s)] = (tuple(types), tuple(facts))
        hints = [(HINTS.get(name, name), t) for name, t in zip(carried, types, strict=True)]
        if items is not None:
            lists = [(name, v.type) for name, v in zip(collected, block.yields[flags + n :], strict=True)]
            attrs: dict[str, Attr] = {
                "collects": len(collected) or None,
                "breaks": breaks or None,
                **self.iteration_effect(items),
            }
            results = self.builder.emit("foreach", (items, *inits), hints + lists, attrs, (region,))
        else:
            assert cond is not None
            test, _ = self.region(lambda values: fill(values, cond), params)
            results = self.builder.emit("while", inits, hints, {"limit": self.loop_limit}, (test, region))
        for v, init, last in zip(results[:n], inits, nexts, strict=True):
            self.merged(v, (init, last))
        for v, last in zip(results[n:], block.yields[flags + n :], strict=True):
            self.know(v, sites=self.fact(last).sites, is_declared=self.fact(last).is_declared)
        return results

    def _while(self, s: ast.While) -> None:
        if binds(s.test):  # `while (x := ...)`: the test belongs to the turn
            if s.orelse:
                self.fail(
                    s,
                    "F013",
                    "`while` with `:=` in its test and an `else` cannot be captured",
                    "assign in the body and break",
                )
            leave = synthetic(ast.If(synthetic(ast.UnaryOp(ast.Not(), s.test), s.test), [ast.Break()], []), s.test)
            plain = synthetic(ast.While(ast.Constant(True), [leave, *s.body], []), s)
            self.live.after.update(
                {
                    id(plain): self.live.after[id(s)],
                    id(leave): self.live.head[id(s)] | self.live.done[id(s)] | binds(s.test),
                }
            )
            self.live.head[id(plain)] = self.live.head[id(s)]
            self.live.done[id(plain)] = self.live.done[id(s)] | binds(s.test)
            self.session.keep.append(plain)
            self._while(plain)
            return
        leaves = exits(s.body)
        live = self.live.head[id(s)] | self.live.done[id(s)]
        carried = sorted(n for n in binds(s.body) if n in live and n in self.locals)
        if "return" in leaves:
            carried.append(RETURN_VALUE)
        if "return" in leaves or (s.orelse and "break" in leaves):
            carried.append(EXIT)
            self.set_exit(NORMAL)
        inits = [self.outgoing(n) for n in carried]

        def enter(values: tuple[Value, ...]) -> None:
            for n, v in zip(carried, values, strict=True):
                self.env[n] = v

        def cond(values: tuple[Value, ...]) -> list[Value]:
            enter(values)
            return [self.lower(s.test, "test")]

        def body(values: tuple[Value, ...]) -> list[Value]:
            enter(values)
            if EXIT in carried:
                del self.env[EXIT]
            self.block(s.body, live, want_exit=bool(leaves))
            again = self._again(leaves) if leaves else self.builder.const(True, "again")
            return [again, *(self.outgoing(n) for n in carried)]

        results = self._loop(s, None, "", carried, inits, body, 1, (), bool(leaves), cond)
        self._after_loop(s, carried, frozenset(), results, leaves)

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
        name = next(n for n in ("test", "test_", "_test") if n not in self.locals)
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
            if all(map(_runs_through, s.body)):
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


def _runs_through(s: ast.stmt) -> bool:
    """Does it run to its end before any other task runs?"""
    is_simple = isinstance(s, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, ast.Pass))
    return is_simple and not any(isinstance(n, (ast.Await, ast.comprehension)) and _suspends(n) for n in ast.walk(s))


def _suspends(node: ast.Await | ast.comprehension) -> bool:
    return isinstance(node, ast.Await) or bool(node.is_async)


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
            return binds(ast.Expr(s.test)) | (then & other)
        case ast.For() | ast.AsyncFor():
            return binds(ast.Expr(s.iter))
        case ast.While():
            return set()
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
            return binds(s)


def _all_bind(stmts: Sequence[ast.stmt]) -> set[str]:
    return set().union(*(_definitely_binds(s) for s in stmts))


__all__ = ["CONTINUE", "Statements"]
