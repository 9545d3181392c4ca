"""Who is let in: the gate against a plain list, limits of a runtime, and what closing it means to what runs."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.ir.builder import Builder
from flowc.ir.errors import AdmissionError, ClosedError, ProgramTimeoutError
from flowc.ir.types import TEXT
from flowc.runtime.admission import Gate, Place
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import Plan, build_plan
from flowc.runtime.program import Program
from flowc.runtime.protocols import GenerateRequest, Generation
from flowc.runtime.scheduling import tenant
from tests.runtime.worlds import ScriptedLLM, World, text_graph


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 30)), max_size=60))
def test_the_gate_does_what_a_list_would(steps: list[tuple[bool, str, int]]) -> None:
    """At most 3 in all and 1 of "a"; who waits comes in by age, past those whose tenant is full; more than 4 do not."""
    gate = Gate(3, 4, {"a": 1})
    places: list[Place] = []  # held or waiting, by age
    held: list[Place] = []

    def may(name: str) -> bool:
        return len(held) < 3 and (name != "a" or all(p.tenant != "a" for p in held))

    for enters, name, which in steps:
        if enters:
            waiting = [p for p in places if p not in held]
            if may(name):
                places.append(gate.enter(name, lambda: None))
                held.append(places[-1])
            elif len(waiting) >= 4:
                with pytest.raises(AdmissionError):
                    gate.enter(name, lambda: None)
            else:
                places.append(gate.enter(name, lambda: None))
        elif places:
            leaver = places.pop(which % len(places))
            gate.leave(leaver)
            if leaver in held:
                held.remove(leaver)
            for place in places:
                if place not in held and may(place.tenant):
                    held.append(place)
        assert [p.is_held for p in places] == [p in held for p in places]
        assert (gate.held, gate.waiting) == (len(held), len(places) - len(held))


class Crowd:
    """A scripted model that counts how many prompts it has at a time, of all and of each first letter."""

    name, kind, max_batch, max_calls = "crowd", "scripted", 1, 99

    def __init__(self) -> None:
        self.now: list[str] = []
        self.most: dict[str, int] = {}

    def batch_key(self, request: object) -> int:
        return 0

    async def generate(self, requests: list[GenerateRequest], *_: object) -> list[Generation]:
        letter = requests[0].prompt[1]
        self.now.append(letter)
        for key, n in (("all", len(self.now)), (letter, self.now.count(letter))):
            self.most[key] = max(self.most.get(key, 0), n)
        await asyncio.sleep(1.0)
        self.now.remove(letter)
        return [Generation("ok")]


def one_call() -> Plan:
    b = Builder("w", [("q", TEXT)])
    return build_plan(b.finish(b.generate("default", b.params[0])))


def test_limits_hold_for_runs_maps_and_launches() -> None:
    crowd = Crowd()
    loop = VirtualLoop()
    plan = one_call()
    ended: list[Program] = []

    async def main() -> None:
        with Runtime(World(crowd), io_threads=0, max_programs=5, tenants={"b": 2}) as runtime:
            tenant.set("a")
            jobs = [runtime.run_async(plan, (f"qa{i}",)) for i in range(6)]
            jobs.append(runtime.map_async(plan, [(f"qa{i}",) for i in range(9)]))
            for i in range(4):
                runtime.launch(plan, (f"qa{i}",), ended.append)
            tasks = [asyncio.ensure_future(j) for j in jobs]
            tenant.set("b")
            tasks.append(asyncio.ensure_future(runtime.map_async(plan, [(f"qb{i}",) for i in range(7)])))
            await asyncio.gather(*tasks)
            while len(ended) < 4:  # noqa: ASYNC110
                await asyncio.sleep(1)
            assert runtime.gate is not None
            assert (runtime.gate.held, runtime.gate.waiting) == (0, 0)

    loop.run(main())
    assert crowd.most["all"] == 5
    assert crowd.most["b"] == 2


def blocked(world: World) -> ScriptedLLM:
    model = world.the_llm = ScriptedLLM()
    model.gate = threading.Event()
    return model


def run_in_thread(runtime: Runtime, plan: Plan, box: list[object], timeout_s: float | None = None) -> threading.Thread:
    def work() -> None:
        try:
            box.append(runtime.run(plan, ("q",), timeout_s=timeout_s))
        except BaseException as error:
            box.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_a_full_queue_refuses_and_a_short_one_times_out() -> None:
    world, plan = World(), build_plan(text_graph())
    model = blocked(world)
    box: list[object] = []
    with Runtime(world, max_programs=1, max_queued=1) as runtime:
        first = run_in_thread(runtime, plan, box)
        assert model.started.wait(10)
        late = run_in_thread(runtime, plan, box, 0.05)
        late.join(10)
        assert isinstance(box[0], ProgramTimeoutError)
        second = run_in_thread(runtime, plan, box)
        assert runtime.gate is not None
        while not runtime.gate.waiting:
            time.sleep(0.001)
        with pytest.raises(AdmissionError) as caught:
            runtime.run(plan, ("q",))
        assert caught.value.code == "F075"
        assert model.gate is not None
        model.gate.set()
        first.join(10)
        second.join(10)
        assert len(box) == 3
        assert not any(isinstance(b, BaseException) for b in box[1:])
        assert runtime.gate.held == 0


def test_closing_lets_finish_within_the_grace_and_names_what_it_ends() -> None:
    world, plan = World(), build_plan(text_graph())
    model = blocked(world)
    assert model.gate is not None
    box: list[object] = []
    runtime = Runtime(world, max_programs=1)
    thread = run_in_thread(runtime, plan, box)
    assert model.started.wait(10)
    waiting = run_in_thread(runtime, plan, box)
    assert runtime.gate is not None
    while not runtime.gate.waiting:
        time.sleep(0.001)
    threading.Timer(0.1, model.gate.set).start()
    runtime.close(grace_s=20)
    thread.join(10)
    waiting.join(10)
    assert sorted(type(b).__name__ for b in box) == ["ClosedError", "str"], "one ran, one waited"
    with pytest.raises(ClosedError) as caught:
        runtime.run(plan, ("q",))
    assert caught.value.code == "F076"

    world = World()
    model = blocked(world)
    assert model.gate is not None
    runtime = Runtime(world)
    box.clear()
    thread = run_in_thread(runtime, plan, box)
    assert model.started.wait(10)
    closing = threading.Thread(target=lambda: runtime.close(grace_s=0.05))
    closing.start()
    thread.join(10)
    assert isinstance(box[0], ClosedError)
    model.gate.set()
    closing.join(10)


def test_closing_inside_a_loop() -> None:
    plan = one_call()

    async def main() -> list[object]:
        world = World(Crowd())
        runtime = Runtime(world, io_threads=0)
        tasks = [asyncio.ensure_future(runtime.run_async(plan, ("qa",)))]
        await asyncio.sleep(0.5)
        await runtime.aclose(grace_s=5)
        first = await asyncio.gather(*tasks)
        runtime = Runtime(world, io_threads=0)
        tasks = [asyncio.ensure_future(runtime.run_async(plan, ("qa",)))]
        await asyncio.sleep(0.5)
        await runtime.aclose(grace_s=0.1)
        second = await asyncio.gather(*tasks, return_exceptions=True)
        return [*first, *second]

    done, ended = asyncio.run(main())
    assert done == "ok"
    assert isinstance(ended, ClosedError)
