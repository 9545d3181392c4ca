"""Drop the KV cache of a prompt that is only scored: a choice, or one token, which no other prompt continues.

Before:
    workflow @w(%draft: text, %options: list<text>) -> text {
      %prompt = template "Is this answer supported by its sources? {}" (%draft) : text
      %verdict = choose @llm (%prompt, %options) : text
      return %verdict
    }
After:
    workflow @w(%draft: text, %options: list<text>) -> text {
      %prompt = template "Is this answer supported by its sources? {}" (%draft) : text
      %verdict = choose @llm (%prompt, %options) {drops = true} : text
      return %verdict
    }

What stands before the first slot is constant and stays: other programs begin alike.

Source: Du et al., "PrefillOnly: An Inference Engine for Prefill-only Workloads in Large Language Model Applications",
SOSP 2025, suffix discarding; which suffix is dead is here found by looking at all prompts of the workflow.
Legal when: always: a cache never changes an answer.
Pays when: nobody comes back to it: the prompt's text is used nowhere else, no other prompt begins with the same value
after the same constant, and no loop asks again with that value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.analyses import PROMPTED
from flowc.ir.core import Graph, Op, Region

from .core import Outcome, Pass, Remark, Verdict, describe, map_ops
from .cost import CostModel
from .facts import LOOPS, Facts
from .prompts import Slot, parts_of

_ALWAYS = Verdict(True, "a cache never changes an answer")
_Start = tuple[str, str]  # the constant that a prompt begins with, and the value that follows


@dataclass(frozen=True, slots=True)
class ScoreOnly(Pass):
    name: ClassVar[str] = "score-only"
    on_trial: ClassVar[bool] = True

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        found = list(_prompts(graph, facts))
        count = Counter(start for _, start, _ in found)
        remarks: list[Remark] = []
        drops: dict[int, bool] = {}  # by the op's id, which `graph` keeps taken
        for op, start, is_repeated in found:
            if op.name != "choose" and not (op.name == "generate" and op.attrs.get("max_tokens") == 1):
                continue
            if start is None:
                why = "its prompt is constant"
            elif len(facts.readers(op.operands[0])) > 1:
                why = "its prompt is used elsewhere"
            elif count[start] > 1:
                why = "another prompt begins with the same value"
            elif is_repeated:
                why = "a loop asks again with the same value"
            else:
                why = ""
            drops[id(op)] = not why
            fired = not why and not op.attrs.get("drops")
            detail = why or "nobody continues its prompt: its cache makes room at once"
            remarks.append(self.remark(describe(op), op.loc, _ALWAYS, fired=fired, detail=detail))

        body = map_ops(graph.body, lambda op: _marked(op, drops.get(id(op), False)))
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def _marked(op: Op, drops: bool) -> Op:
    if bool(op.attrs.get("drops")) == drops:
        return op
    return op.with_attrs(drops=True) if drops else op.without_attrs("drops")


def _prompts(graph: Graph, facts: Facts) -> Iterator[tuple[Op, _Start | None, bool]]:
    """Each prompted op, how its prompt begins, and whether a loop around it asks with the same value again."""
    loop_of: dict[str, int] = {}  # value -> how many loops it is made in

    def visit(region: Region, loops: int) -> Iterator[tuple[Op, _Start | None, bool]]:
        loop_of.update((v.name, loops) for v in region.params)
        for op in region.ops:
            if op.name in PROMPTED:
                first, constant = None, ""
                for part in parts_of(op.operands[0], facts, into_fused=True):
                    if isinstance(part, Slot):
                        first = part.value.name
                        break
                    constant += part
                start = (constant, first) if first is not None else None
                yield op, start, first is not None and loop_of.get(first, 0) < loops
            for inner in op.regions:
                yield from visit(inner, loops + (op.name in LOOPS))
            loop_of.update((v.name, loops) for v in op.results)

    yield from visit(graph.body, 0)
