"""Compiled equals eager: random workflows, every way of running them, values, errors and effects alike.

FLOWC_SEED=n FLOWC_PROGRAMS=m repeats or lengthens a run. A failure prints its seed, the source and the IR;
`python -m tests.differential SEED 1 --all --reduce` shows a smaller program with the same failure.
"""

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowc.dsl import host as host_module
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.runtime.engine import Runtime

from . import program_world as world
from .differential import Loaded, differences, direct_host
from .programs import generate

FIRST = int(os.environ.get("FLOWC_SEED", "1"))
PROGRAMS = int(os.environ.get("FLOWC_PROGRAMS", "2000"))
CHUNK = 50


def check(seed: int, runtime: Runtime, rng: random.Random, size: int | None = None) -> bool:
    """Whether the program could be compared; the test fails where a compiled run differs."""
    program = generate(rng, size)
    for found in differences(program, runtime, random.Random(seed)):
        if found.how.startswith("capture: error["):
            return False
        pytest.fail(f"seed {seed}: {found}\n{program.source}", pytrace=False)
    return True


@pytest.mark.parametrize("first", range(FIRST, FIRST + PROGRAMS, CHUNK))
def test_compiled_equals_eager(first: int) -> None:
    seeds = range(first, min(first + CHUNK, FIRST + PROGRAMS))
    with direct_host(), Runtime(world.Backends()) as runtime:
        captured = sum(check(seed, runtime, random.Random(seed)) for seed in seeds)
    assert captured >= 0.9 * len(seeds), f"seeds {seeds}: only {captured} programs were captured"


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # new programs are for soaks: FLOWC_SEED and FLOWC_PROGRAMS
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.randoms(use_true_random=False), st.integers(5, 40))
def test_compiled_equals_eager_shrinking(rng: random.Random, size: int) -> None:
    """The same with draws that hypothesis makes, so that it can shrink a program that fails."""
    with direct_host(), Runtime(world.Backends()) as runtime:
        check(0, runtime, rng, size)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)
@given(st.randoms(use_true_random=False), st.integers(5, 40))
def test_captured_graphs_print_and_parse(rng: random.Random, size: int) -> None:
    loaded = Loaded(generate(rng, size))
    try:
        graph = loaded.module.main.graph()
        assert parse_graph(print_graph(graph)) == graph
    finally:
        loaded.close()


def test_the_direct_host_is_put_back() -> None:
    before = host_module._factory
    with direct_host():
        assert host_module._factory is world.DirectHost
    assert host_module._factory is before
