"""Expressions: operations are taken out in evaluation order, f-strings become templates, the rest is plain Python."""

from __future__ import annotations

import ast
import copy
import keyword
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowc.ir.core import Value
from flowc.ir.types import ANY, BOOL, INT, TEXT, Type, is_immutable, item_type, join, list_of, sequence_of, tuple_of

from .liveness import binds, surely_binds
from .names import MISSING
from .purity import PURE, WRITES, Analyzer, Info, awaits, free_names, may_hold_lists
from .source import children, synthetic
from .state import NO_FACT, Fact, State, either

if TYPE_CHECKING:
    from flowc.ir.core import Attr, Region

_CONVERSIONS = {-1: "", ord("r"): "!r", ord("s"): "!s", ord("a"): "!a"}
_WALKS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LITERALS = (str, int, float, bool, type(None), bytes)


class Expressions(State):
    """Lowers expressions to values."""

    # from Calls
    def lower_call(self, node: ast.Call, hint: str) -> Value | None:
        raise NotImplementedError

    def is_operation(self, node: ast.Call) -> bool:
        raise NotImplementedError

    def lower_gather(self, node: ast.Call, hint: str) -> Value:
        raise NotImplementedError

    def is_gather(self, node: ast.expr) -> bool:
        raise NotImplementedError

    def may_be_task(self, name: str) -> bool:
        """May the variable hold the task of an operation?"""
        raise NotImplementedError

    # -- which code holds operations
    def has_op(self, node: ast.AST) -> bool:
        """Does this piece of code hold an operation (outside nested functions, which stay Python)?"""
        if isinstance(node, (ast.Name, ast.Constant)):
            return False
        known = self.has_op_memo.get(id(node))
        if known is None:
            known = (node, self._find_op(node))
            self.has_op_memo[id(node)] = known
        return known[1]

    def _find_op(self, node: ast.AST) -> bool:
        if isinstance(node, (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            return False
        if isinstance(node, ast.Call) and self.is_operation(node):
            return True
        match node:  # a task that stands for an operation: `await task`, `task.result()`
            case ast.Await(ast.Name(id=name)) | ast.Call(ast.Attribute(ast.Name(id=name), "result"), [], []):
                return self.may_be_task(name)
        return any(map(self.has_op, children(node)))

    def _reads_unbound(self, node: ast.AST) -> bool:
        """Does it read a local that may be unbound?"""
        return any(n in self.locals and self.is_maybe_unbound(n) for n in free_names(node))

    def _is_task(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Name) and node.id in self.env and self.fact(self.env[node.id]).is_task

    # -- values
    def lower(self, node: ast.expr, hint: str = "v") -> Value:
        """The value of an expression."""
        match node:
            case ast.Name() if node.id in self.locals:
                return self.read(node.id)
            case ast.Constant() if isinstance(node.value, _LITERALS):
                with self.at(node):
                    return self.builder.const(node.value, hint if hint != "v" else "c")
            case ast.JoinedStr():
                with self.at(node):
                    return self.template([node], node, hint)
            case ast.NamedExpr():
                value = self.lower(node.value, node.target.id)
                self.assign(node.target.id, value)
                return value
            case ast.Await():
                return self._await(node, hint)
        if isinstance(node, ast.Call):
            with self.at(node):
                found = self.lower_call(node, hint)
            if found is not None:
                return found
        binding = self.binds_inside(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and (parts := self._text_parts(node)):
            with self.at(node):
                return self.template(parts, node, hint)
        if binding and not self.has_op(node):
            with self.at(node):
                return self._py_binding(node, hint)
        conditional = isinstance(node, (ast.IfExp, ast.BoolOp)) or (isinstance(node, ast.Compare) and len(node.ops) > 1)
        if conditional and self.has_op(node):
            with self.at(node):
                return self._conditional(node, hint)
        if not self.has_op(node):
            with self.at(node):
                return self.py_expr(node, hint)
        with self.at(node):
            return self._compound(node, hint)

    def _py_binding(self, node: ast.expr, hint: str) -> Value:
        """An expression without operations that binds variables with `:=`: one `py` operation that gives them too."""
        bound = sorted(n for n in binds(node) if n in self.locals)
        definite = surely_binds(node)
        read = [n for n in free_names(node) if n in self.locals]
        a = self.analyzer()
        env: dict[str, Info] = {}
        with a.scope(env):
            info = a.expr(node)
        self.settle(a)
        if any(n not in definite and n in read for n in bound):  # which of two values is read is not known
            info, env = Info(ANY, WRITES, True, is_async=info.is_async), {}
        inputs = [(n, self.outgoing(n)) for n in dict.fromkeys([*read, *bound]) if n in read or n not in definite]
        given = dict(inputs)
        kept = [n for n in read if n not in bound and self.is_maybe_unbound(n)]
        result = self.own_name("value")
        outs: list[tuple[str, Type]] = [(result, info.type)]
        for n in (*bound, *kept):
            t = env[n].type if n in env else ANY
            outs.append((n, t if n in definite else join(t, given[n].type)))
        value, *rest = self.py(f"{result} = {self.text(node)}", inputs, replace(info, raises=True), outs=outs)
        for n, v in zip((*bound, *kept), rest, strict=True):
            before = self.fact(given[n]) if n in given and n not in definite else NO_FACT
            found = Fact(env[n].sites if n in env else frozenset(), False, a.trusts)
            self.assign(n, self.know_fact(v, either(found, before)))
        return self.know(value, sites=info.sites, is_declared=a.trusts or self.fact(value).is_declared)

    def _await(self, node: ast.Await, hint: str) -> Value:
        inner = node.value
        with self.at(node):
            if isinstance(inner, ast.Name) and self._is_task(inner):
                return self.awaited(self.env[inner.id])
            if isinstance(inner, ast.Call):
                if self.is_gather(inner) and self.has_op(inner):
                    return self.lower_gather(inner, hint)
                if self.is_operation(inner):
                    found = self.lower_call(inner, hint)
                    assert found is not None
                    return self.awaited(found)
            if self.has_op(node):
                self.fail(
                    node,
                    "F016",
                    "this await wraps an operation in something that flowc does not know",
                    "await the operation itself, or use asyncio.gather or asyncio.TaskGroup",
                )
            return self.py_expr(node, hint)

    def awaited(self, value: Value) -> Value:
        """The result that a task stands for: the same SSA value, no longer to be awaited."""
        fact = self.fact(value)
        if fact.is_task:
            self.facts.pop(value.name, None)
            self.know(value, sites=fact.sites, is_declared=fact.is_declared)
        return value

    def _compound(self, node: ast.expr, hint: str) -> Value:
        """An expression around operations: those come first, in evaluation order, then the Python around them."""
        match node:
            case ast.ListComp():
                return self.comprehension(node, node.generators, node.elt, hint)
            case ast.SetComp():
                items = self.comprehension(node, node.generators, node.elt, "items")
                return self._wrap("set({})", node, items, hint)
            case ast.DictComp():
                pair = synthetic(ast.Tuple([node.key, node.value], ast.Load()), node)
                items = self.comprehension(node, node.generators, pair, "items")
                return self._wrap("dict({})", node, items, hint)
            case ast.GeneratorExp():
                self.fail(
                    node,
                    "F014",
                    "a generator expression with operations is consumed by something that flowc does not know",
                    "make it a list: [ ... for ... ]",
                )
            case ast.Call(ast.Name(id="any" | "all" as which), [ast.GeneratorExp() as g], []) if self._is_builtin(
                which
            ) and not awaits(g):
                return self._any_all(g, which, hint)
            case ast.Call(func, [ast.GeneratorExp() as g], keywords) if (
                self.has_op(g) and self._consumes_all(func) and not awaits(g)
            ):
                listed = synthetic(ast.ListComp(g.elt, g.generators), g)
                return self._compound(synthetic(ast.Call(func, [listed], keywords), node), hint)
            case ast.Lambda():
                return self.py_expr(node, hint)
        placeholders: dict[str, Value] = {}
        rebuilt = self._hoist(node, placeholders)
        return self.py_expr(rebuilt, hint, placeholders)

    def _wrap(self, form: str, node: ast.expr, items: Value, hint: str) -> Value:
        self.escaped |= self.fact(items).sites if may_hold_lists(item_type(items.type)) else frozenset()
        text = form.format("items")
        (value,) = self.py(text, [("items", items)], Info(ANY, PURE, True), hint=hint)
        return value

    def _is_builtin(self, name: str) -> bool:
        return name not in self.locals and self.resolver.lookup(name) is getattr(__import__("builtins"), name)

    def _consumes_all(self, func: ast.expr) -> bool:
        """Does the function read a generator to its end at once?"""
        if isinstance(func, ast.Attribute) and func.attr == "join":
            return True
        target = self.resolver.resolve(func)
        return target in (sum, max, min, sorted, list, tuple, set, frozenset, dict) if target is not MISSING else False

    # -- taking operations out of Python
    def _hoist(self, node: ast.expr, placeholders: dict[str, Value]) -> ast.expr:
        """`node` with its operations, and what must run before them, replaced by names in `placeholders`."""
        children = _evaluation_order(node)
        last = max((i for i, (_, _, c) in enumerate(children) if self.has_op(c) or self.binds_inside(c)), default=-1)
        rebuilt = copy.copy(node)
        cuts: dict[ast.expr, str] = {}
        rebuilt.cuts = cuts  # type: ignore[attr-defined]  # what was replaced by which name, for its text
        for name, values in ast.iter_fields(rebuilt):
            if isinstance(values, list):
                setattr(rebuilt, name, list(values))
        for i, (holder, index, child) in enumerate(children):
            if i > last:
                break
            if isinstance(child, ast.Starred):
                inner = self._placeholder(child.value, placeholders) if i < last or self.has_op(child) else child.value
                _cut(cuts, child.value, inner)
                new: ast.expr = ast.copy_location(ast.Starred(inner, child.ctx), child)
            elif isinstance(child, ast.Slice):
                new = self._hoist(child, placeholders)
                cuts.update(new.cuts)  # type: ignore[attr-defined]
            else:
                new = self._placeholder(child, placeholders)
                _cut(cuts, child, new)
            _put(rebuilt, holder, index, new)
        return rebuilt

    def _placeholder(self, child: ast.expr, placeholders: dict[str, Value]) -> ast.expr:
        if not self.has_op(child) and not self.binds_inside(child):
            if isinstance(child, ast.Constant):
                return child
            static = self.resolver.resolve(child)
            if static is not MISSING and callable(static):
                return child  # a function is what it is, whenever it is looked up
            info = self.analyze(child)
            if (
                info.level == PURE
                and not info.raises
                and not isinstance(child, ast.Name)
                and not self._reads_unbound(child)
            ):
                return child
        if isinstance(child, ast.Attribute) and self.has_op(child):  # a method of an operation's result
            return ast.copy_location(
                ast.Attribute(self._placeholder(child.value, placeholders), child.attr, child.ctx), child
            )
        value = self.lower(child, "v")
        name = self.own_name(_stem(value), placeholders)
        placeholders[name] = value
        return ast.copy_location(ast.Name(name, ast.Load()), child)

    # -- conditional evaluation
    def _conditional(self, node: ast.expr, hint: str) -> Value:
        def arm(build: Callable[[], Value]) -> Callable[[], None]:
            def run() -> None:
                self.env["<value>"] = build()

            return run

        match node:
            case ast.IfExp():
                test = self.lower(node.test, "test")
                self._select_value(
                    test, node, arm(lambda: self.lower(node.body, hint)), arm(lambda: self.lower(node.orelse, hint))
                )
            case ast.BoolOp(op, [first, *rest]):
                value = self.lower(first, hint)
                for_rest = rest[0] if len(rest) == 1 else synthetic(ast.BoolOp(op, rest), rest[0])
                more, keep = arm(lambda: self.lower(for_rest, hint)), arm(lambda: value)
                self._select_value(value, node, *((more, keep) if isinstance(op, ast.And) else (keep, more)))
            case ast.Compare(left, [op, *ops], [middle, *others]):
                a = self.lower(left, "left")
                b = self.lower(middle, "middle")
                first_test = self._compare(op, a, b, node)
                name = self.own_name("middle")
                self.locals |= {name}
                self.env[name] = b
                tail = synthetic(ast.Compare(ast.Name(name, ast.Load()), ops, others), node)

                def rest_of_chain() -> Value:
                    if len(ops) > 1:
                        return self._conditional(tail, hint)
                    return self._compare(ops[0], b, self.lower(others[0], "right"), node)

                self._select_value(first_test, node, arm(rest_of_chain), arm(lambda: first_test))
            case _:
                raise AssertionError(ast.dump(node))
        return self.env.pop("<value>")

    def _select_value(self, test: Value, node: ast.expr, then: Callable[[], None], orelse: Callable[[], None]) -> None:
        outs = ["<value>", *sorted(n for n in binds(node) if n in self.locals)]
        self.select(test, then, orelse, outs)

    def _compare(self, op: ast.cmpop, a: Value, b: Value, node: ast.expr) -> Value:
        probe = synthetic(ast.Compare(ast.Name("a", ast.Load()), [op], [ast.Name("b", ast.Load())]), node)
        return self.py_expr(probe, "test", {"a": a, "b": b})

    # -- templates
    def _text_parts(self, node: ast.expr) -> list[ast.expr]:
        """The summands of a concatenation of texts with a constant among them; empty if it is not surely that."""
        parts: list[ast.expr] = []

        def flatten(n: ast.expr) -> None:
            if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Add):
                flatten(n.left)
                flatten(n.right)
            else:
                parts.append(n)

        flatten(node)
        if not any(
            isinstance(p, ast.JoinedStr) or (isinstance(p, ast.Constant) and isinstance(p.value, str)) for p in parts
        ):
            return []
        return parts if all(map(self._is_surely_text, parts)) else []

    def _is_surely_text(self, node: ast.expr) -> bool:
        if isinstance(node, ast.JoinedStr):
            return True
        if isinstance(node, ast.Name) and node.id in self.locals:
            value = self.env.get(node.id)
            return (
                value is not None
                and value.type == TEXT
                and self.fact(value).sites == frozenset()
                and not (self.fact(value).is_declared or self.fact(value).is_unbound or self.fact(value).is_task)
            )
        if isinstance(node, ast.Call) and self.is_operation(node):
            return self.operation_type(node) == TEXT
        if self.has_op(node) or self.binds_inside(node):
            return False
        a = Analyzer(self.resolver, self._info, self.tainted)
        return a.expr(node).type == TEXT and not a.trusts

    def operation_type(self, node: ast.Call) -> Type:
        """The checked result type of an operation that is not awaited; ANY if nobody checks it."""
        raise NotImplementedError

    def template(self, parts: Sequence[ast.expr], node: ast.expr, hint: str) -> Value:
        """One `template` operation for f-strings and texts in a row."""
        segments: list[str] = []
        formats: list[str] = []
        slots: list[Value] = []
        raises = False

        def constant(text: str) -> None:
            segments.append(text.replace("{", "{{").replace("}", "}}"))

        def slot(value: Value, form: str) -> None:
            nonlocal raises
            segments.append("{}")
            formats.append(form)
            slots.append(value)
            raises = raises or ":" in form or not is_immutable(value.type) or self.fact(value).is_declared

        for part in parts:
            pieces = part.values if isinstance(part, ast.JoinedStr) else [part]
            for piece in pieces:
                if isinstance(piece, ast.Constant):
                    constant(str(piece.value))
                    continue
                expr, form = piece, ""
                if isinstance(piece, ast.FormattedValue):
                    spec = _constant_spec(piece.format_spec)
                    if spec is None:
                        return self._compound(node, hint) if self.has_op(node) else self.py_expr(node, hint)
                    expr, form = piece.value, _CONVERSIONS[piece.conversion] + (f":{spec}" if spec else "")
                known = self.resolver.constant(expr)
                if isinstance(known, str) and form in ("", "!s"):
                    constant(known)
                    continue
                slot(self.lower(expr, "v"), form)
        for value in slots:
            if self.fact(value).is_task:
                self.fail(node, "F016", "a coroutine or task that is not awaited is put into a text", "await it first")
        attrs: dict[str, Attr] = {}
        if not all(is_immutable(v.type) for v in slots):
            attrs["reads"] = ("py",)
        if raises:
            attrs["raises"] = True
        return self.builder.template(
            "".join(segments), *slots, formats=formats, hint=hint if hint != "v" else "prompt", **attrs
        )

    # -- comprehensions
    def comprehension(
        self, node: ast.expr, generators: Sequence[ast.comprehension], element: ast.expr, hint: str
    ) -> Value:
        """A list comprehension with operations: a `foreach` that collects."""
        g, *inner = generators
        if g.is_async:
            self.fail(
                node,
                "F014",
                "an asynchronous comprehension with operations cannot be captured",
                "collect the items first",
            )
        if self.binds_inside(node):
            self.fail(
                node, "F014", "`:=` inside a comprehension with operations cannot be captured", "write a for loop"
            )
        items = self.iterable(g.iter)

        def per_item(params: tuple[Value, ...]) -> list[Value]:
            self.know(params[0], sites=self.fact(items).sites if may_hold_lists(params[0].type) else frozenset())
            self.bind_target(g.target, params[0])

            def chunk() -> Value:
                if inner:
                    return self.comprehension(node, inner, element, "chunk")
                return self.list_value([self.lower(element, "item")], element, "chunk")

            def filtered(tests: Sequence[ast.expr]) -> Value:
                if not tests:
                    return chunk()
                test = self.lower(tests[0], "keep")

                def keep() -> None:
                    self.env["<chunk>"] = filtered(tests[1:])

                def drop() -> None:
                    self.env["<chunk>"] = self.list_value([], element, "chunk")

                self.select(test, keep, drop, ["<chunk>"])
                return self.env.pop("<chunk>")

            return [filtered(g.ifs)]

        targets = {n.id for n in ast.walk(g.target) if isinstance(n, ast.Name)}
        hidden = self.locals
        self.locals |= targets
        try:
            body, _ = self.region(per_item, [(_target_name(g.target), item_type(items.type))])
        finally:
            self.locals = hidden
        return self.collected(node, items, body, hint, self.iteration_effect(items))

    def collected(self, node: ast.expr, items: Value, body: Region, hint: str, effect: Mapping[str, Attr]) -> Value:
        """The list that a comprehension gives: the `foreach` over `items` with this body."""
        found = body.yields[0]
        (value,) = self.builder.emit(
            "foreach", (items,), [(hint if hint != "v" else "items", self._list_type(node, found))],
            {"collects": 1, **effect}, (body,),
        )  # fmt: skip
        site = (node.lineno, node.col_offset)
        inner_sites = self.fact(found).sites if may_hold_lists(item_type(found.type)) else frozenset()
        own = frozenset() if site in self.tainted else inner_sites | {site}
        return self.know(value, sites=own, is_declared=self.fact(found).is_declared)

    def _list_type(self, node: ast.expr, chunk: Value) -> Type:
        if (node.lineno, node.col_offset) in self.tainted:
            return ANY
        return list_of(item_type(chunk.type))

    def iterable(self, node: ast.expr) -> Value:
        """What a loop runs over; iterators over values that nobody can change are made lists, so that items can run at
        once.
        """
        if (
            isinstance(node, ast.Call)
            and not self.has_op(node)
            and not self.binds_inside(node)
            and self.resolver.resolve(node.func) in (enumerate, zip, reversed, map, filter)
        ):
            info = self.analyze(node)
            if info.level == PURE:
                listed = synthetic(ast.Call(ast.Name("tuple", ast.Load()), [node], []), node)
                if "tuple" not in self.locals and self.resolver.lookup("tuple") is tuple:
                    with self.at(node):
                        return self._listed(listed, node)
        return self.lower(node, "items")

    def _listed(self, listed: ast.Call, node: ast.Call) -> Value:
        args = [self.analyze(a) for a in node.args]
        target = self.resolver.resolve(node.func)
        item: Any = ANY
        if target is enumerate and args:
            item = tuple_of(INT, item_type(args[0].type))
        elif target is zip:
            item = tuple_of(*(item_type(a.type) for a in args))
        elif target is reversed and args:
            item = item_type(args[0].type)
        names = [n for n in free_names(listed) if n in self.locals]
        inputs = [(n, self.read(n)) for n in names]
        t = list_of(item) if is_immutable(item) else sequence_of(item)
        (value,) = self.py(ast.unparse(listed), inputs, Info(t, PURE, True), hint="items")
        return self.know(value, sites=frozenset().union(*(a.sites for a in args)))

    @staticmethod
    def iteration_effect(items: Value) -> dict[str, Attr]:
        """What going through the items does: an unknown object may be an iterator, which is used up."""
        level = Analyzer.iteration(Info(items.type))
        if level >= WRITES:
            return {"reads": ("py",), "writes": ("py",)}
        return {"reads": ("py",)} if level else {}

    def _any_all(self, g: ast.GeneratorExp, which: str, hint: str) -> Value:
        """`any(... for ...)` and `all(...)`: a loop that stops at the first item that decides."""
        if len(g.generators) != 1 or g.generators[0].is_async:
            self.fail(
                g,
                "F014",
                f"`{which}` over several loops with operations cannot be captured",
                "write a for loop with a break",
            )
        gen = g.generators[0]
        items = self.iterable(gen.iter)
        decided = which == "any"
        start = self.builder.const(not decided, hint)
        targets = {n.id for n in ast.walk(gen.target) if isinstance(n, ast.Name)}
        hidden = self.locals

        def per_item(params: tuple[Value, ...]) -> list[Value]:
            self.know(params[0], sites=self.fact(items).sites if may_hold_lists(params[0].type) else frozenset())
            self.bind_target(gen.target, params[0])
            test: ast.expr = g.elt
            if gen.ifs:
                skips: list[ast.expr] = [ast.UnaryOp(ast.Not(), t) for t in gen.ifs]
                joined = ast.BoolOp(ast.And(), [*gen.ifs, g.elt]) if decided else ast.BoolOp(ast.Or(), [*skips, g.elt])
                test = synthetic(joined, g.elt)
            found = self.lower(test, "test")
            form = "bool(test)"
            (truth,) = self.py(form, [("test", found)], Info(BOOL, Info(found.type).touch, True), hint="truth")
            (again,) = self.py("not truth" if decided else "truth", [("truth", truth)], Info(BOOL), hint="again")
            return [again, truth]

        self.locals |= targets
        try:
            body, _ = self.region(per_item, [(_target_name(gen.target), item_type(items.type)), (hint, BOOL)])
        finally:
            self.locals = hidden
        (value,) = self.builder.emit(
            "foreach", (items, start), [(hint, BOOL)], {"breaks": True, **self.iteration_effect(items)}, (body,)
        )
        return value

    # -- targets
    def bind_target(self, target: ast.expr, value: Value) -> None:
        """Assigns a value to an assignment target."""
        match target:
            case ast.Name():
                self.assign(target.id, value)
            case ast.Tuple() | ast.List():
                self._unpack(target, value)
            case ast.Starred():
                self.bind_target(target.value, value)
            case ast.Attribute() | ast.Subscript():
                self._store(target, value)
            case _:
                raise AssertionError(ast.dump(target))

    def _unpack(self, target: ast.Tuple | ast.List, value: Value) -> None:
        names: dict[str, ast.expr] = {}

        def form(t: ast.expr) -> ast.expr:
            if isinstance(t, (ast.Tuple, ast.List)):
                return ast.Tuple([form(e) for e in t.elts], ast.Store())
            if isinstance(t, ast.Starred):
                return ast.Starred(form(t.value), ast.Store())
            name = t.id if isinstance(t, ast.Name) and t.id not in names else f"_{len(names)}"
            names[name] = t
            return ast.Name(name, ast.Store())

        source = self.own_name("value")
        pattern = ast.fix_missing_locations(ast.Assign([form(target)], ast.Name(source, ast.Load())))
        a = self.analyzer()
        env: dict[str, Info] = {}
        a.bind(pattern.targets[0], Info(value.type, sites=self.fact(value).sites), env)
        self.settle(a)
        level = a.iteration(Info(value.type))
        outs = [(n, env[n].type) for n in names]
        with self.at(target):
            values = self.py(ast.unparse(pattern), [(source, value)], Info(ANY, level, True), outs=outs)
        for (name, t), v in zip(names.items(), values, strict=True):
            self.know(v, sites=env[name].sites, is_declared=self.fact(value).is_declared)
            self.bind_target(t, v)

    def _store(self, target: ast.Attribute | ast.Subscript, value: Value) -> None:
        """`obj.attr = value` and `obj[key] = value`: opaque writes."""
        self.escaped |= self.fact(value).sites
        placeholders: dict[str, Value] = {}
        is_split = self.has_op(target) or self.binds_inside(target)
        rebuilt = self._hoist(target, placeholders) if is_split else copy.copy(target)
        base = rebuilt.value  # type: ignore[attr-defined]
        if isinstance(base, ast.Name) and base.id in self.env:
            self.escaped |= self.fact(self.env[base.id]).sites
        else:
            self.escaped |= self.analyze(target.value).sites if not is_split else frozenset()
        name = self.own_name("value")
        text = f"{ast.unparse(rebuilt)} = {name}"
        inputs = [
            (n, placeholders[n] if n in placeholders else self.read(n))
            for n in free_names(rebuilt)
            if n in placeholders or n in self.locals
        ]
        with self.at(target):
            self.py(text, [*inputs, (name, value)], Info(ANY, WRITES, True), outs=())


def _constant_spec(spec: ast.expr | None) -> str | None:
    """A format specification without slots as text; None if it has slots."""
    if spec is None:
        return ""
    assert isinstance(spec, ast.JoinedStr)
    if all(isinstance(v, ast.Constant) for v in spec.values):
        return "".join(str(v.value) for v in spec.values if isinstance(v, ast.Constant))
    return None


def _cut(cuts: dict[ast.expr, str], old: ast.expr, new: ast.expr) -> None:
    if isinstance(new, ast.Name):
        if new is not old:
            cuts[old] = new.id
    elif isinstance(new, ast.Attribute) and isinstance(old, ast.Attribute):
        _cut(cuts, old.value, new.value)


def _stem(value: Value) -> str:
    stem = value.name.partition(".")[0]
    return stem if stem.isidentifier() and not keyword.iskeyword(stem) else "v"


def _target_name(target: ast.expr) -> str:
    return target.id if isinstance(target, ast.Name) else "item"


def _evaluation_order(node: ast.expr) -> list[tuple[str, int | None, ast.expr]]:
    """(field, index, expression) of a node's parts, in the order in which Python evaluates them."""
    if isinstance(node, ast.Dict):
        found: list[tuple[str, int | None, ast.expr]] = []
        for i, (k, v) in enumerate(zip(node.keys, node.values, strict=True)):
            if k is not None:
                found.append(("keys", i, k))
            found.append(("values", i, v))
        return found
    if isinstance(node, ast.Call):
        return [
            ("func", None, node.func),
            *(("args", i, a) for i, a in enumerate(node.args)),
            *(("keywords", i, k.value) for i, k in enumerate(node.keywords)),
        ]
    parts: list[tuple[str, int | None, ast.expr]] = []
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            parts.append((name, None, value))
        elif isinstance(value, list):
            parts += [(name, i, v) for i, v in enumerate(value) if isinstance(v, ast.expr)]
    return parts


def _put(node: ast.expr, holder: str, index: int | None, new: ast.expr) -> None:
    if index is None:
        setattr(node, holder, new)
    elif holder == "keywords":
        old = node.keywords[index]  # type: ignore[attr-defined]
        node.keywords[index] = ast.copy_location(ast.keyword(old.arg, new), old)  # type: ignore[attr-defined]
    else:
        getattr(node, holder)[index] = new


__all__ = ["Expressions"]
