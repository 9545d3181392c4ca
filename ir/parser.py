"""Text as IR: the inverse of `flowc.ir.printer`.

Lark reads the text by `grammar.lark` into plain records; `_Resolver` then gives each use of a value its definition.
Both steps report a `ParseError` with line, column and what was expected:

    F030  the text is malformed
    F031  a value or a workflow that does not exist, or cannot be seen from here
    F032  a value or a workflow that is defined twice
    F033  an unknown operation
    F034  an unknown type, or a result type that contradicts the returned value
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from .core import NO_ATTRS, Attr, Attrs, Graph, Op, Region, Value
from .errors import Loc, ParseError
from .ops import OPS
from .printer import LEADING, NAMED, SYMBOLS, called_names
from .types import ARITY, ATOMS, Type

MAX_DEPTH: Final = 150  # regions inside regions; Python's own stack ends a little later

_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_CHARS: Final = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "'": "'"}
_LOC = re.compile(r'loc\((?:("(?:[^"\\]|\\.)*"):?)?(?:(\d+)(?::(\d+)(?:-(\d+))?)?)?\)')


class _Type(NamedTuple):
    name: Token
    args: tuple[_Type, ...]
    depth: int


class _Literal(NamedTuple):
    value: Attr
    depth: int


class _Param(NamedTuple):
    name: Token
    type: _Type


class _Operand(NamedTuple):
    name: Token | None
    value: Token


class _End(NamedTuple):
    word: Token
    values: list[Token]


class _Region(NamedTuple):
    label: Token
    guard: Token | None
    params: tuple[_Param, ...]
    ordered: bool
    ops: list[_Op]
    end: _End | None


class _Op(NamedTuple):
    results: list[Token]
    name: Token
    lead: _Literal | None
    symbol: Token | None
    operands: list[_Operand]
    attrs: list[tuple[Token, Attr]]
    types: list[_Type]
    loc: Token | None
    regions: list[_Region]


class _Workflow(NamedTuple):
    name: Token
    params: tuple[_Param, ...]
    types: list[_Type]
    scope: Token | None
    calls: list[Token] | None
    loc: Token | None
    ordered: bool
    ops: list[_Op]
    end: _End | None


class _Malformed(Exception):
    """A mistake at a token, before the text's name and lines are known."""

    def __init__(self, token: Token, message: str, hint: str | None = None, code: str = "F030") -> None:
        super().__init__(message)
        self.token, self.message, self.hint, self.code = token, message, hint, code


def _unquote(token: Token | str, start: int = 1) -> str:
    """What a quoted string says; the first `start` characters and the last are its quotes."""
    body = token[start:-1]
    if "\\" not in body:
        return str(body)

    def char(match: re.Match[str]) -> str:
        digits = match[1] or match[2] or match[3]
        if digits is None:
            if match[4] not in _CHARS:
                raise _problem(token, f"`\\{match[4]}` is no escape", 'write a backslash as `\\\\`, a quote as `\\"`')
            return _CHARS[match[4]]
        code = int(digits, 16)
        if code > 0x10FFFF:
            raise _problem(token, f"`{match[0]}` is no character: the last is \\U0010ffff")
        return chr(code)

    return _ESCAPE.sub(char, body)


def _problem(token: Token | str, message: str, hint: str | None = None) -> _Malformed:
    assert isinstance(token, Token)
    return _Malformed(token, message, hint)


def _bare(token: Token) -> str:
    """The name behind a sigil, `%x` or `@"a b"`."""
    return _unquote(token, 2) if token[1] == '"' else str(token[1:])


def _word(token: Token) -> str:
    return _unquote(token) if token[0] == '"' else str(token)


def _block(token: Token) -> str:
    lines = token.split("\n")
    indent = lines[-1][:-3]
    if indent.strip():
        raise _Malformed(token, 'the closing `"""` of a block stands on a line of its own')
    for line in lines[1:-1]:
        if line and not line.startswith(indent):
            raise _Malformed(
                token, f'a line of this block is indented less than its closing `"""`: {line.strip()[:40]!r}'
            )
    return "\n".join(line[len(indent) :] for line in lines[1:-1])


def _bytes(token: Token) -> bytes:
    text = _unquote(token, 2)
    try:
        return text.encode("latin-1")
    except UnicodeEncodeError:
        raise _Malformed(token, "a byte is written as itself if it is ASCII, else as `\\x00` to `\\xff`") from None


def _number(token: Token) -> int | float:
    text = str(token)
    if "x" in text:
        return int(text, 16)
    if "." in text or "e" in text or "E" in text:
        return float(text)
    if len(text) > 4000:
        raise _Malformed(token, "an integer of thousands of digits is written in base 16: `0x...`")
    return int(text)


class _Records(Transformer[Token, list[_Workflow]]):
    """Called by the parser as rules complete; makes records and looks nothing up."""

    def start(self, items: list[_Workflow]) -> list[_Workflow]:
        return items

    def workflow(self, items: list[Any]) -> _Workflow:
        name, params, types, scope, calls, loc, seq, ops, end = items
        return _Workflow(name, params or (), types or [], scope, calls, loc, seq is not None, ops, end)

    def scope(self, items: list[Token]) -> Token:
        return items[0]

    def calls(self, items: list[Token]) -> list[Token]:
        return [t for t in items if t.type == "SYMBOL"]

    def op(self, items: list[Any]) -> _Op:
        results, name, lead, symbol, operands, attrs, types, loc, regions = items
        return _Op(results or [], name, lead, symbol, operands or [], attrs or [], types or [], loc, regions)

    def operand(self, items: list[Any]) -> _Operand:
        return _Operand(*items)

    def region(self, items: list[Any]) -> _Region:
        label, guard, params, seq, ops, end = items
        return _Region(label, guard, params or (), seq is not None, ops, end)

    def _items(self, items: list[Any]) -> list[Any]:
        return items

    ops = results = values = operands = attrs = regions = types = _items

    def _one(self, items: list[Any]) -> Any:
        return items[0]

    label = _one

    def end(self, items: list[Any]) -> _End:
        return _End(*items)

    def attr(self, items: list[Any]) -> tuple[Token, Attr]:
        name, literal = items
        return name, literal.value

    def params(self, items: list[_Param]) -> tuple[_Param, ...]:
        return tuple(items)

    def param(self, items: list[Any]) -> _Param:
        return _Param(*items)

    def type(self, items: list[Any]) -> _Type:
        name, *args = items
        types = tuple(t for t in args if t is not None)
        return _Type(name, types, _deeper(types, name) if types else 0)

    def literal(self, items: list[Any]) -> _Literal:
        (item,) = items
        return _Literal(_LITERALS[item.type](item), 0) if isinstance(item, Token) else item

    def tuple(self, items: list[Any]) -> _Literal:
        parts = [i for i in items if isinstance(i, _Literal)]
        return _Literal(tuple(p.value for p in parts), _deeper(parts, items[0]))


def _deeper(parts: Sequence[_Type | _Literal], token: Token) -> int:
    depth = 1 + max((p.depth for p in parts), default=0)
    if depth > MAX_DEPTH:
        raise _Malformed(token, f"nested more than {MAX_DEPTH} deep")
    return depth


_LITERALS: Final[dict[str, Callable[[Token], Attr]]] = {
    "STRING": _unquote,
    "BLOCK": _block,
    "BYTES": _bytes,
    "NUMBER": _number,
    "INFINITE": float,
    "TRUE": lambda _: True,
    "FALSE": lambda _: False,
    "NONE": lambda _: None,
}


@lru_cache(maxsize=1)
def _lark() -> Lark:
    grammar = Path(__file__).with_name("grammar.lark").read_text(encoding="utf-8")
    return Lark(grammar, parser="lalr", lexer="contextual", transformer=_Records(), maybe_placeholders=True)


@dataclass(slots=True)
class _Definition:
    value: Value
    token: Token


class _Resolver:
    """Turns the records of one workflow into its body: one walk in program order, with the values that are visible."""

    def __init__(self, workflow: _Workflow) -> None:
        self.workflow = workflow
        self.visible: dict[str, Value] = {}
        self.defined: dict[str, Token] = {}
        self.types: dict[str, Type] = {}
        self.depth = 0
        self.file: str | None = None
        self.loc = self.location(workflow.loc) if workflow.loc is not None else None
        self.file = self.loc.file if self.loc is not None else None

    def body(self) -> Region:
        flow = self.workflow
        region = self.region(flow.params, flow.ops, flow.end, flow.ordered)
        declared = [self.type(t) for t in flow.types]
        actual = [v.type for v in region.yields]
        if declared != actual:
            said, given = (", ".join(map(str, types)) or "nothing" for types in (declared, actual))
            token = flow.types[0].name if flow.types else flow.name
            raise _Malformed(
                token, f"workflow @{_bare(flow.name)} is declared to return {said}, but returns {given}", code="F034"
            )
        return region

    def region(self, params: Iterable[_Param], ops: list[_Op], end: _End | None, ordered: bool) -> Region:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            token = ops[0].name if ops else self.workflow.name
            raise _Malformed(token, f"regions are nested more than {MAX_DEPTH} deep")
        mine: list[str] = []
        values = tuple(self.define(p.name, self.type(p.type), mine) for p in params)
        for before, op in pairwise(ops):
            first = op.results[0] if op.results else op.name
            if first.line == before.name.line:
                hint = _literal_hint(first)
                raise _Malformed(first, f"unexpected `{first}`: an operation begins on a new line", hint)
        done = tuple([self.op(op, mine) for op in ops])
        if end is not None and (end.word == "return") != (self.depth == 1):
            message = f"unexpected `{end.word}`"
            raise _Malformed(
                end.word, message, "a workflow ends with `return`, a region inside an operation with `yield`"
            )
        yields = tuple([self.use(t) for t in end.values]) if end is not None else ()
        region = Region(values, done, yields, ordered)
        for name in mine:
            del self.visible[name]
        self.depth -= 1
        return region

    def define(self, token: Token, type: Type, mine: list[str]) -> Value:
        name = _bare(token)
        if name in self.defined:
            raise _Malformed(
                token,
                f"value `{token}` is defined twice: first in line {self.defined[name].line}",
                f"a name is given once in a workflow, in all its regions; call this one `%{name}.1`",
                "F032",
            )
        self.defined[name] = token
        mine.append(name)
        value = self.visible[name] = Value(name, type)
        return value

    def use(self, token: Token) -> Value:
        value = self.visible.get(token[1:]) or self.visible.get(_bare(token))
        if value is None:
            raise self.undefined(token)
        return value

    def undefined(self, token: Token) -> _Malformed:
        name = _bare(token)
        if name in self.defined:
            line = self.defined[name].line
            where = f"it is defined in line {line}, in a region that has ended: let the region yield it"
        elif (later := _line_of(self.workflow.ops, name)) is not None:
            where = f"it is defined later, in line {later}: a value is defined before it is used"
        elif close := get_close_matches(name, self.visible, 1, 0.6):
            where = f"did you mean `%{close[0]}`?"
        else:
            shown = [f"`%{n}`" for n in self.visible][-6:]
            where = f"visible here: {', '.join(shown)}" if shown else "no value is visible here"
        return _Malformed(token, f"no value `{token}` is visible here", where, "F031")

    def type(self, t: _Type) -> Type:
        name = str(t.name)
        if not t.args and name != "tuple":
            found = ATOMS.get(name)
            if found is not None:
                return found
            known = [*ATOMS, *ARITY]
            if name in ARITY:
                raise _Malformed(t.name, f"type `{name}` takes arguments", f"write `{_EXAMPLES[name]}`", "F034")
            raise _Malformed(t.name, f"there is no type `{name}`", _did_you_mean(name, known), "F034")
        if name not in ARITY:
            if name in ATOMS:
                raise _Malformed(t.name, f"type `{name}` takes no arguments", code="F034")
            raise _Malformed(t.name, f"there is no type `{name}`", _did_you_mean(name, [*ATOMS, *ARITY]), "F034")
        if ARITY[name] not in (None, len(t.args)):
            raise _Malformed(
                t.name,
                f"type `{name}` takes {ARITY[name]} argument(s), not {len(t.args)}",
                f"write `{_EXAMPLES[name]}`",
                "F034",
            )
        return Type(name, tuple([self.type(a) for a in t.args]))

    def location(self, token: Token) -> Loc:
        match = _LOC.fullmatch(token)
        if match is None:
            raise _Malformed(token, "malformed location", 'a location is `loc("file.py":LINE:COLUMN-COLUMN)`')
        quoted, line, col, end = match.groups()
        if quoted is None and self.file is None:
            raise _Malformed(
                token,
                "this location names no file",
                'write `loc("file.py":9:1-8)`, or give the workflow a `loc("file.py":8)`',
            )
        file = self.file if quoted is None else _unquote(Token.new_borrow_pos("STRING", quoted, token))
        assert file is not None
        if col == "0":
            raise _Malformed(token, "columns count from 1")
        return Loc(file, int(line or 0), int(col) - 1 if col else 0, int(end) if end else 0)

    def op(self, op: _Op, mine: list[str]) -> Op:
        name = str(op.name)
        spec = OPS.get(name)
        if spec is None:
            raise _Malformed(op.name, f"there is no operation `{name}`", _did_you_mean(name, OPS), "F033")
        attrs: dict[str, Attr] = {}
        for token, value in op.attrs:
            key = _word(token)
            if key in attrs:
                raise _Malformed(token, f"attribute `{key}` is given twice")
            attrs[key] = value
        if op.lead is not None:
            self.main_attr(op, attrs, LEADING.get(name), op.lead.value, "literal")
        if op.symbol is not None:
            self.main_attr(op, attrs, SYMBOLS.get(name), _bare(op.symbol), "@name")
        operands = tuple([self.use(o.value) for o in op.operands])
        if name in NAMED:
            if "params" not in attrs and (operands or name == "py"):
                attrs["params"] = tuple(
                    [
                        _word(o.name) if o.name is not None else v.name.split(".")[0]
                        for o, v in zip(op.operands, operands, strict=True)
                    ]
                )
        elif any(o.name is not None for o in op.operands):
            self.keywords(op, attrs)
        regions = self.regions(op, attrs)
        if len(op.types) != len(op.results):
            raise _Malformed(
                op.types[len(op.results)].name if len(op.types) > len(op.results) else op.name,
                f"`{name}` has {len(op.results)} result(s) but {len(op.types)} type(s)",
                "write the type of each result after the colon: `%x, %y = ... : text, docs`",
            )
        loc = self.location(op.loc) if op.loc is not None else None
        results = tuple([self.define(r, self.type(t), mine) for r, t in zip(op.results, op.types, strict=True)])
        return Op(name, operands, results, Attrs(attrs) if attrs else NO_ATTRS, regions, loc)

    def main_attr(self, op: _Op, attrs: dict[str, Attr], attr: str | None, value: Attr, what: str) -> None:
        if attr is None:
            raise _Malformed(
                op.name,
                f"`{op.name}` takes no {what} before its operands",
                "write it as an attribute in braces: `{name = ...}`",
            )
        if attr in attrs:
            raise _Malformed(op.name, f"attribute `{attr}` of `{op.name}` is given twice")
        attrs[attr] = value

    def keywords(self, op: _Op, attrs: dict[str, Attr]) -> None:
        names: list[str] = []
        for operand in op.operands:
            if operand.name is not None:
                names.append(_word(operand.name))
            elif names:
                raise _Malformed(operand.value, "an operand without a name follows one with a name")
        if "kw" in attrs:
            raise _Malformed(op.name, "attribute `kw` and named operands say the same thing: write one of them")
        attrs["kw"] = tuple(names)

    def regions(self, op: _Op, attrs: dict[str, Attr]) -> tuple[Region, ...]:
        labels = [str(r.label) for r in op.regions]
        expected = list(OPS[str(op.name)].regions)
        if expected and expected[-1] == "*handlers":
            expected[-1:] = ["except"] * (len(labels) - len(expected) + 1)
            if "handlers" not in attrs:
                attrs["handlers"] = tuple(
                    _unquote(r.guard) if r.guard is not None else "" for r in op.regions if r.label == "except"
                )
            elif any(r.guard is not None for r in op.regions):
                raise _Malformed(
                    op.name, "attribute `handlers` and the texts after `except` say the same thing: write one of them"
                )
        if labels != expected:
            wrong = next(
                (r.label for r, e in zip(op.regions, [*expected, *[""] * len(labels)], strict=False) if r.label != e),
                op.name,
            )
            said = ", ".join(f"`{e}`" for e in expected) or "none"
            raise _Malformed(
                wrong, f"the regions of `{op.name}` are {said}; here: {', '.join(f'`{n}`' for n in labels) or 'none'}"
            )
        done = []
        for r in op.regions:
            if r.guard is not None and r.label != "except":
                raise _Malformed(r.guard, f"only `except` has a text before its brace, `{r.label}` has none")
            done.append(self.region(r.params, r.ops, r.end, r.ordered))
        return tuple(done)


_EXAMPLES: Final = {name: f"{name}<{', '.join(['text'] * (count or 0))}>" for name, count in ARITY.items()}


_USUAL: Final = {
    "str": "text",
    "string": "text",
    "integer": "int",
    "boolean": "bool",
    "number": "float",
    "array": "list",
}


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    names = list(known)
    usual = _USUAL.get(name)
    close = [usual] if usual in names else get_close_matches(name, names, 1, 0.6)
    return f"did you mean `{close[0]}`?" if close else f"there are: {', '.join(names)}"


def _literal_hint(token: str) -> str | None:
    return "the literals are `true`, `false` and `none`" if token in ("True", "False", "None") else None


def _line_of(ops: Sequence[_Op], name: str) -> int | None:
    """The line that defines a value, looking into all regions."""
    for op in ops:
        for token in (*op.results, *(p.name for r in op.regions for p in r.params)):
            if _bare(token) == name:
                return token.line
        for region in op.regions:
            line = _line_of(region.ops, name)
            if line is not None:
                return line
    return None


def _link(flows: list[_Workflow]) -> Graph:
    """The first workflow, holding those it calls: what stands after `calls`, or the ones that its body calls."""
    by_name: dict[str, _Workflow] = {}
    for flow in flows:
        name = _bare(flow.name)
        if name in by_name:
            raise _Malformed(
                flow.name,
                f"workflow {flow.name} is defined twice: first in line {by_name[name].name.line}",
                code="F032",
            )
        by_name[name] = flow
    done: dict[str, Graph] = {}
    open_: list[str] = []

    def build(name: str) -> Graph:
        if name in done:
            return done[name]
        open_.append(name)
        flow = by_name[name]
        resolver = _Resolver(flow)
        body = resolver.body()
        if flow.calls is None:
            callees = [n for n in called_names(body) if n in by_name and n not in open_]
        else:
            callees = [_bare(t) for t in flow.calls]
            for token, callee in zip(flow.calls, callees, strict=True):
                if callee not in by_name:
                    raise _Malformed(
                        token, f"this text defines no workflow {token}", _did_you_mean(callee, by_name), "F031"
                    )
                if callee in open_:
                    raise _Malformed(
                        token, f"{token} holds this workflow already: `calls` must not go round in a circle"
                    )
        scope = _unquote(flow.scope) if flow.scope is not None else ""
        done[name] = Graph(name, body, scope, tuple(build(c) for c in callees), resolver.loc)
        open_.pop()
        return done[name]

    graph = build(_bare(flows[0].name))
    for flow in flows:
        if _bare(flow.name) not in done:
            raise _Malformed(
                flow.name,
                f"workflow {flow.name} is not part of {flows[0].name}: nothing calls it",
                "the first workflow of a text is the whole; remove this one, or list it after `calls`",
            )
    return graph


_IN_WORDS: Final = {
    "VALUE": "a value such as `%x`",
    "SYMBOL": "a name such as `@docs`",
    "NAME": "a name",
    "LOC": '`loc("file.py":LINE)`',
    "STRING": "a text in double quotes",
    "BLOCK": "a text block",
    "BYTES": "bytes",
    "NUMBER": "a number",
    "INFINITE": "`inf`",
    "TRUE": "`true`",
    "FALSE": "`false`",
    "NONE": "`none`",
    "SEQ": "`seq`",
    "$END": "the end of the text",
}
_LITERAL_TERMINALS: Final = {"STRING", "BLOCK", "BYTES", "NUMBER", "INFINITE", "TRUE", "FALSE", "NONE"}
_REGION_TERMINALS: Final = {"THEN", "ELSE", "COND", "BODY", "EXCEPT"}


def _expectation(terminals: set[str], lark: Lark) -> str:
    """The terminals in words, the likeliest first."""
    left = set(terminals)
    words = []
    if left >= _LITERAL_TERMINALS:
        left -= _LITERAL_TERMINALS
        words.append("a literal")
    if left >= _REGION_TERMINALS:
        left -= _REGION_TERMINALS
        words.append("a region")
    shown: dict[str, str] = {}
    for terminal in lark.terminals:
        shown[terminal.name] = _IN_WORDS.get(terminal.name) or f"`{terminal.pattern.value}`".replace("\\", "")
    shown["$END"] = _IN_WORDS["$END"]
    words = sorted(shown.get(t, t) for t in left) + words
    words.sort(key=lambda w: not w.startswith("`"))  # punctuation says more than "a name"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _expected(error: UnexpectedToken | UnexpectedEOF) -> set[str]:
    return {str(t) for t in (isinstance(error, UnexpectedToken) and error.accepts) or error.expected}


def _explain(error: UnexpectedInput, text: str, lark: Lark) -> tuple[str, str | None, int, int, int]:
    """(message, hint, line, column, width) of lark's complaint; line and column count from 1."""
    hint = None
    if isinstance(error, UnexpectedEOF) or (isinstance(error, UnexpectedToken) and error.token.type == "$END"):
        lines = text.split("\n")
        while len(lines) > 1 and not lines[-1].strip():
            lines.pop()
        if not text.strip():
            return "the text is empty", "a workflow begins with `workflow @name(...) -> type {`", 1, 1, 1
        expected = _expected(error)
        if "RBRACE" in expected:
            hint = "a `{` has no `}`"
        return f"the text ends here; expected {_expectation(expected, lark)}", hint, len(lines), len(lines[-1]) + 1, 1
    if isinstance(error, UnexpectedToken):
        token = error.token
        expected = _expected(error)
        shown = str(token).split("\n")[0]
        message = f"unexpected `{shown[:40]}`; expected {_expectation(expected, lark)}"
        before = error.token_history[-1] if error.token_history else None
        if token.type == "EQUAL" and isinstance(before, Token) and before.type == "NAME":
            hint = f"a value's name begins with `%`: write `%{before} = ...`"
        else:
            hint = _literal_hint(token)
        return message, hint, token.line or 1, token.column or 1, max(1, len(shown))
    assert isinstance(error, UnexpectedCharacters)
    char = text[error.pos_in_stream] if error.pos_in_stream is not None else "?"
    if char == '"':
        message = "this text has no closing quote on its line"
        if text.startswith('"""', error.pos_in_stream or 0):
            message = 'this block is not closed, or does not begin with a line of `"""` alone'
        hint = 'a line break in a text is `\\n`; a block is `"""`, whole lines, and `"""` at the beginning of a line'
    else:
        message = f"unexpected character {char!r}; expected {_expectation(set(error.allowed or ()), lark)}"
    if char == "'":
        hint = "texts stand in double quotes"
    return message, hint, error.line, error.column, 1


def parse_graph(text: str, filename: str = "<flow>") -> Graph:
    """The workflow that the text describes: its first one, holding those that it calls.

    The graph is not verified; `flowc.ir.verify` says whether it obeys the rules. ParseError if the text is malformed.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n")
    lark = _lark()
    try:
        flows: Any = lark.parse(text)
        return _link(flows)
    except UnexpectedInput as e:
        message, hint, line, column, width = _explain(e, text, lark)
        code = "F030"
    except _Malformed as e:
        token = e.token
        message, hint, code = e.message, e.hint, e.code
        line, column, width = token.line or 1, token.column or 1, len(token.split("\n")[0])
    lines = text.split("\n")
    source = lines[line - 1] if line <= len(lines) else ""
    raise ParseError(
        message, code=code, loc=Loc(filename, line, column - 1, column - 1 + width), hint=hint, source=source
    ) from None


__all__ = ["parse_graph"]
