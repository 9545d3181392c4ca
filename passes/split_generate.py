r"""Compute the KV cache of a prompt's beginning while the rest of the prompt is still being found.

Before:
    workflow @w(%q: text) -> text {
      %docs = search @pydocs (%q) {k = 4} : docs
      %prompt = template "Answer from the passages.\nQuestion: {}\nPassages:\n{}" (%q, %docs) : text
      %answer = generate @llm (%prompt) {max_tokens = 64} : text
      return %answer
    }
After:
    workflow @w(%q: text) -> text {
      %beginning = template "Answer from the passages.\nQuestion: {}\nPassages:\n" (%q) : text
      %kv = llm.prefill @llm (%beginning) : kv
      %docs = search @pydocs (%q) {k = 4} : docs
      %prompt = template "Answer from the passages.\nQuestion: {}\nPassages:\n{}" (%q, %docs) : text
      %answer = generate @llm (%prompt, kv=%kv) {max_tokens = 64} : text
      return %answer
    }

A prompt of which more is known bit by bit is prefilled bit by bit, with `llm.extend`. One of which only constant text
is known early is left to kv-plan: all programs share that.

Source: Tan et al., "Towards End-to-End Optimization of LLM-based Applications with Ayo", ASPLOS 2025, prefill
splitting, there by a regular expression on the template; "Stream2LLM", MLSys 2026, for the pieces.
Legal when: formatting the slots of the beginning early has no effect, cannot raise and gives the same text: built-in
immutable values, without a format specification.
Pays when: the time that the beginning waits for the rest, or its prefill if that is shorter, is more than a turn on
the lane; it has at least one block of tokens more than what was prefilled before it, or than the earlier prompt that
it continues; and it is among the best few.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Attrs, Graph, Names, Op, Region, Value, names_in, walk_regions
from flowc.ir.ops import keyword_operands
from flowc.ir.types import KV, TEXT

from .core import Estimate, Match, Replacement, Rewrite, Verdict, plural, with_operand
from .cost import CostModel
from .facts import Facts
from .prompts import Part, Slot, own_parts, parts_of, template_of, tokens_of

_TAKES_KV = frozenset({"generate", "choose", "parse"})


@dataclass(frozen=True, slots=True)
class _Beginning:
    """So much of a prompt is known at `at_s`, once the op before `before` has given the last of it."""

    parts: tuple[Part, ...]
    at_s: float
    before: Op


@dataclass(slots=True, kw_only=True)
class _Prompt(Match):
    """An op and the beginnings of its prompt, shortest first; `unsafe` is the slot that ends the last of them."""

    beginnings: tuple[_Beginning, ...]
    begins_s: float
    unsafe: Slot | None
    names: Names
    chosen: tuple[_Beginning, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitGenerate(Rewrite[_Prompt]):
    name: ClassVar[str] = "split-generate"
    on_trial: ClassVar[bool] = True
    most: int = 3  # beginnings of one prompt

    def match(self, graph: Graph, costs: CostModel) -> Iterator[_Prompt]:
        facts = Facts(graph, costs)
        names: Names | None = None
        for region in walk_regions(graph.body):
            if not any(op.name in _TAKES_KV for op in region.ops):
                continue
            made = {v.name: i for i, op in enumerate(region.ops) for v in op.results}
            times = facts.schedule(region)
            for op, (begins_s, _) in zip(region.ops, times, strict=True):
                if op.name not in _TAKES_KV or "kv" in keyword_operands(op):
                    continue
                maker = made.get(op.operands[0].name)
                if maker is None or region.ops[maker].name != "template":
                    continue
                names = names or Names(names_in(graph))
                cached = _cached(region.ops[maker], op, facts)
                beginnings, unsafe = _beginnings(parts_of(op.operands[0], facts), cached, region, made, times)
                yield _Prompt(op, beginnings=beginnings, begins_s=begins_s, unsafe=unsafe, names=names)

    def legal(self, match: _Prompt) -> Verdict:
        if match.unsafe is not None and not any(isinstance(p, Slot) for b in match.beginnings for p in b.parts):
            return Verdict(False, f"formatting {match.unsafe.value} early may have an effect or raise")
        return Verdict(True, "what is known early is formatted without effect or error")

    def profit(self, match: _Prompt, costs: CostModel) -> Estimate:
        rates = costs.of(match.op)
        done = 0.0
        found: list[tuple[float, _Beginning]] = []
        following = [*(b.at_s for b in match.beginnings[1:]), match.begins_s]
        for beginning, next_s in zip(match.beginnings, following, strict=False):
            tokens = sum(tokens_of(p, costs) for p in beginning.parts) - done
            saved = min(next_s - beginning.at_s, tokens * rates["llm_s_per_prompt_token"])
            is_shared = all(isinstance(p, str) for p in beginning.parts)
            if is_shared or saved <= rates["substage_s"] or tokens < costs["kv_block_tokens"]:
                continue
            found.append((saved, beginning))
            done += tokens
        found = sorted(found, key=lambda f: f[0], reverse=True)[: self.most]
        match.chosen = tuple(sorted((b for _, b in found), key=lambda b: len(b.parts)))
        if not found:
            return Estimate(0.0, "nothing new but constant text is known much earlier than the rest")
        gain_s = sum(saved for saved, _ in found)
        return Estimate(gain_s, f"{plural(len(found), 'beginning')} of its prompt computed early")

    def rewrite(self, match: _Prompt) -> Replacement:
        op, names = match.op, match.names
        resource = Attrs({"resource": op.attrs["resource"]})
        moves: list[tuple[Op, Op]] = []
        kv: Value | None = None
        for beginning in match.chosen:
            text = Value(names.fresh("beginning"), TEXT)
            more = Value(names.fresh("kv"), KV)
            template = template_of(beginning.parts, text, op)
            known = (text,) if kv is None else (kv, text)
            step = Op("llm.prefill" if kv is None else "llm.extend", known, (more,), resource, loc=op.loc)
            moves += (template, beginning.before), (step, beginning.before)
            kv = more
        assert kv is not None
        return Replacement((with_operand(op, "kv", kv),), moves=tuple(moves))


def _cached(template: Op, op: Op, facts: Facts) -> int:
    """How many of a prompt's parts are the prompt of another generation: that has computed them."""
    first = next(own_parts(template), None)
    if not isinstance(first, Slot) or first.form:
        return 0
    readers = facts.readers(first.value)
    if not any(user is not op and user is not None and user.name in _TAKES_KV and i == 0 for user, i in readers):
        return 0
    return len(parts_of(first.value, facts))


def _beginnings(
    parts: list[Part], cached: int, region: Region, made: dict[str, int], times: list[tuple[float, float]]
) -> tuple[tuple[_Beginning, ...], Slot | None]:
    """The beginnings of a prompt that are known at different times, and the slot that may not be formatted early."""
    found: list[_Beginning] = []
    at_s, where = 0.0, -1  # when and where all parts so far are known
    for i, part in enumerate(parts):
        if isinstance(part, str):
            continue
        if not part.shows_safely:
            return (*found, *(_until(parts, i, at_s, where, region) if i > cached else ())), part
        maker = made.get(part.value.name, -1)
        ready_s = times[maker][1] if maker >= 0 else 0.0
        if ready_s > at_s and i > cached:
            found += _until(parts, i, at_s, where, region)
        at_s, where = max(at_s, ready_s), max(where, maker)
    return tuple(found), None


def _until(parts: list[Part], end: int, at_s: float, where: int, region: Region) -> tuple[_Beginning, ...]:
    return (_Beginning(tuple(parts[:end]), at_s, region.ops[where + 1]),) if end else ()
