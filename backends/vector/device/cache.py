"""Which lists lie on the device: pages, demand, transfers, and a bound in bytes that may move at any time.

A list is absent, on its way, or resident; it is scanned on the device only once its transfer is over. What should be
resident is worked out anew whenever something changes: lists in order of the seconds they are expected to save per
byte, down to the bound. The expected uses of a list are its demand, an average over past searches that fades, plus the
probability with which each announced search will probe it. So a list whose prediction is withdrawn falls back to its
demand, its transfer is not started any more, and nobody cancels anything by hand.

Transfers go one by one through a staging memory of a few megabytes; what waits before it costs nothing to forget.
Lists give their pages back to the free ones, and what stays is not copied again (TeleRAG re-copies its whole pool to
close the gaps). Only where chunks of memory are given back do pages move, on the device.

Source: Lin et al., "TeleRAG", 2025, section 4 (lists on the GPU, hot ones kept); Hu et al., "HedraRAG", 2025,
section 4.4 (those most in demand, swapped beside the searches). Value per byte as in Cao and Irani, "Cost-Aware WWW
Proxy Caching Algorithms", 1997.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .devices import I64, Codes, Device, Layout, Transfer, name_of

__all__ = ["CacheStats", "ListCache", "ListSource", "Prediction"]

F64 = npt.NDArray[np.float64]

_ABSENT, _LOADING, _RESIDENT = 0, 1, 2
_HALF_LIFE = 32  # searches after which a list that nobody probes has half its demand
_BETTER = 1.2  # times the value of what it drives out that a list must have: two alike would take turns
_LEARN = 0.1  # weight of the newest measurement


class ListSource(Protocol):
    """The lists of one index, as they lie in the host's memory."""

    @property
    def dim(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[np.floating[Any]]: ...
    @property
    def is_l2(self) -> bool: ...
    @property
    def sizes(self) -> I64:
        """Vectors in each list."""
        ...

    def codes(self, number: int) -> Codes:
        """The codes of a list, of shape (vectors, dim)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """Lists that a search to come will probe, likeliest first, and the probability for each."""

    lists: I64
    chance: F64
    due_s: float  # when the search is expected, on the device's clock


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made.

    `wasted_bytes` were brought in and driven out unused; `withdrawn` lists were waiting and then not wanted any more.
    """

    hits: int = 0
    misses: int = 0
    hit_codes: int = 0
    missed_codes: int = 0
    copied_bytes: int = 0
    copied_lists: int = 0
    wasted_bytes: int = 0
    withdrawn: int = 0
    evicted: int = 0
    moved_pages: int = 0


class ListCache:
    """Lists of one index in the memory of one device. Safe to use from several threads.

    `pump` moves transfers on; a thread of the cache calls it, or, with `threads=False`, whoever drives the clock.
    """

    def __init__(
        self,
        device: Device,
        source: ListSource,
        bound_bytes: int,
        *,
        page: int = 64,
        chunks: int = 16,
        code_s: float = 20e-9,
        threads: bool = True,
    ) -> None:
        sizes = source.sizes
        largest = int(sizes.max(initial=0))
        layout = Layout(source.dim, source.dtype, page, 1, largest, source.is_l2)
        self.device = device
        self.source = source
        self.failure: Exception | None = None  # the device's error after which nothing was brought in any more
        self.code_s = code_s  # what the CPU takes to scan one vector; measured as searches run
        self.layout = replace(layout, chunk=max(1, bound_bytes // layout.page_bytes // chunks))
        self._pages_of: I64 = -(-sizes // page)
        self._lock = threading.RLock()
        self._state = np.zeros(len(sizes), dtype=np.uint8)
        self._pins = np.zeros(len(sizes), dtype=np.int32)
        self._demand = np.zeros(len(sizes), dtype=np.float64)
        self._uses = np.zeros(len(sizes), dtype=np.float64)  # expected, as `_plan` last weighed them
        self._unused = np.zeros(len(sizes), dtype=np.bool_)  # brought in and not probed since
        self._where: dict[int, I64] = {}  # list -> its pages
        self._free: list[int] = []
        self._chunks = 0
        self._limit = 0  # chunks that the bound allows
        self._flying: list[tuple[int, Transfer]] = []
        self._queue: list[int] = []  # next to be brought in last
        self._changed = False  # since `_plan`
        self._predictions: dict[Hashable, Prediction] = {}
        self._stats = dict.fromkeys(CacheStats.__slots__, 0)
        self._closed = False
        self._readers = 0  # scans under way
        self._idle = threading.Condition(self._lock)
        self._wake = threading.Event()
        device.open(self.layout)
        self.set_bound(bound_bytes)
        self._thread: threading.Thread | None = None
        if threads:
            self._thread = threading.Thread(target=self._work, name="flowc-list-cache", daemon=True)
            self._thread.start()

    # -------------------------------------------------------------------------------------------- what others see
    def stats(self) -> CacheStats:
        with self._lock:
            return CacheStats(**self._stats)

    @property
    def held_bytes(self) -> int:
        """The device's memory that is taken: whole chunks."""
        return self._chunks * self.layout.chunk_bytes

    @property
    def bound_bytes(self) -> int:
        """The bound, rounded down to whole chunks."""
        return self._limit * self.layout.chunk_bytes

    def resident(self) -> I64:
        """The lists that a search would find on the device now."""
        with self._lock:
            self._land()
            return np.flatnonzero(self._state == _RESIDENT)

    # -------------------------------------------------------------------------------------------- memory
    def set_bound(self, size_bytes: int) -> int:
        """The bytes still held after the bound was set to `size_bytes`.

        More memory is taken when there is something to put there. Less is given back at once, but for pages that a
        scan is reading or a transfer is filling: those follow when `pump` finds them free.
        """
        with self._lock:
            self._limit = max(0, size_bytes) // self.layout.chunk_bytes
            self._plan()
            self._shrink()
            self._wake.set()
            return self.held_bytes

    def value_per_byte(self) -> float:
        """Milliseconds that the least valuable resident byte is expected to save in the next search; 0 if none is.

        What a planner loses, to first order, by lowering the bound by one byte. While there is room left or nothing
        waits to come in, this is also what it would gain at most by raising it.
        """
        with self._lock:
            held = np.flatnonzero(self._state == _RESIDENT)
            if not len(held):
                return 0.0
            return float((self._uses[held] * self._worth(held)).min() * 1e3)

    def _worth(self, lists: I64) -> F64:
        """Seconds that one use of each list saves, per byte it takes."""
        codes = self.source.sizes[lists]
        taken = np.maximum(1, self._pages_of[lists]) * self.layout.page_bytes
        return np.asarray(codes * self.code_s / taken, dtype=np.float64)

    def _shrink(self) -> None:
        """Gives back what is above the bound, as far as nobody uses it."""
        while self._chunks > self._limit:
            last = (self._chunks - 1) * self.layout.chunk
            room = [page for page in self._free if page < last]
            here = [number for number, pages in self._where.items() if int(pages.max(initial=-1)) >= last]
            if any(self._pins[number] or self._state[number] == _LOADING for number in here):
                return
            spare = self._limit * self.layout.chunk  # pages there will be
            used = sum(len(pages) for pages in self._where.values())
            out = iter(sorted((n for n in self._where if self._is_loose(n)), key=self._density))
            while used > spare:  # drive out the least valuable, wherever they lie
                number = next(out, None)
                if number is None:
                    return
                used -= len(self._where[number])
                self._evict(number)
            room = sorted(page for page in self._free if page < last)
            moving = [(number, self._where[number]) for number in here if number in self._where]
            need = sum(int((pages >= last).sum()) for _, pages in moving)
            if need > len(room):  # others still hold the room below: their turn comes
                return
            sources: list[int] = []
            targets: list[int] = []
            for number, pages in moving:
                for at in np.flatnonzero(pages >= last).tolist():
                    sources.append(int(pages[at]))
                    targets.append(room.pop(0))
                    pages[at] = targets[-1]
                self._where[number] = pages
            if sources:
                self.device.move(np.array(sources), np.array(targets))
                self._stats["moved_pages"] += len(sources)
            taken = set(targets)
            self._free = [page for page in self._free if page < last and page not in taken]
            self._chunks -= 1
            self.device.resize(self._chunks)

    def _grow(self) -> bool:
        """Whether one more chunk could be taken."""
        if self._chunks >= self._limit:
            return False
        try:
            self.device.resize(self._chunks + 1)
        except MemoryError:
            self._limit = self._chunks  # the device has no more than this
            return False
        first = self._chunks * self.layout.chunk
        self._free += range(first + self.layout.chunk - 1, first - 1, -1)
        self._chunks += 1
        return True

    # -------------------------------------------------------------------------------------------- what to hold
    def announce(self, key: Hashable, prediction: Prediction | None) -> None:
        """Replaces what is predicted under the key; None takes it back."""
        with self._lock:
            old = self._predictions.pop(key, None)
            if prediction is not None:
                self._predictions[key] = prediction
            elif old is None:
                return
            self._changed = True
            self._wake.set()

    def _density(self, number: int) -> float:
        return float(self._uses[number] * self._worth(np.array([number]))[0])

    def _plan(self) -> None:
        """Works out what should be resident, and queues what is not.

        Lists are taken by value per byte until the bound is full. What is needed later counts for less, by how the time
        until then compares with the time in which the link could fill the whole cache: till then others may have the
        room. Demand is for the next search, which is the first announced one if there is any. A list that would arrive
        after its search only counts if to wait for it is still quicker than to scan it on the CPU: with a window w and
        a link of rate B, the first B * w bytes are free, and each further byte costs 1 / B.
        """
        self._changed, waited = False, self._queue
        rate, now = self.device.bandwidth(), self.device.now()
        refill_s = max(1e-6, self._limit * self.layout.chunk_bytes / rate)
        chance = np.zeros(len(self._state))
        due = np.full(len(self._state), math.inf)  # demand has no hurry
        first = min((prediction.due_s for prediction in self._predictions.values()), default=now)
        self._uses[:] = self._demand * refill_s / (refill_s + max(0.0, first - now))
        for prediction in self._predictions.values():
            ahead_s = max(0.0, prediction.due_s - now)
            chance[prediction.lists] += prediction.chance
            self._uses[prediction.lists] += prediction.chance * refill_s / (refill_s + ahead_s)
            due[prediction.lists] = np.minimum(due[prediction.lists], prediction.due_s)
        some = np.flatnonzero((self._uses > 1e-9) & (self._pages_of > 0))
        density = self._uses[some] * self._worth(some)
        order = np.argsort(-density, kind="stable")
        some, density = some[order], density[order]
        taken = np.cumsum(self._pages_of[some])
        fits = taken <= self._limit * self.layout.chunk
        some = some[fits]
        absent = some[self._state[some] == _ABSENT]
        copy_s = self._pages_of[absent] * self.layout.page_bytes / rate
        ahead = sum(int(self._pages_of[number]) for number, _ in self._flying) * self.layout.page_bytes / rate
        arrival = now + ahead + np.cumsum(copy_s)
        saved = chance[absent] * self.source.sizes[absent] * self.code_s
        wanted = (arrival <= due[absent]) | (saved > copy_s)
        self._queue = absent[wanted][::-1].tolist()
        left = set(waited).difference(self._queue)
        self._stats["withdrawn"] += sum(bool(self._state[number] == _ABSENT) for number in left)

    # -------------------------------------------------------------------------------------------- transfers
    def pump(self) -> None:
        """Takes note of transfers that ended, and starts as many as there is room for."""
        with self._lock:
            if self._closed:
                return
            self._land()
            if self._changed:
                self._plan()
            self._shrink()
            while self._queue:
                number = self._queue[-1]
                need = int(self._pages_of[number])
                if self._state[number] != _ABSENT:
                    self._queue.pop()
                    continue
                if not self._make_room(number, need):
                    self._queue.clear()  # the others are worth less
                    return
                pages = np.array(self._free[len(self._free) - need :], dtype=np.int64)
                codes = self.source.codes(number)
                transfer = self.device.copy(pages, codes, name_of(number))
                if transfer is None:
                    return  # the staging memory is full
                del self._free[len(self._free) - need :]
                self._queue.pop()
                self._where[number] = pages
                self._state[number] = _LOADING
                self._flying.append((number, transfer))
                self._stats["copied_bytes"] += codes.nbytes
                self._stats["copied_lists"] += 1

    def _land(self) -> None:
        if self._closed:
            return
        flying = []
        for number, transfer in self._flying:
            if transfer.done:
                self._state[number] = _RESIDENT
                self._unused[number] = True
            else:
                flying.append((number, transfer))
        self._flying = flying

    def _make_room(self, number: int, need: int) -> bool:
        """Whether `need` pages are free, after driving out what is worth less than this list."""
        while len(self._free) < need and self._grow():
            pass
        if len(self._free) >= need:
            return True
        loose = np.array([n for n in self._where if self._is_loose(n)], dtype=np.int64)
        if not len(loose):
            return False
        density = self._uses[loose] * self._worth(loose)
        cheap = np.argsort(density, kind="stable")
        cheap = cheap[density[cheap] * _BETTER < self._density(number)]
        held = np.cumsum([len(self._where[n]) for n in loose[cheap].tolist()])
        if not len(held) or len(self._free) + held[-1] < need:
            return False
        enough = int(np.searchsorted(held, need - len(self._free))) + 1
        for victim in loose[cheap[:enough]].tolist():
            self._evict(victim)
        return True

    def _is_loose(self, number: int) -> bool:
        return bool(self._state[number] == _RESIDENT and not self._pins[number])

    def _evict(self, number: int) -> None:
        pages = self._where.pop(number)
        self._free += pages.tolist()
        self._state[number] = _ABSENT
        self._stats["evicted"] += 1
        if self._unused[number]:
            self._unused[number] = False
            self._stats["wasted_bytes"] += int(self.source.sizes[number]) * self.layout.dim * self.layout.dtype.itemsize

    def _work(self) -> None:
        """The thread that moves transfers on."""
        while not self._closed:
            try:
                self.pump()
            except Exception as e:  # the device is of no use any more, and nothing needs it
                with self._lock:
                    self.failure, self._closed = e, True
                    self._state[:] = _ABSENT
                return
            with self._lock:
                flying = bool(self._flying)
            if flying:
                self.device.wait(0.001)
            else:
                self._wake.wait()
                self._wake.clear()

    # -------------------------------------------------------------------------------------------- use
    @contextlib.contextmanager
    def pinned(self, probed: Sequence[I64]) -> Iterator[Mapping[int, I64]]:
        """The pages of those lists of `probed` (an array a query) that are resident; they stay while this is open."""
        with self._lock:
            self._land()
            wanted = np.unique(np.concatenate(probed)) if len(probed) else np.empty(0, dtype=np.int64)
            held = wanted[self._state[wanted] == _RESIDENT]
            self._pins[held] += 1
            pages = {number: self._where[number] for number in held.tolist()}
            self._readers += 1
        try:
            yield pages
        finally:
            with self._lock:
                self._readers -= 1
                self._pins[held] -= 1
                if self._chunks > self._limit:
                    self._wake.set()
                self._idle.notify_all()

    def note(self, probed: Sequence[I64], hits: int, hit_codes: int) -> None:
        """Takes in which lists were probed, an array a search, and how many visits to lists found them here."""
        with self._lock:
            every = np.concatenate(probed)
            fade = 0.5 ** (1 / _HALF_LIFE)
            self._demand *= fade ** len(probed)
            np.add.at(self._demand, every, 1 - fade)
            self._unused[every] = False
            codes = int(self.source.sizes[every].sum())
            for name, value in (
                ("hits", hits),
                ("misses", len(every) - hits),
                ("hit_codes", hit_codes),
                ("missed_codes", codes - hit_codes),
            ):
                self._stats[name] += value
            self._changed = True
            self._wake.set()

    def learn(self, codes: int, seconds: float) -> None:
        """Takes in how long the CPU took to scan so many vectors."""
        if codes:
            self.code_s += _LEARN * (seconds / codes - self.code_s)

    def close(self) -> None:
        """Gives the device's memory back once no scan is under way; from now on every list is absent."""
        with self._lock:
            self._closed = True
            self._queue = []
            self._state[:] = _ABSENT
            self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        with self._idle:
            self._idle.wait_for(lambda: not self._readers)
            if self._chunks:
                self._where.clear()
                self._flying.clear()
                self._chunks = 0
                self.device.close()
