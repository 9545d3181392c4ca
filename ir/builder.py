"""Builds workflows without source, op by op.

b = Builder("hyde", [("question", TEXT)])
hypo = b.generate("default", b.template("Write a passage that answers: {}", b.params[0]), max_tokens=96)
graph = b.finish(b.search("pydocs", hypo, k=5))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .core import Attr, Attrs, Graph, Names, Op, Region, Scope, Value
from .errors import Loc
from .ops import OPS
from .types import ANY, BOOL, DOCS, NONE, TEXT, VECTOR, Type, join, list_of, type_of


class Block:
    """A region under construction."""

    __slots__ = ("ops", "params", "yields")

    def __init__(self, params: tuple[Value, ...]) -> None:
        self.params = params
        self.ops: list[Op] = []
        self.yields: tuple[Value, ...] = ()

    def done(self) -> Region:
        return Region(self.params, tuple(self.ops), self.yields)


class Builder:
    """A workflow under construction; new ops go to the innermost open region. `loc` is given to every new op."""

    def __init__(
        self, name: str, params: Sequence[tuple[str, Type]] = (), *, scope: str = "", loc: Loc | None = None
    ) -> None:
        self.name = name
        self.scope = scope
        self.names = Names()
        self.loc = loc
        self._graph_loc = loc
        self.params = tuple(Value(self.names.fresh(n), t) for n, t in params)
        self._stack = [Block(self.params)]
        self.scopes: dict[str, Scope] = {}
        self.symbols: dict[str, Any] = {}
        self.callees: dict[str, Graph] = {}

    # -- regions
    @property
    def block(self) -> Block:
        return self._stack[-1]

    @contextmanager
    def region(self, params: Sequence[tuple[str, Type]] = ()) -> Iterator[Block]:
        """Opens a region: ops built inside the `with` go there. Set `.yields` in it; then `.done()` is the Region."""
        block = Block(tuple(Value(self.names.fresh(n), t) for n, t in params))
        self._stack.append(block)
        try:
            yield block
        finally:
            self._stack.pop()

    def finish(self, result: Value) -> Graph:
        assert len(self._stack) == 1, "a region is still open"
        self.block.yields = (result,)
        return Graph(
            self.name,
            self.block.done(),
            self.scope,
            tuple(self.callees.values()),
            self._graph_loc,
            self.scopes,
            self.symbols,
        )

    # -- ops
    def emit(
        self,
        name: str,
        operands: Sequence[Value] = (),
        results: Sequence[tuple[str, Type]] = (("v", ANY),),
        attrs: Mapping[str, Attr] | None = None,
        regions: Sequence[Region] = (),
        loc: Loc | None = None,
    ) -> tuple[Value, ...]:
        """Appends an op; `results` are (name hint, type) pairs."""
        assert name in OPS, f"unknown op {name!r}"
        values = tuple(Value(self.names.fresh(hint), t) for hint, t in results)
        clean = Attrs({k: v for k, v in (attrs or {}).items() if v is not None or k == "value"})
        self.block.ops.append(Op(name, tuple(operands), values, clean, tuple(regions), loc or self.loc))
        return values

    def const(self, value: Attr, hint: str = "c") -> Value:
        return self.emit("const", (), [(hint, type_of(value))], {"value": value})[0]

    def template(
        self, text: str, *operands: Value, formats: Sequence[str] = (), hint: str = "prompt", **attrs: Attr
    ) -> Value:
        shown = tuple(formats) if any(formats) else None
        return self.emit("template", operands, [(hint, TEXT)], {"text": text, "formats": shown, **attrs})[0]

    def py(
        self,
        source: str,
        *operands: Value,
        params: Sequence[str] | None = None,
        outs: Sequence[str] | None = None,
        types: Sequence[Type] = (ANY,),
        hint: str = "v",
        reads: Sequence[str] = (),
        writes: Sequence[str] = ("py",),
        raises: bool = True,
        is_async: bool = False,
        scope: str | None = None,
        loc: Loc | None = None,
    ) -> tuple[Value, ...]:
        """Plain Python. Without `params` the operands go by their own names. Impure unless `writes=()` is said."""
        attrs: dict[str, Attr] = {
            "source": source,
            "params": tuple(params if params is not None else (v.name.split(".")[0] for v in operands)),
            "outs": tuple(outs) if outs is not None else None,
            "reads": tuple(reads) or None,
            "writes": tuple(writes) or None,
            "raises": True if raises else None,
            "is_async": True if is_async else None,
            "scope": scope,
        }
        hints = outs if outs is not None else [hint]
        return self.emit("py", operands, list(zip(hints, types, strict=True)), attrs, loc=loc)

    def search(self, resource: str, query: Value, *, k: int | None = None, hint: str = "docs", **attrs: Attr) -> Value:
        return self.emit("search", (query,), [(hint, DOCS)], {"resource": resource, "k": k, **attrs})[0]

    def embed(self, resource: str, text: Value, *, hint: str = "vector") -> Value:
        return self.emit("embed", (text,), [(hint, VECTOR)], {"resource": resource})[0]

    def generate(self, resource: str, prompt: Value, *, hint: str = "text", **attrs: Attr) -> Value:
        return self.emit("generate", (prompt,), [(hint, TEXT)], {"resource": resource, **attrs})[0]

    def choose(self, resource: str, prompt: Value, options: Value, *, hint: str = "choice") -> Value:
        return self.emit("choose", (prompt, options), [(hint, TEXT)], {"resource": resource})[0]

    def tool(self, tool: Any, name: str, *operands: Value, hint: str = "v", type: Type = ANY, **attrs: Attr) -> Value:
        """A call of `tool` (any callable), known to the workflow as `name`."""
        self.symbols[name] = tool
        return self.emit("tool", operands, [(hint, type)], {"tool": name, **attrs})[0]

    def call(self, callee: Graph, *operands: Value, hint: str = "v", **attrs: Attr) -> Value:
        self.callees.setdefault(callee.name, callee)
        return self.emit("call", operands, [(hint, callee.result.type)], {"callee": callee.name, **attrs})[0]

    def none(self) -> Value:
        return self.emit("const", (), [("none", NONE)], {"value": None})[0]

    def if_(
        self, condition: Value, then: Region, orelse: Region, hints: Sequence[str] | None = None
    ) -> tuple[Value, ...]:
        hints = hints or [v.name for v in then.yields]
        types = [join(a.type, b.type) for a, b in zip(then.yields, orelse.yields, strict=True)]
        return self.emit("if", (condition,), list(zip(hints, types, strict=True)), None, (then, orelse))

    def while_(self, inits: Sequence[Value], cond: Region, body: Region, *, limit: int) -> tuple[Value, ...]:
        results = [(p.name, p.type) for p in body.params]
        return self.emit("while", inits, results, {"limit": limit}, (cond, body))

    def foreach(
        self,
        items: Value,
        inits: Sequence[Value],
        body: Region,
        *,
        collects: int = 0,
        breaks: bool = False,
        **attrs: Attr,
    ) -> tuple[Value, ...]:
        carried = [(p.name, p.type) for p in body.params[1:]]
        lists = [(v.name, v.type) for v in body.yields[len(body.yields) - collects :]] if collects else []
        fields: dict[str, Attr] = {"collects": collects or None, "breaks": breaks or None, **attrs}
        return self.emit("foreach", (items, *inits), carried + lists, fields, (body,))

    def list_of(self, *items: Value, hint: str = "items") -> Value:
        names = [f"x{i}" for i in range(len(items))]
        t = list_of(join(*(v.type for v in items))) if items else list_of(ANY)
        return self.py(f"[{', '.join(names)}]", *items, params=names, types=[t], hint=hint, writes=(), raises=False)[0]


__all__ = ["BOOL", "Block", "Builder"]
