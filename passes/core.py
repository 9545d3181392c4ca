"""What a pass is: where it could fire, whether it may, whether it pays, and what then stands in its place.

A pass either rewrites site by site (`Rewrite`: match, legal, profit, rewrite, with one driver for all) or looks at the
whole workflow at once (`Pass.run`). Both leave a remark for every site, fired or not.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Generic, TypeVar

from flowc.ir.core import Attr, Graph, Op, Region, Value, walk
from flowc.ir.errors import Loc

from .cost import CostModel


@dataclass(frozen=True, slots=True)
class Verdict:
    """May a rewrite happen here? `why` is a clause that a user reads."""

    is_legal: bool
    why: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a rewrite is predicted to save, in seconds per run; it pays if that is more than nothing."""

    gain_s: float
    why: str = ""

    @property
    def pays(self) -> bool:
        return self.gain_s > 0


@dataclass(frozen=True, slots=True)
class Remark:
    """What a pass decided at one site.

    `verdict` is about legality; `detail` says what was done, or why it does not pay.
    """

    pass_name: str
    op: str
    loc: Loc | None
    fired: bool
    verdict: Verdict
    gain_s: float = 0.0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The rewritten workflow (the same object if nothing changed) and the remarks."""

    graph: Graph
    remarks: tuple[Remark, ...] = ()


class Pass(ABC):
    """A rewrite of a whole workflow. The dataclass fields of a subclass are its options."""

    __slots__ = ()
    name: ClassVar[str]
    covers_callees: ClassVar[bool] = False  # does `run` see to the workflows that are called, too?
    on_trial: ClassVar[bool] = False  # can it lose in practice? Then runs without it are measured now and then

    @abstractmethod
    def run(self, graph: Graph, costs: CostModel) -> Outcome: ...

    def remark(
        self, op: str, loc: Loc | None, verdict: Verdict, *, fired: bool, gain_s: float = 0.0, detail: str = ""
    ) -> Remark:
        return Remark(self.name, op, loc, fired, verdict, gain_s, detail)


@dataclass(slots=True)
class Match:
    """A site. The driver sets `fired` before it asks for the next one: a matcher can build on its last rewrite."""

    op: Op
    fired: bool = False


@dataclass(frozen=True, slots=True)
class Replacement:
    """What stands in place of the matched op: `ops` at its place, `values` for its results.

    `moves` are pairs of an op that leaves its place (or is new) and the op before which it then stands. With `relaxes`
    the region is ordered no longer than its effects need: any region may be, and what the pass put in runs beside it.
    """

    ops: tuple[Op, ...] = ()
    values: Mapping[str, Value] = field(default_factory=dict)
    moves: tuple[tuple[Op, Op], ...] = ()
    removes: tuple[Op, ...] = ()  # other ops that it makes needless
    relaxes: bool = False
    detail: str = ""


M = TypeVar("M", bound=Match)
MAX_ROUNDS = 16  # each round but the last takes operations out of the run; real workflows need two or three


class Rewrite(Pass, Generic[M]):
    """A pass that works site by site."""

    __slots__ = ()

    @abstractmethod
    def match(self, graph: Graph, costs: CostModel) -> Iterator[M]:
        """Every site, in an order in which each sees what the ones before it have become."""

    @abstractmethod
    def legal(self, match: M) -> Verdict: ...

    @abstractmethod
    def profit(self, match: M, costs: CostModel) -> Estimate: ...

    @abstractmethod
    def rewrite(self, match: M) -> Replacement: ...

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        """Rewrites every site that may and pays, again until there is none: a rewrite can open up another."""
        fired: list[Remark] = []
        remarks: list[Remark] = []
        for _ in range(MAX_ROUNDS):
            new, remarks = self._round(graph, costs)
            fired += (r for r in remarks if r.fired)
            if new is graph:
                break
            graph = new
        return Outcome(graph, (*fired, *(r for r in remarks if not r.fired)))

    def _round(self, graph: Graph, costs: CostModel) -> tuple[Graph, list[Remark]]:
        edits = Edits()
        remarks = []
        for match in self.match(graph, costs):
            verdict = self.legal(match)
            estimate = self.profit(match, costs) if verdict.is_legal else Estimate(0.0)
            detail = estimate.why
            if verdict.is_legal and estimate.pays:
                replacement = self.rewrite(match)
                edits.add(match.op, replacement)
                match.fired = True
                detail = replacement.detail or detail
            op, loc, gain = describe(match.op), match.op.loc, estimate.gain_s
            remarks.append(self.remark(op, loc, verdict, fired=match.fired, gain_s=gain, detail=detail))
        body = edits.apply(graph.body)
        return graph if body is graph.body else graph.with_body(body), remarks


class Edits:
    """What the rewrites of one pass change. Applied in a single walk, so that a pass over n operations stays linear."""

    __slots__ = ("_before", "_relaxed", "_replaced", "_values")

    def __init__(self) -> None:
        self._replaced: dict[
            int, tuple[Op, tuple[Op, ...]]
        ] = {}  # by identity; holds the op, so that the id stays its own
        self._before: dict[int, list[Op]] = {}
        self._values: dict[str, Value] = {}
        self._relaxed: set[int] = set()

    def add(self, op: Op, replacement: Replacement) -> None:
        self._replaced[id(op)] = (op, replacement.ops)
        if replacement.relaxes:
            self._relaxed.add(id(op))
        for gone in replacement.removes:
            self._replaced[id(gone)] = (gone, ())
        for moved, before in replacement.moves:
            self._replaced[id(moved)] = (moved, ())
            self._before.setdefault(id(before), []).append(moved)
        for name, value in replacement.values.items():
            assert name != value.name, f"%{name} would stand for itself"
            self._values[name] = value

    def resolve(self, value: Value) -> Value:
        """The value that stands for this one now."""
        found = self._values.get(value.name)
        if found is None:
            return value
        chain = [value.name]
        while (following := self._values.get(found.name)) is not None:
            chain.append(found.name)
            found = following
        for name in chain:
            self._values[name] = found
        return found

    def resolve_all(self, values: tuple[Value, ...]) -> tuple[Value, ...]:
        known = self._values
        for v in values:
            if v.name in known:
                return tuple(map(self.resolve, values))
        return values

    def apply(self, region: Region) -> Region:
        """The region with every edit made; the same object if none touches it."""
        if not (self._replaced or self._values):
            return region
        ops: list[Op] = []
        is_changed = False
        for op in region.ops:
            is_changed |= self._emit(op, ops)
        yields = self.resolve_all(region.yields)
        if not is_changed and yields is region.yields:
            return region
        is_ordered = region.ordered and not any(id(op) in self._relaxed for op in region.ops)
        return Region(region.params, tuple(ops), yields, is_ordered)

    def _emit(self, op: Op, out: list[Op]) -> bool:
        hoisted = self._before.get(id(op), ())
        for moved in hoisted:
            self._put(moved, out)
        replaced = self._replaced.get(id(op))
        if replaced is None:
            return self._put(op, out) or bool(hoisted)
        for new in replaced[1]:
            if new is op:
                self._put(new, out)
            else:
                self._emit(new, out)
        return True

    def _put(self, op: Op, out: list[Op]) -> bool:
        operands = self.resolve_all(op.operands)
        regions = op.regions
        if regions:
            inner = tuple(map(self.apply, regions))
            if any(a is not b for a, b in zip(inner, regions, strict=True)):
                regions = inner
        if operands is op.operands and regions is op.regions:
            out.append(op)
            return False
        out.append(Op(op.name, operands, op.results, op.attrs, regions, op.loc))
        return True


@dataclass(frozen=True, slots=True)
class Additions:
    """What a pass puts into a workflow, by the identity of what stands there: advice, and attributes."""

    at_entry: dict[int, list[Op]] = field(default_factory=dict)  # of a region
    before: dict[int, list[Op]] = field(default_factory=dict)  # an op
    attrs: dict[int, dict[str, Attr]] = field(default_factory=dict)  # of an op

    def apply(self, region: Region) -> Region:
        """The region with all that; the same object if there is nothing for it. Fused runs are left alone."""
        ops: list[Op] = list(self.at_entry.get(id(region), ()))
        for op in region.ops:
            new = op
            if op.regions and op.name != "fused":
                inner = tuple(map(self.apply, op.regions))
                if any(a is not b for a, b in zip(inner, op.regions, strict=True)):
                    new = replace(op, regions=inner)
            attrs = self.attrs.get(id(op))
            if attrs is not None and any(op.attrs.get(n) != a for n, a in attrs.items()):
                new = new.with_attrs(**attrs)
            ops += self.before.get(id(op), ())
            ops.append(new)
        if len(ops) == len(region.ops) and all(a is b for a, b in zip(ops, region.ops, strict=True)):
            return region
        return replace(region, ops=tuple(ops))


def next_site(graph: Graph) -> int:
    """A number that no place of the workflow has."""
    used = (op.attrs.get("site") for op in walk(graph.body))
    return 1 + max((n for n in used if isinstance(n, int)), default=0)


def with_operand(op: Op, name: str, value: Value) -> Op:
    """The op with one more keyword operand."""
    new = op.with_attrs(kw=(*op.attr("kw", ()), name))
    return replace(new, operands=(*op.operands, value))


def map_ops(region: Region, change: Callable[[Op], Op]) -> Region:
    """The region with every op changed, also in the regions of ops (`change` sees an op before its regions change); the
    same object if nothing is."""
    ops = []
    for op in region.ops:
        new = change(op)
        if op.regions:
            inner = tuple(map_ops(r, change) for r in op.regions)
            if any(a is not b for a, b in zip(inner, op.regions, strict=True)):
                new = replace(new, regions=inner)
        ops.append(new)
    return region if all(a is b for a, b in zip(ops, region.ops, strict=True)) else replace(region, ops=tuple(ops))


def describe(op: Op) -> str:
    """An op in a few words: `%draft = generate @default`."""
    target = next((f" @{op.attr(a)}" for a in ("resource", "tool", "callee") if a in op.attrs), "")
    results = ", ".join(map(str, op.results[:3])) + (", ..." if len(op.results) > 3 else "")
    return f"{results} = {op.name}{target}" if results else f"{op.name}{target}"


def plural(count: int, noun: str) -> str:
    """`1 op`, `2 ops`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def listed(words: Iterable[str]) -> str:
    """The words in backquotes, sorted, with commas."""
    return ", ".join(f"`{w}`" for w in sorted(words))
