"""Probe first the clusters in which an earlier search of the request has found something.

Before:
    workflow @w(%q: text) -> docs {
      %a = ivf.begin @pydocs (%q) {k = 4} : scan
      %b = ivf.scan @pydocs (%a) : scan
      %first = ivf.finish @pydocs (%b) : docs
      %query = template "{}{}" (%q, %first) : text
      %c = ivf.begin @pydocs (%query) {k = 4} : scan
      %guess = ivf.partial @pydocs (%c) {confidence = 0.9} : docs
      return %guess
    }
After:
    workflow @w(%q: text) -> docs {
      %a = ivf.begin @pydocs (%q) {k = 4} : scan
      %b = ivf.scan @pydocs (%a) : scan
      %first = ivf.finish @pydocs (%b) : docs
      %query = template "{}{}" (%q, %first) : text
      %c = ivf.begin @pydocs (%query, near=%first) {k = 4} : scan
      %guess = ivf.partial @pydocs (%c) {confidence = 0.9} : docs
      return %guess
    }

Source: Hu et al., "HedraRAG", SOSP 2025, section 4.3: a third to three quarters of a request's next hits lie where the
last ones did.
Legal when: every probed cluster is scanned whatever the order, so a search that may stop early keeps its own; the
earlier search is over before this one can begin, so that nothing waits for it.
Pays when: somebody looks at what the search has found on the way. Its end comes no sooner in another order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

from flowc.ir.core import Graph, Region, Value
from flowc.ir.ops import keyword_operands
from flowc.ir.types import DOCS

from .core import Estimate, Match, Replacement, Rewrite, Verdict, with_operand
from .cost import CostModel
from .facts import Facts

_Known = Mapping[str, tuple[int, Value]]
"""Index -> the last search of it that is over, and its number in program order."""


@dataclass(slots=True, kw_only=True)
class _Search(Match):
    near: Value
    is_watched: bool


@dataclass(frozen=True, slots=True)
class ReorderClusters(Rewrite[_Search]):
    name: ClassVar[str] = "reorder-clusters"
    on_trial: ClassVar[bool] = True

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Search]:
        yield from _sites(graph.body, {}, Facts(graph, costs), count())

    def legal(self, match: _Search) -> Verdict:
        if "stop" in match.op.attrs or "stop" in keyword_operands(match.op):
            return Verdict(False, "it may stop early, and finds something else in another order")
        return Verdict(True, f"all probed clusters are scanned, and {match.near} is there in any case")

    def profit(self, match: _Search, costs: CostModel) -> Estimate:
        if not match.is_watched:
            return Estimate(0.0, "nobody looks at what it finds on the way")
        rates = costs.of(match.op)
        return Estimate(rates["settles"] * rates["search_s"], "settles sooner")

    def rewrite(self, match: _Search) -> Replacement:
        return Replacement((with_operand(match.op, "near", match.near),))


def _sites(region: Region, known: _Known, facts: Facts, numbers: Iterator[int]) -> Iterator[_Search]:
    """The searches of the region, and all in it, before which another one of the same index is over."""
    if not any(op.regions or op.name in ("search", "ivf.begin") for op in region.ops):
        return
    over: list[_Known] = []  # for each op what is over once it has ended
    for op, data, order in zip(region.ops, facts.data_dependencies(region), facts.order(region), strict=True):
        before = dict(known)
        for d in data.union(order):
            for index, last in over[d].items():
                if index not in before or last[0] > before[index][0]:
                    before[index] = last
        found = before.get(str(op.attrs.get("resource")))
        if op.name in ("search", "ivf.begin") and found is not None and "near" not in keyword_operands(op):
            is_watched = any(user is not None and user.name == "ivf.partial" for user, _ in facts.readers(op.result))
            yield _Search(op, near=found[1], is_watched=is_watched)
        for inner in op.regions:
            yield from _sites(inner, before, facts, numbers)
        if op.name in ("search", "ivf.finish") and op.result.type == DOCS:
            before[str(op.attrs["resource"])] = (next(numbers), op.result)
        over.append(before)
