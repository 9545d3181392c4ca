"""Random workflows as Python source: every construct of the language, nested, with effects, errors, aliases and unbound
variables.

`generate(rng)` draws a module that runs in `tests.program_world`. The draws come from anything that has the methods of
`random.Random`, so that a seed repeats a program and hypothesis can shrink one. Programs are mostly well typed: one
that fails at its first line tests little.
"""

from __future__ import annotations

import ast
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

INT, STR, BOOL, INTS, STRS, NESTED, DICT, PAIR, BOX, DOCS, DOC, ANY = (
    "int", "str", "bool", "ints", "strs", "nested", "dict", "pair", "box", "docs", "doc", "any",
)  # fmt: skip
KINDS = (INT, STR, BOOL, INTS, STRS, NESTED, DICT, PAIR, BOX, DOCS)
ANNOTATIONS = {INT: "int", STR: "str", BOOL: "bool", INTS: "list[int]", STRS: "list[str]"}
NAMES = ("a", "b", "c", "d", "e", "f", "g", "h")
WORDS = ("", "x", "yes", "no", "A b", "éß", "12", "{q}")
ERRORS = ("ValueError", "LookupError", "(TypeError, ArithmeticError)", "Exception", "OSError", "OwnError", "KeyError")
HEAD = """from tests.program_world import *

GLOBAL = 5
WIDTH = 4
WORD = 'word'
BOX = Box(1)
CONST_INTS = [5, 6]
CONST_WORDS = ['k', 'l']
ONE_DOC = Docs([Doc(1, 'one', 0.5, 's', 'T')])
OPTIONS = ('yes', 'no')


"""


@dataclass(frozen=True)
class Program:
    """A module with the workflow `main`, and arguments to call it with."""

    source: str
    calls: tuple[str, ...]  # argument tuples as Python text
    is_async: bool


@dataclass
class Signature:
    name: str
    params: tuple[tuple[str, str], ...]  # (name, kind)
    result: str
    is_async: bool
    is_recursive: bool = False


@dataclass
class Function:
    """What is known inside the function being written."""

    is_async: bool
    vars: dict[str, str] = field(default_factory=dict)
    maybe: set[str] = field(default_factory=set)  # may be unbound
    loops: int = 0
    catching: int = 0
    in_finally: bool = False
    holds: set[str] = field(default_factory=set)  # variables that a closure holds on to: not bound again
    tasks: int = 0


class Writer:
    """Writes one module."""

    def __init__(self, rng: random.Random, size: int) -> None:
        self.rng = rng
        self.size = size
        self.fuel = size
        self.lines: list[str] = []
        self.indent = 0
        self.fn = Function(False)
        self.workflows: list[Signature] = []
        self.counter = 0
        self.no_await = 0  # inside a lambda or generator
        self.no_walrus = 0

    # -- draws
    def p(self, chance: float) -> bool:
        return self.rng.random() < chance

    def pick(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def fresh(self, stem: str) -> str:
        self.counter += 1
        return f"{stem}{self.counter}"

    def put(self, text: str) -> None:
        self.lines.append("    " * self.indent + text)

    @contextmanager
    def block(self, header: str) -> Iterator[None]:
        self.put(header)
        self.indent += 1
        before = len(self.lines)
        yield
        if len(self.lines) == before:
            self.put("pass")
        self.indent -= 1

    # -- variables
    def known(self, kind: str) -> list[str]:
        return [n for n, k in self.fn.vars.items() if k == kind and n not in self.fn.maybe]

    def read(self, kind: str) -> str | None:
        """A variable of the kind; seldom one that is unbound or of another kind."""
        if self.p(0.012) and self.fn.vars:
            return self.rng.choice(list(self.fn.vars))
        if self.p(0.004):
            return self.rng.choice(NAMES)
        found = self.known(kind)
        return self.rng.choice(found) if found else None

    def bind(self, name: str, kind: str) -> None:
        self.fn.vars[name] = kind
        self.fn.maybe.discard(name)

    def target(self) -> str:
        free = [n for n in NAMES if n not in self.fn.holds]
        return self.rng.choice(free)

    # -- expressions
    def e(self, kind: str, depth: int = 2) -> str:
        """An expression of this kind."""
        self.fuel -= 1
        if self.fuel <= -40:
            depth = 0
        if kind == ANY:
            kind = self.rng.choice(KINDS)
        name = self.read(kind)
        if name is not None and (depth <= 0 or self.p(0.35)):
            return name
        if depth <= 0:
            return self.literal(kind)
        options = getattr(self, f"_{kind}")(depth - 1)
        choice: Callable[[], str] = self.rng.choice(options)
        return choice()

    def literal(self, kind: str) -> str:
        n = self.rng.randrange(-2, 8)
        match kind:
            case "int":
                return str(n) if n >= 0 else f"({n})"
            case "str":
                return repr(self.rng.choice(WORDS))
            case "bool":
                return self.pick("True", "False")
            case "ints":
                return self.pick("[]", "[1, 2]", "[3]", "[0, 4, 2]", "CONST_INTS")
            case "strs":
                return self.pick("[]", "['u', 'v']", "['w']", "CONST_WORDS")
            case "nested":
                return self.pick("[]", "[[1], [2, 3]]", "[[0]]")
            case "dict":
                return self.pick("{}", "{'k': 1}", "{'x': 2, 'yes': 3}")
            case "docs":
                return self.pick("Docs()", "ONE_DOC")
            case "doc":
                return "ONE_DOC[0]"
            case "pair":
                return self.pick("(1, 'p')", "(0, '')")
            case _:
                return self.pick("Box(0)", "Box(3)", "BOX")

    def common(self, kind: str, depth: int) -> list[Callable[[], str]]:
        """Expressions that there are of every kind."""
        e = self.e
        found: list[Callable[[], str]] = [
            lambda: self.literal(kind),
            lambda: f"note({e(kind, depth)})",
            lambda: f"same({e(kind, depth)})",
            lambda: f"({e(kind, depth)} if {self.test(depth)} else {e(kind, depth)})",
            lambda: f"({e(kind, depth)} {self.pick('or', 'and')} {e(kind, depth)})",
            lambda: f"boom({e(kind, depth)})" if self.p(0.5) else f"same({e(kind, depth)})",
            lambda: self.called(kind, depth) or self.literal(kind),
            lambda: self.walrus(kind, depth),
            lambda: f"(lambda q: {self.pick('q', 'note(q)', 'same(q)')})({e(kind, depth)})",
            lambda: f"apply(lambda q: q, {e(kind, depth)})",
            lambda: f"({e(kind, depth)}, {e(ANY, 0)})[0]",
        ]
        return found

    def walrus(self, kind: str, depth: int) -> str:
        if self.fn.holds or self.no_walrus:
            return self.e(kind, depth)
        name = self.target()
        text = f"({name} := {self.e(kind, depth)})"
        self.fn.vars.setdefault(name, kind)
        if self.fn.vars[name] != kind:
            self.fn.vars[name] = "?"
        self.fn.maybe.add(name) if name not in self.known(kind) else None
        return text

    def called(self, kind: str, depth: int) -> str | None:
        fits = [
            w for w in self.workflows if w.result == kind and (not w.is_async or self.fn.is_async) and not self.no_await
        ]
        fits = [w for w in fits if not w.is_recursive]
        if not fits:
            return None
        w = self.rng.choice(fits)
        args = [self.e(k, depth) for _, k in w.params]
        if self.p(0.3) and args:
            args[-1] = f"{w.params[-1][0]}={args[-1]}"
        text = f"{w.name}({', '.join(args)})"
        return f"(await {text})" if w.is_async else text

    def await_(self, call: str) -> str:
        """A call of something that is awaited in an async workflow."""
        return f"(await {call})" if self.fn.is_async else call

    def test(self, depth: int) -> str:
        """An expression whose truth is looked at."""
        return self.e(BOOL, depth) if self.p(0.75) else self.e(ANY, depth)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Inside: no await and no walrus (a lambda, a generator)."""
        a, w = self.no_await, self.no_walrus
        self.no_await, self.no_walrus = a + 1, w + 1
        yield
        self.no_await, self.no_walrus = a, w

    @contextmanager
    def inner(self, **names: str) -> Iterator[None]:
        """Inside: comprehension variables."""
        saved = dict(self.fn.vars), set(self.fn.maybe)
        w = self.no_walrus
        self.no_walrus = w + 1
        for n, k in names.items():
            self.bind(n, k)
        yield
        self.fn.vars, self.fn.maybe = saved
        self.no_walrus = w

    def op(self, sync: str, depth: int) -> str:
        """A resource call, awaited where it must be; plain Python where that cannot be."""
        if self.fn.is_async and self.no_await:
            return "'no op'"
        return self.await_(sync)

    def generate(self, depth: int) -> str:
        options = self.pick("", "", ", max_tokens=9", f", max_tokens={self.rng.randrange(1, 4)}")
        return self.op(f"llm.generate({self.prompt(depth)}{options})", depth)

    def prompt(self, depth: int) -> str:
        return self.e(STR, depth) if self.p(0.4) else self.fstring(depth)

    def fstring(self, depth: int) -> str:
        parts = []
        for _ in range(self.rng.randrange(1, 4)):
            parts.append(self.pick("t ", "{{j}}", "- ", "é", ""))
            kind = self.rng.choice(KINDS)
            inner = self.e(kind, depth - 1)
            if any(c in inner for c in "\"'\\{}!:\n"):
                inner = self.read(kind) or ("1" if kind != STR else "WORD")
            form = ""
            if kind == INT:
                form = self.pick("", ":>4", ":03d", "!r", ":x", ":{WIDTH}")
            elif kind == STR:
                form = self.pick("", ":>6", "!r", "!s:<5", "!a", ":.2")
            elif self.p(0.3):
                form = "!r"
            parts.append("{" + inner + form + "}")
        return 'f"' + "".join(parts) + '"'

    def _int(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(INT, d),
            lambda: f"({e(INT, d)} {self.pick('+', '-', '*')} {e(INT, d)}) % 97",
            lambda: f"{e(INT, d)} // {e(INT, d)}" if self.p(0.4) else f"({e(INT, d)} + {e(INT, d)})",
            lambda: f"len({e(self.pick(STR, INTS, STRS, NESTED, DICT), d)})",
            lambda: f"sum({e(INTS, d)})",
            lambda: f"{self.pick('max', 'min')}({e(INT, d)}, {e(INT, d)})",
            lambda: f"{e(INTS, d)}[{self.pick('0', '-1', '1')}]" if self.p(0.4) else f"len({e(INTS, d)})",
            lambda: f"{e(DICT, d)}.get({e(STR, 0)}, {e(INT, 0)})",
            lambda: f"double({e(INT, d)})",
            lambda: f"halve({e(INT, d)})",
            lambda: f"declared_int({e(self.pick(INT, INT, STR), d)})" if self.p(0.3) else e(INT, d),
            lambda: f"put({e(ANY, d)})",
            lambda: self.op(f"aput({e(ANY, d)})", d) if self.fn.is_async else f"put({e(INT, d)})",
            lambda: f"parse_int({e(self.pick(INT, STR), d)})",
            lambda: self.gathered(INT, d),
            lambda: f"abs({e(INT, d)})",
            lambda: f"-{e(INT, 0)}",
            lambda: f"{e(PAIR, d)}[0]",
            lambda: f"sum({self.comp(INT, d)})",
            lambda: f"{e(STR, d)}.count('a')",
            lambda: f"poke({e(INTS, 0)})",
            lambda: "tick()",
            lambda: "GLOBAL",
            lambda: f"{e(BOX, 0)}.method({e(INT, d)})",
            lambda: f"[{e(INT, d)}, {e(INT, d)}][{self.pick('0', '1')}]",
            lambda: f"{e(DOC, d)}.id",
            lambda: f"int({e(DOC, d)}.score * 10)",
            lambda: f"len({e(DOCS, d)})",
            lambda: f"len({{{e(INT, d)}, {e(INT, d)}}})",
            lambda: f"divmod({e(INT, d)}, 3)[1]",
            lambda: f"sum(d.id for d in {e(DOCS, d)})",
            lambda: f"max({e(INTS, d)}, default=0, key=lambda q: note(q))",
        ]

    def _str(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(STR, d),
            lambda: self.fstring(d),
            lambda: self.fstring(d),
            lambda: f"({e(STR, d)} + {e(STR, d)})",
            lambda: f"('p: ' + {e(STR, d)} + {self.fstring(d)})",
            lambda: f"{e(STR, d)}.{self.pick('upper()', 'strip()', 'title()', 'lower()')}",
            lambda: f"cut({e(ANY, d)})",
            lambda: f"str({e(ANY, d)})",
            lambda: self.generate(d),
            lambda: self.generate(d),
            lambda: self.op(f"llm.choose({self.prompt(d)}, [{e(STR, d)}, 'no'])", d),
            lambda: self.op(f"llm.choose({e(STR, d)}, ['yes', 'no'])", d),
            lambda: f"lookup({e(ANY, d)}{self.pick('', ', k=3', f', k={e(INT, 0)}')})",
            lambda: self.op(f"alookup({e(ANY, d)})", d) if self.fn.is_async else f"lookup({e(STR, d)})",
            lambda: f"get({e(ANY, d)})",
            lambda: self.op(f"aget({e(ANY, d)})", d) if self.fn.is_async else f"get({e(STR, d)})",
            lambda: f"send({e(ANY, d)}{self.pick('', ', to=' + repr('b'))})",
            lambda: f"liar({e(self.pick(STR, STR, INT), d)})",
            lambda: self.gathered(STR, d),
            lambda: f"{e(STRS, d)}[{self.pick('0', '-1')}]" if self.p(0.4) else self.fstring(d),
            lambda: f"{self.pick(repr(', '), repr('|'))}.join({e(STRS, d)})",
            lambda: f"' '.join({self.comp(STR, d)})",
            lambda: f"{e(STR, d)}[{self.pick('1:', ':2', '::-1')}]",
            lambda: f"{e(PAIR, d)}[1]",
            lambda: f"str({self.op(f'docs.search({e(STR, d)}, k={self.rng.randrange(1, 3)})', d)})",
            lambda: f"('%s' % {e(INT, d)})",
            lambda: f"{e(STR, d)}.replace({e(STR, 0)}, 'z')[:50]",
            lambda: f"repr({e(ANY, d)})",
            lambda: f"{e(DOC, d)}.{self.pick('text', 'title', 'source')}",
            lambda: f"str({e(DOCS, d)})",
            lambda: f"apply(cut, *[{e(ANY, d)}])",
            lambda: f"lookup(*({e(STR, d)}, {e(INT, 0)}))",
            lambda: f"lookup(**{{'q': {e(STR, d)}}})",
            lambda: f"str({e(BOX, d)}.value)",
            lambda: f"'{{}}-{{}}'.format({e(ANY, d)}, {e(INT, 0)})",
            lambda: f"', '.join(sorted({{{e(STR, d)} for _ in {self.iterable(0)[0]}}}))",
        ]

    def _bool(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(BOOL, d),
            lambda: f"({e(INT, d)} {self.pick('<', '<=', '==', '!=', '>')} {e(INT, d)})",
            lambda: f"({e(INT, d)} < {e(INT, d)} {self.pick('<=', '!=')} {e(INT, d)})",
            lambda: f"({e(INT, d)} in {e(INTS, d)})",
            lambda: f"(not {e(ANY, d)})",
            lambda: f"({e(STR, d)} == {e(STR, d)})",
            lambda: f"({self.op(f'llm.choose({self.prompt(d)}, {self.options()})', d)} == 'yes')",
            lambda: f"({self.op(f'llm.choose({self.prompt(d)}, {self.options()})', d)} == 'yes')",
            lambda: f"{e(STR, d)}.startswith({e(STR, 0)})",
            lambda: f"{self.pick('any', 'all')}({self.generator(d)})",
            lambda: f"({e(INTS, d)} is {e(INTS, 0)})",
            lambda: f"bool({e(ANY, d)})",
            lambda: f"({e(ANY, 0)} is None)",
            lambda: f"isinstance({e(ANY, d)}, {self.pick('str', 'int', 'list')})",
        ]

    def options(self) -> str:
        return self.pick("['yes', 'no']", "('yes', 'no')", "OPTIONS")

    def _ints(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(INTS, d),
            lambda: f"[{e(INT, d)}, {e(INT, d)}]",
            lambda: f"[{e(INT, d)}]",
            lambda: f"[*{e(INTS, d)}, {e(INT, d)}]",
            lambda: self.comp(INT, d),
            lambda: self.comp(INT, d),
            lambda: f"({e(INTS, d)} + {e(INTS, d)})[:9]",
            lambda: f"{e(INTS, d)}[{self.pick('1:', ':2', ':')}]",
            lambda: f"sorted({e(INTS, d)}{self.pick('', ', reverse=True', ', key=lambda q: -q')})",
            lambda: f"list({e(INTS, d)})",
            lambda: f"list(range({e(INT, 0)}))",
            lambda: f"list(map(double, {e(INTS, d)}))",
            lambda: f"list(filter(None, {e(INTS, d)}))",
            lambda: f"hold({e(INTS, d)})",
            lambda: f"double({e(INTS, d)})[:9]",
            lambda: f"{e(NESTED, d)}[0]" if self.p(0.4) else f"[{e(INT, d)}]",
            lambda: f"list(each({e(INTS, d)}))",
            lambda: f"[int(q) for q in {e(STR, d)} if q.isdigit()]",
            lambda: f"list({e(DICT, d)}.values())",
            lambda: f"{e(INTS, d)}.copy()",
            lambda: f"[{self.op(f'llm.generate({e(STR, d)})', d)}.count('1')]",
        ]

    def _strs(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(STRS, d),
            lambda: f"[{e(STR, d)}, {e(STR, d)}]",
            lambda: f"{self.generate(d)}.splitlines()",
            lambda: f"{self.generate(d)}.splitlines()",
            lambda: f"{e(STR, d)}.split({self.pick('', repr(' '))})",
            lambda: self.comp(STR, d),
            lambda: self.comp(STR, d),
            lambda: f"({e(STRS, d)} + {e(STRS, d)})[:9]",
            lambda: f"sorted({e(STRS, d)})",
            lambda: f"list({e(STR, d)}[:4])",
            lambda: f"list({e(DICT, d)})",
            lambda: f"hold({e(STRS, d)})",
            lambda: (
                f"list({self.op(f'docs.search({e(STR, d)}, k=2)', d)}.texts)"
                if not (self.fn.is_async and self.no_await)
                else "['t']"
            ),
            lambda: self.gather_list(d),
        ]

    def _nested(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(NESTED, d),
            lambda: f"[{e(INTS, d)}, {e(INTS, d)}]",
            lambda: f"[{e(INTS, 0)}]",
            lambda: f"[{e(INTS, d)} for _ in {self.iterable(d)[0]}]",
            lambda: f"({e(NESTED, d)} + [{e(INTS, d)}])[:5]",
            lambda: f"list({e(NESTED, d)})",
        ]

    def _dict(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(DICT, d),
            lambda: f"{{{e(STR, d)}: {e(INT, d)}, 'x': {e(INT, d)}}}",
            lambda: self.dict_comp(d),
            lambda: f"{{**{e(DICT, d)}, 'm': {e(INT, d)}}}",
            lambda: f"dict({e(DICT, d)})",
            lambda: f"dict(zip({e(STRS, d)}, {e(INTS, d)}))",
        ]

    def _pair(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(PAIR, d),
            lambda: f"({e(INT, d)}, {e(STR, d)})",
            lambda: f"({e(INT, d)}, {e(STR, d)})",
            lambda: f"(len({e(STRS, d)}), {self.generate(d)})",
        ]

    def _box(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(BOX, d),
            lambda: f"Box({e(ANY, d)})",
            lambda: f"({e(BOX, d)} + {e(ANY, d)})",
            lambda: f"hold({e(BOX, d)})",
        ]

    def _docs(self, d: int) -> list[Callable[[], str]]:
        e = self.e
        return [
            *self.common(DOCS, d),
            lambda: self.search(d),
            lambda: self.search(d),
            lambda: self.search(d),
            lambda: f"({e(DOCS, d)} + {e(DOCS, d)})",
            lambda: f"{e(DOCS, d)}[{self.pick(':1', '1:')}]",
        ]

    def _doc(self, d: int) -> list[Callable[[], str]]:
        return [lambda: f"{self.e(DOCS, d)}[0]", lambda: f"note({self.e(DOC, d)})", lambda: self.literal(DOC)]

    def search(self, d: int) -> str:
        if self.fn.is_async and self.no_await:
            return "Docs()"
        k = self.pick("", ", k=1", ", k=2", ", 2", f", k={self.e(INT, 0)}")
        return self.op(f"docs.search({self.e(STR, d)}{k})", d)

    def gathered(self, kind: str, d: int) -> str:
        if not self.fn.is_async or self.no_await:
            return self.e(kind, d)
        if kind == STR:
            return (
                f"(await asyncio.gather(llm.generate({self.e(STR, d)}), aget({self.e(INT, d)})))[{self.pick('0', '1')}]"
            )
        return f"len(await asyncio.gather(aget({self.e(STR, d)}), anote({self.e(INT, d)})))"

    def gather_list(self, d: int) -> str:
        if not self.fn.is_async or self.no_await:
            return self.comp(STR, d)
        iterable, names = self.iterable(d)
        with self.inner(**names):
            element = self.pick(f"llm.generate({self.e(STR, d)})", f"aget({self.e(ANY, d)})")
        return f"(await asyncio.gather(*[{element} for {self.targets(names)} in {iterable}]))"

    # -- comprehensions
    @staticmethod
    def targets(names: dict[str, str]) -> str:
        return ", ".join(names)

    def iterable(self, d: int) -> tuple[str, dict[str, str]]:
        """What a loop runs over, and the kinds of its variables."""
        a, b = self.rng.sample(("i", "j", "k", "q", *NAMES[:2]), 2) if not self.fn.holds else ("i", "j")
        e = self.e
        options: list[Callable[[], tuple[str, dict[str, str]]]] = [
            lambda: (f"range({self.rng.randrange(0, 4)})", {a: INT}),
            lambda: (f"range({e(INT, 0)} % 4)", {a: INT}),
            lambda: (e(INTS, d), {a: INT}),
            lambda: (e(INTS, d), {a: INT}),
            lambda: (e(STRS, d), {a: STR}),
            lambda: (e(STRS, d), {a: STR}),
            lambda: (f"{e(STR, d)}[:3]", {a: STR}),
            lambda: (f"enumerate({e(STRS, d)}{self.pick('', ', 1')})", {a: INT, b: STR}),
            lambda: (f"zip({e(INTS, d)}, {e(STRS, d)})", {a: INT, b: STR}),
            lambda: (f"reversed({e(INTS, d)})", {a: INT}),
            lambda: (f"each({e(INTS, d)})", {a: INT}),
            lambda: (f"(q * 2 for q in {e(INTS, 0)})" if not self.fn.loops and self.p(0.3) else e(INTS, d), {a: INT}),
            lambda: (f"{e(DICT, d)}.items()", {a: STR, b: INT}),
            lambda: (e(NESTED, d), {a: INTS}),
            lambda: (e(DICT, d), {a: STR}),
            lambda: (e(DOCS, d), {a: DOC}),
            lambda: (e(DOCS, d), {a: DOC}),
            lambda: (f"enumerate({e(DOCS, d)}, 1)", {a: INT, b: DOC}),
            lambda: (f"zip({e(DOCS, d)}, {e(STRS, d)})", {a: DOC, b: STR}),
            lambda: (f"map(double, {e(INTS, d)})", {a: INT}),
            lambda: (f"({e(INT, d)}, {e(INT, d)})", {a: INT}),
        ]
        return self.rng.choice(options)()

    def clauses(self, d: int) -> tuple[str, dict[str, str]]:
        iterable, names = self.iterable(d)
        text = f"for {self.targets(names)} in {iterable}"
        with self.inner(**names):
            for _ in range(self.rng.choice((0, 0, 1, 2))):
                text += f" if {self.test(d)}"
            if self.p(0.2):
                more, extra = self.iterable(0)
                text += f" for {self.targets(extra)} in {more}"
                names = {**names, **extra}
        return text, names

    def comp(self, kind: str, d: int) -> str:
        clauses, names = self.clauses(d)
        with self.inner(**names):
            return f"[{self.e(kind, d)} {clauses}]"

    def generator(self, d: int) -> str:
        iterable, names = self.iterable(d)
        with self.inner(**names), self.plain():
            text = f"{self.test(d)} for {self.targets(names)} in {iterable}"
            return text + (f" if {self.test(0)}" if self.p(0.3) else "")

    def dict_comp(self, d: int) -> str:
        clauses, names = self.clauses(d)
        with self.inner(**names):
            return f"{{{self.e(STR, d)}: {self.e(INT, d)} {clauses}}}"

    # -- statements
    def statements(self, count: int) -> None:
        for _ in range(count):
            if self.fuel <= 0:
                break
            self.statement()

    def body(self, most: int = 3) -> None:
        self.statements(self.rng.randrange(1, most + 1))

    @contextmanager
    def scope(self, results: list[tuple[dict[str, str], set[str]]]) -> Iterator[None]:
        """A block that may not run; what it binds goes to `results`."""
        saved = dict(self.fn.vars), set(self.fn.maybe)
        yield
        results.append((self.fn.vars, self.fn.maybe))
        self.fn.vars, self.fn.maybe = saved

    def merge(self, results: Sequence[tuple[dict[str, str], set[str]]]) -> None:
        """After blocks of which one has run."""
        names = {n for v, _ in results for n in v}
        merged: dict[str, str] = {}
        maybe: set[str] = set()
        for n in sorted(names):
            kinds = {v.get(n) for v, _ in results}
            if None in kinds or any(n in m for _, m in results):
                maybe.add(n)
            kinds.discard(None)
            merged[n] = str(kinds.pop()) if len(kinds) == 1 else "?"
        self.fn.vars, self.fn.maybe = merged, maybe

    def statement(self) -> None:
        self.fuel -= 2
        deep = self.indent >= 5
        simple: list[Callable[[], None]] = [
            self._assign, self._assign, self._assign, self._assign, self._aug, self._append, self._append, self._unpack,
            self._effect, self._effect, self._store, self._del, self._plain_compound, self._mutate, self._multi,
        ]  # fmt: skip
        nested: list[Callable[[], None]] = [
            self._if, self._if, self._for, self._for, self._while, self._try, self._try, self._with, self._closure,
        ]  # fmt: skip
        leaving: list[Callable[[], None]] = [self._leave, self._assert, self._raise]
        if self.fn.is_async:
            simple += [self._task_group, self._task]
        r = self.rng.random()
        if r < 0.62 or deep:
            self.rng.choice(simple)()
        elif r < 0.94:
            self.rng.choice(nested)()
        else:
            self.rng.choice(leaving)()

    def _assign(self) -> None:
        kind = self.rng.choice(KINDS[:5]) if self.p(0.8) else self.rng.choice(KINDS)
        name = self.target()
        if self.p(0.05):
            other = self.target()
            self.put(f"{other} = {name} = {self.e(kind) if not self.p(0.4) else self.literal(kind)}")
            self.bind(other, kind)
        elif self.p(0.06) and kind in ANNOTATIONS:
            self.put(f"{name}: {ANNOTATIONS[kind]} = {self.e(kind)}")
        elif self.p(0.12) and (alias := self.read(INTS)) and kind == INTS:
            self.put(f"{name} = {alias}")
        else:
            self.put(f"{name} = {self.e(kind)}")
        self.bind(name, kind)

    def _multi(self) -> None:
        name, kind = self.target(), self.pick(STR, INTS)
        if kind == STR:
            self.put(f"{name} = (")
            self.put(f"    {self.e(STR, 1)}")
            self.put(f"    + {self.e(STR, 1)}")
            self.put(")")
        else:
            self.put(f"{name} = [")
            self.put(f"    {self.e(INT, 1)},")
            self.put(f"    {self.e(INT, 1)},")
            self.put("]")
        self.bind(name, kind)

    def _aug(self) -> None:
        kind = self.pick(INT, STR, INTS, STRS, BOX)
        names = [n for n in self.known(kind) if n not in self.fn.holds]
        if not names:
            return self._assign()
        name = self.rng.choice(names)
        if kind == STR:
            self.put(f"{name} += {self.e(STR, 1)}[:20]")
        elif kind == INT:
            self.put(f"{name} {self.pick('+=', '-=', '|=')} {self.e(INT, 1)}")
        elif kind in (INTS, STRS):
            self.put(f"{name} += {self.e(kind, 1)}[:3]")
        else:
            self.put(f"{name} += {self.e(ANY, 0)}")
        return None

    def _append(self) -> None:
        kind = self.pick(INTS, STRS, STRS, NESTED)
        name = self.read(kind)
        if name is None:
            name = self.target()
            self.put(f"{name} = []")
            self.bind(name, kind)
            return
        item = {INTS: INT, STRS: STR, NESTED: INTS}[kind]
        self.put(f"{name}.append({self.e(item)})")

    def _mutate(self) -> None:
        kind = self.pick(INTS, STRS)
        name = self.read(kind)
        if name is None:
            return self._assign()
        item = self.e(INT if kind == INTS else STR, 1)
        self.put(
            self.pick(
                f"{name}.extend([{item}])",
                f"{name}.insert(0, {item})",
                f"{name}.sort()",
                f"{name}.reverse()",
                f"{name}[:] = [{item}]",
                f"del {name}[:1]",
                f"{name}.pop()",
                f"hold({name})",
                "stir()",
                f"poke({name})",
                f"{name}[0:1] = {name}",
            )
        )
        return None

    def _unpack(self) -> None:
        a, b, c = self.rng.sample([n for n in NAMES if n not in self.fn.holds] or list(NAMES), 3)
        form = self.rng.randrange(6)
        if form == 0:
            self.put(f"{a}, {b} = {self.e(INT)}, {self.e(STR)}")
            kinds = {a: INT, b: STR}
        elif form == 1:
            self.put(f"{a}, {b} = {self.e(PAIR)}")
            kinds = {a: INT, b: STR}
        elif form == 2:
            self.put(f"{a}, *{b} = {self.e(INTS)}" if self.p(0.4) else f"{a}, *{b} = [1, *{self.e(INTS, 1)}]")
            kinds = {a: INT, b: INTS}
        elif form == 3:
            self.put(f"({a}, {b}), {c} = {self.e(PAIR, 1)}, {self.e(INTS, 1)}")
            kinds = {a: INT, b: STR, c: INTS}
        elif form == 4 and a in self.known(INT) and b in self.known(INT):
            self.put(f"{a}, {b} = {b}, {a}")
            kinds = {a: INT, b: INT}
        else:
            self.put(f"[{a}, {b}] = {self.e(STRS)}" if self.p(0.2) else f"[{a}, {b}] = 'u', {self.e(STRS, 1)}")
            kinds = {a: STR, b: STRS} if "'u'" in self.lines[-1] else {a: STR, b: STR}
        for n, k in kinds.items():
            self.bind(n, k)

    def _effect(self) -> None:
        d = 1
        self.put(
            self.pick(
                f"note({self.e(ANY, d)})",
                f"put({self.e(ANY, d)})",
                f"send({self.e(ANY, d)})",
                f"boom({self.e(ANY, d)})",
                self.e(ANY, 2),
                f"lookup({self.e(ANY, d)})",
                "stir()",
                "note(GLOBAL)",
                f"log('py', 'note', {self.e(ANY, d)})",
            )
        )

    def _store(self) -> None:
        box = self.read(BOX)
        mapping = self.read(DICT)
        if mapping and self.p(0.2):
            self.put(f"{mapping}['x'] = {mapping}.get('x', 0)")
            self.put(f"{mapping}['x'] += {self.plain_e(INT)}")
            return
        if box and self.p(0.1):
            self.put(f"{box}.value = 1")
            self.put(f"{box}.value += {self.plain_e(INT)}")
            return
        if box and self.p(0.5):
            self.put(f"{box}.value = {self.e(ANY)}" if self.p(0.6) else f"{box}[{self.e(INT, 1)}] = {self.e(ANY, 1)}")
        elif mapping:
            self.put(f"{mapping}[{self.e(STR, 1)}] = {self.e(INT)}")
        elif ints := self.read(INTS):
            self.put(f"{ints}[0] = {self.e(INT)}")
        else:
            self._assign()

    def _del(self) -> None:
        names = [n for n in self.fn.vars if n not in self.fn.maybe and n not in self.fn.holds]
        if not names or self.p(0.6):
            return self._assign()
        name = self.rng.choice(names)
        self.put(f"del {name}")
        self.fn.maybe.add(name)
        return None

    def _plain_compound(self) -> None:
        """A compound statement without operations."""
        name = self.target()
        self.put(f"{name} = 0")
        self.bind(name, INT)
        form = self.rng.randrange(4)
        if form == 0:
            with self.block(f"for i in {self.e(INTS, 0)}:"):
                self.put(f"{name} += i")
                if self.p(0.3):
                    self.put(f"if {name} > 4: {self.pick('break', 'continue')}")
            self.fn.vars["i"] = "?"
        elif form == 1:
            with self.block(f"while {name} < 3:"):
                self.put(f"{name} += 1")
                if self.p(0.4):
                    self.put(f"note({name})")
        elif form == 2:
            with self.block("try:"):
                self.put(f"{name} = int({self.e(STR, 0)})")
            with self.block("except ValueError:"):
                self.put(f"{name} = -1")
        else:
            with self.block(f"match {self.e(INT, 0)}:"):
                with self.block("case 1 | 2:"):
                    self.put(f"{name} = 12")
                with self.block("case other:"):
                    self.put(f"{name} = other")

    def _if(self) -> None:
        results: list[tuple[dict[str, str], set[str]]] = []
        with self.block(f"if {self.test(2)}:"), self.scope(results):
            self.body()
        if self.p(0.25):
            with self.block(f"elif {self.test(1)}:"), self.scope(results):
                self.body(2)
        if self.p(0.5):
            with self.block("else:"), self.scope(results):
                self.body()
        else:
            results.append((dict(self.fn.vars), set(self.fn.maybe)))
        self.merge(results)

    def _for(self) -> None:
        iterable, names = self.iterable(1)
        results = [(dict(self.fn.vars), set(self.fn.maybe))]
        self.fn.loops += 1
        with self.block(f"for {self.targets(names)} in {iterable}:"), self.scope(results):
            for n, k in names.items():
                self.bind(n, k)
            self.body(4)
            if self.p(0.2):
                self.put(f"if {self.test(1)}: {self.pick('break', 'continue', 'break', self.return_())}")
                if self.p(0.5):
                    self.body(2)
        self.fn.loops -= 1
        self.merge(results)
        self._loop_else()

    def _loop_else(self) -> None:
        if self.p(0.2):
            results = [(dict(self.fn.vars), set(self.fn.maybe))]
            with self.block("else:"), self.scope(results):
                self.body(2)
            self.merge(results)

    def _while(self) -> None:
        counter = self.fresh("n")
        self.put(f"{counter} = {self.rng.randrange(0, 4)}")
        self.bind(counter, INT)
        results = [(dict(self.fn.vars), set(self.fn.maybe))]
        self.fn.loops += 1
        form = self.rng.randrange(4)
        header = {
            0: f"while {counter} > 0:",
            1: f"while {counter} > 0 and {self.test(1)}:",
            2: f"while ({counter} := {counter} - 1) > 0:",
            3: "while True:",
        }[form]
        with self.block(header), self.scope(results):
            if form != 2:
                self.put(f"{counter} -= 1")
            if form == 3:
                self.put(f"if {counter} < 1: {self.pick('break', 'break', self.return_())}")
            self.body(3)
            if self.p(0.2):
                self.put(f"if {self.test(1)}: {self.pick('break', 'continue', self.return_())}")
                if self.p(0.5):
                    self.body(2)
        self.fn.loops -= 1
        self.merge(results)
        if form != 2:
            self._loop_else()

    def _try(self) -> None:
        results: list[tuple[dict[str, str], set[str]]] = []
        start = dict(self.fn.vars), set(self.fn.maybe)
        self.fn.catching += 1
        with self.block("try:"), self.scope(results):
            self.body(3)
            if self.p(0.4):
                self.put(
                    self.pick(
                        f"boom({self.e(ANY, 1)})",
                        f"lookup({self.e(ANY, 1)})",
                        f"send({self.e(INT, 1)})",
                        self.generate(1),
                    )
                )
        self.fn.catching -= 1
        after = results.pop()
        handlers = self.rng.choice((0, 1, 1, 1, 2))
        final = self.p(0.35) or not handlers
        orelse = bool(handlers) and self.p(0.3)
        in_handler = [start, after]
        for i in range(handlers):
            last = i == handlers - 1 and self.p(0.15)
            name = self.pick("", "err", "err", self.target())
            kind = self.rng.choice(ERRORS)
            header = "except:" if last else f"except {kind}{' as ' + name if name else ''}:"
            self.merge(in_handler)
            with self.block(header), self.scope(results):
                bound = name if name and not last else ""
                if bound:
                    self.fn.vars[bound] = "?"
                    self.fn.maybe.discard(bound)
                    if self.p(0.6):
                        self.put(f"note(str({bound}))")
                self.body(2)
                if self.p(0.2):
                    self.put(
                        self.pick("raise", "raise OwnError('again')", f"raise OwnError('from') from {bound or 'None'}")
                    )
                if bound:
                    self.fn.vars.pop(bound, None)
        self.fn.vars, self.fn.maybe = dict(after[0]), set(after[1])
        if orelse:
            with self.block("else:"):
                self.body(2)
        results.append((self.fn.vars, self.fn.maybe))
        if final:
            self.merge([*results, *in_handler])
            with self.block("finally:"):
                saved, self.fn.loops = self.fn.loops, 0
                was, self.fn.in_finally = self.fn.in_finally, True
                self.body(2)
                self.fn.loops, self.fn.in_finally = saved, was
        self.merge(results)

    def _with(self) -> None:
        with self.block(f"with Guarded({self.pick('True', 'False')}):"):
            self.put(self.pick(f"note({self.plain_e(INT)})", f"boom({self.plain_e(INT)})"))
        # without operations: see F013

    def plain_e(self, kind: str) -> str:
        return self.read(kind) or self.literal(kind)

    def _closure(self) -> None:
        """A nested function over a variable that is bound once."""
        if self.fn.loops or self.fn.catching or self.indent > 1 or self.fn.holds:
            return self._for()
        name, fn = self.fresh("held"), self.fresh("fn")
        kind = self.pick(INT, STR, INTS)
        self.put(f"{name} = {self.e(kind)}")
        self.fn.vars[name] = kind
        if self.p(0.5):
            with self.block(f"def {fn}(q):"):
                if kind == INTS:
                    self.put(f"{name}.append(q)")
                self.put(f"return note(({name}, q))")
            self.put(f"note({fn}({self.e(INT, 1)}))")
        else:
            self.put(f"{fn} = lambda q: ({name}, q)")
            self.put(f"note({fn}({self.e(INT, 1)}))")
        return None

    def return_(self) -> str:
        names = [n for n in self.fn.vars if n not in self.fn.maybe]
        shown = self.rng.sample(names, min(len(names), 3))
        return (
            f"return ({', '.join([*shown, self.literal(INT)])},)"
            if self.result is None
            else f"return {self.e(self.result, 1)}"
        )

    result: str | None = None

    def _leave(self) -> None:
        if self.fn.in_finally:
            return self._assign()
        if self.fn.loops and self.p(0.6):
            self.put(f"if {self.test(1)}: {self.pick('break', 'continue')}")
        elif self.p(0.8):
            with self.block(f"if {self.test(2)}:"):
                self.put(self.return_())
        else:
            self.put(self.return_())
        return None

    def _assert(self) -> None:
        self.put(f"assert {self.test(1)}{self.pick('', ', ' + self.plain_e(STR))}")

    def _raise(self) -> None:
        with self.block(f"if {self.test(1)}:"):
            self.put(
                self.pick(
                    f"raise ValueError({self.e(STR, 1)})",
                    "raise OwnError",
                    f"raise OwnError({self.e(INT, 0)}) from None",
                )
            )

    def _task_group(self) -> None:
        group, a, b = self.fresh("group"), self.fresh("task"), self.fresh("task")
        x, y = self.e(STR, 1), self.e(INT, 0)
        with self.block(f"async with asyncio.TaskGroup() as {group}:"):
            self.put(f"{a} = {group}.create_task(llm.generate({x}))")
            self.put(f"{b} = {group}.create_task(aget({y}))")
        name, other = self.rng.sample([n for n in NAMES if n not in self.fn.holds], 2)
        self.put(f"{name} = {a}.result()")
        self.put(f"{other} = await {b}" if self.p(0.5) else f"{other} = {b}.result()")
        self.bind(name, STR)
        self.bind(other, STR)

    def _task(self) -> None:
        """A task; between its start and its end nothing that asyncio might run before it."""
        task, name = self.fresh("task"), self.target()
        self.put(f"{task} = asyncio.create_task(aget({self.e(STR, 1)}))")
        if self.p(0.5):
            other = self.target()
            self.put(f"{other} = {self.literal(INT)}")
            self.bind(other, INT)
        self.put(f"{name} = await {task}")
        self.bind(name, STR)

    # -- functions
    def function(self, name: str, size: int, is_async: bool, result: str | None) -> None:
        self.fn = Function(is_async)
        self.result = result
        self.fuel = size
        params: list[tuple[str, str]] = []
        texts: list[str] = []
        for n in self.rng.sample(NAMES[:5], self.rng.randrange(1, 4)):
            kind = self.pick(INT, STR, STR, INTS, STRS, BOOL, BOX)
            params.append((n, kind))
            annotation = f": {ANNOTATIONS[kind]}" if kind in ANNOTATIONS and self.p(0.7) else ""
            texts.append(f"{n}{annotation}")
        for n, k in params:
            self.bind(n, k)
        if result is not None and self.p(0.4):  # a default for the last one
            default = {INT: "3", STR: "'dflt'", BOOL: "True"}.get(params[-1][1])
            if default:
                texts[-1] += f" = {default}"
        annotation = f" -> {ANNOTATIONS[result]}" if result in ANNOTATIONS and self.p(0.5) else ""
        self.put("@workflow")
        with self.block(f"{'async ' if is_async else ''}def {name}({', '.join(texts)}){annotation}:"):
            if self.p(0.08):
                self.put("global GLOBAL")
                self.put("GLOBAL += 1")
            self.statements(4 + size // 6)
            if result is None:
                names = sorted(
                    n for n in self.fn.vars if n not in self.fn.maybe and not n.startswith(("task", "group", "fn"))
                )
                self.put(f"return ({''.join(n + ', ' for n in names)})")
            else:
                self.put(self.return_())
        self.put("")
        self.put("")
        self.signature = Signature(name, tuple(params), result or ANY, is_async)

    def recursive(self) -> None:
        """A bounded recursion."""
        self.lines += [
            "@workflow", "def countdown(n: int, s: str) -> str:", "    if n <= 0:",
            "        return llm.generate(s)", "    note(n)", "    return countdown(n - 1, f'{s}{n}') + str(n)", "", "",
        ]  # fmt: skip

    def argument(self, kind: str) -> str:
        return {
            INT: str(self.rng.randrange(-1, 6)),
            STR: repr(self.rng.choice((*WORDS, "what is it?"))),
            BOOL: self.pick("True", "False"),
            INTS: self.pick("[]", "[1]", "[4, 0, 3]"),
            STRS: self.pick("[]", "['s', 't']"),
            BOX: "Box(2)",
        }[kind]

    def module(self) -> Program:
        is_async = self.p(0.3)
        self.lines += HEAD.splitlines()
        if self.p(0.1):
            self.recursive()
            self.workflows.append(Signature("countdown", (("n", INT), ("s", STR)), STR, False, is_recursive=True))
        for i in range(self.rng.choice((0, 0, 1, 2))):
            self.function(f"helper{i}", self.size // 3, is_async and self.p(0.5), self.pick(INT, STR, INTS, STRS))
            self.workflows.append(self.signature)
        self.function("main", self.size, is_async, None)
        calls = tuple("(" + "".join(self.argument(k) + ", " for _, k in self.signature.params) + ")" for _ in range(2))
        return Program("\n".join(self.lines).rstrip() + "\n", calls, is_async)


def generate(rng: random.Random, size: int | None = None) -> Program:
    """A random program that is valid Python."""
    for _ in range(20):
        drawn = size if size is not None else rng.choice((15, 30, 30, 60, 90))
        program = Writer(rng, drawn).module()
        try:
            compile(program.source, "<program>", "exec")
        except SyntaxError:
            continue  # a name bound twice in a comprehension, `*a` twice, a walrus where none may be
        return program
    raise AssertionError("no valid program in 20 draws")


# -- reduction
class _Without(ast.NodeTransformer):
    """Leaves out the n-th statement, or puts a part in place of the n-th expression."""

    def __init__(self, number: int) -> None:
        self.number = number

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                kept: list[ast.stmt] = []
                for s in value:
                    self.number -= 1
                    if self.number == 0:
                        continue
                    self.number -= 1
                    if self.number == 0:
                        for inner in ("body", "orelse", "finalbody"):
                            kept += getattr(s, inner, [])
                        continue
                    kept.append(self.visit(s))
                if not kept and name == "body":
                    kept = [ast.Pass()]
                setattr(node, name, kept)
            elif isinstance(value, list):
                setattr(node, name, [self.replaced(v) if isinstance(v, ast.AST) else v for v in value])
            elif isinstance(value, ast.AST):
                setattr(node, name, self.replaced(value))
        return node

    def replaced(self, value: ast.AST) -> ast.AST:
        if isinstance(value, ast.expr) and not isinstance(getattr(value, "ctx", None), (ast.Store, ast.Del)):
            for child in [c for c in ast.iter_child_nodes(value) if isinstance(c, ast.expr)]:
                self.number -= 1
                if self.number == 0:
                    return child.value if isinstance(child, ast.Starred) else child
        result: ast.AST = self.visit(value)
        return result


def reduce(program: Program, fails: Callable[[Program], bool], seconds: float = 15.0) -> Program:
    """A smaller program for which `fails` is still true, by leaving out one piece after another."""
    current, number = program, 1
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        cutter = _Without(number)
        tree = cutter.visit(ast.parse(current.source))
        if cutter.number > 0:
            if number == 1 or not current.source:
                break
            return current
        try:
            text = ast.unparse(ast.fix_missing_locations(tree))
            compile(text, "<program>", "exec")
            candidate = Program(text, current.calls, current.is_async)
            if len(text) < len(current.source) and fails(candidate):
                current = candidate
                continue
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
        number += 1
    return current
