"""Wavefronts: what shares a backend call, what does not, and what one item's failure means to the others."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Graph
from flowc.ir.errors import ResourceError, RunError
from flowc.ir.types import ANY, TEXT
from flowc.ir.values import Docs
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.lanes import next_wavefront
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import GenerateRequest, Generation, SearchRequest, Ticket
from tests.runtime.worlds import Play, ScriptedIndex, ScriptedLLM, World, pruned, text_graph


def sizes(batches: list[list[str]]) -> list[int]:
    return list(map(len, batches))


def search_graph(**attrs: Any) -> Graph:
    b = Builder("w", [("q", TEXT)])
    return b.finish(b.search("docs", b.params[0], **attrs))


class Item:
    def __init__(self, key: int, priority: float | None = None) -> None:
        self.key = key
        self.ticket = Ticket(0, priority) if priority is not None else None


def test_a_wavefront_of_tickets_goes_by_priority() -> None:
    """Against the plain definition: the first of a stable sort says the key, its mates leave in that order."""
    draw = random.Random(5)
    for _ in range(200):
        items: list[Any] = [Item(draw.randrange(3), draw.randrange(4)) for _ in range(draw.randint(1, 12))]
        queue: deque[Any] = deque(items)
        most = draw.randint(1, 6)
        batch = next_wavefront(queue, most)
        ranked = sorted(items, key=lambda item: item.ticket.priority if item.ticket else 0.0)
        assert batch == [item for item in ranked if item.key == ranked[0].key][:most]
        assert list(queue) == [item for item in items if item not in batch]


def test_a_wavefront_is_what_shares_the_first_items_key() -> None:
    queue: deque[Any] = deque(map(Item, [1, 2, 1, 3, 1, 2]))

    def keys(items: Any) -> list[Any]:
        return [item.key for item in items]

    assert keys(next_wavefront(queue, 10)) == [1, 1, 1]
    assert keys(queue) == [2, 3, 2]
    assert keys(next_wavefront(queue, 1)) == [2]
    assert keys(queue) == [3, 2]
    queue = deque(map(Item, [1, 2, 3, 1, 1, 2]))
    assert keys(next_wavefront(queue, 2)) == [1, 1]
    assert keys(queue) == [2, 3, 1, 2], "what is left keeps its order"


def test_programs_of_a_map_share_calls() -> None:
    world = World()
    with Runtime(world) as runtime:
        outcomes = runtime.map(build_plan(text_graph()), [(f"q{i}",) for i in range(50)], concurrency=50)
    assert outcomes[49].value == "<q49|[1] q49/0\n[2] q49/1>"
    assert sizes(world.the_index.batches) == [32, 18]
    assert sum(sizes(world.the_llm.batches)) == 50
    assert len(world.the_llm.batches) <= 2


def test_branches_of_a_program_share_calls() -> None:
    world = World()
    b = Builder("w", [("q", TEXT)])
    found = [b.search("docs", b.template(f"{{}} {i}", b.params[0]), k=1) for i in range(5)]
    graph = b.finish(b.list_of(*found))
    with Runtime(world) as runtime:
        ordered = runtime.run(build_plan(graph), ("q",))
        assert sizes(world.the_index.batches) == [1] * 5
        assert runtime.run(build_plan(pruned(graph)), ("q",)) == ordered
    assert sizes(world.the_index.batches[5:]) == [5]


def test_items_of_a_parallel_loop_share_calls() -> None:
    world = World()
    b = Builder("w", [("qs", ANY)])
    with b.region([("q", TEXT)]) as body:
        docs = b.search("docs", body.params[0], k=1)
        text = b.generate("m", b.template("{}", docs))
        body.yields = b.py("[x]", text, params=["x"], writes=(), raises=False)
    (v,) = b.foreach(b.params[0], [], body.done(), collects=1, parallel=True)
    with Runtime(world) as runtime:
        value = runtime.run(build_plan(b.finish(v)), ([f"q{i}" for i in range(9)],))
    assert len(value) == 9
    assert sizes(world.the_index.batches) == [9]
    assert sizes(world.the_llm.batches) == [9]


def test_runs_of_one_loop_share_calls() -> None:
    world = World()

    async def main(runtime: Runtime) -> list[Any]:
        plan = build_plan(text_graph())
        return await asyncio.gather(*(runtime.run_async(plan, (f"q{i}",)) for i in range(20)))

    with Runtime(world) as runtime:
        assert len(asyncio.run(main(runtime))) == 20
    assert sizes(world.the_index.batches) == [20]


def test_threads_share_calls_while_the_lane_is_busy() -> None:
    llm = ScriptedLLM()
    llm.gate = threading.Event()
    b = Builder("w", [("q", TEXT)])
    plan = build_plan(b.finish(b.generate("m", b.params[0])))
    with Runtime(World(llm)) as runtime, ThreadPoolExecutor(9) as pool:
        first = pool.submit(runtime.run, plan, ("first",))
        assert llm.started.wait(5)
        others = [pool.submit(runtime.run, plan, (f"{i}",)) for i in range(7)]
        direct = pool.submit(runtime.call, "generate", "m", "direct")
        lane = runtime.lane("llm", "m")
        deadline = time.monotonic() + 5
        while len(lane._queue) < 8 and time.monotonic() < deadline:
            time.sleep(0.001)
        llm.gate.set()
        assert [f.result(5) for f in (first, *others)] == ["<first>", *(f"<{i}>" for i in range(7))]
        assert direct.result(5) == "<direct>"
    assert sizes(llm.batches) == [1, 8]
    assert len(llm.threads) == 1


class BusyLLM:
    """Answers a prompt when it is told to; notes how many calls it is in."""

    kind, max_batch = "scripted", 8

    def __init__(self, max_calls: int) -> None:
        self.name = "busy"
        self.max_calls = max_calls
        self.gates = {name: threading.Event() for name in ("long", "short", "other")}
        self.begun = {name: threading.Event() for name in self.gates}
        self.calls = self.most_calls = 0
        self.lock = threading.Lock()

    def batch_key(self, request: GenerateRequest) -> str:
        return request.prompt

    def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Generation]:
        with self.lock:
            self.calls += 1
            self.most_calls = max(self.calls, self.most_calls)
        prompt = requests[0].prompt
        self.begun[prompt].set()
        assert self.gates[prompt].wait(10)
        with self.lock:
            self.calls -= 1
        return [Generation(f"<{r.prompt}>") for r in requests]

    def choose(self, requests: Any) -> list[int]:
        raise AssertionError

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None: ...


def ask_graph() -> Graph:
    b = Builder("w", [("q", TEXT)])
    return b.finish(b.generate("default", b.params[0]))


def test_a_backend_that_takes_several_calls_answers_a_short_one_while_it_is_in_a_long_one() -> None:
    llm = BusyLLM(max_calls=2)
    plan = build_plan(ask_graph())
    with Runtime(World(llm)) as runtime, ThreadPoolExecutor(3) as pool:
        long = pool.submit(runtime.run, plan, ("long",))
        assert llm.begun["long"].wait(10)
        short = pool.submit(runtime.run, plan, ("short",))
        assert llm.begun["short"].wait(10)
        other = pool.submit(runtime.run, plan, ("other",))
        assert not llm.begun["other"].wait(0.05), "two calls at a time are the bound"
        llm.gates["short"].set()
        assert short.result(10) == "<short>"
        assert not long.done()
        llm.gates["other"].set()
        assert other.result(10) == "<other>"
        assert not long.done()
        llm.gates["long"].set()
        assert long.result(10) == "<long>"
    assert llm.most_calls == 2


def test_what_differs_leaves_at_once_where_several_calls_may_run() -> None:
    llm = BusyLLM(max_calls=3)
    with Runtime(World(llm)) as runtime, ThreadPoolExecutor(1) as pool:
        running = pool.submit(runtime.map, build_plan(ask_graph()), [("long",), ("short",), ("other",)], concurrency=3)
        assert all(begun.wait(10) for begun in llm.begun.values()), "three keys, three calls, none waits for another"
        for gate in llm.gates.values():
            gate.set()
        assert [o.value for o in running.result(10)] == ["<long>", "<short>", "<other>"]


def test_what_differs_does_not_share() -> None:
    world = World()
    b = Builder("w", [("q", TEXT), ("k", ANY)])
    (v,) = b.emit("search", b.params, [("v", ANY)], {"resource": "docs", "kw": ("k",)})
    plan = build_plan(b.finish(v))
    with Runtime(world) as runtime:
        outcomes = runtime.map(plan, [("q", 1 + i % 2) for i in range(10)])
    assert [len(o.value) for o in outcomes] == [1, 2] * 5
    assert sizes(world.the_index.batches) == [5, 5]
    llm = ScriptedLLM()
    b = Builder("w", [("q", TEXT), ("t", ANY)])
    (v,) = b.emit("generate", b.params, [("v", ANY)], {"resource": "m", "kw": ("temperature",)})
    plan = build_plan(b.finish(v))
    with Runtime(World(llm)) as runtime:
        runtime.map(plan, [("q", i % 2) for i in range(10)])
    assert sizes(llm.batches) == [5, 5]


def test_choose_and_generate_do_not_share() -> None:
    world = World()
    b = Builder("w", [("q", TEXT)])
    text = b.generate("m", b.params[0])
    choice = b.choose("m", b.params[0], b.list_of(b.const("a")))
    plan = build_plan(pruned(b.finish(b.list_of(text, choice))))
    with Runtime(world) as runtime:
        assert runtime.run(plan, ("q",)) == ["<q>", "a"]
    assert sizes(world.the_llm.batches) == [1, 1]


def test_an_item_that_fails_fails_alone() -> None:
    with Runtime(World()) as runtime:
        outcomes = runtime.map(build_plan(search_graph(k=1)), [("good",), ("bad",), ("fine",)])
    assert [type(o.error) for o in outcomes] == [type(None), ValueError, type(None)]


def test_a_call_that_fails_is_taken_apart() -> None:
    world = World()
    with Runtime(world) as runtime:
        outcomes = runtime.map(build_plan(search_graph(k=1)), [("good",), ("broken",), ("fine",)])
    assert [type(o.error) for o in outcomes] == [type(None), ArithmeticError, type(None)]
    assert sizes(world.the_index.batches) == [3, 1, 1, 1]


def test_a_server_that_is_down_is_asked_once() -> None:
    class Down(ScriptedIndex):
        def search(self, requests: Any) -> Any:
            self.batches.append([r.query for r in requests])
            raise ConnectionError("no route")

    index = Down()
    with Runtime(World(index=index)) as runtime:
        outcomes = runtime.map(build_plan(search_graph(k=1)), [("a",), ("b",)])
    assert sizes(index.batches) == [2]
    errors = [o.error for o in outcomes]
    assert all(type(e) is ConnectionError for e in errors)
    assert errors[0] is not errors[1], "each program adds its own line to its own error"


def test_a_backend_that_miscounts() -> None:
    class Short(ScriptedIndex):
        def search(self, requests: Any) -> Any:
            return []

    with Runtime(World(index=Short())) as runtime, pytest.raises(RunError, match="0 answers to 1 requests"):
        runtime.run(build_plan(search_graph()), ("q",))


def test_a_backend_that_answers_nonsense() -> None:
    class Odd(ScriptedLLM):
        def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> Any:
            return ["plain text" for _ in requests]

        def choose(self, requests: Any) -> Any:
            return [7 for _ in requests]

    with Runtime(World(Odd())) as runtime:
        with pytest.raises(RunError, match="not with a Generation"):
            runtime.call("generate", "m", "p")
        with pytest.raises(RunError, match="not with an index"):
            runtime.call("choose", "m", "p", ["a"])


def test_calls_outside_workflows() -> None:
    with Runtime(World()) as runtime:
        assert runtime.call("search", "docs", "q", k=2).texts == ("q/0", "q/1")
        assert runtime.submit_blocking("search", "docs", SearchRequest("q", 1)).texts == ("q/0",)
        assert runtime.call("generate", "m", "p", max_tokens=5, temperature=None) == "<p>"
        assert runtime.call("choose", "m", "p", ("a", "b")) == "b"
        assert runtime.call("embed", "e", "abc") == (3.0, 1.0)
        assert runtime.call("rerank", "r", "q", Docs()) == Docs()
        with pytest.raises(TypeError, match="must be a str"):
            runtime.call("generate", "m", 5)
        with pytest.raises(ResourceError):
            runtime.call("search", "missing", "q")


def test_resources_are_asked_for_once() -> None:
    world = World()
    with Runtime(world) as runtime:
        assert world.asked == []
        runtime.map(build_plan(text_graph()), [(f"q{i}",) for i in range(5)])
    assert world.asked == ["pydocs", "default"]


def test_async_backends_are_awaited_in_the_loop() -> None:
    loop = VirtualLoop()

    class Slow(Play):
        calls: list[int]

        async def search(self, requests: Any) -> Any:
            self.calls.append(len(requests))
            await asyncio.sleep(1)
            return [Docs() for _ in requests]

    slow = Slow()
    slow.calls = []

    async def main() -> None:
        with Runtime(slow) as runtime:
            plan = build_plan(search_graph(k=1))
            first = asyncio.gather(*(runtime.run_async(plan, (f"{i}",)) for i in range(5)))
            await asyncio.sleep(0.5)
            second = asyncio.gather(*(runtime.run_async(plan, (f"{i}",)) for i in range(7)))
            third = asyncio.create_task(runtime.map_async(plan, [("x",)] * 3))
            await first
            assert loop.time() == 1.0
            await second
            assert len(await third) == 3

    loop.run(main())
    assert slow.calls == [5, 10], "one call at a time; what came meanwhile leaves together"
    assert loop.time() == 2.0


def test_a_call_of_an_async_backend_that_nobody_waits_for_is_cancelled() -> None:
    state = []

    class Slow(Play):
        async def search(self, requests: Any) -> Any:
            try:
                await asyncio.sleep(100)
            except asyncio.CancelledError:
                state.append("cancelled")
                raise

    async def main() -> None:
        with Runtime(Slow()) as runtime:
            plan = build_plan(search_graph(k=1))
            tasks = [asyncio.create_task(runtime.run_async(plan, ("q",))) for _ in range(2)]
            await asyncio.sleep(1)
            tasks[0].cancel()
            await asyncio.sleep(1)
            assert state == []
            tasks[1].cancel()
            await asyncio.sleep(1)
            assert state == ["cancelled"]
            assert len(asyncio.all_tasks()) == 1

    VirtualLoop().run(main())


def test_async_backends_without_a_loop() -> None:
    play = Play()
    with Runtime(play) as runtime:
        assert runtime.run(build_plan(search_graph(k=2)), ("q",)).texts == ("q/0", "q/1")
        assert runtime.call("generate", "m", "abc") == "3"
        with pytest.raises(ValueError, match="no q4"):
            runtime.call("search", "m", "q4")


def test_failures_of_async_backends_are_taken_apart_too() -> None:
    class Fussy(Play):
        async def search(self, requests: Any) -> Any:
            if len(requests) > 1 or requests[0].query == "b":
                raise ArithmeticError("fussy")
            return [Docs() for _ in requests]

    with Runtime(Fussy()) as runtime:
        outcomes = runtime.map(build_plan(search_graph(k=1)), [("a",), ("b",), ("c",)])
    assert [type(o.error) for o in outcomes] == [type(None), ArithmeticError, type(None)]
