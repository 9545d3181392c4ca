"""Any interleaving gives what the reference gives: the same value or error, and the same effects in the same order."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.reference import interpret
from tests.runtime.worlds import Play, pruned, random_workflow


def result_of(error: BaseException) -> tuple[str, str]:
    return type(error).__name__, str(error).split("\n")[0]


def expected(seed: int, args: tuple[int, int]) -> tuple[Any, dict[str, list[Any]]]:
    play = Play()
    graph = random_workflow(seed, play)
    try:
        return ("value", interpret(graph, args, play)), play.logs
    except Exception as e:
        return result_of(e), play.logs


def driven(seed: int, args: tuple[int, int], latencies: int, prune: bool) -> tuple[Any, dict[str, list[Any]]]:
    loop = VirtualLoop(latencies)
    play = Play(loop.random)
    graph = random_workflow(seed, play)
    plan = build_plan(pruned(graph) if prune else graph)

    async def run() -> Any:
        with Runtime(play) as runtime:
            try:
                value = ("value", await runtime.run_async(plan, args))
            except Exception as e:
                value = result_of(e)
            await asyncio.sleep(5)  # what was cancelled must not come back
            assert len(asyncio.all_tasks()) == 1
            return value

    return loop.run(run()), play.logs


@settings(max_examples=150)
@given(st.integers(0, 1 << 32), st.integers(0, 999), st.integers(0, 999), st.integers(0, 1 << 16), st.booleans())
def test_driver_equals_reference(seed: int, x: int, y: int, latencies: int, prune: bool) -> None:
    assert driven(seed, (x, y), latencies, prune) == expected(seed, (x, y))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_driver_equals_reference_on_many(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        x, y = random.Random(seed).sample(range(1000), 2)
        want = expected(seed, (x, y))
        for prune in (False, True):
            assert driven(seed, (x, y), seed + 1, prune) == want, f"seed {seed}, x={x}, y={y}, prune={prune}"


@settings(max_examples=40)
@given(st.integers(0, 1 << 32), st.integers(0, 999), st.integers(0, 999))
def test_the_same_seed_gives_the_same_schedule(seed: int, x: int, y: int) -> None:
    def once() -> tuple[Any, float, list[tuple[Any, ...]]]:
        from flowc.runtime.trace import Trace

        loop = VirtualLoop(seed)
        play = Play(loop.random)
        plan = build_plan(pruned(random_workflow(seed, play)))
        trace = Trace()

        async def run() -> Any:
            with Runtime(play, io_threads=0) as runtime:
                outcomes = await runtime.map_async(plan, [(x, y), (y, x), (x, x)], trace=trace, concurrency=2)
                return [(o.value, o.seconds, type(o.error)) for o in outcomes]

        value = loop.run(run())
        return value, loop.time(), [tuple(e) for e in trace.events]

    assert once() == once()


def test_random_workflows_are_not_trivial() -> None:
    """The generator reaches values, errors and effects alike; otherwise the tests above say little."""
    values = errors = effects = 0
    for seed in range(150):
        outcome, logs = expected(seed, (seed % 50, 3))
        values += outcome[0] == "value"
        errors += outcome[0] != "value"
        effects += sum(map(len, logs.values()))
    assert values > 30
    assert errors > 30
    assert effects > 150
