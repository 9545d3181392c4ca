r"""Announce the prompts to come by their constant beginnings, and keep a history that a tool call interrupts.

Before:
    workflow @w(%q: text) -> text {
      %plan = generate @llm (%q) {max_tokens = 64} : text
      %prompt = template "Write what the plan says, to the letter and in its order, only:\n{}" (%plan) : text
      %answer = generate @llm (%prompt) {max_tokens = 64} : text
      return %answer
    }
After:
    workflow @w(%q: text) -> text {
      kv.hint @llm {site = 1, prefix = "Write what the plan says, to the letter and in its order, only:\n", steps = 1}
      %plan = generate @llm (%q) {max_tokens = 64} : text
      %prompt = template "Write what the plan says, to the letter and in its order, only:\n{}" (%plan) : text
      %answer = generate @llm (%prompt) {max_tokens = 64, site = 1} : text
      return %answer
    }

Steps are generations of this program until then, at the fewest. A region in which a prompt stands says them again at
its beginning, where they have changed or it is a loop's; the other branch of an `if` takes the announcement back,
unless a loop may come round to it. Before a tool call that stands between a prompt and its continuation the history is
pinned.

Source: Pan et al., "KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows", NeurIPS 2025,
steps to execution, there fed by hand; Li et al., "Continuum", 2025, for pins with a time to live.
Legal when: always: advice only.
Pays when: the constant beginning has a block of tokens, so that a cache can hold it, and something that waits stands
before the prompt, so that there is time to fetch it; a pin always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from flowc.ir.analyses import PROMPTED, steps_to_execution
from flowc.ir.core import Attr, Attrs, Graph, Op, Region, Value, map_region, walk

from .core import Additions, Outcome, Pass, Remark, Verdict, describe, next_site
from .cost import CostModel
from .facts import LOOPS, Facts
from .prompts import Beginnings, Part, Slot, own_parts, parts_of

_ADVICE: Final = frozenset({"kv.hint", "kv.release", "kv.pin"})
_CALLS: Final = frozenset({"tool", "invoke"})
_ALWAYS = Verdict(True, "advice changes when things happen, never what")


@dataclass(frozen=True, slots=True)
class KvPlan(Pass):
    name: ClassVar[str] = "kv-plan"
    on_trial: ClassVar[bool] = True
    ttl_factor: float = 4.0  # a history is pinned for so many times what the tool takes on average

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        bare = graph.with_body(map_region(graph.body, _without_advice))
        plan = _Plan(bare, costs, self.ttl_factor)
        body = plan.added.apply(bare.body)
        is_changed = body != graph.body
        remarks: list[Remark] = []
        for op, detail, gain_s in plan.told:
            fired = gain_s > 0 and is_changed
            remarks.append(self.remark(describe(op), op.loc, _ALWAYS, fired=fired, gain_s=gain_s, detail=detail))
        return Outcome(graph.with_body(body) if is_changed else graph, tuple(remarks))


def _without_advice(region: Region) -> Region:
    ops = tuple(op for op in region.ops if op.name not in _ADVICE)
    return region if len(ops) == len(region.ops) else replace(region, ops=ops)


class _Plan:
    """Where which advice stands: at the beginning of a region, or before an op."""

    def __init__(self, graph: Graph, costs: CostModel, ttl_factor: float) -> None:
        self.costs = costs
        self.facts = Facts(graph, costs)
        self.beginnings = Beginnings(graph, self.facts)
        self.generations = steps_to_execution(graph, lambda op: op.name in PROMPTED)
        self.waits = steps_to_execution(graph)
        self.prefixes: dict[int, str] = {}  # by op: the constant beginning, where it is long enough to be kept
        self.added = Additions()
        self.told: list[tuple[Op, str, float]] = []
        self.within: dict[int, list[Op]] = {}  # by region: the prompted ops in it that have a prefix
        self.announced: dict[int, int] = {}  # by op: the steps that were said last
        self.next_site = next_site(graph)
        self._find(graph.body)
        self._announce(graph.body)
        for op in (o for o in walk(graph.body) if id(o) in self.prefixes):
            tokens = len(self.prefixes[id(op)]) / costs["chars_per_token"]
            gain_s = tokens * costs.of(op)["llm_s_per_prompt_token"] if id(op) in self.announced else 0.0
            detail = f"its first {tokens:.0f} tokens are announced" if gain_s else "nothing that waits stands before it"
            self.told.append((op, detail, gain_s))
        if any(op.name in _CALLS for op in walk(graph.body)):
            self._prompts: dict[int, list[Part]] = {}
            self._replies = {op.result.name: op for op in walk(graph.body) if op.name == "generate"}
            self._pin(graph.body, ttl_factor)

    def _find(self, region: Region) -> list[Op]:
        """The ops in the region of which the prompt has a constant beginning."""
        found: list[Op] = []
        for op in region.ops:
            if op.name in PROMPTED:
                prefix = self.beginnings.of(op.operands[0])
                if len(prefix) >= self.costs["kv_block_tokens"] * self.costs["chars_per_token"]:
                    self.prefixes[id(op)] = prefix
                    found.append(op)
            for inner in op.regions:
                found += self._find(inner)
        self.within[id(region)] = found
        return found

    def _announce(self, region: Region, *, is_loop: bool = False, is_in_loop: bool = False) -> None:
        here = self.added.at_entry.setdefault(id(region), [])
        for op in self.within[id(region)]:
            steps = self.generations[id(op)] - self.generations[id(region)]
            is_next = self.waits[id(op)] == self.waits[id(region)]
            if not is_next and (is_loop or self.announced.get(id(op)) != steps):
                here.append(self._advice("kv.hint", op, prefix=self.prefixes[id(op)], steps=steps))
                self.announced[id(op)] = steps
        for op in region.ops:
            if op.name == "if" and not is_in_loop:
                for mine, other in (op.regions, reversed(op.regions)):
                    gone = [o for o in self.within[id(other)] if id(o) in self.announced]
                    self.added.at_entry.setdefault(id(mine), []).extend(self._advice("kv.release", o) for o in gone)
            for inner in op.regions if op.name != "fused" else ():
                self._announce(inner, is_loop=op.name in LOOPS, is_in_loop=is_in_loop or op.name in LOOPS)

    def _advice(self, name: str, op: Op, *operands: Value, **attrs: Attr) -> Op:
        """Advice about the op's prompt."""
        site = self.added.attrs.get(id(op), op.attrs).get("site")
        if not isinstance(site, int):
            site, self.next_site = self.next_site, self.next_site + 1
        self.added.attrs[id(op)] = {"site": site}
        given = Attrs({"resource": op.attrs["resource"], "site": site, **attrs})
        return Op(name, operands, (), given, loc=op.loc)

    def _pin(self, region: Region, ttl_factor: float) -> None:
        made = {v.name: i for i, op in enumerate(region.ops) for v in op.results}
        for op in region.ops:
            if op.name == "template":
                self._pin_history(op, region, made, ttl_factor)
            for inner in op.regions if op.name != "fused" else ():
                self._pin(inner, ttl_factor)

    def _pin_history(self, continuation: Op, region: Region, made: dict[str, int], ttl_factor: float) -> None:
        """Pins prompt and reply over the calls of which the results stand behind them in a text."""
        reply, rest = self._continued(continuation)
        if reply is None:
            return
        told_at = made.get(reply.result.name, -1)
        for part in rest:
            at = made.get(part.value.name, -1) if isinstance(part, Slot) else -1
            if at > told_at and region.ops[at].name in _CALLS:
                call = region.ops[at]
                ttl = round(self.costs.own_s(call) * ttl_factor, 6)
                pin = self._advice("kv.pin", reply, reply.operands[0], reply.result, ttl=ttl)
                self.added.before.setdefault(id(call), []).append(pin)
                gain_s = 2 * self.costs["slot_tokens"] * self.costs.of(reply)["llm_s_per_prompt_token"]
                self.told.append((call, f"prompt and reply stay cached for {ttl:.3g} s", gain_s))

    def _continued(self, template: Op) -> tuple[Op | None, list[Part]]:
        """The generation of which a text begins with prompt and reply, and the parts that follow."""
        for parts in (list(own_parts(template)), parts_of(template.result, self.facts)):
            for i, part in enumerate(parts):
                reply = self._replies.get(part.value.name) if isinstance(part, Slot) and not part.form else None
                if reply is not None and parts[:i] in ([Slot(reply.operands[0])], self._prompt(reply)):
                    return reply, parts[i + 1 :]
        return None, []

    def _prompt(self, reply: Op) -> list[Part]:
        found = self._prompts.get(id(reply))
        if found is None:
            found = self._prompts[id(reply)] = parts_of(reply.operands[0], self.facts)
        return found
