"""Timeouts, retries, cancellation, interrupts and threads."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Graph
from flowc.ir.errors import Loc, NodeTimeoutError, ProgramTimeoutError, RunError
from flowc.ir.types import ANY, INT, TEXT
from flowc.runtime.clock import StuckError, VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import SLOW_S, Pace, build_plan
from tests.runtime.worlds import ScriptedLLM, World, pruned, text_graph


def tool_graph(fn: Any, times: int = 1, **attrs: Any) -> Graph:
    b = Builder("w", [("x", ANY)], loc=Loc("w.py", 4))
    v = b.params[0]
    for _ in range(times):
        v = b.tool(fn, "fn", v, **attrs)
    return b.finish(v)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    gc.collect()
    deadline = time.monotonic() + 5
    while (left := set(threading.enumerate()) - before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not left, left


# -- timeouts
def test_node_timeouts_of_async_tools() -> None:
    cancelled = []

    async def sleepy(x: int) -> int:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            cancelled.append(x)
            raise
        return x

    loop = VirtualLoop()

    async def main() -> float:
        with Runtime(World()) as runtime:
            with pytest.raises(NodeTimeoutError, match=r"`tool fn` at w.py:4 took longer than its timeout of 2 s"):
                await runtime.run_async(build_plan(tool_graph(sleepy, timeout=2)), (7,))
            await asyncio.sleep(0)
        return loop.time()

    assert loop.run(main()) == 2.0
    assert cancelled == [7]


def test_node_timeouts_of_sync_tools() -> None:
    release = threading.Event()
    with Runtime(World()) as runtime:
        start = time.monotonic()
        with pytest.raises(TimeoutError, match="fn"):
            runtime.run(build_plan(tool_graph(lambda x: release.wait(20), timeout=0.05)), (1,))
        assert time.monotonic() - start < 5
        release.set()


def test_node_timeouts_in_lanes() -> None:
    llm = ScriptedLLM()
    llm.gate = threading.Event()
    with Runtime(World(llm)) as runtime:
        with pytest.raises(NodeTimeoutError, match="generate @default"):
            runtime.run(build_plan(text_graph(timeout=0.05)), ("q",))
        llm.gate.set()


def test_a_timeout_given_as_a_value() -> None:
    llm = ScriptedLLM()
    llm.gate = threading.Event()
    b = Builder("w", [("q", TEXT), ("limit", ANY)])
    (v,) = b.emit("generate", b.params, [("v", TEXT)], {"resource": "m", "kw": ("timeout",)})
    with Runtime(World(llm)) as runtime:
        with pytest.raises(NodeTimeoutError):
            runtime.run(build_plan(b.finish(v)), ("q", 0.05))
        llm.gate.set()


def test_a_timeout_can_be_handled() -> None:
    async def sleepy(x: int) -> int:
        await asyncio.sleep(100)
        return x

    b = Builder("w", [("x", INT)])
    with b.region() as body:
        body.yields = (b.tool(sleepy, "sleepy", b.params[0], timeout=0.01),)
    with b.region([("e", ANY)]) as handler:
        handler.yields = (b.const("late"),)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("TimeoutError",)}, [body.done(), handler.done()])
    with Runtime(World()) as runtime:
        assert runtime.run(build_plan(b.finish(v)), (1,)) == "late"


@pytest.mark.parametrize("how", ["async", "lane", "loop"])
def test_program_timeouts(how: str) -> None:
    async def sleepy(x: int) -> int:
        await asyncio.sleep(100)
        return x

    llm = ScriptedLLM()
    llm.gate = threading.Event()
    if how == "loop":
        b = Builder("w", [("x", ANY)])
        with b.region([("i", INT)]) as cond:
            cond.yields = (b.const(True),)
        with b.region([("i", INT)]) as body:
            body.yields = (b.const(True), *b.py("i + 1", body.params[0], params=["i"]))
        graph = b.finish(b.while_([b.const(0)], cond.done(), body.done(), limit=10**9)[0])
    else:
        graph = tool_graph(sleepy) if how == "async" else text_graph()
    with Runtime(World(llm)) as runtime:
        with pytest.raises(ProgramTimeoutError, match=r"longer than its timeout of 0.05 s"):
            runtime.run(build_plan(graph), ("x",), timeout_s=0.05)
        llm.gate.set()


# -- retries
@pytest.mark.parametrize("is_async", [False, True])
def test_retries_of_idempotent_tools(is_async: bool) -> None:
    calls: list[float] = []
    loop = VirtualLoop()

    def flaky(x: int) -> int:
        calls.append(loop.time())
        if len(calls) < 4:
            raise ConnectionError(f"try {len(calls)}")
        return x

    async def flaky_later(x: int) -> int:
        return flaky(x)

    async def main() -> Any:
        with Runtime(World()) as runtime:
            graph = tool_graph(flaky_later if is_async else flaky, retries=3, idempotent=True)
            return await runtime.run_async(build_plan(graph), (5,))

    assert loop.run(main()) == 5
    waits = [b - a for a, b in pairwise(calls)]
    assert waits == pytest.approx([0.05, 0.1, 0.2])


def test_the_last_error_of_all_tries_is_raised() -> None:
    calls = []

    def broken(x: int) -> int:
        calls.append(x)
        raise ConnectionError(len(calls))

    with Runtime(World()) as runtime:
        with pytest.raises(ConnectionError, match="2"):
            runtime.run(build_plan(tool_graph(broken, retries=1, idempotent=True)), (5,))
        assert len(calls) == 2
        with pytest.raises(ConnectionError, match="3"):
            runtime.run(build_plan(tool_graph(broken, retries=1)), (5,))
    assert len(calls) == 3, "what is not idempotent is not called again"


# -- cancellation
def test_cancelling_the_awaiting_task() -> None:
    state: list[str] = []

    async def sleepy(x: int) -> int:
        state.append("started")
        try:
            await asyncio.sleep(100)
        finally:
            state.append("cancelled")
        return x

    b = Builder("w", [("x", INT)])
    calls = [b.tool(sleepy, "sleepy", b.params[0]) for _ in range(3)]
    plan = build_plan(pruned(b.finish(b.list_of(*calls))))

    async def main() -> None:
        with Runtime(World()) as runtime:
            task = asyncio.create_task(runtime.run_async(plan, (1,)))
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0)
            assert len(asyncio.all_tasks()) == 1
            assert not runtime._drivers

    loop = VirtualLoop()
    loop.run(main())
    assert state == ["started"] * 3 + ["cancelled"] * 3


def test_asyncio_timeout_around_a_run() -> None:
    async def sleepy(x: int) -> int:
        await asyncio.sleep(100)
        return x

    async def main() -> None:
        with Runtime(World()) as runtime:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1):
                    await runtime.run_async(build_plan(tool_graph(sleepy)), (1,))
            assert await runtime.run_async(build_plan(tool_graph(lambda x: x)), (2,)) == 2

    VirtualLoop().run(main())


def test_tools_that_use_asyncio_timeout() -> None:
    """Several awaits share a task: what one of them does to it must not reach the next."""

    async def impatient(x: int) -> int:
        try:
            async with asyncio.timeout(0.5):
                await asyncio.sleep(10)
        except TimeoutError:
            x += 1
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        return x

    async def main() -> Any:
        with Runtime(World()) as runtime:
            return await runtime.run_async(build_plan(tool_graph(impatient, times=4)), (0,))

    assert VirtualLoop().run(main()) == 4


def test_a_timed_out_tool_does_not_cancel_the_program() -> None:
    async def stubborn(x: int) -> int:
        try:
            await asyncio.sleep(10)
        except asyncio.CancelledError:
            await asyncio.sleep(1)  # takes its time to clean up
        return x

    b = Builder("w", [("x", INT)])
    with b.region() as body:
        body.yields = (b.tool(stubborn, "stubborn", b.params[0], timeout=1),)
    with b.region([("e", ANY)]) as handler:
        handler.yields = (b.const("late"),)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("TimeoutError",)}, [body.done(), handler.done()])

    async def wait(x: Any) -> Any:
        await asyncio.sleep(3)
        return x

    plan = build_plan(b.finish(b.tool(wait, "wait", v)))

    async def main() -> Any:
        with Runtime(World()) as runtime:
            return await runtime.run_async(plan, (1,))

    loop = VirtualLoop()
    assert loop.run(main()) == "late"
    assert loop.time() == 4.0


def test_a_tool_that_raises_cancelled_error_itself() -> None:
    async def odd(x: int) -> int:
        raise asyncio.CancelledError("of its own")

    async def main() -> None:
        with Runtime(World()) as runtime:
            with pytest.raises(asyncio.CancelledError):
                await runtime.run_async(build_plan(tool_graph(odd)), (1,))

    VirtualLoop().run(main())


def test_cancelled_requests_leave_the_queue_and_are_told_to_the_backend() -> None:
    llm = ScriptedLLM(max_batch=1)
    llm.gate = threading.Event()
    b = Builder("w", [("q", TEXT)])
    plan = build_plan(b.finish(b.generate("m", b.params[0])))

    async def main() -> None:
        with Runtime(World(llm)) as runtime:
            first = asyncio.create_task(runtime.run_async(plan, ("first",)))
            await asyncio.to_thread(llm.started.wait)
            others = [asyncio.create_task(runtime.run_async(plan, (f"other {i}",))) for i in range(3)]
            await asyncio.sleep(0.05)
            for task in (first, others[0], others[1]):
                task.cancel()
            await asyncio.sleep(0.05)
            assert llm.gate is not None
            llm.gate.set()
            assert await others[2] == "<other 2>"

    asyncio.run(main())
    assert llm.batches == [["first"], ["other 2"]]
    assert llm.cancelled == ["first"]


def test_what_can_no_longer_matter_is_cancelled() -> None:
    """A failure cancels what comes after it in program order, also inside other regions."""
    state: list[str] = []

    async def sleepy(x: int) -> int:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            state.append(f"cancelled {x}")
            raise
        return x

    async def fails(x: int) -> int:
        await asyncio.sleep(1)
        raise ValueError(x)

    b = Builder("w", [("xs", ANY)])
    v = b.tool(fails, "fails", b.params[0])
    with b.region([("x", ANY)]) as body:
        got = b.tool(sleepy, "sleepy", body.params[0])
        body.yields = b.py("[x]", got, params=["x"], writes=(), raises=False)
    (w,) = b.foreach(b.params[0], [], body.done(), collects=1, parallel=True)
    plan = build_plan(pruned(b.finish(b.list_of(v, w))))

    async def main() -> None:
        with Runtime(World()) as runtime:
            with pytest.raises(ValueError, match="1"):
                await runtime.run_async(plan, ([1, 2],))
            await asyncio.sleep(0)

    loop = VirtualLoop()
    loop.run(main())
    assert loop.time() == 1.0
    assert state == ["cancelled 1", "cancelled 2"]


def test_a_handler_that_waits_is_cancelled_too() -> None:
    state = []

    async def fails(x: int) -> int:
        await asyncio.sleep(1)
        raise ValueError(x)

    async def sleepy(x: int) -> int:
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            state.append("cancelled")
            raise
        return x

    b = Builder("w", [("x", INT)])
    with b.region() as body:
        body.yields = (b.tool(fails, "fails", b.params[0]),)
    with b.region([("e", ANY)]) as handler:
        handler.yields = (b.tool(sleepy, "sleepy", b.params[0]),)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("ValueError",)}, [body.done(), handler.done()])
    plan = build_plan(b.finish(v))

    async def main() -> None:
        with Runtime(World()) as runtime:
            with pytest.raises(ProgramTimeoutError):
                await runtime.run_async(plan, (1,), timeout_s=5)
            await asyncio.sleep(0)

    VirtualLoop().run(main())
    assert state == ["cancelled"]


def test_a_finished_program_is_held_by_nothing() -> None:
    """Not by the timers of timeouts that it did not need, nor by an idle lane."""

    class Big:
        pass

    made: list[weakref.ref[Big]] = []

    async def big(x: Any) -> Any:
        await asyncio.sleep(0.01)
        value = Big()
        made.append(weakref.ref(value))
        return value

    b = Builder("w", [("x", ANY)])
    v = b.tool(big, "big", b.params[0], timeout=1000)
    w, u = b.tool(big, "big", b.params[0], timeout=1000), b.generate("m", b.const("p"), timeout=1000)
    (none,) = b.py("(x, y, t) and None", v, w, u, params=["x", "y", "t"])
    plan = build_plan(pruned(b.finish(none)))

    async def main() -> None:
        with Runtime(World()) as runtime:
            assert await runtime.run_async(plan, (Big(),), timeout_s=1000) is None
            await asyncio.sleep(0.01)
            gc.collect()
            assert [ref() for ref in made] == [None, None]

    asyncio.run(main())


def _interrupt_soon(delay_s: float = 0.1) -> threading.Timer:
    """As Ctrl-C does: a signal that reaches the main thread."""
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(delay_s, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    return timer


def test_without_threads_tools_stay_where_they_are() -> None:
    threads = set()

    def blocking(x: int) -> int:
        threads.add(threading.get_ident())
        time.sleep(2 * SLOW_S)
        return x

    with Runtime(World(), io_threads=0) as runtime:
        assert len(runtime.map(build_plan(tool_graph(blocking, timeout=1)), [(i,) for i in range(3)])) == 3
        assert len(runtime.map(build_plan(tool_graph(blocking)), [(i,) for i in range(3)])) == 3
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("how", ["lane", "async", "python", "tool"])
def test_an_interrupt_ends_a_run_promptly(how: str) -> None:
    async def sleepy(x: Any) -> Any:
        await asyncio.sleep(60)

    llm = ScriptedLLM()
    llm.gate = threading.Event()
    b = Builder("w", [("x", ANY)])
    graph = {
        "lane": text_graph(),
        "async": tool_graph(sleepy),
        "python": b.finish(b.py("__import__('time').sleep(60)", params=[])[0]),
        "tool": tool_graph(lambda x: time.sleep(60)),
    }[how]
    with Runtime(World(llm)) as runtime:
        timer = _interrupt_soon()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            runtime.run(build_plan(graph), ("x",))
        assert time.monotonic() - start < 5
        timer.join()
        assert not runtime._running
        llm.gate.set()


def test_an_interrupted_map_keeps_what_is_done() -> None:
    async def some(x: int) -> int:
        await asyncio.sleep(0 if x < 3 else 60)
        return x

    told = []
    with Runtime(World()) as runtime:
        timer = _interrupt_soon(0.2)
        with pytest.raises(KeyboardInterrupt) as caught:
            runtime.map(
                build_plan(tool_graph(some)), [(i,) for i in range(6)], on_done=lambda i, o: told.append((i, o.value))
            )
        timer.join()
    assert sorted(told) == [(0, 0), (1, 1), (2, 2)]
    assert {i: o.value for i, o in caught.value.outcomes.items()} == dict(told)  # type: ignore[attr-defined]


# -- threads
def test_pace() -> None:
    pace = Pace()
    pace.note(0.02)
    assert pace.is_slow, "a first slow call is enough"
    for _ in range(30):
        pace.note(SLOW_S / 20)
    assert not pace.is_slow, "a slow import is no verdict"


def test_blocking_tools_overlap_after_the_first_call() -> None:
    main = threading.get_ident()
    threads = []

    def blocking(x: int) -> int:
        threads.append(threading.get_ident())
        time.sleep(0.03)
        return x

    with Runtime(World()) as runtime:
        start = time.monotonic()
        outcomes = runtime.map(build_plan(tool_graph(blocking)), [(i,) for i in range(32)])
        spent = time.monotonic() - start
    assert [o.value for o in outcomes] == list(range(32))
    assert threads.count(main) == 1
    assert spent < 32 * 0.03 / 3


def test_tools_in_threads_see_the_callers_context() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen = []

    def look(x: int) -> int:
        seen.append((who.get(), threading.current_thread() is threading.main_thread()))
        return x

    look.thread = True  # type: ignore[attr-defined]
    who.set("me")
    with Runtime(World()) as runtime:
        runtime.run(build_plan(tool_graph(look)), (1,))
        asyncio.run(runtime.run_async(build_plan(tool_graph(look)), (1,)))
    assert seen == [("me", False), ("me", False)]


def test_programs_of_a_map_do_not_see_each_others_context() -> None:
    who: contextvars.ContextVar[int] = contextvars.ContextVar("who", default=0)

    async def step(x: int) -> int:
        assert who.get() in (0, x)
        who.set(x)
        await asyncio.sleep(0)
        return x

    with Runtime(World()) as runtime:
        outcomes = runtime.map(build_plan(tool_graph(step, times=3)), [(i,) for i in range(1, 20)], concurrency=3)
    assert [o.error for o in outcomes] == [None] * 19


def test_programs_inside_tools_of_programs() -> None:
    """A pool full of tools that run programs with tools of their own cannot wait for itself."""
    with Runtime(World(), io_threads=2) as runtime:

        def slow(x: int) -> int:
            time.sleep(0.005)
            return x + 1

        inner = build_plan(tool_graph(slow, times=2))

        def nested(x: int) -> Any:
            time.sleep(0.005)
            return runtime.run(inner, (x,))

        outcomes = runtime.map(build_plan(tool_graph(nested)), [(i,) for i in range(8)])
    assert [o.value for o in outcomes] == [i + 2 for i in range(8)]


def test_a_synchronous_run_inside_a_running_loop() -> None:
    async def sleepy(x: int) -> int:
        await asyncio.sleep(0.001)
        return x + 1

    async def main() -> Any:
        with Runtime(World()) as runtime:
            return runtime.run(build_plan(tool_graph(sleepy)), (1,)), runtime.map(
                build_plan(tool_graph(sleepy)), [(2,)]
            )

    value, (outcome,) = asyncio.run(main())
    assert (value, outcome.value) == (2, 3)


def test_async_clients_keep_their_loop_between_runs() -> None:
    loops = []

    async def which(x: int) -> int:
        loops.append(asyncio.get_running_loop())
        return x

    with Runtime(World()) as runtime:
        for _ in range(3):
            runtime.run(build_plan(tool_graph(which)), (1,))
        assert len(set(loops)) == 1
        assert not loops[0].is_closed()
    assert loops[0].is_closed()


def test_tasks_that_a_tool_leaves_behind_are_cancelled() -> None:
    left = []

    async def careless(x: int) -> int:
        left.append(asyncio.create_task(asyncio.sleep(100)))
        return x

    with Runtime(World()) as runtime:
        runtime.run(build_plan(tool_graph(careless)), (1,))
    assert left[0].cancelled()


def test_no_task_is_made_for_a_chain_of_awaits() -> None:
    tasks = set()

    async def who(x: int) -> int:
        tasks.add(asyncio.current_task())
        await asyncio.sleep(0)
        return x

    async def main() -> set[Any]:
        with Runtime(World()) as runtime:
            await runtime.run_async(build_plan(tool_graph(who, times=5)), (1,))
        return {asyncio.current_task()}

    assert asyncio.run(main()) == tasks


# -- the end
def test_a_closed_runtime() -> None:
    runtime = Runtime(World())
    assert runtime.run(build_plan(text_graph()), ("q",)).startswith("<q|")
    runtime.close()
    runtime.close()
    with pytest.raises(RunError, match="closed"):
        runtime.run(build_plan(text_graph()), ("q",))


def test_closing_ends_what_runs() -> None:
    llm = ScriptedLLM()
    llm.gate = threading.Event()
    runtime = Runtime(World(llm))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            runtime.run(build_plan(text_graph()), ("q",))
        except BaseException as e:
            errors.append(e)

    thread = threading.Thread(target=work)
    thread.start()
    assert llm.started.wait(5)
    closer = threading.Thread(target=runtime.close)
    closer.start()
    thread.join(5)
    assert isinstance(errors[0], RunError)
    llm.gate.set()
    closer.join(5)


def test_a_virtual_loop_says_when_nothing_can_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowc.runtime.clock.STUCK_S", 0.05)

    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(StuckError):
        VirtualLoop().run(main())
