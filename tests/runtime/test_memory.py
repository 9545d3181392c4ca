"""The arbiters over simulated pools and a simulated link."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc.runtime.memory import MemoryArbiter, Transfer, TransferArbiter, value_per_byte

STEP = 10


@dataclass
class Shelf:
    """A pool of things of one step each, with their values; it holds the best that fit."""

    name: str
    values: list[float]
    pinned: int = 0
    step_bytes: int = STEP
    bound: int = 0
    history: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values.sort(reverse=True)

    @property
    def held(self) -> int:
        return min(len(self.values), max(self.bound, self.pinned) // STEP)

    @property
    def used_bytes(self) -> int:
        return self.held * STEP

    @property
    def least_bytes(self) -> int:
        return self.pinned

    def marginal_value(self) -> float:
        return self.values[self.held - 1] if self.held else 0.0

    def wanted_value(self) -> float:
        return self.values[self.held] if self.held < len(self.values) else 0.0

    def set_bound(self, size_bytes: int) -> None:
        self.bound = size_bytes
        self.history.append(size_bytes)


VALUES = st.lists(st.floats(0.01, 100.0), max_size=30)


@given(VALUES, VALUES, VALUES)
def test_the_division_is_the_best_there_is(a: list[float], b: list[float], c: list[float]) -> None:
    """Without hysteresis what is held is worth as much as the best of all things together."""
    shelves = [Shelf("kv", a), Shelf("clusters", b), Shelf("embeddings", c)]
    arbiter = MemoryArbiter(20 * STEP, shelves, hysteresis=1.0)
    arbiter.balance(1000)
    best = sum(heapq.nlargest(20 - 2, a + b + c))  # what cannot be divided by three may lie idle
    assert sum(sum(s.values[: s.held]) for s in shelves) >= best - 1e-9
    assert sum(arbiter.bounds.values()) <= 20 * STEP
    assert arbiter.balance(1000) == 0, "and stays as it is"


@given(st.integers(0, 2**32))
def test_bounds_hold_while_values_change(seed: int) -> None:
    draw = random.Random(seed)
    shelves = [Shelf(str(i), [draw.random() for _ in range(20)], pinned=draw.randrange(4) * STEP) for i in range(3)]
    arbiter = MemoryArbiter(25 * STEP, shelves)
    for _ in range(50):
        shelf = draw.choice(shelves)
        shelf.values = sorted((draw.random() for _ in range(draw.randrange(25))), reverse=True)
        arbiter.balance(draw.randrange(5))
        assert sum(arbiter.bounds.values()) <= 25 * STEP
        assert all(arbiter.bounds[s.name] >= s.least_bytes for s in shelves)
        assert all(s.bound == arbiter.bounds[s.name] for s in shelves)


def test_small_differences_move_nothing() -> None:
    shelves = [Shelf("a", [1.0] * 20), Shelf("b", [1.1] * 20)]
    assert MemoryArbiter(20 * STEP, shelves).balance() == 0
    shelves = [Shelf("a", [1.0] * 20), Shelf("b", [2.0] * 20)]
    assert MemoryArbiter(20 * STEP, shelves).balance(100) == 10


def test_pools_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not hold"):
        MemoryArbiter(STEP, [Shelf("a", [], pinned=2 * STEP)])


def test_one_currency() -> None:
    """A KV block of 2 MB that saves 20 ms in 1 s against a cluster of 16 MB that saves 40 ms in 0.1 s at 0.5."""
    assert value_per_byte(20, 2 << 20, 1.0) < value_per_byte(40, 16 << 20, 0.1, 0.5)
    assert value_per_byte(20, 2 << 20, 0.0) == value_per_byte(20, 2 << 20, 1e-3)


class Link:
    """Copies one thing after another at 1 byte a second, in a time of its own."""

    def __init__(self, most_bytes: int, drops_late: bool = False) -> None:
        self.now_s = 0.0
        self.order: list[str] = []
        self.flying: list[Transfer] = []
        self.most_seen = 0
        self.arbiter = TransferArbiter(most_bytes, lambda: self.now_s, bytes_per_s=1.0, drops_late=drops_late)

    def send(self, key: str, size: int, due_s: float) -> Transfer:
        def start() -> None:
            self.order.append(key)
            self.most_seen = max(self.most_seen, self.arbiter.in_flight_bytes)

        return self.arbiter.submit(key, size, due_s, start)

    def finish_one(self) -> None:
        flying = next(iter(self.arbiter._flying))
        self.now_s += flying.size_bytes
        self.arbiter.done(flying)


@given(st.lists(st.tuples(st.integers(1, 8), st.integers(0, 50), st.booleans()), max_size=25))
def test_transfers_go_by_deadline_within_the_limit(wanted: list[tuple[int, int, bool]]) -> None:
    link = Link(8)
    sent: dict[str, int] = {}
    cancelled: set[str] = set()
    for i, (size, due, cancels) in enumerate(wanted):
        key = f"t{i}"
        sent[key] = due
        link.send(key, size, due)
        if cancels and link.arbiter.cancel(key):
            cancelled.add(key)
    begun = len(link.order)
    while link.arbiter._flying:
        link.finish_one()
    assert link.most_seen <= 8
    assert link.arbiter.in_flight_bytes == 0
    assert set(link.order) == sent.keys() - cancelled
    later = [sent[key] for key in link.order[begun:]]
    assert later == sorted(later), "all that waited went earliest deadline first"
    assert link.arbiter.sent_bytes == sum(wanted[int(k[1:])][0] for k in link.order)


def test_the_same_thing_is_sent_once_and_hurried() -> None:
    link = Link(4)
    link.send("busy", 4, 1)
    link.send("far", 4, 50)
    slow = link.send("same", 4, 100)
    assert link.send("same", 4, 10) is slow
    link.finish_one()
    assert link.order == ["busy", "same"]
    assert not link.arbiter.cancel("same"), "it flies already"
    assert link.arbiter.cancel("far")
    assert not link.arbiter.cancel("far")


def test_what_would_come_too_late_is_not_sent() -> None:
    link = Link(4, drops_late=True)
    link.send("busy", 4, 10)
    late = link.send("late", 4, 5)
    link.send("in time", 4, 20)
    link.finish_one()
    assert link.order == ["busy", "in time"]
    assert late.state == "cancelled"
    assert link.arbiter.dropped == 1


def test_a_copy_that_fails_to_start_holds_nothing() -> None:
    arbiter = TransferArbiter(4, lambda: 0.0)

    def start() -> None:
        raise OSError("no device")

    with pytest.raises(OSError, match="no device"):
        arbiter.submit("x", 4, 1.0, start)
    assert arbiter.in_flight_bytes == 0
