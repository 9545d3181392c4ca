"""Drop operations whose results nobody uses, and values that loops and branches carry for nobody.

Before:
    workflow @w(%q: text, %xs: list<text>) -> list<text> seq {
      %unused = template "Question: {}" (%q) : text
      %last = undef : never
      %last.1, %out = foreach (%xs, %last) {collects = 1} : text, list<text> body (%x: text, %last.2: text) seq {
        %docs = search @pydocs (%x) {k = 2} : docs
        %note = template "{}" (%docs) : text
        %item = py "[note]" (%note) : list<text>
        yield %note, %item
      }
      return %out
    }
After:
    workflow @w(%q: text, %xs: list<text>) -> list<text> seq {
      %out = foreach (%xs) {collects = 1} : list<text> body (%x: text) seq {
        %docs = search @pydocs (%x) {k = 2} : docs
        %note = template "{}" (%docs) : text
        %item = py "[note]" (%note) : list<text>
        yield %item
      }
      return %out
    }

Source: Cytron et al., "Efficiently Computing Static Single Assignment Form and the Control Dependence Graph", 1991,
section 7.1: mark what is observable, follow operands and control, sweep the rest. So a value that only feeds itself
around a loop is dead.
Legal when: the operation writes nothing and cannot raise, and no result of it reaches an operation that stays or the
workflow's result. A variable's cell and what is stored in it are dead when nothing loads it.
Pays when: always.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Graph, Op, Region, Value, walk
from flowc.ir.ops import OPS

from .core import Outcome, Pass, Remark, Verdict, describe, plural
from .cost import CostModel
from .facts import STATIC, Facts

_UNUSED = Verdict(True, "nothing uses its result, it writes nothing and cannot raise")
_UNLOADED = Verdict(True, "nothing loads the variable")


@dataclass(frozen=True, slots=True)
class Dce(Pass):
    name: ClassVar[str] = "dce"

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        live = _Liveness(graph, facts)
        remarks: list[Remark] = []

        def sweep(region: Region, keep: list[bool] | None = None, keep_params: list[bool] | None = None) -> Region:
            ops: list[Op] = []
            is_changed = False
            for op in region.ops:
                if id(op) not in live.ops:
                    is_changed = True
                    remarks.append(drop(op))
                    continue
                new = on_control(op) if op.regions else op
                is_changed |= new is not op
                ops.append(new)
            params = _kept(region.params, keep_params)
            yields = _kept(region.yields, keep)
            if not is_changed and params is region.params and yields is region.yields:
                return region
            return Region(params, tuple(ops), yields, region.ordered)

        def drop(op: Op) -> Remark:
            effect = facts.own_effect(op)
            kept = _unused_but_kept(op, effect.writes, effect.may_raise)
            assert kept is None or op.name in ("cell", "store"), kept
            verdict = _UNLOADED if op.name in ("cell", "store") else _UNUSED
            return self.remark(describe(op), op.loc, verdict, fired=True, gain_s=facts.seconds(op))

        def on_control(op: Op) -> Op:
            slots = [(id(op), i) in live.slots for i in range(len(op.results))]
            operands, attrs = op.operands, op.attrs
            yes = [True]
            regions: tuple[Region, ...]
            match op.name:
                case "while":
                    cond, body = op.regions
                    regions = (sweep(cond, None, slots), sweep(body, yes + slots, slots))
                    operands = _kept(operands, slots)
                case "foreach":
                    carried = slots[: len(operands) - 1]
                    head = yes if attrs.get("breaks") else []
                    regions = (sweep(op.regions[0], head + slots, yes + carried),)
                    operands = _kept(operands, yes + carried)
                    collects = sum(slots[len(carried) :])
                    attrs = _collecting(op, collects).attrs
                case "llm.each":
                    slots[:2] = [True, True]  # the text and its items
                    regions = (sweep(op.regions[0], slots[2:]),)
                    attrs = _collecting(op, sum(slots[2:])).attrs
                case _:
                    regions = tuple(sweep(region, slots) for region in op.regions)
            results = _kept(op.results, slots)
            if results is not op.results:
                gone = [v for v, k in zip(op.results, slots, strict=True) if not k]
                detail = f"no longer carries {', '.join(map(str, gone))}"
                remarks.append(self.remark(describe(op), op.loc, _UNUSED, fired=True, detail=detail))
            elif all(a is b for a, b in zip(regions, op.regions, strict=True)):
                return op
            return Op(op.name, operands, results, attrs, regions, op.loc)

        for op in walk(graph.body):
            reason = _unused_but_kept(op, facts.own_effect(op).writes, facts.own_effect(op).may_raise)
            if (
                reason is not None
                and op.results
                and facts.waits(op)
                and not live.used.intersection(v.name for v in op.results)
            ):
                remarks.append(
                    self.remark(describe(op), op.loc, Verdict(False, reason), fired=False, gain_s=facts.seconds(op))
                )
        body = sweep(graph.body)
        fired = sum(r.fired for r in remarks)
        assert (body is graph.body) == (not fired), f"dce: {plural(fired, 'remark')} for {graph}"
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def _unused_but_kept(op: Op, writes: frozenset[str], may_raise: bool) -> str | None:
    if op.name in STATIC or not (writes or may_raise):
        return None
    return "its result is not used, but it writes" if writes else "its result is not used, but it may raise"


def _collecting(op: Op, lists: int) -> Op:
    if lists == op.attrs.get("collects", 0):
        return op
    return op.with_attrs(collects=lists) if lists else op.without_attrs("collects")


def _kept(values: tuple[Value, ...], keep: list[bool] | None) -> tuple[Value, ...]:
    if keep is None or all(keep):
        return values
    return tuple(v for v, k in zip(values, keep, strict=True) if k)


class _Liveness:
    """Marks operations and carried slots that something observable depends on.

    A *slot* is one value that a control operation carries: an `if` result with what its regions yield for it, a loop's
    operand, parameter, next value and result.
    """

    __slots__ = ("_facts", "_given", "_owner", "_stores", "_work", "ops", "slots", "used")

    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.ops: set[int] = set()
        self.slots: set[tuple[int, int]] = set()
        self.used: set[str] = set()
        self._facts = facts
        self._given: dict[str, tuple[Op, int | None]] = {}  # value -> (op that gives it, slot if it is carried)
        self._owner: dict[int, Op] = {}
        self._stores: dict[str, list[Op]] = {}
        self._work: list[str] = []
        roots: list[Op] = []
        self._scan(graph.body, None, roots)
        for op in roots:
            self._mark_op(op)
        self._use(*graph.body.yields)
        self._run()

    def _scan(self, region: Region, owner: Op | None, roots: list[Op]) -> None:
        for op in region.ops:
            if owner is not None:
                self._owner[id(op)] = owner
            for i, v in enumerate(op.results):
                self._given[v.name] = (op, i if op.regions else None)
            own = self._facts.own_effect(op)
            if op.name == "store":
                self._stores.setdefault(op.operands[0].name, []).append(op)
            elif (OPS[op.name].is_advice and not op.results) or (op.name != "cell" and (own.writes or own.may_raise)):
                roots.append(op)
            for inner in op.regions:
                first = 1 if op.name == "foreach" else 0
                for i, p in enumerate(inner.params):
                    carried = op.name in ("while", "foreach") and i >= first
                    self._given[p.name] = (op, i - first if carried else None)
                self._scan(inner, op, roots)

    def _use(self, *values: Value) -> None:
        for v in values:
            if v.name not in self.used:
                self.used.add(v.name)
                self._work.append(v.name)

    def _run(self) -> None:
        while self._work:
            name = self._work.pop()
            given = self._given.get(name)
            if given is None:
                continue
            op, slot = given
            self._mark_op(op)
            if slot is not None:
                self._mark_slot(op, slot)

    def _mark_op(self, op: Op | None) -> None:
        while op is not None and id(op) not in self.ops:
            self.ops.add(id(op))
            match op.name:
                case "while":
                    self._use(op.regions[0].yields[0], op.regions[1].yields[0])
                case "foreach":
                    self._use(op.operands[0])
                    if op.attrs.get("breaks"):
                        self._use(op.regions[0].yields[0])
                case "load":
                    self._use(op.operands[0])
                    for store in self._stores.get(op.operands[0].name, ()):
                        self._mark_op(store)
                case _:
                    self._use(*op.operands)
            op = self._owner.get(id(op))

    def _mark_slot(self, op: Op, slot: int) -> None:
        if (id(op), slot) in self.slots:
            return
        self.slots.add((id(op), slot))
        match op.name:
            case "while":
                self._use(op.operands[slot], op.regions[1].yields[slot + 1])
            case "foreach":
                if slot < len(op.operands) - 1:
                    self._use(op.operands[slot + 1])
                self._use(op.regions[0].yields[slot + bool(op.attrs.get("breaks"))])
            case "llm.each":
                self._use(*op.regions[0].yields[slot - 2 : slot - 1] if slot > 1 else ())
            case _:
                for region in op.regions:
                    self._use(region.yields[slot])
