"""Run the same pure operation once.

Before:
    workflow @w(%q: text) -> text seq {
      %docs = search @pydocs (%q) {k = 4} : docs
      %a = template "Summarise: {}" (%docs) : text
      %summary = generate @llm (%a) {max_tokens = 64} : text
      %again = search @pydocs (%q) {k = 4} : docs
      %b = template "{}: {}" (%summary, %again) : text
      return %b
    }
After:
    workflow @w(%q: text) -> text seq {
      %docs = search @pydocs (%q) {k = 4} : docs
      %a = template "Summarise: {}" (%docs) : text
      %summary = generate @llm (%a) {max_tokens = 64} : text
      %b = template "{}: {}" (%summary, %docs) : text
      return %b
    }

Source: Cocke, "Global Common Subexpression Elimination", 1970, by hashed value numbers over the region tree; for
prompts and retrieval in Helium and Halo.
Legal when: same operation, attributes and operands; neither is sampled nor writes; what they read (an index, a
variable) is not written between them, and nobody else changes it; the first stands before the second in its region or
in an enclosing one, so that it has finished without an error wherever Python reaches the second (one in a `try` body
is thus no match for one after it); and the result is not a new list or object that somebody could change or tell
apart.
Pays when: always.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import ClassVar

from flowc.ir.core import Graph, Op, Region, Value
from flowc.ir.ops import OPS, SCHEDULE_ATTRS

from .core import Estimate, Match, Replacement, Rewrite, Verdict, listed
from .cost import CostModel
from .facts import LOOPS, STATIC, Facts

_FREE = STATIC - {"const"}

Key = tuple[object, ...]


@dataclass(slots=True)
class Repeat(Match):
    """An op and an equal one that dominates it; `obstacle` says why they are not one."""

    first: Op | None = None
    obstacle: str = ""
    seconds: float = field(default=0.0)


@dataclass(frozen=True, slots=True)
class Cse(Rewrite[Repeat]):
    name: ClassVar[str] = "cse"

    def match(self, graph: Graph, costs: CostModel) -> Iterator[Repeat]:
        return _Numbering(graph, costs).region(graph.body)

    def legal(self, match: Repeat) -> Verdict:
        if match.obstacle:
            return Verdict(False, match.obstacle)
        return Verdict(True, "same operation on the same operands, and nothing between changes what it reads")

    def profit(self, match: Repeat, costs: CostModel) -> Estimate:
        assert match.first is not None
        return Estimate(match.seconds + costs.turn_s, f"{match.first.results[0]} serves both")

    def rewrite(self, match: Repeat) -> Replacement:
        assert match.first is not None
        values = {mine.name: first for mine, first in zip(match.op.results, match.first.results, strict=True)}
        return Replacement((), values)


class _Numbering:
    """Value numbers in one walk. Entries made inside a region are forgotten at its end."""

    def __init__(self, graph: Graph, costs: CostModel) -> None:
        self.facts = Facts(graph, costs)
        self.values: dict[str, str] = {}  # the name that stands for a value
        self.seen: dict[Key, Op] = {}
        self.stale: dict[Key, tuple[Op, str]] = {}  # entries without the state they read, to say what is in the way
        self.version: dict[str, int] = {}  # state -> number of its last write
        self.tick = count(1)

    def region(self, region: Region) -> Iterator[Repeat]:
        added: list[Key] = []
        for op in region.ops:
            if op.regions:
                yield from self.control(op)
            elif op.results:
                yield from self.leaf(op, added)
            writes = self.facts.effect(op).writes
            if writes:
                self.wrote(writes)
        for key in added:
            self.seen.pop(key, None)
            self.stale.pop(key, None)

    def control(self, op: Op) -> Iterator[Repeat]:
        if op.name in LOOPS:  # what an iteration writes, the next one reads
            self.wrote(self.facts.effect(op).writes)
        for (
            region
        ) in op.regions:  # what one region writes, the next finds written: a handler starts after part of the body
            yield from self.region(region)

    def wrote(self, states: frozenset[str]) -> None:
        for state in states:
            self.version[state] = next(self.tick)

    def number(self, value: Value) -> str:
        return self.values.get(value.name, value.name)

    def leaf(self, op: Op, added: list[Key]) -> Iterator[Repeat]:
        effect = self.facts.effect(op)
        if op.name in _FREE or effect.writes or "group" in op.attrs or OPS[op.name].is_advice:
            return  # a group's effects have no order to speak of, and advice is given for when it is given
        attrs = tuple(sorted((n, repr(a)) for n, a in op.attrs.items() if n not in SCHEDULE_ATTRS))
        plain: Key = (op.name, tuple([self.number(v) for v in op.operands]), attrs, len(op.results))
        reads = tuple([(s, self.version.get(s, 0)) for s in sorted(effect.reads)])
        key = (*plain, reads)
        first = self.seen.get(key)
        if first is None:
            stale = self.stale.get(plain)
            if stale is not None and effect.reads:
                yield Repeat(
                    op,
                    first=stale[0],
                    obstacle=f"{listed(effect.reads)} may have been written since {stale[0].results[0]}",
                )
            self.seen[key] = op
            self.stale[plain] = (op, "")
            added += (key, plain)
            return
        match = Repeat(op, first=first, obstacle=self.obstacle(op, first), seconds=self.facts.seconds(op))
        yield match
        if match.fired:
            for mine, theirs in zip(op.results, first.results, strict=True):
                self.values[mine.name] = self.number(theirs)

    def obstacle(self, op: Op, first: Op) -> str:
        effect = self.facts.effect(op)
        if effect.is_sampled:
            return "it is sampled: two runs may differ"
        if not self.facts.is_repeatable(op):
            return f"it reads {listed(effect.reads)}, which others may change meanwhile"
        if any(a.type != b.type for a, b in zip(op.results, first.results, strict=True)):
            return "the results have different types"
        if not (self.facts.is_shareable(op) and self.facts.is_shareable(first)):
            return "each result is a new object, and somebody may change it or tell the two apart"
        return ""
