"""Calls that are operations: of resources, tools, other workflows and agents; asyncio's ways to start several."""

from __future__ import annotations

import ast
import asyncio
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowc.ir.core import Attr, Op, Region, Scope, Value, free_values
from flowc.ir.ops import OPS, Effect, effect_of, effect_of_region
from flowc.ir.options import Bounded, Budget, as_stop, as_where, stop_literal
from flowc.ir.types import ANY, DOCS, TEXT, VECTOR, Type, accepts, is_immutable, item_type, sequence_of

from .. import resources as resources_module
from ..resources import Resource, chat_prompt
from ..tools import Tool
from .expressions import Expressions
from .names import MISSING
from .purity import PURE, READS, Info, Site, may_hold_lists, result_type
from .source import synthetic

if TYPE_CHECKING:
    from collections.abc import Callable

_RESULTS: dict[str, Type] = {
    "generate": TEXT,
    "choose": TEXT,
    "parse": ANY,
    "search": DOCS,
    "rerank": DOCS,
    "embed": VECTOR,
}
_OPERANDS = {
    "generate": ("prompt",),
    "choose": ("prompt", "options"),
    "parse": ("prompt",),
    "search": ("query",),
    "rerank": ("query", "docs"),
    "embed": ("text",),
}
_CHAT_SCOPE = "flowc.dsl.resources:LLM"


class Calls(Expressions):
    """Lowers calls of what the graph has operations for."""

    # -- what is called
    def target(self, node: ast.Call) -> tuple[str, Any] | None:
        """(kind, object) of a call that is an operation: kind is "resource", "tool", "workflow" or "invoke"."""
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            return None  # star arguments stay Python: the call runs at once, inside its node
        found = self.resolver.resolve(node.func)
        if found is MISSING:
            return None
        bound: Any = getattr(found, "__self__", None)
        if isinstance(bound, Resource) and found.__name__ in bound.operations:
            return ("resource", found) if _fits(_method_signature(found), node) else None
        if isinstance(found, Tool):
            return ("tool", found) if _fits(found.signature, node) else None
        if getattr(bound, "__flowc_workflow__", False) and found.__name__ == "aio":
            found = bound
        if getattr(found, "__flowc_workflow__", False):
            called: Any = found
            return ("workflow", called) if _fits(called.signature, node) else None
        if getattr(found, "__flowc_invoke__", False):
            return "invoke", found
        return None

    def is_operation(self, node: ast.Call) -> bool:
        return self.target(node) is not None

    def _gives_awaitable(self, node: ast.Call, kind: str, found: Any) -> bool:
        if kind == "tool":
            return bool(found.is_async)
        if kind == "workflow":
            return (
                self.is_async
                if getattr(found, "__flowc_agent__", False)
                else bool(found.is_async) or _is_aio(self.resolver.resolve(node.func))
            )
        return self.is_async and kind == "resource"

    def operation_type(self, node: ast.Call) -> Type:
        found = self.target(node)
        if found is None or self._gives_awaitable(node, *found):
            return ANY
        kind, callee = found
        return _RESULTS[callee.__self__.operations[callee.__name__]] if kind == "resource" else ANY

    def lower_call(self, node: ast.Call, hint: str) -> Value | None:
        """The value of a call that is an operation; None if it is plain Python."""
        started = self._started(node)
        if started is not None:
            value = self.lower_call(started, hint)
            assert value is not None
            self.started.append(value)
            return self._as_task(value)
        if (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "result"
            and not node.args
            and self._is_task(node.func.value)
        ):
            assert isinstance(node.func.value, ast.Name)
            return self.awaited(self.env[node.func.value.id])
        found = self.target(node)
        if found is None:
            return None
        kind, callee = found
        lower: Callable[[ast.Call, Any, str], Value] = {
            "resource": self._resource, "tool": self._tool, "workflow": self._workflow, "invoke": self._invoke,
        }[kind]  # fmt: skip
        value = lower(node, callee, hint)
        return self._as_task(value) if self._gives_awaitable(node, kind, callee) else value

    def _as_task(self, value: Value) -> Value:
        fact = self.fact(value)
        return self.know(value, sites=fact.sites, is_declared=fact.is_declared, is_task=True)

    def _started(self, node: ast.Call) -> ast.Call | None:
        """The operation inside `asyncio.create_task(...)`, `asyncio.ensure_future(...)` or `group.create_task(...)`."""
        if len(node.args) != 1 or not isinstance(node.args[0], ast.Call) or not self.is_operation(node.args[0]):
            return None
        target = self.resolver.resolve(node.func)
        in_group = (
            isinstance(node.func, ast.Attribute)
            and node.func.attr == "create_task"
            and isinstance(node.func.value, ast.Name)
        )
        if target in (asyncio.create_task, asyncio.ensure_future) or (in_group and node.func.value.id in self.groups):  # type: ignore[attr-defined]
            return node.args[0]
        return None

    def may_be_task(self, name: str) -> bool:
        return name in self._task_names

    @functools.cached_property
    def _task_names(self) -> frozenset[str]:
        """Variables that may hold the task of an operation."""
        found: set[str] = set()
        for n in ast.walk(self.src.node):
            if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call):
                call = n.value
                starts = isinstance(call.func, ast.Attribute) and call.func.attr in ("create_task", "ensure_future")
                if (starts and call.args and self.has_op(call.args[0])) or self.is_operation(call):
                    found.update(t.id for t in n.targets if isinstance(t, ast.Name))
        return frozenset(found)

    groups: frozenset[str] = frozenset()  # names of open asyncio.TaskGroups

    # -- what runs at once

    def together(self, first: int, values: Sequence[Value]) -> None:
        """Makes the operations that give these values a group, among those that the region has from `first` on.

        As with asyncio, all Python that stands between their starts runs before the first of them; what uses their
        results comes after them. Operations that write nothing need no group: nothing orders them.
        """
        ops = self.builder.block.ops
        wanted = {v.name for v in values}
        after = set(wanted)  # values that depend on them
        head: list[Op] = []
        members: list[Op] = []
        tail: list[Op] = []
        for op in ops[first:]:
            names = {v.name for v in (*op.operands, *(v for r in op.regions for v in free_values(r)))}
            is_member = any(v.name in wanted for v in op.results)
            is_late = not names.isdisjoint(after)
            if is_member and is_late:
                return  # one needs another: they are a chain
            if is_late:
                after.update(v.name for v in op.results)
            (members if is_member else tail if is_late else head).append(op)
        if not any(effect_of(op).writes for op in members):
            return
        if len(members) > 1 or any(op.name == "foreach" for op in members):
            group = self._next_group()
            members = [self._all_at_once(op).with_attrs(group=group) for op in members]
        ops[first:] = [*head, *members, *tail]

    def _next_group(self) -> int:
        self.group_count += 1
        return self.group_count

    def _all_at_once(self, op: Op) -> Op:
        """The same with the items of the loops in it all at once, where each does nothing but start an operation."""
        if op.name not in ("foreach", "if") or not all(map(_only_starts, op.regions)):
            return op
        regions = tuple(
            replace(r, ops=tuple(self._all_at_once(o) if effect_of(o).writes else o for o in r.ops)) for r in op.regions
        )
        op = replace(op, regions=regions)
        if op.name == "if" or len(op.operands) > 1 or op.attrs.get("breaks"):
            return op
        return op.with_attrs(parallel=True, group=self._next_group())

    # -- asyncio.gather
    def is_gather(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Call) and self.resolver.resolve(node.func) is asyncio.gather

    def lower_gather(self, node: ast.Call, hint: str) -> Value:
        """`await asyncio.gather(...)` over operations: they are a group, or run as their data allows."""
        if node.keywords:
            self.fail(
                node,
                "F016",
                "asyncio.gather with options over operations cannot be captured",
                "use try/except around the operations",
            )
        args = [(self._started(a) if isinstance(a, ast.Call) else None) or a for a in node.args]
        node = ast.copy_location(ast.Call(node.func, args, []), node)
        plain = [a for a in node.args if not self.has_op(a) and not self._is_task(a)]
        if any(isinstance(a, ast.Starred) for a in plain):
            self.fail(
                node,
                "F016",
                "asyncio.gather mixes operations with a starred list of coroutines",
                "gather the two apart",
            )
        rest: dict[int, Value] = {}
        ready: dict[int, ast.expr] = {}
        each: dict[int, Callable[[], Value]] = {}
        for a in node.args:  # Python computes every argument before the first of the operations starts
            if isinstance(a, ast.Starred):
                each[id(a)] = self._ready_for_each(a, hint)
            elif isinstance(a, ast.Call) and a not in plain:
                ready[id(a)] = self._ready(a)
        first = len(self.builder.block.ops)
        for a in node.args:
            if isinstance(a, ast.Starred):
                rest[id(a)] = each[id(a)]()
            elif a not in plain:
                rest[id(a)] = (
                    self.awaited(self.env[a.id])
                    if isinstance(a, ast.Name)
                    else self.lower(_awaiting(ready.get(id(a), a)), hint)
                )
        if plain:
            call = synthetic(ast.Await(ast.Call(node.func, list(plain), [])), node)
            both = self.py_expr(call, "gathered")
            self.together(first, [*rest.values(), both])
            for i, a in enumerate(plain):
                (rest[id(a)],) = self.py(f"gathered[{i}]", [("gathered", both)], Info(ANY, PURE, False), hint="v")
        else:
            self.together(first, list(rest.values()))
        if len(node.args) == 1 and isinstance(node.args[0], ast.Starred):
            return rest[id(node.args[0])]
        if not any(isinstance(a, ast.Starred) for a in node.args):
            return self.list_value([rest[id(a)] for a in node.args], node, hint if hint != "v" else "gathered")
        placeholders = {f"part_{i}": rest[id(a)] for i, a in enumerate(node.args)}
        parts: list[ast.expr] = [
            ast.Starred(ast.Name(n, ast.Load()), ast.Load()) if isinstance(a, ast.Starred) else ast.Name(n, ast.Load())
            for n, a in zip(placeholders, node.args, strict=True)
        ]
        listed_all = synthetic(ast.List(parts, ast.Load()), node)
        return self.py_expr(listed_all, hint, placeholders)

    def _ready(self, call: ast.Call) -> ast.Call:
        """The same call with its arguments computed now."""
        if not self.is_operation(call):
            return call
        if any(self._started(c) is not None for c in ast.walk(call) if isinstance(c, ast.Call)):
            return call

        def computed(arg: ast.expr) -> ast.expr:
            if self._constant(arg) is not MISSING or self.resolver.resolve(arg) is not MISSING:
                return arg
            return self.named(self.lower(arg, "argument"), arg)

        args = [computed(a) for a in call.args]
        keywords = [ast.keyword(k.arg, computed(k.value)) for k in call.keywords]
        return synthetic(ast.Call(call.func, args, keywords), call)

    def named(self, value: Value, at: ast.expr) -> ast.Name:
        """A variable of the frontend's own that holds the value."""
        name = self.own_name("argument")
        self.locals |= {name}
        self.env[name] = value
        return ast.copy_location(ast.Name(name, ast.Load()), at)

    def _ready_for_each(self, starred: ast.Starred, hint: str) -> Callable[[], Value]:
        """What lowers `*[op(f(x)) for x in xs]`, every `f(x)` computed first where it matters that it is not computed
        in between.
        """
        inner = starred.value
        if not isinstance(inner, (ast.ListComp, ast.GeneratorExp)):
            self.fail(
                starred,
                "F016",
                "asyncio.gather over a starred expression with operations",
                "write *[op(x) for x in xs]",
            )
        call = inner.elt
        generators = inner.generators
        if isinstance(call, ast.Call) and self.is_operation(call) and not self._can_interleave(inner, call):
            parts = [a for a in (*call.args, *(k.value for k in call.keywords)) if self._constant(a) is MISSING]
            every = synthetic(ast.ListComp(ast.Tuple(parts, ast.Load()), generators), inner)
            listed = self.lower(every, "arguments")
            return lambda: self._start_each(inner, call, parts, listed, hint)
        listcomp = synthetic(ast.ListComp(_awaiting(synthetic(call, inner)), generators), inner)
        return lambda: self.lower(listcomp, hint)

    def _start_each(self, node: ast.expr, call: ast.Call, parts: Sequence[ast.expr], listed: Value, hint: str) -> Value:
        """The operation for each tuple of arguments in a list that nobody else holds."""

        def per_item(params: tuple[Value, ...]) -> list[Value]:
            types = params[0].type.args if len(params[0].type.args) == len(parts) else (ANY,) * len(parts)
            names: dict[int, ast.expr] = {}
            for i, (part, t) in enumerate(zip(parts, types, strict=True)):
                (value,) = self.py(f"argument[{i}]", [("argument", params[0])], Info(t, PURE, False), hint="argument")
                names[id(part)] = self.named(value, part)
            each = ast.Call(
                call.func,
                [names.get(id(a), a) for a in call.args],
                [ast.keyword(k.arg, names.get(id(k.value), k.value)) for k in call.keywords],
            )
            item = self.lower(_awaiting(synthetic(each, node)), "item")
            return [self.list_value([item], call, "chunk")]

        body, _ = self.region(per_item, [("argument", item_type(listed.type))])
        return self.collected(node, listed, body, hint, {})

    def _can_interleave(self, node: ast.ListComp | ast.GeneratorExp, call: ast.Call) -> bool:
        """Does computing the arguments of one item after the operation of another make no difference?"""
        if any(self.has_op(a) for a in (*call.args, *(k.value for k in call.keywords), *node.generators)):
            return False
        a = self.analyzer()
        names: dict[str, Info] = {}
        infos: list[Info] = []
        with a.scope(names):
            for g in node.generators:
                source = a.expr(g.iter)
                infos.append(replace(source, level=max(source.level, a.iteration(source))))
                a.bind(g.target, Info(item_type(source.type)), names)
                infos += [a.expr(t) for t in g.ifs]
            infos += [a.expr(e) for e in (*call.args, *(k.value for k in call.keywords))]
        most = PURE if self._may_write(call) else READS
        return all(i.level <= most and not i.raises for i in infos)

    def _may_write(self, call: ast.Call) -> bool:
        """May the operation change what Python reads?"""
        found = self.target(call)
        assert found is not None
        kind, callee = found
        return kind != "resource" and (kind != "tool" or bool(callee.writes))

    # -- resources
    def _resource(self, node: ast.Call, method: Any, hint: str) -> Value:
        resource: Resource = method.__self__
        op = resource.operations[method.__name__]
        given = _bind(_method_signature(method), node)
        attrs: dict[str, Attr] = {"resource": resource.name}
        values: dict[str, Value] = {}
        for name, arg in given:
            if name == "model":
                model = self.resolver.resolve(arg)
                if not isinstance(model, type):
                    self.fail(
                        arg,
                        "F017",
                        "parse needs a pydantic class that is known when the workflow is captured",
                        "name the class itself",
                    )
                attrs["model"] = model.__name__
                attrs["ref"] = f"{model.__module__}:{model.__qualname__}"
                self.builder.symbols[model.__name__] = model
                continue
            if name == "messages":
                values["prompt"] = self._chat(arg)
                continue
            constant: Any = MISSING
            if op == "search" and name in ("where", "stop"):
                constant = self._search_option(name, arg)
            elif name not in _OPERANDS[op]:
                constant = self._constant(arg)
            if constant is None:
                continue
            if constant is not MISSING and name != "options":
                attrs[name] = (constant,) if name == "stop" and isinstance(constant, str) else constant
                continue
            values[name] = self._operand(op, name, self.lower(arg, name))
        for name, value in values.items():
            if self.fact(value).is_task:
                self.fail(node, "F016", f"`{name}` is a coroutine or task that is not awaited", "await it first")
        operands = [values.pop(n) for n in _OPERANDS[op]]
        if values:
            attrs["kw"] = tuple(values)
            operands += values.values()
        if not all(is_immutable(v.type) for v in operands):
            attrs["reads"] = ("py",)
        (result,) = self.builder.emit(op, operands, [(hint if hint != "v" else _HINT[op], _RESULTS[op])], attrs)
        return result

    def _operand(self, op: str, name: str, value: Value) -> Value:
        """The value; one of a type that the operation does not take as `any`: it is refused when it gets there, as by
        Python.
        """
        spec = OPS[op]
        named = dict(zip(_OPERANDS[op], spec.operands or (), strict=False)) | dict(spec.optional)
        if accepts(named.get(name, ANY), value.type) or self.fact(value).is_task:
            return value
        return self.py(name, [(name, value)], Info(ANY), hint=name)[0]

    def _chat(self, messages: ast.expr) -> Value:
        value = self.lower(messages, "messages")
        self.builder.scopes.setdefault(
            _CHAT_SCOPE, Scope(resources_module.__dict__, {}, resources_module.__file__ or "", "chat")
        )
        info = Info(TEXT, Info(value.type).touch, True)
        (prompt,) = self.py(
            f"{chat_prompt.__name__}(messages)", [("messages", value)], info, hint="prompt", scope=_CHAT_SCOPE
        )
        return prompt

    def _search_option(self, name: str, node: ast.expr) -> Any:
        """A filter or a stop that stands there as a literal, as the literal of the IR; MISSING for all else.

        One that makes no sense stays a value: the search refuses it when it gets there, as by Python.
        """
        value: Any = MISSING
        if isinstance(node, ast.Constant) and node.value is None:
            return None
        if name == "where" and isinstance(node, ast.Dict):
            value = self._mapping(node)
        elif name == "stop" and isinstance(node, ast.Call) and self.resolver.resolve(node.func) in (Bounded, Budget):
            given = [self._constant(a) for a in (*node.args, *(k.value for k in node.keywords))]
            if MISSING not in given and all(k.arg for k in node.keywords):
                names = [k.arg or "" for k in node.keywords]
                kind: Any = self.resolver.resolve(node.func)
                try:
                    value = kind(*given[: len(node.args)], **dict(zip(names, given[len(node.args) :], strict=True)))
                except TypeError:
                    return MISSING
        if value is MISSING:
            return MISSING
        try:
            if name == "where":
                return as_where(value)
            stop = as_stop(value)
            return None if stop is None else stop_literal(stop)
        except ValueError:
            return MISSING

    def _mapping(self, node: ast.Dict) -> Any:
        """A dict display of constants, of lists and of mappings of them; MISSING for all else."""
        out: dict[Any, Any] = {}
        for key, item in zip(node.keys, node.values, strict=True):
            name = MISSING if key is None else self._constant(key)
            value = self._mapping(item) if isinstance(item, ast.Dict) else self._constant(item)
            if MISSING in (name, value):
                return MISSING
            out[name] = value
        return out

    def _constant(self, node: ast.expr) -> Any:
        """A literal or module constant; lists and tuples of them as tuples; MISSING for all else."""
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None), bytes)):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
            value = node.operand.value
            return -value if isinstance(value, (int, float)) else MISSING
        if isinstance(node, (ast.List, ast.Tuple)):
            items = [self._constant(e) for e in node.elts]
            return MISSING if MISSING in items else tuple(items)
        return self.resolver.constant(node)

    # -- tools
    def _tool(self, node: ast.Call, tool: Tool[..., Any], hint: str) -> Value:
        operands = [self.lower(a, p) for a, p in zip(node.args, _names_for(tool.signature, node), strict=True)]
        keywords = [(k.arg or "", self.lower(k.value, k.arg or "v")) for k in node.keywords]
        operands += [v for _, v in keywords]
        attrs: dict[str, Attr] = {
            "tool": self.symbol(tool.name, tool),
            "ref": _ref(tool),
            "kw": tuple(n for n, _ in keywords) or None,
            **self._argument_effects(operands, tool.reads, tool.writes),
            "is_async": True if tool.is_async else None,
            "timeout": tool.timeout_s,
            "retries": tool.retries or None,
            "idempotent": True if tool.idempotent else None,
        }
        for v in operands:
            if self.fact(v).is_task:
                self.fail(node, "F016", "a coroutine or task that is not awaited is passed to a tool", "await it first")
        declared = result_type(tool)
        (value,) = self.builder.emit("tool", operands, [(hint if hint != "v" else tool.name, declared)], attrs)
        return self.know(value, is_declared=declared != ANY)

    def _argument_effects(
        self, operands: Sequence[Value], reads: Sequence[str], writes: Sequence[str]
    ) -> dict[str, Attr]:
        """Effects of a call that is given these values: objects that may change are read, lists that it may keep
        escape.
        """
        for v in operands:
            self.escaped |= self.fact(v).sites
        seen = set(reads)
        if not all(is_immutable(v.type) for v in operands):
            seen.add("py")
        return {"reads": tuple(sorted(seen)) or None, "writes": tuple(sorted(writes)) or None}

    def symbol(self, name: str, value: Any) -> str:
        """The name under which the graph knows an object; a second object of the same name gets a number."""
        unique, n = name, 1
        while self.builder.symbols.get(unique, value) is not value:
            n += 1
            unique = f"{name}_{n}"
        self.builder.symbols[unique] = value
        return unique

    def _invoke(self, node: ast.Call, toolbox: Any, hint: str) -> Value:
        """A call of a tool whose name is known only at run time, out of a fixed set."""
        name, arguments = (self.lower(a, h) for a, h in zip(node.args, ("tool", "arguments"), strict=True))
        tools: Mapping[str, Tool[..., Any]] = toolbox.tools
        for t in tools.values():
            self.builder.symbols.setdefault(t.name, t)
        reads = {r for t in tools.values() for r in t.reads}
        writes = {w for t in tools.values() for w in t.writes}
        attrs: dict[str, Attr] = {
            "tools": tuple(tools),
            "refs": tuple(_ref(t) or "" for t in tools.values()),
            **self._argument_effects([name, arguments], sorted(reads), sorted(writes)),
        }
        (value,) = self.builder.emit(
            "invoke", (name, arguments), [(hint if hint != "v" else "observation", ANY)], attrs
        )
        return value

    # -- other workflows
    def _workflow(self, node: ast.Call, workflow: Any, hint: str) -> Value:
        given = dict(_bind(workflow.signature, node))
        values: dict[str, Value] = {}
        for name, arg in given.items():
            values[name] = self.lower(arg, name)
        operands: list[Value] = []
        for name, parameter in workflow.signature.parameters.items():
            if name in values:
                operands.append(values[name])
            else:
                operands.append(self._default(node, workflow, name, parameter.default))
        types = tuple(_seen_by_callee(v.type) for v in operands)
        callee = self.session.callee(workflow, types)
        effect = Effect(writes=frozenset({"py"})) if callee.graph is None else effect_of_region(callee.graph.body)
        if effect.writes or callee.graph is None or may_hold_lists(callee.graph.result.type):
            for v in operands:
                self.escaped |= self.fact(v).sites
        reads = set(effect.reads)
        if not all(is_immutable(v.type) for v in operands):
            reads.add("py")
        attrs: dict[str, Attr] = {
            "callee": callee.name,
            "reads": tuple(sorted(reads)) or None,
            "writes": tuple(sorted(effect.writes)) or None,
        }
        result = callee.graph.result.type if callee.graph is not None else ANY
        sites: frozenset[Site] = frozenset()
        if result.name == "list":  # the callee made it and keeps no hold on it
            result, sites = self.analyzer().fresh(node, item_type(result)) if is_immutable(result) else (ANY, sites)
        (value,) = self.builder.emit("call", operands, [(hint if hint != "v" else workflow.name, result)], attrs)
        return self.know(value, sites=sites, is_declared=callee.is_declared)

    def _default(self, node: ast.Call, workflow: Any, name: str, default: Any) -> Value:
        if not isinstance(default, (str, int, float, bool, type(None), bytes)):
            self.fail(
                node,
                "F017",
                f"the default of `{name}` in workflow `{workflow.name}` is an object that the graph cannot hold",
                f"pass `{name}` explicitly",
            )
        return self.builder.const(default, name)


def _seen_by_callee(t: Type) -> Type:
    """The type of an argument for the workflow that is called: a list of the caller's is an object that others hold."""
    if t.name == "list":
        return sequence_of(item_type(t)) if not may_hold_lists(item_type(t)) else sequence_of(ANY)
    return t if t.name == "sequence" or not may_hold_lists(t) else ANY


@functools.lru_cache(maxsize=64)
def _method_signature(method: Any) -> inspect.Signature:
    """The signature of a resource's method."""
    return inspect.signature(method)


def _fits(signature: inspect.Signature, node: ast.Call) -> bool:
    """Do the arguments fit the signature? (If not, the call stays Python and raises its own TypeError.)"""
    try:
        signature.bind(*node.args, **{k.arg: k.value for k in node.keywords if k.arg})
    except TypeError:
        return False
    return not any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())


def _bind(signature: inspect.Signature, node: ast.Call) -> list[tuple[str, ast.expr]]:
    """(parameter, argument) pairs in the order in which the arguments stand."""
    names = _names_for(signature, node)
    return [*zip(names, node.args, strict=True), *((k.arg or "", k.value) for k in node.keywords)]


def _names_for(signature: inspect.Signature, node: ast.Call) -> list[str]:
    positional = [
        p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return positional[: len(node.args)]


def _ref(tool: Tool[..., Any]) -> str | None:
    module, name = getattr(tool.fn, "__module__", None), getattr(tool.fn, "__qualname__", None)
    return f"{module}:{name}" if module and name and "<locals>" not in name else None


def _is_aio(found: Any) -> bool:
    return getattr(found, "__name__", "") == "aio"


def _only_starts(region: Region) -> bool:
    """Does it do nothing that anybody can see but one operation, or one branch or loop that does so?"""
    seen = [op for op in region.ops if effect_of(op).reads or effect_of(op).writes]
    if not seen:
        return True
    (op, *others) = seen
    if op.name in ("if", "foreach"):
        own = effect_of(replace(op, regions=()))
        return not others and not own.reads and not own.writes and all(map(_only_starts, op.regions))
    return not others and (OPS[op.name].lane != "python" or op.name == "call")


def _awaiting(node: ast.expr) -> ast.expr:
    return node if isinstance(node, ast.Await) else synthetic(ast.Await(node), node)


_HINT = {
    "generate": "text",
    "choose": "choice",
    "parse": "object",
    "search": "docs",
    "rerank": "docs",
    "embed": "vector",
}

__all__ = ["Calls"]
