"""Policies: bands, promotion, shares and deadlines by themselves, and what the rest of a plan is estimated to be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.config import RuntimeConfig
from flowc.ir.builder import Builder
from flowc.ir.errors import ConfigError
from flowc.ir.types import TEXT
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import Plan, build_plan
from flowc.runtime.program import Program
from flowc.runtime.protocols import GenerateRequest, Generation
from flowc.runtime.scheduling import NAMES, Entry, Policy, make_policy, tenant
from flowc.runtime.scheduling.policies import ATLAS, MLFQ, PLAS, PROMOTED, Deadline, Remaining
from tests.runtime.worlds import World, pruned


class OneAtATime:
    """A model with one slot: a prompt "...:3" takes 3 s. Keeps the order of service."""

    name, kind, max_batch = "one", "scripted", 1

    def __init__(self) -> None:
        self.order: list[str] = []

    def batch_key(self, request: GenerateRequest) -> int:
        return 0

    async def generate(self, requests: list[GenerateRequest], *_: object) -> list[Generation]:
        (request,) = requests
        self.order.append(request.prompt)
        await asyncio.sleep(float(request.prompt.rpartition(":")[2]))
        return [Generation("")]


def chain(calls: int, name: str = "chain") -> Plan:
    """So many calls in a row, all with the prompt that is the argument."""
    b = Builder(name, [("q", TEXT)])
    last = b.generate("m", b.params[0])
    for _ in range(calls - 1):
        last = b.generate("m", b.template("{}{}", last, b.params[0]))  # the answer is empty
    return build_plan(b.finish(last))


def wide(width: int) -> Plan:
    b = Builder("wide", [("q", TEXT)])
    parts = [b.generate("m", b.params[0], seed=i) for i in range(width)]
    return build_plan(pruned(b.finish(b.template("{}" * width, *parts))))


def run(
    policy: str | Policy, jobs: list[tuple[float, Plan, str, str]], **options: Any
) -> tuple[list[str], list[Entry]]:
    """The order of service, and the table's accounts, of programs (arrival, plan, argument, tenant)."""
    model, accounts = OneAtATime(), list[Entry]()
    loop = VirtualLoop()

    async def main() -> None:
        with Runtime(World(model), io_threads=0, policy=policy, **options) as runtime:
            if runtime.table is not None:
                runtime.table.on_leave = accounts.append
            left = len(jobs)
            done = loop.create_future()

            def ended(program: Program) -> None:
                nonlocal left
                assert program.error is None
                left -= 1
                if not left:
                    done.set_result(None)

            def start(plan: Plan, argument: str, who: str) -> Callable[[], None]:
                def call() -> None:
                    token = tenant.set(who)
                    runtime.launch(plan, (argument,), ended)
                    tenant.reset(token)

                return call

            for at_s, plan, argument, who in jobs:
                loop.call_at(at_s, start(plan, argument, who))
            await done
            assert runtime.table is None or len(runtime.table) == 0

    loop.run(main())
    return model.order, accounts


def test_names() -> None:
    assert [name for name in NAMES if make_policy(name) is None] == ["fcfs"], "first come, first served needs no table"
    with pytest.raises(ConfigError, match="plas"):
        make_policy("pls")
    with Runtime(World()) as runtime:
        assert runtime.table is None
    assert _key_choices(RuntimeConfig, "policy") == NAMES


def _key_choices(kind: type[Any], key: str) -> tuple[str, ...]:
    (found,) = [f.metadata["choices"] for f in fields(kind) if f.name == key]
    return tuple(found)


def test_accounts_are_kept_in_one_unit() -> None:
    """Service is what lanes worked, waiting the rest, both in seconds; the path is the longest chain, not the sum."""
    _, (short, long) = run("atlas", [(0, chain(1), "a:2", ""), (1, wide(3), "b:4", "")])
    assert (short.service_s, short.waited_s, short.path_s) == (2, 0, 2)
    assert (long.service_s, long.waited_s) == (12, 1 + 5 + 9)
    assert long.path_s == 4


def test_new_programs_pass_old_ones_under_program_policies_only() -> None:
    old, new = chain(4), chain(1)
    jobs = [(0.0, old, "a:2", ""), (0.5, old, "b:2", ""), (5.5, new, "c:2", "")]
    first = {p: run(p, jobs)[0].index("c:2") for p in ("fcfs", "mlfq", "plas", "atlas")}
    assert first["fcfs"] == first["mlfq"] == 4, "to a call-level policy all calls are new"
    assert first["plas"] == first["atlas"] == 3


def test_bands_double_and_starvation_promotes() -> None:
    policy = ATLAS(quantum_s=2.0, growth=2.0, beta=5.0)
    assert [policy.band(s, 1.0) for s in (0.0, 1.9, 2.0, 3.9, 4.0, 8.0, 17.0)] == [0, 0, 1, 1, 2, 3, 4]
    flood = [(float(i), chain(1), f"n{i}:1", "") for i in range(1, 60)]
    for beta, latest in ((5.0, 20), (1e9, 60)):
        order, accounts = run(PLAS(quantum_s=1.0, beta=beta), [(0.0, chain(2), "old:2", ""), *flood])
        assert order.index("old:2") == 0
        second = [i for i, p in enumerate(order) if p.endswith("old:2")][1]
        assert second <= latest
        (old,) = [a for a in accounts if a.requests == 2]
        assert old.waited_s <= beta * 2.0 + 2.0, "bounded: beta times its service, and the call that ran then"
    assert second == len(order) - 1, "without promotion it is the last of all"


def test_a_promoted_request_is_before_all() -> None:
    first = MLFQ().band(0.0, 1.0)
    assert first > PROMOTED


@given(st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_shares_are_served_by_weight(lengths: list[int]) -> None:
    """Two tenants that always have work get service as 3 to 1, up to one call, at every moment."""
    jobs = [(0.0, chain(1), f"{who}{i}:{n}", who) for who in "ab" for i, n in enumerate(lengths * 8)]
    order, _ = run("fair", jobs, shares={"a": 3.0})
    served = {"a": 0.0, "b": 0.0}
    totals = sum(lengths) * 8
    for prompt in order:
        served[prompt[0]] += float(prompt.rpartition(":")[2])
        if served["a"] < totals and served["b"] < totals:
            assert abs(served["a"] / 3.0 - served["b"]) <= max(lengths) * 1.34


def test_an_idle_tenant_saves_nothing_up() -> None:
    jobs = [(0.0, chain(1), f"a{i}:1", "a") for i in range(20)] + [(10.0, chain(1), f"b{i}:1", "b") for i in range(10)]
    order, _ = run("fair", jobs)
    assert sum(p[0] == "b" for p in order[10:20]) in (4, 5, 6), "they take turns from then on"


def test_the_remaining_path_of_a_known_program_is_what_is_left() -> None:
    """With equal calls the estimate of a chain is exact once its sites have been seen."""
    plan = chain(5)
    seen: list[tuple[float, float]] = []

    class Spy(Remaining):
        def rank(self, turn: Any, now_s: float) -> float:
            if turn.remaining_s is not None and not turn.service_s:
                seen.append((turn.remaining_s, (5 - turn.entry.requests + 1) * 2.0))
            return super().rank(turn, now_s)

    run(Spy(), [(20.0 * i, plan, f"p{i}:2", "") for i in range(14)])
    assert len(seen) >= 25, "after eight programs the plan is trusted"
    assert all(abs(predicted - actual) < 1e-6 for predicted, actual in seen)


def test_shortest_remaining_goes_first_once_known() -> None:
    short, long = chain(1, "short"), chain(6, "long")
    warm = [(100.0 * i, plan, f"w{i}:1", "") for i in range(10) for plan in (short, long)]
    jobs = [*warm, *((2000.0, long, f"l{i}:1", "") for i in range(3)), (2003.5, short, "s:1", "")]
    order, _ = run("remaining", jobs)
    tail = [p.rpartition("l")[2] if "l" in p else p for p in order[len(warm) // 2 * 7 :]]
    assert tail.index("s:1") == 4, "a program of one call passes those with more left"
    assert tail.index("1:1") == 7, "and those proceed one after another, not in turns"


def test_late_programs_do_not_sink_the_others() -> None:
    """Ten programs of 1 s with 3.5 s each: first come, first served or not, three can be in time; none is lost to the
    late ones. The hopeless go last."""
    plan = chain(1)
    model = OneAtATime()
    loop = VirtualLoop()

    async def main(policy: str) -> int:
        with Runtime(World(model), io_threads=0, policy=policy) as runtime:
            for i in range(10):  # what a call takes is learned first
                await runtime.run_async(plan, (f"w{i}:1",))
            jobs = [runtime.run_async(plan, (f"x{i}:1",), timeout_s=3.5) for i in range(10)]
            jobs += [runtime.run_async(plan, (f"y{i}:1",), timeout_s=t) for i, t in enumerate((1.5, 2.6, 20.0))]
            done = await asyncio.gather(*jobs, return_exceptions=True)
            return sum(isinstance(d, str) for d in done)

    assert loop.run(main("deadline")) == 4, "those due at 1.5, 2.6 and 20 and one of the ten"
    assert Deadline.chance(1.0, 0.0, 0.5) == 0.0
    assert Deadline.chance(0.0, 1.0, 0.5) == 1.0
    assert Deadline.chance(1.0, 1.0, 0.5) == 0.5
    assert Deadline.chance(1.0, 4.0, 0.5) > 0.99


def test_cancelled_programs_leave_nothing_behind() -> None:
    model = OneAtATime()
    loop = VirtualLoop()

    async def main() -> None:
        with Runtime(World(model), io_threads=0, policy="atlas") as runtime:
            tasks = [asyncio.ensure_future(runtime.run_async(chain(3), (f"q{i}:2",))) for i in range(20)]
            await asyncio.sleep(7)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(d, asyncio.CancelledError) for d in done] == [True, False] * 10
            assert runtime.table is not None
            assert len(runtime.table) == 0
            assert not runtime.table._live

    loop.run(main())
