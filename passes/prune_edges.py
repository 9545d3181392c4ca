"""Drop the order that no data and no effect needs: independent operations overlap, items of a loop run at once.

Before:
    workflow @w(%q: text, %xs: list<text>) -> text seq {
      %docs = search @pydocs (%q) {k = 4} : docs
      %hypo = generate @llm (%q) {max_tokens = 64} : text
      %more = search @pydocs (%hypo) {k = 4} : docs
      %notes = foreach (%xs) {collects = 1} : list<docs> body (%x: text) seq {
        %found = search @pydocs (%x) {k = 2} : docs
        %item = py "[found]" (%found) : list<docs>
        yield %item
      }
      %prompt = template "{}{}{}" (%docs, %more, %notes) : text
      return %prompt
    }
After:
    workflow @w(%q: text, %xs: list<text>) -> text {
      %docs = search @pydocs (%q) {k = 4} : docs
      %hypo = generate @llm (%q) {max_tokens = 64} : text
      %more = search @pydocs (%hypo) {k = 4} : docs
      %notes = foreach (%xs) {collects = 1, parallel = true} : list<docs> body (%x: text) seq {
        %found = search @pydocs (%x) {k = 2} : docs
        %item = py "[found]" (%found) : list<docs>
        yield %item
      }
      %prompt = template "{}{}{}" (%docs, %more, %notes) : text
      return %prompt
    }

Source: Tan et al., "Towards End-to-End Optimization of LLM-based Applications with Ayo", ASPLOS 2025, dependency
pruning; there by name and without a check, here the order that remains is derived from effects (`flowc.ir.effects`).
Legal when: a region always: what its operations read, write and may raise still orders them. A loop when no item
hands a value to the next, none ends it early, and its body writes nothing.
Pays when: the predicted makespan is shorter: something runs while something else waits. A chain stays a chain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flowc.ir.core import Graph, Op, Region
from flowc.ir.errors import Loc

from .core import Estimate, Outcome, Pass, Remark, Verdict, describe, listed, plural
from .cost import CostModel
from .facts import Facts


@dataclass(frozen=True, slots=True)
class PruneEdges(Pass):
    name: ClassVar[str] = "prune-edges"
    min_gain_s: float = 0.0  # a region that saves no more than this stays ordered

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        remarks: list[Remark] = []

        def on_region(region: Region, where: str, loc: Loc | None) -> Region:
            ops = []
            for op in region.ops:
                if op.regions and op.name != "fused":
                    inner = tuple(on_region(r, f"inside {describe(op)}", op.loc) for r in op.regions)
                    if any(a is not b for a, b in zip(inner, op.regions, strict=True)):
                        op = replace(op, regions=inner)
                    if op.name == "foreach" and not op.attrs.get("parallel"):
                        op = on_loop(op)
                ops.append(op)
            if any(a is not b for a, b in zip(ops, region.ops, strict=True)):
                region = replace(region, ops=tuple(ops))
            if not region.ordered or len(ops) < 2:
                return region
            dropped, estimate = self.profit_of_region(region, facts)
            fired = estimate.gain_s > self.min_gain_s
            detail = f"{dropped} of {plural(len(ops) - 1, 'order edge')} dropped" if fired else estimate.why
            verdict = Verdict(True, "effects and data keep the order that matters")
            remarks.append(self.remark(where, loc, verdict, fired=fired, gain_s=estimate.gain_s, detail=detail))
            return replace(region, ordered=False) if fired else region

        def on_loop(op: Op) -> Op:
            verdict = self.legal_loop(op, facts)
            estimate = self.profit_of_loop(op, facts) if verdict.is_legal else Estimate(0.0)
            fired = verdict.is_legal and estimate.gain_s > self.min_gain_s
            detail = "all items run at once" if fired else estimate.why
            remarks.append(
                self.remark(describe(op), op.loc, verdict, fired=fired, gain_s=estimate.gain_s, detail=detail)
            )
            return op.with_attrs(parallel=True) if fired else op

        body = on_region(graph.body, "the workflow", graph.loc)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))

    def legal_loop(self, op: Op, facts: Facts) -> Verdict:
        """May the items of this loop run at once?"""
        if len(op.operands) > 1:
            carried = op.results[: len(op.operands) - 1]
            return Verdict(False, f"each item needs {listed(v.name for v in carried)} from the one before it")
        if op.attrs.get("breaks"):
            return Verdict(False, "an item may end the loop, and later ones must not have run")
        writes = facts.region_effect(op.regions[0]).writes | facts.own_effect(op).writes
        if writes:
            return Verdict(False, f"its body writes {listed(writes)}, in item order")
        return Verdict(True, "no item hands a value to the next, none ends the loop, the body writes nothing")

    def profit_of_loop(self, op: Op, facts: Facts) -> Estimate:
        body = op.regions[0]
        if not any(map(facts.waits, body.ops)):
            return Estimate(0.0, "nothing in its body waits")
        once = facts.region_seconds(body)
        return Estimate(max(0.0, facts.trips(op) - 1) * once, "it has one item" if facts.trips(op) <= 1 else "")

    def profit_of_region(self, region: Region, facts: Facts) -> tuple[int, Estimate]:
        """How many of the edges from one op to the next fall, and the seconds that this saves."""
        if not any(map(facts.waits, region.ops)):
            return 0, Estimate(0.0, "nothing in it waits")
        data, order = facts.data_dependencies(region), facts.order(region, ordered=False)
        dropped = sum(i - 1 not in data[i] and i - 1 not in order[i] for i in range(1, len(region.ops)))
        if not dropped:
            return 0, Estimate(0.0, "each operation needs the one before it")
        before, after = facts.region_seconds(region, ordered=True), facts.region_seconds(region, ordered=False)
        gain = before - after if before > after * (1 + 1e-9) else 0.0  # the two sums round differently
        return dropped, Estimate(gain, "nothing would run beside anything that waits")
