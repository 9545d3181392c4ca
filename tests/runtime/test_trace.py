"""What a trace records, and what is made of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.errors import Loc
from flowc.ir.types import INT
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.trace import Trace
from tests.runtime.worlds import Play, World, text_graph


def traced_map(count: int = 6, query: str = "q{}") -> Trace:
    trace = Trace()
    with Runtime(World(), trace=trace) as runtime:
        runtime.map(build_plan(text_graph()), [(query.format(i),) for i in range(count)])
    return trace


def test_every_event_of_a_lane() -> None:
    trace = traced_map()
    kinds = [e.kind for e in trace.events]
    assert kinds.count("started") == kinds.count("program") == 6
    assert kinds.count("queued") == kinds.count("finished") == 12
    batches = [e for e in trace.events if e.kind == "batch"]
    assert [(b.lane, b.op) for b in batches] == [("search @pydocs", "search"), ("llm @default", "generate")]
    assert [b.size for b in batches] == [6, 6]
    queued = {e.number for e in trace.events if e.kind == "queued"}
    assert {n for b in batches for n in b.items} == queued


def test_failed_and_cancelled() -> None:
    trace = traced_map(2, "bad{}")
    kinds = [e.kind for e in trace.events]
    assert kinds.count("failed") == 2
    assert [e.op for e in trace.events if e.kind == "program"] == ["answer: ValueError"] * 2

    async def main(trace: Trace) -> None:
        async def sleepy(x: int) -> int:
            await asyncio.sleep(9)
            return x

        b = Builder("w", [("x", INT)])
        plan = build_plan(b.finish(b.tool(sleepy, "sleepy", b.params[0], timeout=2)))
        with Runtime(World()) as runtime:
            with pytest.raises(TimeoutError):
                await runtime.run_async(plan, (1,), trace=trace)

    trace = Trace()
    VirtualLoop().run(main(trace))
    (event,) = [e for e in trace.events if e.kind == "cancelled"]
    assert (event.op, event.lane, event.seconds) == ("tool sleepy", "async", 2.0)


def test_the_summary_says_where_time_went() -> None:
    """Virtual time: two programs ask an index that takes 3 s, the second while it is busy with the first."""

    class Slow(Play):
        async def search(self, requests: Any) -> Any:
            await asyncio.sleep(3)
            return await super().search(requests)

    b = Builder("w", [("x", INT)], loc=Loc("w.py", 5))
    plan = build_plan(b.finish(b.search("docs", b.template("{}", b.params[0]), k=1)))
    trace = Trace()

    async def main() -> None:
        with Runtime(Slow()) as runtime:
            first = asyncio.create_task(runtime.run_async(plan, (1,), trace=trace))
            await asyncio.sleep(1)
            await asyncio.gather(first, runtime.run_async(plan, (2,), trace=trace))

    VirtualLoop().run(main())
    (row,) = trace.summary()
    assert (row.op, row.loc, row.lane, row.count, row.failed) == ("search @docs", Loc("w.py", 5), "search @docs", 2, 0)
    assert (row.queue_s, row.run_s, row.overhead_s, row.mean_batch) == (2.0, 6.0, 0.0, 1.0)
    assert trace.overhead_s() == 0.0


def test_plain_python_is_recorded_where_it_ran() -> None:
    b = Builder("w", [("x", INT)], loc=Loc("w.py", 5))
    (v,) = b.py("x + 1", b.params[0], params=["x"])
    w = b.tool(lambda x: x, "ident", v)
    plan = build_plan(b.finish(w))
    trace = Trace()
    with Runtime(World()) as runtime:
        assert runtime.run(plan, (1,)) == runtime.run(plan, (1,), trace=trace) == 2
    assert [(e.kind, e.op, e.lane) for e in trace.events[1:-1]] == [
        ("finished", "py", "python"),
        ("finished", "tool ident", "python"),
    ]
    assert 0 <= trace.overhead_s() < 1


def test_chrome_json(tmp_path: Path) -> None:
    trace = traced_map()
    path = tmp_path / "trace.json"
    trace.save(path)
    events = json.loads(path.read_text())["traceEvents"]
    slices = [e for e in events if e["ph"] == "X" and e["cat"] == "batch"]
    assert [e["name"] for e in slices] == ["search x6", "generate x6"]
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in slices)
    starts = {e["id"] for e in events if e["ph"] == "s"}
    ends = {e["id"] for e in events if e["ph"] == "f"}
    assert starts == ends
    assert len(starts) == 12
    opened = [(e["tid"], e["id"]) for e in events if e["ph"] == "b"]
    assert sorted(opened) == sorted((e["tid"], e["id"]) for e in events if e["ph"] == "e")
    counters = [e["args"]["active"] for e in events if e["ph"] == "C" and e["name"] == "programs"]
    assert max(counters) == 6
    assert counters[-1] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["trace.json"]


def test_an_empty_trace() -> None:
    assert Trace().to_chrome()["traceEvents"] == []
    assert Trace().summary() == []
    assert Trace().overhead_s() == 0.0
