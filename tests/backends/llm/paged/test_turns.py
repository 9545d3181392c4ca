"""Whose turn it is: priorities that change while requests wait, and prefixes that are computed ahead of them."""

from __future__ import annotations

import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from flowc.backends.llm.paged.copies import Costs, HandCopier  # noqa: E402
from flowc.backends.llm.paged.engine import Engine  # noqa: E402
from flowc.backends.llm.paged.prefix_tree import State  # noqa: E402
from flowc.backends.llm.paged.sequence import Sequence  # noqa: E402
from flowc.runtime.protocols import Ticket  # noqa: E402
from tests.backends.llm.paged.echo import echo, echo_engine  # noqa: E402
from tests.backends.llm.paged.test_exact import Greedy, drive, owner, sequence  # noqa: E402

pytestmark = pytest.mark.models


def asked(prompt: list[int], new: int = 3, ticket: Ticket | None = None) -> Sequence:
    return Sequence(list(prompt), Greedy(new), limit=new, ticket=ticket)


def steps(engine: Engine, count: int = 1) -> None:
    with torch.inference_mode():
        for _ in range(count):
            engine.step()
            engine.check()


def arrive(engine: Engine, *sequences: Sequence) -> None:
    for s in sequences:
        s.order = engine._next_order()
        engine.waiting.append(s)


def answered(*sequences: Sequence) -> bool:
    return all(owner(s).tokens == echo(s.tokens[: s.prompt_tokens], owner(s).limit) for s in sequences)


PREFIX = list(range(1, 33))  # 8 blocks of 4


# -- priority
def test_the_lower_priority_goes_first_and_it_may_change_while_requests_wait() -> None:
    first, second = Ticket(1, 5.0), Ticket(2, 3.0)
    engine = echo_engine(max_sequences=1)
    a, b = asked([1] * 8, 2, first), asked([2] * 8, 2, second)
    running = asked([3] * 8, 6, Ticket(3, 0.0))
    arrive(engine, running)
    steps(engine)
    arrive(engine, a, b)
    steps(engine, 2)
    first.priority = 1.0
    drive(engine, [])
    assert owner(running).done.is_set()
    assert answered(running, a, b)
    assert engine.stats.preemptions == 0
    assert a.order < b.order


def test_chunks_of_prompts_are_packed_by_priority_not_by_arrival() -> None:
    late, early = Ticket(1, 1.0), Ticket(2, 0.0)
    engine = echo_engine(max_step_tokens=8)
    a, b = asked(list(range(1, 33)), 1, late), asked(list(range(2, 34)), 1, early)
    arrive(engine, a)
    steps(engine)
    arrive(engine, b)
    steps(engine)
    assert (a.computed, b.computed) == (8, 8), "the more urgent one takes the whole step"
    late.priority = -1.0
    steps(engine)
    assert (a.computed, b.computed) == (16, 8), "read at each step"
    drive(engine, [])
    assert answered(a, b)


def test_a_program_that_comes_later_gives_way_where_there_is_no_room() -> None:
    engine = echo_engine(blocks=12, max_sequences=8)
    slow, urgent = asked([7] * 20, 12, Ticket(1, 2.0)), asked(list(range(20)), 4, Ticket(2, 1.0))
    arrive(engine, slow)
    steps(engine, 3)
    arrive(engine, urgent)
    steps(engine, 2)
    assert engine.running == [urgent]
    assert engine.waiting == [slow]
    drive(engine, [])
    assert answered(slow, urgent)
    assert engine.stats.preemptions == 1
    again = asked([8] * 20, 12, Ticket(3, 1.0))
    arrive(engine, asked([9] * 20, 12, Ticket(4, 1.0)), again)
    steps(engine, 3)
    assert len(engine.running) == 1, "of equal priority nobody gives way to a later arrival"
    drive(engine, [])


def test_the_last_in_rank_is_preempted_whoever_that_is_by_then() -> None:
    tickets = [Ticket(i, float(i)) for i in range(3)]
    engine = echo_engine(blocks=10)
    sequences = [asked([10 + i] * 7, 9, t) for i, t in enumerate(tickets)]
    arrive(engine, *sequences)
    steps(engine, 2)
    assert len(engine.running) == 3
    tickets[0].priority = 9.0
    for _ in range(20):
        if not engine.stats.preemptions:
            steps(engine)
    assert engine.waiting == [sequences[0]]
    drive(engine, [])
    assert answered(*sequences)


# -- prefixes computed ahead
def test_a_prefix_is_computed_ahead_and_found() -> None:
    engine = echo_engine()
    engine.prefill("site", [*PREFIX, 99, 99])
    steps(engine, 3)
    assert engine.stats.prefill_tokens == 32, "whole blocks only"
    assert not engine.running
    s = asked([*PREFIX, 40, 41])
    arrive(engine, s)
    drive(engine, [])
    assert answered(s)
    assert engine.stats.reused_tokens == 32


def test_it_comes_after_all_others() -> None:
    engine = echo_engine(max_step_tokens=8)
    engine.prefill("site", PREFIX, Ticket(0, -100.0))
    steps(engine)
    assert [s.computed for s in engine.running] == [8]
    s = asked(list(range(50, 74)), 1)
    arrive(engine, s)
    steps(engine, 3)
    assert owner(s).done.is_set()
    assert [s.computed for s in engine.running] == [8]


def test_who_waits_for_it_lends_it_their_turn() -> None:
    engine = echo_engine(max_step_tokens=8, blocks=60)
    engine.prefill("site", PREFIX)
    steps(engine)
    (ahead,) = engine.running
    other = asked([9] * 40, 1, Ticket(1, 1.0))
    follower = asked([*PREFIX, 70], 1, Ticket(2, 0.0))
    arrive(engine, other, follower)
    steps(engine)  # the follower finds its block being computed
    assert follower.waits_for is ahead
    before = other.computed
    steps(engine, 3)
    assert other.computed == before, "the prefix went first, as the follower would have"
    drive(engine, [])
    assert answered(other, follower)
    assert engine.stats.prefill_tokens == 32 + 40 + 1, "nothing was computed twice"


def test_a_request_that_came_first_is_joined_too() -> None:
    engine = echo_engine(max_step_tokens=8)
    s = asked([*PREFIX, 70], 1)
    arrive(engine, s)
    steps(engine)
    engine.prefill("site", PREFIX)
    drive(engine, [])
    assert answered(s)
    assert engine.stats.prefill_tokens == 33


def kept(engine: Engine, tokens: list[int]) -> int:
    return sum(n.keepers > 0 and n.block is not None for n in engine.tree.match(tokens, len(tokens)))


def test_it_is_kept_until_it_is_released() -> None:
    for is_released in (False, True):
        engine = echo_engine(blocks=21, policy="lru")
        engine.prefill("site", PREFIX)
        steps(engine, 4)
        assert kept(engine, PREFIX) == 8
        if is_released:
            engine.release("site")
        for i in range(10):
            s = asked([40 + i] * 14, 2)
            arrive(engine, s)
            drive(engine, [])
            assert answered(s)
        found = engine.tree.match(PREFIX, 32)
        assert len(found) == (0 if is_released else 8)
        assert kept(engine, PREFIX) == len(found)


def test_a_longer_prefix_takes_its_place_and_a_shorter_one_is_there_already() -> None:
    engine = echo_engine()
    engine.prefill("site", PREFIX[:16])
    steps(engine, 2)
    engine.prefill("site", PREFIX[:8])
    steps(engine)
    assert kept(engine, PREFIX) == 4
    engine.prefill("site", PREFIX)
    steps(engine)
    assert kept(engine, PREFIX) >= 4, "what there is stays until the rest is there"
    steps(engine, 3)
    assert kept(engine, PREFIX) == 8
    assert engine.stats.prefill_tokens == 32
    other = [5] * 8
    engine.prefill("site", other)
    steps(engine, 3)
    assert (kept(engine, PREFIX), kept(engine, other)) == (0, 2)


def test_a_release_ends_what_is_under_way_and_those_who_wait_go_on_alone() -> None:
    engine = echo_engine(max_step_tokens=8)
    engine.prefill("site", PREFIX)
    steps(engine)
    follower = asked([*PREFIX, 70], 1)
    arrive(engine, follower)
    steps(engine)
    engine.release("site")
    steps(engine)
    assert engine.running == [follower]
    drive(engine, [])
    assert answered(follower)
    assert kept(engine, PREFIX) == 0
    assert engine.stats.prefill_tokens == 33, "and with what was computed by then"


def test_what_is_kept_goes_before_a_running_sequence_has_to() -> None:
    engine = echo_engine(blocks=14)
    engine.prefill("site", PREFIX)
    steps(engine, 4)
    s = asked([60] * 30, 10)
    arrive(engine, s)
    drive(engine, [])
    assert answered(s)
    assert engine.stats.preemptions == 0
    assert kept(engine, PREFIX) < 8


def test_a_prefix_pushes_nothing_out_that_is_announced_for_now_or_kept_and_is_dropped_where_there_is_no_room() -> None:
    engine = echo_engine(blocks=13)
    engine.prefill("first", PREFIX)
    steps(engine, 4)
    engine.prefill("second", list(range(60, 92)))
    steps(engine, 6)
    assert kept(engine, PREFIX) == 8
    assert not engine.running
    assert not engine.waiting
    assert kept(engine, list(range(60, 92))) == 0
    engine.release("first")
    engine.prefill("second", list(range(60, 92)))
    steps(engine, 6)
    assert kept(engine, list(range(60, 92))) == 8, "asked again it is tried again"


def test_a_prefix_on_the_host_is_loaded_for_it() -> None:
    copier = HandCopier()
    engine = echo_engine(host_blocks=30, copier=copier, costs=Costs(load_s=1e-6, token_s=1.0))
    s = asked(PREFIX, 1)
    arrive(engine, s)
    drive(engine, [])
    assert engine.tree.evict(8) == 0
    copier.advance(100)
    steps(engine)
    assert {n.state for n in engine.tree.match(PREFIX, 32)} == {State.HOST}
    computed = engine.stats.prefill_tokens
    engine.prefill("site", PREFIX)
    for _ in range(10):
        copier.advance(3)
        steps(engine)
    assert kept(engine, PREFIX) == 8
    assert engine.stats.loaded_blocks == 8
    assert engine.stats.prefill_tokens == computed


def test_without_dedup_the_common_prefix_is_computed_by_all() -> None:
    for dedup in (True, False):
        engine = echo_engine(dedup=dedup, max_step_tokens=256, blocks=100)
        sequences = [asked([*PREFIX, i], 1) for i in range(4)]
        drive(engine, [sequences])
        assert answered(*sequences)
        assert engine.stats.prefill_tokens == (32 + 4 if dedup else 4 * 33)


def test_a_running_thread_computes_ahead() -> None:
    engine = echo_engine()
    engine.prefill("site", PREFIX)
    engine.start()
    deadline = time.monotonic() + 30
    while not engine.ask(lambda: kept(engine, PREFIX)) and time.monotonic() < deadline:
        time.sleep(0.001)
    s = sequence([*PREFIX, 3], 2)
    engine.submit([s])
    assert owner(s).done.wait(30)
    engine.close()
    assert answered(s)
    assert engine.stats.prefill_tokens == 33
