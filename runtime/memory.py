"""Who gets the memory: pools that compete by value, and transfers between host and device that compete for the link.

Everything held is worth what it saves at its next use: the milliseconds of recomputing or of searching on the slower
device, times the chance that it is used, over its bytes and over how far off that use is. KV blocks and index clusters
are worth the same in this currency, so a byte goes where the next one saves most, and the bound between the pools moves
until both margins are equal: the equimarginal rule. TeleRAG and HedraRAG fix that bound before the run, and KVFlow
knows one of the pools only.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import Protocol

__all__ = ["MemoryArbiter", "Pool", "Transfer", "TransferArbiter", "value_per_byte"]


def value_per_byte(saved_ms: float, size_bytes: int, next_use_s: float, probability: float = 1.0) -> float:
    """Expected milliseconds saved per byte and second of holding something until its next use.

    `saved_ms` is what its absence would cost then (KV: prefill or reload; cluster: scan on the CPU less that on the
    GPU). A use within a millisecond counts as one in a millisecond.
    """
    return probability * saved_ms / (max(1, size_bytes) * max(next_use_s, 1e-3))


class Pool(Protocol):
    """Memory of one kind, in `step_bytes`. It reports what its margin is worth and lives within its bound."""

    @property
    def name(self) -> str: ...

    @property
    def step_bytes(self) -> int:
        """The least by which its bound is worth moving."""
        ...

    @property
    def used_bytes(self) -> int: ...

    @property
    def least_bytes(self) -> int:
        """What it cannot go below now: what is pinned or in use."""
        ...

    def marginal_value(self) -> float:
        """Value per byte of what it would evict next: what its last bytes are worth."""
        ...

    def wanted_value(self) -> float:
        """Value per byte of what it would hold next, if it had room; 0 where it wants nothing more."""
        ...

    def set_bound(self, size_bytes: int) -> None:
        """How much it may hold from now on; it evicts down to it, or as far down as it can."""
        ...


class MemoryArbiter:
    """Divides `total_bytes` among pools, and moves the bounds between them a step at a time. Thread-safe.

    A step moves from the pool whose last bytes are worth least to the one whose next are worth most, if that is worth
    `hysteresis` times as much: moving costs transfers on both sides. Bounds always add up to at most the total.
    """

    def __init__(self, total_bytes: int, pools: Sequence[Pool], *, hysteresis: float = 1.25) -> None:
        if not pools or sum(pool.least_bytes for pool in pools) > total_bytes:
            raise ValueError(f"{total_bytes} bytes do not hold what the pools need at the least")
        self.total_bytes = total_bytes
        self.hysteresis = hysteresis
        self.pools = tuple(pools)
        self.moves = 0
        self._lock = threading.Lock()
        share = (total_bytes - sum(pool.least_bytes for pool in pools)) // len(pools)
        self.bounds = {pool.name: pool.least_bytes + share for pool in pools}
        for pool in self.pools:
            pool.set_bound(self.bounds[pool.name])

    def balance(self, most_steps: int = 16) -> int:
        """Moves bounds until no step pays, at most so many; gives how many it moved. Cheap enough for every tick."""
        with self._lock:
            for done in range(most_steps):
                if not self._step():
                    return done
            return most_steps

    def _step(self) -> bool:
        wanting = [(pool.wanted_value(), -i, pool) for i, pool in enumerate(self.pools) if self._is_full(pool)]
        if not wanting:
            return False
        wanted, _, taker = max(wanting)
        givers = [
            (pool.marginal_value() if self._is_full(pool) else 0.0, i, pool)
            for i, pool in enumerate(self.pools)
            if pool is not taker and self.bounds[pool.name] - taker.step_bytes >= pool.least_bytes
        ]
        if not givers:
            return False
        worth, _, giver = min(givers)
        if wanted <= worth * self.hysteresis or wanted <= 0.0:
            return False
        size = taker.step_bytes
        self.bounds[giver.name] -= size
        giver.set_bound(self.bounds[giver.name])  # first: for a moment less is promised than there is, never more
        self.bounds[taker.name] += size
        taker.set_bound(self.bounds[taker.name])
        self.moves += 1
        return True

    def _is_full(self, pool: Pool) -> bool:
        return self.bounds[pool.name] - pool.used_bytes < pool.step_bytes


@dataclass(slots=True, eq=False)
class Transfer:
    """Bytes that should be across by `due_s`. `start` begins the copy; whoever copies calls `done` on the arbiter."""

    key: Hashable
    size_bytes: int
    due_s: float
    start: Callable[[], None]
    value: float = 1.0  # per byte: of two due at one time the worthier goes first
    state: str = "waiting"  # then "flying", then "done" or "cancelled"
    number: int = 0

    def __lt__(self, other: Transfer) -> bool:
        return (self.due_s, -self.value, self.number) < (other.due_s, -other.value, other.number)


class TransferArbiter:
    """One queue for all traffic over a link: earliest deadline first, at most `most_bytes` in flight. Thread-safe.

    Little in flight is what makes a deadline mean something: what was handed to the copy engine cannot be overtaken.
    A transfer larger than the limit goes alone. `bytes_per_s` (measured as transfers end) says which ones would come
    too late to be worth starting: those are cancelled unsent when `drops_late` says so.
    """

    def __init__(
        self, most_bytes: int, now: Callable[[], float], *, bytes_per_s: float = 1e10, drops_late: bool = False
    ) -> None:
        self.most_bytes = most_bytes
        self.bytes_per_s = bytes_per_s
        self.in_flight_bytes = self.sent_bytes = self.late = self.dropped = 0
        self._now = now
        self._drops_late = drops_late
        self._waiting: list[Transfer] = []
        self._flying: dict[Transfer, float] = {}
        self._by_key: dict[Hashable, Transfer] = {}
        self._numbers = 0
        self._lock = threading.RLock()

    def submit(
        self, key: Hashable, size_bytes: int, due_s: float, start: Callable[[], None], value: float = 1.0
    ) -> Transfer:
        """Queues a copy, and starts it if it may. One already under way for the key is given instead; one that waits
        is hurried if it is due sooner now.
        """
        with self._lock:
            known = self._by_key.get(key)
            if known is not None:
                if known.state == "waiting" and due_s < known.due_s:
                    known.due_s = due_s
                    heapify(self._waiting)
                return known
            self._numbers += 1
            transfer = Transfer(key, size_bytes, due_s, start, value, number=self._numbers)
            self._by_key[key] = transfer
            heappush(self._waiting, transfer)
            starting = self._take()
        self._start(starting)
        return transfer

    def cancel(self, key: Hashable) -> bool:
        """Takes back a copy that nobody needs any more: True if it was still waiting. One in flight ends by itself."""
        with self._lock:
            transfer = self._by_key.get(key)
            if transfer is None or transfer.state != "waiting":
                return False
            self._drop(transfer)
            self._waiting.remove(transfer)
            heapify(self._waiting)
            return True

    def done(self, transfer: Transfer) -> None:
        """A copy has ended, well or not; the next ones start."""
        with self._lock:
            began_s = self._flying.pop(transfer, None)
            if began_s is None:
                return
            now_s = self._now()
            transfer.state = "done"
            self._by_key.pop(transfer.key, None)
            self.in_flight_bytes -= transfer.size_bytes
            self.sent_bytes += transfer.size_bytes
            self.late += now_s > transfer.due_s
            if now_s > began_s:
                measured = (transfer.size_bytes + self.in_flight_bytes) / (now_s - began_s)
                self.bytes_per_s += 0.1 * (measured - self.bytes_per_s)
            starting = self._take()
        self._start(starting)

    def _take(self) -> list[Transfer]:
        """Those that may fly now, marked as flying. Under the lock."""
        found: list[Transfer] = []
        while self._waiting:
            first = self._waiting[0]
            if self._drops_late and self._now() + first.size_bytes / self.bytes_per_s > first.due_s:
                self.dropped += 1
                self._drop(heappop(self._waiting))
                continue
            if self.in_flight_bytes and self.in_flight_bytes + first.size_bytes > self.most_bytes:
                break
            heappop(self._waiting)
            first.state = "flying"
            self._flying[first] = self._now()
            self.in_flight_bytes += first.size_bytes
            found.append(first)
        return found

    def _start(self, transfers: list[Transfer]) -> None:
        failures: list[BaseException] = []
        for transfer in transfers:
            try:
                transfer.start()
            except BaseException as error:
                failures.append(error)
                self.done(transfer)
        if failures:
            raise failures[0]

    def _drop(self, transfer: Transfer) -> None:
        transfer.state = "cancelled"
        del self._by_key[transfer.key]
