"""A pass changes nothing that a run shows: values and which of them are one object, errors and their lines, effects.

Results run op by op in program order, and in random orders that data and effects allow.
"""

import random

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from flowc.ir.core import Graph
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify
from flowc.passes import PassManager, parse_pipeline
from flowc.passes.manager import PASSES, PIPELINES
from tests.passes.programs import Program, in_any_order, make, planned

seeds = st.integers(0, 2**32)


def check(program: Program, passes: str, seed: int) -> Graph:
    before = program.run(program.graph)
    result = PassManager(parse_pipeline(passes), verify_each=True).run(program.graph).graph
    if "," not in passes:
        assert PassManager(parse_pipeline(passes)).run(result).graph == result, "a second time changes nothing"
    note(f"passes: {passes}\n{print_graph(program.graph)}\n{print_graph(result)}")
    assert program.run(result) == before
    assert program.run(result, in_any_order(random.Random(seed))) == before
    return result


def test_the_programs_are_worth_running() -> None:
    """They verify, print and parse; a fair share of them return, raise, write, and share objects."""
    returned = raised = wrote = 0
    for seed in range(200):
        program = make(random.Random(seed))
        verify(program.graph)
        assert parse_graph(print_graph(program.graph)) == program.graph
        shown = program.run(program.graph)
        assert shown == program.run(program.graph), "two runs show the same"
        returned += not shown.error
        raised += bool(shown.error)
        wrote += bool(shown.logged)
    assert min(returned, raised, wrote) >= 30, (returned, raised, wrote)


@pytest.mark.parametrize("name", PASSES)
@given(seed=seeds)
@settings(max_examples=60)
def test_each_pass(name: str, seed: int) -> None:
    check(make(random.Random(seed)), name, seed)


@pytest.mark.parametrize("level", PIPELINES)
@given(seed=seeds)
@settings(max_examples=100)
def test_each_level(level: int, seed: int) -> None:
    program = make(random.Random(seed), size=12)
    result = check(program, PIPELINES[level], seed)
    assert program.run(result, planned) == program.run(program.graph), "the runtime shows what the reference does"


@given(seed=seeds, order=st.lists(st.sampled_from(sorted(PASSES)), min_size=2, max_size=10))
@settings(max_examples=150)
def test_any_order_of_passes(seed: int, order: list[str]) -> None:
    check(make(random.Random(seed), size=10), ",".join(order), seed)
