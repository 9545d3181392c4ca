"""What can be known of a workflow without running it. Every function is pure; it answers for a region or a workflow.

Positions are indices into `region.ops`. Answers about single operations are keyed by `id(op)`: keep the graph while you
use them. A *lane operation* runs on something else than the interpreter: a model, an index, an embedder, a tool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from .core import Attr, Graph, Op, Region, Value, free_values, walk
from .effects import order_edges
from .errors import Loc
from .ops import DEFAULT_RATES, OPS, Effect, Rates, effect_of
from .templates import split_template
from .types import AHEAD

DEFAULT_TRIPS: Final = 3.0  # of a loop of which nothing is known
Costs = Rates | Callable[[Op], float]
"""Rates by name, or what an op takes itself, in seconds, its regions not counted."""


# -- definitions and uses


def definitions(region: Region) -> dict[str, Op]:
    """Value name -> the op that defines it, in the region and all inside it; a parameter has none."""
    return {v.name: op for op in walk(region) for v in op.results}


def users(region: Region) -> dict[str, list[Op]]:
    """Value name -> the ops that take it as an operand, in program order, in the region and all inside it.

    A region that yields a value uses it on behalf of the op that holds the region.
    """
    found: dict[str, list[Op]] = {}

    def visit(inner: Region, holder: Op | None) -> None:
        for op in inner.ops:
            for name in dict.fromkeys(v.name for v in op.operands):
                found.setdefault(name, []).append(op)
            for r in op.regions:
                visit(r, op)
        if holder is not None:
            for name in dict.fromkeys(v.name for v in inner.yields):
                found.setdefault(name, []).append(holder)

    visit(region, None)
    return found


class Dominance:
    """Which operations have certainly begun before which: `dominates(a, b)`.

    In a region an op dominates those after it and all that their regions hold. Nothing inside a region dominates what
    stands after the op that holds it: a branch may not be taken, a loop may have no iteration.
    """

    __slots__ = ("_paths", "_region")

    def __init__(self, region: Region) -> None:
        self._region = region  # keeps the ids taken
        self._paths: dict[int, tuple[int, ...]] = {}

        def visit(inner: Region, prefix: tuple[int, ...]) -> None:
            for i, op in enumerate(inner.ops):
                path = self._paths[id(op)] = (*prefix, i)
                for j, r in enumerate(op.regions):
                    visit(r, (*path, j))

        visit(region, ())

    def dominates(self, a: Op, b: Op) -> bool:
        """Does `a` come before `b` on every way to `b`? An op dominates itself and what its regions hold."""
        first, second = self._paths[id(a)], self._paths[id(b)]
        depth = len(first) - 1
        return len(second) > depth and first[:depth] == second[:depth] and first[depth] <= second[depth]


def liveness(region: Region) -> dict[str, int]:
    """Value name -> position of the last op that uses it, itself or in its regions.

    Covers the region's parameters, its ops' results and values from outside. `len(region.ops)` if the region yields it,
    -1 if nothing uses it.
    """
    last = dict.fromkeys((p.name for p in region.params), -1)
    for i, op in enumerate(region.ops):
        for v in used_by(op):
            last[v.name] = i
        for v in op.results:
            last[v.name] = -1
    for v in region.yields:
        last[v.name] = len(region.ops)
    return last


def used_by(op: Op) -> tuple[Value, ...]:
    """The values that an op takes from its surroundings: its operands, then what its regions use of outside values."""
    if not op.regions:
        return op.operands
    found = {v.name: v for v in op.operands}
    for region in op.regions:
        for v in free_values(region):
            found.setdefault(v.name, v)
    return tuple(found.values())


# -- effects, order, levels


def effects(region: Region) -> list[Effect]:
    """The effect of each op of the region, that of its regions included."""
    return [effect_of(op) for op in region.ops]


def dependencies(region: Region) -> list[tuple[int, ...]]:
    """For each op the positions of the ops it waits for, ascending: those it takes values from and the effect order."""
    made: dict[str, int] = {}
    out = []
    for i, (op, order) in enumerate(zip(region.ops, order_edges(region), strict=True)):
        waits = {made[v.name] for v in used_by(op) if v.name in made}
        waits.update(order)
        out.append(tuple(sorted(waits)))
        for v in op.results:
            made[v.name] = i
    return out


def is_lane_op(op: Op) -> bool:
    """Does the op itself leave the interpreter, to be waited for? A call of another workflow may; advice is not."""
    spec = OPS[op.name]
    return (spec.lane != "python" and not spec.is_advice and AHEAD not in (spec.results or ())) or op.name == "call"


def levels(region: Region) -> list[int]:
    """For each op of the region how many lane operations in a row must have ended before it can begin.

    0 for ops that wait for no lane operation. Lane operations of one level can run as one wavefront. An op with regions
    counts as its longest row of lane operations, a loop as one iteration. Levels inside a region start from 0 again.
    """
    return _levels(region)[0]


def _levels(region: Region) -> tuple[list[int], int]:
    """(level of each op, lane operations in the longest row)"""
    found: list[int] = []
    ends: list[int] = []
    for op, waits in zip(region.ops, dependencies(region), strict=True):
        level = max((ends[d] for d in waits), default=0)
        found.append(level)
        ends.append(level + _lane_depth(op))
    return found, max(ends, default=0)


def _lane_depth(op: Op) -> int:
    depths = [_levels(r)[1] for r in op.regions]
    if op.name == "while" or op.name == "try":
        return sum(depths[:1]) + max(depths[1:], default=0)
    return is_lane_op(op) + max(depths, default=0)


# -- probabilities and time


def branch_probabilities(graph: Graph, profile: Mapping[Loc, tuple[int, int]] | None = None) -> dict[int, float]:
    """`id(op)` of each `if` -> how likely its `then` region runs.

    `profile` holds for source locations (times taken, times reached). The estimate is Laplace's rule of succession,
    (taken + 1) / (reached + 2): 0.5 where nothing is known, and never certain.
    """
    counts = profile or {}
    found = {}
    for op in walk(graph.body):
        if op.name == "if":
            taken, reached = counts.get(op.loc, (0, 0)) if op.loc is not None else (0, 0)
            found[id(op)] = (taken + 1) / (reached + 2)
    return found


@dataclass(frozen=True, slots=True)
class CriticalPath:
    """The chain of operations that a run waits for longest. An op with regions stands before what it runs."""

    seconds: float
    ops: tuple[Op, ...] = ()


def critical_path(
    where: Graph | Region,
    costs: Costs = DEFAULT_RATES,
    *,
    branches: Mapping[int, float] | None = None,
    trips: Callable[[Op], float] | None = None,
) -> CriticalPath:
    """The longest chain of waiting through a workflow or region, with as many processors as it has use for.

    An `if` takes the mean of its regions by `branches` (`branch_probabilities`; 0.5 without) and shows the likelier,
    or the slower if both are equally likely. A loop takes `trips(op)` times one iteration (3, or its bound, without), a
    parallel `foreach` one iteration; a `try` takes its body. A called workflow is entered once where `where` holds it.
    """
    own = costs if callable(costs) else lambda op: OPS[op.name].cost_s(op, costs)
    graph = where if isinstance(where, Graph) else None
    open_: list[str] = [graph.name] if graph is not None else []

    def of_op(op: Op) -> CriticalPath:
        inner = [of_region(r) for r in op.regions]
        match op.name:
            case "if":
                then, other = inner
                p = branches.get(id(op), 0.5) if branches is not None else 0.5
                shown = max(((p, then.seconds, then), (1 - p, other.seconds, other)), key=lambda c: c[:2])[2]
                return CriticalPath(own(op) + p * then.seconds + (1 - p) * other.seconds, (op, *shown.ops))
            case "while":
                cond, body = inner
                n = trips(op) if trips is not None else _bounded(op)
                return CriticalPath(
                    own(op) + cond.seconds + n * (cond.seconds + body.seconds), (op, *cond.ops, *body.ops)
                )
            case "foreach":
                n = 1.0 if op.attrs.get("parallel") else trips(op) if trips is not None else _bounded(op)
                return CriticalPath(own(op) + n * inner[0].seconds, (op, *inner[0].ops))
            case "try" | "llm.each":
                return CriticalPath(own(op) + inner[0].seconds, (op, *inner[0].ops))
            case "fused":
                seconds = sum(of_op(o).seconds for o in op.regions[0].ops)  # one code object: one after another
                return CriticalPath(seconds, (op,))
            case "call":
                callee = graph.callee(str(op.attrs["callee"])) if graph is not None else None
                if callee is not None and callee.name not in open_:
                    open_.append(callee.name)
                    path = of_region(callee.body)
                    open_.pop()
                    return CriticalPath(own(op) + path.seconds, (op, *path.ops))
            case _:
                pass
        return CriticalPath(own(op), (op,))

    def of_region(region: Region) -> CriticalPath:
        ends: list[float] = []
        back: list[int | None] = []
        paths = []
        for op, waits in zip(region.ops, dependencies(region), strict=True):
            path = of_op(op)
            before = max(waits, key=lambda d: ends[d], default=None)
            paths.append(path)
            back.append(before)
            ends.append(path.seconds + (ends[before] if before is not None else 0.0))
        if not ends:
            return CriticalPath(0.0)
        last = max(range(len(ends)), key=lambda i: ends[i])
        seconds, at = ends[last], back[last]
        chain = [paths[last]]
        while at is not None:
            chain.append(paths[at])
            at = back[at]
        return CriticalPath(seconds, tuple(op for path in reversed(chain) for op in path.ops))

    return of_region(where.body if isinstance(where, Graph) else where)


def _bounded(op: Op) -> float:
    limit = op.attrs.get("limit")
    return min(DEFAULT_TRIPS, float(limit)) if isinstance(limit, int) else DEFAULT_TRIPS


def steps_to_execution(graph: Graph, counts: Callable[[Op], bool] = is_lane_op) -> dict[int, int]:
    """`id(op)` of each lane operation -> how many lane operations in a row end, at the fewest, before it can begin.

    And `id(region)` of each region -> how many before that begins. With `counts` not all lane operations are counted.

    An op waits for all it depends on (AND join: the largest of their steps, one more past a lane operation).
    What an `if` gives is there after either region (OR join: the smallest). A loop's body counts from its first
    iteration, which is the fixpoint of the smallest; what follows a loop that may end at once counts from its entry.

    After Pan et al., "KVFlow: Efficient Prefix Caching for Accelerating LLM-Based Multi-Agent Workflows", 2025: there
    the number ranks cached prefixes, and the one farthest from its next use is evicted first.
    """
    steps: dict[int, int] = {}

    def visit(region: Region, begin: int) -> int:
        """Steps at which the region has ended, its first op beginning at `begin`."""
        steps[id(region)] = begin
        ends: list[int] = []
        for op, waits in zip(region.ops, dependencies(region), strict=True):
            start = max((ends[d] for d in waits), default=begin)
            if is_lane_op(op):
                steps[id(op)] = start
                ends.append(start + counts(op))
                for r in op.regions:  # they run while it does
                    visit(r, start)
                continue
            match op.name:
                case "if":
                    ends.append(min(visit(r, start) for r in op.regions))
                case "while":
                    cond, body = op.regions
                    checked = visit(cond, start)
                    ran = visit(body, checked)
                    ends.append(ran if _is_true(cond) else checked)
                case "foreach":
                    visit(op.regions[0], start)
                    ends.append(start)
                case "try":
                    body, *handlers = op.regions
                    ends.append(visit(body, start))
                    for handler in handlers:
                        visit(handler, start)
                case _:
                    ends.append(max((visit(r, start) for r in op.regions), default=start))
        return max(ends, default=begin)

    visit(graph.body, 0)
    return steps


def _is_true(cond: Region) -> bool:
    """Does the condition hold whatever happens?"""
    value = cond.yields[0].name
    return any(op.name == "const" and op.results[0].name == value and bool(op.attrs["value"]) for op in cond.ops)


# -- prompts

PROMPTED: Final = frozenset({"generate", "choose", "parse", "llm.each"})


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt: constant `text`, or a slot holding `value`."""

    text: str = ""
    value: Value | None = None
    is_late: bool = False


@dataclass(frozen=True, slots=True)
class StaticPrefix:
    """What is known of one prompt before the run: its parts in order."""

    op: Op
    pieces: tuple[Piece, ...]

    @property
    def text(self) -> str:
        """The constant text that every such prompt begins with."""
        first = self.pieces[0] if self.pieces else Piece()
        return first.text if first.value is None else ""

    @property
    def first_late(self) -> int | None:
        """Position of the first piece that waits for a lane operation; None if the whole prompt is early."""
        return next((i for i, piece in enumerate(self.pieces) if piece.is_late), None)

    @property
    def early(self) -> tuple[Value, ...]:
        """The slots that stand before the first late one: known as soon as the workflow has its arguments."""
        return tuple(p.value for p in self.pieces[: self.first_late] if p.value is not None)

    @property
    def is_constant(self) -> bool:
        return all(p.value is None for p in self.pieces)


def late_values(graph: Graph) -> frozenset[str]:
    """Names of the values that depend on a lane operation: by data, by a cell, or by the branch that gives them."""
    late: set[str] = set()
    stored = {op.operands[0].name for op in walk(graph.body) if op.name == "store"}

    def mark(values: Iterable[Value]) -> None:
        late.update(v.name for v in values)

    def visit(region: Region) -> None:
        for op in region.ops:
            if op.regions:
                control(op)
            elif (
                is_lane_op(op)
                or any(v.name in late for v in op.operands)
                or (op.name == "load" and op.operands[0].name in stored)
            ):
                mark(op.results)

    def control(op: Op) -> None:
        if is_lane_op(op):  # llm.each: all that it gives comes from the model
            mark((*op.results, *op.regions[0].params))
            visit(op.regions[0])
            return
        is_loop = op.name in ("while", "foreach")
        own = int(op.name == "foreach")  # parameters before the carried ones
        lead = int(op.name == "while" or bool(op.attrs.get("breaks")))  # yielded values before the next carried ones
        decides = op.operands[:1] if op.name in ("if", "foreach") else ()
        gives = op.regions[1:] if op.name == "while" else op.regions
        if is_loop:
            for region in op.regions:
                mark(p for p, init in zip(region.params, op.operands, strict=True) if init.name in late)
        if op.name == "try" and _waits(op.regions[0]):
            mark(p for handler in op.regions[1:] for p in handler.params)
            mark(op.results)
        for region in op.regions:
            visit(region)
        if is_loop:
            following = op.regions[-1].yields[lead:]
            for region in op.regions:
                carried = region.params[own:]
                mark(p for p, y in zip(carried, following, strict=False) if y.name in late)
                mark(r for r, p in zip(op.results, carried, strict=False) if p.name in late)
            decides += (*op.regions[0].yields[:lead], *op.regions[-1].yields[:lead])
        is_late = any(v.name in late for v in decides)
        for region in gives:
            mark(r for r, y in zip(op.results, region.yields[lead:], strict=True) if is_late or y.name in late)

    before = -1
    while before != len(late):  # a carried value that one iteration makes late makes another late in the next
        before = len(late)
        visit(graph.body)
    return frozenset(late)


def _waits(region: Region) -> bool:
    return any(map(is_lane_op, walk(region)))


def static_prefix(graph: Graph) -> list[StaticPrefix]:
    """For each operation of `PROMPTED`, in program order, the parts of its prompt.

    Templates in templates, literals and what a `fused` run yields are followed; neighbouring constants are one piece.
    """
    made = definitions(graph.body)
    late = late_values(graph)
    prompted = [op for op in walk(graph.body) if op.name in PROMPTED]
    return [StaticPrefix(op, tuple(_merged(_pieces(op.operands[0], made, late)))) for op in prompted]


def _pieces(value: Value, made: Mapping[str, Op], late: frozenset[str]) -> list[Piece]:
    out: list[Piece] = []
    stack: list[tuple[Value | str, str]] = [(value, "")]  # what comes next stands last; a slot with its format
    while stack:
        item, form = stack.pop()
        if isinstance(item, str):
            out.append(Piece(item))
            continue
        op = made.get(item.name)
        while op is not None and op.name == "fused":
            item = op.regions[0].yields[[r.name for r in op.results].index(item.name)]
            op = made.get(item.name)
        constant = _shown(op.attrs["value"], form) if op is not None and op.name == "const" else None
        if constant is not None:
            out.append(Piece(constant))
        elif op is not None and op.name == "template" and not form:
            segments = split_template(str(op.attrs["text"]))
            formats = op.attrs.get("formats")
            forms = tuple(map(str, formats)) if isinstance(formats, tuple) else ("",) * len(op.operands)
            for segment, slot, f in zip(reversed(segments[1:]), reversed(op.operands), reversed(forms), strict=True):
                stack += (segment, ""), (slot, f)
            stack.append((segments[0], ""))
        else:
            out.append(Piece(value=item, is_late=item.name in late))
    return out


_CONVERSIONS: Final[dict[str, Callable[[object], str]]] = {"!r": repr, "!s": str, "!a": ascii}


def _shown(value: Attr, form: str) -> str | None:
    """What a literal becomes in a slot with this format; None where that cannot be told from here."""
    if not isinstance(value, str | int | float | None):
        return None
    conversion, _, spec = form.partition(":")
    if "{" in spec or (conversion and conversion not in _CONVERSIONS):
        return None
    shown = _CONVERSIONS[conversion](value) if conversion else value
    try:
        return format(shown, spec)
    except (ValueError, TypeError, OverflowError):
        return None


def _merged(pieces: list[Piece]) -> list[Piece]:
    out: list[Piece] = []
    for piece in pieces:
        if piece.value is None and out and out[-1].value is None:
            out[-1] = Piece(out[-1].text + piece.text)
        elif piece.value is not None or piece.text:
            out.append(piece)
    return out


__all__ = [
    "PROMPTED",
    "CriticalPath",
    "Dominance",
    "Piece",
    "StaticPrefix",
    "branch_probabilities",
    "critical_path",
    "definitions",
    "dependencies",
    "effects",
    "is_lane_op",
    "late_values",
    "levels",
    "liveness",
    "static_prefix",
    "steps_to_execution",
    "used_by",
    "users",
]
