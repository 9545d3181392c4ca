"""Outline runs of plain Python into one operation: no turn of the scheduler between them.

Before:
    workflow @w(%q: text) -> text {
      %clean = py "q.strip()" (%q) : text
      %prompt = template "Answer: {}" (%clean) : text
      %answer = generate @llm (%prompt) {max_tokens = 64} : text
      %line = py "answer.splitlines()[0]" (%answer) {raises = true} : text
      %shout = py "line.upper()" (%line) : text
      return %shout
    }
After:
    workflow @w(%q: text) -> text {
      %prompt = fused : text body seq {
        %clean = py "q.strip()" (%q) : text
        %prompt.1 = template "Answer: {}" (%clean) : text
        yield %prompt.1
      }
      %answer = generate @llm (%prompt) {max_tokens = 64} : text
      %shout = fused : text body seq {
        %line = py "answer.splitlines()[0]" (%answer) {raises = true} : text
        %shout.1 = py "line.upper()" (%line) : text
        yield %shout.1
      }
      return %shout
    }

Source: task fusion as in Dask's `optimization.fuse` and in tinygrad's kernel grouping; that a cluster must not wait
longer than its members would is the condition of Kennedy and McKinley, "Maximizing Loop Parallelism and Improving
Data Locality via Loop Fusion and Distribution", 1993, for parallel loops.
Legal when: every member is plain Python; the group stands where its first member stood, so nothing that a later member
depends on, by data, by state or by the order of errors and effects, stands between; hence groups are convex and never
wait for each other in a circle. A handler's Python that awaits keeps its turn, and so does a member of a gather group.
Pays when: the turns saved are more than none, and no member is delayed: all members become ready together, because
the waiting operations before them are the same; and one that may take long (it is opaque, or may raise) joins only a
run that no waiting operation interrupts. Python that awaits joins only a straight run of plain Python, which becomes
one coroutine: in an ordered region always, in another where each member needs the awaiting one before it and nothing
outside could use what one of them gives before the run ends. A `fused` operation is final: it joins no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

from flowc.ir.core import Graph, Names, Op, Region, Value, names_in, substitute
from flowc.ir.effects import has_groups
from flowc.ir.ops import OPS
from flowc.ir.verifier import is_plain

from .core import Outcome, Pass, Remark, Verdict, describe, plural
from .cost import CostModel
from .facts import STATIC, Facts

_TOGETHER = Verdict(True, "nothing that must stay in order stands between, and all become ready together")
_AWAITS = Verdict(False, "it awaits, so it keeps a turn of its own")
_IN_TURN = Verdict(True, "each needs the one before it, and nothing else could start in between")
_BETWEEN = Verdict(False, "something that must run between stands between it and the group before")
_ALONE = Verdict(True, "plain Python")
_NO_COMPANY = "no other plain Python becomes ready with it"
_SLOW = "it may take long, and would hold up what the group before it starts"


@dataclass(slots=True)
class _Unit:
    """Positions of ops that become one op; `verdict` and `why` say why the first of them joined no unit before it."""

    members: list[int]
    is_plain: bool = False
    verdict: Verdict = _ALONE
    why: str = _NO_COMPANY


@dataclass(frozen=True, slots=True)
class FusePy(Pass):
    name: ClassVar[str] = "fuse-py"
    min_turns: float = 1.0  # turns of the scheduler that a group must save

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        remarks: list[Remark] = []
        names: list[Names] = []  # built when the first group is found

        def on_region(region: Region, is_handler: bool = False) -> Region:
            if not is_handler:  # its Python may look at the error that is handled, which a coroutine does not see
                region = on_runs(region)
            units = _units(region, facts)
            outside = _used_outside(region, units, facts)
            ops: list[Op] = []
            is_changed = False
            for unit in units:
                members = [region.ops[i] for i in unit.members]
                new = on_group(unit, members, outside) if unit.is_plain else [on_single(members[0], is_handler)]
                is_changed |= len(new) != len(members) or new[0] is not members[0]
                ops += new
            return replace(region, ops=tuple(ops)) if is_changed else region

        def on_runs(region: Region) -> Region:
            ops = list(region.ops)
            runs = _awaiting_runs(region, facts)
            run_of = {i: n for n, run in enumerate(runs) for i in run}
            outside = _used_elsewhere(region, run_of, facts) if runs else set()
            for run in reversed(runs):
                members = [region.ops[i] for i in run]
                saved = sum(map(facts.turns, members)) - 1
                if saved < self.min_turns:
                    continue
                if not names:
                    names.append(Names(names_in(graph)))
                gain_s, loc = saved * costs.turn_s, members[0].loc
                detail = f"{plural(len(members), 'operation')} in one coroutine"
                what = describe(members[0])
                remarks.append(self.remark(what, loc, _IN_TURN, fired=True, gain_s=gain_s, detail=detail))
                literals = [region.ops[i] for i in range(run[0], run[-1]) if i not in run_of]
                ops[run[0] : run[-1] + 1] = [*literals, _outline(members, outside, names[0])]
            return region if len(ops) == len(region.ops) else replace(region, ops=tuple(ops))

        def on_single(op: Op, is_handler: bool) -> Op:
            if op.name == "py" and facts.waits(op):
                remarks.append(self.remark(describe(op), op.loc, _AWAITS, fired=False))
            if op.name == "fused" or not op.regions:
                return op
            inner = tuple(on_region(r, is_handler or (op.name == "try" and i > 0)) for i, r in enumerate(op.regions))
            return op if all(a is b for a, b in zip(inner, op.regions, strict=True)) else replace(op, regions=inner)

        def on_group(unit: _Unit, members: list[Op], outside: set[str]) -> list[Op]:
            first = next((op for op in members if op.name not in STATIC), members[0])
            saved = sum(map(facts.turns, members)) - 1
            gain_s = max(0.0, saved) * costs.turn_s
            if saved < self.min_turns:
                if first.name not in STATIC:
                    remarks.append(
                        self.remark(
                            describe(first), first.loc, unit.verdict, fired=False, gain_s=gain_s, detail=unit.why
                        )
                    )
                return members
            if not names:
                names.append(Names(names_in(graph)))
            detail = f"{plural(len(members), 'operation')} in one turn"
            remarks.append(self.remark(describe(first), first.loc, _TOGETHER, fired=True, gain_s=gain_s, detail=detail))
            return [_outline(members, outside, names[0])]

        body = on_region(graph.body)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def _outline(members: list[Op], outside: set[str], names: Names) -> Op:
    """One op that runs the members. What others use keeps its name; inside it gets a new one."""
    results = [v for op in members for v in op.results if v.name in outside]
    inner = {v.name: Value(names.fresh(v.name), v.type) for v in results}
    body = substitute(Region((), tuple(members), tuple(results)), inner)
    ops = tuple(
        replace(op, results=tuple(inner.get(v.name, v) for v in op.results))
        if any(v.name in inner for v in op.results)
        else op
        for op in body.ops
    )
    loc = next((op.loc for op in members if op.loc is not None), None)
    return Op("fused", (), tuple(results), regions=(Region((), ops, body.yields),), loc=loc)


def _awaiting_runs(region: Region, facts: Facts) -> list[list[int]]:
    """Positions of straight runs of plain Python that awaits, which delay nobody as one coroutine."""
    ops = region.ops
    joins = [_is_python(op) for op in ops]
    if not any(_awaits(op) and join for op, join in zip(ops, joins, strict=True)):
        return []
    if region.ordered and not has_groups(region):
        return [
            run
            for run in _consecutive([j or op.name in STATIC for j, op in zip(joins, ops, strict=True)])
            if any(_awaits(ops[i]) for i in run)
            for run in ([i for i in run if ops[i].name not in STATIC],)
        ]
    users: list[list[int]] = [[] for _ in ops]
    needs: list[int] = []  # the waiting ops that one waits for, directly or not, as bits
    bits: list[int] = []  # of an op that waits
    count = 0
    for i, (data, state) in enumerate(zip(facts.data_dependencies(region), facts.order(region), strict=True)):
        found = 0
        for d in data.union(state):
            found |= needs[d] | bits[d]
            users[d].append(i)
        needs.append(found)
        is_waiting = facts.waits(ops[i])
        bits.append(1 << count if is_waiting else 0)
        count += is_waiting
    is_quick = [_is_quick(op, facts) for op in ops]
    runs: list[list[int]] = []
    run: list[int] = []
    own = last = 0  # bits of the run, and of the last op of it that awaits
    for i, op in enumerate(ops):
        if op.name in STATIC:
            continue
        is_straight = needs[i] & last or is_quick[i]
        if not (run and joins[i] and is_straight and not needs[i] & ~own & ~needs[run[0]]):
            runs.append(run)
            run, own = [], 0
            if not _awaits(op) or not joins[i]:
                continue
        run.append(i)
        own |= bits[i]
        last = bits[i] or last
    runs.append(run)
    return [part for run in runs for part in _undelayed(run, ops, users, needs, bits, is_quick)]


def _undelayed(
    run: list[int], ops: tuple[Op, ...], users: list[list[int]], needs: list[int], bits: list[int], is_quick: list[bool]
) -> Iterator[list[int]]:
    """The run in pieces, cut where something outside could start."""
    members = set(run)
    last = next((bits[i] for i in reversed(run) if bits[i]), 0)
    piece: list[int] = []
    for i in run:
        if piece or _awaits(ops[i]):
            piece.append(i)
        if i == run[-1] or any(u not in members and not needs[u] & last for u in users[i]):
            while piece and not _awaits(ops[piece[-1]]) and not is_quick[piece[-1]]:
                piece.pop()  # it may take long, and others may wait for the one before it alone
            if len(piece) > 1:
                yield piece
            piece = []


def _consecutive(wanted: list[bool]) -> Iterator[list[int]]:
    for is_wanted, positions in groupby(range(len(wanted)), wanted.__getitem__):
        if is_wanted:
            yield list(positions)


def _awaits(op: Op) -> bool:
    return op.name == "py" and bool(op.attrs.get("is_async"))


def _is_quick(op: Op, facts: Facts) -> bool:
    """Does it take no time worth speaking of, and can nobody tell when it runs?"""
    return (
        OPS[op.name].lane == "python"
        and not facts.waits(op)
        and not facts.is_observable(op)
        and facts.effect(op).is_pure
    )


def _may_join(op: Op, facts: Facts) -> bool:
    """Is it plain Python of a turn of its own?"""
    return is_plain(op) and not facts.waits(op) and op.name != "fused"


def _is_python(op: Op) -> bool:
    """May it be part of a coroutine?"""
    if "group" in op.attrs or op.name in STATIC or op.name in ("cell", "fused"):
        return False
    return op.name == "py" or is_plain(op)


def _used_outside(region: Region, units: list[_Unit], facts: Facts) -> set[str]:
    """Names of the values that a unit gives to another one, or that the region yields."""
    return _used_elsewhere(region, {i: u for u, unit in enumerate(units) for i in unit.members}, facts)


def _used_elsewhere(region: Region, unit_of: dict[int, int], facts: Facts) -> set[str]:
    maker = {v.name: unit_of.get(i) for i, op in enumerate(region.ops) for v in op.results}
    used = {v.name for v in region.yields}
    for i, op in enumerate(region.ops):
        unit = unit_of.get(i)
        used.update(name for name in facts.uses(op) if unit is None or maker.get(name, unit) != unit)
    return used


def _units(region: Region, facts: Facts) -> list[_Unit]:
    """The ops of a region in groups, each to stand where its first member stood.

    Groups are numbered as they are begun. An op joins the open group of its readiness class only if everything it must
    follow is in that group or in one begun before; so every dependency between groups points back, and the order in
    which they were begun is a legal program order.
    """
    data = facts.data_dependencies(region)
    state = facts.order(region, ordered=False)
    apart: set[int] = set()
    while True:
        units = _units_with(region, facts, data, state, apart)
        unit_of = {i: u for u, unit in enumerate(units) for i in unit.members}
        escaping = {
            d
            for i, deps in enumerate(data)
            for d in deps
            if region.ops[d].name == "cell" and unit_of[d] != unit_of[i] and d not in apart
        }
        if not escaping:
            return units
        apart |= escaping  # no op gives a variable's cell to another: it stays apart, or goes with all its uses


def _units_with(
    region: Region, facts: Facts, data: list[set[int]], state: list[tuple[int, ...]], apart: set[int]
) -> list[_Unit]:
    ops = region.ops
    is_quick = [_is_quick(op, facts) for op in ops]
    ready = _readiness(region, data, state, is_quick, facts)
    unit_of: list[int] = []
    units: list[_Unit] = []
    open_units: dict[int, int] = {}
    last_observable = last_waiting = -1
    for i, op in enumerate(ops):
        follows = max((unit_of[d] for deps in (data[i], state[i]) for d in deps), default=-1)
        if facts.is_observable(op):
            follows = max(follows, last_observable)
        if not _may_join(op, facts) or i in apart:
            unit = len(units)
            units.append(_Unit([i]))
            if op.name == "fused":
                open_units.pop(ready[i], None)
            elif facts.waits(op):
                last_waiting = unit
        else:
            unit = open_units.get(ready[i], -1)
            if unit >= 0 and follows <= unit and (is_quick[i] or unit > last_waiting):
                units[unit].members.append(i)
            else:
                new = _Unit([i], is_plain=True)
                if unit >= 0:
                    new.verdict, new.why = (_BETWEEN, "") if follows > unit else (_ALONE, _SLOW)
                unit = open_units[ready[i]] = len(units)
                units.append(new)
        unit_of.append(unit)
        if facts.is_observable(op):
            last_observable = max(last_observable, unit)
    return units


def _readiness(
    region: Region, data: list[set[int]], state: list[tuple[int, ...]], is_quick: list[bool], facts: Facts
) -> list[int]:
    """For each op its readiness class: equal for two ops that wait for the same waiting operations, directly or not.

    In an ordered region the class is the number of waiting ops before; in another it is the set of them, as bits. A
    quick op, whose time does not matter, counts as ready when its users are, if they agree and other plain Python is
    ready then: what only one place uses belongs there.
    """
    ops = region.ops
    count = 0
    before: list[int] = []  # waiting ops that stand before
    classes: list[int] = []
    done: list[int] = []  # what an op's users wait for: its class, and itself if it waits
    for i, op in enumerate(ops):
        before.append(count)
        if region.ordered:
            classes.append(count)
            count += facts.waits(op)
            continue
        bits = 0
        for deps in (data[i], state[i]):
            for d in deps:
                bits |= done[d]
        classes.append(bits)
        if facts.waits(op):
            bits |= 1 << count
            count += 1
        done.append(bits)
    if region.ordered:
        return classes
    company = Counter(c for c, op in zip(classes, ops, strict=True) if not facts.waits(op) and op.name not in STATIC)
    wanted: list[int | None] = [None] * len(ops)  # the class of all users so far; -1 where they disagree
    yielded = {v.name for v in region.yields}
    for i in range(len(ops) - 1, -1, -1):
        later = wanted[i]
        if (
            is_quick[i]
            and later is not None
            and later.bit_length() <= before[i]
            and later >= 0
            and company[later]
            and not any(v.name in yielded for v in ops[i].results)
        ):
            classes[i] = later
        for d in data[i]:
            wanted[d] = classes[i] if wanted[d] in (None, classes[i]) else -1
    return classes
