"""What the passes know of a workflow: effects, uses, dependencies, which operations wait, how long things take.

Everything is computed when first asked for and kept by the identity of the op, so that looking at an operation from
each enclosing region costs once. Facts hold for the ops they were asked about; a rewritten op is a new op.
"""

from __future__ import annotations

import ast
import heapq
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from flowc.ir.core import Attr, Graph, Op, Region, Value, walk
from flowc.ir.effects import has_groups, order_edges
from flowc.ir.ops import OPS, PURE, Effect, effect_of, truth_effect
from flowc.ir.types import NEVER, RANGE, Type

from .cost import CostModel

STATIC = frozenset({"const", "undef"})
"""Known before the run: a plan holds them in slots from the start, so they take no turn."""

LOOPS = frozenset({"while", "foreach", "llm.each"})
"""Their bodies may run more than once."""

UNIQUE = frozenset({"bound", "load"})
"""They give back an object that exists already; every other op that makes a list makes a new one."""

_IDENTITY = re.compile(r"\b(is|id)\b")  # Python text that may tell two equal objects apart
_FROZEN_ATOMS = frozenset({"text", "int", "float", "bool", "none", "bytes", "doc", "docs", "range", "never"})


def is_frozen(t: Type) -> bool:
    """Is no object of this type ever changed in place? (`list<T>` is a value to the IR, but an object to the user.)"""
    return t.name in _FROZEN_ATOMS or (t.name == "tuple" and all(map(is_frozen, t.args)))


def has_plain_truth(t: Type) -> bool:
    """Is `bool(value)` known to run no user code and to raise nothing?"""
    return t != NEVER and not truth_effect(t).may_raise


def iterates_safely(t: Type) -> bool:
    """Is iterating over a value of this type known to run no user code and to raise nothing?"""
    return t.name in ("list", "tuple", "range", "docs", "text", "bytes")


def is_begun(op: Op) -> bool:
    """Is it done as soon as it has begun: advice, or work begun ahead, which its taker waits for?"""
    return OPS[op.name].is_advice or op.name.startswith("ahead.")


class Facts:
    """Facts about one workflow, computed on demand."""

    __slots__ = (
        *("_called", "_callers", "_definers", "_effects", "_held", "_readers", "_seconds", "_uses", "_waits"),
        *("costs", "graph"),
    )

    def __init__(self, graph: Graph, costs: CostModel, callers: tuple[Graph, ...] = ()) -> None:
        self.graph = graph
        self.costs = costs
        self._callers = callers
        self._called: dict[str, float] = {}
        self._held: list[Op | Region] = []  # keeps the keys' ids taken
        self._effects: dict[int, Effect] = {}
        self._uses: dict[int, tuple[str, ...]] = {}
        self._waits: dict[int, bool] = {}
        self._seconds: dict[int, float] = {}
        self._definers: dict[str, Op] | None = None
        self._readers: dict[str, list[tuple[Op | None, int]]] | None = None

    # -- effects
    def effect(self, op: Op) -> Effect:
        """`effect_of(op)`, with inner effects remembered."""
        found = self._effects.get(id(op))
        if found is None:
            if not op.regions:
                found = effect_of(op)
            else:
                found = self.own_effect(op)
                handlers = op.attrs.get("handlers")
                for index, region in enumerate(op.regions):
                    inner = self.region_effect(region)
                    if op.name == "try" and index == 0 and isinstance(handlers, tuple) and "" in handlers:
                        inner = Effect(inner.reads, inner.writes, False, inner.is_sampled)
                    found |= inner
            self._effects[id(op)] = found
            self._held.append(op)
        return found

    def own_effect(self, op: Op) -> Effect:
        """The op's effect without that of its regions."""
        if not op.regions:
            return self.effect(op)
        effect = effect_of(Op(op.name, op.operands, op.results, op.attrs, (), op.loc))
        return effect | truth_effect(op.regions[0].yields[0].type) if op.name == "while" else effect

    def region_effect(self, region: Region) -> Effect:
        effect = PURE
        own: set[str] = set()
        for op in region.ops:
            inner = self.effect(op)
            if inner is not PURE:
                effect = effect | inner if effect is not PURE else inner
            if op.name == "cell":
                own.add(f"cell:{op.results[0].name}")
        if own:
            effect = Effect(effect.reads - own, effect.writes - own, effect.may_raise, effect.is_sampled)
        return effect

    def is_observable(self, op: Op) -> bool:
        """Can anybody tell when it runs relative to others: does it write, or may it raise?"""
        effect = self.effect(op)
        return effect.may_raise or bool(effect.writes)

    def is_repeatable(self, op: Op) -> bool:
        """Does running it twice, nothing of this workflow's having changed in between, give equal results?

        What it reads must be state that only this workflow changes while it runs: an index opened for reading, or a
        variable. Advice is given for when it is given.
        """
        effect = self.effect(op)
        return (
            not OPS[op.name].is_advice
            and not effect.writes
            and not effect.is_sampled
            and all(state.startswith(("index:", "cell:")) for state in effect.reads)
        )

    # -- uses
    def uses(self, op: Op) -> tuple[str, ...]:
        """Names of the values from outside that the op and everything in it use, in order of first use."""
        found = self._uses.get(id(op))
        if found is None:
            if not op.regions:
                found = tuple([v.name for v in op.operands])
            else:
                names = dict.fromkeys(v.name for v in op.operands)
                for region in op.regions:
                    defined = {p.name for p in region.params}
                    used: dict[str, None] = {}
                    for inner in region.ops:
                        used.update(dict.fromkeys(self.uses(inner)))
                        defined.update(v.name for v in inner.results)
                    used.update(dict.fromkeys(v.name for v in region.yields))
                    names.update((name, None) for name in used if name not in defined)
                found = tuple(names)
            self._uses[id(op)] = found
            self._held.append(op)
        return found

    def definer(self, value: Value) -> Op | None:
        """The op that gives the value; None for a parameter of a region."""
        if self._definers is None:
            self._definers = {v.name: op for op in walk(self.graph.body) for v in op.results}
        return self._definers.get(value.name)

    def readers(self, value: Value) -> list[tuple[Op | None, int]]:
        """(op, operand index) of each use of the value in the graph; (None, i) where a region yields it."""
        if self._readers is None:
            table: dict[str, list[tuple[Op | None, int]]] = {}

            def visit(region: Region) -> None:
                for op in region.ops:
                    for i, v in enumerate(op.operands):
                        table.setdefault(v.name, []).append((op, i))
                    for inner in op.regions:
                        visit(inner)
                for i, v in enumerate(region.yields):
                    table.setdefault(v.name, []).append((None, i))

            visit(self.graph.body)
            self._readers = table
        return self._readers.get(value.name, [])

    def is_shareable(self, op: Op) -> bool:
        """May one run's results stand for several runs'?

        A new list is a new object: it may be shared only where every use just reads it, so that nobody can tell.
        """
        if op.name in UNIQUE:
            return True
        return all(
            is_frozen(v.type) or all(user is not None and self.only_reads(user, i) for user, i in self.readers(v))
            for v in op.results
        )

    def only_reads(self, op: Op, operand: int) -> bool:
        """Does the op neither change the object given as this operand, nor pass it on, nor ask which object it is?"""
        if op.name == "if":
            return True
        if op.name in ("foreach", "append", "concat"):  # they take items out of it
            t = op.operands[operand].type
            is_taken = operand == 0 or op.name == "concat"
            return is_taken and t.name in ("list", "sequence", "tuple", "docs") and all(map(is_frozen, t.args))
        if op.name == "py" and _IDENTITY.search(str(op.attrs["source"])):
            return False
        return not op.regions and not self.effect(op).writes and all(is_frozen(v.type) for v in op.results)

    # -- dependencies
    def data_dependencies(self, region: Region) -> list[set[int]]:
        """For each op the positions of the ops of the region whose results it or anything in it uses."""
        at: dict[str, int] = {}
        out = []
        for i, op in enumerate(region.ops):
            out.append({at[name] for name in self.uses(op) if name in at})
            for v in op.results:
                at[v.name] = i
        return out

    def order(self, region: Region, *, ordered: bool | None = None) -> list[tuple[int, ...]]:
        """`order_edges` of the region, or of one that is `ordered` (or not) instead."""
        if ordered is not None and region.ordered != ordered:
            region = Region(region.params, region.ops, region.yields, ordered)
        return order_edges(region, None if region.ordered else [self.effect(op) for op in region.ops])

    # -- time
    def waits(self, op: Op) -> bool:
        """Does it leave the processor free while it runs: a backend's or tool's op, an awaiting one?"""
        found = self._waits.get(id(op))
        if found is None:
            found = (
                (OPS[op.name].lane != "python" and not is_begun(op))
                or op.name == "call"
                or bool(op.attrs.get("is_async"))
                or any(self.waits(inner) for region in op.regions for inner in region.ops)
            )
            self._waits[id(op)] = found
            self._held.append(op)
        return found

    def length(self, value: Value) -> int | None:
        """How many items iterating over the value gives, where that is known."""
        op = self.definer(value)
        if op is None:
            return None
        if op.name == "fused":
            return self.length(op.regions[0].yields[next(i for i, v in enumerate(op.results) if v.name == value.name)])
        if op.name == "const":
            literal = op.attrs["value"]
            return len(literal) if isinstance(literal, str | bytes | tuple) else None
        if op.name != "py" or "outs" in op.attrs or value.type.name not in ("range", "list", "tuple"):
            return None
        constants: dict[str, Attr] = {}
        params = op.attrs["params"]
        assert isinstance(params, tuple)
        for name, operand in zip(params, op.operands, strict=True):
            source = self.definer(operand)
            if source is not None and source.name == "const":
                constants[str(name)] = source.attrs["value"]
        if value.type == RANGE:
            return _range_length(str(op.attrs["source"]), constants)
        return _display_length(str(op.attrs["source"]))

    def trips(self, op: Op) -> float:
        """How often the body of a loop is predicted to run."""
        if op.name == "while":
            limit = op.attrs.get("limit")
            trips = self.costs["while_trips"]
            return min(trips, float(limit)) if isinstance(limit, int) else trips
        known = self.length(op.operands[0]) if op.name == "foreach" else None
        return self.costs["foreach_items"] if known is None else float(known)

    def turns(self, op: Op) -> float:
        """How many turns of the scheduler a run of the op is predicted to take, those in its regions included."""
        if op.name in STATIC:
            return 0.0
        if not op.regions or op.name == "fused":
            return 1.0
        inner = [sum(map(self.turns, region.ops)) for region in op.regions]
        if op.name == "if":
            return 1.0 + sum(inner) / 2
        if op.name == "try":
            return 1.0 + inner[0]
        return 1.0 + self.trips(op) * sum(inner)

    def seconds(self, op: Op) -> float:
        """What a run of the op is predicted to take, its turn included."""
        if op.name in STATIC:
            return 0.0
        found = self._seconds.get(id(op))
        if found is None:
            costs = self.costs
            found = costs.turn_s
            if op.name == "call":
                found += self.call_seconds(str(op.attr("callee")))
            elif not is_begun(op):
                found += costs.own_s(op)
            if op.regions:
                match op.name:
                    case "if":
                        then, orelse = (self.region_seconds(r) for r in op.regions)
                        found += costs["branch"] * then + (1 - costs["branch"]) * orelse
                    case "while":
                        cond, body = (self.region_seconds(r) for r in op.regions)
                        found += cond + self.trips(op) * (cond + body)
                    case "foreach":
                        once = op.attrs.get("parallel") and self.waits(op)
                        found += (1.0 if once else self.trips(op)) * self.region_seconds(op.regions[0])
                    case "fused":
                        found += sum(
                            self.seconds(inner) - costs.turn_s
                            for inner in op.regions[0].ops
                            if inner.name not in STATIC
                        )
                    case _:  # llm.each: its last item; try: its handlers are the exception
                        found += self.region_seconds(op.regions[0])
            self._seconds[id(op)] = found
            self._held.append(op)
        return found

    def call_seconds(self, name: str) -> float:
        """What a run of the called workflow is predicted to take; a recursive call is taken as any unknown one."""
        found = self._called.get(name)
        if found is None:
            callers = (*self._callers, self.graph)
            callee = next((g for caller in reversed(callers) if (g := caller.callee(name)) is not None), None)
            if callee is None or any(callee is caller for caller in callers):
                found = self.costs["call_s"]
            else:
                inner = Facts(callee, self.costs, callers)
                inner._called = self._called
                found = inner.region_seconds(callee.body)
            self._called[name] = found
        return found

    def schedule(self, region: Region) -> list[tuple[float, float]]:
        """When each op of the region is predicted to begin and to end, with processors for all."""
        found: list[tuple[float, float]] = []
        for op, data, order in zip(region.ops, self.data_dependencies(region), self.order(region), strict=True):
            begin = max((found[d][1] for d in data.union(order)), default=0.0)
            found.append((begin, begin + self.seconds(op)))
        return found

    def region_seconds(self, region: Region, *, ordered: bool | None = None) -> float:
        """The predicted makespan of a region: the sum if one op waits for the other, else a list schedule, with one
        processor for Python.
        """
        if ordered is None:
            ordered = region.ordered
        if ordered and not has_groups(region):
            return sum(map(self.seconds, region.ops))
        ops = region.ops
        users: list[list[int]] = [[] for _ in ops]
        missing = []
        for i, (data, order) in enumerate(
            zip(self.data_dependencies(region), self.order(region, ordered=ordered), strict=True)
        ):
            data.update(order)
            missing.append(len(data))
            for d in data:
                users[d].append(i)
        ready = [(0.0, i) for i in range(len(ops)) if not missing[i]]
        starts = [0.0] * len(ops)
        processor = end = 0.0
        while ready:
            start, i = heapq.heappop(ready)
            duration = self.seconds(ops[i])
            if duration and not self.waits(ops[i]):
                start = max(start, processor)
                processor = start + duration
            finish = start + duration
            end = max(end, finish)
            for j in users[i]:
                missing[j] -= 1
                starts[j] = max(starts[j], finish)
                if not missing[j]:
                    heapq.heappush(ready, (starts[j], j))
        return end


def predicted_s(graph: Graph, costs: CostModel) -> float:
    """The predicted seconds of one run of the workflow alone on an idle machine."""
    return Facts(graph, costs).region_seconds(graph.body)


def count_ops(region: Region) -> int:
    """Operations that take a turn of the scheduler, each counted once: literals take none, a fused run takes one."""
    return sum(
        1 + (0 if op.name == "fused" else sum(map(count_ops, op.regions))) for op in region.ops if op.name not in STATIC
    )


def regions_within(region: Region) -> Iterator[Region]:
    """Every region inside, innermost first, then the region itself."""
    for op in region.ops:
        for inner in op.regions:
            yield from regions_within(inner)
    yield region


@lru_cache(maxsize=1024)
def expression(source: str) -> ast.expr | None:
    """The expression that the text is, or None."""
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _range_length(source: str, constants: Mapping[str, Attr]) -> int | None:
    node = expression(source)
    if not (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and not node.keywords
    ):
        return None
    bounds = []
    for arg in node.args:
        bound: object = None
        if isinstance(arg, ast.Name):
            bound = constants.get(arg.id)
        else:
            try:
                bound = ast.literal_eval(arg)
            except ValueError:
                return None
        if type(bound) is not int:
            return None
        bounds.append(bound)
    try:
        return len(range(*bounds))
    except (TypeError, ValueError, OverflowError):
        return None


def _display_length(source: str) -> int | None:
    node = expression(source)
    if isinstance(node, ast.List | ast.Tuple) and not any(isinstance(e, ast.Starred) for e in node.elts):
        return len(node.elts)
    return None


def texts(attr: object) -> tuple[str, ...]:
    """A tuple attribute as texts; empty if there is none."""
    return tuple(map(str, attr)) if isinstance(attr, tuple) else ()


def names_of(values: Iterable[Value]) -> set[str]:
    return {v.name for v in values}


__all__ = [
    "LOOPS",
    "STATIC",
    "Facts",
    "count_ops",
    "expression",
    "has_plain_truth",
    "is_begun",
    "is_frozen",
    "iterates_safely",
    "names_of",
    "predicted_s",
    "regions_within",
    "texts",
]
