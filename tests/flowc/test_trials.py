"""Rewrites are measured against runs without them, and one that loses is switched off; answers never change."""

import random
from collections.abc import Callable
from typing import Any, cast

import pytest

from flowc import workflow
from flowc.engine import default_engine
from flowc.runtime.plan import Plan
from flowc.trials import LEAST, PERIOD, WARM, Trials


def _trials(*names: str) -> tuple[Trials, list[frozenset[str]]]:
    made: list[frozenset[str]] = []

    def plan_with(on: frozenset[str]) -> Plan:
        made.append(on)
        return cast(Plan, on)  # the choice knows nothing of what a plan is

    return Trials(names, plan_with, cast(Plan, frozenset(names))), made


def _run(trials: Trials, seconds_of: Callable[[frozenset[str]], float], programs: int) -> None:
    for _ in range(programs):
        trial = trials.choose()
        assert cast(Any, trial.plan) == trial.passes
        trials.note(trial, seconds_of(trial.passes))


def _seconds(draw: random.Random, cost: float, noise: float) -> Callable[[frozenset[str]], float]:
    return lambda on: 1.0 + cost * len(on) + draw.uniform(0, noise)


def test_nothing_is_tried_before_it_is_warm_and_each_set_is_compiled_once() -> None:
    trials, made = _trials("a", "b")
    _run(trials, lambda on: 1.0, WARM - 1)
    assert not made
    _run(trials, lambda on: 1.0, 20 * PERIOD)
    assert sorted(map(sorted, made)) == [["a"], ["b"]]


def test_what_loses_is_switched_off_and_comes_back_when_it_wins() -> None:
    trials, _ = _trials("good", "bad")
    draw = random.Random(5)
    cost = {"good": -0.2, "bad": 0.1}

    def seconds(on: frozenset[str]) -> float:
        return 1.0 + sum(cost[name] for name in on) + draw.uniform(-0.02, 0.02)

    _run(trials, seconds, WARM + 4 * LEAST * PERIOD)
    assert trials.on == {"good"}
    gains = trials.gains()
    assert gains["good"].is_on
    assert gains["good"].seconds == pytest.approx(0.2, abs=0.03)
    assert not gains["bad"].is_on
    cost["bad"] = -0.2
    _run(trials, seconds, WARM + 8 * LEAST * PERIOD)
    assert trials.on == {"good", "bad"}


def test_a_difference_within_the_noise_or_the_margin_switches_nothing() -> None:
    draw = random.Random(3)
    for cost, noise in ((0.02, 0.0), (0.05, 1.0)):
        trials, _ = _trials("a")
        _run(trials, _seconds(draw, cost, noise), WARM + 12 * LEAST * PERIOD)
        assert trials.on == {"a"}, (cost, noise)


def test_programs_that_were_running_at_a_switch_do_not_count() -> None:
    trials, _ = _trials("a")
    for _ in range(WARM):
        trials.note(trials.choose(), 1.0)
    late = [trials.choose() for _ in range(3 * PERIOD)]
    _run(trials, lambda on: 1.0 if on else 0.5, 4 * LEAST * PERIOD)
    assert not trials.on
    before = trials.gains()["a"].runs
    for trial in late:
        trials.note(trial, 99.0)
    assert trials.gains()["a"].runs == before
    assert not trials.on


def test_answers_stay_and_the_remarks_show_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine over a real workflow, with a rewrite declared to be on trial and a clock that it slows down."""
    from flowc import engine as facade
    from flowc.passes.fuse_py import FusePy

    monkeypatch.setattr(FusePy, "on_trial", True)

    @workflow
    def count(n: int) -> int:
        a = n + 1
        b = a * 2
        return b - n

    plan = count.compile()
    executable = plan.executable((1,))
    trials = cast(Any, executable).trials
    assert trials.candidates == ("fuse-py",)
    ticks = iter(range(10**9))
    now = [0.0]

    def clock() -> float:
        # every run takes one tick between its two readings; ten while the rewrite is on
        if next(ticks) % 2:
            now[0] += 10.0 if last[0] else 1.0
        return now[0]

    last = [True]
    choose = trials.choose

    def seen() -> Any:
        trial = choose()
        last[0] = "fuse-py" in trial.passes
        return trial

    monkeypatch.setattr(trials, "choose", seen)
    monkeypatch.setattr(facade, "perf_counter", clock)
    for i in range(WARM + (LEAST + 1) * PERIOD):
        assert plan(i) == (i + 1) * 2 - i
    assert not trials.on
    assert "switched off" in plan.explain()
    assert list(plan.map(range(40))) == [(i + 1) * 2 - i for i in range(40)]
    assert default_engine().config.run.adapt
