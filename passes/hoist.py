"""Begin what a branch may need before it is known whether the branch is taken.

Before:
    workflow @w(%q: text, %options: list<text>) -> text {
      %choice = choose @llm (%q, %options) : text
      %test = equals "search" (%choice) : bool
      %notes = if (%test) : text then {
        %docs = search @pydocs (%q) {k = 4} : docs
        %found = template "{}" (%docs) : text
        yield %found
      } else {
        yield %q
      }
      return %notes
    }
After:
    workflow @w(%q: text, %options: list<text>) -> text {
      %early = ahead.search @pydocs (%q) {k = 4} : ahead
      %choice = choose @llm (%q, %options) : text
      %test = equals "search" (%choice) : bool
      %notes = if (%test) : text then {
        %docs = search @pydocs (%q, ahead=%early) {k = 4} : docs
        %found = template "{}" (%docs) : text
        yield %found
      } else {
        yield %q
      }
      return %notes
    }

Validated: the operation in the branch takes the answer if it was asked with equal operands, and asks anew if not or if
that failed; where the branch is not taken the answer is dropped, its error with it.

Source: Bernstein and Rodeh, "Global Instruction Scheduling for Superscalar Machines", 1991, speculative motion above a
branch; for agents Ye et al., "Speculative Actions", 2025.
Legal when: the operation is pure but for reading an index (a search, an embedding, a reranking, a choice, a greedy
generation) and nothing before it in program order writes what it reads meanwhile; its operands are known before the
condition, or are made from such by plain Python that is pure and cannot raise; and it has no timeout, which would run
from another beginning.
Pays when: the branch's probability times the seconds between operands and condition (or what the operation takes, if
that is less) is more than what the same seconds cost others where the branch is not taken.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Graph, Names, Op, Region, Value, names_in, walk
from flowc.ir.ops import OPS, keyword_operands
from flowc.ir.types import AHEAD

from .core import Estimate, Match, Replacement, Rewrite, Verdict, listed, with_operand
from .cost import CostModel
from .facts import Facts
from .slices import Slice, begun_ahead, makers_of, slice_of


@dataclass(slots=True, kw_only=True)
class _Early(Match):
    """An op at the top of a branch. `before` is where it could begin at the earliest, `gap_s` how long that is before
    the branch is chosen."""

    slice: Slice | None
    before: Op
    gap_s: float
    seconds: float
    probability: float
    obstacle: str
    names: Names


@dataclass(frozen=True, slots=True)
class Hoist(Rewrite[_Early]):
    name: ClassVar[str] = "hoist"
    on_trial: ClassVar[bool] = True

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Early]:
        if not any(op.name == "if" for op in walk(graph.body)):
            return
        facts = Facts(graph, costs)
        names = Names(names_in(graph))
        yield from _sites(graph.body, facts, names)

    def legal(self, match: _Early) -> Verdict:
        if match.obstacle:
            return Verdict(False, match.obstacle)
        return Verdict(True, "its answer is taken only if it is asked just so, and dropped otherwise")

    def profit(self, match: _Early, costs: CostModel) -> Estimate:
        p, saved = match.probability, min(match.gap_s, match.seconds)
        if saved <= costs["substage_s"]:
            return Estimate(0.0, "the condition is known as early as its operands")
        gain = p * saved - (1 - p) * saved * costs["waste"]
        return Estimate(max(0.0, gain), f"it is needed with probability {p:.2g}")

    def rewrite(self, match: _Early) -> Replacement:
        assert match.slice is not None
        early = Value(match.names.fresh("early"), AHEAD)
        clones, given = match.slice.cloned(match.names)
        begun = begun_ahead(match.op, given, early)
        moves = tuple((op, match.before) for op in (*clones, begun))
        return Replacement((with_operand(match.op, "ahead", early),), moves=moves)


def _sites(region: Region, facts: Facts, names: Names) -> Iterator[_Early]:
    if any(op.name == "if" for op in region.ops):
        times = facts.schedule(region)
        made = makers_of(region)
        writers: dict[str, list[int]] = {}
        for i, op in enumerate(region.ops):
            for state in facts.effect(op).writes:
                writers.setdefault(state, []).append(i)
        for at, (op, (begins_s, _)) in enumerate(zip(region.ops, times, strict=True)):
            if op.name != "if":
                continue
            p = facts.costs["branch"]
            for branch, probability in zip(op.regions, (p, 1 - p), strict=True):
                made_there = makers_of(branch)
                written: set[str] = set()  # by what stands before in the branch
                for inner in branch.ops:
                    written_before = frozenset(written)
                    written |= facts.effect(inner).writes
                    if f"ahead.{inner.name}" not in OPS or "ahead" in keyword_operands(inner):
                        continue
                    obstacle = _obstacle(inner, facts)
                    found = slice_of(inner, branch, made_there, facts)
                    if found is None:
                        obstacle = obstacle or "its operands are not known before the condition"
                    where = max((made.get(v.name, -1) for v in found.sources), default=-1) if found is not None else -1
                    reads = facts.effect(inner).reads
                    changed = reads & written_before
                    changed |= {state for state in reads if _any_between(writers.get(state, ()), where, at)}
                    if changed:
                        obstacle = obstacle or f"it reads {listed(changed)}, which is written before it"
                    yield _Early(
                        inner,
                        slice=found,
                        before=region.ops[where + 1],
                        gap_s=begins_s - (times[where][1] if where >= 0 else 0.0),
                        seconds=facts.seconds(inner),
                        probability=probability,
                        obstacle=obstacle,
                        names=names,
                    )
    for op in region.ops:
        if op.name != "fused":
            for inner_region in op.regions:
                yield from _sites(inner_region, facts, names)


def _any_between(positions: Sequence[int], first: int, last: int) -> bool:
    """Is one of the ascending positions between the two?"""
    at = bisect_left(positions, last)
    return at > 0 and positions[at - 1] > first


def _obstacle(op: Op, facts: Facts) -> str:
    """Why an op may not begin before it is needed, whatever it is given; empty if it may."""
    effect = facts.effect(op)
    if "timeout" in op.attrs or "timeout" in keyword_operands(op):
        return "its timeout would begin too early"
    if effect.is_sampled:
        return "it is sampled: it would draw although nobody asked"
    if not facts.is_repeatable(op):
        return f"it has effects on or reads {listed(effect.reads | effect.writes)}"
    return ""
