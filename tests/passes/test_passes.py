"""What holds for every pass: its docstring is true, it is idempotent, it verifies, and `changed` is honest."""

import sys
from dataclasses import fields
from itertools import pairwise

import pytest
from hypothesis import given, settings

from flowc.ir.core import Graph
from flowc.ir.verifier import verify
from flowc.passes import CostModel, Pass, PassManager, parse_pipeline, pipeline
from flowc.passes.manager import PASSES, PIPELINES
from tests import flowfile
from tests.strategies import graphs

EVERY = [pytest.param(name, id=name) for name in PASSES]


@pytest.mark.parametrize("name", EVERY)
def test_the_docstring_is_true(name: str) -> None:
    doc = sys.modules[PASSES[name].__module__].__doc__
    assert doc is not None
    case = flowfile.from_docstring(doc, name)
    case.check()
    assert case.parse_before() != case.parse_after(), "an example in which something happens"
    for part in ("Source: ", "Legal when: ", "Pays when: "):
        assert f"\n{part}" in doc


@pytest.mark.parametrize("name", EVERY)
def test_options_have_defaults(name: str) -> None:
    step = PASSES[name]()
    assert all(getattr(step, f.name) == f.default for f in fields(step))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "passes", [*EVERY, *(pytest.param(text, id=f"-O{level}") for level, text in PIPELINES.items())]
)
@given(graph=graphs())
@settings(max_examples=25)
def test_every_graph(passes: str, graph: Graph) -> None:
    manager = PassManager(parse_pipeline(passes), verify_each=True)
    once = manager.run(graph)
    verify(once.graph)
    assert [s.changed for s in once.stages] == [
        a is not b for a, b in pairwise([graph, *(s.graph for s in once.stages)])
    ]
    before = graph
    for stage in once.stages:
        assert stage.changed == (stage.graph != before), stage.pass_name
        before = stage.graph
    if len(once.stages) == 1:
        again = manager.run(once.graph)
        assert again.graph == once.graph
        assert not any(s.changed for s in again.stages)
    once.explain()


def test_levels_share_what_they_can() -> None:
    names = {level: [step.name for step in pipeline(level)] for level in PIPELINES}
    assert names[0] == []
    assert set(names[1]) <= set(names[2]) <= set(names[3])
    assert "prune-edges" not in names[1]


def test_every_pass_is_a_pass() -> None:
    for name, cls in PASSES.items():
        assert issubclass(cls, Pass)
        assert cls.name == name
    assert CostModel().turn_s > 0
