"""Many programs in virtual time: the same driver, lanes, scheduler and plans over backends that only take time.

    report = simulate(lambda n: Job(plan, (f"question {n}",)), programs=1000, arrivals="poisson:2", policy="atlas")
    print(report.text())

Everything that is drawn comes from the seed: equal calls give equal reports, and event logs equal byte for byte. Plain
Python of the workflows runs as it is and takes no virtual time; tools are not called, they only take theirs.
"""

from __future__ import annotations

import inspect
import json
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import ceil, nan
from pathlib import Path
from typing import Any, TextIO

from flowc.backends.simulated.faults import Fault, Faults, parse_fault
from flowc.backends.simulated.lanes import SimulatedEmbedder, SimulatedReranker, SimulatedRetriever, SimulatedTool
from flowc.backends.simulated.llm import SimulatedLLM, WorkOf, work_of
from flowc.backends.simulated.profiles import Machine, load_machine
from flowc.ir.core import Graph
from flowc.ir.errors import ConfigError, InputError
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import (
    FOREACH,
    IF,
    INVOKE,
    TASK,
    TOOL,
    TRY,
    WHILE,
    Block,
    Pace,
    Plan,
    Target,
    TaskNode,
    build_plan,
)
from flowc.runtime.program import Program
from flowc.runtime.scheduling import POLICIES, Entry, Policy, make_policy, tenant
from flowc.runtime.trace import Event, Trace

__all__ = ["Arrivals", "Job", "Report", "parse_arrivals", "simulate", "simulated"]


@dataclass(frozen=True, slots=True)
class Job:
    """One program to run. Its plan should be `simulated`, where it holds tools."""

    plan: Plan
    args: Sequence[Any]
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """When programs come. `closed` keeps so many in flight instead; `times` are virtual seconds, ascending."""

    rate: float | None = None
    times: tuple[float, ...] | None = None
    closed: int | None = None

    def moments(self, seed: int) -> Iterator[float]:
        """Poisson arrivals at `rate`, or the trace's; without end for the former."""
        if self.times is not None:
            yield from self.times
            return
        assert self.rate is not None
        draw = random.Random(f"{seed} arrivals")
        now_s = 0.0
        while True:
            now_s += draw.expovariate(self.rate)
            yield now_s


def parse_arrivals(text: str) -> Arrivals:
    """What `poisson:RATE`, `trace:FILE` (a time in seconds a line, or JSON with "at") or `closed:N` mean."""
    kind, _, rest = text.partition(":")
    try:
        if kind == "poisson" and float(rest) > 0:
            return Arrivals(rate=float(rest))
        if kind == "closed" and int(rest) > 0:
            return Arrivals(closed=int(rest))
    except ValueError:
        pass
    if kind == "trace" and rest:
        return Arrivals(times=_read_trace(Path(rest)))
    raise ConfigError(f"{text!r} is no way to arrive", hint="write poisson:RATE, trace:FILE or closed:N")


def _read_trace(path: Path) -> tuple[float, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    times = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                value = json.loads(line)
                times.append(float(value["at"] if isinstance(value, dict) else value))
            except (ValueError, TypeError, KeyError):
                hint = 'each line is a number of seconds, or JSON like {"at": 1.5}'
                raise InputError(f"{path}, line {number}: no time of arrival", code="F081", hint=hint) from None
    return tuple(sorted(times))


# -- tools that only take time


def simulated(graph: Graph, machine: Machine, faults: Sequence[Fault] = (), seed: int = 0) -> Plan:
    """A plan of the graph whose tools only take the machine's time."""
    plan = build_plan(graph)
    lane = Faults(faults, "tool", seed)
    made: dict[str, SimulatedTool] = {}

    def stand_in(name: str, fn: Any) -> SimulatedTool:
        if name not in made:
            made[name] = SimulatedTool(name, machine.tool, lane, _returns(fn))
        return made[name]

    def replace(target: Target) -> Target:
        tool = stand_in(target.name, target.fn)
        return Target(target.name, tool, True, Pace(), None, target.timeout_s, target.retries)

    for block in _blocks(plan):
        for i, (kind, fn, a, _, out) in enumerate(block.code):
            op = block.ops[i]
            if kind == TOOL:
                name = str(op.attrs.get("tool", "tool"))
                block.code[i] = (
                    TASK,
                    TaskNode(Target(name, stand_in(name, fn), True, Pace()), a, out),
                    None,
                    None,
                    None,
                )
            elif op.name == "tool" and isinstance(fn, TaskNode):
                block.code[i] = (kind, TaskNode(replace(fn.target), fn.args, fn.out), None, None, None)
            elif kind == INVOKE:
                fn.targets = {name: replace(target) for name, target in fn.targets.items()}
    return plan


def _returns(fn: Any) -> Any:
    try:
        return inspect.signature(fn).return_annotation
    except (TypeError, ValueError):
        return str


def _blocks(plan: Plan) -> Iterator[Block]:
    pending = [function.block for function in plan.functions]
    while pending:
        block = pending.pop()
        yield block
        for kind, node, *_ in block.code:
            if kind == IF:
                pending += (node.then, node.orelse)
            elif kind == WHILE:
                pending += (node.cond, node.body)
            elif kind == FOREACH:
                pending.append(node.body)
            elif kind == TRY:
                pending += (node.body, *node.handlers)


# -- the simulation


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds."""

    mean: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Latency:
        if not values:
            return cls(nan, nan, nan, nan, nan)
        ranked = sorted(values)

        def at(share: float) -> float:
            return ranked[min(len(ranked) - 1, max(0, ceil(share * len(ranked)) - 1))]

        return cls(sum(ranked) / len(ranked), at(0.50), at(0.95), at(0.99), ranked[-1])


@dataclass(frozen=True, slots=True)
class Report:
    """What came of a simulation. Times are virtual seconds; `waiting_ratio` is waiting over service, by program."""

    machine: str
    is_measured: bool
    policy: str
    seed: int
    programs: int
    failed: dict[str, int]
    makespan_s: float
    throughput: float  # programs a second
    latency: Latency
    latency_by: dict[str, Latency]  # by workflow
    waiting_share: float  # of all requests' time in lanes
    waiting_ratio: Latency
    slo_s: float | None
    slo_attained: float | None
    time_per_output_token_s: float | None
    prefix_hit_rate: float | None
    loaded_tokens_per_s: float | None  # output tokens a second until the last program came
    preemptions: int
    lanes: dict[str, dict[str, float]]
    latencies: array[float] = field(repr=False, compare=False)

    def to_json(self) -> dict[str, Any]:
        """The report without the single latencies; not-a-number becomes null."""
        data = asdict(self)
        del data["latencies"]

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: clean(v) for k, v in value.items()}
            return None if isinstance(value, float) and value != value else value

        cleaned: dict[str, Any] = clean(data)
        return cleaned

    def text(self) -> str:
        """The report for a terminal."""
        la, wr = self.latency, self.waiting_ratio
        source = "measured" if self.is_measured else "an ESTIMATE, see the profile's sources"
        lines = [
            f"machine     {self.machine} ({source}), policy {self.policy}, seed {self.seed}",
            f"programs    {self.programs} in {self.makespan_s:.1f} s, {self.throughput:.3f} a second, "
            + (", ".join(f"{n} {name}" for name, n in self.failed.items()) or "none failed"),
            f"latency     mean {la.mean:.3f}  P50 {la.p50:.3f}  P95 {la.p95:.3f}  P99 {la.p99:.3f}  max {la.max:.3f} s",
            *(
                f"  {name:<18} mean {x.mean:.3f}  P50 {x.p50:.3f}  P95 {x.p95:.3f}  P99 {x.p99:.3f}"
                for name, x in self.latency_by.items()
                if len(self.latency_by) > 1
            ),
            f"waiting     {self.waiting_share:.1%} of the time in lanes; waiting over service, by program: "
            f"mean {wr.mean:.2f}  P99 {wr.p99:.2f}  max {wr.max:.2f}",
        ]
        if self.slo_attained is not None:
            lines.append(f"SLO         {self.slo_attained:.1%} within {self.slo_s:g} s")
        if self.time_per_output_token_s is not None:
            lines.append(
                f"model       {self.time_per_output_token_s * 1e3:.1f} ms per output token, "
                f"prefix hits {self.prefix_hit_rate or 0.0:.1%}, {self.preemptions} preemptions"
            )
        for name, lane in self.lanes.items():
            lines.append("lane        " + f"{name}: " + ", ".join(f"{k} {v:g}" for k, v in lane.items()))
        return "\n".join(lines)


class _Resources:
    """A simulated backend for every name."""

    def __init__(self, machine: Machine, faults: Sequence[Fault], seed: int, work: WorkOf) -> None:
        self.machine = machine
        self.faults = faults
        self.seed = seed
        self.work = work
        self.made: dict[str, Any] = {}

    def _get(self, kind: str, name: str, make: Callable[[Faults], Any]) -> Any:
        key = f"{kind} @{name}"
        if key not in self.made:
            self.made[key] = make(Faults(self.faults, kind, self.seed))
        return self.made[key]

    def llm(self, name: str) -> Any:
        return self._get("llm", name, lambda f: SimulatedLLM(name, self.machine.llm, f, self.seed, self.work))

    def index(self, name: str) -> Any:
        return self._get("search", name, lambda f: SimulatedRetriever(name, self.machine.search, f))

    def embedder(self, name: str) -> Any:
        return self._get("embed", name, lambda f: SimulatedEmbedder(name, self.machine.embed, f))

    def reranker(self, name: str) -> Any:
        return self._get("rerank", name, lambda f: SimulatedReranker(name, self.machine.rerank, f))


class _Log(list[Event]):
    """A trace's events, written as they come and not kept."""

    def __init__(self, out: TextIO) -> None:
        super().__init__()
        self._out = out

    def append(self, event: Event) -> None:
        place = f"{Path(event.loc.file).name}:{event.loc.line}" if event.loc is not None else ""
        row = [event.kind, event.at_s, event.program, event.op, event.lane, place, event.seconds, event.waited_s]
        self._out.write(json.dumps([*row, event.size, event.number, list(event.items)]) + "\n")


def simulate(
    job: Callable[[int], Job],
    *,
    programs: int,
    arrivals: str | Arrivals = "poisson:1",
    machine: str | Path | Machine = "cpu-2core",
    policy: str | Policy = "fcfs",
    seed: int = 0,
    faults: Sequence[str | Fault] = (),
    slo_s: float | None = None,
    timeout_s: float | None = None,
    max_programs: int | None = None,
    shares: Mapping[str, float] | None = None,
    work: WorkOf = work_of,
    log: TextIO | None = None,
    on_program: Callable[[Program, float], None] | None = None,
) -> Report:
    """What happens when `job(0)`, `job(1)`, ... arrive at a machine under a policy.

    `work` says how long prompts and answers are (see `flowc.backends.simulated.llm`); `log` gets every event as a line
    of JSON; `on_program` is told of each program that ends, with its latency. Memory does not grow with `programs`, but
    for 8 bytes each.
    """
    profile = machine if isinstance(machine, Machine) else load_machine(machine)
    coming = parse_arrivals(arrivals) if isinstance(arrivals, str) else arrivals
    wrong = [parse_fault(f) if isinstance(f, str) else f for f in faults]
    if isinstance(policy, str):
        policy = make_policy(policy) or POLICIES[policy]()
    run = _Simulation(job, programs, coming, profile, policy, seed, wrong, slo_s, timeout_s, log, on_program)
    run.resources = _Resources(profile, wrong, seed, work)
    return run.report(run.run(max_programs, shares))


class _Simulation:
    def __init__(
        self,
        job: Callable[[int], Job],
        programs: int,
        arrivals: Arrivals,
        machine: Machine,
        policy: Policy,
        seed: int,
        faults: Sequence[Fault],
        slo_s: float | None,
        timeout_s: float | None,
        log: TextIO | None,
        on_program: Callable[[Program, float], None] | None,
    ) -> None:
        self.job = job
        self.programs = programs if arrivals.times is None else min(programs, len(arrivals.times))
        self.arrivals = arrivals
        self.machine = machine
        self.policy = policy
        self.seed = seed
        self.slo_s = slo_s
        self.timeout_s = timeout_s
        self.trace = Trace(_Log(log)) if log is not None else None
        self.on_program = on_program
        self.resources: _Resources
        self.latencies = array("d")
        self.by_workflow: dict[str, array[float]] = {}
        self.ratios = array("d")
        self.waited_s = self.service_s = 0.0
        self.failed: Counter[str] = Counter()
        self.started = self.ended = 0
        self.loaded_tokens_per_s: float | None = None

    def run(self, max_programs: int | None, shares: Mapping[str, float] | None) -> float:
        """Virtual seconds until the last program has ended."""
        loop = VirtualLoop(self.seed)
        runtime = Runtime(
            self.resources, io_threads=0, policy=self.policy, shares=shares, max_programs=max_programs, trace=self.trace
        )
        assert runtime.table is not None
        runtime.table.on_leave = self._account
        try:
            return loop.run(self._main(loop, runtime))
        finally:
            runtime.close()

    async def _main(self, loop: VirtualLoop, runtime: Runtime) -> float:
        done = loop.create_future()
        moments = iter(()) if self.arrivals.closed else self.arrivals.moments(self.seed)

        def start() -> None:
            job = self.job(self.started)
            self.started += 1
            came_s = loop.time()
            if self.started == self.programs and came_s > 0.0:
                self.loaded_tokens_per_s = sum(m.output_tokens for m in self.models()) / came_s
            token = tenant.set(job.tenant)
            runtime.launch(job.plan, job.args, lambda p: ended(p, came_s), timeout_s=self.timeout_s)
            tenant.reset(token)

        def ended(program: Program, came_s: float) -> None:
            self._ended(program, loop.time() - came_s)
            if self.ended == self.programs:
                done.set_result(None)
            elif self.arrivals.closed and self.started < self.programs:
                loop.call_soon(start)

        def arrive() -> None:
            start()
            schedule()

        def schedule() -> None:
            if self.started < self.programs:
                loop.call_at(next(moments), arrive)

        if self.programs:
            if self.arrivals.closed:
                for _ in range(min(self.arrivals.closed, self.programs)):
                    start()
            else:
                schedule()
            await done
        return loop.time()

    def models(self) -> list[SimulatedLLM]:
        return [backend for backend in self.resources.made.values() if isinstance(backend, SimulatedLLM)]

    def _ended(self, program: Program, latency_s: float) -> None:
        self.ended += 1
        if program.error is None:
            self.latencies.append(latency_s)
            self.by_workflow.setdefault(program.plan.name, array("d")).append(latency_s)
        else:
            self.failed[type(program.error).__name__] += 1
        if self.on_program is not None:
            self.on_program(program, latency_s)

    def _account(self, entry: Entry) -> None:
        self.waited_s += entry.waited_s
        self.service_s += entry.service_s
        if entry.service_s > 0.0:
            self.ratios.append(entry.waited_s / entry.service_s)

    def report(self, makespan_s: float) -> Report:
        made = self.resources.made
        models = self.models()
        written = sum(m.output_tokens for m in models)
        prompts = sum(m.prompt_tokens for m in models)
        lanes = {}
        for name, backend in sorted(made.items()):
            lane = {"busy": round(backend.busy_s / makespan_s, 4) if makespan_s else 0.0}
            if isinstance(backend, SimulatedLLM):
                lane |= {"generations": backend.generations, "output_tokens": backend.output_tokens}
            else:
                lane |= {"calls": backend.calls, "items": backend.items}
            lanes[name] = lane
        attained = None
        if self.slo_s is not None and self.ended:
            attained = sum(s <= self.slo_s for s in self.latencies) / self.ended
        total_s = self.waited_s + self.service_s
        return Report(
            self.machine.name, self.machine.is_measured, self.policy.name, self.seed, self.ended, dict(self.failed),
            makespan_s, self.ended / makespan_s if makespan_s else nan, Latency.of(self.latencies),
            {name: Latency.of(values) for name, values in sorted(self.by_workflow.items())},
            self.waited_s / total_s if total_s else 0.0, Latency.of(self.ratios), self.slo_s, attained,
            sum(m.decode_s for m in models) / written if written else None,
            sum(m.hit_tokens for m in models) / prompts if prompts else None, self.loaded_tokens_per_s,
            sum(m.preemptions for m in models), lanes, self.latencies,
        )  # fmt: skip
