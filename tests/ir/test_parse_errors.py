"""Malformed text: the code, the line, the column, and what to do."""

import pytest

from flowc.ir.errors import ParseError
from flowc.ir.parser import MAX_DEPTH, parse_graph

HEAD = "workflow @w(%q: text, %n: int) -> text {\n"


def error(text: str) -> ParseError:
    with pytest.raises(ParseError) as caught:
        parse_graph(text, "w.flow")
    return caught.value


def test_the_whole_message() -> None:
    text = HEAD + "  %docs = serch @pydocs (%q) {k = 5} : docs\n  return %q\n}\n"
    assert str(error(text)) == (
        "error[F033]: there is no operation `serch`\n"
        "  --> w.flow:2:11\n"
        "  |\n"
        "2 |   %docs = serch @pydocs (%q) {k = 5} : docs\n"
        "  |           ^^^^^\n"
        "hint: did you mean `search`?"
    )


# text after the head; code, line, column; a part of the message; a part of the hint
CASES = {
    "undefined": ("  return %r\n}", "F031", 2, 10, "no value `%r` is visible here", "visible here: `%q`, `%n`"),
    "misspelt": ("  return %qq\n}", "F031", 2, 10, "no value `%qq`", "did you mean `%q`?"),
    "later": (
        "  %a = append (%b, %q) : any\n  %b = const 1 : int\n  return %q\n}",
        "F031",
        2,
        16,
        "no value `%b`",
        "it is defined later, in line 3",
    ),
    "ended": (
        "  if (%q) then {\n    %a = const 1 : int\n  } else {\n    %b = append (%a, %a) : any\n  }\n  return %q\n}",
        "F031",
        5,
        18,
        "no value `%a`",
        "in line 3, in a region that has ended: let the region yield it",
    ),
    "itself": ("  %a = append (%a, %q) : any\n  return %q\n}", "F031", 2, 16, "no value `%a`", "defined later"),
    "twice": ("  %q = const 1 : int\n  return %q\n}", "F032", 2, 3, "`%q` is defined twice: first in line 1", "`%q.1`"),
    "twice inside": (
        "  if (%q) then {\n    %a = const 1 : int\n  } else {\n    %a = const 1 : int\n  }\n  return %q\n}",
        "F032",
        5,
        5,
        "`%a` is defined twice: first in line 3",
        "in all its regions",
    ),
    "operation": ("  %a = embd @e (%q) : vector\n  return %q\n}", "F033", 2, 8, "no operation `embd`", "`embed`"),
    "operation unlike any": ("  %a = xyzzy (%q) : any\n  return %q\n}", "F033", 2, 8, "`xyzzy`", "there are: const,"),
    "type": ("  %a = const 1 : integer\n  return %q\n}", "F034", 2, 18, "no type `integer`", "did you mean `int`?"),
    "type misspelt": ("  %a = undef : txt\n  return %q\n}", "F034", 2, 16, "no type `txt`", "did you mean `text`?"),
    "type argument misspelt": ("  %a = undef : list<txt>\n  return %q\n}", "F034", 2, 21, "no type `txt`", "`text`?"),
    "type without arguments": ("  %a = undef : list\n  return %q\n}", "F034", 2, 16, "takes arguments", "list<text>"),
    "type with too many": ("  %a = undef : list<any, any>\n  return %q\n}", "F034", 2, 16, "takes 1 argument", None),
    "type that takes none": ("  %a = undef : text<any>\n  return %q\n}", "F034", 2, 16, "takes no arguments", None),
    "result": ("  return %n\n}", "F034", 1, 35, "is declared to return text, but returns int", None),
    "no result": ("}", "F034", 1, 35, "is declared to return text, but returns nothing", None),
    "no sigil": ("  a = const 1 : int\n  return %q\n}", "F030", 2, 5, "unexpected `=`", "write `%a = ...`"),
    "no bracket": ("  %a = embed @e (%q : vector\n}", "F030", 2, 21, "unexpected `:`; expected `)` or `,`", None),
    "no brace": ("  return %q\n", "F030", 2, 12, "the text ends here; expected `,` or `}`", "a `{` has no `}`"),
    "no types": ("  %a, %b = undef : any\n  return %q\n}", "F030", 2, 12, "2 result(s) but 1 type(s)", "each result"),
    "too many types": ("  %a = undef : any, text\n  return %q\n}", "F030", 2, 21, "1 result(s) but 2 type(s)", None),
    "same line": ("  undef undef\n  return %q\n}", "F030", 2, 9, "an operation begins on a new line", None),
    "literal": (
        "  %a = const None : any\n  return %q\n}",
        "F030",
        2,
        14,
        "unexpected `None`",
        "`true`, `false` and `none`",
    ),
    "single quotes": (
        "  %a = const 'x' : text\n  return %q\n}",
        "F030",
        2,
        14,
        "unexpected character",
        "double quotes",
    ),
    "open quote": ('  %a = const "x : text\n  return %q\n}', "F030", 2, 14, "no closing quote on its line", "`\\n`"),
    "open block": ('  %a = const """\n  x\n  return %q\n}', "F030", 2, 14, "this block is not closed", None),
    "block on one line": ('  %a = const """x""" : any\n  return %q\n}', "F030", 2, 14, "not begin with a line", None),
    "block indent": ('  %a = const """\n  x\n    """ : any\n  return %q\n}', "F030", 2, 14, "indented less", None),
    "block end": ('  %a = const """\n  x""" : any\n  return %q\n}', "F030", 2, 14, "on a line of its own", None),
    "escape": ('  %a = const "\\q" : text\n  return %q\n}', "F030", 2, 14, "`\\q` is no escape", "`\\\\`"),
    "no character": ('  %a = const "\\U00110000" : text\n  return %q\n}', "F030", 2, 14, "is no character", None),
    "no byte": ('  %a = const b"é\\u1234" : bytes\n  return %q\n}', "F030", 2, 14, "a byte is written", None),
    "long integer": (f"  %a = const {'9' * 5000} : int\n  return %q\n}}", "F030", 2, 14, "in base 16", None),
    "attribute twice": ("  %a = undef {wave = 1, wave = 2} : any\n}", "F030", 2, 25, "`wave` is given twice", None),
    "main attribute twice": (
        "  %a = const 1 {value = 2} : any\n}",
        "F030",
        2,
        8,
        "`value` of `const` is given twice",
        None,
    ),
    "resource twice": ('  %a = embed @e (%q) {resource = "f"} : vector\n}', "F030", 2, 8, "given twice", None),
    "no main attribute": ("  %a = append 1 (%q, %q) : any\n}", "F030", 2, 8, "`append` takes no literal", "in braces"),
    "no symbol": ("  %a = append @x (%q, %q) : any\n}", "F030", 2, 8, "`append` takes no @name", None),
    "keywords first": ("  %a = tool @f (k=%q, %n) : any\n}", "F030", 2, 23, "follows one with a name", None),
    "keywords said twice": ('  %a = tool @f (k=%q) {kw = ("k",)} : any\n}', "F030", 2, 8, "the same thing", None),
    "handlers said twice": (
        '  try {handlers = ("",)} body {\n  } except "KeyError" (%e: any) {\n  }\n  return %q\n}',
        "F030",
        2,
        3,
        "the same thing",
        None,
    ),
    "region missing": (
        "  if (%q) then {\n  }\n  return %q\n}",
        "F030",
        2,
        3,
        "the regions of `if` are `then`, `else`",
        None,
    ),
    "region wrong": ("  if (%q) then {\n  } body {\n  }\n}", "F030", 3, 5, "here: `then`, `body`", None),
    "region guarded": ('  if (%q) then "x" {\n  } else {\n  }\n}', "F030", 2, 16, "only `except` has a text", None),
    "region of none": ("  undef then {\n  }\n  return %q\n}", "F030", 2, 9, "the regions of `undef` are none", None),
    "return inside": (
        "  if (%q) then { return %q } else {\n  }\n}",
        "F030",
        2,
        18,
        "unexpected `return`",
        "with `yield`",
    ),
    "yield outside": ("  yield %q\n}", "F030", 2, 3, "unexpected `yield`", "a workflow ends with `return`"),
    "location": ("  undef loc(x)\n  return %q\n}", "F030", 2, 9, "malformed location", 'loc("file.py":LINE'),
    "location without file": ("  undef loc(3)\n  return %q\n}", "F030", 2, 9, "names no file", 'loc("file.py":8)'),
    "column 0": ('  undef loc("a":1:0)\n  return %q\n}', "F030", 2, 9, "columns count from 1", None),
    "second workflow": (
        "  return %q\n}\nworkflow @w() {\n}",
        "F032",
        4,
        10,
        "@w is defined twice: first in line 1",
        None,
    ),
    "unused workflow": (
        "  return %q\n}\nworkflow @v() {\n}",
        "F030",
        4,
        10,
        "@v is not part of @w",
        "list it after `calls`",
    ),
    "character": ("  return %q ; %n\n}", "F030", 2, 13, "unexpected character ';'; expected `,` or `}`", None),
}


@pytest.mark.parametrize("case", CASES)
def test_place_and_words(case: str) -> None:
    text, code, line, column, message, hint = CASES[case]
    found = error(HEAD + text)
    assert found.loc is not None
    assert (found.code, found.loc.file, found.loc.line, found.loc.col + 1) == (code, "w.flow", line, column), str(found)
    assert message in found.message
    assert (hint is None) or (hint in (found.hint or "")), str(found)
    assert (HEAD + text).split("\n")[line - 1].rstrip() in str(found)  # the line is shown


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "the text is empty", "workflow @name"),
        ("  \n\n# only a comment\n", "the text ends here", None),
        ("= 1", "unexpected `=`; expected `workflow`", None),
        ("hello", "expected `workflow`", None),
        ("workflow w() {}", "expected a name such as `@docs`", None),
        ("workflow @w()", "the text ends here", None),
        ("workflow @w() calls @v {\n}", "this text defines no workflow @v", None),
        ("workflow @w() calls @w {\n}", "round in a circle", None),
        ("\x00", "unexpected character '\\x00'", None),
    ],
)
def test_a_text_that_is_no_workflow(text: str, message: str, hint: str | None) -> None:
    found = error(text)
    assert message in str(found)
    assert hint is None or hint in str(found)


def test_the_bound_on_nesting() -> None:
    def nested(depth: int) -> str:
        return HEAD + "if (%q) then {\n" * depth + "} else {\n}\n" * depth + "return %q\n}"

    parse_graph(nested(MAX_DEPTH - 1))
    assert "nested more than" in error(nested(MAX_DEPTH)).message
    assert "nested more than" in error(nested(5000)).message
    assert "nested more than" in error(HEAD + f"%a = undef : {'list<' * 9999}any{'>' * 9999}\n}}").message
    assert "nested more than" in error(HEAD + f"%a = const {'(' * 9999}1,{'),' * 9998}) : any\n}}").message
    parse_graph(
        "workflow @w() -> any {\n" + f"%a = const {'(' * 100}{',)'.join(['()'] * 1)}{',)' * 100} : any\nreturn %a\n}}"
    )


def test_comments_and_line_ends() -> None:
    text = "# a comment\r\nworkflow @w(%q: text) -> text { # here too\r\n  return %q\r\n}\r\n"
    assert parse_graph(text) == parse_graph("workflow @w(%q: text) -> text {\n  return %q\n}")
