"""Put the body of a called workflow in the place of the call.

Before:
    workflow @w(%q: text) -> docs scope "app:w" seq {
      %hypo = call @hyde (%q) : text
      %docs = search @pydocs (%hypo) {k = 4} : docs
      return %docs
    }

    workflow @hyde(%q: text) -> text scope "app:hyde" seq {
      %clean = py "q.strip()" (%q) : text
      %text = generate @llm (%clean) {max_tokens = 64} : text
      return %text
    }
After:
    workflow @w(%q: text) -> docs scope "app:w" seq {
      %clean = py "q.strip()" (%q) {scope = "app:hyde"} : text
      %text = generate @llm (%clean) {max_tokens = 64} : text
      %docs = search @pydocs (%text) {k = 4} : docs
      return %docs
    }

Source: Allen and Cocke, "A Catalogue of Optimizing Transformations", 1971, procedure integration. Helium and Halo do
it to whole agent workflows before they look for what is common.
Legal when: the called workflow is known and does not call itself, its parameters hold what it is given, and its tools
and models, and the workflows that it still calls, are not others of the same name than the caller's.
Pays when: always, until the workflow has grown to `max_ops` operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from flowc.ir.core import Attrs, Graph, Names, Op, Region, Value, names_in, walk
from flowc.ir.printer import called_names
from flowc.ir.verifier import subsumes

from .core import Edits, Estimate, Outcome, Pass, Remark, Replacement, Verdict, describe, plural
from .cost import CostModel
from .facts import texts

_SCOPED = frozenset({"py", "try"})  # operations whose Python text looks names up in a scope


@dataclass(frozen=True, slots=True)
class Inline(Pass):
    name: ClassVar[str] = "inline"
    covers_callees: ClassVar[bool] = True
    max_ops: int = 20_000

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        inliner = _Inliner(self, costs)
        new = inliner.flatten(graph, {})
        known = {g.name: g for g in (*graph.callees, graph)}
        callees = tuple(inliner.flatten(callee, known) for callee in new.callees)
        if any(a is not b for a, b in zip(callees, new.callees, strict=True)):
            new = replace(new, callees=callees)
        return Outcome(new, tuple(inliner.remarks))

    def legal(self, call: Op, callee: Graph | None, into: _Caller) -> Verdict:
        if "group" in call.attrs:
            return Verdict(False, "it runs beside the others of its group, as one")
        if callee is None:
            return Verdict(False, f"the workflow `{call.attr('callee')}` is not known here")
        if callee.name in into.recursive or callee.name == into.graph.name:
            return Verdict(False, f"`{callee.name}` calls itself")
        if (
            not callee.scope
            and into.graph.scope
            and any(op.name in _SCOPED and "scope" not in op.attrs for op in walk(callee.body))
        ):
            return Verdict(False, "its plain Python names no scope and would run in the caller's")
        for param, operand in zip(callee.params, call.operands, strict=True):
            if not subsumes(param.type, operand.type):
                return Verdict(False, f"`{param.name}` is {param.type} there, and it is given {operand.type}")
        for name, meaning in _symbols(callee).items():
            if into.symbols_used.get(name, meaning) != meaning:
                return Verdict(False, f"its `{name}` is not what the caller calls `{name}`")
        for name, scope in callee.scopes.items():
            if name in into.scopes and into.scopes[name] is not scope:
                return Verdict(False, f"its scope `{name}` is not the caller's")
        for other in callee.callees:
            if other.name == into.graph.name or into.callees.get(other.name, other) != other:
                return Verdict(False, f"it calls `{other.name}`, and the caller means another by that name")
        return Verdict(True, "the called workflow is known and does not call itself")

    def profit(self, callee: Graph, into: _Caller, costs: CostModel) -> Estimate:
        size = _size(callee.body)
        if into.size + size > self.max_ops:
            return Estimate(0.0, f"the workflow would have more than {self.max_ops} operations")
        return Estimate(costs.turn_s, f"{plural(size, 'operation')} in its place")


class _Caller:
    """A workflow as it grows: what it has taken up from those inlined so far."""

    __slots__ = ("callees", "graph", "groups", "names", "recursive", "scopes", "size", "symbols", "symbols_used")

    def __init__(self, graph: Graph, recursive: frozenset[str]) -> None:
        self.graph = graph
        self.recursive = recursive
        self.names = Names(names_in(graph))
        self.scopes = dict(graph.scopes)
        self.symbols = dict(graph.symbols)
        self.symbols_used = _symbols(graph)
        self.callees = {g.name: g for g in graph.callees}
        self.size = _size(graph.body)
        self.groups = max((int(op.attr("group", 0)) for op in walk(graph.body)), default=0)  # the highest number

    def take(self, callee: Graph, call: Op) -> Replacement:
        """The callee's ops, renamed, with the call's operands for its parameters."""
        mapping = {p.name: v for p, v in zip(callee.params, call.operands, strict=True)}
        scope = callee.scope if callee.scope != self.graph.scope else ""
        body = _renamed(callee.body, mapping, self.names, scope, self.groups)
        self.groups = max((int(op.attr("group", 0)) for op in walk(body)), default=0) or self.groups
        for mine, theirs in ((self.scopes, callee.scopes), (self.symbols, callee.symbols)):
            mine.update({k: v for k, v in theirs.items() if k not in mine})
        self.symbols_used.update(_symbols(callee))
        for g in callee.callees:
            self.callees.setdefault(g.name, g)
        self.size += _size(callee.body)
        return Replacement(body.ops, {call.result.name: body.yields[0]})

    def finish(self, body: Region) -> Graph:
        kept: dict[str, None] = {}
        work = called_names(body)[::-1]
        while work:
            name = work.pop()
            if name in self.callees and name not in kept and name != self.graph.name:
                kept[name] = None
                work += called_names(self.callees[name].body)[::-1]
        return replace(
            self.graph,
            body=body,
            callees=tuple(self.callees[n] for n in kept),
            scopes=self.scopes,
            symbols=self.symbols,
        )


class _Inliner:
    """Inlines callees before callers, each workflow once."""

    def __init__(self, rules: Inline, costs: CostModel) -> None:
        self.rules = rules
        self.costs = costs
        self.remarks: list[Remark] = []
        self.done: dict[int, tuple[Graph, Graph]] = {}  # the first keeps the id taken

    def flatten(self, graph: Graph, known: Mapping[str, Graph]) -> Graph:
        if id(graph) in self.done:
            return self.done[id(graph)][1]
        calls = [op for op in walk(graph.body) if op.name == "call"]
        result = graph
        if calls:
            known = {**known, **{g.name: g for g in graph.callees}, graph.name: graph}
            into = _Caller(graph, _recursive(graph, known))
            edits = Edits()
            for call in calls:
                self.visit(call, known, into, edits)
            body = edits.apply(graph.body)
            result = graph if body is graph.body else into.finish(body)
        self.done[id(graph)] = (graph, result)
        return result

    def visit(self, call: Op, known: Mapping[str, Graph], into: _Caller, edits: Edits) -> None:
        callee = known.get(str(call.attrs["callee"]))
        if callee is not None and callee.name not in into.recursive and callee is not into.graph:
            callee = self.flatten(callee, known)
        verdict = self.rules.legal(call, callee, into)
        estimate = Estimate(0.0)
        if verdict.is_legal:
            assert callee is not None
            estimate = self.rules.profit(callee, into, self.costs)
            if estimate.pays:
                edits.add(call, into.take(callee, call))
        self.remarks.append(
            self.rules.remark(
                describe(call), call.loc, verdict, fired=estimate.pays, gain_s=estimate.gain_s, detail=estimate.why
            )
        )


def _recursive(graph: Graph, known: Mapping[str, Graph]) -> frozenset[str]:
    """Names of the workflows reachable from this one that reach themselves."""
    calls: dict[str, list[str]] = {}
    everything = dict(known)
    work = [graph.name]
    while work:
        name = work.pop()
        if name in calls or name not in everything:
            continue
        for g in everything[name].callees:
            everything.setdefault(g.name, g)
        calls[name] = called_names(everything[name].body)
        work += calls[name]

    def reaches(start: str) -> bool:
        seen: set[str] = set()
        work = list(calls.get(start, ()))
        while work:
            name = work.pop()
            if name == start:
                return True
            if name not in seen:
                seen.add(name)
                work += calls.get(name, ())
        return False

    return frozenset(name for name in calls if reaches(name))


def _symbols(graph: Graph) -> dict[str, object]:
    """What each tool and model name of the workflow means: the object, or where it is imported from."""
    meanings: dict[str, object] = {}
    for op in walk(graph.body):
        attrs = op.attrs
        pairs = [(attrs[a], attrs.get("ref")) for a in ("tool", "model") if a in attrs]
        if "tools" in attrs:
            refs = texts(attrs.get("refs"))
            names = texts(attrs["tools"])
            pairs += zip(names, refs or (None,) * len(names), strict=False)
        for name, ref in pairs:
            bound = graph.symbols.get(str(name))
            meanings[str(name)] = ref if bound is None else id(bound)
    return meanings


def _size(region: Region) -> int:
    return sum(1 for _ in walk(region))


def _renamed(region: Region, mapping: dict[str, Value], names: Names, scope: str, groups: int) -> Region:
    """A copy of a region in which every value has a fresh name; Python text that named no scope names `scope`, and
    groups are numbered from `groups` on.
    """

    def define(values: tuple[Value, ...]) -> tuple[Value, ...]:
        fresh = []
        for v in values:
            if v.name not in mapping:
                mapping[v.name] = Value(names.fresh(v.name), v.type)
            fresh.append(mapping[v.name])
        return tuple(fresh)

    def copy(region: Region) -> Region:
        params = define(region.params)
        ops = []
        for op in region.ops:
            operands = tuple([mapping[v.name] for v in op.operands])
            regions = tuple(map(copy, op.regions))
            attrs = op.attrs
            if scope and op.name in _SCOPED and "scope" not in attrs:
                attrs = Attrs({**attrs, "scope": scope})
            if "group" in attrs:
                attrs = Attrs({**attrs, "group": groups + int(op.attr("group"))})
            ops.append(Op(op.name, operands, define(op.results), attrs, regions, op.loc))
        return Region(params, tuple(ops), tuple([mapping[v.name] for v in region.yields]), region.ordered)

    return copy(region)
