"""Operations of the stage level: the same values, errors and effects as without them, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flowc.ir.errors import ResourceError, RunError
from flowc.ir.parser import parse_graph
from flowc.ir.values import Doc, Docs
from flowc.ir.verifier import verify
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.lanes import SubStages
from flowc.runtime.plan import Plan, build_plan
from flowc.runtime.protocols import GenerateRequest, Generation, SearchRequest
from flowc.runtime.reference import interpret
from flowc.runtime.stages import LINES, Splitter, close_items, split
from flowc.runtime.trace import Trace
from tests.runtime.test_interleavings import result_of
from tests.runtime.worlds import ScriptedLLM, StagePlay, World, pruned, stage_workflow


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


def test_random_programs_reach_what_they_are_for() -> None:
    """Guesses are taken and dropped, advice is given, items are split off, also in programs that end well."""
    ends: Counter[tuple[str, str]] = Counter()
    values = 0
    for seed in range(150):
        loop, trace = VirtualLoop(seed), Trace()
        play = StagePlay(loop.random)
        plan = build_plan(pruned(stage_workflow(seed, play)))

        async def run(play: StagePlay = play, plan: Plan = plan, trace: Trace = trace) -> bool:
            with Runtime(play, ahead_share=1e9) as runtime:
                return (await runtime.map_async(plan, [(13, 260)], trace=trace))[0].error is None

        values += loop.run(run())
        ends.update((e.op.split()[0], e.kind) for e in trace.events)
    assert values > 20
    for op in ("ahead.generate", "ahead.search"):
        assert ends[op, "finished"], op
        assert ends[op, "cancelled"], op
    for op in ("ivf.scan", "ivf.partial", "llm.each", "llm.prefill", "llm.extend", "kv.hint", "cluster.prefetch"):
        assert ends[op, "finished"] > 3, op


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


# -- work begun ahead, in virtual time
class Timed(StagePlay):
    """A search takes 4 s, choosing 1 s, and a generation 1 s and 1 s more for each word that it writes."""

    max_calls = 4
    answer: Callable[[str], Any] = staticmethod(lambda prompt: f"so {prompt}")

    async def search(self, requests: Any) -> list[Any]:
        self.asked += requests
        await asyncio.sleep(4)
        return [Docs([Doc(0, r.query.upper())]) for r in requests]

    async def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
        self.asked += requests
        self.running += 1
        try:
            await asyncio.sleep(1)
            text = self.answer(requests[0].prompt)
            for word in re.findall(r"\S+\s*", text) if isinstance(text, str) else ():
                await asyncio.sleep(1)
                if on_text is not None:
                    on_text(0, word)
            return [Generation(text) if isinstance(text, str) else text] * len(requests)
        finally:
            self.running -= 1


def timed(text: str, *args: Any, share: float = 1.0, answer: Any = None, **run: Any) -> tuple[Any, float, Timed]:
    """What a program comes to, after how many seconds, and its world. Nothing of it may be left."""
    loop, play = VirtualLoop(), Timed()
    if answer is not None:
        play.answer = answer
    play.max_batch = 1
    plan = plan_of(text, slow=lambda x: asyncio.sleep(5, x), note=play.emit)

    async def main() -> tuple[Any, float]:
        with Runtime(play, ahead_share=share) as runtime:
            start = loop.time()
            try:
                value: Any = await runtime.run_async(plan, args, **run)
            except Exception as e:
                value = result_of(e)
            took = loop.time() - start
            assert not play.told
            await asyncio.sleep(0)
            assert play.running == 0
            assert not any(lane.load() for lane in runtime._lanes.values())
            return value, took

    value, took = loop.run(main())
    return value, took, play


AHEAD = """
workflow @w(%q: text) -> text {
  %guess = template "GUESS" : text
  %h = ahead.generate @m (%guess) {max_tokens = 8} : ahead
  %d = search @docs (%q) {k = 1} : docs
  %p = py "d[0].text" (%d) : text
  %t = generate @m (%p, ahead=%h) {max_tokens = 8} : text
  return %t
}
"""


def test_a_right_guess_is_taken() -> None:
    assert timed(AHEAD.replace("GUESS", "X"), "x") == ("so X", 4.0, ANY)  # 4 s of search hide 3 s of writing
    value, took, play = timed(AHEAD.replace("GUESS", "X Y Z"), "x y z")
    assert (value, took) == ("so X Y Z", 5.0), "it goes on where it is"
    assert [r.prompt for r in play.asked if isinstance(r, GenerateRequest)] == ["X Y Z"]


def test_a_wrong_guess_is_cancelled_and_asked_anew() -> None:
    value, took, play = timed(AHEAD.replace("GUESS", "much too many words to be right"), "x")
    assert (value, took) == ("so X", 4.0 + 3.0)
    assert len(play.asked) == 3


def test_other_options_are_another_question() -> None:
    text = AHEAD.replace("GUESS", "X").replace("ahead=%h) {max_tokens = 8}", "ahead=%h) {max_tokens = 9}")
    assert timed(text, "x")[:2] == ("so X", 7.0)


def test_what_failed_ahead_is_asked_anew() -> None:
    answers = iter([OSError("the first time"), "well"])
    assert timed(AHEAD.replace("GUESS", "X"), "x", answer=lambda _: next(answers))[:2] == ("well", 4.0 + 2.0)


def test_what_fails_ahead_and_again_fails_as_it_would_have() -> None:
    value, took, _ = timed(AHEAD.replace("GUESS", "X"), "x", answer=lambda _: OSError("always"))
    assert (value, took) == (("OSError", "always"), 5.0)


def test_nothing_is_begun_ahead_where_there_is_no_room() -> None:
    value, took, play = timed(AHEAD.replace("GUESS", "X"), "x", share=0.0)
    assert (value, took, len(play.asked)) == ("so X", 7.0, 2)


def test_a_guess_that_nobody_needs_keeps_nothing_alive() -> None:
    text = AHEAD.replace("GUESS", "a b c d e f g h").replace("ahead=%h", "").replace("(%p, )", "(%p)")
    value, took, play = timed(
        text.replace('"d[0].text" (%d)', "\"'X'\""), "x", answer=lambda p: "a b c d e f"[: len(p)]
    )
    assert (value, took) == ("a", 4.0), "the search is waited for, the guess is not"
    assert len(play.asked) == 3


def test_a_query_of_the_wrong_type_is_told_where_it_is_needed() -> None:
    text = AHEAD.replace('template "GUESS" : text', 'py "7" : any').replace('"d[0].text" (%d)', '"7"')
    value, *_ = timed(text.replace('%p = py "7" : text', '%p = py "7" : any'), "x")
    assert value[0] == "OperationTypeError"


def test_a_timeout_counts_from_where_the_answer_is_needed() -> None:
    text = AHEAD.replace("GUESS", "X Y Z").replace("max_tokens = 8", "max_tokens = 8, timeout = 2")
    assert timed(text, "x y z")[:2] == ("so X Y Z", 5.0)
    value, took, _ = timed(text.replace("X Y Z", "X Y Z A B"), "x y z a b")
    assert (value[0], took) == ("NodeTimeoutError", 6.0)


def test_a_search_in_pieces_fails_where_it_finishes() -> None:
    text = """
    workflow @w(%q: text) -> docs {
      %s = ivf.begin @missing (%q) : scan
      %s2 = ivf.scan @missing (%s) : scan
      %n = py "int(q)" (%q) {raises = true} : int
      %d = ivf.finish @missing (%s2) : docs
      return %d
    }
    """
    for resource, last in (("missing", ResourceError), ("docs", ValueError)):
        with Runtime(World()) as runtime:
            plan = plan_of(text.replace("@missing", f"@{resource}"))
            with pytest.raises(ValueError, match="invalid literal"):
                runtime.run(plan, ("bad",))
            with pytest.raises(last):
                runtime.run(plan_of(text.replace("@missing", f"@{resource}").replace("int(q)", "len(q)")), ("bad",))


@pytest.mark.parametrize("how", ["timeout", "error", "handled"])
def test_what_was_begun_ends_with_the_program(how: str) -> None:
    text = AHEAD.replace("GUESS", "a b c d e f g h i j k l m")
    if how == "timeout":
        assert timed(text, "x", timeout_s=2)[:2] == (("ProgramTimeoutError", ANY), 2.0)
        return
    text = text.replace('"d[0].text" (%d)', '"[][0]" (%d)').replace("(%d) : text", "(%d) {raises = true} : text")
    if how == "error":
        assert timed(text, "x")[:2] == (("IndexError", ANY), 4.0)
    else:
        body = "\n".join(line for line in text.splitlines() if line.startswith("  %"))
        whole = (
            "workflow @w(%q: text) -> text {\n%r = try : text body {" + body + "\n  yield %t\n}"
            ' except "IndexError" (%e: any) {\n %x = py "\'never mind\'" : text\n yield %x }\n return %r\n}'
        )
        assert timed(whole, "x")[:2] == ("never mind", 4.0)


def test_a_guess_is_taken_once() -> None:
    text = """
    workflow @w(%q: text) -> list<text> {
      %h = ahead.generate @m (%q) : ahead
      %all = foreach (%q) {collects = 1, parallel = true} : list<text> body (%c: text) {
        %t = generate @m (%q, ahead=%h) : text
        %one = py "[t]" (%t) : list<text>
        yield %one
      }
      return %all
    }
    """
    value, _, play = timed(text, "ab")
    assert value == ["so ab", "so ab"]
    assert len(play.asked) == 2


def test_a_guess_streams_what_it_has_written() -> None:
    loop, play = VirtualLoop(), Timed()
    play.max_batch = 1

    async def main() -> list[tuple[float, str]]:
        with Runtime(play, ahead_share=1.0) as runtime:
            plan = plan_of(AHEAD.replace("GUESS", "X Y Z"))
            return [(loop.time(), piece) async for piece in runtime.astream(plan, ("x y z",))]

    assert loop.run(main()) == [(4.0, "so X Y "), (5.0, "Z")]


# -- a generation that is split while it is written
EACH = """
workflow @w(%q: text) -> any {
  %text, %all, %found = llm.each @m (%q) {split = "lines", collects = 1} : text, list<text>, list<any> body (%i: text) {
    %x = tool @slow (%i) {is_async = true} : any
    %y = py "[int(x)]" (%x) {raises = true} : list<int>
    yield %y
  }
  %r = py "(text, all, found)" (%text, %all, %found) : any
  return %r
}
"""


def test_items_begin_while_the_rest_is_written() -> None:
    value, took, _ = timed(EACH, "x", answer=lambda _: "1 \n2 \n3 \n4 \n5")
    assert value == ("1 \n2 \n3 \n4 \n5", ["1 ", "2 ", "3 ", "4 ", "5"], [1, 2, 3, 4, 5])
    assert took == 1 + 5 + 5  # the last line closes after 6 s; the four before it are done by then or soon after


def test_the_error_of_the_first_item_is_raised_once_the_text_is_whole() -> None:
    value, took, _ = timed(EACH, "x", answer=lambda _: "1 \nno \n3 \nneither \n5 \n6 \n7 \n8 \n9 \n")
    assert value[0] == "ValueError"
    assert "'no '" in value[1]
    assert took == 10.0


def test_the_error_of_the_generation_wins() -> None:
    class Torn(Timed):
        async def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            await super().generate(requests, on_text)
            return [RuntimeError("torn")]

    loop = VirtualLoop()
    play = Torn()
    play.answer = lambda _: "no\nneither\n"

    async def main() -> None:
        with Runtime(play) as runtime, pytest.raises(RuntimeError, match="torn"):
            await runtime.run_async(plan_of(EACH, slow=lambda x: asyncio.sleep(0.1, x)), ("x",))

    loop.run(main())


def test_the_text_of_a_split_generation_streams() -> None:
    loop, play = VirtualLoop(), Timed()
    play.answer = lambda _: "1 \n2 \n3"
    text = EACH.replace("return %r", "return %text").replace("-> any", "-> text")

    async def main() -> list[str]:
        with Runtime(play) as runtime:
            plan = plan_of(text, slow=lambda x: asyncio.sleep(0.1, x))
            assert plan.streams
            return [piece async for piece in runtime.astream(plan, ("x",))]

    assert loop.run(main()) == ["1 \n", "2 \n", "3"]


def test_a_backend_that_does_not_stream_is_split_at_the_end() -> None:
    llm = ScriptedLLM(lambda _: "1\n2\n3\n")
    llm.generate = lambda requests, *_: [Generation("1\n2\n3\n")] * len(requests)  # type: ignore[method-assign]
    with Runtime(World(llm)) as runtime:
        plan = plan_of(EACH.replace("{is_async = true} ", ""), slow=str)
        assert runtime.run(plan, ("x",)) == ("1\n2\n3\n", ["1", "2", "3"], [1, 2, 3])


def test_a_backend_whose_pieces_are_not_its_text_is_told_so() -> None:
    llm = ScriptedLLM()

    def generate(requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
        on_text(0, "4\n5\n")
        return [Generation("1\n2\n")]

    llm.generate = generate  # type: ignore[method-assign]
    with Runtime(World(llm)) as runtime, pytest.raises(RunError, match="pieces"):
        runtime.run(plan_of(EACH.replace("{is_async = true} ", ""), slow=str), ("x",))


# -- advice
def test_advice_reaches_a_backend_that_takes_it_and_is_taken_back() -> None:
    log: list[tuple[Any, ...]] = []

    class Advised(Timed):
        def __getattribute__(self, name: str) -> Any:
            if name in ("prefill", "hint", "predict", "release", "pin"):
                return lambda *args: log.append((name, *args))
            return super().__getattribute__(name)

    text = """
    workflow @w(%q: text) -> text seq {
      %first = generate @m (%q) : text
      %found = search @docs (%q) {k = 1} : docs
      kv.hint @m (%q, %found, %first) {site = 4, prefix = "Be brief. ", steps = 2.0}
      kv.pin @m (%first) {site = 4, ttl = 1.5}
      cluster.prefetch @docs (%q) {site = 5, window = 0.5}
      cluster.prefetch @other (%q) {site = 6, window = 0.5}
      %kv = llm.prefill @m (%q) : kv
      %kv2 = llm.extend @m (%kv, %first) : kv
      kv.release @m {site = 4}
      %again = search @docs (%first) {k = 1, site = 5} : docs
      %last = generate @m (%first, kv=%kv2) {drops = true} : text
      cluster.prefetch @docs (%last) {site = 5, window = 0.25}
      kv.hint @m (%last) {site = 7, steps = 1.0}
      return %last
    }
    """
    loop, play = VirtualLoop(), Advised()

    async def main() -> Any:
        with Runtime(play) as runtime:
            return await runtime.run_async(plan_of(text), ("q",))

    assert loop.run(main()) == "so so q"
    assert log == [
        ("hint", (1, 4), "Be brief. q[1] Qso q", 2.0),
        ("pin", "so q", 1.5),
        ("predict", (1, 5), "q", 0.5),
        ("prefill", (1, "kv", 1), "q"),
        ("prefill", (1, "kv", 1), "so q"),
        ("release", (1, 4)),
        ("release", (1, 5)),
        ("release", (1, "kv", 1)),
        ("predict", (1, 5), "so so q", 0.25),
        ("hint", (1, 7), "so so q", 1.0),
        ("release", (1, 5)),
        ("release", (1, 7)),
    ]
    assert [r.drop for r in play.asked if isinstance(r, GenerateRequest)] == [False, True]


def test_a_search_to_come_is_predicted_again_while_the_model_writes() -> None:
    text = """
    workflow @w(%q: text) -> docs seq {
      %first = search @docs (%q) {k = 1} : docs
      cluster.prefetch @docs (%q) {site = 5, window = 9.5}
      %t = generate @m (%q) {lookahead = ("docs#5", "docs#6", "gone#1")} : text
      %d = search @docs (%t, near=%first) {k = 1, site = 5} : docs
      return %d
    }
    """
    words = [f"w{i}" for i in range(65)]
    _, _, play = timed(text, "q", answer=lambda _: " ".join(words))
    assert [len(text.split()) for _, text in play.followed] == [5, 10, 20, 40, 60]
    assert all(key == (1, 5) and text.split() == words[: len(text.split())] for key, text in play.followed)
    assert [r.near for r in play.asked if isinstance(r, SearchRequest)] == [(), (0,)]


# -- what the trace says
def test_the_trace_tells_stages_apart_and_shows_what_was_won() -> None:
    text = """
    workflow @w(%q: text) -> text {
      %s = ivf.begin @docs (%q) : scan
      %h = ahead.generate @m (%q) : ahead
      %never = ahead.generate @m (%q) {max_tokens = 5} : ahead
      %s2 = ivf.scan @docs (%s) : scan
      %d = ivf.finish @docs (%s2) : docs
      %p = py "d[0].text.lower()" (%d) : text
      %t = generate @m (%p, ahead=%h) : text
      return %t
    }
    """
    loop, play, trace = VirtualLoop(), Timed(), Trace()
    play.max_batch = 2
    play.answer = lambda prompt: "a b c d"

    async def main() -> Any:
        with Runtime(play, ahead_share=1.0) as runtime:
            return await runtime.run_async(plan_of(text), ("x",), trace=trace)

    loop.run(main())
    rows = {row.op: row for row in trace.summary()}
    assert rows["ivf.scan @docs"].run_s == 4.0
    assert rows["generate @m"].run_s == 5.0  # it began ahead
    ends = [(e.kind, e.waited_s, e.seconds) for e in trace.events if e.op == "ahead.generate @m" and e.kind != "queued"]
    assert ends == [("finished", 4.0, 0.0), ("cancelled", 0.0, 5.0)], "won 4 s; for nothing 5 s"
    assert {"ivf.begin @docs", "ivf.finish @docs"} <= rows.keys()
    json.dumps(trace.to_chrome())


def test_what_was_written_before_a_call_failed_is_not_told_twice() -> None:
    class Flaky(Timed):
        max_calls, max_batch = 1, 4

        async def generate(self, requests: Any, on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
            for i in range(len(requests)):
                on_text(i, "1 \n2")
            await asyncio.sleep(1)
            if len(requests) > 1:
                raise ArithmeticError("too many at once")
            on_text(0, " \n3 \n")
            return [Generation("1 \n2 \n3 \n")]

    loop, play = VirtualLoop(), Flaky()

    async def main() -> Any:
        with Runtime(play) as runtime:
            plan = plan_of(EACH, slow=lambda x: asyncio.sleep(0.1, x))
            return await runtime.map_async(plan, [("x",), ("y",)])

    for outcome in loop.run(main()):
        assert outcome.value == ("1 \n2 \n3 \n", ["1 ", "2 ", "3 "], [1, 2, 3])
