"""How many programs may run at once, altogether and for each tenant, and how many may wait for that.

Beyond the limit a program waits in order of arrival, past tenants that are at their own limit; beyond the queue's limit
it is refused with `AdmissionError`, so that whoever sends programs learns that it sends too many. A program that
another one started (from a tool) is let in at once: the other holds a place and waits for it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from contextvars import ContextVar

from flowc.ir.errors import AdmissionError, ClosedError

inside: ContextVar[bool] = ContextVar("inside", default=False)
"""Does this context belong to an admitted program?"""


class Place:
    """One program's place, held or waited for."""

    __slots__ = ("call", "is_held", "tenant")

    def __init__(self, tenant: str, call: Callable[[], None]) -> None:
        self.tenant = tenant
        self.call = call
        self.is_held = False


class Gate:
    """Thread-safe. `most` programs at a time; `tenants` gives single tenants less, "" all that are not named."""

    def __init__(
        self, most: int | None = None, queued: int | None = None, tenants: Mapping[str, int] | None = None
    ) -> None:
        named = [(f"the limit of tenant {t!r}", n) for t, n in (tenants or {}).items()]
        for what, n in [("max_programs", most), *named]:
            if n is not None and n < 1:
                raise ValueError(f"{what} must be at least 1, not {n}")
        self.most = most
        self.queued = queued
        self._limits = dict(tenants or {})
        self._held: dict[str, int] = {}
        self._total = 0
        self._waiting: deque[Place] = deque()
        self._is_closed = False
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def held(self) -> int:
        return self._total

    def enter(self, tenant: str, call: Callable[[], None], *, is_patient: bool = False) -> Place:
        """A place; if it is not held yet, `call` is made once it is, or never will be, by the thread of whoever left.

        Raises AdmissionError where as many wait as may; who `is_patient` waits for nobody else to come and always may.
        """
        place = Place(tenant, call)
        with self._lock:
            if self._is_closed:
                raise closed()
            if self._has_room(tenant):  # then nobody who waits could come in instead
                self._take(place)
            elif not is_patient and self.queued is not None and len(self._waiting) >= self.queued:
                raise AdmissionError(
                    f"{self._total} programs run and {len(self._waiting)} wait: no more are taken",
                    hint="send them later, or raise max_programs or max_queued",
                )
            else:
                self._waiting.append(place)
        return place

    def leave(self, place: Place) -> None:
        """Gives a place back, or stops waiting for it; the next ones that may are let in."""
        admitted: list[Place] = []
        with self._lock:
            if place.is_held:
                place.is_held = False
                self._total -= 1
                left = self._held[place.tenant] - 1
                if left:
                    self._held[place.tenant] = left
                else:
                    del self._held[place.tenant]
            elif place in self._waiting:
                self._waiting.remove(place)
            i = 0
            while i < len(self._waiting) and (self.most is None or self._total < self.most):
                if self._has_room(self._waiting[i].tenant):
                    self._take(self._waiting[i])
                    admitted.append(self._waiting[i])
                    del self._waiting[i]
                else:
                    i += 1
        for one in admitted:
            one.call()

    def close(self) -> None:
        """Lets nobody in any more; who waits is called and holds nothing."""
        with self._lock:
            self._is_closed = True
            waiting, self._waiting = self._waiting, deque()
        for place in waiting:
            place.call()

    def _has_room(self, tenant: str) -> bool:
        if self.most is not None and self._total >= self.most:
            return False
        limit = self._limits.get(tenant, self._limits.get(""))
        return limit is None or self._held.get(tenant, 0) < limit

    def _take(self, place: Place) -> None:
        place.is_held = True
        self._total += 1
        self._held[place.tenant] = self._held.get(place.tenant, 0) + 1


def closed() -> ClosedError:
    return ClosedError("the runtime is closed", hint="start programs before it is closed, or make a new one")
