"""What goes wrong in a simulation, and when: slow lanes, requests that fail, workers that are lost.

    slow:LANE:FACTOR[:FROM-TO]    calls of the lane take FACTOR times as long
    fail:LANE:SHARE[:FROM-TO]     that share of the lane's requests ends with an error
    lost:LANE[:FROM-TO]           one worker is gone: what it ran begins again on the others, when there are any

LANE is llm, search, embed, rerank or tool; times are virtual seconds, absent: from the beginning, for ever.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from flowc.ir.errors import ConfigError, RunError

__all__ = ["Fault", "Faults", "SimulatedFailure", "parse_fault"]

LANES = ("llm", "search", "embed", "rerank", "tool")


class SimulatedFailure(RunError):
    """A fault that the simulation was asked to inject."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong with a lane between two moments. `value`: the factor of "slow", the share of "fail"."""

    kind: str
    lane: str
    value: float = 1.0
    from_s: float = 0.0
    to_s: float = inf

    def holds(self, now_s: float) -> bool:
        return self.from_s <= now_s < self.to_s


def parse_fault(text: str) -> Fault:
    """The fault that a text such as `slow:search:4:10-20` means. ConfigError if it means none."""
    kind, *rest = text.split(":")
    counts = {"slow": (2, 3), "fail": (2, 3), "lost": (1, 2)}
    try:
        if kind not in counts or len(rest) not in counts[kind] or rest[0] not in LANES:
            raise ValueError
        lane = rest.pop(0)
        value = float(rest.pop(0)) if kind != "lost" else 1.0
        start, _, end = rest[0].partition("-") if rest else ("0", "", "")
        fault = Fault(kind, lane, value, float(start or 0.0), float(end) if end else inf)
        if not (value > 0.0 and fault.from_s < fault.to_s and (kind != "fail" or value <= 1.0)):
            raise ValueError
    except ValueError:
        forms = "slow:LANE:FACTOR[:FROM-TO], fail:LANE:SHARE[:FROM-TO] or lost:LANE[:FROM-TO]"
        raise ConfigError(f"{text!r} is no fault", hint=f"write {forms}; LANE is one of {', '.join(LANES)}") from None
    return fault


class Faults:
    """The faults of one lane, with a generator of their own, so that they are the same whatever else is drawn."""

    def __init__(self, faults: Sequence[Fault], lane: str, seed: int) -> None:
        mine = [fault for fault in faults if fault.lane == lane]
        self._slow = [f for f in mine if f.kind == "slow"]
        self._fail = [f for f in mine if f.kind == "fail"]
        self._lost = [f for f in mine if f.kind == "lost"]
        self._random = random.Random(f"{seed} {lane}")
        self.lane = lane
        self.changes = sorted({t for f in mine for t in (f.from_s, f.to_s) if 0.0 < t < inf})

    def factor(self, now_s: float) -> float:
        """How many times as long everything takes now."""
        product = 1.0
        for fault in self._slow:
            if fault.holds(now_s):
                product *= fault.value
        return product

    def failure(self, now_s: float) -> SimulatedFailure | None:
        """The error that a request which ends now has; drawn anew at each call."""
        for fault in self._fail:
            if fault.holds(now_s) and self._random.random() < fault.value:
                return SimulatedFailure(f"the simulated {self.lane} lane failed a request")
        return None

    def lost(self, now_s: float) -> int:
        """How many workers are gone now."""
        return sum(fault.holds(now_s) for fault in self._lost)
