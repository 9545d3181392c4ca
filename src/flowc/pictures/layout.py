"""Places for a drawing: the layered method of Sugiyama, Tagawa and Toda, "Methods for Visual Understanding of
Hierarchical System Structures", 1981, one part at a time, inner boxes first.

Per part: ranks by longest path; edges over several ranks get a bend per rank; the order within a rank by barycentre
sweeps, the one with the fewest crossings kept; x by moving each rank towards its neighbours without overlap (isotonic
regression, which is exact for one rank at a time). A box is a node as large as what is inside it. Deterministic; a
plan of a hundred operations takes milliseconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from .model import Drawing, Edge, Item, Part

__all__ = ["Layout", "Place", "Route", "lay_out"]

# All sizes in CSS pixels.
NODE_H, PILL_H = 40.0, 24.0
MIN_W, MAX_W = 96.0, 230.0
TITLE_CHAR, SMALL_CHAR = 7.1, 6.1  # average advance of the two type sizes, on the generous side
GAP_X, GAP_Y, BEND_GAP = 22.0, 34.0, 14.0
PAD, HEADER, LABEL, INSET = 14.0, 30.0, 22.0, 10.0
SWEEPS = 12


@dataclass(frozen=True, slots=True)
class Place:
    """Where an item stands: left, top, width, height; absolute."""

    item: Item
    x: float
    y: float
    w: float
    h: float
    depth: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A labelled part of a box."""

    label: str
    x: float
    y: float
    w: float
    h: float


@dataclass(frozen=True, slots=True)
class Route:
    """An edge as an SVG path."""

    edge: Edge
    path: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Every place, frame and route of a drawing, outer before inner."""

    drawing: Drawing
    width: float
    height: float
    places: tuple[Place, ...]
    frames: tuple[Frame, ...]
    routes: tuple[Route, ...]


@dataclass(slots=True)
class _Laid:
    """A part with places relative to its own corner."""

    part: Part
    w: float
    h: float
    boxes: dict[str, _Box]
    corners: dict[str, tuple[float, float]]
    routes: list[tuple[Edge, list[tuple[float, float]]]]


@dataclass(slots=True)
class _Box:
    item: Item
    w: float
    h: float
    parts: list[tuple[_Laid, float, float]]  # with offsets in the box


def lay_out(drawing: Drawing) -> Layout:
    """Places for every item of a drawing, its corner at (0, 0)."""
    laid = _lay_part(drawing.root)
    places: list[Place] = []
    frames: list[Frame] = []
    routes: list[Route] = []

    def put(part: _Laid, x: float, y: float, depth: int) -> None:
        for edge, points in part.routes:
            routes.append(Route(edge, _curve([(px + x, py + y) for px, py in points])))
        for item in part.part.items:
            box = part.boxes[item.id]
            left, top = part.corners[item.id]
            places.append(Place(item, x + left, y + top, box.w, box.h, depth))
            for inner, dx, dy in box.parts:
                px, py = x + left + dx, y + top + dy
                if inner.part.label:
                    frames.append(
                        Frame(inner.part.label, px - INSET, py - LABEL, inner.w + 2 * INSET, inner.h + LABEL + INSET)
                    )
                put(inner, px, py, depth + 1)

    put(laid, PAD, PAD, 0)
    return Layout(drawing, laid.w + 2 * PAD, laid.h + 2 * PAD, tuple(places), tuple(frames), tuple(routes))


def _size(item: Item) -> _Box:
    """The item's box; its parts side by side."""
    if item.kind in ("param", "result"):
        text = max(len(item.title) * TITLE_CHAR + len(item.subtitle) * SMALL_CHAR + 34, 60.0)
        return _Box(item, min(text, MAX_W), PILL_H, [])
    badge = 30 if item.wave is not None else 0
    wide = max(len(item.title) * TITLE_CHAR + badge, len(item.subtitle) * SMALL_CHAR) + 30
    if not item.parts:
        return _Box(item, min(max(wide, MIN_W), MAX_W), NODE_H, [])
    x = PAD
    tallest = 0.0
    parts = []
    inset = INSET if any(p.label for p in item.parts) else 0.0  # room between a frame and what is in it
    top = HEADER + (LABEL if inset else 0.0)
    for part in item.parts:
        laid = _lay_part(part)
        laid.w = max(laid.w, len(part.label) * SMALL_CHAR + 8)
        parts.append((laid, x + inset, top))
        x += laid.w + 2 * inset + PAD
        tallest = max(tallest, laid.h)
    for laid, _, _ in parts:
        laid.h = tallest
    tallest += inset
    title = (len(item.title) * TITLE_CHAR) + (len(item.subtitle) * SMALL_CHAR) + 44 + badge
    if title > x:  # a long header: the parts stand in its middle
        parts = [(laid, dx + (title - x) / 2, dy) for laid, dx, dy in parts]
    return _Box(item, max(x, title), top + tallest + PAD, parts)


def _lay_part(part: Part) -> _Laid:
    boxes = {item.id: _size(item) for item in part.items}
    if not boxes:
        return _Laid(part, 60.0, 16.0, {}, {}, [])
    ranks = _ranks(part)
    nodes, chains, neighbours = _with_bends(part, ranks)
    layers = _order_layers(nodes, neighbours)
    width = {name: boxes[name].w if name in boxes else 2.0 for layer in layers for name in layer}
    x = _coordinates(layers, neighbours, width, set(boxes))
    left = min(x[name] - width[name] / 2 for layer in layers for name in layer)
    right = max(x[name] + width[name] / 2 for layer in layers for name in layer)
    tops: list[float] = []
    y = 0.0
    heights = [max((boxes[n].h for n in layer if n in boxes), default=0.0) for layer in layers]
    for i, height in enumerate(heights):
        tops.append(y)
        fan = max((len(neighbours[n][1]) for n in layers[i]), default=0)
        y += height + GAP_Y + min(4.0 * max(fan - 3, 0), 40.0)
    rank_of = {name: i for i, layer in enumerate(layers) for name in layer}
    corners = {name: (x[name] - width[name] / 2 - left, tops[rank_of[name]]) for name in boxes}
    ports_out, ports_in = _ports(part, chains, x, boxes)
    routes = []
    for edge in part.edges:
        points = [(ports_out[edge] - left, corners[edge.src][1] + boxes[edge.src].h)]
        for bend in chains[edge]:
            at = tops[rank_of[bend]]
            points += [(x[bend] - left, at), (x[bend] - left, at + heights[rank_of[bend]])]
        points.append((ports_in[edge] - left, corners[edge.dst][1]))
        routes.append((edge, points))
    return _Laid(part, right - left, tops[-1] + heights[-1], boxes, corners, routes)


def _ranks(part: Part) -> dict[str, int]:
    """Longest path from the top; then items without a predecessor sink to just above what uses them (parameters
    excepted).
    """
    above: dict[str, list[str]] = {}
    below: dict[str, list[str]] = {}
    for e in part.edges:
        above.setdefault(e.dst, []).append(e.src)
        below.setdefault(e.src, []).append(e.dst)
    ranks: dict[str, int] = {}
    for item in part.items:  # program order is a topological order
        floor = 0 if item.kind == "param" or not any(i.kind == "param" for i in part.items) else 1
        ranks[item.id] = max((ranks[a] + 1 for a in above.get(item.id, ())), default=floor)
    for item in reversed(part.items):
        if item.kind == "param" or item.id in above or item.id not in below:
            continue
        ranks[item.id] = max(min(ranks[b] for b in below[item.id]) - 1, 0)
    return ranks


Neighbours = dict[str, tuple[list[str], list[str]]]  # name -> (above, below)


def _with_bends(part: Part, ranks: dict[str, int]) -> tuple[list[list[str]], dict[Edge, list[str]], Neighbours]:
    """The layers with a bend for each rank that an edge passes, and what is joined to what."""
    layers: list[list[str]] = [[] for _ in range(max(ranks.values()) + 1)]
    neighbours: Neighbours = {}
    for item in part.items:
        layers[ranks[item.id]].append(item.id)
        neighbours[item.id] = ([], [])
    chains: dict[Edge, list[str]] = {}
    shared: dict[tuple[str, int], str] = {}  # edges from one item share their bends: one trunk instead of many lines
    for edge in part.edges:
        at = edge.src
        chain = []
        for rank in range(ranks[edge.src] + 1, ranks[edge.dst]):
            bend = shared.get((edge.src + edge.kind, rank))
            if bend is None:
                bend = shared[edge.src + edge.kind, rank] = f"{edge.src}|{edge.kind}|{rank}"
                layers[rank].append(bend)
                neighbours[bend] = ([], [])
                neighbours[at][1].append(bend)
                neighbours[bend][0].append(at)
            chain.append(bend)
            at = bend
        neighbours[at][1].append(edge.dst)
        neighbours[edge.dst][0].append(at)
        chains[edge] = chain
    return [layer for layer in layers if layer], chains, neighbours


def _order_layers(layers: list[list[str]], neighbours: Neighbours) -> list[list[str]]:
    """The order in each layer by barycentre sweeps down and up; of all met, the one with the fewest crossings."""
    best = [list(layer) for layer in layers]
    fewest = _crossings(best, neighbours)
    now = [list(layer) for layer in layers]
    # A sweep costs n log n; on very large parts fewer of them.
    total = sum(map(len, layers))
    for sweep in range(SWEEPS if total < 2000 else 3):
        if not fewest:
            break
        down = sweep % 2 == 0
        side = 0 if down else 1
        span = range(1, len(now)) if down else range(len(now) - 2, -1, -1)
        for i in span:
            fixed = {name: k for k, name in enumerate(now[i - 1 if down else i + 1])}
            mean: dict[str, float] = {}
            for k, name in enumerate(now[i]):
                places = [fixed[n] for n in neighbours[name][side] if n in fixed]
                mean[name] = sum(places) / len(places) if places else float(k)
            now[i].sort(key=mean.__getitem__)
        crossings = _crossings(now, neighbours)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in now], crossings
    return best


def _crossings(layers: Sequence[Sequence[str]], neighbours: Neighbours) -> int:
    """Crossings between neighbouring layers, counted as inversions by insertion into a sorted list."""
    total = 0
    for upper, lower in pairwise(layers):
        place = {name: k for k, name in enumerate(lower)}
        seen: list[int] = []
        for name in upper:
            ends = sorted(place[n] for n in neighbours[name][1])
            for end in ends:
                total += len(seen) - bisect_right(seen, end)
            for end in ends:
                seen.insert(bisect_right(seen, end), end)
    return total


def _coordinates(
    layers: Sequence[Sequence[str]], neighbours: Neighbours, width: dict[str, float], real: set[str]
) -> dict[str, float]:
    """Centres: each layer in turn goes as near to its neighbours' mean as the order and the gaps allow."""
    x: dict[str, float] = {}
    for layer in layers:
        at = 0.0
        for name in layer:
            x[name] = at + width[name] / 2
            at += width[name] + GAP_X
        for name in layer:
            x[name] -= (at - GAP_X) / 2
    rounds = 20 if sum(map(len, layers)) < 2000 else 4
    for turn in range(rounds):
        span = range(len(layers)) if turn % 2 == 0 else range(len(layers) - 1, -1, -1)
        for i in span:
            layer = layers[i]
            wishes, weights = [], []
            for name in layer:
                above, below = neighbours[name]
                near = (above if turn % 2 == 0 else below) or (below if turn % 2 == 0 else above)
                if turn >= rounds - 4:
                    near = [*above, *below]
                pull = [
                    8.0 if name not in real and n not in real else 1.0 for n in near
                ]  # long edges should be straight
                wishes.append(sum(w * x[n] for w, n in zip(pull, near, strict=True)) / sum(pull) if near else x[name])
                weights.append(sum(pull) if near else 0.01)
            x.update(zip(layer, _spread(layer, wishes, weights, width, real), strict=True))
    _straighten(layers, neighbours, width, real, x)
    return x


def _straighten(
    layers: Sequence[Sequence[str]],
    neighbours: Neighbours,
    width: dict[str, float],
    real: set[str],
    x: dict[str, float],
) -> None:
    """Puts runs of bends, and chains of items that lead only to each other, on one vertical where there is room for it.

    After the linear segments of Sander, "A Fast Heuristic for Hierarchical Manhattan Layout", 1995.
    """
    at = {name: (i, k) for i, layer in enumerate(layers) for k, name in enumerate(layer)}

    def room(name: str) -> tuple[float, float]:
        i, k = at[name]
        lo, hi = -math.inf, math.inf
        if k:
            other = layers[i][k - 1]
            lo = x[other] + (width[other] + width[name]) / 2 + (GAP_X if {other, name} <= real else BEND_GAP)
        if k + 1 < len(layers[i]):
            other = layers[i][k + 1]
            hi = x[other] - (width[other] + width[name]) / 2 - (GAP_X if {other, name} <= real else BEND_GAP)
        return lo, hi

    def follows(name: str) -> str | None:
        below = neighbours[name][1]
        if name not in real:  # a trunk goes on downwards even where branches leave it
            return next(
                (n for n in below if n not in real),
                below[0] if len(below) == 1 and len(neighbours[below[0]][0]) == 1 else None,
            )
        if len(below) == 1 and len(neighbours[below[0]][0]) == 1:
            return below[0]
        return None

    for _ in range(2):
        done: set[str] = set()
        for layer in layers:
            for first in layer:
                if first in done:
                    continue
                run = [first]
                lo, hi = room(first)
                while (below := follows(run[-1])) is not None:
                    low, high = room(below)
                    if max(lo, low) > min(hi, high):
                        break
                    lo, hi = max(lo, low), min(hi, high)
                    run.append(below)
                done.update(run)
                if len(run) > 1:
                    middle = sum(x[n] for n in run) / len(run)
                    for name in run:
                        x[name] = min(max(middle, lo), hi)


def _spread(
    layer: Sequence[str], wishes: Sequence[float], weights: Sequence[float], width: dict[str, float], real: set[str]
) -> list[float]:
    """The places nearest to the wishes (weighted squares) that keep order and gaps: pool adjacent violators."""
    offsets = [0.0]
    for a, b in pairwise(layer):
        gap = GAP_X if a in real and b in real else BEND_GAP
        offsets.append(offsets[-1] + (width[a] + width[b]) / 2 + gap)
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for wish, weight, offset in zip(wishes, weights, offsets, strict=True):
        mean, total, count = wish - offset, weight, 1
        while blocks and blocks[-1][0] > mean:
            m, w, c = blocks.pop()
            mean, total, count = (m * w + mean * total) / (w + total), w + total, c + count
        blocks.append((mean, total, count))
    flat = [mean for mean, _, count in blocks for _ in range(count)]
    return [value + offset for value, offset in zip(flat, offsets, strict=True)]


def _ports(
    part: Part, chains: dict[Edge, list[str]], x: dict[str, float], boxes: dict[str, _Box]
) -> tuple[dict[Edge, float], dict[Edge, float]]:
    """Where on the lower and upper side edges leave and arrive: spread out in the order of their other ends."""
    out: dict[str, list[tuple[float, Edge]]] = {}
    into: dict[str, list[tuple[float, Edge]]] = {}
    for e in part.edges:
        chain = chains[e]
        out.setdefault(e.src, []).append((x[chain[0]] if chain else x[e.dst], e))
        into.setdefault(e.dst, []).append((x[chain[-1]] if chain else x[e.src], e))

    def spread(ends: dict[str, list[tuple[float, Edge]]]) -> dict[Edge, float]:
        ports = {}
        for name, edges in ends.items():
            places = sorted({round(other, 1) for other, _ in edges})  # lines to one place leave from one port
            room = min(boxes[name].w * 0.6, 16.0 * (len(places) - 1))
            for other, edge in edges:
                k = places.index(round(other, 1))
                ports[edge] = x[name] + (room * (k / (len(places) - 1) - 0.5) if len(places) > 1 else 0.0)
        return ports

    return spread(out), spread(into)


def _curve(points: Sequence[tuple[float, float]]) -> str:
    """An SVG path through points that come as (leave, arrive) pairs of ranks: vertical through a rank, curved between
    two.
    """
    pieces = [f"M{_n(points[0][0])} {_n(points[0][1])}"]
    for (x0, y0), (x1, y1) in pairwise(points):
        if abs(x0 - x1) < 0.5:
            pieces.append(f"L{_n(x1)} {_n(y1)}")
        else:
            bow = max((y1 - y0) * 0.5, 10.0)
            pieces.append(f"C{_n(x0)} {_n(y0 + bow)} {_n(x1)} {_n(y1 - bow)} {_n(x1)} {_n(y1)}")
    return "".join(pieces)


def _n(value: float) -> str:
    """A number as short as it can be at a tenth of a pixel."""
    assert math.isfinite(value)
    return f"{value:.1f}".removesuffix(".0")
