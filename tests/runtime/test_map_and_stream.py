"""Many programs at once, and text as it comes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Graph
from flowc.ir.errors import RunError
from flowc.ir.types import ANY, INT, TEXT
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Outcome, Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import Generation
from tests.runtime.worlds import ScriptedLLM, World, pruned, text_graph


class Counter:
    """A tool that knows how many of its calls are in flight."""

    def __init__(self) -> None:
        self.now = self.most = 0

    async def __call__(self, x: int) -> int:
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(1 + x % 3)
        self.now -= 1
        if x == 5:
            raise ValueError("five")
        return x * 10


def graph_of(tool: Any) -> Graph:
    b = Builder("w", [("x", INT)])
    return b.finish(b.tool(tool, "tool", b.params[0], is_async=True))


def test_map_keeps_order_and_loses_nothing() -> None:
    counter = Counter()
    told: list[int] = []

    async def main() -> list[Outcome]:
        with Runtime(World()) as runtime:
            return await runtime.map_async(
                build_plan(graph_of(counter)),
                ((i,) for i in range(20)),
                concurrency=4,
                on_done=lambda i, o: told.append(i),
            )

    outcomes = VirtualLoop().run(main())
    assert [o.value for o in outcomes] == [None if i == 5 else i * 10 for i in range(20)]
    assert [i for i, o in enumerate(outcomes) if o.error] == [5]
    assert type(outcomes[5].error) is ValueError
    assert [o.seconds for o in outcomes] == [1.0 + i % 3 for i in range(20)]
    assert sorted(told) == list(range(20))
    assert told != sorted(told)
    assert counter.most == 4


def test_inputs_are_drawn_as_they_are_needed() -> None:
    drawn: list[int] = []

    def inputs() -> Iterator[tuple[int]]:
        for i in range(1000):
            drawn.append(i)
            yield (i,)

    async def main() -> None:
        with Runtime(World()) as runtime:
            task = asyncio.create_task(runtime.map_async(build_plan(graph_of(Counter())), inputs(), concurrency=3))
            await asyncio.sleep(0.5)
            assert drawn == [0, 1, 2]
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not runtime._drivers

    VirtualLoop().run(main())


@pytest.mark.parametrize("is_async", [False, True])
def test_inputs_that_fail(is_async: bool) -> None:
    def inputs() -> Iterator[tuple[Any, ...]]:
        yield (1,)
        yield (2, 3)  # one too many
        yield (4,)
        raise OSError("the file ended")

    told: dict[int, Outcome] = {}
    b = Builder("w", [("x", INT)])
    plan = build_plan(b.finish(b.py("x + 1", b.params[0], params=["x"])[0]))
    with Runtime(World()) as runtime:

        def run() -> Any:
            if is_async:
                return asyncio.run(runtime.map_async(plan, inputs(), on_done=told.__setitem__))
            return runtime.map(plan, inputs(), on_done=told.__setitem__)

        with pytest.raises(OSError, match="the file ended"):
            run()
    assert told[0].value == 2
    assert isinstance(told[1].error, TypeError)
    assert told[2].value == 5


def test_timeouts_are_per_program() -> None:
    async def main() -> list[Outcome]:
        with Runtime(World()) as runtime:
            return await runtime.map_async(build_plan(graph_of(Counter())), [(0,), (2,), (1,)], timeout_s=2.5)

    outcomes = VirtualLoop().run(main())
    assert [o.value for o in outcomes] == [0, None, 10]
    assert isinstance(outcomes[1].error, TimeoutError)


def test_an_error_in_on_done_is_raised_at_the_end() -> None:
    b = Builder("w", [("x", INT)])
    plan = build_plan(b.finish(b.params[0]))

    def on_done(i: int, outcome: Outcome) -> None:
        raise LookupError(f"on_done {i}")

    with Runtime(World()) as runtime, pytest.raises(LookupError, match="on_done 0"):
        runtime.map(plan, [(i,) for i in range(5)], on_done=on_done)


def test_empty_and_odd_maps() -> None:
    b = Builder("w", [("x", INT)])
    plan = build_plan(b.finish(b.params[0]))
    with Runtime(World()) as runtime:
        assert runtime.map(plan, []) == []
        assert asyncio.run(runtime.map_async(plan, [])) == []
        with pytest.raises(ValueError, match="concurrency"):
            runtime.map(plan, [(1,)], concurrency=0)
        assert [o.value for o in runtime.map(plan, [(i,) for i in range(3000)], concurrency=2)] == list(range(3000))


def test_an_interrupt_in_a_programs_own_python_means_all() -> None:
    def stop(x: int) -> int:
        if x == 2:
            raise KeyboardInterrupt
        return x

    b = Builder("w", [("x", INT)])
    plan = build_plan(b.finish(b.tool(stop, "stop", b.params[0])))
    told = []
    with Runtime(World()) as runtime, pytest.raises(KeyboardInterrupt):
        runtime.map(plan, [(i,) for i in range(5)], on_done=lambda i, o: told.append(i))
    assert told == [0, 1]


# -- streams
def pieces(graph: Graph, *args: Any, llm: Any = None) -> list[str]:
    with Runtime(World(llm)) as runtime:
        plan = build_plan(graph)
        first = list(runtime.stream(plan, args))
        assert "".join(first) == str(runtime.run(plan, args))

        async def gather() -> list[str]:
            return [piece async for piece in runtime.astream(plan, args)]

        assert asyncio.run(gather()) == first
    return first


def test_a_generation_that_is_the_result_is_live() -> None:
    assert pieces(text_graph(), "q") == ["<q|", "[1]", " q/", "0\n[", "2] ", "q/1", ">"]


def test_live_in_a_branch_and_in_a_called_workflow() -> None:
    b = Builder("inner", [("q", TEXT)])
    inner = b.finish(b.generate("m", b.params[0]))
    b = Builder("outer", [("q", TEXT)])
    (long,) = b.py("len(q) > 3", b.params[0], params=["q"], writes=(), raises=False)
    before = b.call(inner, b.const("notes"))
    with b.region() as then:
        then.yields = (b.call(inner, b.template("{}{}", b.params[0], before)),)
    with b.region() as orelse:
        orelse.yields = (b.const("short"),)
    (v,) = b.if_(long, then.done(), orelse.done())
    graph = pruned(b.finish(v))
    assert pieces(graph, "long") == ["<lo", "ng<", "not", "es>", ">"]
    assert pieces(graph, "abc") == ["short"]


def test_what_may_be_replaced_is_not_live() -> None:
    b = Builder("w", [("q", TEXT)])
    text = b.generate("m", b.params[0])
    (v,) = b.py("t.upper()", text, params=["t"], writes=(), raises=False)
    assert pieces(b.finish(v), "abc") == ["<ABC>"]

    b = Builder("w", [("q", TEXT)])
    with b.region() as body:
        body.yields = (b.generate("m", b.params[0]),)
        b.py("1 // 0", params=[])
    with b.region([("e", ANY)]) as handler:
        handler.yields = (b.const("sorry"),)
    (v,) = b.emit("try", [], [("v", TEXT)], {"handlers": ("Exception",)}, [body.done(), handler.done()])
    assert pieces(b.finish(v), "abc") == ["sorry"]

    b = Builder("w", [("q", TEXT)])
    with b.region([("i", INT), ("t", TEXT)]) as each:
        each.yields = (b.generate("m", each.params[1]),)
    (items,) = b.py("range(2)", params=[])
    (v,) = b.foreach(items, [b.params[0]], each.done())
    assert pieces(b.finish(v), "a") == ["<<a>>"]


def test_a_result_that_is_no_text() -> None:
    b = Builder("w", [("q", INT)])
    assert pieces(b.finish(b.params[0]), 5) == ["5"]


def test_a_backend_without_pieces_streams_at_the_end() -> None:
    class Whole(ScriptedLLM):
        def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            return [Generation("all of it") for _ in requests]

    assert pieces(text_graph(), "q", llm=Whole()) == ["all of it"]


def test_pieces_that_are_not_the_text() -> None:
    class Liar(ScriptedLLM):
        def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            if on_text is not None:
                on_text(0, "one thing")
            return [Generation("another") for _ in requests]

    with Runtime(World(Liar())) as runtime:
        with pytest.raises(RunError, match="not the text"):
            list(runtime.stream(build_plan(text_graph()), ("q",)))


def test_errors_come_out_of_the_iterator() -> None:
    with Runtime(World()) as runtime:
        plan = build_plan(text_graph())
        stream = runtime.stream(plan, ("bad",))
        with pytest.raises(ValueError, match="no bad"):
            next(stream)

        async def first() -> None:
            async for _ in runtime.astream(plan, ("bad",)):
                pass

        with pytest.raises(ValueError, match="no bad"):
            asyncio.run(first())


def test_the_first_piece_comes_before_the_last_is_written() -> None:
    release = threading.Event()

    class Slow(ScriptedLLM):
        def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            on_text(0, "first ")
            assert release.wait(10)
            on_text(0, "last")
            return [Generation("first last")]

    with Runtime(World(Slow())) as runtime:
        stream = runtime.stream(build_plan(text_graph()), ("q",))
        assert next(stream) == "first "
        release.set()
        assert list(stream) == ["last"]


def test_closing_a_stream_cancels_its_program() -> None:
    noticed = threading.Event()

    class Endless(ScriptedLLM):
        def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            for _ in range(2000):
                on_text(0, "more ")
                if is_cancelled(0):
                    noticed.set()
                    break
                time.sleep(0.001)
            return [Generation("")]

    with Runtime(World(Endless())) as runtime:
        stream = runtime.stream(build_plan(text_graph()), ("q",))
        assert next(stream) == "more "
        stream.close()  # type: ignore[attr-defined]
        assert noticed.wait(10)

        async def some() -> None:
            async for _ in runtime.astream(build_plan(text_graph()), ("q",)):
                break

        noticed.clear()
        asyncio.run(some())
        assert noticed.wait(10)
