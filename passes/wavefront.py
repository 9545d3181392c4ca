"""Number the levels of waiting operations and name what may share a batch.

Before:
    workflow @w(%q: text) -> text {
      %docs = search @pydocs (%q) {k = 4} : docs
      %hypo = generate @llm (%q) {max_tokens = 64} : text
      %more = search @pydocs (%hypo) {k = 4} : docs
      %prompt = template "{}{}" (%docs, %more) : text
      return %prompt
    }
After:
    workflow @w(%q: text) -> text {
      %docs = search @pydocs (%q) {k = 4, batch = "search @pydocs {k = 4}", wave = 0} : docs
      %hypo = generate @llm (%q) {max_tokens = 64, batch = "generate @llm", wave = 0} : text
      %more = search @pydocs (%hypo) {k = 4, batch = "search @pydocs {k = 4}", wave = 1} : docs
      %prompt = template "{}{}" (%docs, %more) : text
      return %prompt
    }

Source: the wavefront of HedraRAG (Hu et al., SOSP 2025): the nodes of all requests whose predecessors are done. Here
its static half.
Legal when: always; attributes only. An operation of which the batch key is not known before the run gets none.
Pays when: always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from flowc.ir.core import Attr, Graph, Op, Region
from flowc.ir.ops import OPS, keyword_operands
from flowc.ir.printer import print_literal

from .core import Outcome, Pass, Remark, Verdict, describe
from .cost import CostModel
from .facts import Facts

_ALWAYS = Verdict(True, "it only names what may run together")


@dataclass(frozen=True, slots=True)
class Wavefront(Pass):
    name: ClassVar[str] = "wavefront"

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        levels_in = _Levels(facts)
        remarks: list[Remark] = []

        def on_region(region: Region) -> Region:
            if not any(map(facts.waits, region.ops)):
                return region
            levels = levels_in.of(region)
            ops = []
            for i, op in enumerate(region.ops):
                new = op
                if op.regions and facts.waits(op):
                    inner = tuple(map(on_region, op.regions))
                    if any(a is not b for a, b in zip(inner, op.regions, strict=True)):
                        new = replace(op, regions=inner)
                wave = levels[i] if OPS[op.name].lane != "python" and not OPS[op.name].is_advice else None
                new = on_op(new, wave)
                ops.append(new)
            if all(a is b for a, b in zip(ops, region.ops, strict=True)):
                return region
            return replace(region, ops=tuple(ops))

        def on_op(op: Op, wave: int | None) -> Op:
            marks: dict[str, Attr] = {}
            if wave is not None:
                marks["wave"] = wave
                batch = batch_key(op)
                if batch is not None:
                    marks["batch"] = batch
            new = op
            if any(op.attrs.get(n) != marks.get(n) for n in ("wave", "batch")):
                new = op.without_attrs("wave", "batch")
                new = new.with_attrs(**marks) if marks else new
            if wave is not None:
                detail = f"wave {wave}" + (f", batch {batch_key(op)}" if "batch" in marks else ", on its own")
                remarks.append(self.remark(describe(op), op.loc, _ALWAYS, fired=new is not op, detail=detail))
            return new

        body = on_region(graph.body)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def batch_key(op: Op) -> str | None:
    """What ops of one batch share, as text; None for one that is never batched or whose key only the run knows."""
    spec = OPS[op.name]
    if spec.batch_key is None or not keyword_operands(op).keys().isdisjoint(spec.batch_key):
        return None
    target = f" @{op.attr('resource')}" if "resource" in op.attrs else ""
    rest = [f"{n} = {print_literal(op.attrs[n])}" for n in spec.batch_key if n != "resource" and n in op.attrs]
    return f"{op.name.removeprefix('ahead.')}{target}" + (f" {{{', '.join(rest)}}}" if rest else "")


class _Levels:
    """Levels of regions and depths of ops, each computed once."""

    __slots__ = ("_depths", "_facts", "_known")

    def __init__(self, facts: Facts) -> None:
        self._facts = facts
        self._known: dict[int, list[int]] = {}
        self._depths: dict[int, int] = {}

    def of(self, region: Region) -> list[int]:
        """For each op how many waiting ops are on the longest way to it."""
        levels = self._known.get(id(region))
        if levels is None:
            data, order = self._facts.data_dependencies(region), self._facts.order(region)
            levels = self._known[id(region)] = []
            after: list[int] = []
            for i, op in enumerate(region.ops):
                level = max((after[d] for deps in (data[i], order[i]) for d in deps), default=0)
                levels.append(level)
                after.append(level + self.depth(op))
        return levels

    def depth(self, op: Op) -> int:
        """How many waiting ops are on the longest way through the op, a loop's body counted once."""
        if not self._facts.waits(op):
            return 0
        if not op.regions:
            return 1
        found = self._depths.get(id(op))
        if found is None:
            inner = [
                max((level + self.depth(o) for level, o in zip(self.of(r), r.ops, strict=True)), default=0)
                for r in op.regions
            ]
            found = sum(inner) if op.name == "while" else max(inner)
            if OPS[op.name].lane != "python":
                found += 1
            self._depths[id(op)] = found
        return found
