"""What the cache holds: by value per byte, under a bound that moves, with transfers that end when they end."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.vector.device.cache import Prediction
from flowc.backends.vector.device.devices import I64, Codes, name_of
from flowc.backends.vector.device.simulated import SimulatedDevice, VirtualTime
from tests.backends.vector.device.rig import Rig, rows, scattered


def rig(share: float = 0.3, **options: object) -> Rig:
    return Rig(scattered(400, 1), 10, share=share, **options)  # type: ignore[arg-type]


def test_a_list_is_there_once_its_transfer_is_over() -> None:
    it = rig(share=2.0)
    it.announce("a", [3])
    it.cache.pump()
    assert it.cache.resident().tolist() == []
    assert isinstance(it.device, SimulatedDevice)
    arrival = it.device.arrival_s()
    assert arrival is not None
    it.clock.now_s = np.nextafter(arrival, 0)
    assert it.cache.resident().tolist() == []
    it.clock.now_s = arrival
    assert it.cache.resident().tolist() == [3]
    it.check()


def test_what_is_there_is_the_list_byte_for_byte() -> None:
    it = rig(share=2.0)
    it.announce("a", range(10))
    it.elapse(1.0)
    assert isinstance(it.device, SimulatedDevice)
    for number in np.flatnonzero(it.lists.sizes).tolist():
        names, codes = [], []
        for page in it.cache._where[number].tolist():
            chunk, slot = divmod(page, it.cache.layout.chunk)
            there = it.device._names[chunk][slot] >= 0
            names += it.device._names[chunk][slot][there].tolist()
            codes.append(it.device._codes[chunk][slot][there])
        assert names == [name_of(number, at) for at in range(int(it.lists.sizes[number]))]
        assert np.concatenate(codes).tobytes() == it.source.codes(number).tobytes()


def test_demand_fades_and_the_bound_holds_the_most_valuable() -> None:
    it = rig()
    for _ in range(40):
        it.cache.note([np.array([1, 2])], 0, 0)
        it.elapse(1e-3)
    assert {1, 2} <= set(it.cache.resident().tolist())
    for _ in range(200):
        it.cache.note([np.array([5, 6, 7, 8])], 0, 0)
        it.elapse(1e-3)
    assert not {1, 2} & set(it.cache.resident().tolist())
    assert it.cache.held_bytes <= it.cache.bound_bytes <= it.bytes
    it.check()


def test_a_prediction_drives_out_demand_and_leaves_with_its_key() -> None:
    it = rig()
    for _ in range(30):
        it.cache.note([np.array([1, 2, 3])], 0, 0)
        it.elapse(1e-3)
    before = set(it.cache.resident().tolist())
    it.announce("a", [6, 7, 8], 1.0)
    it.elapse(0.5)
    assert {6, 7} <= set(it.cache.resident().tolist())
    it.cache.announce("a", None)
    for _ in range(5):
        it.cache.note([np.array([1, 2, 3])], 0, 0)
        it.elapse(1e-3)
    assert set(it.cache.resident().tolist()) == before
    assert it.cache.stats().wasted_bytes > 0
    it.check()


def test_a_withdrawn_prediction_is_not_brought_in_any_more() -> None:
    clock = VirtualTime()
    device = SimulatedDevice(clock=clock, link_rate=1e6, ring_bytes=1)  # one list at a time
    it = rig(share=2.0, device=device)
    it.clock = clock
    it.announce("a", [1, 2, 3, 4], 10.0)
    it.cache.pump()
    it.announce("a", [5], 10.0)  # a better one
    it.elapse(1.0)
    assert it.cache.stats().withdrawn == 3
    assert len(it.cache.resident()) == 2  # the one that was on its way, and the new one
    assert 5 in it.cache.resident()


def test_what_would_come_too_late_stays_unless_waiting_pays() -> None:
    """The first window * rate bytes are free; a byte more must save more than it takes."""
    clock = VirtualTime()
    device = SimulatedDevice(clock=clock, link_rate=1e6)
    it = rig(share=2.0, device=device, code_s=1e-9)  # the CPU is a thousand times as quick as the link
    it.clock = clock
    sizes = np.array([len(it.source.codes(n)) for n in range(10)])
    it.announce("a", range(10), window_s=float(sizes[:3].sum() * 30 / 1e6))
    it.elapse(10.0)
    assert 1 <= len(it.cache.resident()) <= 4
    slow = rig(share=2.0, device=SimulatedDevice(clock=(other := VirtualTime()), link_rate=1e6), code_s=1.0)
    slow.clock = other
    slow.announce("a", range(10), window_s=0.0)
    slow.elapse(10.0)
    assert len(slow.cache.resident()) == np.count_nonzero(slow.lists.sizes)


def test_a_smaller_bound_gives_memory_back_and_moves_what_stays() -> None:
    it = rig(share=2.0)
    it.announce("a", range(10))
    it.elapse(1.0)
    full = it.cache.held_bytes
    keep = np.array([0, 9])
    it.announce("b", keep, chance=5.0)
    it.cache.announce("a", None)
    copied = it.cache.stats().copied_bytes
    need = int(sum(len(it.cache._where[n]) for n in keep.tolist()) * it.cache.layout.page_bytes)
    it.cache.set_bound(need + it.cache.layout.chunk_bytes)
    assert it.cache.held_bytes <= need + it.cache.layout.chunk_bytes < full
    assert set(keep.tolist()) <= set(it.cache.resident().tolist())
    assert it.cache.stats().moved_pages > 0
    assert it.cache.stats().copied_bytes == copied  # over the link nothing came again
    found, expected = (
        it.lists.search(scattered(4, 2), [5] * 4, [10] * 4),
        it.plain.search(scattered(4, 2), [5] * 4, [10] * 4),
    )
    assert [rows(one) for one in found] == [rows(one) for one in expected]
    assert it.cache.set_bound(0) == 0
    it.check()


def test_pages_that_a_scan_reads_stay_until_it_ends() -> None:
    it = rig(share=2.0)
    it.announce("a", range(10))
    it.elapse(1.0)
    with it.cache.pinned([np.array([4])]) as pages:
        assert list(pages) == [4]
        assert it.cache.set_bound(0) > 0
        assert it.cache.resident().tolist() == [4]
    it.cache.pump()
    assert it.cache.held_bytes == 0
    it.check()


def test_a_device_that_has_less_memory_than_the_bound_holds_what_it_has() -> None:
    clock = VirtualTime()
    it = rig(share=2.0, device=SimulatedDevice(clock=clock, memory_bytes=3000))
    it.clock = clock
    it.announce("a", range(10))
    it.elapse(1.0)
    assert 0 < it.cache.held_bytes <= 3000
    it.check()


def test_the_value_of_a_byte_rises_as_room_gets_scarce() -> None:
    def value(share: float) -> float:
        it = rig(share=share)
        for n in range(30):
            for number in range(10):
                if n % (number + 1) == 0:
                    it.cache.note([np.array([number])], 0, 0)
            it.elapse(1e-3)
        return it.cache.value_per_byte()

    values = [value(share) for share in (2.0, 0.4, 0.2)]
    assert 0 < values[0] < values[1] < values[2]
    assert rig().cache.value_per_byte() == 0.0


@settings(max_examples=40)
@given(data=st.data())
def test_pages_are_never_lost_nor_shared(data: st.DataObject) -> None:
    it = rig(share=data.draw(st.sampled_from([0.2, 1.0])))
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["announce", "withdraw", "note", "bound", "time"])):
            case "announce":
                some = sorted(data.draw(st.sets(st.integers(0, 9), min_size=1)))
                chances = np.array([data.draw(st.sampled_from([0.1, 0.5, 0.9])) for _ in some])
                key = data.draw(st.sampled_from("abc"))
                it.cache.announce(key, Prediction(np.array(some), chances, it.clock.now_s + 1e-3))
            case "withdraw":
                it.cache.announce(data.draw(st.sampled_from("abc")), None)
            case "note":
                it.cache.note([np.array(sorted(data.draw(st.sets(st.integers(0, 9), min_size=1))))], 0, 0)
            case "bound":
                it.cache.set_bound(int(it.bytes * data.draw(st.sampled_from([0.0, 0.3, 1.0, 1.7]))))
            case _:
                it.elapse(data.draw(st.sampled_from([0.0, 1e-5, 1e-2])))
        it.check()
        assert it.cache.bound_bytes >= it.cache.held_bytes or it.cache._flying


def test_a_simulated_device_repeats_with_its_seed() -> None:
    def run(seed: int) -> list[float]:
        clock = VirtualTime()
        it = rig(share=2.0, device=SimulatedDevice(clock=clock, jitter=0.5, seed=seed, ring_bytes=2000))
        it.clock = clock
        it.announce("a", range(10))
        out = []
        for _ in range(20):
            it.elapse(2e-5)
            out.append(float(len(it.cache.resident())))
        return [*out, it.device.bandwidth()]

    assert run(1) == run(1) != run(2)


class Broken(SimulatedDevice):
    def copy(self, pages: I64, codes: Codes, name: int) -> None:
        raise RuntimeError("the device is gone")


def test_a_link_that_fails_ends_the_cache_and_no_search() -> None:
    it = rig(share=2.0, device=Broken(), threads=True)
    it.announce("a", range(10))
    assert it.cache._thread is not None
    it.cache._thread.join(10)
    assert str(it.cache.failure) == "the device is gone"
    query = scattered(1, 2)
    assert rows(it.lists.search(query, [5], [10])[0]) == rows(it.plain.search(query, [5], [10])[0])
    it.cache.close()
