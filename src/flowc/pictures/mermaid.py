"""Mermaid text, for a README or a pull request. Viewers stop at 500 edges, so a larger workflow is drawn with its
boxes closed.
"""

from __future__ import annotations

from flowc.ir.core import Graph
from flowc.ir.errors import CompileError

from .dot import FILL, label
from .model import Drawing, Item, Part, draw

__all__ = ["MOST_EDGES", "to_mermaid"]

MOST_EDGES = 500


def to_mermaid(graph: Graph) -> str:
    """The workflow as a Mermaid flowchart of at most 500 edges; CompileError if even the closed view has more."""
    drawing = draw(graph)
    if sum(1 for _ in drawing.edges()) > MOST_EDGES:
        drawing = draw(graph, most_items=0)
    edges = sum(1 for _ in drawing.edges())
    if edges > MOST_EDGES:
        raise CompileError(
            f"workflow `{graph.name}` has {edges} edges, and Mermaid's viewers draw at most {MOST_EDGES}",
            hint="emit `svg` or `html`, which have no such limit",
        )
    return _write(drawing)


def _write(drawing: Drawing) -> str:
    out = ["flowchart TD"]
    _part(drawing.root, out, "  ")
    for lane in drawing.lanes:
        ids = ",".join(i.id for i in drawing.items() if i.kind == "op" and i.lane == lane)
        if ids and lane in FILL:
            out += [f"  classDef {lane} fill:{FILL[lane]},stroke:#98a2b3,color:#1d2433", f"  class {ids} {lane}"]
    return "\n".join(out) + "\n"


def _part(part: Part, out: list[str], pad: str) -> None:
    for item in part.items:
        text = _text(item)
        if item.kind == "box":
            out.append(f'{pad}subgraph {item.id}["{text}"]')
            for i, inner in enumerate(item.parts):
                if inner.label:
                    out.append(f'{pad}  subgraph {item.id}-{i}["{label(inner.label)}"]')
                    _part(inner, out, pad + "    ")
                    out.append(f"{pad}  end")
                else:
                    _part(inner, out, pad + "  ")
            out.append(f"{pad}end")
        else:
            left, right = ("[", "]") if item.kind == "op" else ("([", "])")
            out.append(f'{pad}{item.id}{left}"{text}"{right}')
    out += [f"{pad}{e.src} {'-.->' if e.kind == 'order' else '-->'} {e.dst}" for e in part.edges]


def _text(item: Item) -> str:
    # `#` starts an entity and `;` ends one; a leading number and a dot would become a list.
    text = f"{item.title}: {item.subtitle}" if item.subtitle else item.title
    return label(text).replace("#", "_").replace(";", ",")
