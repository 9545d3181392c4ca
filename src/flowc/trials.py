"""What a rewrite is worth in practice: now and then a program runs without it, and one that loses is switched off.

Every plan of a workflow gives the same answer, so which one a program runs is free to choose. After `WARM` programs
every `PERIOD`th is a trial: the same passes but for one. Where the medians differ by more than chance, and by more than
a margin that is wider for switching on than off (hysteresis), the winner becomes what the others run.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import sqrt
from statistics import median
from typing import Final

from flowc.passes.gain import Gain
from flowc.runtime.plan import Plan

WARM: Final = 16  # programs before the first trial
PERIOD: Final = 8  # programs from one trial to the next
LEAST: Final = 8  # measurements on each side before anything is decided
WINDOW: Final = 64  # measurements that are remembered
OFF, ON = 0.03, 0.06  # shares of the median that must be won
SIGMAS: Final = 3.5  # standard errors that a difference must have: it is looked at after every trial


@dataclass(frozen=True, slots=True)
class Trial:
    """One program's plan; `toggled` is the pass that differs from what the others run."""

    plan: Plan
    passes: frozenset[str]
    toggled: str | None = None


class Trials:
    """Chooses plans and learns from their times. Thread-safe.

    `plan_with(passes)` compiles the workflow with these of the `candidates` on; each set is compiled once.
    """

    def __init__(self, candidates: Iterable[str], plan_with: Callable[[frozenset[str]], Plan], plan: Plan) -> None:
        self.candidates = tuple(candidates)
        self.on = frozenset(self.candidates)
        self._plan_with = plan_with
        self._plans = {self.on: plan}
        self._lock = threading.Lock()
        self._programs = self._turn = 0
        self._main: deque[float] = deque(maxlen=WINDOW)
        self._toggled: dict[str, deque[float]] = {name: deque(maxlen=WINDOW) for name in self.candidates}

    @property
    def plan(self) -> Plan:
        """What programs run that are no trial."""
        return self._plans[self.on]

    def choose(self) -> Trial:
        """The plan of the next program."""
        with self._lock:
            self._programs += 1
            late = self._programs - WARM
            if late < 0 or late % PERIOD or not self.candidates:
                return Trial(self.plan, self.on)
            name = self.candidates[self._turn % len(self.candidates)]
            self._turn += 1
            passes = self.on ^ {name}
            plan = self._plans.get(passes)
            if plan is None:
                plan = self._plans[passes] = self._plan_with(passes)
            return Trial(plan, passes, name)

    def note(self, trial: Trial, seconds: float) -> None:
        """Takes the time of a program that ended without an error."""
        with self._lock:
            if trial.toggled is None:
                if trial.passes == self.on:
                    self._main.append(seconds)
                return
            if trial.passes ^ {trial.toggled} != self.on:
                return  # begun before the last switch
            times = self._toggled[trial.toggled]
            times.append(seconds)
            if min(len(times), len(self._main)) < LEAST:
                return
            gain, error = _difference(self._main, times)
            least = (OFF if trial.toggled in self.on else ON) * median(self._main)
            if gain > max(least, SIGMAS * error):
                self.on = trial.passes
                self._main = deque(times, maxlen=WINDOW)
                for other in self._toggled.values():
                    other.clear()

    def gains(self) -> dict[str, Gain]:
        """By pass what it was measured to save, where there are enough measurements; and those switched off."""
        with self._lock:
            found = {}
            for name, times in self._toggled.items():
                is_on = name in self.on
                if min(len(times), len(self._main)) >= LEAST:
                    slower, error = _difference(self._main, times)
                    found[name] = Gain(-slower if is_on else slower, error, len(times), is_on)
                elif not is_on:
                    found[name] = Gain(None, 0.0, len(times), is_on)
            return found


def _difference(ours: Iterable[float], theirs: Iterable[float]) -> tuple[float, float]:
    """How much less the median of `theirs` is, and the standard error of that, both in seconds."""
    a, b = list(ours), list(theirs)
    return median(a) - median(b), sqrt(_error(a) ** 2 + _error(b) ** 2)


def _error(values: list[float]) -> float:
    """The standard error of the median, from the median absolute deviation (normal consistency factors)."""
    middle = median(values)
    return 1.2533 * 1.4826 * median(abs(v - middle) for v in values) / sqrt(len(values))
