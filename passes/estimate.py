"""What a run will take, said before it runs: seconds, calls and tokens by resource, by the cost model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf
from typing import Any, Final

from flowc.ir.core import Graph, Op, Region
from flowc.ir.ops import OPS

from .cost import CostModel
from .facts import STATIC, Facts, predicted_s
from .gain import show_s

_PROMPTED: Final = frozenset({"generate", "choose", "parse", "llm.each"})
_COUNTED: Final = frozenset({*_PROMPTED, "embed", "search", "ivf.begin", "rerank", "tool", "invoke"})
"""What a user counts as a call: of a search in pieces the first, of work begun ahead only the one that takes it."""


@dataclass(slots=True)
class Use:
    """What one program asks of a resource: expected `calls`, the most there can be (inf where a loop has no known
    bound), tokens read and written, and the sum of seconds."""

    calls: float = 0.0
    most_calls: float = 0.0
    prompt_tokens: float = 0.0
    written_tokens: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """A prediction for one program on an idle machine.

    `seconds` is the longest chain of waiting; `sequential_s` what the same calls take one after another; both are
    expectations over branches and loops (see `CostModel`). `resources` is by `lane name`.
    """

    seconds: float
    sequential_s: float
    resources: dict[str, Use] = field(default_factory=dict)

    @property
    def busiest(self) -> str | None:
        """The resource that limits how many programs end in a second."""
        return max(self.resources, key=lambda name: self.resources[name].seconds, default=None)

    def many_s(self, programs: int) -> float:
        """Seconds for so many programs at once, if every resource serves one call at a time, without batches."""
        most = max((use.seconds for use in self.resources.values()), default=0.0)
        return max(self.seconds, programs * most)

    def lines(self, programs: int = 1) -> Iterator[str]:
        """The forecast in words."""
        yield f"one program: {show_s(self.seconds)} expected, {show_s(self.sequential_s)} one call after another"
        if programs > 1:
            yield f"{programs} programs: at most {show_s(self.many_s(programs))}, if no two calls share a batch"
        if self.busiest is not None:
            yield f"most of it: {self.busiest}"

    def to_json(self, programs: int = 1) -> dict[str, Any]:
        """The forecast as JSON has it; a count without bound is null."""
        return {
            "seconds": self.seconds,
            "sequential_s": self.sequential_s,
            "programs": programs,
            "programs_s": self.many_s(programs),
            "resources": {
                name: {
                    "calls": use.calls,
                    "most_calls": None if use.most_calls == inf else use.most_calls,
                    "prompt_tokens": use.prompt_tokens,
                    "written_tokens": use.written_tokens,
                    "seconds": use.seconds,
                }
                for name, use in self.resources.items()
            },
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())


def forecast(graph: Graph, costs: CostModel) -> Forecast:
    """The forecast of one run of the workflow."""
    resources: dict[str, Use] = {}
    sequential = _Count(Facts(graph, costs), resources).region(graph.body, 1.0, 1.0, (graph,))
    return Forecast(predicted_s(graph, costs), sequential, resources)


class _Count:
    """Walks a workflow with how often each place is expected, and at most, to run."""

    def __init__(self, facts: Facts, resources: dict[str, Use]) -> None:
        self._facts = facts
        self._resources = resources

    def region(self, region: Region, times: float, most: float, callers: tuple[Graph, ...]) -> float:
        return sum(self.op(op, times, most, callers) for op in region.ops)

    def op(self, op: Op, times: float, most: float, callers: tuple[Graph, ...]) -> float:
        """Counts the op and what is in it; the seconds that it takes in all, one call after another."""
        if op.name in STATIC:
            return 0.0
        own_s = times * self._facts.costs.own_s(op)
        if op.name in _COUNTED:
            self._note(op, times, most, own_s)
        own_s += times * self._facts.costs.turn_s
        match op.name:
            case "call":
                callee = callers[-1].callee(str(op.attr("callee")))
                if callee is None or callee in callers:
                    return times * self._facts.costs["call_s"]
                inner = _Count(Facts(callee, self._facts.costs, callers), self._resources)
                return inner.region(callee.body, times, most, (*callers, callee))
            case "if":
                p = self._facts.costs["branch"]
                return own_s + sum(
                    self.region(r, times * q, most, callers) for r, q in zip(op.regions, (p, 1 - p), strict=True)
                )
            case "while":
                cond, body = op.regions
                trips, limit = self._facts.trips(op), op.attrs.get("limit")
                bound = most * limit if isinstance(limit, int) else inf
                return (
                    own_s
                    + self.region(cond, times * (trips + 1), bound + most, callers)
                    + self.region(body, times * trips, bound, callers)
                )
            case "foreach" | "llm.each":
                trips = self._facts.trips(op)
                known = self._facts.length(op.operands[0]) if op.name == "foreach" else None
                bound = most * known if known is not None else inf
                return own_s + self.region(op.regions[0], times * trips, bound, callers)
            case "try":
                return own_s + self.region(op.regions[0], times, most, callers)
            case _:
                return own_s + sum(self.region(r, times, most, callers) for r in op.regions)

    def _note(self, op: Op, times: float, most: float, seconds: float) -> None:
        lane = OPS[op.name].lane
        name = op.attr("resource") if "resource" in op.attrs else op.attr("tool", "tools")
        use = self._resources.setdefault(f"{lane} {name!s}", Use())
        use.calls += times
        use.most_calls += most
        use.seconds += seconds
        if op.name in _PROMPTED:
            rates = self._facts.costs.of(op)
            use.prompt_tokens += times * rates["prompt_tokens"]
            if op.name != "choose":
                use.written_tokens += times * float(op.attr("max_tokens", 256)) * rates["fill"]
