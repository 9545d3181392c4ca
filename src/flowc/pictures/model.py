"""What a picture shows of a workflow: a tree of items with edges between neighbours, without places yet.

Every operation is an item. One with regions (`if`, `foreach`, ...) is a box whose parts hold the items of its regions.
An edge always joins two items of one part: where a value is used deeper inside a box, the edge ends at that box.
Constants are left out (they are no work, and there are many); a part that would be empty without them keeps them.

Labels are the names of operations, resources and variables. No text of a prompt and no other literal ever gets into
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flowc.ir.core import Graph, Op, Region, Value
from flowc.ir.effects import order_edges
from flowc.ir.ops import OPS

__all__ = ["LANES", "Drawing", "Edge", "Item", "Part", "draw", "item_ids"]

LANES = ("llm", "search", "embed", "rerank", "io", "python")
"""The lanes in the order in which legends and timelines show them."""

_HIDDEN = frozenset({"const", "undef"})


@dataclass(frozen=True, slots=True)
class Edge:
    """`src` to `dst` (ids of items in one part). `kind`: "data", or "order" where only the order of effects asks for
    it.
    """

    src: str
    dst: str
    kind: str = "data"
    values: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A region: its items in program order and the edges between them. The root's label is empty."""

    label: str
    items: tuple[Item, ...]
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """Something drawn. `kind`: "op", "box" (an op with parts), "param" (a region's or workflow's parameter) or
    "result".
    """

    id: str
    kind: str
    title: str
    subtitle: str = ""
    lane: str = "python"
    wave: int | None = None
    op: Op | None = field(default=None, compare=False)
    parts: tuple[Part, ...] = ()
    hidden_ops: int = 0  # of a box drawn closed: how many operations are inside


@dataclass(frozen=True, slots=True)
class Drawing:
    """A workflow as a picture shows it."""

    name: str
    root: Part
    is_ordered: bool  # as captured: one operation after another

    def items(self) -> Iterator[Item]:
        """Every item, outer before inner, in program order."""
        yield from _items(self.root)

    def edges(self) -> Iterator[Edge]:
        yield from self.root.edges
        for item in self.items():
            for part in item.parts:
                yield from part.edges

    @property
    def waves(self) -> tuple[int, ...]:
        return tuple(sorted({i.wave for i in self.items() if i.wave is not None}))

    @property
    def lanes(self) -> tuple[str, ...]:
        """The lanes in use, in the order of `LANES`, unknown ones last."""
        used = {i.lane for i in self.items() if i.kind == "op"}
        return tuple(sorted(used, key=lambda lane: (LANES.index(lane) if lane in LANES else len(LANES), lane)))


def _items(part: Part) -> Iterator[Item]:
    for item in part.items:
        yield item
        for inner in item.parts:
            yield from _items(inner)


def draw(graph: Graph, *, prefix: str = "n", most_items: int = 600) -> Drawing:
    """The drawing of a workflow; ids are `prefix` and a number in program order, constants counted.

    Where there are more than `most_items` operations, boxes with more than a dozen operations are drawn closed.
    """
    ids = item_ids(graph.body, prefix)
    closes = len(ids) > most_items
    root = _part("", graph.body, ids, closes, result=graph.result, prefix=prefix)
    return Drawing(graph.name, root, graph.body.ordered)


def item_ids(region: Region, prefix: str) -> dict[int, str]:
    """id(op) -> item id. By identity: equal operations may occur twice, in two branches."""
    ids: dict[int, str] = {}

    def visit(inner: Region) -> None:
        for op in inner.ops:
            ids[id(op)] = f"{prefix}{len(ids)}"
            for r in op.regions:
                visit(r)

    visit(region)
    return ids


def _part(
    label: str,
    region: Region,
    ids: Mapping[int, str],
    closes: bool,
    *,
    result: Value | None = None,
    prefix: str,
    owner: str = "",
) -> Part:
    shown = [op for op in region.ops if op.name not in _HIDDEN]
    if not shown and result is None:
        shown = list(region.ops)
    visible = {id(op) for op in shown}
    used = _used(shown)
    if result is not None:
        used.add(result.name)
    items: list[Item] = []
    source: dict[str, str] = {}  # value name -> id of the item of this part that gives it
    for i, param in enumerate(region.params):
        if result is not None or param.name in used:
            item_id = f"{owner}{prefix if not owner else '-'}p{i}"
            items.append(Item(item_id, "param", _stem(param.name), str(param.type) if result is not None else ""))
            source[param.name] = item_id
    edges: dict[tuple[str, str], tuple[str, set[str]]] = {}

    def link(src: str, dst: str, kind: str, value: str | None = None) -> None:
        if src == dst:
            return
        old_kind, values = edges.get((src, dst), (kind, set()))
        edges[src, dst] = ("data" if "data" in (kind, old_kind) else kind, values | ({value} if value else set()))

    for op in shown:
        item = _item(op, ids, closes, prefix)
        items.append(item)
        for name in _reads(op):
            if name in source:
                link(source[name], item.id, "data", name)
        source.update((v.name, item.id) for v in op.results)
    if result is not None:
        items.append(Item(f"{prefix}return", "result", "return", _stem(result.name)))
        if result.name in source:
            link(source[result.name], f"{prefix}return", "data", result.name)
    for src, dst in _order(region, visible):
        link(ids[src], ids[dst], "order")
    if not region.ordered:
        _drop_implied(edges, [i.id for i in items])
    drawn = tuple(Edge(a, b, kind, tuple(sorted(values))) for (a, b), (kind, values) in edges.items())
    return Part(label, tuple(items), drawn)


def _order(region: Region, visible: set[int]) -> Iterator[tuple[int, int]]:
    """Pairs of id(op) that effects or written order put one after the other; what is hidden is stepped over."""
    stands_for: list[set[int]] = []  # per op its position if it is drawn, else the positions of what it waits for
    for i, (op, waits) in enumerate(zip(region.ops, order_edges(region), strict=True)):
        before = set[int]().union(*(stands_for[w] for w in waits))
        if id(op) in visible:
            for src in sorted(before):
                yield id(region.ops[src]), id(op)
            before = {i}
        stands_for.append(before)


def _drop_implied(edges: dict[tuple[str, str], tuple[str, set[str]]], order: list[str]) -> None:
    """Removes order edges that other edges imply. Reachability as bit sets, from the last item to the first."""
    place = {item: i for i, item in enumerate(order)}
    below: dict[str, list[str]] = {}
    for src, dst in edges:
        below.setdefault(src, []).append(dst)
    reach: dict[str, int] = {}
    for src in reversed(order):
        bits = 0
        for dst in sorted(below.get(src, ()), key=place.__getitem__):
            if edges[src, dst][0] == "order" and bits >> place[dst] & 1:
                del edges[src, dst]
                continue
            bits |= reach[dst] | 1 << place[dst]
        for dst in [d for d in below.get(src, ()) if (src, d) in edges and edges[src, d][0] == "order"]:
            through = 0
            for other in below[src]:
                if other != dst and (src, other) in edges:
                    through |= reach[other]
            if through >> place[dst] & 1:
                del edges[src, dst]
        reach[src] = bits


def _item(op: Op, ids: Mapping[int, str], closes: bool, prefix: str) -> Item:
    spec = OPS.get(op.name)
    lane = spec.lane if spec is not None else "python"
    wave = op.attr("wave")
    wave = wave if isinstance(wave, int) else None
    if not op.regions:
        return Item(ids[id(op)], "op", op.name, _subtitle(op), lane, wave, op)
    inside = sum(1 for r in op.regions for _ in _ops(r))
    item_id, title = ids[id(op)], _title(op)
    if closes and inside > 12:
        return Item(item_id, "op", title, f"{inside} operations", lane, wave, op, (), inside)
    parts = tuple(
        _part(label, region, ids, closes, prefix=prefix, owner=f"{item_id}-{i}")
        for i, (label, region) in enumerate(zip(_part_labels(op), op.regions, strict=True))
    )
    return Item(item_id, "box", title, _result_names(op), lane, wave, op, parts)


def _ops(region: Region) -> Iterator[Op]:
    for op in region.ops:
        yield op
        for r in op.regions:
            yield from _ops(r)


def _title(op: Op) -> str:
    match op.name:
        case "foreach":
            return "for each, all at once" if op.attr("parallel") else "for each, in turn"
        case "while":
            return f"while, at most {op.attr('limit')} times"
        case "fused":
            return "fused Python"
        case name:
            return name


def _part_labels(op: Op) -> list[str]:
    """A label per region; none where there is only one."""
    if len(op.regions) == 1:
        return [""]
    names = list(OPS[op.name].regions)
    if names and names[-1].startswith("*"):
        stem = names.pop()[1:].removesuffix("s")
        names = [{"handler": "except"}.get(stem, stem) if i >= len(names) else names[i] for i in range(len(op.regions))]
    return [{"body": "try"}.get(n, n) if op.name == "try" else {"cond": "condition"}.get(n, n) for n in names]


def _subtitle(op: Op) -> str:
    """`pydocs → docs`: what it runs on and the variable that it binds; of a constant its value, if that is one word."""
    if op.name == "const" and op.attr("value") in (True, False, None):
        return str(op.attr("value"))
    on = next((str(op.attrs[a]) for a in ("resource", "tool", "callee") if a in op.attrs), "")
    return " → ".join(filter(None, (on, _result_names(op)))) if on else _result_names(op)


def _result_names(op: Op) -> str:
    names = list(dict.fromkeys(_stem(v.name) for v in op.results))
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _stem(name: str) -> str:
    return name.split(".")[0]


def _reads(op: Op) -> list[str]:
    """Names of every value that an operation, or what is inside it, uses."""
    names = [v.name for v in op.operands]
    for region in op.regions:
        for inner in region.ops:
            names += _reads(inner)
        names += [v.name for v in region.yields]
    return names


def _used(ops: Iterable[Op]) -> set[str]:
    return {name for op in ops for name in _reads(op)}
