"""A workflow as a networkx graph."""

import networkx as nx
from hypothesis import given, settings

from flowc.ir import to_networkx
from flowc.ir.analyses import dependencies
from flowc.ir.core import Graph, walk, walk_regions
from flowc.ir.parser import parse_graph
from tests.strategies import graphs

TEXT = """
workflow @w(%q: text, %a: list<text>) -> docs loc("w.py":1) {
  %x = py "f()" {writes = ("py",)} : any                                        loc(2)
  %y = foreach (%a) {collects = 1} : list<docs> body (%i: text) {
    %d = search @i (%i) : docs
    %l = py "[d, x]" (%d, %x) {writes = ("py",)} : list<docs>
    yield %l
  }
  try body {
  } except "KeyError" (%e: any) {
  } except (%f: any) {
    %g = py "print(f)" (%f) {writes = ("py",)} : any
  }
  %z = search @i (%q) : docs
  return %z
}
"""


def test_nodes_and_edges() -> None:
    view = to_networkx(parse_graph(TEXT))
    assert view.graph["name"] == "w"
    loop, handlers = ["1", "1.body.%i", "1.body.0", "1.body.1"], ["2.except0.%e", "2.except1.%f", "2.except1.0"]
    assert list(view.nodes) == ["%q", "%a", "0", *loop, "2", *handlers, "3"]
    assert {(a, b, d["kind"], d["values"]) for a, b, d in view.edges(data=True)} == {
        ("%a", "1", "data", ("a",)),
        ("%q", "3", "data", ("q",)),
        ("0", "1.body.1", "data", ("x",)),
        ("1.body.%i", "1.body.0", "data", ("i",)),
        ("1.body.0", "1.body.1", "data", ("d",)),
        ("1.body.1", "1", "yield", ("l",)),
        ("2.except1.%f", "2.except1.0", "data", ("f",)),
        ("0", "1", "order", ()),  # both write
        ("1", "2", "order", ()),
    }
    inner = view.nodes["1.body.0"]
    assert (inner["kind"], inner["name"], inner["region"], inner["parent"]) == ("op", "search", "1.body", "1")
    assert (inner["lane"], inner["level"], inner["position"]) == ("search", 1, 0)
    assert inner["text"] == "%d = search @i (%i) : docs"
    assert view.nodes["0"]["loc"].line == 2
    assert view.nodes["1.body.%i"] == {
        "kind": "param",
        "region": "1.body",
        "parent": "1",
        "name": "i",
        "values": ("i",),
    }


@given(graphs())
@settings(max_examples=100)
def test_random_graphs(graph: Graph) -> None:
    view = to_networkx(graph)
    assert nx.is_directed_acyclic_graph(view)
    ops = list(walk(graph.body))
    params = [p for region in walk_regions(graph.body) for p in region.params]
    assert [d["op"] for _, d in view.nodes(data=True) if d["kind"] == "op"] == ops  # in program order
    assert len(view) == len(ops) + len(params)
    uses = {(v.name, id(op)) for op in ops for v in op.operands}
    yields = {(v.name, id(op)) for op in ops for r in op.regions for v in r.yields}
    edges = {(v, id(view.nodes[b]["op"]), d["kind"]) for _, b, d in view.edges(data=True) for v in d["values"]}
    assert {(v, b) for v, b, _ in edges} == uses | yields
    assert {(v, b) for v, b, kind in edges if kind == "data"} >= uses
    for i, waits in enumerate(dependencies(graph.body)):
        above = nx.ancestors(view, str(i))
        assert all(str(d) in above or any(n.startswith(f"{i}.") for n in nx.descendants(view, str(d))) for d in waits)
