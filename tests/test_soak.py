"""Many real programs with random faults, timeouts and cancellations: nothing is left over, everything has an end.

FLOWC_SOAK=10000 python -m pytest tests/test_soak.py      # the whole; 300 programs otherwise
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowc import LLM, Index, tool, workflow
from flowc.ir.errors import FlowcError
from flowc.ir.values import Doc, Docs
from flowc.runtime.engine import Runtime
from flowc.runtime.protocols import GenerateRequest, SearchRequest
from flowc.runtime.scheduling import NAMES, tenant

PROGRAMS = int(os.environ.get("FLOWC_SOAK", "300"))
llm, docs = LLM("soak"), Index("soak")
chance = random.Random(11)
lock = threading.Lock()


def draw() -> float:
    with lock:
        return chance.random()


class Refused(Exception):
    """What the world's faults raise."""


@tool(idempotent=True, retries=1)
async def fetch(q: str) -> str:
    await asyncio.sleep(draw() * 0.004)
    if draw() < 0.1:
        raise Refused("fetch")
    return q[:20]


@tool
def look(q: str) -> str:
    if draw() < 0.05:
        raise Refused("look")
    time.sleep(0.002 * draw())  # sometimes worth a thread
    return q[:10]


@tool(timeout=0.02)
def slow(q: str) -> str:
    time.sleep(0.03 if draw() < 0.1 else 0.0)
    return q


@workflow
def agent(q: str) -> str:
    found = docs.search(q, k=2)
    seen = look(q)
    draft = llm.generate(f"{found} {seen} {q}", max_tokens=4)
    for _ in range(2):
        try:
            more = slow(draft)
        except TimeoutError:
            more = "late"
        if llm.choose(f"{draft} {more}?", ["yes", "no"]) == "yes":
            break
        draft = llm.generate(f"{q} {more} {draft}", max_tokens=4)
    return draft


@workflow
async def gathering(q: str) -> str:
    parts = await asyncio.gather(fetch(q), fetch(q + "a"), fetch(q + "b"))
    notes = [await docs.search(p, k=1) for p in parts]  # type: ignore[misc]
    answer: str = await llm.generate(f"{notes} {q}", max_tokens=4)  # type: ignore[misc]
    return answer


class Index_:
    """Searches that fail now and then, one of a batch or all of it."""

    name, max_batch = "soak", 16

    def batch_key(self, request: SearchRequest) -> int:
        return request.k

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs | Exception]:
        if draw() < 0.01:
            raise Refused("all")
        return [Refused("one") if draw() < 0.03 else Docs([Doc(0, r.query[:30])]) for r in requests]

    def close(self) -> None:
        """Nothing is held."""


class Flaky:
    """The paged engine, whose calls fail now and then before they reach it."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.name, self.kind, self.max_batch, self.max_calls = inner.name, inner.kind, 8, 16

    def batch_key(self, request: GenerateRequest) -> Any:
        return self.inner.batch_key(request)

    def generate(self, requests: Sequence[GenerateRequest], *rest: Any) -> Any:
        if draw() < 0.02:
            raise Refused("generate")
        return self.inner.generate(requests, *rest)

    def choose(self, requests: Any) -> Any:
        return self.inner.choose(requests)


class Resources:
    def __init__(self, model: Any) -> None:
        self.model, self.the_index = model, Index_()

    def llm(self, name: str) -> Any:
        return self.model

    def index(self, name: str) -> Any:
        return self.the_index

    def embedder(self, name: str) -> Any:
        raise AssertionError(name)

    def reranker(self, name: str) -> Any:
        raise AssertionError(name)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0


async def storm(runtime: Runtime, programs: int, seed: int) -> Counter[str]:
    """Runs them 40 at a time; a fifth is cancelled somewhere, a tenth has a deadline. What each ended as."""
    random_ = random.Random(seed)
    plans = [w.compile(opt=2).plan for w in (agent, gathering)]
    room = asyncio.Semaphore(40)
    ends: Counter[str] = Counter()

    async def one(number: int) -> None:
        async with room:
            tenant.set("ab"[number % 2])
            limit = random_.random() * 0.1 if random_.random() < 0.1 else None
            plan = plans[random_.randrange(2)]
            task = asyncio.ensure_future(runtime.run_async(plan, (f"question {number % 37}",), timeout_s=limit))
            if random_.random() < 0.2:
                asyncio.get_running_loop().call_later(random_.random() * 0.08, task.cancel)
            try:
                value = await task
                assert isinstance(value, str)
                ends["value"] += 1
            except asyncio.CancelledError:
                ends["cancelled"] += 1
            except (FlowcError, Refused) as error:
                ends[type(error).__name__] += 1

    await asyncio.gather(*(one(n) for n in range(programs)))
    left = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
    for _ in range(100):  # cancelled coroutines of tools take a turn or two to end
        if not (left := [t for t in left if not t.done()]):
            break
        await asyncio.sleep(0.01)
    assert not left
    return ends


def eventually(holds: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.01)
    return holds()


@pytest.mark.skipif(os.name != "posix", reason="counts descriptors")
def test_nothing_is_left_over(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from flowc.backends.llm.paged.backend import PagedBackend
    from flowc.backends.llm.tiny import write_tiny_model

    backend = PagedBackend(str(write_tiny_model(tmp_path / "tiny", hidden=32, layers=1)), threads=1, max_sequences=8)
    ends: Counter[str] = Counter()
    names = [name for name in NAMES if name != "mlfq"]  # its table is PLAS's
    backend.generate([GenerateRequest("warm", max_tokens=2)])  # its thread stays until it is closed
    threads, files = threading.active_count(), open_files()
    for i, policy in enumerate(names):
        with Runtime(
            Resources(Flaky(backend)), policy=policy, max_programs=32, max_queued=1000, tenants={"b": 20}
        ) as runtime:
            ends += asyncio.run(storm(runtime, PROGRAMS // len(names), i))
            assert runtime.gate is not None
            assert (runtime.gate.held, runtime.gate.waiting) == (0, 0)
            assert runtime.table is None or (len(runtime.table) == 0 and not runtime.table._live)
            assert not any(lane._queue for lane in runtime._lanes.values())
            assert not runtime._drivers
        assert eventually(lambda: not backend.engine.running and not backend.engine.waiting), (
            "the engine works for nobody"
        )
        backend.engine.check()
        assert eventually(lambda: threading.active_count() <= threads), threading.enumerate()
        assert open_files() <= files, "files are left"
    gc.collect()
    assert sum(ends.values()) == PROGRAMS // len(names) * len(names)
    assert ends["value"] > 0.3 * PROGRAMS
    assert ends["cancelled"]
    assert ends["Refused"]
    print(dict(ends))
    backend.close()
