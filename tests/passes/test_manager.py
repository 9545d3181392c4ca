"""The pass manager: pipelines as text, stages, remarks, reproducers, and what `explain` says."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from flowc.ir.core import Graph, Op, Region
from flowc.ir.errors import PassError
from flowc.ir.parser import parse_graph
from flowc.passes import CostModel, Outcome, Pass, PassManager, parse_pipeline, pipeline
from flowc.passes.facts import Facts, predicted_s
from flowc.passes.gain import show_s
from flowc.passes.manager import PASSES

TEXT = """
workflow @answer(%q: text, %xs: list<text>) -> text loc("app/qa.py":3) seq {
  %a = search @pydocs (%q) {k = 2} : docs        loc(4:9-30)
  %b = search @pydocs (%q) {k = 2} : docs        loc(5:9-30)
  %c = generate @llm (%q) {max_tokens = 10, temperature = 0.5} : text loc(6)
  %n = foreach (%xs, %q) : text loc(7) body (%x: text, %t: text) seq {
    %g = generate @llm (%x) {max_tokens = 10} : text
    yield %g
  }
  %p = template "{}{}{}{}" (%a, %b, %c, %n) : text
  return %p
}
"""


@dataclass(frozen=True, slots=True)
class Breaks(Pass):
    """Leaves a graph in which a value is used and defined nowhere, or raises."""

    name: ClassVar[str] = "breaks"
    by_raising: bool = False
    words: str = "some"

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        if self.by_raising:
            raise RuntimeError("out of luck\nand so on")
        return Outcome(graph.with_body(Region(graph.params, graph.body.ops[1:], graph.body.yields)))


# -- pipelines as text


def test_a_pipeline_is_read() -> None:
    steps = parse_pipeline(" cse , dce,fold{max_slots=3} ,prune-edges{ min_gain_s = 1e-3 }, licm{}")
    assert [s.name for s in steps] == ["cse", "dce", "fold", "prune-edges", "licm"]
    assert steps[2] == PASSES["fold"](max_slots=3)  # type: ignore[call-arg]
    assert steps[3] == PASSES["prune-edges"](min_gain_s=1e-3)  # type: ignore[call-arg]
    assert parse_pipeline("") == parse_pipeline("  \n ") == []


@pytest.mark.parametrize(
    ("text", "code", "place", "message"),
    [
        (
            "cse,dcee",
            "F040",
            "1:5",
            "there is no pass `dcee`\n.*\n.*\n.*dcee\n.*     \\^\\^\\^\\^\nhint: did you mean `dce`?",
        ),
        ("cse,\nbogus", "F040", "2:1", "there is no pass `bogus`(.|\n)*hint: passes are inline, fold, cse"),
        ("cse,,dce", "F041", "1:5", "expected the name of a pass"),
        ("cse,", "F041", "1:4", "expected the name of a pass after the comma"),
        ("fold{max_slot=3}", "F041", "1:6", "pass `fold` has no option `max_slot`(.|\n)*did you mean `max_slots`?"),
        ("cse{x=3}", "F041", "1:5", "pass `cse` has no option `x`(.|\n)*`cse` has no options"),
        ("fold{max_slots=many}", "F041", "1:16", "option `max_slots` of `fold` takes a whole number, not `many`"),
        (
            "licm{min_gain_s=x}",
            "F041",
            "1:17",
            "takes a number, not `x`(.|\n)*hint: options of `licm`: `min_gain_s=0.0`",
        ),
        ("fold{max_slots=1,max_slots=2}", "F041", "1:18", "option `max_slots` is given twice"),
        ("fold{max_slots}", "F041", "1:6", "expected `name=value`"),
        ("fold{max_slots=1", "F041", "1:5", "this `{` is not closed"),
        ("fold{", "F041", "1:5", "this `{` is not closed"),
        ("fold{max_slots=1} cse", "F041", "1:19", "expected a comma after `fold`"),
        ("fold}", "F041", "1:5", "expected a comma after `fold`"),
    ],
)
def test_a_pipeline_that_is_wrong(text: str, code: str, place: str, message: str) -> None:
    with pytest.raises(PassError) as caught:
        parse_pipeline(text)
    shown = str(caught.value)
    assert shown.startswith(f"error[{code}]: ")
    assert f"--> <pipeline>:{place}\n" in shown
    assert re.search(message, shown), shown


def test_an_unknown_level() -> None:
    with pytest.raises(PassError, match=r"there is no optimisation level 7(.|\n)*0, 1, 2, 3"):
        pipeline(7)


# -- running


def test_stages_and_remarks() -> None:
    graph = parse_graph(TEXT)
    found = PassManager(parse_pipeline("dce,cse,prune-edges"), verify_each=True).run(graph)
    assert found.captured is graph
    assert found.graph is found.stages[-1].graph
    assert [(s.pass_name, s.changed) for s in found.stages] == [("dce", False), ("cse", True), ("prune-edges", True)]
    assert all(s.seconds >= 0 for s in found.stages)
    by_pass = {name: [r for r in found.remarks if r.pass_name == name] for name in ("dce", "cse", "prune-edges")}
    assert by_pass["dce"] == []
    (repeat,) = by_pass["cse"]
    assert (repeat.op, str(repeat.loc), repeat.fired, repeat.verdict.is_legal) == (
        "%b = search @pydocs",
        "app/qa.py:5:9",
        True,
        True,
    )
    loop = next(r for r in by_pass["prune-edges"] if r.op == "%n = foreach")
    assert (loop.fired, loop.verdict.is_legal, loop.gain_s) == (False, False, 0)
    assert loop.verdict.why == "each item needs `n` from the one before it"


def test_no_passes() -> None:
    graph = parse_graph(TEXT)
    found = PassManager(pipeline(0), level=0).run(graph)
    assert found.graph is graph
    assert "runs as written" in found.explain()


def test_explain_says_what_and_why_and_where() -> None:
    shown = PassManager(pipeline(2), level=2, verify_each=True).run(parse_graph(TEXT)).explain()
    lines = shown.splitlines()
    assert lines[0] == "answer at -O2"
    assert re.fullmatch(r"  operations     6 -> \d+", lines[1])
    assert re.fullmatch(r"  critical path  [\d.]+ s -> [\d.]+ s \(predicted\)", lines[2])
    assert "cse: fired at 1 of 1 site" in lines
    assert "  + %b = search @pydocs  at app/qa.py:5:9" in lines
    assert any("%a serves both; saves 15 ms; legal: " in line for line in lines)
    assert "      not legal: each item needs `n` from the one before it" in lines
    assert any(line.startswith("  + the workflow  at app/qa.py:3") for line in lines)
    assert any(line.startswith("no site for: inline, fold, dce, licm") for line in lines)
    again = PassManager(pipeline(2), level=2).run(parse_graph(TEXT)).explain()
    assert again == shown, "the same workflow is explained the same way"


def test_passes_reach_the_workflows_that_are_called() -> None:
    text = """
workflow @w(%q: text) -> text {
  %a = call @again (%q) : text
  return %a
}

workflow @again(%q: text) -> text {
  %x = search @pydocs (%q) {k = 2} : docs
  %y = search @pydocs (%q) {k = 2} : docs
  %p = template "{}{}" (%x, %y) : text
  %a = call @again (%p) : text
  return %a
}
"""
    found = PassManager(parse_pipeline("cse"), verify_each=True).run(parse_graph(text))
    (callee,) = found.graph.callees
    assert [op.name for op in callee.body.ops] == ["search", "template", "call"]
    assert found.stages[0].changed
    assert [r.op for r in found.remarks if r.fired] == ["%y = search @pydocs"]


# -- passes that break a graph


@pytest.mark.parametrize("step", [Breaks(), Breaks(by_raising=True)])
def test_a_reproducer_is_left(step: Breaks, tmp_path: Path) -> None:
    graph = parse_graph(TEXT)
    manager = PassManager([*parse_pipeline("cse"), step], verify_each=True, reproducer_dir=tmp_path)
    for name in ("flowc-answer-breaks.flow", "flowc-answer-breaks-1.flow"):
        with pytest.raises(PassError) as caught:
            manager.run(graph)
        assert caught.value.code == "F042"
        assert isinstance(caught.value.__cause__, Exception)
        path = tmp_path / name
        assert str(path) in str(caught.value)
        assert "pass `breaks` broke workflow `answer`" in str(caught.value)
        header, why, text = path.read_text().split("\n", 2)
        assert header == f"# pass: {'breaks{by_raising=true}' if step.by_raising else 'breaks'}"
        assert why.startswith("# ")
        assert parse_graph(path.read_text()) == parse_graph(text) == PassManager(parse_pipeline("cse")).run(graph).graph


def test_a_reproducer_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    manager = PassManager([Breaks(by_raising=True)], reproducer_dir=tmp_path / "none")
    with pytest.raises(PassError, match=r"out of luck(.|\n)*could not be written"):
        manager.run(parse_graph(TEXT))


def test_a_wrong_graph_is_not_blamed_on_a_pass() -> None:
    graph = parse_graph(TEXT)
    broken = Breaks().run(graph, CostModel()).graph
    with pytest.raises(Exception, match=r"error\[F022\]"):
        PassManager(pipeline(2), verify_each=True).run(broken)


# -- costs


def test_measured_rates_replace_defaults() -> None:
    graph = parse_graph(TEXT)
    slow = CostModel({"search_s": 2.0})
    assert predicted_s(graph, slow) - predicted_s(graph, CostModel()) == pytest.approx(2 * (2.0 - 0.015))
    (remark,) = PassManager(parse_pipeline("cse"), costs=slow).run(graph).remarks
    assert remark.gain_s == pytest.approx(2.0, rel=1e-3)
    with pytest.raises(ValueError, match="unknown rates"):
        CostModel({"serch_s": 2.0})


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('%r = py "range(3)" : range', 3),
        ('%n = const 4 : int\n%r = py "range(1, n)" (%n) : range', 3),
        ('%r = py "range(5, 0, -2)" : range', 3),
        ('%r = py "range(n)" (%n=%q) : range'.replace("%n=", "n="), None),
        ('%r = py "range(1, 2, 0)" : range', None),
        ("%r = py \"['a', 'b']\" : list<text>", 2),
        ('%r = py "[*q]" (%q) : list<text>', None),
        ('%r = const ("a", "b") : tuple<text, text>', 2),
        ('%r = const "abc" : text', 3),
        ("%r = const 3 : any", None),
        ('%r = fused : range body seq {\n%s = py "range(7)" : range\nyield %s\n}', 7),
    ],
)
def test_known_lengths(body: str, expected: int | None) -> None:
    result = body.split("\n}")[0].split(" : ")[-1] if "fused" not in body else "range"
    graph = parse_graph(f"workflow @w(%q: any) -> {result} {{\n{body}\nreturn %r\n}}")
    assert Facts(graph, CostModel()).length(graph.result) == expected


def test_critical_path_of_what_overlaps() -> None:
    text = """
workflow @w(%q: text) -> text ORDER {
  %a = search @x (%q) : docs
  %b = search @x (%q) {k = 3} : docs
  %c = template "{}{}" (%a, %b) : text
  return %c
}
"""
    costs = CostModel({"search_s": 1.0, "py_s": 0.25, "turn_s": 0.0})
    assert predicted_s(parse_graph(text.replace("ORDER", "seq")), costs) == pytest.approx(2.25)
    assert predicted_s(parse_graph(text.replace("ORDER", "")), costs) == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0 s"), (1.5, "1.5 s"), (0.0123, "12.3 ms"), (2e-6, "2 us"), (3e-9, "3 ns"), (120, "120 s")],
)
def test_seconds_for_people(seconds: float, shown: str) -> None:
    assert show_s(seconds) == shown


def wide(n: int) -> Graph:
    ops = "\n".join(
        f'  %t{i} = template "{i} {{}}" (%q) : text\n  %g{i} = generate @llm (%t{i}) : text' for i in range(n)
    )
    return parse_graph(f"workflow @w(%q: text) -> text seq {{\n{ops}\n  return %g0\n}}")


@pytest.mark.parametrize("make", [wide])
def test_a_long_workflow_needs_no_deep_stack(make: Callable[[int], Graph]) -> None:
    found = PassManager(pipeline(2)).run(make(1500))
    fused = [op for op in found.graph.body.ops if op.name == "fused"]
    assert len(fused) == 1
    assert len(fused[0].regions[0].ops) == 1500
    assert all(isinstance(op, Op) and "wave" in op.attrs for op in found.graph.body.ops if op.name == "generate")


def test_a_call_takes_as_long_as_what_it_calls() -> None:
    text = """
workflow @w(%q: text) -> docs {
  %a = call @inner (%q) : docs
  return %a
}

workflow @inner(%q: text) -> docs {
  %a = search @x (%q) : docs
  %b = call @inner (%q) : docs
  return %b
}
"""
    costs = CostModel({"search_s": 1.0, "call_s": 10.0, "turn_s": 0.0})
    assert predicted_s(parse_graph(text), costs) == pytest.approx(10.0)  # the recursive call, beside the search
    assert predicted_s(parse_graph(text.replace("%q: text) -> docs {", "%q: text) -> docs seq {")), costs) == 11.0
