"""Graphviz' DOT, with a cluster for each region.

Labels hold operation, resource and variable names in a restricted alphabet and nothing else: Graphviz has crashed on
hostile labels however they were quoted, so no text of a prompt may reach it.
"""

from __future__ import annotations

import re

from flowc.ir.core import Graph

from .model import Edge, Item, Part, draw

__all__ = ["FILL", "label", "to_dot"]

FILL = {
    "llm": "#e4dfff",
    "search": "#d3f3ee",
    "embed": "#d9ecfb",
    "rerank": "#f8ebc8",
    "io": "#fbdfd5",
    "python": "#eef0f4",
}
"""Lane -> fill colour, on white."""


def label(text: str) -> str:
    """The text in the alphabet that a label may have, at most 60 characters."""
    return re.sub(r"[^A-Za-z0-9 _.,:;()+#%=-]", "_", text.replace(" → ", " = "))[:60] or "_"


def to_dot(graph: Graph) -> str:
    """The workflow as DOT. An edge to or from a box joins the box itself (`lhead`, `ltail`)."""
    drawing = draw(graph)
    out = [
        f'digraph "{label(graph.name)}" {{',
        "  graph [compound=true, rankdir=TB, nodesep=0.25, ranksep=0.4, fontname=Helvetica, fontsize=11];",
        '  node [shape=box, style="rounded,filled", fontname=Helvetica, fontsize=11, height=0.4, color="#98a2b3"];',
        '  edge [color="#98a2b3", arrowsize=0.6];',
    ]
    _part(drawing.root, out, "  ")
    return "\n".join([*out, "}", ""])


def _part(part: Part, out: list[str], pad: str) -> None:
    by_id = {item.id: item for item in part.items}
    for item in part.items:
        if item.kind == "box":
            out.append(f'{pad}subgraph "cluster_{item.id}" {{')
            out.append(f'{pad}  graph [label="{_label(item)}", style=rounded, color="#c3cad6"];')
            for i, inner in enumerate(item.parts):
                if inner.label:
                    out.append(f'{pad}  subgraph "cluster_{item.id}_{i}" {{')
                    out.append(
                        f'{pad}    graph [label="{label(inner.label)}", style="rounded,dashed", color="#c3cad6"];'
                    )
                    _part(inner, out, pad + "    ")
                    out.append(f"{pad}  }}")
                else:
                    _part(inner, out, pad + "  ")
            if not any(inner.items for inner in item.parts):
                out.append(f'{pad}  "{item.id}" [label="", shape=point];')
            out.append(f"{pad}}}")
        else:
            shape = "" if item.kind == "op" else ', shape=plaintext, style=""'
            fill = f', fillcolor="{FILL.get(item.lane, FILL["python"])}"' if item.kind == "op" else ""
            out.append(f'{pad}"{item.id}" [id="op-{item.id}", label="{_label(item)}"{fill}{shape}];')
    out += [f"{pad}{_edge(edge, by_id)};" for edge in part.edges]


def _label(item: Item) -> str:
    wave = f" ({item.wave})" if item.wave is not None else ""
    return label(f"{item.title}{wave}: {item.subtitle}" if item.subtitle else f"{item.title}{wave}")


def _edge(edge: Edge, items: dict[str, Item]) -> str:
    src, dst = items[edge.src], items[edge.dst]
    options = []
    if src.kind == "box":
        options.append(f'ltail="cluster_{src.id}"')
    if dst.kind == "box":
        options.append(f'lhead="cluster_{dst.id}"')
    if edge.kind == "order":
        options.append('style=dotted, color="#b6bdc9"')
    tail = f" [{', '.join(options)}]" if options else ""
    return f'"{_leaf(src, last=True)}" -> "{_leaf(dst, last=False)}"{tail}'


def _leaf(item: Item, *, last: bool) -> str:
    """A node inside the item that stands for it: DOT has no edges to clusters."""
    if item.kind != "box":
        return item.id
    for part in reversed(item.parts) if last else item.parts:
        if part.items:
            return _leaf(part.items[-1 if last else 0], last=last)
    return item.id
