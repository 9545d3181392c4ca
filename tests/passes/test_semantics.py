"""A pass changes nothing that a run shows: values and which of them are one object, errors and their lines, effects.

Results run op by op in program order, and in random orders that data and effects allow.
"""

import random
from collections import Counter

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from flowc.ir.core import Graph
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify
from flowc.passes import CostModel, PassManager, parse_pipeline, pipeline
from flowc.passes.manager import PASSES, PIPELINES
from tests.passes.programs import Program, in_any_order, make, planned

seeds = st.integers(0, 2**32)


WILLING = CostModel(
    {
        "substage_s": 1e-9,
        "kv_block_tokens": 1.0,
        "waste": 0.0,
        "h2d_bytes_per_s": 1e10,
        "device_scan_bytes_per_s": 1e12,
        "probe_bytes": 1e8,
        "index_bytes": 1e10,
        "device_bytes": 1e9,
    }
)
"""With these costs every rewrite pays that may happen at all."""


def check(program: Program, passes: str, seed: int) -> Graph:
    before = program.run(program.graph)
    costs = WILLING if seed % 2 else CostModel()
    result = PassManager(parse_pipeline(passes), verify_each=True, costs=costs).run(program.graph).graph
    if "," not in passes:
        again = PassManager(parse_pipeline(passes), costs=costs).run(result).graph
        assert again == result, "a second time changes nothing"
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


def test_every_pass_finds_something_to_do() -> None:
    manager = PassManager(pipeline(3), costs=WILLING)
    runs = [manager.run(make(random.Random(seed), size=12).graph) for seed in range(200)]
    fired = Counter(name for run in runs for name in {r.pass_name for r in run.remarks if r.fired})
    assert min(fired[name] for name in PASSES) >= 5, fired


@pytest.mark.parametrize("name", PASSES)
@given(seed=seeds)
@settings(max_examples=30)
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
