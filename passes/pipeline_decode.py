"""Start on each line of a generation once the line is written, while the model writes the next.

Before:
    workflow @w(%q: text) -> list<docs> {
      %t = generate @llm (%q) : text
      %xs = py "t.splitlines()" (%t) : list<text>
      %r = foreach (%xs) {collects = 1, parallel = true} : list<docs> body (%x: text) {
        %found = search @pydocs (%x) {k = 2} : docs
        %item = py "[found]" (%found) : list<docs>
        yield %item
      }
      return %r
    }
After:
    workflow @w(%q: text) -> list<docs> {
      %t, %xs, %r = llm.each @llm (%q) {split = "lines", collects = 1} : text, list<text>, list<docs> body (%x: text) {
        %found = search @pydocs (%x) {k = 2} : docs
        %item = py "[found]" (%found) : list<docs>
        yield %item
      }
      return %r
    }

A comprehension between that strips or filters the lines becomes the head of the body; the loop then goes over what is
left of each line.

Source: Tan et al., "Towards End-to-End Optimization of LLM-based Applications with Ayo", ASPLOS 2025, decoding
pipelining; Santhanam et al., "ALTO: An Efficient Network Orchestrator for Compound AI Systems", 2024, for partial
outputs with their lineage.
Legal when: the list is exactly the generation's lines, or its text split at a literal; the loop runs all items at
once, and what stands between the two only strips or filters, is pure and cannot raise; the bodies use nothing that is
made after the generation; nothing between generation and loop writes or may raise; the generation has no timeout,
which would then be for the loop too, takes no work begun before, and neither is part of a gather.
Pays when: something in the body waits: all but the last item's work is done while the rest is written.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from flowc.ir.core import Attrs, Graph, Names, Op, Region, Value, free_values, names_in, walk_regions
from flowc.ir.ops import keyword_operands

from .core import Estimate, Match, Replacement, Rewrite, Verdict
from .cost import CostModel
from .facts import STATIC, Facts, expression, iterates_safely

_UNSAID = frozenset({"wave", "batch"})
"""Attributes that do not hold of the new operation."""


@dataclass(slots=True, kw_only=True)
class _Pipeline(Match):
    """A generation, the op that splits its text, and the loops over that, each over what the one before it gives."""

    split: str
    splitter: Op
    loops: tuple[Op, ...]
    between: tuple[Op, ...]  # what stands among them
    facts: Facts
    names: Names


@dataclass(frozen=True, slots=True)
class PipelineDecode(Rewrite[_Pipeline]):
    name: ClassVar[str] = "pipeline-decode"
    on_trial: ClassVar[bool] = True

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Pipeline]:
        facts = Facts(graph, costs)
        names: Names | None = None
        for region in walk_regions(graph.body):
            if not any(op.name == "foreach" for op in region.ops):
                continue
            at = {id(op): i for i, op in enumerate(region.ops)}
            for i, op in enumerate(region.ops):
                if op.name != "generate":
                    continue
                for splitter in _users(op.result, facts, at):
                    split = _separator(splitter, op.result)
                    loops = _chain(splitter, facts, at) if split else ()
                    if split and loops:
                        span = region.ops[i + 1 : at[id(loops[-1])]]
                        own = {id(splitter), *map(id, loops)}
                        between = tuple(o for o in span if id(o) not in own)
                        names = names or Names(names_in(graph))
                        yield _Pipeline(
                            op, split=split, splitter=splitter, loops=loops, between=between, facts=facts, names=names
                        )
                        break

    def legal(self, match: _Pipeline) -> Verdict:
        op, facts = match.op, match.facts
        *filters, loop = match.loops
        keywords = keyword_operands(op)
        if "timeout" in op.attrs or "timeout" in keywords:
            return Verdict(False, "its timeout is for the generation alone")
        if not keywords.keys().isdisjoint(("kv", "ahead")):
            return Verdict(False, "it takes work that was begun before")
        if any("group" in o.attrs for o in (op, *match.loops)):
            return Verdict(False, "it is part of a gather")
        if not loop.attrs.get("parallel"):
            return Verdict(False, "the loop's items run one after another")
        if not all(iterates_safely(o.operands[0].type) for o in match.loops):
            return Verdict(False, "the list is an object that others may hold")
        for inner in filters:
            effect = facts.region_effect(inner.regions[0])
            if not effect.is_pure or effect.may_raise:
                return Verdict(False, "the loop before it has effects or may raise, and all of it runs first")
        late = {v.name for o in match.between if o.name not in STATIC for v in o.results} | {op.result.name}
        late.update(v.name for o in (match.splitter, *filters) for v in o.results)
        used = [v for o in match.loops for v in free_values(o.regions[0]) if v.name in late]
        if used:
            return Verdict(False, f"its body needs {used[0]}, which is made after the generation has begun")
        if any(map(facts.is_observable, match.between)):
            return Verdict(False, "something that writes or may raise stands between")
        return Verdict(True, "each item needs its own piece of the text alone, and what it does may run ahead")

    def profit(self, match: _Pipeline, costs: CostModel) -> Estimate:
        facts, loop = match.facts, match.loops[-1]
        body = loop.regions[0]
        if not any(map(facts.waits, body.ops)):
            return Estimate(0.0, "nothing in its body waits")
        n = facts.trips(loop)
        busy = sum(facts.seconds(op) for op in body.ops if facts.waits(op))
        gain = min((n - 1) * busy, costs.own_s(match.op) * (n - 1) / n) if n > 1 else 0.0
        return Estimate(gain, f"all but the last of {n:g} items run while the rest is written")

    def rewrite(self, match: _Pipeline) -> Replacement:
        op, splitter, names = match.op, match.splitter, match.names
        body, lists = _nested(match.loops, match.facts, names)
        attrs = {n: a for n, a in op.attrs.items() if n not in _UNSAID}
        attrs["split"] = match.split
        if lists:
            attrs["collects"] = len(lists)
        each = Op("llm.each", op.operands, (op.result, splitter.result, *lists), Attrs(attrs), (body,), op.loc)
        literals = tuple((o, op) for o in match.between if o.name in STATIC)
        return Replacement((each,), moves=literals, removes=(splitter, *match.loops))


def _users(value: Value, facts: Facts, at: dict[int, int]) -> Iterator[Op]:
    """The ops of the region that take the value."""
    for user, _ in facts.readers(value):
        if user is not None and id(user) in at:
            yield user


def _separator(op: Op, text: Value) -> str:
    """`lines` if the op is the lines of the text, the literal at which it splits it, or empty."""
    if op.name != "py" or "outs" in op.attrs or len(op.operands) != 1 or op.operands[0] != text:
        return ""
    match expression(str(op.attrs["source"])):
        case ast.Call(func=ast.Attribute(value=ast.Name(), attr="splitlines"), args=[], keywords=[]):
            return "lines"
        case ast.Call(
            func=ast.Attribute(value=ast.Name(), attr="split"), args=[ast.Constant(value=str(found))], keywords=[]
        ) if found != "lines":
            return found
    return ""


def _chain(splitter: Op, facts: Facts, at: dict[int, int]) -> tuple[Op, ...]:
    """The loops over the list, each over what the one before it collects, up to the first that waits; or none."""
    found: list[Op] = []
    value = splitter.result
    while True:
        loops = [u for u in _users(value, facts, at) if u.name == "foreach" and u.operands == (value,)]
        if not loops or loops[0].attrs.get("breaks"):
            return ()
        loop = next((u for u in loops if facts.waits(u)), loops[0])
        found.append(loop)
        if facts.waits(loop):
            return tuple(found)
        if len(loop.results) != 1:
            return ()
        value = loop.result


def _nested(loops: tuple[Op, ...], facts: Facts, names: Names) -> tuple[Region, tuple[Value, ...]]:
    """The loops' bodies as one, and the lists that it collects: the last loop's, and what others read of those before.

    A later loop's body goes over what an earlier one yields for the item.
    """
    loop, *rest = loops
    body = loop.regions[0]
    if not rest:
        return body, loop.results
    inner, lists = _nested(tuple(rest), facts, names)
    (chunk,) = body.yields
    fresh = tuple(Value(names.fresh(v.name), v.type) for v in lists)
    nested = Op("foreach", (chunk,), fresh, rest[0].attrs, (inner,), rest[0].loc)
    nested = nested.with_attrs(collects=len(lists), parallel=True)
    is_read = any(user is not rest[0] for user, _ in facts.readers(loop.result))
    own, yields = ((loop.result,), (chunk,)) if is_read else ((), ())
    return replace(body, ops=(*body.ops, nested), yields=(*yields, *fresh)), (*own, *lists)
