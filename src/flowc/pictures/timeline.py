"""A predicted timeline: when each operation would run if every lane were free and costs were what the cost model says.

It is a picture, not a promise. Assumed: as many items and turns of loops as the passes assume, the slower branch of
every `if`, no error. Under these the captured program and the compiled one are comparable, bar by bar.
"""

from __future__ import annotations

from dataclasses import dataclass

from flowc.ir.core import Graph, Op, Region
from flowc.ir.effects import order_edges
from flowc.ir.ops import OPS, Rates
from flowc.passes.cost import CostModel

from .model import item_ids

__all__ = ["Bar", "Timeline", "predict"]

_MOST_BARS = 600  # nested loops multiply; beyond this one item stands for all


@dataclass(frozen=True, slots=True)
class Bar:
    """One operation at one time; `item` is its id in the drawing."""

    item: str
    title: str
    lane: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The bars in order of their start, and when the last one ends."""

    bars: tuple[Bar, ...]
    makespan_s: float


def predict(graph: Graph, *, prefix: str = "n", rates: Rates | None = None) -> Timeline:
    """The timeline of a workflow under a cost model's rates (default: `PASS_RATES`)."""
    costs = CostModel(rates or {})
    items, turns = max(round(costs["foreach_items"]), 1), max(round(costs["while_trips"]), 1)
    ids = item_ids(graph.body, prefix)
    bars: list[Bar] = []

    def region(body: Region, start: float) -> float:
        ready: dict[str, float] = {}
        ends: list[float] = []
        for op, waits in zip(body.ops, order_edges(body), strict=True):
            begin = max((ends[i] for i in waits), default=start)
            begin = max([begin, *(ready[n] for n in _inputs(op) if n in ready)])
            end = run(op, begin)
            ends.append(end)
            ready.update((v.name, end) for v in op.results)
        return max(ends, default=start)

    def run(op: Op, start: float) -> float:
        match op.name:
            case "if":
                # Both are tried to know the slower; only its bars stay.
                kept, latest, before = [], start, len(bars)
                for branch in op.regions:
                    end = region(branch, start)
                    drawn = bars[before:]
                    del bars[before:]
                    if end > latest:
                        kept, latest = drawn, end
                bars.extend(kept)
                return latest
            case "while":
                limit = op.attr("limit", turns)
                for _ in range(min(turns, limit) if len(bars) < _MOST_BARS else 1):
                    start = region(op.regions[1], region(op.regions[0], start))
                return start
            case "foreach":
                end = start
                for _ in range(items if len(bars) < _MOST_BARS else 1):
                    end = max(end, region(op.regions[0], start))
                    if not op.attr("parallel"):
                        start = end
                return end
            case "try" | "fused":
                return region(op.regions[0], start)
            case _:
                end = start + costs.own_s(op)
                spec = OPS.get(op.name)
                if end > start:
                    bars.append(Bar(ids[id(op)], op.name, spec.lane if spec else "python", start, end))
                return end

    makespan = region(graph.body, 0.0)
    return Timeline(tuple(sorted(bars, key=lambda b: (b.start_s, b.end_s))), makespan)


def _inputs(op: Op) -> list[str]:
    names = [v.name for v in op.operands]
    for inner in op.regions:
        for o in inner.ops:
            names += _inputs(o)
        names += [v.name for v in inner.yields]
    return names
