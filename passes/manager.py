"""Runs passes over a workflow, keeps every stage and every remark, and knows which passes make which level."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeVar

from flowc.ir.core import Graph, walk
from flowc.ir.errors import Loc, PassError
from flowc.ir.ops import keyword_operands
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify

from .core import Outcome, Pass, Remark
from .cost import CostModel
from .cse import Cse
from .dce import Dce
from .facts import count_ops, predicted_s
from .fold import Fold
from .fuse_py import FusePy
from .gain import Gain, show_s
from .hoist import Hoist
from .inline import Inline
from .kv_plan import KvPlan
from .licm import Licm
from .lookahead import Lookahead
from .pipeline_decode import PipelineDecode
from .place import Place
from .prefix_groups import PrefixGroups
from .prune_edges import PruneEdges
from .reorder_clusters import ReorderClusters
from .score_only import ScoreOnly
from .speculate import Speculate
from .split_generate import SplitGenerate
from .split_search import SplitSearch
from .wavefront import Wavefront

PASSES: Final[dict[str, type[Pass]]] = {
    cls.name: cls
    for cls in (
        Inline,
        Fold,
        Cse,
        Dce,
        Licm,
        PruneEdges,
        PipelineDecode,
        Hoist,
        SplitSearch,
        Speculate,
        ReorderClusters,
        SplitGenerate,
        ScoreOnly,
        Lookahead,
        KvPlan,
        PrefixGroups,
        Place,
        FusePy,
        Wavefront,
    )
}

_CLEAN: Final = "inline,fold,cse,dce,licm"
_PLAN: Final = "reorder-clusters,split-generate,score-only,lookahead,kv-plan,prefix-groups,place,fuse-py,wavefront"

PIPELINES: Final[dict[int, str]] = {
    0: "",
    1: f"{_CLEAN},fuse-py",
    2: f"{_CLEAN},prune-edges,pipeline-decode,split-search,{_PLAN}",
    3: f"{_CLEAN},prune-edges,pipeline-decode,hoist,split-search,speculate,{_PLAN}",
}
"""The passes of each -O level, in order. -O0 runs the workflow as written; -O1 cleans up and keeps program order; -O2
is every exact rewrite. -O3 adds the validated ones: work begun before it is certain that it is needed, whose result
counts only if it is what would have been computed."""


def pipeline(level: int) -> list[Pass]:
    """The passes of an -O level. PassError F040 if there is no such level."""
    if level not in PIPELINES:
        raise PassError(f"there is no optimisation level {level}", hint=f"levels are {', '.join(map(str, PIPELINES))}")
    return parse_pipeline(PIPELINES[level])


# -- the pipeline's text form
_NAME = re.compile(r"\s*([^\s,{}]*)\s*")
_OPTION = re.compile(r"\s*([^\s=,{}]*)\s*=\s*(\"[^\"]*\"|[^,{}]*?)\s*(?=[,}])")


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that a text such as `cse,dce,licm{max_ops=3}` names, in order.

    PassError F040 for an unknown pass, F041 for a bad option or a malformed text; both point into the text.
    """

    def fail(code: str, message: str, start: int, end: int, hint: str | None = None) -> PassError:
        line = text.count("\n", 0, start) + 1
        begin = text.rfind("\n", 0, start) + 1
        source = text[begin:].split("\n", 1)[0]
        loc = Loc("<pipeline>", line, start - begin, max(end, start + 1) - begin)
        return PassError(message, code=code, loc=loc, hint=hint, source=source)

    passes: list[Pass] = []
    at = 0
    while text[at:].strip():
        found = _NAME.match(text, at)
        assert found is not None
        name = found[1]
        start, at = found.start(1), found.end()
        if not name:
            raise fail(
                "F041", "expected the name of a pass", start, start + 1, "passes are separated by commas: `cse,dce`"
            )
        cls = PASSES.get(name)
        if cls is None:
            close = get_close_matches(name, PASSES, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"passes are {', '.join(PASSES)}"
            raise fail("F040", f"there is no pass `{name}`", start, start + len(name), hint)
        fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        options: dict[str, Any] = {}
        if at < len(text) and text[at] == "{":
            opened = at
            at += 1
            while at < len(text) and text[at] != "}":
                option = _OPTION.match(text, at)
                if option is None:
                    hint = "options are written `pass{name=value, name=value}`"
                    if "}" not in text[at:]:
                        raise fail("F041", "this `{` is not closed", opened, opened + 1, hint)
                    raise fail("F041", "expected `name=value`", at, text.index("}", at), hint)
                key, value = option[1], option[2]
                if key not in fields:
                    close = get_close_matches(key, fields, 1)
                    hint = f"did you mean `{close[0]}`?" if close else _known(name, fields)
                    raise fail("F041", f"pass `{name}` has no option `{key}`", option.start(1), option.end(1), hint)
                if key in options:
                    raise fail("F041", f"option `{key}` is given twice", option.start(1), option.end(1))
                try:
                    options[key] = _converted(value, fields[key].default)
                except ValueError as e:
                    raise fail(
                        "F041",
                        f"option `{key}` of `{name}` takes {e}, not `{value}`",
                        option.start(2),
                        option.end(2),
                        _known(name, fields),
                    ) from None
                at = option.end()
                if text[at] == ",":
                    at += 1
            if at >= len(text):
                raise fail("F041", "this `{` is not closed", opened, opened + 1)
            at += 1
            while at < len(text) and text[at].isspace():
                at += 1
        passes.append(cls(**options))
        if at < len(text):
            if text[at] != ",":
                raise fail(
                    "F041", f"expected a comma after `{name}`", at, at + 1, "passes are separated by commas: `cse,dce`"
                )
            at += 1
            if not text[at:].strip():
                raise fail("F041", "expected the name of a pass after the comma", at - 1, at)
    return passes


def _known(name: str, fields: dict[str, Any]) -> str:
    shown = ", ".join(f"`{f.name}={f.default}`" for f in fields.values())
    return f"options of `{name}`: {shown}" if shown else f"`{name}` has no options"


def _converted(text: str, default: object) -> object:
    """The option's value, of its default's type; ValueError says what it takes."""
    if isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
        raise ValueError("true or false")
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ValueError("a whole number") from None
    if isinstance(default, float):
        try:
            return float(text)
        except ValueError:
            raise ValueError("a number") from None
    return text.strip('"')


# -- running
@dataclass(frozen=True, slots=True)
class Stage:
    """The workflow after one pass. `seconds` is how long the pass took."""

    pass_name: str
    graph: Graph
    changed: bool
    seconds: float


@dataclass(frozen=True, slots=True)
class Compilation:
    """A workflow through its passes: as captured, after each pass, at the end, with all remarks in order."""

    captured: Graph
    graph: Graph
    stages: tuple[Stage, ...] = ()
    remarks: tuple[Remark, ...] = ()
    level: int | None = None
    costs: CostModel = dataclasses.field(default_factory=CostModel)

    def explain(self, gains: Mapping[str, Gain] | None = None) -> str:
        """What every pass did at every site and why, with source lines and predicted gains, as text.

        Beside the predictions stand the `gains` that runs have measured, by pass.
        """
        return "\n".join(_explain(self, gains or {})) + "\n"


@dataclass(frozen=True, slots=True)
class PassManager:
    """Runs passes in order. With `verify_each` the graph is verified before the first pass and after each.

    A pass that raises, or that leaves a graph which breaks a rule, ends in PassError F042. Its message names a file,
    written to `reproducer_dir` (the temporary folder if None), with the graph as it was before that pass.
    """

    passes: Sequence[Pass]
    verify_each: bool = False
    costs: CostModel = dataclasses.field(default_factory=CostModel)
    level: int | None = None
    reproducer_dir: Path | None = None

    def run(self, graph: Graph) -> Compilation:
        if self.verify_each:
            verify(graph)
        captured = graph
        stages = []
        remarks: list[Remark] = []
        for step in self.passes:
            started = perf_counter()
            try:
                outcome = self.apply(step, graph)
                if self.verify_each and outcome.graph is not graph:
                    verify(outcome.graph)
            except Exception as e:
                raise self.broken(step, graph, e) from e
            stages.append(Stage(step.name, outcome.graph, outcome.graph is not graph, perf_counter() - started))
            remarks += outcome.remarks
            graph = outcome.graph
        return Compilation(captured, graph, tuple(stages), tuple(remarks), self.level, self.costs)

    def apply(self, step: Pass, graph: Graph) -> Outcome:
        """One pass over the workflow and over those that it still calls."""
        outcome = step.run(graph, self.costs)
        if step.covers_callees or not outcome.graph.callees:
            return outcome
        inner = [self.apply(step, callee) for callee in outcome.graph.callees]
        remarks = (*outcome.remarks, *(r for o in inner for r in o.remarks))
        new = outcome.graph
        if any(o.graph is not g for o, g in zip(inner, new.callees, strict=True)):
            new = replace(new, callees=tuple(o.graph for o in inner))
        return Outcome(new, remarks)

    def broken(self, step: Pass, graph: Graph, error: Exception) -> PassError:
        what = str(error).strip() or "no message"
        name = f"flowc-{re.sub(r'[^A-Za-z0-9_.-]', '_', graph.name)}-{step.name}.flow"
        shown = _spelled(step)
        text = f"# pass: {shown}\n# {type(error).__name__}: {what.splitlines()[0]}\n{print_graph(graph)}"
        try:
            path = _write(self.reproducer_dir or Path(tempfile.gettempdir()), name, text)
            hint = (
                f"this is a bug in flowc; to see it again: `flowc opt {path} -p '{shown}'`, and please send that file"
            )
        except OSError as e:
            hint = f"this is a bug in flowc; the graph before the pass could not be written ({e})"
        return PassError(
            f"pass `{step.name}` broke workflow `{graph.name}`: {what}", code="F042", loc=graph.loc, hint=hint
        )


def _spelled(step: Pass) -> str:
    """The pass as `parse_pipeline` reads it, with the options that are not their defaults."""
    changed = [
        f"{f.name}={str(value).lower() if isinstance(value, bool) else value}"
        for f in dataclasses.fields(step)  # type: ignore[arg-type]
        if (value := getattr(step, f.name)) != f.default
    ]
    return f"{step.name}{{{', '.join(changed)}}}" if changed else step.name


def _write(folder: Path, name: str, text: str) -> Path:
    """Writes a new file of that name, numbered if there is one already."""
    for number in range(10_000):
        path = folder / (name if not number else f"{Path(name).stem}-{number}.flow")
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            continue
        with os.fdopen(handle, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
        return path
    raise OSError(f"{folder} is full of reproducers")


# -- explaining
T = TypeVar("T")


def _grouped(items: Sequence[T], key: Callable[[T], str]) -> Iterator[tuple[str, list[T]]]:
    for name, group in groupby(items, key):
        yield name, list(group)


def _explain(c: Compilation, gains: Mapping[str, Gain]) -> Iterator[str]:
    level = "" if c.level is None else f" at -O{c.level}"
    yield f"{c.graph.name}{level}"
    before, after = count_ops(c.captured.body), count_ops(c.graph.body)
    yield f"  operations     {before} -> {after}"
    old, new = predicted_s(c.captured, c.costs), predicted_s(c.graph, c.costs)
    yield f"  critical path  {show_s(old)} -> {show_s(new)} (predicted)"
    for graph in (c.graph, *c.graph.callees):
        for op in walk(graph.body):  # the one thing that may change an answer, and only ever in the user's own words
            if op.name in ("search", "ivf.begin") and ("stop" in op.attrs or "stop" in keyword_operands(op)):
                where = f"  at {op.loc}" if op.loc is not None else ""
                yield f"  approximate    search @{op.attr('resource')} may stop early, asked for by name (A){where}"
    if not c.stages:
        yield "  no passes: runs as written"
    for name, remarks in _grouped(c.remarks, lambda r: r.pass_name):
        fired = sum(r.fired for r in remarks)
        yield ""
        yield f"{name}: fired at {fired} of {len(remarks)} {'site' if len(remarks) == 1 else 'sites'}"
        if name in gains:
            yield f"  {gains[name]}"
        for r in remarks:
            yield f"  {'+' if r.fired else '-'} {r.op}{f'  at {r.loc}' if r.loc is not None else ''}"
            if r.fired:
                gain = f"saves {show_s(r.gain_s)}" if r.gain_s else ""
                yield f"      {'; '.join(filter(None, (r.detail, gain, f'legal: {r.verdict.why}')))}"
            elif r.verdict.is_legal:
                yield f"      legal, but it does not pay: {r.detail or 'no gain'}"
            else:
                yield f"      not legal: {r.verdict.why}"
    quiet = [s.pass_name for s in c.stages if all(r.pass_name != s.pass_name for r in c.remarks)]
    if quiet:
        yield ""
        yield f"no site for: {', '.join(dict.fromkeys(quiet))}"
