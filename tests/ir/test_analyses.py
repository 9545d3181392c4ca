"""What can be known without running."""

from itertools import pairwise

import pytest
from hypothesis import given, settings

from flowc.ir import analyses
from flowc.ir.analyses import (
    Dominance,
    branch_probabilities,
    critical_path,
    definitions,
    dependencies,
    effects,
    late_values,
    levels,
    liveness,
    static_prefix,
    steps_to_execution,
    users,
)
from flowc.ir.core import Graph, Op, Region, walk, walk_regions
from flowc.ir.effects import order_edges
from flowc.ir.errors import Loc
from flowc.ir.ops import DEFAULT_RATES, OPS
from flowc.ir.parser import parse_graph
from flowc.ir.verifier import verify
from tests.strategies import graphs

RAG = """
workflow @rag(%question: text, %style: text) -> text {
  %split = template "Split, {}:\\n{}" (%style, %question) : text
  %subs = generate @m (%split) {max_tokens = 64} : text
  %lines = py "subs.splitlines()" (%subs) : list<text>
  %notes = foreach (%lines) {collects = 1, parallel = true} : list<docs> body (%sub: text) {
    %found = search @i (%sub) {k = 4} : docs
    %item = py "[found]" (%found) : list<docs>
    yield %item
  }
  %direct = search @i (%question) {k = 4} : docs
  %ask = template "Context:\\n{}{}\\nQ: {}" (%notes, %direct, %question) : text
  %answer = generate @m (%ask) {max_tokens = 128} : text
  return %answer
}
"""


def graph(text: str) -> Graph:
    found = parse_graph(text)
    verify(found)
    return found


def body(lines: str, result: str = "%q") -> Graph:
    return graph(
        f"workflow @w(%q: text, %a: any) -> {'text' if result == '%q' else 'any'} {{\n{lines}\nreturn {result}\n}}"
    )


def named(g: Graph, value: str) -> Op:
    return definitions(g.body)[value]


def by_value(g: Graph, answers: list[int]) -> dict[str, int]:
    return {op.results[0].name: a for op, a in zip(g.body.ops, answers, strict=True)}


# -- definitions, uses, liveness


def test_definitions_and_users() -> None:
    g = graph(RAG)
    assert definitions(g.body)["found"].name == "search"
    assert "sub" not in definitions(g.body)
    uses = users(g.body)
    assert [op.results[0].name for op in uses["question"]] == ["split", "direct", "ask"]
    assert [op.results[0].name for op in uses["item"]] == ["notes"]  # yielded: the loop uses it
    assert "answer" not in uses  # only returned


def test_liveness() -> None:
    g = graph(RAG)
    assert liveness(g.body) == {
        "question": 5,
        "style": 0,
        "split": 1,
        "subs": 2,
        "lines": 3,
        "notes": 5,
        "direct": 5,
        "ask": 6,
        "answer": 7,
    }
    inner = body(
        "%u = undef : any\n%x = if (%a) : any then {\n %y = append (%q, %a) : any\n yield %y\n} else {\n yield %a\n}"
    )
    assert liveness(inner.body) == {"q": 2, "a": 1, "u": -1, "x": -1}
    assert liveness(inner.body.ops[1].regions[0]) == {"q": 0, "a": 0, "y": 1}


@given(graphs())
@settings(max_examples=100)
def test_liveness_against_a_search(g: Graph) -> None:
    for region in walk_regions(g.body):
        for name, last in liveness(region).items():
            using = [i for i, op in enumerate(region.ops) if name in {v.name for v in analyses.used_by(op)}]
            yielded = any(v.name == name for v in region.yields)
            assert last == (len(region.ops) if yielded else max(using, default=-1))


def test_dominance() -> None:
    g = body(
        "%x = undef : any\n"
        "if (%a) then {\n %y = undef : any\n %z = undef : any\n} else {\n %v = undef : any\n}\n"
        "%w = undef : any"
    )
    ops = {op.results[0].name if op.results else "if": op for op in walk(g.body)}
    below = Dominance(g.body)
    order = ["x", "if", "y", "z", "v", "w"]
    table = {a: [b for b in order if below.dominates(ops[a], ops[b])] for a in order}
    assert table == {
        "x": ["x", "if", "y", "z", "v", "w"],
        "if": ["if", "y", "z", "v", "w"],
        "y": ["y", "z"],
        "z": ["z"],
        "v": ["v"],
        "w": ["w"],
    }


@given(graphs())
@settings(max_examples=100)
def test_definitions_dominate_their_uses(g: Graph) -> None:
    below, made = Dominance(g.body), definitions(g.body)
    for op in walk(g.body):
        for v in op.operands:
            if v.name in made:
                assert below.dominates(made[v.name], op)


# -- effects, order, levels


def test_effects() -> None:
    g = graph(RAG)
    found = effects(g.body)
    assert found[3].reads == {"index:i"}  # of the search inside
    assert not found[1].is_sampled
    assert all(not e.writes for e in found)


def test_dependencies_are_data_and_effect_order() -> None:
    g = body(
        '%x = py "f()" {writes = ("py",), raises = true} : any\n'
        "%y = append (%q, %q) : any\n"
        '%z = py "g()" {reads = ("py",)} : any\n'
        '%w = py "h(y)" (%y) {writes = ("py",)} : any'
    )
    assert dependencies(g.body) == [(), (), (0,), (0, 1, 2)]
    ordered = Region(g.body.params, g.body.ops, g.body.yields, ordered=True)
    assert dependencies(ordered) == [(), (0,), (1,), (1, 2)]


def test_levels() -> None:
    g = graph(RAG)
    assert by_value(g, levels(g.body)) == {
        "split": 0,
        "subs": 0,
        "lines": 1,
        "notes": 1,
        "direct": 0,
        "ask": 2,
        "answer": 2,
    }
    assert levels(g.body.ops[3].regions[0]) == [0, 1]


@given(graphs())
@settings(max_examples=100)
def test_levels_grow_along_dependencies(g: Graph) -> None:
    for region in walk_regions(g.body):
        found = levels(region)
        for i, waits in enumerate(dependencies(region)):
            assert set(order_edges(region)[i]) <= set(waits)
            for d in waits:
                assert found[i] >= found[d] + analyses.is_lane_op(region.ops[d])
            if not waits:
                assert found[i] == 0


# -- time


def own(g: Graph, name: str) -> float:
    op = named(g, name)
    return OPS[op.name].cost_s(op, DEFAULT_RATES)


def test_critical_path() -> None:
    g = graph(RAG)
    path = critical_path(g)
    assert [op.results[0].name for op in path.ops] == [
        "split",
        "subs",
        "lines",
        "notes",
        "found",
        "item",
        "ask",
        "answer",
    ]
    assert path.seconds == pytest.approx(sum(own(g, op.results[0].name) for op in path.ops))


def test_critical_path_takes_costs_of_its_caller() -> None:
    g = graph(RAG)
    path = critical_path(g, lambda op: 10.0 if op.results[0].name == "direct" else 1.0)
    assert [op.results[0].name for op in path.ops] == ["direct", "ask", "answer"]
    assert path.seconds == 12
    assert critical_path(Region()).seconds == 0
    assert critical_path(g.body, {**DEFAULT_RATES, "search_s": 1e9}).seconds > 1e9


BRANCH = """
workflow @w(%q: text, %a: any) -> any loc("w.py":1) {
  %x = if (%a) : any loc(5:1-9) then {
    %fast = py "1" : any
    yield %fast
  } else {
    %slow = py "2" : any
    yield %slow
  }
  %y = while (%x) {limit = 2} : any cond (%c: any) {
    %test = py "c" (%c) : any
    yield %test
  } body (%d: any) {
    %next = py "d" (%d) : any
    yield %next, %next
  }
  %z = foreach (%a, %y) : any body (%i: any, %e: any) {
    %step = py "e" (%e) : any
    yield %step
  }
  return %z
}
"""


def test_critical_path_through_control_flow() -> None:
    g = graph(BRANCH)
    cost = {"fast": 1.0, "slow": 3.0, "test": 10.0, "next": 100.0, "step": 1000.0}

    def seconds(op: Op) -> float:
        return cost.get(op.results[0].name, 0.0)

    path = critical_path(g, seconds)
    assert path.seconds == 2 + (10 + 2 * 110) + 3 * 1000
    assert [op.results[0].name for op in path.ops] == ["x", "slow", "y", "test", "next", "z", "step"]
    path = critical_path(g, seconds, branches={id(named(g, "x")): 0.75}, trips=lambda op: 1.0)
    assert path.seconds == pytest.approx(0.75 * 1 + 0.25 * 3 + 10 + 110 + 1000)
    assert path.ops[1].results[0].name == "fast"


def test_critical_path_of_a_call() -> None:
    text = (
        "workflow @w(%q: text) -> any {\n  %x = call @v (%q) : any\n  return %x\n}\n"
        "workflow @v(%q: text) -> any {\n  %y = call @w (%q) : any\n  return %y\n}"
    )
    path = critical_path(parse_graph(text), lambda op: 1.0)
    assert [op.results[0].name for op in path.ops] == ["x", "y"]  # the circle is entered once
    assert path.seconds == 2


@given(graphs())
@settings(max_examples=100)
def test_the_critical_path_is_no_longer_than_everything_in_a_row(g: Graph) -> None:
    total = sum(1.0 for _ in walk(g.body)) * 4**4
    path = critical_path(g.body, lambda op: 1.0)
    assert 0 <= path.seconds <= total
    assert bool(path.ops) == bool(g.body.ops)
    ordered = Region(g.body.params, g.body.ops, g.body.yields, ordered=True)
    assert critical_path(ordered, lambda op: 1.0).seconds >= path.seconds - 1e-9


def test_branch_probabilities() -> None:
    g = graph(BRANCH)
    op = named(g, "x")
    assert branch_probabilities(g) == {id(op): 0.5}
    assert branch_probabilities(g, {Loc("w.py", 5, 0, 9): (9, 10)}) == {id(op): pytest.approx(10 / 12)}
    assert branch_probabilities(g, {Loc("w.py", 6): (9, 10)}) == {id(op): 0.5}


def test_steps_to_execution() -> None:
    g = graph(
        """
workflow @w(%q: text, %a: any) -> text {
  %one = generate @m (%q) : text
  %two = generate @m (%one) : text
  %join = template "{}{}" (%one, %two) : text
  %three = generate @m (%join) : text
  %either = if (%a) : text then {
    %deep = generate @m (%three) : text
    yield %deep
  } else {
    yield %q
  }
  %four = generate @m (%either) : text
  %last = while (%one) {limit = 3} : text cond (%c: text) {
    %ok = choose @m (%c, %a) : text
    yield %ok
  } body (%d: text) {
    %better = generate @m (%d) : text
    yield %better, %better
  }
  %five = generate @m (%last) : text
  return %five
}
"""
    )
    steps = steps_to_execution(g)
    assert {op.results[0].name: steps[id(op)] for op in walk(g.body) if id(op) in steps} == {
        "one": 0,
        "two": 1,  # after one
        "three": 2,  # AND join: after two, not after one
        "deep": 3,
        "four": 3,  # OR join: the `else` region waits for nothing, but the `if` for its value of `then`
        "ok": 1,
        "better": 2,
        "five": 2,  # the loop may end at once
    }


# -- prompts


def pieces(g: Graph, value: str) -> list[str]:
    """Constant text as itself, early slots as `<name>`, late ones as `<name!>`."""
    prefix = next(p for p in static_prefix(g) if p.op.results[0].name == value)
    return [p.text if p.value is None else f"<{p.value.name}{'!' * p.is_late}>" for p in prefix.pieces]


def test_static_prefix() -> None:
    g = graph(RAG)
    assert pieces(g, "subs") == ["Split, ", "<style>", ":\n", "<question>"]
    assert pieces(g, "answer") == ["Context:\n", "<notes!>", "<direct!>", "\nQ: ", "<question>"]
    subs, answer = static_prefix(g)
    assert (subs.text, subs.first_late, [v.name for v in subs.early]) == ("Split, ", None, ["style", "question"])
    assert (answer.text, answer.first_late, answer.early) == ("Context:\n", 1, ())
    assert not subs.is_constant


def test_static_prefix_through_templates_constants_and_fused_runs() -> None:
    g = body(
        '%system = const "You are {terse}.\\n" : text\n'
        "%k = const 3 : int\n"
        "%pi = const 3.14159 : float\n"
        '%inner = template "{{}} {} of {}, {}" (%k, %pi, %q) {formats = ("", ":.2f", "")} : text\n'
        "%whole = fused : text body {\n"
        ' %p = template "{}{}!{}" (%system, %inner, %q) {formats = ("", "", "!r")} : text\n'
        " yield %p\n}\n"
        "%x = generate @m (%whole) : text\n"
        "%y = generate @m (%system) : text\n"
        '%quoted = template "{}" (%inner) {formats = ("!r",)} : text\n'
        "%z = choose @m (%quoted, %a) : text\n"
        '%v = parse @m (%q) {model = "M"} : any'
    )
    assert pieces(g, "x") == ["You are {terse}.\n{} 3 of 3.14, ", "<q>", "!", "<q>"]
    assert pieces(g, "y") == ["You are {terse}.\n"]
    assert pieces(g, "z") == ["<inner>"]  # the text of an early template, but not its own
    assert pieces(g, "v") == ["<q>"]
    prefixes = {p.op.results[0].name: p for p in static_prefix(g)}
    assert prefixes["y"].is_constant
    assert prefixes["v"].text == ""


@pytest.mark.parametrize(
    ("literal", "form", "shown"),
    [
        ("none", "", "None"),
        ("true", "!r", "True"),
        ('"a"', "!r:>5", "  'a'"),
        ('"é"', "!a", "'\\xe9'"),
        ("255", ":#x", "0xff"),
        ("1.0", "!s", "1.0"),
        ("(1, 2)", "", None),
        ('b"x"', "", None),
        ('"a"', ":d", None),  # raises when it runs
        ("1", ":>{}", None),
        ("1", "!x", None),
    ],
)
def test_a_literal_in_a_slot(literal: str, form: str, shown: str | None) -> None:
    g = body(
        f"%c = const {literal} : any\n"
        f'%p = template "<{{}}" (%c) {{formats = ("{form}",)}} : text\n'
        "%x = generate @m (%p) : text"
    )
    assert pieces(g, "x") == (["<", "<c>"] if shown is None else ["<" + shown])


@pytest.mark.parametrize(
    ("lines", "late"),
    [
        ("%x = generate @m (%q) : text\n%y = append (%x, %q) : any", {"x", "y"}),
        ("%x = tool @f (%q) : any", {"x"}),
        ('%x = py "g()" {writes = ("py",)} : any', set()),
        ("%x = append (%q, %q) : any", set()),
        # by the branch
        ("%g = embed @e (%q) : vector\n%x = if (%g) : text then {\n yield %q\n} else {\n yield %q\n}", {"g", "x"}),
        ("%x = if (%a) : text then {\n yield %q\n} else {\n %g = generate @m (%q) : text\n yield %g\n}", {"g", "x"}),
        # by the item, by what is carried, by the end of the loop
        ("%g = search @i (%q) : docs\nforeach (%g) body (%i: doc) {\n %y = append (%i, %q) : any\n}", {"g", "i", "y"}),
        (
            "%x = foreach (%a, %q) : text body (%i: any, %c: text) {\n %g = generate @m (%c) : text\n yield %g\n}",
            {"x", "c", "g"},
        ),
        (
            "%x, %y = while (%q, %q) {limit = 3} : text, text cond (%c: text, %d: text) {\n yield %c\n}"
            " body (%e: text, %f: text) {\n %g = generate @m (%q) : text\n yield %q, %f, %g\n}",
            {"x", "y", "c", "d", "e", "f", "g"},  # the second becomes late, then the first from it, then the end
        ),
        (
            "%x = while (%q) {limit = 3} : text cond (%c: text) {\n %g = choose @m (%q, %a) : text\n yield %g\n}"
            " body (%e: text) {\n yield %q, %e\n}",
            {"x", "g"},
        ),
        # by a cell, by an error
        ("%c = cell (%q) : any\n%s = store (%c, %q) : none\n%x = load (%c) : any", {"x"}),
        ("%c = cell (%q) : any\n%x = load (%c) : any", set()),
        (
            "%x = try : text body {\n %g = generate @m (%q) : text\n yield %q\n} except (%e: any) {\n yield %q\n}",
            {"x", "g", "e"},
        ),
        ('%x = fused : text body {\n %y = const "" : text\n yield %y\n}', set()),
    ],
)
def test_late_values(lines: str, late: set[str]) -> None:
    assert late_values(body(lines)) == late


@given(graphs())
@settings(max_examples=100)
def test_prompts_of_random_graphs(g: Graph) -> None:
    late = late_values(g)
    for prefix in static_prefix(g):
        assert prefix.op.name in analyses.PROMPTED
        texts = [p.value is None for p in prefix.pieces]
        assert not any(a and b for a, b in pairwise(texts))  # neighbours are merged
        assert all(p.is_late == (p.value.name in late) for p in prefix.pieces if p.value is not None)
    for op in walk(g.body):
        if analyses.is_lane_op(op):
            assert {v.name for v in op.results} <= late
