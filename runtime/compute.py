"""One pool of tokens for the processor cores of this machine, which every lane that computes on them asks for its own.

A lane's work on the CPU is a chain of short steps (a group of lists, one token of a batch). Before each it takes as
many tokens as the step has threads, and gives them back after it. So no more threads compute than there are cores: a
scan and a decode that share cores in time slices both lose their caches and, where threads wait for each other by
spinning, the slices too. What waits is served in order of arrival, so that a step that wants all cores gets them once
those that run have ended, however many small ones come after it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType

__all__ = ["ComputeTokens", "cores", "processor"]


def cores() -> int:
    """How many cores this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS or Windows
        return os.cpu_count() or 1


class ComputeTokens:
    """`count` tokens, one a core. Safe to use from any thread; who holds some must not ask for more."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a pool needs at least one token, found {count}")
        self.count = count
        self._free = count
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def hold(self, count: int = 1) -> Held:
        """A context that has so many tokens (all of them, where there are fewer), and waits for them when entered."""
        return Held(self, max(1, min(count, self.count)))

    @property
    def free(self) -> int:
        """How many nobody holds."""
        return self._free

    def _take(self, count: int) -> None:
        with self._lock:
            if not self._waiting and count <= self._free:
                self._free -= count
                return
            turn = threading.Lock()
            turn.acquire()
            place = (count, turn)
            self._waiting.append(place)
        try:
            turn.acquire()
        except BaseException:  # Ctrl-C while it waits
            with self._lock:
                if place in self._waiting:
                    self._waiting.remove(place)
                else:
                    self._free += count
                self._serve()
            raise

    def _give(self, count: int) -> None:
        with self._lock:
            self._free += count
            if self._waiting:
                self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            count, turn = self._waiting.popleft()
            self._free -= count
            turn.release()


class Held:
    """Tokens for the length of a `with`."""

    __slots__ = ("_count", "_of")

    def __init__(self, of: ComputeTokens, count: int) -> None:
        self._of = of
        self._count = count

    def __enter__(self) -> None:
        self._of._take(self._count)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._of._give(self._count)


processor = ComputeTokens(cores())
"""The pool of this process."""
