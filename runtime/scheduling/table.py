"""The program table: what every running program has had, and the turns of its requests.

Lanes tell how long requests ran, engines that batch by themselves `charge` it step by step; the policy ranks, and
the table writes ranks into the requests' tickets, where lanes and engines read them. Calls come from drivers' threads
and lanes' threads; one lock guards it all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from ..protocols import Ticket
from .paths import PathModel
from .policies import Policy

if TYPE_CHECKING:
    from ..plan import Plan
    from ..program import Frame, Program

REFRESH = 0.5  # of the mean service: how old a waiting request's rank may be

tenant: ContextVar[str] = ContextVar("tenant", default="")
"""Whose programs those started in this context are."""


class Tenant:
    """What a tenant's programs have had, over its weight."""

    __slots__ = ("live", "name", "virtual_s", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.virtual_s = 0.0
        self.live: dict[Turn, None] = {}


class Entry:
    """One program. `path_s` is the longest chain of its requests' service so far, `service_s` their sum, `waited_s`
    what they waited; `unpaid_s` of that has not been made up for by a promotion.
    """

    __slots__ = (
        "arrived_s", "deadline_s", "guesses", "live", "model", "path_s", "program", "requests", "service_s", "table",
        "tenant", "turns", "unpaid_s", "waited_s",
    )  # fmt: skip

    def __init__(self, table: ProgramTable, program: Program, owner: Tenant, model: PathModel | None) -> None:
        self.table = table
        self.program = program.id
        self.tenant = owner
        self.model = model
        self.arrived_s = program.started_s
        self.deadline_s = program.deadline_s
        self.service_s = self.path_s = self.waited_s = self.unpaid_s = 0.0
        self.requests = 0
        self.live: dict[Turn, None] = {}
        self.turns: dict[int, int] = {}
        self.guesses: list[tuple[float, float]] = []

    @property
    def spread(self) -> float:
        """Standard deviation of the logarithm of (actual over predicted), at least a tenth."""
        error = self.model.error if self.model is not None else float("inf")
        return min(max(error, 0.1), 1.5)


class Turn(Ticket):
    """One request's ticket: when it came, how long it has been served, what its program is expected to need still."""

    __slots__ = (
        "began_s", "block", "charged_s", "entry", "index", "is_promoted", "queued_s", "ran_s", "remaining_s",
        "remaining_work_s",
    )  # fmt: skip

    def __init__(self, entry: Entry, frame: Frame, index: int, now_s: float) -> None:
        super().__init__(entry.program)
        self.entry = entry
        self.block = frame.block
        self.index = index
        self.queued_s = now_s
        self.began_s = entry.path_s  # the path before it
        self.charged_s = 0.0  # by an engine
        self.ran_s: float | None = None  # by the lane: the call that it was in
        self.remaining_s: float | None = None  # on the critical path; None where that cannot be told
        self.remaining_work_s = 0.0  # in all
        self.is_promoted = False

    @property
    def service_s(self) -> float:
        """Seconds in which a lane worked for it; whole only when its call has ended."""
        return self.charged_s or self.ran_s or 0.0

    def waiting_s(self, now_s: float) -> float:
        """Seconds since it came in which nothing worked for it."""
        return max(0.0, now_s - self.queued_s - self.service_s)

    def charge(self, seconds: float) -> None:
        self.entry.table.charge(self, seconds)

    def end(self, now_s: float) -> None:
        """The answer is there."""
        self.entry.table.end(self, now_s)

    def drop(self, now_s: float) -> None:
        """The request was cancelled."""
        self.entry.table.drop(self, now_s)


class ProgramTable:
    """Every program that has asked a lane for something and has not ended, under one policy.

    `weights` are tenants' shares under `fair`; one that is not named has 1.
    """

    def __init__(self, policy: Policy, weights: Mapping[str, float] | None = None) -> None:
        self.policy = policy
        self.mean_service_s = 0.0
        self._requests = 0
        self._weights = dict(weights or {})
        self._entries: dict[int, Entry] = {}
        self._tenants: dict[str, Tenant] = {}
        self._models: weakref.WeakKeyDictionary[Plan, PathModel] = weakref.WeakKeyDictionary()
        self._live: dict[Turn, None] = {}
        self._lock = threading.RLock()
        self._fresh_until_s = 0.0
        self.on_leave: Callable[[Entry], None] | None = None  # told of each program that has ended

    def __len__(self) -> int:
        """How many programs it holds."""
        return len(self._entries)

    def model(self, plan: Plan) -> PathModel:
        """What has been learned of a plan."""
        found = self._models.get(plan)
        if found is None:
            found = self._models[plan] = PathModel()
        return found

    def turn(self, program: Program, frame: Frame, index: int, now_s: float) -> Turn:
        """A ticket for a request that a program makes now at an instruction of a frame."""
        with self._lock:
            entry = self._entries.get(program.id)
            if entry is None:
                entry = self._entries[program.id] = self._enter(program)
            turn = Turn(entry, frame, index, now_s)
            entry.requests += 1
            model = entry.model
            if model is not None:
                left_s, work_s = model.remaining(frame, index, entry.turns)
                # The 1st, 2nd, 4th, 8th, ... are enough to judge it by, once there is something to go by.
                if entry.requests & (entry.requests - 1) == 0 and model.programs:
                    entry.guesses.append((entry.path_s, left_s))
                if model.is_good:
                    turn.remaining_s, turn.remaining_work_s = model.bias * left_s, work_s
            if self.policy.by_tenant:
                self._wake(entry.tenant)
                entry.tenant.live[turn] = None
            entry.live[turn] = self._live[turn] = None
            turn.priority = self.policy.rank(turn, now_s)
            self._refresh(now_s)
            return turn

    def _enter(self, program: Program) -> Entry:
        name = program.tenant
        owner = self._tenants.get(name)
        if owner is None:
            owner = self._tenants[name] = Tenant(name, self._weights.get(name, 1.0))
        return Entry(self, program, owner, self.model(program.plan) if self.policy.predicts else None)

    def _wake(self, owner: Tenant) -> None:
        if not owner.live:
            busy = [t.virtual_s for t in self._tenants.values() if t.live]
            owner.virtual_s = max(owner.virtual_s, min(busy, default=0.0))

    def charge(self, turn: Turn, seconds: float) -> None:
        """A request has run for so long and goes on."""
        with self._lock:
            if turn not in self._live:
                return
            turn.charged_s += seconds
            if self.policy.by_tenant:
                self._serve(turn.entry.tenant, seconds)
            else:
                turn.priority = self.policy.rank(turn, turn.queued_s + turn.service_s)

    def _serve(self, owner: Tenant, seconds: float) -> None:
        owner.virtual_s += seconds / owner.weight
        for other in owner.live:
            other.priority = owner.virtual_s

    def end(self, turn: Turn, now_s: float) -> None:
        """A request has its answer."""
        with self._lock:
            self._leave(turn, now_s)
            entry = turn.entry
            service_s = turn.service_s
            self._requests += 1
            self.mean_service_s += (service_s - self.mean_service_s) / min(self._requests, 1000)
            if entry.model is not None:
                entry.model.observe(turn.block, turn.index, service_s)
            self._refresh(now_s)

    def drop(self, turn: Turn, now_s: float) -> None:
        """A request was cancelled: what it had counts, but says nothing about its site."""
        with self._lock:
            self._leave(turn, now_s)

    def _leave(self, turn: Turn, now_s: float) -> None:
        if turn not in self._live:
            return
        entry = turn.entry
        del self._live[turn], entry.live[turn]
        service_s = turn.service_s
        if self.policy.by_tenant:
            del entry.tenant.live[turn]
            if not turn.charged_s:
                self._serve(entry.tenant, service_s)
        entry.service_s += service_s
        waited_s = turn.waiting_s(now_s)
        entry.waited_s += waited_s
        entry.unpaid_s = 0.0 if turn.is_promoted else entry.unpaid_s + waited_s
        entry.path_s = max(entry.path_s, turn.began_s + service_s)
        for other in entry.live:  # its siblings inherit what the program has had
            other.priority = self.policy.rank(other, now_s)

    def leave(self, program: Program) -> None:
        """A program has ended."""
        with self._lock:
            entry = self._entries.pop(program.id, None)
            if entry is None:
                return
            now_s = program.driver.now()
            for turn in list(entry.live):
                self._leave(turn, now_s)
            if self.on_leave is not None:
                self.on_leave(entry)
            if entry.model is not None and program.error is None:
                entry.model.ended(entry.turns, entry.guesses, entry.path_s)

    def _refresh(self, now_s: float) -> None:
        """Ranks everything anew if the ranks are old: waiting alone may promote, time alone may make late."""
        if now_s < self._fresh_until_s or self.policy.by_tenant:
            return
        self._fresh_until_s = now_s + max(1e-3, REFRESH * self.mean_service_s)
        rank = self.policy.rank
        for turn in self._live:
            turn.priority = rank(turn, now_s)
