r"""Number the constant beginnings of prompts, so that those which begin alike run next to each other.

Before:
    workflow @w(%a: text, %b: text) -> list<text> {
      %p1 = template "You judge what others have written, by the rules of the house.\nText: {}" (%a) : text
      %p2 = template "You judge what others have written, by the rules of the house.\nText: {}" (%b) : text
      %x = generate @llm (%p1) {max_tokens = 8} : text
      %y = generate @llm (%p2) {max_tokens = 8} : text
      %both = py "[x, y]" (%x, %y) : list<text>
      return %both
    }
After:
    workflow @w(%a: text, %b: text) -> list<text> {
      %p1 = template "You judge what others have written, by the rules of the house.\nText: {}" (%a) : text
      %p2 = template "You judge what others have written, by the rules of the house.\nText: {}" (%b) : text
      %x = generate @llm (%p1) {max_tokens = 8, prefix = 0} : text
      %y = generate @llm (%p2) {max_tokens = 8, prefix = 0} : text
      %both = py "[x, y]" (%x, %y) : list<text>
      return %both
    }

Source: Zheng et al., "BatchLLM: Optimizing Large Batched LLM Inference with Global Prefix Sharing", MLSys 2026: one
level of groups, found ahead of the run; Lin et al., "Parrot", OSDI 2024.
Legal when: always; attributes only.
Pays when: the beginning has a block of tokens. Two prompts are of one group if what they share is that long, and at
least half of either's constant beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.analyses import PROMPTED
from flowc.ir.core import Graph, Op, walk

from .core import Outcome, Pass, Remark, Verdict, describe, map_ops
from .cost import CostModel
from .facts import Facts
from .prompts import Beginnings, common_beginning

_ALWAYS = Verdict(True, "it only says what begins alike")


@dataclass(frozen=True, slots=True)
class PrefixGroups(Pass):
    name: ClassVar[str] = "prefix-groups"
    on_trial: ClassVar[bool] = True

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        beginnings = Beginnings(graph, Facts(graph, costs))
        least = int(costs["kv_block_tokens"] * costs["chars_per_token"])
        prompts = [(op, beginnings.of(op.operands[0])) for op in walk(graph.body) if op.name in PROMPTED]
        group_of = _groups({text for _, text in prompts if len(text) >= least}, least)
        number: dict[int, int] = {}
        of_op: dict[int, int] = {}  # by the op's id, which `graph` keeps taken
        remarks: list[Remark] = []
        for op, text in prompts:
            if text not in group_of:
                continue
            of_op[id(op)] = number.setdefault(group_of[text], len(number))
            fired = op.attrs.get("prefix") != of_op[id(op)]
            detail = f"group {of_op[id(op)]}: it begins with {len(text)} characters of constant text"
            remarks.append(self.remark(describe(op), op.loc, _ALWAYS, fired=fired, detail=detail))

        def marked(op: Op) -> Op:
            group = of_op.get(id(op))
            if op.attrs.get("prefix") == group:
                return op
            return op.without_attrs("prefix") if group is None else op.with_attrs(prefix=group)

        body = map_ops(graph.body, marked)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def _groups(texts: set[str], least: int) -> dict[str, int]:
    """Text -> its group. In order of the alphabet those of a group stand together."""
    found: dict[str, int] = {}
    group, shared, longest = 0, "", 0  # the open group: its number, what its texts share, the longest of them
    for text in sorted(texts):
        both = common_beginning(shared, text)
        longest = max(longest, len(text))
        if len(both) < max(least, (longest + 1) // 2):
            group, both, longest = group + 1, text, len(text)
        found[text], shared = group, both
    return found
