"""A device that is not there: real bytes in pages of its own, behind a link and a scanner whose times are a model.

What it holds and finds is real: codes are copied, and scores come from its own pages by matrix products, whose last
bits differ from the canonical ones as a GPU's do. Only when things happen is made up: a transfer takes the latency and
its bytes over the bandwidth, one after another, each with a seeded jitter. Until a transfer is over its pages hold NaN,
so that a scan of a list that is not there yet cannot pass for a good one.

The clock is the real one, or a `VirtualTime` that moves when it is told to.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .devices import F32, I64, Codes, Layout

__all__ = ["Clock", "RealTime", "SimulatedDevice", "VirtualTime"]


class Clock(Protocol):
    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class RealTime:
    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


class VirtualTime:
    """A clock that stands still until someone sleeps, and then is there at once."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def now(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@dataclass(slots=True, eq=False)
class _Transfer:
    device: SimulatedDevice
    end_s: float
    pages: I64
    codes: Codes  # the staging memory: its own copy
    name: int
    landed: bool = False

    @property
    def done(self) -> bool:
        self.device.land()
        return self.landed


@dataclass(slots=True, eq=False)
class _Scan:
    device: SimulatedDevice
    end_s: float
    queries: F32
    pages: Sequence[I64]
    k: int

    def result(self) -> tuple[F32, I64]:
        # As late as may be: what happened to the pages meanwhile is seen.
        late = self.end_s - self.device.clock.now()
        if late > 0:
            self.device.clock.sleep(late)
        return self.device.compute(self.queries, self.pages, self.k)


@dataclass(slots=True, eq=False)
class SimulatedDevice:
    """A simulated device. Rates are in bytes a second; `jitter` is the largest share by which a time is longer."""

    memory_bytes: int = 8 << 30
    link_rate: float = 25e9
    latency_s: float = 10e-6
    scan_rate: float = 1e12
    launch_s: float = 20e-6
    ring_bytes: int = 16 << 20
    jitter: float = 0.0
    seed: int = 0
    clock: Clock = field(default_factory=RealTime)
    name: str = "simulated"
    max_k: int = 128
    copied_bytes: int = field(default=0, init=False)
    _random: random.Random = field(init=False)
    _layout: Layout = field(init=False)
    _codes: list[Codes] = field(default_factory=list, init=False)  # chunks of shape (pages, page, dim)
    _names: list[I64] = field(default_factory=list, init=False)  # (pages, page), -1 where there is no vector
    _flying: deque[_Transfer] = field(default_factory=deque, init=False)
    _link_free_s: float = field(default=0.0, init=False)
    _link_busy_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def now(self) -> float:
        return self.clock.now()

    def _longer(self, seconds: float) -> float:
        return seconds * (1 + self.jitter * self._random.random())

    # -------------------------------------------------------------------------------------------- memory
    def open(self, layout: Layout) -> None:
        self.close()
        self._layout = layout

    def resize(self, chunks: int) -> None:
        layout = self._layout
        if chunks * layout.chunk_bytes > self.memory_bytes:
            raise MemoryError(f"{chunks} chunks of {layout.chunk_bytes:,} bytes in {self.memory_bytes:,}")
        while len(self._codes) < chunks:
            shape = (layout.chunk, layout.page, layout.dim)
            self._codes.append(np.full(shape, np.nan, dtype=layout.dtype))
            self._names.append(np.full((layout.chunk, layout.page), -1, dtype=np.int64))
        del self._codes[chunks:], self._names[chunks:]

    def close(self) -> None:
        self._flying.clear()
        self._codes.clear()
        self._names.clear()

    # -------------------------------------------------------------------------------------------- transfers
    def copy(self, pages: I64, codes: Codes, name: int) -> _Transfer | None:
        self.land()
        size = codes.nbytes
        if self._flying and sum(t.codes.nbytes for t in self._flying) + size > self.ring_bytes:
            return None
        took = self._longer(self.latency_s + size / self.link_rate)
        self._link_free_s = max(self.now(), self._link_free_s) + took
        self._link_busy_s += took
        self.copied_bytes += size
        for page in pages.tolist():
            chunk, slot = divmod(page, self._layout.chunk)
            self._codes[chunk][slot] = np.nan
            self._names[chunk][slot] = -1
        transfer = _Transfer(self, self._link_free_s, pages.copy(), codes.copy(), name)
        self._flying.append(transfer)
        return transfer

    def land(self) -> None:
        """Puts into the pages what has arrived by now."""
        now, size = self.now(), self._layout.page
        while self._flying and self._flying[0].end_s <= now:
            transfer = self._flying.popleft()
            for at, page in enumerate(transfer.pages.tolist()):
                chunk, slot = divmod(page, self._layout.chunk)
                part = transfer.codes[at * size : (at + 1) * size]
                self._codes[chunk][slot, : len(part)] = part
                self._names[chunk][slot] = -1
                self._names[chunk][slot, : len(part)] = transfer.name + at * size + np.arange(len(part))
            transfer.landed = True

    def arrival_s(self) -> float | None:
        """When the next transfer ends; None where none is under way."""
        return self._flying[0].end_s if self._flying else None

    def bandwidth(self) -> float:
        return self.copied_bytes / self._link_busy_s if self._link_busy_s else self.link_rate

    def wait(self, most_s: float) -> None:
        end = self.arrival_s()
        self.clock.sleep(most_s if end is None else max(0.0, min(most_s, end - self.now())))

    def move(self, sources: I64, targets: I64) -> None:
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            (chunk, slot), (to, place) = divmod(source, self._layout.chunk), divmod(target, self._layout.chunk)
            self._codes[to][place] = self._codes[chunk][slot]
            self._names[to][place] = self._names[chunk][slot]

    # -------------------------------------------------------------------------------------------- scans
    def scan(self, queries: F32, pages: Sequence[I64], k: int) -> _Scan:
        read = sum(len(p) for p in pages) * self._layout.page_bytes
        took = self._longer(self.launch_s + read / self.scan_rate)
        return _Scan(self, self.now() + took, queries, pages, k)

    def compute(self, queries: F32, pages: Sequence[I64], k: int) -> tuple[F32, I64]:
        """What a scan finds, from the pages as they are now."""
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        names = np.full((len(queries), k), -1, dtype=np.int64)
        for row, mine in enumerate(pages):
            if not len(mine):
                continue
            places = [divmod(page, self._layout.chunk) for page in mine.tolist()]
            called = np.concatenate([self._names[chunk][slot] for chunk, slot in places])
            stored = np.concatenate([self._codes[chunk][slot] for chunk, slot in places])
            there = called >= 0
            if self._layout.is_l2:
                found = -np.square(stored[there].astype(np.float32) - queries[row]).sum(axis=1)
            else:
                found = stored[there].astype(np.float32) @ queries[row]
            called = called[there]
            order = np.argsort(-found, kind="stable")[:k]
            scores[row, : len(order)] = found[order]
            names[row, : len(order)] = called[order]
        return scores, names
