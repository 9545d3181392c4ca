"""Compute at compile time what is known then, and merge what is formatted into what.

Before:
    workflow @w(%q: text) -> text seq {
      %style = const "short" : text
      %ask = template "Question: {}" (%q) : text
      %is_short = equals "short" (%style) : bool
      %prompt = if (%is_short) : text then seq {
        %a = template "{}\\nGive a {} answer." (%ask, %style) : text
        yield %a
      } else seq {
        yield %ask
      }
      return %prompt
    }
After:
    workflow @w(%q: text) -> text seq {
      %style = const "short" : text
      %ask = template "Question: {}" (%q) : text
      %is_short = const true : bool
      %a = template "Question: {}\\nGive a short answer." (%q) : text
      return %a
    }

Source: Wegman and Zadeck, "Constant Propagation with Conditional Branches", 1991; merged templates are what Helium
(2026) takes the static prefix of a prompt from.
Legal when: a literal's text does not depend on where it is made; an expression over literals uses operators of
built-in types only and does not raise; a template takes in another only if that one, formatted later, still reads no
state and cannot raise; a branch falls away only if its condition is a literal; `bound` only if no path leaves the
variable unbound.
Pays when: it takes an operation out of the run: a template merges into its only user, in its own region, up to
`max_slots` slots. What is left unused is for dce.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from flowc.ir.core import Attr, Attrs, Graph, Op, Region, Value, walk
from flowc.ir.templates import join_template, split_template
from flowc.ir.types import type_of
from flowc.ir.verifier import subsumes

from .core import Estimate, Match, Replacement, Rewrite, Verdict, plural
from .cost import CostModel
from .facts import Facts, expression, has_plain_truth, texts

MAX_TEXT = 10_000  # characters of a text computed here; more would bloat the plan
MAX_BITS = 256


_PURE_PARTS = Verdict(True, "what it takes in is literal, or reads no state and cannot raise")
_NOT_NOW = Verdict(False, "formatting the literal raises, or depends on the machine, so it waits for the run")


@dataclass(slots=True)
class Site(Match):
    """An op, what would stand for it, and whether that may be and pays."""

    replacement: Replacement = field(default_factory=Replacement)
    verdict: Verdict = field(default_factory=lambda: Verdict(True, "its operands are literals"))
    loss: str = ""


@dataclass(frozen=True, slots=True)
class Fold(Rewrite[Site]):
    name: ClassVar[str] = "fold"
    max_slots: int = 64

    def match(self, graph: Graph, costs: CostModel) -> Iterator[Site]:
        return _Folder(graph, costs, self.max_slots).region(graph.body)

    def legal(self, match: Site) -> Verdict:
        return match.verdict

    def profit(self, match: Site, costs: CostModel) -> Estimate:
        if match.loss:
            return Estimate(0.0, match.loss)
        return Estimate(costs.turn_s + costs.own_s(match.op))

    def rewrite(self, match: Site) -> Replacement:
        return match.replacement


class _Folder:
    """One walk in program order; each op sees what those before it have become."""

    def __init__(self, graph: Graph, costs: CostModel, max_slots: int) -> None:
        self.facts = Facts(graph, costs)
        self.graph = graph
        self.max_slots = max_slots
        self.values: dict[str, Value] = {}  # what stands for a value now
        self.literals: dict[str, Attr] = {}
        self.templates: dict[str, tuple[Op, int]] = {}  # template by result, with the region it is in
        self.unbound: set[str] | None = None

    def region(self, region: Region, place: int | None = None) -> Iterator[Site]:
        place = id(region) if place is None else place
        for op in region.ops:
            yield from self.visit(op, place)

    def now(self, value: Value) -> Value:
        while (later := self.values.get(value.name)) is not None:
            value = later
        return value

    def visit(self, op: Op, place: int) -> Iterator[Site]:
        site = self.site(op, place)
        if site is not None:
            yield site
            if site.fired:
                self.values.update(site.replacement.values)
                if op.name == "if":  # its ops stand in this region now
                    taken = next((r for r in op.regions if r.ops and r.ops is site.replacement.ops), None)
                    if taken is not None:
                        yield from self.region(taken, place)
                    return
                for new in site.replacement.ops:
                    self.note(new, place)
                return
        self.note(op, place)
        for region in op.regions:
            yield from self.region(region)

    def note(self, op: Op, place: int) -> None:
        if op.name == "const":
            self.literals[op.result.name] = op.attrs["value"]
        elif op.name == "template":
            self.templates[op.result.name] = (op, place)

    def site(self, op: Op, place: int) -> Site | None:
        match op.name:
            case "template":
                return self.template(op, place)
            case "equals":
                return self.equals(op)
            case "if":
                return self.branch(op)
            case "bound":
                return self.bound(op)
            case "py" if op.operands or not op.attrs.get("params"):
                return self.python(op)
            case _:
                return None

    # -- templates
    def template(self, op: Op, place: int) -> Site | None:
        segments: list[str] = []  # constant texts: one more than slots, the last one open
        slots: list[tuple[Value, str]] = []
        merged = 0
        refused: Verdict | None = None
        loss = ""
        first, *rest = split_template(str(op.attrs["text"]))
        last = first
        formats = texts(op.attrs.get("formats")) or ("",) * len(op.operands)
        for operand, form, segment in zip(op.operands, formats, rest, strict=True):
            value = self.now(operand)
            literal = None
            if value.name in self.literals:
                literal = _formatted(self.literals[value.name], form)
                if literal is None:
                    refused = refused or _NOT_NOW
            inner = self.templates.get(value.name) if form in ("", "!s") else None
            if literal is not None:
                merged += 1
                last += literal + segment
                continue
            if inner is not None:
                verdict, reason = self.merges(value, *inner, place, len(slots))
                if not verdict.is_legal:
                    refused = refused or verdict
                loss = loss or reason
                if verdict.is_legal and not reason:
                    merged += 1
                    head, *tail = split_template(str(inner[0].attrs["text"]))
                    last += head
                    inner_formats = texts(inner[0].attrs.get("formats")) or ("",) * len(inner[0].operands)
                    for v, f, text in zip(inner[0].operands, inner_formats, tail, strict=True):
                        slots.append((self.now(v), f))
                        segments.append(last)
                        last = text
                    last += segment
                    continue
            slots.append((value, form))
            segments.append(last)
            last = segment
        if not merged:
            if refused is not None or loss:
                return Site(op, verdict=refused or _PURE_PARTS, loss=loss)
            return None
        if not slots:
            return Site(op, replacement=Replacement((_const(op, last),), detail="a literal text"), verdict=_PURE_PARTS)
        attrs: dict[str, Attr] = {**op.attrs, "text": join_template((*segments, last))}
        attrs.pop("formats", None)
        if any(form for _, form in slots):
            attrs["formats"] = tuple(form for _, form in slots)
        new = Op("template", tuple(v for v, _ in slots), op.results, Attrs(attrs), (), op.loc)
        detail = f"{plural(merged, 'slot')} merged"
        return Site(op, replacement=Replacement((new,), detail=detail), verdict=_PURE_PARTS)

    def merges(self, value: Value, inner: Op, where: int, place: int, slots: int) -> tuple[Verdict, str]:
        """May a template take in this one, and if so, why it does not pay (empty if it does)."""
        effect = self.facts.effect(inner)
        if not effect.is_pure or effect.may_raise:
            return Verdict(False, f"formatting {value} reads state or may raise, so it stays where it is"), ""
        if where != place:
            return _PURE_PARTS, f"{value} would be formatted more often here"
        if len(self.facts.readers(value)) != 1:
            return _PURE_PARTS, f"{value} has other uses"
        if slots + len(inner.operands) > self.max_slots:
            return _PURE_PARTS, f"more than {self.max_slots} slots"
        return _PURE_PARTS, ""

    # -- literals
    def equals(self, op: Op) -> Site | None:
        operand, literal = self.now(op.operands[0]), op.attrs["value"]
        if operand.name not in self.literals:
            return None
        value = self.literals[operand.name]
        if type(value) is not type(literal) or isinstance(value, float | tuple):
            return None
        return Site(op, replacement=Replacement((_const(op, value == literal),), detail=str(value == literal)))

    def branch(self, op: Op) -> Site | None:
        if "group" in op.attrs:
            return None  # its operations would stand in the group one by one
        operand = self.now(op.operands[0])
        if operand.name in self.literals:
            is_true = bool(self.literals[operand.name])
            taken = op.regions[0 if is_true else 1]
            values = {r.name: v for r, v in zip(op.results, taken.yields, strict=True)}
            detail = f"always {'the first' if is_true else 'the second'} branch"
            return Site(
                op,
                replacement=Replacement(taken.ops, values, detail=detail),
                verdict=Verdict(True, "its condition is a literal"),
            )
        then, orelse = op.regions
        same = [self.now(a).name == self.now(b).name for a, b in zip(then.yields, orelse.yields, strict=True)]
        if then.ops or orelse.ops or not all(same):
            return None
        if not has_plain_truth(op.operands[0].type):
            return Site(op, verdict=Verdict(False, "looking at its condition may raise"))
        values = {r.name: v for r, v in zip(op.results, then.yields, strict=True)}
        return Site(
            op,
            replacement=Replacement((), values, detail="both branches do nothing"),
            verdict=Verdict(True, "both branches are equal"),
        )

    def bound(self, op: Op) -> Site | None:
        if self.unbound is None:
            self.unbound = _maybe_unbound(self.graph)
        if op.operands[0].name in self.unbound:
            return Site(op, verdict=Verdict(False, f"there is a path on which `{op.attr('variable')}` is not bound"))
        if not subsumes(op.result.type, op.operands[0].type):
            return None
        values = {op.result.name: op.operands[0]}
        return Site(
            op,
            replacement=Replacement((), values, detail="always bound"),
            verdict=Verdict(True, "every path binds the variable"),
        )

    def python(self, op: Op) -> Site | None:
        if "outs" in op.attrs or op.attrs.get("is_async") or len(op.results) != 1 or not self.facts.effect(op).is_pure:
            return None
        params = texts(op.attrs["params"])
        operands = [self.now(v) for v in op.operands]
        source = str(op.attrs["source"])
        if source.strip() in params:
            same = operands[params.index(source.strip())]
            if same.type == op.result.type:
                verdict = Verdict(True, "it is its operand")
                return Site(
                    op, replacement=Replacement((), {op.result.name: same}, detail=f"it is {same}"), verdict=verdict
                )
            return None
        if any(v.name not in self.literals for v in operands):
            return None
        tree = expression(source)
        if tree is None or isinstance(tree, ast.List | ast.Dict | ast.Set | ast.Call | ast.ListComp):
            return None
        try:
            value = _evaluate(tree, {p: self.literals[v.name] for p, v in zip(params, operands, strict=True)})
        except _Unknown:
            return None
        except (ArithmeticError, TypeError, ValueError, LookupError) as e:
            return Site(op, verdict=Verdict(False, f"it raises {type(e).__name__}, as it must when it runs"))
        if not subsumes(op.result.type, type_of(value)):
            return None
        return Site(op, replacement=Replacement((_const(op, value),), detail=f"always {repr(value)[:60]}"))


def _const(op: Op, value: Attr) -> Op:
    return Op("const", (), op.results, Attrs(value=value), (), op.loc)


_UNSAFE_FORMAT = re.compile(r"\d{5,}|n$")  # a text of 100 kB, or one that depends on the locale


def _formatted(value: Attr, form: str) -> str | None:
    """What an f-string makes of the value, or None if that must wait for the run."""
    if type(value) not in (str, int, float, bool, type(None)):
        return None
    conversion, _, spec = form.partition(":")
    if _UNSAFE_FORMAT.search(spec):
        return None
    try:
        match conversion:
            case "!r":
                shown = format(repr(value), spec)
            case "!a":
                shown = format(ascii(value), spec)
            case "!s":
                shown = format(str(value), spec)
            case _:
                shown = format(value, spec)
    except (ValueError, TypeError):
        return None
    return shown if len(shown) <= MAX_TEXT else None


def _maybe_unbound(graph: Graph) -> set[str]:
    """Names of values that may be the one of an unbound variable: all that an `undef` reaches."""
    flows: dict[str, list[str]] = {}
    found: list[str] = []

    def flow(sources: tuple[Value, ...], targets: tuple[Value, ...]) -> None:
        for source, target in zip(sources, targets, strict=False):
            flows.setdefault(source.name, []).append(target.name)

    for op in walk(graph.body):
        match op.name:
            case "undef":
                found.append(op.result.name)
            case "while":
                cond, body = op.regions
                for targets in (op.results, cond.params, body.params):
                    flow(op.operands, targets)
                    flow(body.yields[1:], targets)
            case "foreach":
                (body,) = op.regions
                for targets in (op.results, body.params[1:]):
                    flow(op.operands[1:], targets)
                    flow(body.yields[bool(op.attrs.get("breaks")) :][: len(op.operands) - 1], targets)
            case "cell" | "load":
                flow(op.operands, op.results)
            case "store":
                flow(op.operands[1:], op.operands[:1])
            case "py" if isinstance(outs := op.attrs.get("outs"), tuple):
                given = dict(zip(texts(op.attrs["params"]), op.operands, strict=True))
                for out, result in zip(texts(outs), op.results, strict=True):
                    if out in given:  # statements that may leave the variable as it was
                        flow((given[out],), (result,))
                if re.search(r"\bdel\b|\bas\b", str(op.attrs["source"])):  # or unbind it themselves
                    found.extend(result.name for result in op.results)
            case _:
                for region in op.regions:
                    flow(region.yields, op.results)
    reached = set(found)
    while found:
        for target in flows.get(found.pop(), ()):
            if target not in reached:
                reached.add(target)
                found.append(target)
    return reached


class _Unknown(Exception):
    """An expression that is left to the run."""


_BINARY: dict[type[ast.operator], Callable[[Any, Any], object]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], object]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _evaluate(node: ast.expr, names: Mapping[str, Attr]) -> Attr:
    """The value of an expression over literals, made with Python's operators; it raises what Python raises.

    _Unknown for anything else.
    """

    def of(child: ast.expr) -> Attr:
        return _evaluate(child, names)

    match node:
        case ast.Constant(value=str() | int() | float() | bytes() | None as value):
            return value
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not of(operand)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _checked(operator.neg, of(operand))
        case ast.BoolOp(op=op, values=values):
            result: Attr = None
            for child in values:
                result = of(child)
                if bool(result) == isinstance(op, ast.Or):
                    break
            return result
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return of(body) if of(test) else of(orelse)
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            last = of(left)
            for kind, child in zip(ops, comparators, strict=True):
                other = of(child)
                if isinstance(kind, ast.Is | ast.IsNot):
                    if last is not None and other is not None:
                        raise _Unknown
                    holds: object = (last is other) == isinstance(kind, ast.Is)
                else:
                    holds = _COMPARE[type(kind)](last, other)
                if not holds:
                    return False
                last = other
            return True
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _checked(_BINARY[type(op)], of(left), of(right))
        case ast.Subscript(value=container, slice=index):
            return _checked(operator.getitem, of(container), of(index))
        case ast.Tuple(elts=elements):
            return tuple(map(of, elements))
        case _:
            raise _Unknown


def _checked(operation: Callable[..., object], *operands: Attr) -> Attr:
    """The operation's result, if it is small and of a built-in kind; nothing large is made on the way."""
    for operand in operands:
        if isinstance(operand, str | bytes | tuple) and len(operand) > MAX_TEXT:
            raise _Unknown
        if isinstance(operand, int) and operand.bit_length() > MAX_BITS:
            raise _Unknown
    if operation is operator.mul:
        sizes = [len(o) if isinstance(o, str | bytes | tuple) else None for o in operands]
        if (
            any(sizes)
            and max(*(s or 0 for s in sizes)) * max(*(o if isinstance(o, int) else 0 for o in operands)) > MAX_TEXT
        ):
            raise _Unknown
    if operation is operator.mod and isinstance(operands[0], str | bytes):
        raise _Unknown  # %-formatting
    result = operation(*operands)
    if isinstance(result, str | bytes | tuple) and len(result) > MAX_TEXT:
        raise _Unknown
    if not isinstance(result, str | int | float | bytes | tuple | None):
        raise _Unknown
    return result


__all__ = ["Fold", "Site"]
