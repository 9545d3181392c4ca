"""Move what every iteration computes alike in front of the loop.

Before:
    workflow @w(%q: text, %xs: list<text>) -> list<text> seq {
      %out = foreach (%xs) {collects = 1} : list<text> body (%x: text) seq {
        %style = template "Answer {} briefly." (%q) : text
        %prompt = template "{}{}" (%style, %x) : text
        %text = generate @llm (%prompt) {max_tokens = 16} : text
        %item = py "[text]" (%text) : list<text>
        yield %item
      }
      return %out
    }
After:
    workflow @w(%q: text, %xs: list<text>) -> list<text> seq {
      %style = template "Answer {} briefly." (%q) : text
      %out = foreach (%xs) {collects = 1} : list<text> body (%x: text) seq {
        %prompt = template "{}{}" (%style, %x) : text
        %text = generate @llm (%prompt) {max_tokens = 16} : text
        %item = py "[text]" (%text) : list<text>
        yield %item
      }
      return %out
    }

Source: Allen and Cocke, "A Catalogue of Optimizing Transformations", 1971, code motion; with the rule of Java
compilers for operations that may raise: only where they would have been the first thing to go wrong.
Legal when: all operands come from outside the loop; it is not sampled and writes nothing, and what it reads (an
index, a variable) the loop does not write and nobody else changes; its result is no new object that an iteration
could change; and it cannot raise, or the loop surely reaches it in its first iteration with nothing before it that
writes or may raise.
Pays when: the loop is predicted to run more than once; literals take no time and move only with what needs them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Graph, Op, Region, Value
from flowc.ir.ops import OPS, Effect

from .core import Estimate, Match, Replacement, Rewrite, Verdict, describe, listed
from .cost import CostModel
from .facts import STATIC, Facts, iterates_safely


@dataclass(slots=True)
class _Frame:
    """A region being walked: the loop it belongs to, if any.

    `is_certain`: the next op is surely reached, with nothing before it in the loop that writes or may raise.
    """

    op: Op | None = None
    is_certain: bool = False


@dataclass(slots=True)
class Invariant(Match):
    """An op that needs nothing from the loop it is in. `loop` is the outermost one it may leave, else the innermost."""

    loop: Op | None = None
    obstacle: str = ""
    trips: float = 0.0
    seconds: float = 0.0
    literals: tuple[tuple[Op, Op], ...] = ()


@dataclass(frozen=True, slots=True)
class Licm(Rewrite[Invariant]):
    name: ClassVar[str] = "licm"
    min_gain_s: float = 0.0  # an op that saves no more than this stays

    def match(self, graph: Graph, costs: CostModel) -> Iterator[Invariant]:
        return _Motion(graph, costs).region(graph.body)

    def legal(self, match: Invariant) -> Verdict:
        if match.obstacle:
            return Verdict(False, match.obstacle)
        return Verdict(True, "its operands come from outside, and moving it changes nothing but time")

    def profit(self, match: Invariant, costs: CostModel) -> Estimate:
        assert match.loop is not None
        gain = match.seconds * (match.trips - 1)
        if gain <= self.min_gain_s:
            return Estimate(0.0, f"it is predicted to run {match.trips:g} times")
        return Estimate(gain, f"out of {describe(match.loop)}")

    def rewrite(self, match: Invariant) -> Replacement:
        assert match.loop is not None
        return Replacement(moves=(*match.literals, (match.op, match.loop)))


class _Motion:
    """One walk. An op leaves as many loops as it may at once, so that none is looked at twice."""

    def __init__(self, graph: Graph, costs: CostModel) -> None:
        self.facts = Facts(graph, costs)
        self.frames: list[_Frame] = []
        self.loops: list[Op] = []
        self.depth: dict[str, int] = {}  # value -> how many loops it is made in
        self.literals: dict[str, Op] = {}  # literals made in a loop

    def region(self, region: Region, loop: Op | None = None, is_certain: bool = False) -> Iterator[Invariant]:
        frame = _Frame(loop, is_certain)
        self.frames.append(frame)
        self.define(region.params)
        for op in region.ops:
            self.define(op.results)
            if op.name == "const" and self.loops:
                self.literals[op.result.name] = op
            if op.regions:
                yield from self.control(op)
            elif loop is not None and op.name not in STATIC:
                match = self.leaf(op)
                if match is not None:
                    yield match
                    if match.fired:
                        self.moved(match)
                        continue
            frame.is_certain = frame.is_certain and not self.facts.is_observable(op)
        self.frames.pop()

    def define(self, values: tuple[Value, ...]) -> None:
        for v in values:
            self.depth[v.name] = len(self.loops)

    def control(self, op: Op) -> Iterator[Invariant]:
        if op.name not in ("while", "foreach"):
            for region in op.regions:
                yield from self.region(region)
            return
        self.loops.append(op)
        if op.name == "foreach":
            runs = iterates_safely(op.operands[0].type) and (self.facts.length(op.operands[0]) or 0) > 0
            yield from self.region(op.regions[0], op, runs)
        else:
            cond, body = op.regions
            limit = op.attrs.get("limit")
            runs = isinstance(limit, int) and limit > 0
            yield from self.region(cond, op, runs)
            test = self.facts.definer(cond.yields[0])
            runs = runs and test is not None and test.name == "const" and bool(test.attrs["value"])
            runs = runs and not any(map(self.facts.is_observable, cond.ops))
            yield from self.region(body, op, runs)
        self.loops.pop()

    def leaf(self, op: Op) -> Invariant | None:
        """The op as a candidate to leave the loops around it; None if it needs something of the innermost one."""
        inner = len(self.loops)
        needs = max((self.depth[v.name] for v in op.operands if v.name not in self.literals), default=0)
        if needs >= inner:
            return None
        effect = self.facts.effect(op)
        if effect.writes or "group" in op.attrs or OPS[op.name].is_advice:
            return None
        match = Invariant(op, loop=self.loops[-1], seconds=self.facts.seconds(op))
        if effect.is_sampled:
            match.obstacle = "it is sampled: each iteration draws anew"
        elif not self.facts.is_repeatable(op):
            match.obstacle = f"it reads {listed(effect.reads)}, which others may change meanwhile"
        elif not self.facts.is_shareable(op):
            match.obstacle = "each iteration makes a new object, and somebody may change it or tell two apart"
        if match.obstacle:
            return match
        left = inner  # how many loops it stays in
        trips = 1.0
        for frame in reversed(self.frames):
            if frame.op is None or left == needs:
                break
            obstacle = self.stays(effect, frame)
            if obstacle:
                match.obstacle = obstacle if left == inner else ""
                break
            left -= 1
            match.loop = frame.op
            trips *= self.facts.trips(frame.op)
        match.trips = trips
        moving = [self.literals[v.name] for v in op.operands if v.name in self.literals]
        match.literals = tuple((literal, self.loops[0]) for literal in dict.fromkeys(moving))
        return match

    def stays(self, effect: Effect, frame: _Frame) -> str:
        """Why an op of this effect must stay in the frame's loop; empty if it may leave."""
        assert frame.op is not None
        if "group" in frame.op.attrs:
            return "the loop runs beside others, and nothing may stand between"
        written = effect.reads & self.facts.effect(frame.op).writes
        if written:
            return f"it reads {listed(written)}, which the loop writes"
        if effect.may_raise and not frame.is_certain:
            return "it may raise, and the loop may not reach it first"
        return ""

    def moved(self, match: Invariant) -> None:
        assert match.loop is not None
        outside = next(i for i, loop in enumerate(self.loops) if loop is match.loop)
        for v in match.op.results:
            self.depth[v.name] = outside
        for literal, _ in match.literals:
            del self.literals[literal.result.name]
            self.depth[literal.result.name] = 0
