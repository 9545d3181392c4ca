"""What asyncio runs at once runs at once, whatever it writes: gather, TaskGroup, create_task."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from flowc import tool, workflow
from flowc.ir.core import Op, walk
from flowc.passes.manager import PassManager, pipeline
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from tests.runtime.worlds import World

LOG: list[str] = []
EVENTS: dict[str, asyncio.Event] = {}
LEVELS = (0, 1, 2, 3)
WAYS = ("eager", *LEVELS)


@pytest.fixture(autouse=True)
def nothing_logged() -> Iterator[None]:
    yield
    LOG.clear()
    EVENTS.clear()


def note(x: Any) -> Any:
    LOG.append(f"note {x}")
    return x


@tool
async def slow(x: Any, ms: int = 20) -> Any:
    LOG.append(f"slow {x}")
    await asyncio.sleep(ms / 1000)
    LOG.append(f"done {x}")
    return x


@tool
async def fails(x: Any, ms: int = 20) -> Any:
    await slow.fn(x, ms)
    raise ValueError(x)


@tool
async def waits_for(mine: str, other: str) -> str:
    """Ends once `other` has begun."""
    EVENTS[mine].set()
    await EVENTS[other].wait()
    return mine


def in_virtual_time(flow: Any, way: Any, *args: Any) -> tuple[Any, float]:
    """(value or error, milliseconds that would have passed)"""
    loop = VirtualLoop()

    async def main() -> Any:
        EVENTS.update(a=asyncio.Event(), b=asyncio.Event())
        try:
            if way == "eager":
                return await flow.eager(*args)
            plan = build_plan(PassManager(pipeline(way), verify_each=True).run(flow.graph()).graph)
            with Runtime(World()) as runtime:
                return await runtime.run_async(plan, args)
        except Exception as e:
            return e

    found = loop.run(asyncio.wait_for(main(), 5))
    return found, round(loop.time() * 1000, 6)


def same(flow: Any, *args: Any, ms: float) -> list[str]:
    """Every way gives the eager value in this time, with the effects in the eager order, which is the result."""
    LOG.clear()
    expected, taken = in_virtual_time(flow, "eager", *args)
    assert taken == ms
    log = LOG.copy()
    for level in LEVELS:
        LOG.clear()
        found, taken = in_virtual_time(flow, level, *args)
        assert (repr(found), taken, LOG) == (repr(expected), ms, log), f"-O{level}"
    return log


def groups(flow: Any) -> list[list[str]]:
    """The operations of each group of the captured workflow, in program order."""
    found: dict[int, list[Op]] = {}
    for op in walk(flow.graph().body):
        if "group" in op.attrs:
            found.setdefault(op.attr("group"), []).append(op)
    return [[op.name for op in ops] for ops in found.values()]


# -- tools that talk to each other
@workflow
async def gathered_pair() -> Any:
    return await asyncio.gather(waits_for("a", "b"), waits_for("b", "a"))


@workflow
async def mapped_pair() -> Any:
    return await asyncio.gather(*[waits_for(x, y) for x, y in (("a", "b"), ("b", "a"))])


@workflow
async def task_group_pair() -> Any:
    async with asyncio.TaskGroup() as group:
        first = group.create_task(waits_for("a", "b"))
        second = group.create_task(waits_for("b", "a"))
    return [first.result(), second.result()]


@workflow
async def tasks_pair() -> Any:
    first = asyncio.create_task(waits_for("a", "b"))
    second = asyncio.create_task(waits_for("b", "a"))
    return [await first, await second]


@workflow
async def gathered_tasks_pair() -> Any:
    return await asyncio.gather(asyncio.create_task(waits_for("a", "b")), asyncio.ensure_future(waits_for("b", "a")))


@workflow
async def waiting(mine: str, other: str) -> Any:
    return await waits_for(mine, other)


@workflow
async def workflows_pair() -> Any:
    return await asyncio.gather(waiting("a", "b"), waiting("b", "a"))


async def plain(mine: str, other: str) -> str:
    return await waits_for.fn(mine, other)


@workflow
async def pair_with_plain_python() -> Any:
    return await asyncio.gather(waits_for("a", "b"), plain("b", "a"))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "flow",
    [
        gathered_pair, mapped_pair, task_group_pair, tasks_pair, gathered_tasks_pair, workflows_pair,
        pair_with_plain_python,
    ],
    ids=lambda f: f.name,
)  # fmt: skip
def test_tools_that_wait_on_each_other_finish(flow: Any, way: Any) -> None:
    assert in_virtual_time(flow, way) == (["a", "b"], 0.0)


# -- time and order
@workflow
async def three() -> Any:
    await slow("before")
    note("between")
    found = await asyncio.gather(slow(note(1)), slow(note(2), 10), slow(note(3)))
    note("after")
    await slow("last")
    return found


def test_gathered_tools_run_at_once_between_what_is_before_and_after() -> None:
    log = same(three, ms=60)
    assert log[2:6] == ["note between", "note 1", "note 2", "note 3"]
    assert log[-3:] == ["note after", "slow last", "done last"]
    assert groups(three) == [["tool"] * 3]


@workflow
async def mapped(xs: list[int]) -> Any:
    found = await asyncio.gather(*[slow(note(x)) for x in xs if x != 2])
    note("after")
    return found


def test_a_gathered_comprehension_runs_all_items_at_once() -> None:
    log = same(mapped, [1, 2, 3, 4], ms=20)
    assert log[:6] == ["note 1", "note 3", "note 4", "slow 1", "slow 3", "slow 4"]
    assert log[-1] == "note after"
    assert same(mapped, [], ms=0) == ["note after"]


@workflow
async def mapped_pairs(xs: list[int]) -> Any:
    return await asyncio.gather(*(slow(x * y) for x in xs for y in (1, 10) if x + y != 2), slow("beside"))


def test_nested_comprehensions_beside_others() -> None:
    same(mapped_pairs, [1, 2], ms=20)


def counted(n: int) -> Iterator[int]:
    for i in range(n):
        LOG.append(f"yields {i}")
        yield i


@workflow
async def over_an_iterator(n: int) -> Any:
    return await asyncio.gather(*[slow(x) for x in counted(n)])


def test_the_iterator_ends_before_the_first_item_starts() -> None:
    assert same(over_an_iterator, 3, ms=20)[:4] == ["yields 0", "yields 1", "yields 2", "slow 0"]


@workflow
async def task_group(x: int) -> Any:
    note("before")
    async with asyncio.TaskGroup() as group:
        first = group.create_task(slow(note(x)))
        second = group.create_task(slow(note(x + 1)))
    note("after")
    return first.result(), await second


def test_a_task_group_computes_its_arguments_first() -> None:
    log = same(task_group, 1, ms=20)
    assert log == ["note before", "note 1", "note 2", "slow 1", "slow 2", "done 1", "done 2", "note after"]


@workflow
async def tasks(x: int) -> Any:
    first = asyncio.create_task(slow(note(x), 30))
    note("between")
    second = asyncio.create_task(slow(x + 1))
    note("still before")
    a = await first
    note("after both")
    return a, await second


def test_tasks_start_at_the_first_await() -> None:
    log = same(tasks, 1, ms=30)
    assert log[:5] == ["note 1", "note between", "note still before", "slow 1", "slow 2"]


@workflow
async def chain(x: int) -> Any:
    (y,) = await asyncio.gather(slow(x))
    first = asyncio.create_task(slow(y + 1))
    z = await first
    second = asyncio.create_task(slow(z + 1))
    return await second


def test_what_is_awaited_in_turn_stays_in_turn() -> None:
    same(chain, 1, ms=60)
    assert groups(chain) == []


@tool(reads=(), writes=())
async def declared(x: Any) -> Any:
    return x


@workflow
async def free() -> Any:
    return await asyncio.gather(declared(1), declared(2))


def test_operations_that_write_nothing_need_no_group() -> None:
    assert groups(free) == []
    same(free, ms=0)


@workflow
async def in_a_loop(xs: list[int]) -> Any:
    total = 0
    for x in xs:
        try:
            a, b = await asyncio.gather(slow(x), slow(x + 1))
        except ValueError:
            break
        total += a + b
    return total


def test_groups_in_loops_and_handlers() -> None:
    same(in_a_loop, [1, 2, 3], ms=60)


@workflow
async def inner(x: int) -> Any:
    a, b = await asyncio.gather(slow(x), slow(-x))
    return a - b


@workflow
async def outer(x: int) -> Any:
    a = await inner(x)
    b, c = await asyncio.gather(slow("x"), slow("y"))
    return a, b, c, await inner(x + 1)


def test_inlined_groups_are_numbered_anew() -> None:
    same(outer, 1, ms=60)
    graph = PassManager(pipeline(2), verify_each=True).run(outer.graph()).graph
    numbers = [op.attr("group") for op in walk(graph.body) if "group" in op.attrs]
    assert len(numbers) == 6
    assert len(set(numbers)) == 3


# -- errors
def failing(*delays: int) -> Callable[..., Awaitable[Any]]:
    first, second = delays

    @workflow
    async def flow() -> Any:
        try:
            return await asyncio.gather(fails("a", first), fails("b", second), slow("c", 50))
        except ValueError as e:
            note("handled")
            return e.args

    return flow


@pytest.mark.parametrize("level", LEVELS)
def test_the_first_failure_in_program_order_is_raised(level: int) -> None:
    """asyncio would raise that of "b", which is the first in time: the documented difference."""
    value, ms = in_virtual_time(failing(20, 10), level)
    assert (value, ms) == (("a",), 20.0)
    assert LOG[-1] == "note handled"
    assert "done c" not in LOG, "what comes after a failure is cancelled"


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_in_a_group_is_the_eager_one_when_it_comes_first(way: Any) -> None:
    assert in_virtual_time(failing(10, 20), way)[0] == ("a",)


@tool
async def fails_at_two(x: int) -> Any:
    return await (fails if x == 2 else slow).fn(x, 10)


@workflow
async def failing_items() -> Any:
    note("before")
    await asyncio.gather(*[fails_at_two(x) for x in (1, 2, 3)])
    note("never")


@pytest.mark.parametrize("way", WAYS)
def test_nothing_after_a_failing_group_runs(way: Any) -> None:
    error, ms = in_virtual_time(failing_items, way)
    assert isinstance(error, ValueError)
    assert error.args == (2,)
    assert ms == 10
    assert "note never" not in LOG
