"""Awaits in turn are one coroutine: values, places of errors, cancellation and time stay those of plain asyncio."""

from __future__ import annotations

import asyncio
import linecache
import traceback
from typing import Any

import pytest

from flowc import tool, workflow
from flowc.ir.core import walk
from flowc.passes.manager import PassManager, pipeline
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import Plan, build_plan
from tests.runtime.worlds import World

LOG: list[Any] = []
WAYS = ("eager", 0, 1, 2, 3)


async def step(x: int, ms: int = 10) -> int:
    LOG.append(("begin", x))
    try:
        await asyncio.sleep(ms / 1000)
    except asyncio.CancelledError:
        LOG.append(("cancelled", x))
        raise
    if x < 0:
        raise ValueError(x)
    LOG.append(("end", x))
    return x + 1


@tool(reads=(), writes=())
async def look(x: int) -> int:
    LOG.append(("look", x))
    await asyncio.sleep(0.015)
    return x


def plan(flow: Any, level: int) -> Plan:
    return build_plan(PassManager(pipeline(level), verify_each=True).run(flow.graph()).graph)


def run(flow: Any, way: Any, *args: Any, within_s: float = 60.0) -> tuple[Any, float]:
    """(value or error, milliseconds)"""
    LOG.clear()
    loop = VirtualLoop()

    async def main() -> Any:
        try:
            if way == "eager":
                return await asyncio.wait_for(flow.eager(*args), within_s)
            with Runtime(World()) as runtime:
                return await asyncio.wait_for(runtime.run_async(plan(flow, way), args), within_s)
        except Exception as e:
            return e

    found = loop.run(main())
    return found, round(loop.time() * 1000, 6)


def coroutines(flow: Any, level: int = 2) -> list[int]:
    """How many awaiting operations each fused run holds."""
    graph = PassManager(pipeline(level)).run(flow.graph()).graph
    found = [sum(bool(o.attr("is_async")) for o in op.regions[0].ops) for op in walk(graph.body) if op.name == "fused"]
    return [n for n in found if n]


@workflow
async def chain(x: int) -> Any:
    x = await step(x)
    y = x * 2
    LOG.append(y)
    x = await step(x + y)
    x = await step(-x if y > 10 else x)
    return x, y


@pytest.mark.parametrize("way", WAYS)
def test_a_chain(way: Any) -> None:
    assert run(chain, way, 1) == ((8, 4), 30.0)
    assert LOG == [("begin", 1), ("end", 1), 4, ("begin", 6), ("end", 6), ("begin", 7), ("end", 7)]


def test_a_chain_is_one_coroutine() -> None:
    assert coroutines(chain) == [3]
    assert coroutines(chain, 0) == []


def places(error: BaseException) -> list[tuple[str, str]]:
    """(function, source line) of this file's frames."""
    frames = traceback.extract_tb(error.__traceback__)
    return [(f.name, linecache.getline(f.filename, f.lineno or 0).strip()) for f in frames if f.filename == __file__]


@pytest.mark.parametrize("way", WAYS)
def test_an_error_in_a_chain_has_its_line(way: Any) -> None:
    error, ms = run(chain, way, 5)
    assert isinstance(error, ValueError)
    assert ms == 30
    assert [p for p in places(error) if p[0] != "main"][-2:] == [
        ("chain", "x = await step(-x if y > 10 else x)"),
        ("step", "raise ValueError(x)"),
    ]


@workflow
async def guarded(x: int) -> Any:
    y = 0
    try:
        y = await step(x)
        y = await step(y - 5)
        y = await step(y)
    except ValueError as e:
        z = await step(abs(e.args[0]))
        return y, z, await step(z)
    return y


@pytest.mark.parametrize("way", WAYS)
def test_handlers_see_the_variables_as_they_were(way: Any) -> None:
    assert run(guarded, way, 1) == ((2, 4, 5), 40.0)
    assert run(guarded, way, 7) == (5, 30.0)


@pytest.mark.parametrize("way", WAYS)
def test_cancellation_reaches_the_await_at_hand(way: Any) -> None:
    error, ms = run(chain, way, 1, within_s=0.015)
    assert isinstance(error, TimeoutError)
    assert ms == 15
    assert LOG[-2:] == [("begin", 6), ("cancelled", 6)]


@workflow
async def swallowed(x: int) -> Any:
    x = await step(x)
    try:
        x = await step(x, 1000)
        x = await step(x)
    except asyncio.CancelledError:
        LOG.append("cleaned up")
        raise
    return x


@pytest.mark.parametrize("way", ["eager", 0])
def test_a_handler_of_the_cancellation(way: Any) -> None:
    error, _ = run(swallowed, way, 1, within_s=0.05)
    assert isinstance(error, TimeoutError)
    assert ("cancelled", 2) in LOG


@workflow
async def branching(x: int) -> Any:
    a = await step(x)
    seen = look(a)
    b = await step(a)
    c = await step(b)
    return await seen, c


@pytest.mark.parametrize("level", [2, 3])
def test_a_tool_starts_as_soon_as_its_argument_is_there(level: int) -> None:
    value, ms = run(branching, level, 1)
    assert (value, ms) == ((2, 4), 45.0)  # what comes after waits for what may raise
    assert LOG.index(("look", 2)) < LOG.index(("begin", 3))
    assert coroutines(branching, level) == [2]


@workflow
async def looping(n: int) -> Any:
    total = 0
    for i in range(n):
        seen = await look(i)
        a = await step(seen)
        b = await step(a)
        total += b
    return total


@pytest.mark.parametrize("way", WAYS)
def test_chains_in_loops(way: Any) -> None:
    assert run(looping, way, 3) == (9, 105.0)
    assert way in ("eager", 0, 1) or coroutines(looping, way) == [2]


def test_without_a_running_loop() -> None:
    assert asyncio.run(chain.eager(1)) == (8, 4)
    with Runtime(World()) as runtime:
        assert runtime.run(plan(chain, 2), (1,)) == (8, 4)


@workflow
async def current(x: int) -> Any:
    first = await task_name()
    second = await task_name()
    return first == second, first != "", x


async def task_name() -> str:
    task = asyncio.current_task()
    return task.get_name() if task is not None else ""


@pytest.mark.parametrize("way", WAYS)
def test_one_task(way: Any) -> None:
    assert run(current, way, 1)[0] == (True, True, 1)
