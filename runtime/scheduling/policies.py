"""Who goes first: policies by name. A policy gives every waiting or running request a rank; the lowest goes first.

Ranks are read by all lanes. Where they tie, the order of arrival decides, so a policy that ranks in bands is first come
first served inside each. Service and waiting are both seconds: those in which a lane worked for a request, and those in
which it did not.

Sources: Luo et al., "Autellix: An Efficient Serving Engine for LLM Agents as General Programs", 2025, section 4 (MLFQ,
PLAS, ATLAS, bands, promotion); Schrage, "A Proof of the Optimality of the Shortest Remaining Processing Time
Discipline", 1968 (`remaining`); Goyal et al., "Start-Time Fair Queueing", 1996 (`fair`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from flowc.ir.errors import ConfigError

if TYPE_CHECKING:
    from .table import Turn

PROMOTED = -1.0  # before the first band
HOPELESS = 1e12  # after everything that can still be in time


class Policy:
    """What the program table asks. `rank` is pure; the table decides when it is asked again."""

    name: ClassVar[str]
    predicts: ClassVar[bool] = False  # does it use `Entry.remaining_s`?
    by_tenant: ClassVar[bool] = False  # does one program's service move the ranks of its tenant's others?

    def rank(self, turn: Turn, now_s: float) -> float:
        raise NotImplementedError


class FCFS(Policy):
    """First come, first served. A runtime needs no table for it; this one is for who wants the accounts kept."""

    name = "fcfs"

    def rank(self, turn: Turn, now_s: float) -> float:
        return 0.0


@dataclass(frozen=True, slots=True)
class Bands(Policy):
    """Queues 0, 1, 2, ... for requests whose service lies in [0, q), [q, g*q), [g*q, g*g*q), ...

    A request begins in the band of `attained`, and sinks as it runs: a band's width is its quantum. One that has waited
    `beta` times as long as it was served, its program's earlier requests counted, is promoted before all bands.
    """

    quantum_s: float | None = None  # None: the mean service of a request so far
    growth: float = 2.0
    beta: float = 20.0

    def attained(self, turn: Turn) -> float:
        """Seconds of service that the request stands for."""
        raise NotImplementedError

    def rank(self, turn: Turn, now_s: float) -> float:
        if turn.is_promoted or self.starves(turn, now_s):
            turn.is_promoted = True
            return PROMOTED
        return float(self.band(self.attained(turn), turn.entry.table.mean_service_s))

    def band(self, service_s: float, mean_s: float) -> int:
        quantum_s = self.quantum_s or mean_s or 1.0
        return 0 if service_s < quantum_s else 1 + int(math.log(service_s / quantum_s, self.growth))

    def starves(self, turn: Turn, now_s: float) -> bool:
        entry = turn.entry
        served_s = entry.service_s + turn.service_s
        return served_s > 0.0 and entry.unpaid_s + turn.waiting_s(now_s) >= self.beta * served_s


class MLFQ(Bands):
    """Multi-level feedback queues for single requests: each begins at the top, whatever its program has had."""

    name = "mlfq"

    def attained(self, turn: Turn) -> float:
        return turn.service_s


class PLAS(Bands):
    """Program-level attained service: the sum over the program's requests. For chains of calls."""

    name = "plas"

    def attained(self, turn: Turn) -> float:
        return turn.entry.service_s + turn.service_s


class ATLAS(Bands):
    """Attained service on the program's longest path so far. For programs whose requests run side by side."""

    name = "atlas"

    def attained(self, turn: Turn) -> float:
        return turn.entry.path_s + turn.service_s


class Remaining(ATLAS):
    """Least predicted remaining service first; ATLAS for plans that predict poorly.

    It is the service of all that is left, not only of the critical path: a wide program keeps others waiting by its
    width. The two mix in one queue: both are seconds, and for the heavy-tailed lengths that cannot be predicted the
    expected rest of a program grows with what it has had.
    """

    name = "remaining"
    predicts = True

    def rank(self, turn: Turn, now_s: float) -> float:
        if turn.is_promoted or self.starves(turn, now_s):
            turn.is_promoted = True
            return PROMOTED
        if turn.remaining_s is not None:
            return max(0.0, turn.remaining_work_s - turn.service_s)
        # In bands, or whoever runs would at once rank behind whoever waits, and they would swap at every step.
        mean_s = turn.entry.table.mean_service_s
        band = self.band(self.attained(turn), mean_s)
        return (self.quantum_s or mean_s) * self.growth ** (band - 1) if band else 0.0


class Deadline(Remaining):
    """Earliest deadline first among programs that are likely enough to make it; the hopeless after all others.

    The chance is that of a lognormal remaining time, spread as the plan's predictions have been, to fit into the time
    left. A program without a deadline stands as if it had `stretch` times its predicted length.
    """

    name = "deadline"
    least_chance: ClassVar[float] = 0.05
    stretch: ClassVar[float] = 10.0

    def rank(self, turn: Turn, now_s: float) -> float:
        entry = turn.entry
        left_s = turn.remaining_s
        if left_s is None:  # nothing is known but what it has had: expect as much again
            left_s = max(entry.path_s, entry.table.mean_service_s)
        left_s = max(0.0, left_s - turn.service_s)
        due_s = entry.deadline_s
        if due_s is None:
            return entry.arrived_s + self.stretch * (entry.path_s + turn.service_s + left_s)
        if self.chance(left_s, due_s - now_s, entry.spread) < self.least_chance:
            return HOPELESS + left_s
        return due_s

    @staticmethod
    def chance(left_s: float, time_s: float, spread: float) -> float:
        """How likely work of about `left_s` seconds fits into `time_s`; `spread` is the deviation of its logarithm."""
        if time_s <= 0.0:
            return 0.0
        if left_s <= 0.0:
            return 1.0
        return 0.5 * (1.0 + math.erf(math.log(time_s / left_s) / (spread * math.sqrt(2.0))))


class Fair(Policy):
    """Weighted fair shares: the tenant that has had the least service for its weight goes first.

    A tenant that comes back from being idle starts level with the least served of those that were not: what it did not
    ask for is not saved up.
    """

    name = "fair"
    by_tenant = True

    def rank(self, turn: Turn, now_s: float) -> float:
        return turn.entry.tenant.virtual_s


POLICIES: dict[str, type[Policy]] = {p.name: p for p in (FCFS, MLFQ, PLAS, ATLAS, Remaining, Deadline, Fair)}
NAMES = tuple(POLICIES)


def make_policy(name: str) -> Policy | None:
    """The policy of that name with its defaults; None for "fcfs", which needs none. ConfigError if there is none."""
    if name == "fcfs":
        return None
    if name not in POLICIES:
        raise ConfigError(f"there is no scheduling policy {name!r}", hint=f"it is one of {', '.join(NAMES)}")
    return POLICIES[name]()
