"""What the text form looks like."""

import textwrap
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Attr, Attrs, Graph, Op, Region, Value
from flowc.ir.errors import Loc
from flowc.ir.ops import OPS
from flowc.ir.parser import parse_graph
from flowc.ir.printer import LOC_COLUMN, print_graph, print_op
from flowc.ir.types import ANY, INT, TEXT
from flowc.ir.verifier import verify


def text(source: str) -> str:
    return textwrap.dedent(source).lstrip("\n")


HYDE = text(
    """
    workflow @hyde(%question: text) -> docs scope "examples/hyde.py:hyde" loc("examples/hyde.py":8) seq {
      %prompt = template "Write a passage that answers: {}" (%question) : text          loc(9:13-60)
      %text = generate @default (%prompt) {max_tokens = 96, temperature = 0.0} : text   loc(9:13-60)
      %docs = search @pydocs (%text) {k = 5} : docs                                     loc(10:12-40)
      return %docs
    }
    """
)

ALL_REGIONS = text(
    """
    workflow @all(%items: any, %flag: bool) -> any {
      %r = if (%flag) : text then {
        %c = const "yes" : text
        yield %c
      } else seq {
        %c.1 = const "no" : text
        yield %c.1
      }
      %i, %s = while (%r, %items) {limit = 10} : text, any cond (%i.1: text, %s.1: any) {
        yield %s.1
      } body (%i.2: text, %s.2: any) {
        %go = const true : bool
        yield %go, %i.2, %s.2
      }
      %notes = foreach (%items) {collects = 1, parallel = true} : list<docs> body (%item: any) {
        %found = search @pydocs (%item, k=%item) : docs
        %list = py "[x]" (x=%found) : list<docs>
        yield %list
      }
      %t = try (Error=%items) : any body {
        %v = call @other (%i) : any
        yield %v
      } except "(ValueError, Error)" (%e: any) {
        yield %e
      } except (%e.1: any) {
        yield %e.1
      }
      %a, %n = fused : int, any body {
        %a.1 = py \"\"\"
            n = 0

            for x in range(3):
                n += x
            \"\"\" (%r) {outs = ("n",), writes = ("py",), raises = true} : int
        %n.1 = py "f(x, y)" (x=%a.1, %r) : any
        yield %a.1, %n.1
      }
      return %t
    }

    workflow @other(%x: text) -> text {
      return %x
    }
    """
)


def test_the_design_example() -> None:
    at = "examples/hyde.py"
    b = Builder("hyde", [("question", TEXT)], scope="examples/hyde.py:hyde", loc=Loc(at, 8))
    b.loc = Loc(at, 9, 12, 60)
    hypo = b.generate(
        "default", b.template("Write a passage that answers: {}", b.params[0]), max_tokens=96, temperature=0.0
    )
    b.loc = Loc(at, 10, 11, 40)
    graph = b.finish(b.search("pydocs", hypo, k=5))
    assert print_graph(graph) == HYDE
    assert parse_graph(HYDE) == graph


def test_every_kind_of_region() -> None:
    graph = parse_graph(ALL_REGIONS)
    verify(graph)
    assert print_graph(graph) == ALL_REGIONS
    fused = graph.body.ops[-1]
    assert fused.regions[0].ops[0].attrs["source"] == "n = 0\n\nfor x in range(3):\n    n += x"
    attempt = graph.body.ops[3]
    assert attempt.attrs == {"handlers": ("(ValueError, Error)", ""), "params": ("Error",)}
    assert [op.attrs.get("params") for op in fused.regions[0].ops] == [("r",), ("x", "r")]
    assert graph.body.ops[2].regions[0].ops[0].attrs == {"resource": "pydocs", "kw": ("k",)}


def test_every_region_name_of_the_op_table_has_a_word_in_the_grammar() -> None:
    for spec in OPS.values():
        assert set(spec.regions) <= {"then", "else", "cond", "body", "*handlers"}, spec.name


def test_locations_stand_in_one_column() -> None:
    columns = {line.index("loc(") for line in HYDE.splitlines()[1:-2]}
    assert columns == {LOC_COLUMN}
    graph = parse_graph(HYDE)
    body = Region(
        graph.params, (*graph.body.ops, Op("undef", (), (Value("a" * 100, ANY),), loc=Loc("examples/hyde.py", 1)))
    )
    changed = print_graph(graph.with_body(body)).splitlines()
    assert changed[1:4] == HYDE.splitlines()[1:4]  # one long line moves no other


@pytest.mark.parametrize(
    ("loc", "shown"),
    [
        (Loc("app.py", 9), "loc(9)"),
        (Loc("app.py", 9, 0, 5), "loc(9:1-5)"),
        (Loc("app.py", 9, 4), "loc(9:5)"),
        (Loc("app.py", 0), 'loc("app.py")'),
        (Loc("app.py", 0, 3), 'loc("app.py":0:4)'),
        (Loc("lib.py", 9, 0, 5), 'loc("lib.py":9:1-5)'),
        (Loc('<ipython "1">', 2), 'loc("<ipython \\"1\\">":2)'),
    ],
)
def test_a_location(loc: Loc, shown: str) -> None:
    graph = Graph("w", Region((Value("x", ANY),), (Op("undef", loc=loc),), (Value("x", ANY),)), loc=Loc("app.py", 1))
    line = print_graph(graph).splitlines()[1]
    assert line.split() == ["undef", *shown.split()]
    assert parse_graph(print_graph(graph)) == graph


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "none"),
        (True, "true"),
        (1, "1"),
        (-7, "-7"),
        (1.0, "1.0"),
        (-0.0, "-0.0"),
        (1e-07, "1e-07"),
        (float("inf"), "inf"),
        (float("-inf"), "-inf"),
        ('a\n"b"\\\t\x00é\u2028😀\ud800', '"a\\n\\"b\\"\\\\\\t\\x00é\\u2028😀\\ud800"'),
        ("\ud83d\ude00", '"\\ud83d\\ude00"'),  # two lone surrogates are not one character
        (b'\x00a"\\\xff', 'b"\\x00a\\"\\\\\\xff"'),
        ((), "()"),
        (("a",), '("a",)'),
        ((1, (2.0, None), b""), '(1, (2.0, none), b"")'),
    ],
)
def test_a_literal(value: Attr, shown: str) -> None:
    graph = Graph("w", Region((), (Op("const", (), (Value("x", ANY),), Attrs(value=value)),), (Value("x", ANY),)))
    assert print_graph(graph).splitlines()[1] == f"  %x = const {shown} : any"
    again = parse_graph(print_graph(graph)).body.ops[0].attrs["value"]
    assert repr(again) == repr(value)
    assert type(again) is type(value)


def test_not_a_number_prints_and_parses() -> None:
    again = parse_graph("workflow @w() -> any {\n  %x = const nan : any\n  return %x\n}").body.ops[0].attrs["value"]
    assert repr(again) == "nan"


def test_an_integer_of_thousands_of_digits() -> None:
    graph = Graph("w", Region((), (Op("const", (), (Value("x", ANY),), Attrs(value=-(10**5000))),), (Value("x", ANY),)))
    assert parse_graph(print_graph(graph)) == graph  # `int(str)` refuses more than 4,300 decimal digits


@pytest.mark.parametrize("name", ["true", "none", "inf", "nan", "a b", "", '"', "b", "info", "inf.x"])
def test_a_word_of_the_grammar_as_a_keyword(name: str) -> None:
    x = Value("x", INT)
    op = Op("tool", (x,), (Value("y", ANY),), Attrs(tool="f", kw=(name,)))
    graph = Graph("w", Region((x,), (op,), (Value("y", ANY),)))
    assert parse_graph(print_graph(graph)) == graph


def test_a_block_only_where_an_editor_keeps_it() -> None:
    def source(text: str) -> str:
        op = Op("py", (), (), Attrs(source=text, params=(), outs=()))
        x = Value("x", ANY)
        graph = Graph("w", Region((x,), (op,), (x,)))
        assert parse_graph(print_graph(graph)) == graph
        return print_graph(graph).splitlines()[1]

    assert source("a = 1\nb = 2") == '  py """'
    for damaged in ("a = 1 \nb", "a\n\tb", 'a = """x\n"""', "a\r\nb", "a\n \nb", "a\x0cb\nc"):
        assert source(damaged).startswith('  py "a')


def test_callees_that_the_body_does_not_tell() -> None:
    called = "workflow @a(%x: any) -> any {\n  %y = call @b (%x) : any\n  return %y\n}\n"
    b = parse_graph("workflow @b(%x: any) -> any {\n  return %x\n}")
    c = parse_graph("workflow @c(%x: any) -> any {\n  return %x\n}")
    a = parse_graph(called)
    assert a.callees == ()
    for callees in ((b,), (b, c), (c, b), (c,), ()):
        held = Graph(a.name, a.body, callees=callees)
        assert parse_graph(print_graph(held)) == held
    nested = Graph("b", a.body, callees=(c,))
    held = Graph("a", a.body, callees=(nested, c))
    assert print_graph(held).splitlines()[0] == "workflow @a(%x: any) -> any calls @b, @c {"
    assert parse_graph(print_graph(held)) == held


def test_recursion_needs_no_callee() -> None:
    source = "workflow @a(%x: any) -> any {\n  %y = call @a (%x) : any\n  return %y\n}\n"
    graph = parse_graph(source)
    verify(graph)
    assert graph.callees == ()
    assert print_graph(graph) == source


def test_a_graph_that_breaks_every_rule_still_prints() -> None:
    x = Value("x", ANY)
    inner = Region((x,), (Op("no such op", (x,)),), (x, x))
    op = Op(
        "if",
        (x,),
        (Value("y", ANY),),
        Attrs(resource=3, kw=("a", "b", "c"), handlers=5, value=("v",)),
        (inner, inner, inner),
    )
    wrong = Op("try", (x,), (), Attrs(handlers=("", "", ""), params=("a", "b")), (inner,))
    a_list: Any = [1]
    no_literal = Op("const", (), (x,), Attrs(value=a_list))
    graph = Graph("w", Region((), (op, wrong, no_literal, Op("py"), Op("search", (x,), (), Attrs(resource="")))))
    assert "no such op" in print_graph(graph)
    assert print_op(op).startswith("%y = if (%x) {")
    assert print_op(no_literal) == "%x = const [1] : any"
