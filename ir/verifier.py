"""The rules of the IR. `verify` raises a VerifyError for the first one that a graph breaks, in program order:

    F020  the graph as a whole: one result, each workflow name once
    F021  an operation is given a value of a type that it does not take (a mistake in the user's program)
    F022  SSA: a value is defined once, before its use, in a region that encloses the use
    F023  an unknown operation or attribute, an attribute that is missing or has the wrong type
    F024  numbers and types of operands, results and regions do not fit together
    F025  a name that stands for nothing: a callee, a resource, a cell
    F026  Python text that does not parse, or whose names do not match its operands and results
    F027  a fused run that holds something else than plain Python
    F028  a group whose operations do not stand together

F021 speaks of the user's program, all others of a graph that a pass, a builder or a hand made wrong; those show the
operation.
The time is linear in operations, operands and attributes.
"""

from __future__ import annotations

import ast
import keyword
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Final, NoReturn

from .core import Graph, Op, Region, Value
from .effects import group_spans
from .errors import VerifyError
from .ops import COMMON_ATTRS, OPS, SCHEDULE_ATTRS, AttrSpec, Effect, OpSpec, effect_of
from .printer import all_graphs, print_literal, print_op
from .templates import split_template
from .types import ANY, ARITY, NEVER, TEXT, Type, accepts, item_type, list_of, type_of

PLAIN: Final = frozenset(
    {"const", "template", "append", "concat", "equals", "undef", "bound", "py", "cell", "load", "store"}
)
"""Operations that are plain Python: what a `fused` run may hold, beside control flow over them."""

_ON_ANY: Final[Mapping[str, AttrSpec]] = {**COMMON_ATTRS, **SCHEDULE_ATTRS}
_CONTROL: Final = frozenset({"if", "while", "foreach", "try", "fused"})
_OP_TEXT_CHARS: Final = 240

_ROLES: Final[Mapping[str, tuple[str, ...]]] = {
    "embed": ("the text to embed",),
    "search": ("the query",),
    "rerank": ("the query", "the passages"),
    "generate": ("the prompt",),
    "choose": ("the prompt", "the options"),
    "parse": ("the prompt",),
    "invoke": ("the tool's name", "the arguments"),
}
_MAKES: Final[Mapping[str, str]] = {
    "docs": "search results",
    "doc": "a search result",
    "vector": "a vector",
    "text": "a text",
    "int": "an int",
    "float": "a float",
    "bool": "a bool",
    "none": "None",
    "bytes": "bytes",
    "range": "a range",
}


def subsumes(expected: Type, actual: Type) -> bool:
    """Does every value of static type `actual` have type `expected`? Unlike `accepts`, nothing is left to run time."""
    if expected in (actual, ANY) or actual == NEVER:
        return True
    if expected.name in ARITY and expected.name == actual.name and len(expected.args) == len(actual.args):
        return all(map(subsumes, expected.args, actual.args))
    return actual != ANY and expected.name not in ARITY and accepts(expected, actual)


def is_plain(op: Op) -> bool:
    """Is this plain synchronous Python, with everything inside it?"""
    if op.name == "py":
        return not op.attrs.get("is_async")
    if op.name in PLAIN:
        return True
    return op.name in _CONTROL and all(is_plain(inner) for region in op.regions for inner in region.ops)


@lru_cache(maxsize=16384)
def _python_error(source: str, is_expression: bool) -> str | None:
    """Why the text is no Python expression (or statements), or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Python thinks of the text's style is told when it is compiled
            ast.parse(source, mode="eval" if is_expression else "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        return f"{e.msg} (line {e.lineno})" if isinstance(e, SyntaxError) else str(e) or type(e).__name__
    return None


def _is_identifier(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def a(t: Type) -> str:
    """The type in a sentence: "a text", "search results"."""
    return _MAKES.get(t.name) or f"a {t}"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _type_names(types: Iterable[type]) -> str:
    names = {str: "a text", int: "an int", float: "a float", bool: "a bool", tuple: "a tuple of texts"}
    return " or ".join(names.get(t, t.__name__) for t in types)


def _texts(op: Op, attr: str) -> tuple[str, ...]:
    """An attribute that is a tuple of texts (`attrs` has seen to that); empty if it is absent."""
    value = op.attrs.get(attr)
    return tuple(map(str, value)) if isinstance(value, tuple) else ()


def _is_attr(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_attr, value))
    return value is None or type(value) in (str, int, float, bool, bytes)


class _Verifier:
    """Verifies one workflow in one walk in program order, with the values that are visible and who defines them."""

    def __init__(self, graph: Graph, workflows: Mapping[str, Graph]) -> None:
        self.graph = graph
        self.workflows = workflows
        self.visible: dict[str, Value] = {}
        self.makers: dict[str, Op | None] = {}  # every value defined so far; None: a parameter
        self.cells: set[str] = set()
        self.checks: dict[str, Callable[[Op], None]] = {
            "const": self.const,
            "equals": self.const,
            "template": self.template,
            "py": self.py,
            "fused": self.fused,
            "load": self.cell,
            "store": self.cell,
            "if": self.if_,
            "while": self.while_,
            "foreach": self.foreach,
            "llm.each": self.each,
            "try": self.try_,
            "call": self.call,
        }

    # -- messages
    def fail(self, message: str, op: Op | None = None, code: str = "F024", hint: str | None = None) -> NoReturn:
        where = f"in workflow @{self.graph.name}"
        if op is not None and (code != "F021" or op.loc is None):
            text = print_op(op)
            where += f": {text if len(text) <= _OP_TEXT_CHARS else text[:_OP_TEXT_CHARS] + ' ...'}"
            message = f"{message}\n  {where}"
        elif code != "F021":
            message = f"{message}\n  {where}"
        loc = op.loc if op is not None and op.loc is not None else self.graph.loc
        raise VerifyError(message, code=code, loc=loc, hint=hint)

    def made_by(self, value: Value) -> str:
        """Where a value comes from, for a message: "`%notes` is what `search` gives (app.py:30:12)"."""
        maker = self.makers.get(value.name)
        if maker is None:
            if any(p.name == value.name for p in self.graph.params):
                return f"`{value.name}` is a parameter of workflow @{self.graph.name}"
            return f"`%{value.name}` is a parameter of its region"
        at = f" ({maker.loc})" if maker.loc is not None else ""
        return f"`%{value.name}` is what `{maker.name}` gives{at}"

    def mismatch(self, op: Op, role: str, wanted: Type, value: Value) -> NoReturn:
        on = f" @{op.attr('resource') or op.attr('callee')}" if "resource" in op.attrs or "callee" in op.attrs else ""
        self.fail(
            f"`{op.name}{on}` takes {a(wanted)} as {role}, but is given {a(value.type)}",
            op,
            "F021",
            f"{self.made_by(value)}; {_remedy(wanted, value.type, value)}",
        )

    # -- SSA
    def use(self, value: Value, op: Op | None, what: str = "operand") -> None:
        if value.name in self.cells and (what != "operand" or op is None or op.name not in ("load", "store")):
            self.fail(f"{what} `{value}` is a cell, which only `load` and `store` take", op, "F025")
        known = self.visible.get(value.name)
        if known is value or known == value:
            return
        if known is not None:
            self.fail(f"{what} `{value}` has type {value.type} here, but is defined with type {known.type}", op, "F022")
        if value.name in self.makers:
            message = f"{what} `{value}` is defined in a region that does not enclose this use"
            self.fail(message, op, "F022", "let that region yield it")
        close = get_close_matches(value.name, self.visible, 1)
        hint = f"did you mean `%{close[0]}`?" if close else None
        self.fail(f"{what} `{value}` is not defined before this use", op, "F022", hint)

    def define(self, value: Value, op: Op | None, maker: Op | None, mine: list[str]) -> None:
        if value.name in self.makers:
            self.fail(f"value `{value}` is defined twice in workflow @{self.graph.name}", op, "F022")
        self.makers[value.name] = maker
        if maker is not None and maker.name == "cell":
            self.cells.add(value.name)
        self.visible[value.name] = value
        mine.append(value.name)

    def region(self, region: Region, op: Op | None) -> None:
        mine: list[str] = []
        for p in region.params:
            self.define(p, op, None, mine)
        for inner in region.ops:
            self.op(inner, mine)
        self.groups(region)
        for y in region.yields:
            self.use(y, op, "yielded value" if op is not None else "returned value")
        for name in mine:
            del self.visible[name]

    def groups(self, region: Region) -> None:
        """Between the operations of a group stands nothing that any of them must be ordered with."""
        for group, (first, last) in group_spans(region.ops).items():
            span = region.ops[first : last + 1]
            members = [op.attrs.get("group") == group for op in span]
            written = frozenset[str]().union(*(effect_of(op).writes for op, m in zip(span, members, strict=True) if m))
            for op, is_member in zip(span, members, strict=True):
                effect = Effect() if is_member else effect_of(op)
                if effect.writes or effect.reads & written or (not is_member and "group" in op.attrs):
                    self.fail(f"`{op.name}` stands between operations of group {group}", op, "F028")

    def op(self, op: Op, mine: list[str]) -> None:
        spec = OPS.get(op.name)
        if spec is None:
            close = get_close_matches(op.name, OPS, 1)
            self.fail(
                f"there is no operation `{op.name}`", op, "F023", f"did you mean `{close[0]}`?" if close else None
            )
        for v in op.operands:
            self.use(v, op)
        self.attrs(op, spec)
        self.operands(op, spec)
        self.results(op, spec)
        is_fixed = not spec.regions or spec.regions[-1] != "*handlers"
        if is_fixed and len(op.regions) != len(spec.regions):
            self.fail(f"`{op.name}` has {_plural(len(spec.regions), 'region')}, here {len(op.regions)}", op)
        check = self.checks.get(op.name)
        if check is not None:
            check(op)  # before the regions: it holds the types of their parameters against what comes in
        for region in op.regions:
            self.region(region, op)
        for v in op.results:
            self.define(v, op, op, mine)

    # -- what the table says
    def attrs(self, op: Op, spec: OpSpec) -> None:
        known = spec.attrs
        for name, value in op.attrs.items():
            allowed = known.get(name) or _ON_ANY.get(name)
            if allowed is None:
                close = get_close_matches(name, [*known, *_ON_ANY], 1)
                hint = f"did you mean `{close[0]}`?" if close else f"it has: {', '.join(known) or 'none'}"
                self.fail(f"`{op.name}` has no attribute `{name}`", op, "F023", hint)
            if not _has_type(value, allowed):
                if name == "resource":
                    self.fail(f"`{op.name}` names no resource", op, "F025")
                wanted = _type_names(allowed.types)
                self.fail(f"attribute `{name}` of `{op.name}` is {wanted}, not {print_literal(value)[:80]}", op, "F023")
        for name, allowed in known.items():
            if allowed.required and name not in op.attrs:
                code = "F025" if name in ("resource", "callee", "tool") else "F023"
                self.fail(f"`{op.name}` lacks its attribute `{name}`: {allowed.doc}", op, code)
        for name in ("resource", "callee", "tool"):
            if op.attrs.get(name) == "":
                self.fail(f"`{op.name}` names no {name}", op, "F025")

    def operands(self, op: Op, spec: OpSpec) -> None:
        kw = _texts(op, "kw")
        first = len(op.operands) - len(kw)
        if first < 0:
            self.fail(
                f"`{op.name}` has {_plural(len(kw), 'keyword name')} for {_plural(len(op.operands), 'operand')}", op
            )
        if len(set(kw)) != len(kw):
            self.fail(f"`{op.name}` is given a keyword operand twice", op)
        if spec.operands is not None:
            if first != len(spec.operands):
                self.fail(
                    f"`{op.name}` takes {_plural(len(spec.operands), 'operand')} without a name, here {first}", op
                )
            for i, (wanted, value) in enumerate(zip(spec.operands, op.operands, strict=False)):
                if not accepts(wanted, value.type):
                    roles = _ROLES.get(op.name, ())
                    self.mismatch(op, roles[i] if i < len(roles) else f"operand {i + 1}", wanted, value)
        for name, value in zip(kw, op.operands[first:], strict=True):
            if op.name == "tool":
                continue  # its signature is the tool's business
            wanted_type = spec.optional.get(name)
            if wanted_type is None:
                close = get_close_matches(name, spec.optional, 1)
                known = ", ".join(spec.optional) or "none"
                hint = f"did you mean `{close[0]}`?" if close else f"it has: {known}"
                self.fail(f"`{op.name}` has no keyword operand `{name}`", op, "F023", hint)
            if name in op.attrs:
                self.fail(f"`{op.name}` is given `{name}` both as an attribute and as an operand", op, "F023")
            if not accepts(wanted_type, value.type):
                self.mismatch(op, f"`{name}`", wanted_type, value)

    def results(self, op: Op, spec: OpSpec) -> None:
        if spec.results is None:
            return
        if len(op.results) != len(spec.results):
            self.fail(f"`{op.name}` has {_plural(len(spec.results), 'result')}, here {len(op.results)}", op)
        for made, value in zip(spec.results, op.results, strict=True):
            if not accepts(made, value.type):
                self.fail(f"`{op.name}` gives {a(made)}, not {a(value.type)}", op)

    # -- what single operations add
    def const(self, op: Op) -> None:
        value = op.attrs["value"]
        if not _is_attr(value):
            self.fail(f"`{op.name}` holds no literal: {type(value).__name__}", op, "F023")
        if op.name == "const" and not accepts(op.results[0].type, type_of(value)):
            self.fail(f"the literal is {a(type_of(value))}, not {a(op.results[0].type)}", op)

    def template(self, op: Op) -> None:
        try:
            slots = len(split_template(str(op.attrs["text"]))) - 1
        except ValueError as e:
            self.fail(f"the text of `template` is malformed: {e}", op, "F023")
        if slots != len(op.operands):
            given = _plural(len(op.operands), "operand")
            self.fail(f"the text of `template` has {_plural(slots, 'slot')} for {given}", op)
        formats = _texts(op, "formats")
        if "formats" in op.attrs and len(formats) != slots:
            self.fail(f"`template` has {_plural(len(formats), 'format')} for {_plural(slots, 'slot')}", op)

    def names(self, op: Op, attr: str, values: Sequence[Value]) -> None:
        names = _texts(op, attr)
        if len(names) != len(values):
            given = _plural(len(values), "operand" if attr == "params" else "result")
            self.fail(f"`{op.name}` has {_plural(len(names), 'name')} in `{attr}` for {given}", op, "F026")
        if len(set(names)) != len(names):
            self.fail(f"`{op.name}` has a name twice in `{attr}`", op, "F026")
        for name in names:
            if not _is_identifier(name):
                self.fail(f"{print_literal(name)} in `{attr}` of `{op.name}` is no Python name", op, "F026")

    def py(self, op: Op) -> None:
        self.names(op, "params", op.operands)
        is_expression = "outs" not in op.attrs
        if not is_expression:
            self.names(op, "outs", op.results)
        elif len(op.results) != 1:
            hint = "statements name theirs in `outs`"
            self.fail(f"a Python expression has 1 result, here {len(op.results)}", op, "F026", hint)
        problem = _python_error(str(op.attrs["source"]), is_expression)
        if problem is not None:
            kind = "expression" if is_expression else "text"
            self.fail(f"the source of `py` is no Python {kind}: {problem}", op, "F026")

    def cell(self, op: Op) -> None:
        for stored in op.operands[1:]:
            if stored.name in self.cells:
                self.fail(f"`{stored}` is a cell, which cannot be stored", op, "F025")
        value = op.operands[0]
        if value.name not in self.cells:
            hint = "its first operand is the result of a `cell`"
            self.fail(f"`{op.name}` takes a cell, but `{value}` is none", op, "F025", hint)

    def flow(self, op: Op, wanted: Type, actual: Type, what: str) -> None:
        if not subsumes(wanted, actual):
            self.fail(f"{what} of `{op.name}` has type {wanted}, but receives {actual}", op)

    def yields(self, op: Op, region: Region, name: str, count: int) -> None:
        if len(region.yields) != count:
            self.fail(f"region `{name}` of `{op.name}` yields {_plural(len(region.yields), 'value')}, not {count}", op)

    def takes(self, op: Op, region: Region, name: str, incoming: Sequence[Type]) -> None:
        if len(region.params) != len(incoming):
            found = _plural(len(region.params), "parameter")
            self.fail(f"region `{name}` of `{op.name}` has {found}, not {len(incoming)}", op)
        for p, t in zip(region.params, incoming, strict=True):
            self.flow(op, p.type, t, f"parameter `{p}`")

    def gives(self, op: Op, region: Region, name: str, extra: int = 0) -> None:
        """The region yields `extra` values and then one for each result."""
        self.yields(op, region, name, extra + len(op.results))
        for result, y in zip(op.results, region.yields[extra:], strict=True):
            self.flow(op, result.type, y.type, f"result `{result}`")

    def fused(self, op: Op) -> None:
        (body,) = op.regions
        self.takes(op, body, "body", ())
        self.gives(op, body, "body")
        for inner in body.ops:
            if inner.name != "py" and not is_plain(inner):
                self.fail(f"`fused` holds `{inner.name}`, which is no plain Python", op, "F027")

    def if_(self, op: Op) -> None:
        for region, name in zip(op.regions, ("then", "else"), strict=True):
            self.takes(op, region, name, ())
            self.gives(op, region, name)

    def while_(self, op: Op) -> None:
        cond, body = op.regions
        incoming = [v.type for v in op.operands]
        self.takes(op, cond, "cond", incoming)
        self.takes(op, body, "body", incoming)
        self.yields(op, cond, "cond", 1)
        if len(op.results) != len(incoming):
            carried = _plural(len(incoming), "value")
            self.fail(f"`while` carries {carried}, but has {_plural(len(op.results), 'result')}", op)
        self.gives(op, body, "body", 1)
        self.carried(op, cond.params, body.yields[1:])
        self.carried(op, body.params, body.yields[1:])

    def carried(self, op: Op, params: Sequence[Value], following: Sequence[Value]) -> None:
        for p, y in zip(params, following, strict=True):
            self.flow(op, p.type, y.type, f"carried `{p}`")

    def foreach(self, op: Op) -> None:
        if not op.operands:
            self.fail("`foreach` has no operand to go over", op)
        items, *inits = op.operands
        (body,) = op.regions
        collects = op.attrs.get("collects", 0)
        assert isinstance(collects, int)
        extra = 1 if op.attrs.get("breaks") else 0
        carried = len(inits)
        if collects < 0 or len(op.results) != carried + collects:
            self.fail(
                f"`foreach` carries {_plural(carried, 'value')} and collects {_plural(collects, 'list')}, "
                f"but has {_plural(len(op.results), 'result')}",
                op,
            )
        self.takes(op, body, "body", [item_type(items.type), *(v.type for v in inits)])
        self.gives(op, body, "body", extra)
        self.carried(op, body.params[1:], body.yields[extra : extra + carried])
        for y in body.yields[extra + carried :]:
            if y.type.name != "list" and y.type not in (ANY, NEVER):
                self.fail(f"`foreach` collects lists, but `{y}` is {a(y.type)}", op)
        for result, v in zip(op.results[:carried], inits, strict=True):
            self.flow(op, result.type, v.type, f"result `{result}`")  # of a loop over nothing

    def each(self, op: Op) -> None:
        (body,) = op.regions
        collects = op.attrs.get("collects", 0)
        assert isinstance(collects, int)
        if collects < 0 or len(op.results) != 2 + collects:
            found = _plural(len(op.results), "result")
            self.fail(f"`llm.each` gives a text, its items and {_plural(collects, 'list')}, but has {found}", op)
        self.takes(op, body, "body", [TEXT])
        self.yields(op, body, "body", collects)
        for result, made in zip(op.results, (TEXT, list_of(TEXT), *(y.type for y in body.yields)), strict=True):
            self.flow(op, result.type, made, f"result `{result}`")
        for y in body.yields:
            if y.type.name != "list" and y.type not in (ANY, NEVER):
                self.fail(f"`llm.each` collects lists, but `{y}` is {a(y.type)}", op)

    def try_(self, op: Op) -> None:
        handlers = _texts(op, "handlers")
        if len(op.regions) != 1 + len(handlers):
            found = _plural(len(op.regions) - 1, "handler region")
            self.fail(f"`try` has {_plural(len(handlers), 'handler')} for {found}", op)
        self.names(op, "params", op.operands)
        body, *handled = op.regions
        self.takes(op, body, "body", ())
        self.gives(op, body, "body")
        for region, text in zip(handled, handlers, strict=True):
            name = f"except {text}".strip()
            if len(region.params) != 1:
                self.fail(f"region `{name}` of `try` has 1 parameter, the error, here {len(region.params)}", op)
            self.gives(op, region, name)
            problem = _python_error(text, True) if text else None
            if problem is not None:
                self.fail(f"the handler {text!r} is no Python expression: {problem}", op, "F026")

    def call(self, op: Op) -> None:
        name = str(op.attrs["callee"])
        callee = self.workflows.get(name)
        if callee is None:
            close = get_close_matches(name, self.workflows, 1)
            self.fail(f"there is no workflow @{name}", op, "F025", f"did you mean @{close[0]}?" if close else None)
        if len(op.operands) != len(callee.params):
            self.fail(f"workflow @{name} takes {_plural(len(callee.params), 'argument')}, here {len(op.operands)}", op)
        for p, v in zip(callee.params, op.operands, strict=True):
            if not accepts(p.type, v.type):
                self.mismatch(op, f"`{p.name}`", p.type, v)
        if len(op.results) != 1:
            self.fail(f"`call` has 1 result, here {len(op.results)}", op)
        if len(callee.body.yields) == 1 and not subsumes(op.results[0].type, callee.result.type):
            self.fail(f"workflow @{name} returns {callee.result.type}, not {op.results[0].type}", op)

    def verify(self) -> None:
        if len(self.graph.body.yields) != 1:
            found = len(self.graph.body.yields)
            self.fail(f"a workflow returns 1 value, @{self.graph.name} returns {found}", code="F020")
        if not self.graph.name:
            self.fail("a workflow has a name", code="F020")
        self.region(self.graph.body, None)


def _has_type(value: object, allowed: AttrSpec) -> bool:
    if object in allowed.types:
        return _is_attr(value)
    if type(value) is bool:
        return bool in allowed.types
    return isinstance(value, allowed.types) and (type(value) is not tuple or all(type(v) is str for v in value))


def _remedy(wanted: Type, given: Type, value: Value) -> str:
    """What a user may write instead."""
    name = value.name.split(".")[0]
    if wanted == TEXT and given.name == "docs":
        return f'pass a text: `{name}[0].text` is the best passage, f"{{{name}}}" all of them as a numbered list'
    if wanted == TEXT and given.name == "doc":
        return f"pass its text: `{name}.text`"
    if wanted == TEXT and given.name in ("list", "set", "tuple"):
        return f'pass one text: "\\n".join({name}), or make one call for each: `[... for x in {name}]`'
    if wanted == TEXT:
        return f'pass a text: f"{{{name}}}"'
    if wanted.name == "docs":
        return "pass what a `search` gave"
    return f"pass {a(wanted)}"


def verify(graph: Graph) -> None:
    """Raises VerifyError for the first rule that the workflow, or one that it calls, breaks."""
    workflows: dict[str, Graph] = {}
    graphs = all_graphs(graph)
    for g in graphs:
        other = workflows.setdefault(g.name, g)
        if other is not g:
            raise VerifyError(f"two different workflows are called @{g.name}", code="F020", loc=g.loc)
    for g in graphs:
        _Verifier(g, workflows).verify()


__all__ = ["PLAIN", "is_plain", "subsumes", "verify"]
