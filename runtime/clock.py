"""A seeded event loop whose clock jumps: a second is over at once, and all comes in the order of a real clock.

    loop = VirtualLoop(seed=7)
    value = loop.run(runtime.run_async(plan, args))
    assert loop.time() == 1.25        # seconds that would have passed

Only what is timed by the loop is virtual. Threads are not: while one works, the clock stands still until it answers, if
it has announced itself with `loop.real_work()`.
"""

from __future__ import annotations

import asyncio
import random
import selectors
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

STUCK_S = 10.0
"""Real seconds without any event and without any timer after which a virtual loop says that its program is stuck."""


class StuckError(RuntimeError):
    """Everything waits, and neither a timer nor a thread is left that could wake it."""


class _JumpingSelector(selectors.BaseSelector):
    """Where a selector would sleep until the next timer, it moves the loop's clock there instead."""

    def __init__(self) -> None:
        self._real = selectors.DefaultSelector()
        self.now_s = 0.0
        self.busy = 0  # threads that may still answer

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = self._real.select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None or self.busy:
            events = self._real.select(STUCK_S)
            if not events:
                raise StuckError("nothing is left that could wake the program")
            return events
        self.now_s += timeout
        return events

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._real.modify(fileobj, events, data)

    def get_key(self, fileobj: Any) -> selectors.SelectorKey:
        return self._real.get_key(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        found = self._real.get_map()
        return {} if found is None else found

    def close(self) -> None:
        self._real.close()


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in virtual time. `random` is its own generator: latencies drawn from it repeat with the seed."""

    def __init__(self, seed: int = 0) -> None:
        self._jumping = _JumpingSelector()
        self.random = random.Random(seed)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    async def some_time(self, most_s: float = 1.0) -> float:
        """Sleeps for a random time of at most `most_s`; gives it."""
        delay_s = self.random.random() * most_s
        await asyncio.sleep(delay_s)
        return delay_s

    @contextmanager
    def real_work(self) -> Iterator[None]:
        """While it is open the clock waits for a thread."""
        self._jumping.busy += 1
        try:
            yield
        finally:
            self._jumping.busy -= 1

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's value; tasks that it leaves behind are cancelled, and the loop is closed."""
        try:
            return self.run_until_complete(coroutine)
        finally:
            left = asyncio.all_tasks(self)
            for task in left:
                task.cancel()
            if left:
                self.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            self.run_until_complete(self.shutdown_asyncgens())
            self.close()
