"""Operations of the stage level: the same values, errors and effects as without them, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.reference import interpret
from flowc.runtime.stages import LINES, Splitter, close_items, split
from tests.runtime.test_interleavings import result_of
from tests.runtime.worlds import StagePlay, pruned, stage_workflow


# -- random programs
def expected(seed: int, args: tuple[int, int]) -> tuple[Any, dict[str, list[Any]]]:
    play = StagePlay()
    graph = stage_workflow(seed, play)
    try:
        return ("value", interpret(graph, args, play)), play.logs
    except Exception as e:
        return result_of(e), play.logs


def driven(
    seed: int, args: tuple[int, int], latencies: int, prune: bool, share: float = 1e9
) -> tuple[Any, dict[str, list[Any]]]:
    """The program in virtual time; a second one beside it is cut short. Nothing of either may be left."""
    loop = VirtualLoop(latencies)
    play, other = StagePlay(loop.random), StagePlay(loop.random)
    plan, beside = (build_plan(pruned(g) if prune else g) for g in (stage_workflow(seed, p) for p in (play, other)))

    async def run() -> Any:
        with Runtime(play, ahead_share=share) as runtime, Runtime(other, ahead_share=share) as cut:
            task = asyncio.create_task(cut.run_async(beside, args))
            asyncio.get_running_loop().call_later(loop.random.random() * 2, task.cancel)
            try:
                value = ("value", await runtime.run_async(plan, args))
            except Exception as e:
                value = result_of(e)
            await asyncio.gather(task, return_exceptions=True)
            assert not play.told, "announced and not taken back"
            assert not other.told, "announced and not taken back"
            await asyncio.sleep(10)  # what was cancelled must not come back
            assert play.running == other.running == 0
            assert len(asyncio.all_tasks()) == 1
            assert not any(lane.load() for one in (runtime, cut) for lane in one._lanes.values())
            return value

    return loop.run(run()), play.logs


@settings(max_examples=100)
@given(st.integers(0, 1 << 32), st.integers(0, 999), st.integers(0, 999), st.integers(0, 1 << 16), st.booleans())
def test_driver_equals_reference(seed: int, x: int, y: int, latencies: int, prune: bool) -> None:
    assert driven(seed, (x, y), latencies, prune) == expected(seed, (x, y))


@settings(max_examples=30)
@given(st.integers(0, 1 << 32), st.integers(0, 999), st.integers(0, 999), st.integers(0, 1 << 16))
def test_it_does_with_closed_gates(seed: int, x: int, y: int, latencies: int) -> None:
    assert driven(seed, (x, y), latencies, True, share=0.0) == expected(seed, (x, y))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(4))
def test_driver_equals_reference_on_many(block: int) -> None:
    for seed in range(block * 100, block * 100 + 100):
        x, y = random.Random(seed).sample(range(1000), 2)
        want = expected(seed, (x, y))
        for prune in (False, True):
            assert driven(seed, (x, y), seed + 1, prune) == want, f"seed {seed}, x={x}, y={y}, prune={prune}"


# -- text in pieces
ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


@settings(max_examples=400)
@given(
    st.text(st.sampled_from(f"ab,{ENDS}"), max_size=30),
    st.lists(st.integers(0, 30), max_size=12),
    st.sampled_from((LINES, ",", "aa", "ab", "aba", "\n", "\r\n")),
)
@example("a\r\nb", [2], LINES)
@example("a\r\n\nb\r", [2, 3], LINES)
@example("aaa", [1, 2], "aa")
@example("ababa", [3], "aba")
def test_items_do_not_depend_on_the_pieces(text: str, cuts: list[int], by: str) -> None:
    splitter = Splitter(by)
    edges = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    items: list[str] = []
    for start, end in pairwise(edges):
        items += splitter.feed(text[start:end])
        closed = split(text[:end], by)
        assert items == closed[: len(items)]
        assert len(items) >= len(closed) - 1, "an item that is closed is given at once"
    assert items == split(text, by)[: len(items)]
    close_items(items, text, by)
    assert items == split(text, by)
