"""Operations of the stage level: the same values, errors and effects as without them, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowc.ir.parser import parse_graph
from flowc.ir.values import Doc, Docs
from flowc.ir.verifier import verify
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.lanes import SubStages
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import SearchRequest
from flowc.runtime.reference import interpret
from flowc.runtime.stages import LINES, Splitter, close_items, split
from tests.runtime.test_interleavings import result_of
from tests.runtime.worlds import StagePlay, World, pruned, stage_workflow


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


# -- searches that run a step at a time
class Steps:
    """An index whose searches have as many units as their query says; the passages found are known when all are run.

    A unit takes `unit_s`. `gate` holds every step back until it is set.
    """

    name, max_batch = "docs", 16

    def __init__(self, unit_s: float = 0.0) -> None:
        self.unit_s = unit_s
        self.gate: threading.Event | None = None
        self.stepped = threading.Event()
        self.steps: list[list[str]] = []
        self.searches: list[StepSearch] = []

    def batch_key(self, request: SearchRequest) -> Any:
        return None

    def search(self, requests: Any) -> list[Any]:
        raise AssertionError("it runs step by step")

    def begin(self, requests: Any) -> list[Any]:
        if any("broken" in r.query for r in requests):
            raise ArithmeticError("the whole call")
        begun = [ValueError(f"no {r.query}") if "bad" in r.query else StepSearch(r) for r in requests]
        self.searches += [s for s in begun if isinstance(s, StepSearch)]
        return begun

    def scan(self, searches: Any, budget: Any = None) -> None:
        self.steps.append([s.request.query for s in searches])
        self.stepped.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if any("torn" in s.request.query for s in searches):
            raise ArithmeticError("torn")
        until = None if budget is None else time.perf_counter() + budget.seconds
        while active := [s for s in searches if not s.done]:
            for search in active:
                if self.unit_s:
                    time.sleep(self.unit_s)
                search.ran += 1
            if until is not None and time.perf_counter() >= until:
                return

    def confidence(self, search: Any) -> float:
        return float(search.ran / search.units)

    def partial(self, search: Any) -> Docs:
        return Docs([Doc(search.ran, f"{search.request.query} in part")])

    def finish(self, search: Any) -> Docs:
        assert search.done
        assert not search.cancelled
        return Docs([Doc(search.units, search.request.query)])

    def close(self) -> None:
        pass


class StepSearch:
    def __init__(self, request: SearchRequest) -> None:
        self.request = request
        self.units = int(request.query.split()[-1])
        self.ran = 0
        self.cancelled = False

    @property
    def done(self) -> bool:
        return self.cancelled or self.ran >= self.units

    def cancel(self) -> None:
        self.cancelled = True


PIECES = """
workflow @w(%q: text) -> docs {
  %s = ivf.begin @docs (%q) {k = 1} : scan
  %s2 = ivf.scan @docs (%s) : scan
  %d = ivf.finish @docs (%s2) : docs
  return %d
}
"""
WHOLE = """
workflow @w(%q: text) -> docs {
  %d = search @docs (%q) {k = 1} : docs
  return %d
}
"""
GUESS = """
workflow @w(%q: text) -> any {
  %s = ivf.begin @docs (%q) {k = 1} : scan
  %p = ivf.partial @docs (%s) {confidence = 0.25} : docs
  %seen = tool @seen (%p) : any
  %s2 = ivf.scan @docs (%s) : scan
  %d = ivf.finish @docs (%s2) : docs
  %r = py "(seen, d)" (%seen, %d) : any
  return %r
}
"""


def plan_of(text: str, **symbols: Any) -> Any:
    graph = parse_graph(text)
    verify(graph)
    return build_plan(replace(graph, symbols=symbols))


@pytest.mark.parametrize("unit_s", [0.0, 0.0005])
def test_many_searches_join_and_leave_between_steps(unit_s: float) -> None:
    index = Steps(unit_s)
    queries = [f"q{i} {1 + i * 7 % 23}" for i in range(60)]
    queries[7], queries[30] = "bad 3", "broken 5"
    with Runtime(World(index=index)) as runtime:
        plans = [plan_of(PIECES), plan_of(WHOLE)]
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda p: runtime.map(p, [(q,) for q in queries], concurrency=20), plans))
    for outcomes in found:
        for query, outcome in zip(queries, outcomes, strict=True):
            if "bad" in query:
                assert isinstance(outcome.error, ValueError)
            elif "broken" in query:
                assert isinstance(outcome.error, ArithmeticError)
            else:
                assert outcome.value == Docs([Doc(int(query.split()[-1]), query)])
    assert any(len(step) > 1 for step in index.steps)
    assert all(len(step) <= index.max_batch for step in index.steps)


def test_a_short_search_does_not_wait_for_a_long_one() -> None:
    index = Steps(unit_s=0.001)
    with Runtime(World(index=index)) as runtime:
        plan = plan_of(PIECES)
        runtime.run(plan, ("first 40",))  # by now it is known that splitting pays
        index.stepped.clear()
        ended: list[str] = []
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(runtime.run, plan, ("long 300",))
            long.add_done_callback(lambda _: ended.append("long"))
            assert index.stepped.wait(20)
            runtime.run(plan, ("short 3",))
            ended.append("short")
    assert ended == ["short", "long"]
    assert ["long 300", "short 3"] in index.steps


def test_a_part_of_a_search_is_there_before_the_whole() -> None:
    seen: list[Docs] = []

    def note(docs: Docs) -> int:
        seen.append(docs)
        return len(index.steps)

    index = Steps(unit_s=0.001)
    with Runtime(World(index=index)) as runtime:
        steps, docs = runtime.run(plan_of(GUESS, seen=note), ("q 200",))
    assert docs == Docs([Doc(200, "q 200")])
    assert seen[0][0].text == "q 200 in part"
    assert 50 <= seen[0][0].id < 200
    assert steps < len(index.steps), "the search went on meanwhile"


def test_a_part_of_a_search_that_fails_is_empty() -> None:
    seen: list[Docs] = []
    for query in ("bad 3", "torn 3"):
        with Runtime(World(index=Steps())) as runtime, pytest.raises((ValueError, ArithmeticError)):
            runtime.run(plan_of(GUESS, seen=seen.append), (query,))
    assert seen in ([], [Docs()], [Docs(), Docs()])


def test_a_failing_step_is_the_fault_of_one() -> None:
    index = Steps()
    index.gate = threading.Event()
    with Runtime(World(index=index)) as runtime:
        plan = plan_of(PIECES)
        with ThreadPoolExecutor(1) as pool:
            outcomes = pool.submit(runtime.map, plan, [("a 2",), ("torn 2",), ("b 2",)])
            assert index.stepped.wait(20)
            index.gate.set()
            a, torn, b = outcomes.result()
    assert isinstance(torn.error, ArithmeticError)
    assert (a.error, b.error) == (None, None)
    assert b.value == Docs([Doc(2, "b 2")])


def test_a_cancelled_search_is_dropped_before_the_next_step() -> None:
    index = Steps(unit_s=0.001)
    with Runtime(World(index=index)) as runtime:
        runtime.run(plan_of(PIECES), ("first 40",))
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            runtime.run(plan_of(PIECES), ("endless 100000",), timeout_s=0.05)
        assert runtime.run(plan_of(PIECES), ("next 2",)) == Docs([Doc(2, "next 2")])
        assert time.monotonic() - start < 10
    assert [s.cancelled for s in index.searches] == [False, True, False]


def test_what_splitting_costs_and_saves() -> None:
    pace = SubStages()
    assert not pace.pays
    pace.took(1e-5, is_split=False)
    for _ in range(100):
        pace.took(0.0002, is_split=True)
        pace.took(1e-5, is_split=False)
        pace.ended(0.04)
    assert pace.pays
    assert pace.step_s == pytest.approx((2 * 0.0002 * 0.04) ** 0.5, rel=0.01)
    for _ in range(100):
        pace.ended(0.001)
    assert not pace.pays
