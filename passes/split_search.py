"""Run a search in pieces: plan, scan, finish. Other programs' searches get their turn between two pieces.

Before:
    workflow @w(%q: text) -> docs {
      %docs = search @pydocs (%q) {k = 4} : docs
      return %docs
    }
After:
    workflow @w(%q: text) -> docs {
      %plan = ivf.begin @pydocs (%q) {k = 4} : scan
      %scan = ivf.scan @pydocs (%plan) : scan
      %docs = ivf.finish @pydocs (%scan) : docs
      return %docs
    }

Source: Hu et al., "HedraRAG: Co-Optimizing Generation and Retrieval for Heterogeneous RAG Workflows", SOSP 2025,
section 4.1. A step of m seconds instead of one of t makes others wait m/2 instead of t/2, and costs t/m turns of beta
each: best at m = sqrt(2 * beta * t), which the runtime takes as its step. (The sum printed there adds the overhead
and so has no optimum.)
Legal when: always, but for a search that takes the answer of one begun ahead, or whose timeout is for the whole of
it. The three carry the effects and the group of the one.
Pays when: t / 2 - sqrt(2 * beta * t) > 0, that is t > 8 * beta.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import sqrt
from typing import ClassVar

from flowc.ir.core import Attrs, Graph, Names, Op, Value, names_in, walk
from flowc.ir.ops import OPS, keyword_operands
from flowc.ir.types import SCAN

from .core import Estimate, Match, Replacement, Rewrite, Verdict
from .cost import CostModel

_EVERYWHERE = frozenset({"resource", "reads", "writes", "raises", "group", "place"})
"""Attributes that all three pieces have."""


@dataclass(slots=True)
class _Search(Match):
    names: Names = field(default_factory=Names)


@dataclass(frozen=True, slots=True)
class SplitSearch(Rewrite[_Search]):
    name: ClassVar[str] = "split-search"
    on_trial: ClassVar[bool] = True

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Search]:
        found = [op for op in walk(graph.body) if op.name == "search"]
        names = Names(names_in(graph) if found else None)
        for op in found:
            yield _Search(op, names=names)

    def legal(self, match: _Search) -> Verdict:
        op, keywords = match.op, keyword_operands(match.op)
        if "ahead" in keywords:
            return Verdict(False, "it takes the answer of a search that is begun ahead as a whole")
        if "timeout" in op.attrs or "timeout" in keywords:
            return Verdict(False, "its timeout is for the whole of it")
        return Verdict(True, "every probed cluster is scanned, in whatever steps")

    def profit(self, match: _Search, costs: CostModel) -> Estimate:
        t, beta = costs.own_s(match.op), costs.of(match.op)["substage_s"]
        if t <= 8 * beta:
            return Estimate(0.0, f"it takes {t * 1e3:.3g} ms, and a step costs {beta * 1e3:.3g} ms")
        return Estimate(t / 2 - sqrt(2 * beta * t), "others wait less")

    def rewrite(self, match: _Search) -> Replacement:
        op, names = match.op, match.names
        plan, scan = Value(names.fresh("plan"), SCAN), Value(names.fresh("scan"), SCAN)
        shared = Attrs({n: a for n, a in op.attrs.items() if n in _EVERYWHERE})
        known = OPS["ivf.begin"].attrs
        begun = Attrs({n: a for n, a in op.attrs.items() if n in known or n in ("group", "place", "site")})
        return Replacement(
            (
                Op("ivf.begin", op.operands, (plan,), begun, loc=op.loc),
                Op("ivf.scan", (plan,), (scan,), shared, loc=op.loc),
                Op("ivf.finish", (scan,), op.results, shared, loc=op.loc),
            )
        )
