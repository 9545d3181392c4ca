"""The `.flow` test format: what it reads, what it refuses, what it writes."""

import re
from pathlib import Path

import pytest

from tests import flowfile

TWICE = """\
workflow @w(%q: text) -> docs {
  %a = search @pydocs (%q) {k = 4} : docs
  %b = search @pydocs (%q) {k = 4} : docs
  %c = rerank @r (%q, %a) : docs
  %d = rerank @r (%q, %b) : docs
  %e = py "a + b" (a=%c, b=%d) : docs
  return %e
}"""
ONCE = """\
workflow @w(%q: text) -> docs {
  %a = search @pydocs (%q) {k = 4} : docs
  %c = rerank @r (%q, %a) : docs
  %e = py "a + b" (a=%c, b=%c) : docs
  return %e
}"""
FILE = f"""\
# the second search is the first
# pass: cse
# and so is the rerank
{TWICE}
# after
{ONCE}
# -----
# one search is one search
# pass: cse
{ONCE}
# unchanged
"""


def test_split_and_join() -> None:
    cases = flowfile.split(FILE, "w.flow")
    assert [(c.title, c.passes, c.line, c.after is None) for c in cases] == [
        ("the second search is the first", "cse", 1, False),
        ("one search is one search", "cse", 20, True),
    ]
    assert flowfile.join(cases) == FILE
    for case in cases:
        case.check()


def test_a_pass_that_does_something_else_is_shown_as_a_diff() -> None:
    case = flowfile.split(FILE.replace("# after\n" + ONCE, "# unchanged"), "w.flow")[0]
    with pytest.raises(flowfile.Differs, match=r"w\.flow:1: the second search") as caught:
        case.check()
    assert "-  %b = search @pydocs (%q) {k = 4} : docs" in str(caught.value)
    case = flowfile.split(FILE.replace("# unchanged", "# after\n" + TWICE), "w.flow")[1]
    with pytest.raises(flowfile.Differs, match=r"\+  %e = py"):
        case.check()


def test_errors_point_into_the_file() -> None:
    case = flowfile.split(FILE.replace("rerank @r (%q, %a) : docs\n  %e", "rerank @r (%q, %z) : docs\n  %e"), "w.flow")
    with pytest.raises(Exception, match=re.escape("--> w.flow:15:23")):
        case[0].check()
    with pytest.raises(Exception, match=re.escape("--> w.flow:24:23")):
        case[1].check()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TWICE, "w.flow:1: a case begins with a comment"),
        ("# title\n" + TWICE + "\n# unchanged", "one `# pass: NAME`"),
        ("# title\n# pass: cse\n" + TWICE, "needs one line `# after` or `# unchanged`"),
        (FILE + "# -----\n", "w.flow:30: a case begins"),
        (FILE + ONCE, "w.flow:29: text after `# unchanged`"),
        (FILE.replace("# -----\n", ""), "needs one line"),
    ],
)
def test_a_malformed_file(text: str, message: str) -> None:
    with pytest.raises(flowfile.Malformed, match=re.escape(message)):
        flowfile.split(text, "w.flow")


def test_from_docstring() -> None:
    indented = [re.sub("^", "    ", t, flags=re.MULTILINE) for t in (TWICE, ONCE)]
    flowfile.from_docstring(f"Does it.\n\nBefore:\n{indented[0]}\nAfter:\n{indented[1]}\n\nSource: x\n", "cse").check()
    with pytest.raises(flowfile.Malformed):
        flowfile.from_docstring("Does it.\n", "cse")


def test_as_pytest_sees_it(pytester: pytest.Pytester, root: Path) -> None:
    pytester.makeini(f"[pytest]\npythonpath = {root} {root / 'src'}\naddopts = -p tests.flowfile -p no:cacheprovider")
    path = pytester.makefile(".flow", passes=FILE.replace("# after\n" + ONCE, "# unchanged"))
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*the second search is the first*", "*pytest --update-golden*"])
    pytester.runpytest_subprocess("--update-golden").assert_outcomes(passed=2)
    assert path.read_text() == FILE
    pytester.runpytest_subprocess().assert_outcomes(passed=2)
    pytester.makefile(".flow", broken="workflow @w")
    result = pytester.runpytest_subprocess("broken.flow")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*broken.flow:1: a case begins with a comment*"])
