"""IR as text. `print_graph` writes what `flowc.ir.parser.parse_graph` reads back into an equal graph.

    workflow @hyde(%question: text) -> docs scope "examples/hyde.py:hyde" loc("examples/hyde.py":8:1-4) {
      %prompt = template "Write a passage that answers: {}" (%question) : text      loc(9:13-60)
      %text = generate @default (%prompt) {max_tokens = 96, temperature = 0.0} : text    loc(9:4-80)
      %docs = search @pydocs (%text) {k = 5} : docs                                 loc(10:12-40)
      return %docs
    }

One operation a line, in program order; nothing on a line depends on another line, so that diffs are small. A region
with `seq` before its brace runs in exactly this order; one without it waits for data and effects only. Attributes stand
in the order of the op table, and an operation's main attribute stands up front (`LEADING`, `SYMBOLS`). A location
without a file is in the workflow's own file; columns count from 1 and include the last.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, isnan
from typing import Final

from .core import Attr, Graph, Op, Region, Value, walk
from .errors import Loc
from .ops import OPS
from .types import Type

LEADING: Final[dict[str, str]] = {
    "const": "value",
    "equals": "value",
    "template": "text",
    "py": "source",
    "bound": "variable",
}
"""Operation -> the attribute whose literal stands right after its name."""

SYMBOLS: Final[dict[str, str]] = {
    **{name: "resource" for name, spec in OPS.items() if spec.has_resource},
    "tool": "tool",
    "call": "callee",
}
"""Operation -> the attribute that stands as `@name`."""

NAMED: Final = frozenset({"py", "try"})
"""Operations whose operands all have names (the attribute `params`). Elsewhere named operands are those in `kw`."""

WORDS: Final = {"true": True, "false": False, "none": None}
LOC_COLUMN: Final = 84  # a fixed column: aligning to the longest line would make every diff a diff of the whole region
BLOCK_CHARS: Final = 80  # a longer text of several lines is written as a block

_ESCAPE = re.compile(r'["\\]|[^ -~]')
_SHORT = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_BYTES = [f"\\x{b:02x}" if not 32 <= b < 127 else f"\\{b:c}" if b in b'"\\' else chr(b) for b in range(256)]
_IDENTIFIER = re.compile(r"[^\W\d][\w.]*")
_VALUE_NAME = re.compile(r"[\w.]+")
_SYMBOL_NAME = re.compile(r"[\w.\-]+")
_NOT_A_NAME = frozenset({*WORDS, "inf", "nan"})


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if char.isprintable():
        return char
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def quote(text: str) -> str:
    """The text in double quotes on one line; what does not print, lone surrogates included, is escaped."""
    return f'"{_ESCAPE.sub(_escaped, text)}"'


def print_literal(value: object) -> str:
    """An attribute's value as text. Integers of thousands of digits are in base 16, which has no length limit."""
    match value:
        case None:
            return "none"
        case True:
            return "true"
        case False:
            return "false"
        case str():
            return quote(value)
        case int():
            return str(value) if value.bit_length() < 4096 else hex(value)
        case float():
            return repr(value) if isfinite(value) else "nan" if isnan(value) else "inf" if value > 0 else "-inf"
        case bytes():
            return f'b"{"".join(map(_BYTES.__getitem__, value))}"'
        case tuple():
            return f"({', '.join(map(print_literal, value))}{',' if len(value) == 1 else ''})"
        case _:
            return repr(value)  # no attribute can be this; the verifier says so


def _block(text: str, indent: str) -> str | None:
    """The text as a block of raw lines, or None where an editor or the quotes would damage it."""
    lines = text.split("\n")
    if '"""' in text or any(line != line.rstrip() or not line.isprintable() for line in lines):
        return None
    return "\n".join(['"""', *(indent + line if line else "" for line in lines), f'{indent}"""'])


def stem(value: Value) -> str:
    """The variable's name without the number that makes it unique: `draft` for `%draft.2`."""
    return value.name.split(".")[0]


def _name(text: str) -> str:
    return text if _IDENTIFIER.fullmatch(text) and text not in _NOT_A_NAME else quote(text)


def _symbol(text: str) -> str:
    return f"@{text}" if _SYMBOL_NAME.fullmatch(text) else f"@{quote(text)}"


def _are_names(attr: object, count: int) -> bool:
    return type(attr) is tuple and len(attr) == count and all(type(a) is str for a in attr)


class _Printer:
    """Prints one workflow. Never fails, even on a graph that breaks the rules: error messages show those as well."""

    __slots__ = ("file", "locs", "types", "values")

    def __init__(self, file: str | None = None, locs: bool = True) -> None:
        self.file = file
        self.locs = locs
        self.types: dict[Type, str] = {}
        self.values: dict[str, str] = {}

    def value(self, value: Value) -> str:
        name = value.name
        text = self.values.get(name)
        if text is None:
            text = self.values[name] = f"%{name}" if _VALUE_NAME.fullmatch(name) else f"%{quote(name)}"
        return text

    def type(self, t: Type) -> str:
        text = self.types.get(t)
        if text is None:
            text = self.types[t] = str(t)
        return text

    def params(self, values: Sequence[Value]) -> str:
        return ", ".join(f"{self.value(v)}: {self.type(v.type)}" for v in values)

    def loc(self, loc: Loc, with_file: bool = False) -> str:
        here = [] if loc.file == self.file and not with_file and loc.line else [quote(loc.file)]
        if loc.line or loc.col or loc.end_col:
            here.append(str(loc.line))
        if loc.col or loc.end_col:
            here.append(f"{loc.col + 1}-{loc.end_col}" if loc.end_col else str(loc.col + 1))
        return f"loc({':'.join(here)})"

    def operands(self, op: Op, hidden: set[str]) -> str:
        shown = [self.value(v) for v in op.operands]
        params, kw = op.attrs.get("params"), op.attrs.get("kw")
        if op.name in NAMED:
            if _are_names(params, len(shown)) and (shown or op.name == "py"):
                hidden.add("params")
                assert type(params) is tuple
                for i, (name, v) in enumerate(zip(params, op.operands, strict=True)):
                    if name != stem(v):
                        shown[i] = f"{_name(str(name))}={shown[i]}"
        elif type(kw) is tuple and 0 < len(kw) <= len(shown) and _are_names(kw, len(kw)):
            hidden.add("kw")
            first = len(shown) - len(kw)
            shown[first:] = [f"{_name(str(k))}={s}" for k, s in zip(kw, shown[first:], strict=True)]
        return f" ({', '.join(shown)})" if shown else ""

    def attrs(self, attrs: Mapping[str, Attr], hidden: set[str], order: Mapping[str, object]) -> str:
        names = [n for n in order if n in attrs and n not in hidden]
        if len(names) + len(hidden) < len(attrs):  # what a schedule added, or a graph that breaks the rules
            names += sorted(n for n in attrs if n not in order and n not in hidden)
        return f" {{{', '.join(f'{_name(n)} = {print_literal(attrs[n])}' for n in names)}}}" if names else ""

    def head(self, op: Op, indent: str = "", flat: bool = False) -> str:
        """The op without its location and regions."""
        parts = [indent]
        if op.results:
            parts += ", ".join(map(self.value, op.results)), " = "
        parts.append(op.name)
        attrs, hidden = op.attrs, set[str]()
        lead = LEADING.get(op.name)
        if lead is not None and lead in attrs:
            literal = attrs[lead]
            hidden.add(lead)
            block = None
            if (
                type(literal) is str
                and not flat
                and "\n" in literal
                and (op.name == "py" or len(literal) > BLOCK_CHARS)
            ):
                block = _block(literal, indent + "    ")
            parts += " ", block or print_literal(literal)
        symbol = SYMBOLS.get(op.name)
        if symbol is not None and symbol in attrs:
            target = attrs[symbol]
            if type(target) is str and target:
                hidden.add(symbol)
                parts += " ", _symbol(target)
        parts.append(self.operands(op, hidden))
        if op.name == "try" and _are_names(attrs.get("handlers"), len(op.regions) - 1):
            hidden.add("handlers")
        if len(hidden) < len(attrs):
            spec = OPS.get(op.name)
            parts.append(self.attrs(attrs, hidden, spec.attrs if spec else {}))
        if op.results:
            parts += " : ", ", ".join([self.type(v.type) for v in op.results])
        return "".join(parts)

    def labels(self, op: Op) -> Iterator[str]:
        spec = OPS.get(op.name)
        names = list(spec.regions) if spec else []
        if names and names[-1] == "*handlers":
            handlers = op.attrs.get("handlers")
            are_valid = _are_names(handlers, len(op.regions) - 1)
            shown = handlers if are_valid and type(handlers) is tuple else ("",) * len(op.regions)
            names[-1:] = [f"except {quote(str(h))}" if h else "except" for h in shown]
        for i in range(len(op.regions)):
            yield names[i] if i < len(names) else "body"

    def op(self, op: Op, indent: str, out: list[str]) -> None:
        line = self.head(op, indent)
        if op.loc is not None and self.locs:
            gap = "" if op.regions else " " * (LOC_COLUMN - len(line) + line.rfind("\n"))
            line = f"{line}{gap or ' '}{'' if op.regions else ' '}{self.loc(op.loc)}"
        for label, region in zip(self.labels(op), op.regions, strict=True):
            out.append(f"{line} {label}{self.region_head(region)} {{")
            self.region(region, indent + "  ", "yield", out)
            line = f"{indent}}}"
        out.append(line)

    def region_head(self, region: Region) -> str:
        params = f" ({self.params(region.params)})" if region.params else ""
        return f"{params}{' seq' if region.ordered else ''}"

    def region(self, region: Region, indent: str, end: str, out: list[str]) -> None:
        for op in region.ops:
            self.op(op, indent, out)
        if region.yields:
            out.append(f"{indent}{end} {', '.join(map(self.value, region.yields))}")

    def graph(self, graph: Graph, defined: Mapping[str, Graph], out: list[str]) -> None:
        head = [f"workflow {_symbol(graph.name)}({self.params(graph.params)})"]
        if graph.body.yields:
            head.append(f"-> {', '.join(self.type(v.type) for v in graph.body.yields)}")
        if graph.scope:
            head.append(f"scope {quote(graph.scope)}")
        callees = [g.name for g in graph.callees]
        if callees != [name for name in called_names(graph.body) if name in defined and name != graph.name]:
            head.append(f"calls {', '.join(map(_symbol, callees)) if callees else 'none'}")
        if graph.loc is not None and self.locs:
            head.append(self.loc(graph.loc, with_file=True))
        if graph.body.ordered:
            head.append("seq")
        out.append(f"{' '.join(head)} {{")
        self.region(graph.body, "  ", "return", out)
        out.append("}")


def called_names(region: Region) -> list[str]:
    """The workflows that a region calls, in order of first call."""
    calls = (op for op in walk(region) if op.name == "call" and "callee" in op.attrs)
    return list(dict.fromkeys(str(op.attrs["callee"]) for op in calls))


def all_graphs(graph: Graph) -> list[Graph]:
    """The workflow, then every workflow that it or its callees hold, each once, callers first."""
    found: dict[str, list[Graph]] = {}
    out: list[Graph] = []

    def visit(g: Graph) -> None:
        same = found.setdefault(g.name, [])
        if any(g is other or g == other for other in same):
            return
        same.append(g)
        out.append(g)
        for callee in g.callees:
            visit(callee)

    visit(graph)
    return out


def print_graph(graph: Graph, *, locs: bool = True) -> str:
    """The workflow and those it calls as text that parses back into an equal graph.

    Without `locs` the text says nothing of source locations, and the graph is equal but for those.
    """
    out: list[str] = []
    graphs = all_graphs(graph)
    defined = {g.name: g for g in graphs}
    for g in graphs:
        if out:
            out.append("")
        _Printer(g.loc.file if g.loc is not None and locs else None, locs).graph(g, defined, out)
    return "\n".join(out) + "\n"


def print_op(op: Op) -> str:
    """One operation on one line, without location; its regions are `{ ... }`. For messages and reports."""
    printer = _Printer(locs=False)
    regions = (
        f" {label}{printer.region_head(region)} {{ ... }}"
        for label, region in zip(printer.labels(op), op.regions, strict=True)
    )
    return printer.head(op, flat=True) + "".join(regions)


__all__ = [
    "LEADING",
    "NAMED",
    "SYMBOLS",
    "all_graphs",
    "called_names",
    "print_graph",
    "print_literal",
    "print_op",
    "quote",
    "stem",
]
