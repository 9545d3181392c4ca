"""Collects `.flow` files as tests of passes: IR text before and after.

    # the second search is the first
    # pass: cse
    workflow @w(%q: text) -> docs {
      ...
    }
    # after
    workflow @w(%q: text) -> docs {
      ...
    }
    # -----
    # two indexes are two searches
    # pass: cse
    workflow @w(%q: text) -> docs {
      ...
    }
    # unchanged

The first comment of a case is its title, further ones say why; `# pass:` takes what `flowc opt -p` takes, or a level
such as `-O2`; `# rates: substage_s=0.01, ...` changes rates of the cost model. A case that ends in `# unchanged`, or
whose output equals its input, says where a pass must not fire. Both texts must verify, and the passes must find no
more to do in what they made. `pytest --update-golden` writes outputs; read the diff before committing it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from flowc.ir.core import Graph
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify

BETWEEN = "# -----"
AFTER = "# after"
UNCHANGED = "# unchanged"


class Malformed(Exception):
    """A `.flow` file that is no list of cases."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case. `line` is where it begins in `file`; `after` is None for one that must not change anything."""

    title: str
    passes: str
    head: tuple[str, ...]
    before: str
    after: str | None
    file: str = "<case>"
    line: int = 1
    after_line: int = 1
    rates: tuple[tuple[str, float], ...] = ()

    def parse_before(self) -> Graph:
        return parse_graph("\n" * (self.line - 1 + len(self.head)) + self.before, self.file)

    def parse_after(self) -> Graph:
        if self.after is None:
            return self.parse_before()
        return parse_graph("\n" * (self.after_line - 1) + self.after, self.file)

    def run(self) -> Graph:
        """What the passes make of the input."""
        before = self.parse_before()
        verify(before)
        return apply(self.passes, before, dict(self.rates))

    def check(self) -> None:
        """Fails with a diff if the passes make something else than the case says."""
        found, expected = self.run(), self.parse_after()
        if found != expected:
            raise Differs(self, print_graph(expected), print_graph(found))
        verify(found)
        again = apply(self.passes, found, dict(self.rates))
        if again != found:
            raise Differs(self, print_graph(found), print_graph(again), "running the passes again changes the output:")

    def text(self) -> str:
        after = [UNCHANGED] if self.after is None else [AFTER, self.after]
        return "\n".join([*self.head, self.before, *after])


class Differs(AssertionError):
    """The passes made something else than the case says."""

    def __init__(self, case: Case, expected: str, found: str, message: str = "the passes made something else:") -> None:
        diff = difflib.unified_diff(expected.splitlines(), found.splitlines(), "expected", "found", n=2, lineterm="")
        hint = "if the new output is right: pytest --update-golden"
        super().__init__("\n".join([f"{case.file}:{case.line}: {case.title}", message, *diff, hint]))


def apply(passes: str, graph: Graph, rates: Mapping[str, float]) -> Graph:
    """The graph after the passes, verified after each."""
    from flowc.passes.cost import CostModel
    from flowc.passes.manager import PassManager, parse_pipeline, pipeline

    level = re.fullmatch(r"-O(\d)", passes)
    steps = pipeline(int(level[1])) if level else parse_pipeline(passes)
    return PassManager(steps, verify_each=True, costs=CostModel(rates)).run(graph).graph


def split(text: str, file: str = "<cases>") -> list[Case]:
    """The cases of a `.flow` file."""
    cases: list[Case] = []
    lines: list[str] = []
    begin = 1
    for number, line in enumerate([*text.rstrip("\n").split("\n"), BETWEEN], 1):
        if line.rstrip() != BETWEEN:
            lines.append(line)
            continue
        cases.append(_case(lines, file, begin))
        lines, begin = [], number + 1
    return cases


def _case(lines: list[str], file: str, begin: int) -> Case:
    head = 0
    while head < len(lines) and (lines[head].startswith("#") or not lines[head].strip()):
        head += 1
    comments = [line[1:].strip() for line in lines[:head] if line.startswith("#")]
    named = [c.removeprefix("pass:").strip() for c in comments if c.startswith("pass:")]
    rates = [c.removeprefix("rates:") for c in comments if c.startswith("rates:")]
    titles = [c for c in comments if not c.startswith(("pass:", "rates:"))]
    if not titles or len(named) != 1:
        raise Malformed(f"{file}:{begin}: a case begins with a comment, its title, and one `# pass: NAME`")
    ends = [i for i, line in enumerate(lines) if line.rstrip() in (AFTER, UNCHANGED)]
    if len(ends) != 1:
        raise Malformed(f"{file}:{begin}: case {titles[0]!r} needs one line `{AFTER}` or `{UNCHANGED}`")
    (end,) = ends
    after = "\n".join(lines[end + 1 :])
    if lines[end].rstrip() == UNCHANGED and after.strip():
        raise Malformed(f"{file}:{begin + end + 1}: text after `{UNCHANGED}`")
    before = "\n".join(lines[head:end])
    has_after = lines[end].rstrip() == AFTER
    return Case(
        *(titles[0], named[0], tuple(lines[:head]), before, after if has_after else None),
        *(file, begin, begin + end + 1, _rates(",".join(rates))),
    )


def _rates(text: str) -> tuple[tuple[str, float], ...]:
    """The rates that `name=seconds, name=seconds` gives."""
    return tuple((name.strip(), float(rate)) for name, _, rate in (p.partition("=") for p in text.split(",")) if name)


def join(cases: Iterable[Case]) -> str:
    """The text of a `.flow` file with these cases."""
    return f"\n{BETWEEN}\n".join(case.text() for case in cases) + "\n"


def from_docstring(text: str, passes: str) -> Case:
    """The `Before:` and `After:` of a pass's docstring as a case."""
    found = re.search(r"^Before:\n((?:    .*\n|\n)+)After:\n((?:    .*\n)+)", text, re.MULTILINE)
    if found is None:
        raise Malformed("the docstring has no `Before:` and `After:` with indented IR text")
    rates = re.search(r"^Rates: (.*)\.$", text, re.MULTILINE)
    known = _rates(rates[1]) if rates is not None else ()
    return Case(f"docstring of {passes}", passes, (), found[1].rstrip("\n"), found[2].rstrip("\n"), rates=known)


def updated(case: Case) -> Case:
    """The case with what the passes make now as its output."""
    found, before = case.run(), case.parse_before()
    return replace(case, after=None if found == before else print_graph(found).rstrip("\n"))


class FlowFile(pytest.File):
    def collect(self) -> Iterator[FlowCase]:
        try:
            cases = split(self.path.read_text(encoding="utf-8"), str(self.path))
        except Malformed as e:
            raise self.CollectError(str(e)) from None
        for index, case in enumerate(cases):
            yield FlowCase.from_parent(self, name=case.title, case=case, index=index)


class FlowCase(pytest.Item):
    def __init__(self, *, case: Case, index: int, **rest: Any) -> None:
        super().__init__(**rest)
        self.case = case
        self.index = index

    def runtest(self) -> None:
        if not self.config.getoption("update_golden"):
            self.case.check()
            return
        new = updated(self.case)
        if new.parse_after() != self.case.parse_after():
            cases = split(self.path.read_text(encoding="utf-8"))  # as earlier cases have left it
            cases[self.index] = replace(cases[self.index], after=new.after)
            self.path.write_text(join(cases), encoding="utf-8")
        new.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, Differs):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.case.line - 1, self.case.title


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write what the passes make now into .flow files")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> FlowFile | None:
    if file_path.suffix != ".flow":
        return None
    return FlowFile.from_parent(parent, path=file_path)
