"""A workflow as a networkx graph, for graph algorithms and pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .core import Graph, Region
from .effects import order_edges
from .ops import OPS
from .printer import print_op

if TYPE_CHECKING:
    import networkx as nx

    View = nx.DiGraph[str]
else:
    View = Any


def to_networkx(graph: Graph) -> View:
    """A DiGraph of the workflow's operations and parameters; called workflows are no part of it.

    An operation's node is its path: its position in the body, then for each region around it the region's name and the
    position in there: `2.body.0`. A parameter's node is the path of its region and its name: `2.body.%item`.

    Node attributes: `kind` ("op" or "param"), `region` (path of the region around it, "" for the body), `parent` (node
    of the op that holds that region, or None), `name` (of the operation or value), `values` (names of what it defines),
    and for operations `position`, `lane`, `level` of nesting, `text` (one line of IR), `loc`, `op` (the Op itself).

    Edge attribute `kind`: "data" (from where a value is defined to the op that takes it, in whatever region; `values`
    are the names that go along), "order" (effects keep the two in program order), "yield" (a value leaves its region
    and goes to the op that holds it). The graph is acyclic: a loop's way back is its "yield".
    """
    import networkx as nx

    view: View = nx.DiGraph(name=graph.name)
    maker: dict[str, str] = {}

    def connect(source: str, target: str, kind: str, value: str | None = None) -> None:
        if view.has_edge(source, target):  # data says more than order; one edge holds all values
            edge = view.edges[source, target]
            if value is not None and value not in edge["values"]:
                edge["values"] += (value,)
            if kind == "data":
                edge["kind"] = kind
        else:
            view.add_edge(source, target, kind=kind, values=(value,) if value is not None else ())

    def visit(region: Region, path: str, parent: str | None, level: int) -> None:
        prefix = f"{path}." if path else ""
        for p in region.params:
            node = maker[p.name] = f"{prefix}%{p.name}"
            view.add_node(node, kind="param", region=path, parent=parent, name=p.name, values=(p.name,))
        nodes = [f"{prefix}{i}" for i in range(len(region.ops))]
        for i, (node, op) in enumerate(zip(nodes, region.ops, strict=True)):
            spec = OPS[op.name]
            names = tuple(v.name for v in op.results)
            view.add_node(
                node,
                kind="op",
                region=path,
                parent=parent,
                name=op.name,
                values=names,
                position=i,
                lane=spec.lane,
                level=level,
                text=print_op(op),
                loc=op.loc,
                op=op,
            )
            for v in op.operands:
                connect(maker[v.name], node, "data", v.name)
            labels = list(spec.regions)
            if labels and labels[-1] == "*handlers":
                labels[-1:] = [f"except{j}" for j in range(len(op.regions) - len(labels) + 1)]
            for label, inner in zip(labels, op.regions, strict=True):
                visit(inner, f"{node}.{label}", node, level + 1)
            for name in names:
                maker[name] = node
        for node, waits in zip(nodes, order_edges(region), strict=True):
            for position in waits:
                connect(nodes[position], node, "order")
        if parent is not None:
            for v in region.yields:
                connect(maker[v.name], parent, "yield", v.name)

    visit(graph.body, "", None, 0)
    return view


__all__ = ["to_networkx"]
