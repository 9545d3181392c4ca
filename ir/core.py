"""The graph: SSA values, operations with regions, workflows. Frozen; a rewrite returns a new graph.

A region lists its operations in *program order*: the order in which plain Python would run them. An ordered region runs
exactly so. In one that is not ordered, an operation waits for its operands and for the effect order that
`flowc.ir.effects.order_edges` derives, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import CellType
from typing import Any

from .errors import Loc
from .types import Type

Attr = str | int | float | bool | None | bytes | tuple["Attr", ...]


class Attrs(dict[str, Attr]):
    """An immutable, hashable mapping of names to literals (str, int, float, bool, None, bytes, tuples of them)."""

    __slots__ = ()

    def _frozen(self, *_: object, **__: object) -> Any:
        raise TypeError("attributes of an op are immutable; use `op.with_attrs(...)`")

    __setitem__ = __delitem__ = clear = pop = popitem = setdefault = update = __ior__ = _frozen  # pyright: ignore[reportAssignmentType]

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


NO_ATTRS = Attrs()


@dataclass(frozen=True, slots=True)
class Value:
    """An SSA value; `name` is unique within its workflow."""

    name: str
    type: Type

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `name` is a key of `flowc.ir.ops.OPS`; the last `len(attrs["kw"])` operands are keywords."""

    name: str
    operands: tuple[Value, ...] = ()
    results: tuple[Value, ...] = ()
    attrs: Attrs = NO_ATTRS
    regions: tuple[Region, ...] = ()
    loc: Loc | None = None

    @property
    def result(self) -> Value:
        (value,) = self.results
        return value

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attrs.get(name, default)

    def with_attrs(self, **changes: Attr) -> Op:
        return replace(self, attrs=Attrs({**self.attrs, **changes}))

    def without_attrs(self, *names: str) -> Op:
        return replace(self, attrs=Attrs({k: v for k, v in self.attrs.items() if k not in names}))


@dataclass(frozen=True, slots=True)
class Region:
    """A straight list of operations with parameters and yielded values. It sees the values of enclosing regions."""

    params: tuple[Value, ...] = ()
    ops: tuple[Op, ...] = ()
    yields: tuple[Value, ...] = ()
    ordered: bool = True


@dataclass(frozen=True, slots=True)
class Scope:
    """Where the plain Python of a workflow looks up its globals and closure variables, live."""

    globals: dict[str, Any]
    cells: Mapping[str, CellType] = field(default_factory=dict)
    filename: str = ""
    function: str = "workflow"  # what tracebacks call the frame


@dataclass(frozen=True, slots=True)
class Graph:
    """A workflow: `body.params` are its parameters, `body.yields` its one result.

    `scope` names the Python scope of its `py` operations ("package.module:function" or "path/file.py:function"); a `py`
    operation inlined from elsewhere names its own. `scopes` and `symbols` (tools, models, by name) bind those names to
    live objects; they are no part of a graph's identity and are found again by import when a graph comes from text.
    """

    name: str
    body: Region
    scope: str = ""
    callees: tuple[Graph, ...] = ()
    loc: Loc | None = None
    scopes: Mapping[str, Scope] = field(default_factory=dict, compare=False, repr=False)
    symbols: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def params(self) -> tuple[Value, ...]:
        return self.body.params

    @property
    def result(self) -> Value:
        (value,) = self.body.yields
        return value

    def callee(self, name: str) -> Graph | None:
        """The workflow that `call @name` means, or None if this graph does not hold it."""
        return next((g for g in (self, *self.callees) if g.name == name), None)

    def with_body(self, body: Region) -> Graph:
        return replace(self, body=body)


def walk(region: Region) -> Iterator[Op]:
    """Every op of a region, outer before inner, in program order."""
    for op in region.ops:
        yield op
        for inner in op.regions:
            yield from walk(inner)


def walk_regions(region: Region) -> Iterator[Region]:
    """The region itself and every region inside it, outer before inner."""
    yield region
    for op in region.ops:
        for inner in op.regions:
            yield from walk_regions(inner)


def free_values(region: Region) -> tuple[Value, ...]:
    """Values used inside a region and defined outside it, in order of first use."""
    defined: set[str] = set()
    used: dict[str, Value] = {}

    def visit(inner: Region) -> None:
        defined.update(p.name for p in inner.params)
        for op in inner.ops:
            for v in op.operands:
                used.setdefault(v.name, v)
            for r in op.regions:
                visit(r)
            defined.update(v.name for v in op.results)
        for v in inner.yields:
            used.setdefault(v.name, v)

    visit(region)
    return tuple(v for name, v in used.items() if name not in defined)


def map_region(region: Region, rewrite: Callable[[Region], Region]) -> Region:
    """Applies `rewrite` to every region, inner regions first; what does not change is kept as the same object."""
    ops = []
    changed = False
    for op in region.ops:
        if op.regions:
            inner = tuple(map_region(r, rewrite) for r in op.regions)
            if any(a is not b for a, b in zip(inner, op.regions, strict=True)):
                op, changed = replace(op, regions=inner), True
        ops.append(op)
    return rewrite(replace(region, ops=tuple(ops)) if changed else region)


def substitute(region: Region, mapping: Mapping[str, Value]) -> Region:
    """The region with uses of the named values replaced; definitions stay."""
    if not mapping:
        return region

    def on_op(op: Op) -> Op:
        operands = tuple(mapping.get(v.name, v) for v in op.operands)
        regions = tuple(substitute(r, mapping) for r in op.regions)
        return (
            op if operands == op.operands and regions == op.regions else replace(op, operands=operands, regions=regions)
        )

    ops = tuple(map(on_op, region.ops))
    yields = tuple(mapping.get(v.name, v) for v in region.yields)
    return region if ops == region.ops and yields == region.yields else replace(region, ops=ops, yields=yields)


def names_in(graph: Graph) -> set[str]:
    """Every value name of a workflow (callees not included)."""
    names: set[str] = set()
    for region in walk_regions(graph.body):
        names.update(v.name for v in region.params)
        for op in region.ops:
            names.update(v.name for v in op.results)
    return names


class Names:
    """Hands out value names that are not taken: `draft`, `draft.1`, `draft.2`."""

    __slots__ = ("_count", "_taken")

    def __init__(self, taken: set[str] | None = None) -> None:
        self._taken = set(taken or ())
        self._count: dict[str, int] = {}

    def fresh(self, hint: str) -> str:
        stem = hint.split(".")[0] or "v"
        name = stem
        while name in self._taken:
            self._count[stem] = self._count.get(stem, 0) + 1
            name = f"{stem}.{self._count[stem]}"
        self._taken.add(name)
        return name
