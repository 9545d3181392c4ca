"""Searches with a device beside the CPU: the same ids and the same bits, whatever lies on the device and when."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.vector.device.devices import F32, I64
from flowc.backends.vector.device.simulated import SimulatedDevice, VirtualTime
from flowc.backends.vector.scan import Lists, ListSearch, Selection
from flowc.runtime.protocols import Budget
from tests.backends.vector.device.rig import Rig, few_directions, results, rows, scattered


class Interrupted(SimulatedDevice):
    """Something happens between the start of each scan and its end."""

    meanwhile: Any = None

    def compute(self, queries: F32, pages: Sequence[I64], k: int) -> tuple[F32, I64]:
        if self.meanwhile is not None:
            self.meanwhile()
        return super().compute(queries, pages, k)


def random_event(rig: Rig, data: st.DataObject) -> None:
    match data.draw(st.sampled_from(["time", "bound", "announce", "withdraw", "nothing"]), label="event"):
        case "time":
            rig.elapse(data.draw(st.sampled_from([1e-6, 1e-5, 1e-3]), label="seconds"))
        case "bound":
            rig.cache.set_bound(int(rig.bytes * data.draw(st.sampled_from([0.0, 0.2, 0.7, 1.0, 2.0]), label="bound")))
        case "announce":
            numbers = st.sets(st.integers(0, rig.lists.nlist - 1), min_size=1)
            chosen = sorted(data.draw(numbers, label="lists"))
            rig.announce(data.draw(st.sampled_from("ab"), label="key"), chosen, 1e-3)
        case "withdraw":
            rig.cache.announce(data.draw(st.sampled_from("ab"), label="key"), None)


@settings(max_examples=80)
@given(
    data=st.data(),
    make=st.sampled_from([scattered, few_directions]),
    count=st.integers(5, 160),
    codec=st.sampled_from(["fp16", "fp32"]),
    l2=st.booleans(),
)
def test_any_cache_state_and_any_change_of_it_gives_the_same_bits(
    data: st.DataObject, make: Any, count: int, codec: str, l2: bool
) -> None:
    vectors = make(count, data.draw(st.integers(0, 5), label="seed"))
    device = Interrupted(clock=VirtualTime(), launch_s=0.0, link_rate=1e7, jitter=0.5, ring_bytes=1000)
    nlist = data.draw(st.integers(1, min(count, 12)), label="nlist")
    rig = Rig(vectors, nlist, codec, l2=l2, share=data.draw(st.sampled_from([0.2, 0.5, 3.0])), device=device)
    assert isinstance(device.clock, VirtualTime)
    rig.clock = device.clock
    device.meanwhile = lambda: random_event(rig, data)
    for _ in range(data.draw(st.integers(1, 3), label="batches")):
        for _ in range(data.draw(st.integers(0, 3), label="events")):
            random_event(rig, data)
        size = data.draw(st.integers(1, 4), label="searches")
        at = [data.draw(st.integers(0, count - 1)) for _ in range(size)]
        ks = [data.draw(st.sampled_from([1, 3, count + 2])) for _ in range(size)]
        nprobes = [data.draw(st.integers(1, nlist)) for _ in range(size)]
        queries = np.ascontiguousarray(vectors[at] * np.float32(1.25))
        only = [data.draw(st.booleans(), label="filtered") for _ in range(size)]

        expected = results(rig.plain, begun(rig.plain, queries, ks, nprobes, only))
        searches = begun(rig.lists, queries, ks, nprobes, only)
        for _ in range(data.draw(st.integers(0, 3), label="steps")):
            work = []
            for search in searches:
                some = data.draw(st.sets(st.integers(0, search.units - 1)), label="ranks")
                work.append((search, np.array(sorted(some), dtype=np.int64)))
            rig.lists.run(work)
            random_event(rig, data)
        assert results(rig.lists, searches) == expected
    assert rig.scanner.failure is None
    rig.check()


def begun(lists: Lists, queries: F32, ks: list[int], nprobes: list[int], only: list[bool]) -> list[ListSearch]:
    """The searches; where `only` says so, every third id is filtered out."""
    sizes = [np.count_nonzero(lists.stored(n)[1] % 3 != 1) if lists.sizes[n] else 0 for n in range(lists.nlist)]
    bits = np.packbits(np.arange(lists.count) % 3 != 1, bitorder="little")
    chosen = Selection(bits, np.array(sizes, dtype=np.int64))
    return lists.begin_many(queries, ks, nprobes, only=[chosen if one else None for one in only])


def full(rig: Rig) -> None:
    """Everything on the device."""
    rig.announce("all", np.arange(rig.lists.nlist), 10.0)
    rig.elapse(1.0)
    assert len(rig.cache.resident()) == np.count_nonzero(rig.lists.sizes)


def test_the_device_really_answers() -> None:
    """With everything there, the CPU scans nothing, and one bit wrong on the device is a wrong result."""
    vectors = scattered(600, 1, dim=32)
    rig = Rig(vectors, 8, share=2.0)
    full(rig)
    plain = [rows(found) for found in rig.plain.search(vectors[:20], [10] * 20, [4] * 20)]
    scanned: list[int] = []
    here = rig.lists._scan_here

    def counted(work: Any) -> None:
        scanned.extend(len(ranks) for _, ranks in work)
        here(work)

    rig.lists._scan_here = counted  # type: ignore[method-assign]
    assert [rows(found) for found in rig.lists.search(vectors[:20], [10] * 20, [4] * 20)] == plain
    assert sum(scanned) == 0
    assert rig.scanner.unproven == 0
    assert rig.cache.stats().hits == 80
    assert rig.cache.stats().misses == 0
    assert isinstance(rig.device, SimulatedDevice)
    for chunk in rig.device._codes:
        chunk *= -1.0
    assert [rows(found) for found in rig.lists.search(vectors[:20], [10] * 20, [4] * 20)] != plain


def test_what_cannot_be_proven_is_scanned_here() -> None:
    """More equal vectors than the device gives candidates: nobody can tell which ids are missing."""
    vectors = np.ascontiguousarray(np.repeat(scattered(3, 2), 200, axis=0))
    rig = Rig(vectors, 2, share=2.0)
    full(rig)
    found, expected = rig.lists.search(vectors[:1], [5], [2]), rig.plain.search(vectors[:1], [5], [2])
    assert rows(found[0]) == rows(expected[0])
    assert rig.scanner.unproven == 1


def test_the_bound_on_the_error_holds() -> None:
    """Scores of float32 products in other orders lie within it of the canonical ones, as near as the bound says."""
    rng = np.random.default_rng(3)
    for l2 in (False, True):
        vectors = np.ascontiguousarray(rng.standard_normal((400, 48)).astype(np.float32) * 3)
        rig = Rig(vectors, 4, "fp32", l2=l2, share=2.0)
        full(rig)
        queries = vectors[:20] + 1
        for query in queries:
            search = rig.plain.begin(query, 400, 4)
            exact = {i: s for s, i in rows(rig.plain.finish(search))}
            pages = np.concatenate(list(rig.cache._where.values()))
            scores, names = rig.device.scan(query[None], [pages], 400).result()
            error = rig.source.error(query, np.arange(4))
            for score, name in zip(scores[0].tolist(), names[0].tolist(), strict=True):
                i = int(rig.lists.stored(name >> 32)[1][name & 0xFFFFFFFF])
                assert abs(score - exact[i]) <= error


def test_searches_with_a_rule_to_stop_by_stay_here() -> None:
    vectors = scattered(300, 4)
    rig = Rig(vectors, 8, share=2.0)
    full(rig)
    for lists in (rig.lists, rig.plain):
        search = lists.begin(vectors[0], 3, 8, budget=Budget(lists=2))
        lists.scan([search])
        assert int(search.scanned.sum()) == 2
    assert rig.cache.stats().hits == 0


def test_few_vectors_are_not_worth_a_launch() -> None:
    vectors = scattered(300, 5)
    device = SimulatedDevice(clock=VirtualTime(), launch_s=1.0)
    rig = Rig(vectors, 8, share=2.0, device=device)
    rig.clock = device.clock  # type: ignore[assignment]
    full(rig)
    assert rows(rig.lists.search(vectors[:1], [3], [4])[0]) == rows(rig.plain.search(vectors[:1], [3], [4])[0])
    assert rig.scanner.unproven == 0
    assert rig.cache.code_s < 1e-3


class Broken(SimulatedDevice):
    """Its scans fail, at once or at their end."""

    at_once = True

    def scan(self, queries: F32, pages: Sequence[I64], k: int) -> Any:
        if self.at_once:
            raise RuntimeError("the device is gone")
        return super().scan(queries, pages, k)

    def compute(self, queries: F32, pages: Sequence[I64], k: int) -> tuple[F32, I64]:
        raise RuntimeError("the device is gone")


@pytest.mark.parametrize("at_once", [True, False])
def test_a_device_that_fails_costs_nothing_but_time(at_once: bool) -> None:
    vectors = scattered(300, 6)
    clock = VirtualTime()
    device = Broken(clock=clock, launch_s=0.0)
    device.at_once = at_once
    rig = Rig(vectors, 8, share=2.0, device=device)
    rig.clock = clock
    full(rig)
    expected = [rows(found) for found in rig.plain.search(vectors[:9], [3] * 9, [4] * 9)]
    assert [rows(found) for found in rig.lists.search(vectors[:9], [3] * 9, [4] * 9)] == expected
    assert str(rig.scanner.failure) == "the device is gone"
    assert [rows(found) for found in rig.lists.search(vectors[:9], [3] * 9, [4] * 9)] == expected
    rig.check()


def test_threads_search_while_the_cache_changes() -> None:
    """On the real clock, with the cache's own thread, and a bound that moves all the time."""
    vectors = scattered(3000, 7, dim=16)
    device = SimulatedDevice(link_rate=2e8, launch_s=0.0, ring_bytes=20_000)
    rig = Rig(vectors, 32, device=device, threads=True)
    expected = [rows(found) for found in rig.plain.search(vectors[:200], [7] * 200, [6] * 200)]
    wrong: list[int] = []
    stop = threading.Event()

    def search(offset: int) -> None:
        for at in range(offset, 200, 4):
            found = rig.lists.search(vectors[at : at + 1], [7], [6])
            if rows(found[0]) != expected[at]:
                wrong.append(at)

    def shake() -> None:
        sizes = [0.1, 1.0, 0.0, 0.5]
        n = 0
        while not stop.is_set():
            n += 1
            rig.cache.set_bound(int(rig.bytes * sizes[n % 4]))
            rig.announce(f"{n % 3}", np.arange(n % 7, 32, 3), 0.01)
            stop.wait(0.002)

    shaker = threading.Thread(target=shake)
    workers = [threading.Thread(target=search, args=(offset,)) for offset in range(4)]
    for thread in (shaker, *workers):
        thread.start()
    for thread in workers:
        thread.join()
    stop.set()
    shaker.join()
    assert wrong == []
    assert rig.cache.stats().hits > 0
    rig.check()
    rig.cache.close()
    assert rig.cache.held_bytes == 0
    assert [rows(found) for found in rig.lists.search(vectors[:5], [7] * 5, [6] * 5)] == expected[:5]
