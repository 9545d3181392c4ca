r"""Write the answer from what a search has found so far, and keep it if the search ends with just that.

Before:
    workflow @w(%q: text) -> text {
      %plan = ivf.begin @pydocs (%q) {k = 4} : scan
      %scan = ivf.scan @pydocs (%plan) : scan
      %docs = ivf.finish @pydocs (%scan) : docs
      %prompt = template "{}\n{}" (%q, %docs) : text
      %answer = generate @llm (%prompt) {max_tokens = 64} : text
      return %answer
    }
After:
    workflow @w(%q: text) -> text {
      %plan = ivf.begin @pydocs (%q) {k = 4} : scan
      %guess = ivf.partial @pydocs (%plan) {confidence = 0.9} : docs
      %prompt.1 = template "{}\n{}" (%q, %guess) : text
      %early = ahead.generate @llm (%prompt.1) {max_tokens = 64} : ahead
      %scan = ivf.scan @pydocs (%plan) : scan
      %docs = ivf.finish @pydocs (%scan) : docs
      %prompt = template "{}\n{}" (%q, %docs) : text
      %answer = generate @llm (%prompt, ahead=%early) {max_tokens = 64} : text
      return %answer
    }

Validated: the prompts are compared as texts once the search has ended; one that differs is asked anew, and what was
begun is cancelled. Whether there is room for work that may be in vain the runtime decides each time.

Source: Hu et al., "HedraRAG", SOSP 2025, section 4.3, and Jin et al., "RAGCache", 2024, section 5.3, dynamic
speculative pipelining; both compare document ids where the prompt's text is what counts. The other speculation there,
a search from a generation under way, has no exact form here: the lookahead that it amounts to is a prefetch.
Legal when: the generation is greedy, has no timeout and takes no answer begun ahead; what stands between the search
and its prompt is plain Python that is pure and cannot raise.
Pays when: the share of the scan that is left when the guess is as likely to be right as `confidence` says, times that
likelihood, is more than what the same seconds cost others where it is wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Attr, Attrs, Graph, Names, Op, Region, Value, names_in, walk_regions
from flowc.ir.ops import OPS, keyword_operands
from flowc.ir.types import AHEAD, DOCS

from .core import Estimate, Match, Replacement, Rewrite, Verdict, with_operand
from .cost import CostModel
from .facts import Facts
from .slices import MAX_OPS, Slice, begun_ahead, makers_of, slice_of


@dataclass(slots=True, kw_only=True)
class _Guess(Match):
    """A generation from what the search `plan` finds. It could begin before the op `before`, `gap_s` early."""

    plan: Value
    docs: Value  # what the search finds
    resource: Attr
    slice: Slice | None
    before: Op
    gap_s: float
    seconds: float
    is_certain: bool  # does it give the same whenever it is run?
    names: Names


@dataclass(frozen=True, slots=True)
class Speculate(Rewrite[_Guess]):
    name: ClassVar[str] = "speculate"
    on_trial: ClassVar[bool] = True
    confidence: float = 0.9  # how likely a guess must be to be right

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Guess]:
        facts = Facts(graph, costs)
        names: Names | None = None
        for region in walk_regions(graph.body):
            if any(op.name == "ivf.finish" for op in region.ops):
                names = names or Names(names_in(graph))
                yield from _sites(region, facts, names)

    def legal(self, match: _Guess) -> Verdict:
        op = match.op
        if not match.is_certain:
            return Verdict(False, "it is sampled or reads what others may change: two runs may differ")
        if "timeout" in op.attrs or "timeout" in keyword_operands(op):
            return Verdict(False, "its timeout would begin too early")
        if match.slice is None:
            return Verdict(False, "what makes its prompt of the passages may raise or have an effect")
        return Verdict(True, "its answer is taken only if the final prompt is the guessed one")

    def profit(self, match: _Guess, costs: CostModel) -> Estimate:
        p, saved = self.confidence, min(match.gap_s, match.seconds)
        if saved <= costs["substage_s"]:
            return Estimate(0.0, "the rest of its prompt is known no earlier than the search ends")
        gain = p * saved - (1 - p) * saved * costs["waste"]
        return Estimate(max(0.0, gain), f"begins {saved * 1e3:.3g} ms early, in vain with probability {1 - p:.2g}")

    def rewrite(self, match: _Guess) -> Replacement:
        assert match.slice is not None
        op, names = match.op, match.names
        guess, early = Value(names.fresh("guess"), DOCS), Value(names.fresh("early"), AHEAD)
        known = Attrs({"resource": match.resource, "confidence": self.confidence})
        partial = Op("ivf.partial", (match.plan,), (guess,), known, loc=op.loc)
        clones, given = match.slice.cloned(names, {match.docs.name: guess})
        moves = tuple((new, match.before) for new in (partial, *clones, begun_ahead(op, given, early)))
        return Replacement((with_operand(op, "ahead", early),), moves=moves, relaxes=True)


def _sites(region: Region, facts: Facts, names: Names) -> Iterator[_Guess]:
    made = makers_of(region)
    searches = {op.result.name: op for op in region.ops if op.name == "ivf.finish"}
    times = facts.schedule(region)
    for op in region.ops:
        if f"ahead.{op.name}" not in OPS or OPS[op.name].lane != "llm" or "ahead" in keyword_operands(op):
            continue
        found = slice_of(op, region, made, facts, stops=searches)
        inputs = found.sources if found is not None else _behind(op, region, made)
        ends = {v.name: times[made[v.name]][1] for v in inputs if v.name in made}
        last = max((name for name in ends if name in searches), key=ends.__getitem__, default=None)
        if last is None:
            continue
        finish = searches[last]
        scan = facts.definer(finish.operands[0])
        if scan is None or scan.name != "ivf.scan":
            continue
        (plan,) = scan.operands
        others = [made[name] for name in (plan.name, *ends) if name in made and name != last]
        where = max(others, default=-1)
        settled_s = ends[last] - facts.costs.of(scan)["settles"] * facts.costs.own_s(scan)
        yield _Guess(
            op,
            plan=plan,
            docs=finish.result,
            resource=scan.attrs["resource"],
            slice=found,
            before=region.ops[where + 1],
            gap_s=ends[last] - max([settled_s, *(times[i][1] for i in others)]),
            seconds=facts.seconds(op),
            is_certain=facts.is_repeatable(op),
            names=names,
        )


def _behind(op: Op, region: Region, made: dict[str, int]) -> Iterator[Value]:
    """The values that the op's operands are made of, up to a few steps back."""
    values = list(op.operands)
    for _ in range(MAX_OPS):
        yield from values
        values = [v for value in values if value.name in made for v in region.ops[made[value.name]].operands]
        if len(values) > MAX_OPS:
            return
