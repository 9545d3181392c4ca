"""What happened in a run, event by event: for Perfetto (or chrome://tracing), and summed up per operation.

Recording costs nothing when it is off: a traced program runs other instructions than an untraced one, and the places
where something waits look at one attribute. Times are the driver's clock, in seconds: under a virtual clock, virtual
ones.
"""

from __future__ import annotations

import json
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from flowc.ir.core import Op
from flowc.ir.errors import Loc

from .plan import CALL0, CALL1, CALL2, CALLN, TOOL, Block, Instruction
from .requests import label_of

if TYPE_CHECKING:
    from .program import Handle, LaneItem, Program

Kind = Literal["program", "queued", "started", "finished", "failed", "cancelled", "batch"]


class Event(NamedTuple):
    """One thing that happened: `seconds` it took, `waited_s` before it began, and `behind_s` until it was delivered."""

    kind: Kind
    at_s: float
    program: int
    op: str = ""
    lane: str = ""
    loc: Loc | None = None
    seconds: float = 0.0
    waited_s: float = 0.0
    behind_s: float = 0.0
    size: int = 1  # of a batch
    number: int = 0  # ties the events of one operation's run together; of a batch: its own number
    items: tuple[int, ...] = ()  # of a batch: the numbers of its operations


class Record:
    """When something that waits was queued, began to run and ended; None where it has not come to that."""

    __slots__ = ("batch", "ended_s", "number", "queued_s", "started_s")

    def __init__(self, number: int, queued_s: float) -> None:
        self.number = number
        self.queued_s = queued_s
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self.batch = 1


@dataclass(frozen=True, slots=True)
class OpSummary:
    """All runs of one operation: seconds in total spent in a queue, running, and on the way back to its program."""

    op: str
    loc: Loc | None
    lane: str
    count: int
    failed: int
    queue_s: float
    run_s: float
    overhead_s: float
    mean_batch: float


@dataclass(slots=True)
class Trace:
    """A recording of any number of programs, for `Runtime(trace=...)` or a single run; read it when that is over."""

    events: list[Event] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1, 1 << 62)))

    # -- what the driver and the lanes report
    def program_started(self, program: Program) -> None:
        self.events.append(Event("started", program.started_s, program.id, program.plan.name, "program"))

    def program_ended(self, program: Program, error: BaseException | None) -> None:
        now = program.driver.now()
        kind: Kind = "program"
        name = program.plan.name if error is None else f"{program.plan.name}: {type(error).__name__}"
        self.events.append(Event(kind, now, program.id, name, "program", seconds=now - program.started_s))

    def queued(self, handle: Handle, op: Op, lane: str) -> None:
        """Something begins to wait; its record goes along with it."""
        now = handle.driver.now()
        handle.record = Record(next(self._numbers), now)
        self.events.append(
            Event("queued", now, handle.frame.program.id, label_of(op), lane, op.loc, number=handle.record.number)
        )

    def batch(self, lane: str, method: str, items: Iterable[LaneItem], start_s: float, end_s: float) -> None:
        """A backend's call ended."""
        mine = [item.record for item in items if item.record is not None and item.frame.program.trace is self]
        for record in mine:
            record.started_s, record.ended_s, record.batch = start_s, end_s, len(mine)
        numbers = tuple(record.number for record in mine)
        length = end_s - start_s
        number = next(self._numbers)
        self.events.append(
            Event("batch", start_s, 0, method, lane, None, length, size=len(mine), number=number, items=numbers)
        )

    def ended(self, handle: Handle, record: Record, kind: Kind, op: Op, lane: str) -> None:
        """What waited is over."""
        now = handle.driver.now()
        end = now if record.ended_s is None else record.ended_s
        start = end if record.started_s is None else record.started_s
        waited_s, behind_s = max(0.0, start - record.queued_s), max(0.0, now - end)
        self.events.append(
            Event(
                kind, now, handle.frame.program.id, label_of(op), lane, op.loc,
                max(0.0, end - start), waited_s, behind_s, record.batch, record.number,
            )
        )  # fmt: skip

    def ran(self, program: Program, label: str, loc: Loc | None, start_s: float, ok: bool) -> None:
        """Something ran on the spot."""
        now = program.driver.now()
        self.events.append(Event("finished" if ok else "failed", now, program.id, label, "python", loc, now - start_s))

    # -- what comes of it
    def summary(self) -> list[OpSummary]:
        """Per operation (and line) where its time went, the longest first."""
        rows: defaultdict[tuple[str, Loc | None, str], list[Event]] = defaultdict(list)
        for event in self.events:
            if event.kind in ("finished", "failed", "cancelled"):
                rows[event.op, event.loc, event.lane].append(event)
        found = [
            OpSummary(
                op, loc, lane, len(events),
                sum(e.kind == "failed" for e in events),
                sum(e.waited_s for e in events),
                sum(e.seconds for e in events),
                sum(e.behind_s for e in events),
                sum(e.size for e in events) / len(events),
            )
            for (op, loc, lane), events in rows.items()
        ]  # fmt: skip
        return sorted(found, key=lambda row: (-(row.run_s + row.queue_s), row.op))

    def overhead_s(self) -> float:
        """Seconds of all programs in which none of their operations ran or was queued: the runtime's own share."""
        busy: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
        total: dict[int, float] = {}
        for e in self.events:
            if e.kind in ("finished", "failed", "cancelled"):
                end = e.at_s - e.behind_s
                busy[e.program].append((end - e.seconds - e.waited_s, end))
            elif e.kind == "program":
                total[e.program] = e.seconds
        return sum(max(0.0, seconds - _covered(busy[program])) for program, seconds in total.items())

    def to_chrome(self) -> dict[str, Any]:
        """The trace in Chrome's event format: lanes with batches, programs with operations, and arrows between."""
        return {"traceEvents": list(self._chrome_events()), "displayTimeUnit": "ms"}

    def _chrome_events(self) -> Iterator[dict[str, Any]]:
        events = sorted(self.events, key=lambda e: e.at_s)
        if not events:
            return
        zero = min(e.at_s - e.seconds - e.waited_s - e.behind_s if e.kind != "batch" else e.at_s for e in events)

        def us(seconds: float) -> float:
            return round((seconds - zero) * 1e6, 3)

        lanes = {name: i for i, name in enumerate(dict.fromkeys(e.lane for e in events if e.kind == "batch"), 1)}
        yield {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "lanes"}}
        yield {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "programs"}}
        for name, tid in lanes.items():
            yield {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        queued: defaultdict[str, int] = defaultdict(int)
        active = 0
        place = {e.number: us(e.at_s) for e in events if e.kind == "queued"}
        for e in events:
            where = {"file": e.loc.file, "line": e.loc.line} if e.loc is not None else {}
            if e.kind == "batch":
                tid = lanes[e.lane]
                name = f"{e.op} x{e.size}"
                yield {
                    "ph": "X",
                    "pid": 1,
                    "tid": tid,
                    "name": name,
                    "cat": "batch",
                    "ts": us(e.at_s),
                    "dur": round(e.seconds * 1e6, 3),
                }
                for number in e.items:
                    if number in place:
                        yield {
                            "ph": "f",
                            "bp": "e",
                            "pid": 1,
                            "tid": tid,
                            "name": "batch",
                            "cat": "batch",
                            "id": number,
                            "ts": us(e.at_s),
                        }
                queued[e.lane] -= e.size
                yield {
                    "ph": "C",
                    "pid": 1,
                    "name": f"queued {e.lane}",
                    "ts": us(e.at_s),
                    "args": {"items": max(0, queued[e.lane])},
                }
            elif e.kind == "queued":
                if e.lane in lanes:
                    yield {
                        "ph": "s",
                        "pid": 2,
                        "tid": e.program,
                        "name": "batch",
                        "cat": "batch",
                        "id": e.number,
                        "ts": us(e.at_s),
                    }
                    queued[e.lane] += 1
                    yield {
                        "ph": "C",
                        "pid": 1,
                        "name": f"queued {e.lane}",
                        "ts": us(e.at_s),
                        "args": {"items": queued[e.lane]},
                    }
            elif e.kind == "started":
                active += 1
                yield {"ph": "C", "pid": 2, "name": "programs", "ts": us(e.at_s), "args": {"active": active}}
            elif e.kind == "program":
                active -= 1
                yield {"ph": "C", "pid": 2, "name": "programs", "ts": us(e.at_s), "args": {"active": active}}
                start = us(e.at_s - e.seconds)
                yield {
                    "ph": "X",
                    "pid": 2,
                    "tid": e.program,
                    "name": e.op,
                    "cat": "program",
                    "ts": start,
                    "dur": round(e.seconds * 1e6, 3),
                }
            else:  # operations of a program overlap: nestable asynchronous slices
                begin = us(e.at_s - e.behind_s - e.seconds - e.waited_s)
                common = {
                    "pid": 2,
                    "tid": e.program,
                    "cat": "op",
                    "name": e.op,
                    "id": f"{e.program}.{e.number or id(e)}",
                }
                yield {
                    **common,
                    "ph": "b",
                    "ts": begin,
                    "args": {**where, "lane": e.lane, "queue_ms": e.waited_s * 1e3, "batch": e.size},
                }
                yield {**common, "ph": "e", "ts": us(e.at_s), "args": {"end": e.kind}}

    def save(self, path: str | Path) -> None:
        """Writes the Chrome JSON, whole or not at all."""
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_text(json.dumps(self.to_chrome()), encoding="utf-8")
        partial.replace(target)


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        if end > until:
            total += end - max(start, until)
            until = end
    return total


class _Current(threading.local):
    program: Program | None = None


current = _Current()
"""The program that the driver of this thread is running, while it is traced."""


def traced_code(block: Block) -> list[Instruction]:
    """The block's instructions with every plain call recorded; made once, when first needed."""
    if block.traced is None:
        block.traced = [_traced(block, i) for i in range(block.n)]
    return block.traced


def _traced(block: Block, index: int) -> Instruction:
    kind, _, a, b, out = block.code[index]
    if kind not in (CALL0, CALL1, CALL2, CALLN, TOOL):
        return block.code[index]
    op = block.ops[index]
    label, loc = label_of(op), op.loc
    if op.name not in ("py", "fused", "tool"):
        return block.code[index]
    return (kind, _recorded(block.code, index, label, loc), a, b, out)


def _recorded(code: list[Instruction], index: int, label: str, loc: Loc | None) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        program = current.program
        if program is None or program.trace is None:
            return code[index][1](*args)
        start = program.driver.now()
        ok = False
        try:
            value = code[index][1](*args)
            ok = True
        finally:
            if program.trace is not None:
                program.trace.ran(program, label, loc, start, ok)
        return value

    return call
