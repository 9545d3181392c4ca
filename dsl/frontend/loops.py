"""Loops, and lists as values: what a loop only appends to is collected, what it changes is carried around."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence

from flowc.ir.core import Attr, Value
from flowc.ir.types import ANY, BOOL, Type, item_type, join, list_of

from .calls import Calls
from .liveness import RETURN_VALUE, appended, binds, exits
from .purity import Info, may_hold_lists
from .source import synthetic
from .state import BREAK, EXIT, HINTS, NORMAL, RETURN, Fact, either


class Loops(Calls):
    """Lowers loops."""

    # from Statements
    def block(
        self, stmts: Sequence[ast.stmt], live_out: frozenset[str], *, tail: bool = False, want_exit: bool = False
    ) -> None:
        """Lowers a block.

        `tail`: the function ends with it. `want_exit`: the variable EXIT must say how it was left.
        """
        raise NotImplementedError

    def statement(self, s: ast.stmt) -> None:
        """A statement that control passes through, or a loop or `try` that sets EXIT."""
        raise NotImplementedError

    def _outs(self, stmts: Sequence[ast.stmt], live: frozenset[str], *, returns: bool, want_exit: bool) -> list[str]:
        names = sorted(n for n in binds(stmts) if n in live and n in self.locals)
        return names + [RETURN_VALUE] * returns + [EXIT] * want_exit

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
