"""Every rule of the IR has a graph that breaks it."""

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.ir.builder import Builder
from flowc.ir.core import Attrs, Graph, Op, Region, Value, walk
from flowc.ir.errors import Loc, VerifyError
from flowc.ir.parser import parse_graph
from flowc.ir.printer import all_graphs, print_graph
from flowc.ir.types import ANY, DOCS, INT, NEVER, TEXT, list_of, tuple_of
from flowc.ir.verifier import subsumes, verify
from tests.strategies import graphs

PRELUDE = """\
workflow @w(%q: text, %n: int, %d: docs, %a: any, %l: list<text>) -> text {
BODY
  return %q
}
workflow @other(%x: text, %y: docs) -> docs {
  return %y
}
"""


def error(graph: Graph) -> VerifyError:
    with pytest.raises(VerifyError) as caught:
        verify(graph)
    return caught.value


def parsed(body: str) -> Graph:
    head = PRELUDE.replace("-> text {", "-> text calls @other {", 1)
    return parse_graph(head.replace("BODY", body))


# a body; the code; what the message says; what the hint says
BROKEN: dict[str, tuple[str, str, str, str | None]] = {
    # F021: types between operations
    "search given docs": (
        "%x = search @i (%d) : docs",
        "F021",
        "`search @i` takes a text as the query, but is given search results",
        "`d[0].text`",
    ),
    "search given an int": ("%x = search @i (%n) : docs", "F021", "as the query, but is given an int", 'f"{n}"'),
    "search given a list": ("%x = search @i (%l) : docs", "F021", "is given a list<text>", '"\\n".join(l)'),
    "generate given docs": ("%x = generate @m (%d) : text", "F021", "takes a text as the prompt", "`d` is a parameter"),
    "embed given docs": ("%x = embed @e (%d) : vector", "F021", "as the text to embed", None),
    "rerank given text": (
        "%x = rerank @r (%q, %q) : docs",
        "F021",
        "search results as the passages, but is given a text",
        "what a `search` gave",
    ),
    "invoke given an int": ('%x = invoke (%n, %a) {tools = ("f",)} : any', "F021", "as the tool's name", None),
    "keyword operand": (
        "%x = search @i (%q, k=%d) : docs",
        "F021",
        "takes an int as `k`, but is given search results",
        "pass an int",
    ),
    "argument of a call": (
        "%x = call @other (%n, %d) : docs",
        "F021",
        "`call @other` takes a text as `x`, but is given an int",
        None,
    ),
    # F023: attributes
    "unknown attribute": ("%x = search @i (%q) {kk = 3} : docs", "F023", "`search` has no attribute `kk`", "`k`"),
    "unknown attribute of none": ("%x = undef {zzz = 3} : any", "F023", "no attribute `zzz`", "it has: none"),
    "attribute's type": ('%x = search @i (%q) {k = "3"} : docs', "F023", '`k` of `search` is an int, not "3"', None),
    "bool is no int": ("%x = search @i (%q) {k = true} : docs", "F023", "is an int, not true", None),
    "names are texts": ('%x = py "1" {params = (), reads = (1,)} : any', "F023", "is a tuple of texts, not (1,)", None),
    "temperature": ('%x = generate @m (%q) {temperature = "hot"} : text', "F023", "is an int or a float, not", None),
    "missing attribute": (
        "%x = while (%q) : any cond (%c: any) {\nyield %c\n} body (%f: any) {\nyield %f, %f\n}",
        "F023",
        "`while` lacks its attribute `limit`: most iterations",
        None,
    ),
    "missing value": ("%x = const : any", "F023", "`const` lacks its attribute `value`", None),
    "unknown keyword": ("%x = search @i (%q, kk=%n) : docs", "F023", "no keyword operand `kk`", "did you mean `k`?"),
    "keyword and attribute": (
        "%x = search @i (%q, k=%n) {k = 3} : docs",
        "F023",
        "`k` both as an attribute and as an operand",
        None,
    ),
    "lone brace": ('%x = template "{" : text', "F023", "malformed: a lone `{` at position 0", None),
    "schedule": ('%x = undef {wave = "1"} : any', "F023", "`wave` of `undef` is an int", None),
    # F024: counts and types
    "operands": ("%x = append (%q) : any", "F024", "`append` takes 2 operands without a name, here 1", None),
    "no operands": ("%x = search @i : docs", "F024", "takes 1 operand without a name, here 0", None),
    "keyword for a positional": (
        "%x = search @i (k=%n) : docs",
        "F024",
        "takes 1 operand without a name, here 0",
        None,
    ),
    "results": ("%x, %y = search @i (%q) : docs, docs", "F024", "`search` has 1 result, here 2", None),
    "result's type": ("%x = search @i (%q) : text", "F024", "`search` gives search results, not a text", None),
    "literal's type": ("%x = const 1 : text", "F024", "the literal is an int, not a text", None),
    "slots": ('%x = template "{} {}" (%q) : text', "F024", "has 2 slots for 1 operand", None),
    "formats": ('%x = template "{}" (%q) {formats = ("", "!r")} : text', "F024", "2 formats for 1 slot", None),
    "else yields": (
        "if (%q) then {\n} else {\n%x = append (%q, %q) : any\nyield %x\n}",
        "F024",
        "region `else` of `if` yields 1 value, not 0",
        None,
    ),
    "if yields": (
        "%x = if (%q) : text then {\nyield %q\n} else {\n}",
        "F024",
        "region `else` of `if` yields 0 values, not 1",
        None,
    ),
    "if types": (
        "%x = if (%q) : text then {\nyield %q\n} else {\nyield %n\n}",
        "F024",
        "result `%x` of `if` has type text, but receives int",
        None,
    ),
    "if loses types": (
        "%x = if (%q) : text then {\nyield %q\n} else {\nyield %a\n}",
        "F024",
        "has type text, but receives any",
        None,
    ),
    "if parameters": (
        "if (%q) then (%z: any) {\n} else {\n}",
        "F024",
        "region `then` of `if` has 1 parameter, not 0",
        None,
    ),
    "while parameters": (
        "%x = while (%q) {limit = 1} : text cond {\nyield %q\n} body (%f: text) {\nyield %f, %f\n}",
        "F024",
        "region `cond` of `while` has 0 parameters, not 1",
        None,
    ),
    "while condition": (
        "%x = while (%q) {limit = 1} : text cond (%c: text) {\nyield %c, %c\n} body (%f: text) {\nyield %f, %f\n}",
        "F024",
        "region `cond` of `while` yields 2 values, not 1",
        None,
    ),
    "while again": (
        "%x = while (%q) {limit = 1} : text cond (%c: text) {\nyield %c\n} body (%f: text) {\nyield %f\n}",
        "F024",
        "region `body` of `while` yields 1 value, not 2",
        None,
    ),
    "while results": (
        "while (%q) {limit = 1} cond (%c: text) {\nyield %c\n} body (%f: text) {\nyield %f\n}",
        "F024",
        "`while` carries 1 value, but has 0 results",
        None,
    ),
    "while types": (
        "%x = while (%q) {limit = 1} : any cond (%c: text) {\nyield %c\n} body (%f: text) {\nyield %f, %n\n}",
        "F024",
        "carried `%c` of `while` has type text, but receives int",
        None,
    ),
    "while result's type": (
        "%x = while (%q) {limit = 1} : int cond (%c: any) {\nyield %c\n} body (%f: any) {\nyield %f, %f\n}",
        "F024",
        "result `%x` of `while` has type int, but receives any",
        None,
    ),
    "foreach over nothing": ("foreach body (%i: any) {\n}", "F024", "`foreach` has no operand to go over", None),
    "foreach parameters": (
        "foreach (%l) body {\n}",
        "F024",
        "region `body` of `foreach` has 0 parameters, not 1",
        None,
    ),
    "foreach item's type": (
        "foreach (%l) body (%i: int) {\n}",
        "F024",
        "parameter `%i` of `foreach` has type int, but receives text",
        None,
    ),
    "foreach yields": (
        "foreach (%l) body (%i: text) {\nyield %i\n}",
        "F024",
        "region `body` of `foreach` yields 1 value, not 0",
        None,
    ),
    "foreach breaks": ("foreach (%l) {breaks = true} body (%i: text) {\n}", "F024", "yields 0 values, not 1", None),
    "foreach carries": (
        "%x = foreach (%l, %q) : any body (%i: text, %c: text) {\nyield %n\n}",
        "F024",
        "carried `%c` of `foreach` has type text, but receives int",
        None,
    ),
    "foreach carries over nothing": (
        "%x = foreach (%l, %a) : text body (%i: text, %c: any) {\nyield %i\n}",
        "F024",
        "result `%x` of `foreach` has type text, but receives any",
        None,
    ),
    "foreach collects": (
        "%x = foreach (%l) {collects = 1} : any body (%i: text) {\nyield %i\n}",
        "F024",
        "`foreach` collects lists, but `%i` is a text",
        None,
    ),
    "foreach results": (
        "%x = foreach (%l) : any body (%i: text) {\nyield %i\n}",
        "F024",
        "carries 0 values and collects 0 lists, but has 1 result",
        None,
    ),
    "try yields": ("%x = try : any body {\n}", "F024", "region `body` of `try` yields 0 values, not 1", None),
    "try handler yields": (
        "%x = try : any body {\nyield %q\n} except (%e: any) {\n}",
        "F024",
        "region `except` of `try` yields 0 values",
        None,
    ),
    "try handler's error": (
        'try body {\n} except "KeyError" {\n}',
        "F024",
        "region `except KeyError` of `try` has 1 parameter, the error, here 0",
        None,
    ),
    "try types": (
        "%x = try : text body {\nyield %q\n} except (%e: any) {\nyield %e\n}",
        "F024",
        "has type text, but receives any",
        None,
    ),
    "try handlers": (
        'try {handlers = ("", "")} body {\n} except (%e: any) {\n}',
        "F024",
        "`try` has 2 handlers for 1 handler region",
        None,
    ),
    "fused yields": ("%x = fused : any body {\n}", "F024", "region `body` of `fused` yields 0 values, not 1", None),
    "call arguments": ("%x = call @other (%q) : docs", "F024", "@other takes 2 arguments, here 1", None),
    "call results": ("%x, %y = call @other (%q, %d) : docs, docs", "F024", "`call` has 1 result, here 2", None),
    "call result's type": ("%x = call @other (%q, %d) : text", "F024", "@other returns docs, not text", None),
    # F025: names
    "no callee": ("%x = call @othr (%q, %d) : docs", "F025", "there is no workflow @othr", "did you mean @other?"),
    "callee missing": ("%x = call (%q) : any", "F025", "`call` lacks its attribute `callee`", None),
    "no resource": ("%x = search (%q) : docs", "F025", "`search` lacks its attribute `resource`", None),
    "empty resource": ('%x = search (%q) {resource = ""} : docs', "F025", "`search` names no resource", None),
    "resource's type": ("%x = search (%q) {resource = 3} : docs", "F025", "`search` names no resource", None),
    "no tool": ("%x = tool (%q) : any", "F025", "`tool` lacks its attribute `tool`", None),
    "no cell": ("%x = load (%q) : any", "F025", "`load` takes a cell, but `%q` is none", "the result of a `cell`"),
    "cell as a value": (
        "%c = cell (%q) : any\n%x = append (%l, %c) : any",
        "F025",
        "operand `%c` is a cell, which only `load` and `store` take",
        None,
    ),
    "cell in a cell": (
        "%c = cell (%q) : any\n%y = store (%c, %c) : none",
        "F025",
        "`%c` is a cell, which cannot be stored",
        None,
    ),
    "cell yielded": (
        "%x = fused : any body {\n%c = cell (%q) : any\nyield %c\n}",
        "F025",
        "yielded value `%c` is a cell",
        None,
    ),
    "store into no cell": ("%x = undef : any\n%y = store (%x, %q) : none", "F025", "`store` takes a cell", None),
    # F026: Python
    "syntax": (
        '%x = py "1 +" : any',
        "F026",
        "the source of `py` is no Python expression: invalid syntax (line 1)",
        None,
    ),
    "a statement": ('%x = py "y = 1" : any', "F026", "no Python expression", None),
    "statements": ('%x = py "for" {outs = ("x",)} : any', "F026", "no Python text", None),
    "null byte": ('%x = py "\\x00" : any', "F026", "no Python expression", None),
    "expression's results": (
        '%x, %y = py "1" : any, any',
        "F026",
        "a Python expression has 1 result, here 2",
        "`outs`",
    ),
    "outs": ('%x = py "y = 1" {outs = ("x", "y")} : any', "F026", "`py` has 2 names in `outs` for 1 result", None),
    "params": ('%x = py "1" (%q) {params = ("a", "b")} : any', "F026", "2 names in `params` for 1 operand", None),
    "params twice": ('%x = py "a" (a=%q, a=%n) : any', "F026", "a name twice in `params`", None),
    "params are names": ('%x = py "1" ("a b"=%q) : any', "F026", '"a b" in `params` of `py` is no Python name', None),
    "params are no keywords": ('%x = py "1" (for=%q) : any', "F026", "is no Python name", None),
    "handler": ('try body {\n} except "for" (%e: any) {\n}', "F026", "the handler 'for' is no Python expression", None),
    "handler's names": (
        "try (%q) {params = (), handlers = ()} body {\n}",
        "F026",
        "0 names in `params` for 1 operand",
        None,
    ),
    # F027: fused
    "fused lane": ("fused body {\n%x = search @i (%q) : docs\n}", "F027", "`fused` holds `search`", None),
    "fused await inside": (
        'fused body {\nforeach (%l) body (%i: text) {\n%x = py "await f()" {is_async = true} : any\n}\n}',
        "F027",
        "`fused` holds `foreach`",
        None,
    ),
    "fused call": ("fused body {\n%x = call @other (%q, %d) : docs\n}", "F027", "`fused` holds `call`", None),
    "fused lane inside": (
        "fused body {\nforeach (%l) body (%i: text) {\n%x = embed @e (%i) : vector\n}\n}",
        "F027",
        "holds `foreach`",
        None,
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule(case: str) -> None:
    body, code, message, hint = BROKEN[case]
    found = error(parsed(body))
    assert (found.code, message) == (code, message if message in found.message else found.message)
    assert hint is None or hint in (found.hint or ""), found.hint
    assert "in workflow @w: " in found.message  # the operation is shown, where no source line is


def test_what_the_broken_rules_are_made_from_is_well_formed() -> None:
    verify(parsed(""))


X = Value("x", ANY)
Y = Value("y", ANY)


def holding(*ops: Op, result: Value = X) -> Graph:
    return Graph("w", Region((X,), ops, (result,)), loc=Loc("w.py", 1))


@pytest.mark.parametrize(
    ("graph", "code", "message"),
    [
        (holding(Op("embedd", (X,), (Y,))), "F023", "there is no operation `embedd`"),
        (holding(Op("append", (Y, X), (Y,))), "F022", "operand `%y` is not defined before this use"),
        (holding(result=Y), "F022", "returned value `%y` is not defined"),
        (holding(Op("undef", (), (X,))), "F022", "value `%x` is defined twice in workflow @w"),
        (holding(Op("undef", (), (Y,)), Op("undef", (), (Y,))), "F022", "`%y` is defined twice"),
        (
            holding(Op("append", (Value("x", TEXT), X), (Y,))),
            "F022",
            "`%x` has type text here, but is defined with type any",
        ),
        (
            holding(Op("if", (X,), (), regions=(Region((), (Op("undef", (), (Y,)),)), Region())), result=Y),
            "F022",
            "does not enclose",
        ),
        (holding(Op("if", (X,), (), regions=(Region((), (), (Y,)), Region()))), "F024", "yields 1 value, not 0"),
        (
            holding(Op("if", (X,), (Value("r", ANY),), regions=(Region((), (), (Y,)),) * 2)),
            "F022",
            "yielded value `%y`",
        ),
        (holding(Op("if", (X,), regions=(Region(),))), "F024", "`if` has 2 regions, here 1"),
        (holding(Op("undef", (), (Y,), regions=(Region(),))), "F024", "`undef` has 0 regions, here 1"),
        (holding(Op("tool", (), (Y,), Attrs(tool="f", kw=("a",)))), "F024", "1 keyword name for 0 operands"),
        (holding(Op("tool", (X, X), (Y,), Attrs(tool="f", kw=("a", "a")))), "F024", "a keyword operand twice"),
        (holding(Op("py", (), (Y,), Attrs(source="1"))), "F023", "`py` lacks its attribute `params`"),
        (Graph("w", Region((X, X), (), (X,))), "F022", "`%x` is defined twice"),
        (Graph("w", Region((X,))), "F020", "a workflow returns 1 value, @w returns 0"),
        (Graph("w", Region((X,), (), (X, X))), "F020", "returns 2"),
        (Graph("", Region((X,), (), (X,))), "F020", "a workflow has a name"),
        (
            replace(holding(), callees=(holding(Op("undef", (), (Y,))),)),
            "F020",
            "two different workflows are called @w",
        ),
        (replace(holding(), callees=(Graph("v", Region((X,))),)), "F020", "@v returns 0"),
    ],
)
def test_a_broken_rule_that_no_text_can_say(graph: Graph, code: str, message: str) -> None:
    found = error(graph)
    assert found.code == code
    assert message in found.message


@pytest.mark.parametrize("value", [[1], {"a": 1}, object(), ([],), 1j])
def test_an_attribute_that_is_no_literal(value: Any) -> None:
    found = error(holding(Op("const", (), (Y,), Attrs(value=value))))
    assert found.code == "F023"


def test_a_type_mismatch_reads_as_the_users_mistake(tmp_path: Any) -> None:
    path = tmp_path / "qa.py"
    path.write_text("def qa(question):\n    notes = docs.search(question)\n    return docs.search(notes)\n")
    b = Builder("qa", [("question", TEXT)], loc=Loc(str(path), 1))
    b.loc = Loc(str(path), 2, 12, 33)
    notes = b.search("pydocs", b.params[0], hint="notes")
    b.loc = Loc(str(path), 3, 11, 29)
    assert str(error(b.finish(b.search("pydocs", notes)))) == (
        "error[F021]: `search @pydocs` takes a text as the query, but is given search results\n"
        f"  --> {path}:3:12\n"
        "  |\n"
        "3 |     return docs.search(notes)\n"
        "  |            ^^^^^^^^^^^^^^^^^^\n"
        f"hint: `%notes` is what `search` gives ({path}:2:13); pass a text: `notes[0].text` is the best passage, "
        'f"{notes}" all of them as a numbered list'
    )


def test_a_name_may_be_used_inside_any_region_below_its_definition() -> None:
    verify(
        parsed(
            "%c = cell (%q) : any\n"
            "if (%a) then {\n foreach (%l) body (%i: text) {\n  %s = store (%c, %i) : none\n }\n"
            "} else {\n %v = load (%c) : any\n}"
        )
    )


def test_a_callee_is_found_wherever_the_whole_holds_it() -> None:
    inner = parse_graph("workflow @inner(%x: any) -> any {\n  %y = call @outer (%x) : any\n  return %y\n}")
    outer = parse_graph("workflow @outer(%x: any) -> any {\n  %y = call @inner (%x) : any\n  return %y\n}")
    verify(replace(outer, callees=(inner,)))
    assert error(outer).code == "F025"


@given(graphs())
@settings(max_examples=100)
def test_random_graphs_verify(graph: Graph) -> None:
    verify(graph)


@given(graphs(), st.data())
@settings(max_examples=200)
def test_a_definition_that_is_gone_is_missed(graph: Graph, data: st.DataObject) -> None:
    """Drops one operation: the graph still verifies exactly if nothing used its results."""
    positions = range(len(graph.body.ops))
    if not positions:
        return
    at = data.draw(st.sampled_from(positions))
    gone = {v.name for v in graph.body.ops[at].results}
    ops = graph.body.ops[:at] + graph.body.ops[at + 1 :]
    used = {v.name for op in walk(graph.body) for v in op.operands}
    used |= {v.name for op in walk(graph.body) for r in op.regions for v in r.yields}
    used |= {v.name for v in graph.body.yields}
    broken = graph.with_body(replace(graph.body, ops=ops))
    if gone & used:
        assert error(broken).code == "F022"
    else:
        verify(broken)
    assert all(print_graph(g) for g in all_graphs(broken))


@pytest.mark.parametrize(
    ("expected", "actual", "holds"),
    [
        (ANY, TEXT, True),
        (TEXT, ANY, False),
        (TEXT, NEVER, True),
        (list_of(ANY), list_of(TEXT), True),
        (list_of(TEXT), list_of(ANY), False),
        (list_of(TEXT), list_of(NEVER), True),
        (tuple_of(TEXT, ANY), tuple_of(TEXT, INT), True),
        (tuple_of(TEXT), tuple_of(TEXT, INT), False),
        (DOCS, TEXT, False),
    ],
)
def test_subsumes(expected: Any, actual: Any, holds: bool) -> None:
    assert subsumes(expected, actual) is holds


def test_a_warning_is_no_error() -> None:
    verify(parsed("%x = py \"'\\\\d' is None\" : any"))  # warnings are errors in these tests


def test_the_operation_in_a_message_is_short() -> None:
    found = error(parsed(f'%x = template "{"x" * 5000} {{" : text'))
    assert len(found.message) < 500
    assert re.search(r"in workflow @w: %x = template .* \.\.\.$", found.message)
