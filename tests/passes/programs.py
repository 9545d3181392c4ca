"""Random workflows that run: control flow, effects, errors, shared lists, calls; and what a run of one shows.

Built op by op, not from source, so that every operation appears in every place. The Python in them is declared
truthfully: what a `py` says of its reads, writes and errors is so.
"""

from __future__ import annotations

import asyncio
import random
import re
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from zlib import crc32

from flowc.ir.builder import Block, Builder
from flowc.ir.core import Graph, Op, Region, Scope, Value
from flowc.ir.effects import order_edges
from flowc.ir.errors import Loc
from flowc.ir.types import ANY, BOOL, INT, NEVER, RANGE, TEXT, Type, list_of, sequence_of, tuple_of
from flowc.ir.values import Doc, Docs
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, SearchRequest
from flowc.runtime.reference import _Interpreter

FILE = "program.py"
LIST = list_of(TEXT)


def mix(*parts: object) -> int:
    return crc32(repr(parts).encode())


class Backend:
    """A model and an index in one: answers depend on the question alone, and some questions fail."""

    name, kind, max_batch = "fake", "scripted", 8

    def batch_key(self, request: object) -> str:
        return type(request).__name__

    def generate(self, requests: Sequence[GenerateRequest], *_: object, **__: object) -> list[Generation | Exception]:
        return [
            ValueError(f"no answer to {r.prompt[:20]!r}")
            if mix(r.prompt) % 31 == 0
            else Generation("\n".join(f"g{mix(r.prompt, i) % 89}" for i in range(1 + mix(r.prompt) % 3)))
            for r in requests
        ]

    def choose(self, requests: Sequence[ChooseRequest]) -> list[int | Exception]:
        return [mix(r.prompt) % len(r.options) for r in requests]

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs | Exception]:
        return [
            KeyError(r.query[:20])
            if mix("s", r.query) % 31 == 0
            else Docs(Doc(mix(r.query, i) % 100, f"d{i}") for i in range(r.k))
            for r in requests
        ]

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None: ...


class Resources:
    """Every name is the same backend."""

    def __init__(self) -> None:
        self.backend = Backend()

    def llm(self, name: str) -> Any:
        return self.backend

    index = embedder = reranker = llm


Execute = Callable[[Graph, Sequence[Any]], Any]


@dataclass(frozen=True, slots=True)
class Shown:
    """All that a run shows: what was written to each state; the value, with what is one object in it; or the error."""

    logged: tuple[str, ...]
    saved: tuple[str, ...]
    value: Any = None
    aliases: tuple[tuple[int, int], ...] = ()
    error: str = ""
    line: int = 0  # of the operation that raised it


@dataclass(slots=True)
class Program:
    """A workflow with the state that its Python touches."""

    graph: Graph
    log: list[str]  # the state "py"
    table: list[str]  # the state "db"

    def run(self, graph: Graph, execute: Execute | None = None) -> Shown:
        """What a run of the graph shows: in program order, or as `execute` does it."""
        self.log.clear()
        self.table.clear()
        shared = ["s0", "s1", "s2"]
        try:
            value = (execute or in_order)(graph, ["question", 2, shared])
        except Exception as error:
            message = re.sub(r" in workflow \w+", "", str(error))  # a loop that was inlined is in another one now
            return Shown(
                tuple(self.log),
                tuple(self.table),
                error=f"{type(error).__name__}: {message}",
                line=getattr(error, "op_line", 0),
            )
        return Shown(tuple(self.log), tuple(self.table), value, tuple(_aliases([shared, value])))


def _aliases(value: Any) -> list[tuple[int, int]]:
    """Pairs of places, in depth-first order, that hold the same mutable object."""
    places: list[int] = []

    def visit(v: Any) -> None:
        if isinstance(v, list):
            places.append(id(v))
        if isinstance(v, list | tuple):
            for item in v:
                visit(item)

    visit(value)
    return [(i, j) for j in range(len(places)) for i in range(j) if places[i] == places[j]]


class Maker:
    """Makes a workflow from a source of randomness."""

    def __init__(self, rng: random.Random, name: str = "w", first_line: int = 1) -> None:
        self.rng = rng
        self.b = Builder(name, [("q", TEXT), ("n", INT), ("shared", sequence_of(TEXT))], scope=name)
        self.line = first_line
        self.visible: list[Value] = list(self.b.params)
        self.depth = 0
        self.callees: list[Graph] = []
        self.cells: list[Value] = []

    # -- parts
    def next_line(self) -> None:
        self.line += 1
        self.b.loc = Loc(FILE, self.line, 4, 20)

    def some(self, t: Type) -> Value:
        found = [v for v in self.visible if v.type == t]
        if found and self.rng.random() < 0.9:
            return self.rng.choice(found[-6:])
        if t == TEXT:
            return self.keep(self.b.const(self.rng.choice(["a", "b", "{", ""])))
        if t == INT:
            return self.keep(self.b.const(self.rng.choice([0, 1, 2, 7])))
        if t == BOOL:
            return self.keep(*self.pure("a < b", self.some(INT), self.some(INT), names="ab", types=[BOOL]))
        if t == LIST:
            return self.keep(*self.pure("[a, b]", self.some(TEXT), self.some(TEXT), names="ab", types=[LIST]))
        assert t == ANY, t
        return self.keep(*self.pure("[a]", self.some(TEXT), names="a", types=[ANY]))

    def keep(self, *values: Value) -> Value:
        self.visible += values
        return values[0]

    def pure(
        self, source: str, *operands: Value, names: str, types: Sequence[Type], raises: bool = False
    ) -> tuple[Value, ...]:
        return self.b.py(source, *operands, params=list(names), types=types, writes=(), raises=raises)

    # -- statements
    def statement(self) -> None:
        self.next_line()
        kinds: list[Callable[[], None]] = [
            *[self.text] * 5,
            *[self.number] * 2,
            *[self.opaque] * 3,
            *[self.resource] * 4,
            self.items,
            self.shared_list,
            self.cell,
            self.maybe_unbound,
            self.literal_branch,
            self.grounded,
            self.scored,
            self.history,
        ]
        if self.depth < 3:
            kinds.append(self.lines)
            kinds += [self.branch, self.branch, self.loop, self.loop, self.gather, self.while_, self.try_]
        if self.callees:
            kinds.append(self.call)
        self.rng.choice(kinds)()

    def text(self) -> None:
        b, rng = self.b, self.rng
        match rng.randrange(6):
            case 0:
                self.keep(b.template("<{}>", self.some(TEXT)))
            case 1:
                self.keep(b.template("{}: {{{}}}", self.some(TEXT), self.some(INT), formats=("", ":>3")))
            case 2:
                self.keep(b.template("{}{}", self.some(TEXT), self.some(TEXT), formats=("!r", "")))
            case 3:
                self.keep(*self.pure("a + b", self.some(TEXT), self.some(TEXT), names="ab", types=[TEXT]))
            case 4:
                self.keep(
                    *self.pure("a[i % 9]", self.some(TEXT), self.some(INT), names="ai", types=[TEXT], raises=True)
                )
            case _:
                shared = self.rng.choice([v for v in self.visible if v.type in (ANY, sequence_of(TEXT))])
                self.keep(b.template("{}", shared, reads=("py",)))

    def number(self) -> None:
        match self.rng.randrange(5):
            case 0 | 4:
                self.keep(*self.pure("len(a)", self.some(TEXT), names="a", types=[INT]))
            case 1:
                self.keep(*self.pure("a + b", self.some(INT), self.some(INT), names="ab", types=[INT]))
            case 2:
                self.keep(
                    *self.pure("a % (b + 1)", self.some(INT), self.some(INT), names="ab", types=[INT], raises=True)
                )
            case _:
                self.keep(
                    self.b.emit("equals", (self.some(INT),), [("eq", BOOL)], {"value": self.rng.choice([0, 1, 2])})[0]
                )

    def opaque(self) -> None:
        match self.rng.randrange(5):
            case 4:
                self.keep(
                    *self.b.py(
                        "await later(a)", self.some(TEXT), params=["a"], types=[INT], reads=("py",), is_async=True
                    )
                )
            case 0:
                self.keep(*self.b.py("log(a)", self.some(TEXT), params=["a"], types=[INT], reads=("py",)))
            case 1:
                self.keep(*self.b.py("count()", types=[INT], params=[], reads=("py",), writes=(), raises=False))
            case 2:
                self.keep(
                    *self.b.py(
                        "x = log(a)\ny = a * 2", self.some(TEXT), params=["a"], outs=["x", "y"], types=[INT, TEXT]
                    )
                )
            case _:
                self.keep(self.b.tool(self.save, "save", self.some(TEXT), type=INT, writes=("db",), reads=("db",)))

    @staticmethod
    def save(text: str) -> int:
        raise AssertionError("replaced")

    def resource(self) -> None:
        match self.rng.randrange(6):
            case 5:
                (options,) = self.pure("['yes', 'no']", names="", types=[LIST])
                self.keep(self.b.choose("llm", self.some(TEXT), options))
            case 0 | 1:
                self.keep(self.b.generate("llm", self.some(TEXT), max_tokens=self.rng.choice([4, 8])))
            case 2:
                self.keep(self.b.tool(_shout, "shout", self.some(TEXT), type=TEXT, raises=False))
            case 3:
                docs = self.b.search("idx", self.some(TEXT), k=2)
                self.keep(self.b.template("{}", docs))
            case _:
                self.keep(self.b.tool(_risky, "risky", self.some(TEXT), type=TEXT))

    # -- what the passes of the stage level look for
    def grounded(self) -> None:
        """An answer from what a search finds, of which the query may be written too; something may stand between."""
        b, rng = self.b, self.rng
        query = self.some(TEXT)
        if rng.random() < 0.4:
            query = b.generate("llm", b.template("{} {}", query, self.some(TEXT)), max_tokens=4)
        docs = b.search("idx", query, k=rng.choice([1, 2]))
        if rng.random() < 0.2:
            (docs,) = self.pure("d[:1]", docs, names="d", types=[docs.type], raises=rng.random() < 0.5)
        head = rng.choice(["", "Answer from these: ", "You are one of two clerks, and answer from the files alone. "])
        slots = [self.some(TEXT), docs, self.some(INT)]
        rng.shuffle(slots)
        forms = ("", "", ":>3") if rng.random() < 0.1 else ("", "", "")
        raises: dict[str, Any] = {"raises": True} if any(forms) else {}
        prompt = b.template(head + "{}\n{}\n{}", *slots, formats=forms, **raises)
        sampled: dict[str, Any] = {"temperature": 0.5} if rng.random() < 0.1 else {}
        self.keep(b.generate("llm", prompt, max_tokens=rng.choice([1, 8]), **sampled))

    def scored(self) -> None:
        (options,) = self.pure("['yes', 'no']", names="", types=[LIST])
        prompt = self.b.template("Is this so? {}", self.some(TEXT))
        choice = self.b.choose("llm", prompt, options)
        flag = self.b.emit("equals", (choice,), [("eq", BOOL)], {"value": "yes"})[0]
        if self.depth < 3 and self.rng.random() < 0.7:
            self.branch(flag)

    def history(self) -> None:
        b = self.b
        task = b.template("You are an agent with a single tool, and call it as often as you like. {}", self.some(TEXT))
        reply = b.generate("llm", task, max_tokens=8)
        found = b.tool(_shout, "shout", reply, type=TEXT, raises=self.rng.random() < 0.5)
        self.keep(b.generate("llm", b.template("{}{}\nFOUND: {}\n", task, reply, found), max_tokens=8))

    def lines(self) -> None:
        """A loop over the lines of a generation, perhaps over what a comprehension has left of them."""
        rng = self.rng
        text = self.b.generate("llm", self.some(TEXT), max_tokens=16)
        (items,) = self.pure(rng.choice(["t.splitlines()", "t.split('\\n')"]), text, names="t", types=[LIST])
        if rng.random() < 0.2:
            self.statement()
        if rng.random() < 0.5:
            with self.inside([("item", TEXT)]) as body:
                source = rng.choice(["[s.strip()]", "[s] if len(s) % 2 else []", "[s, s]"])
                body.yields = self.pure(source, body.params[0], names="s", types=[LIST])
            (items,) = self.b.foreach(items, (), body.done(), collects=1)
        with self.inside([("item", TEXT)]) as body:
            if rng.random() < 0.3:
                self.body(body)
            item = body.params[0] if rng.random() < 0.8 else self.some(TEXT)
            found = self.b.template("{}", self.b.search("idx", item, k=1))
            body.yields = self.pure("[a]", found, names="a", types=[LIST])
        self.next_line()
        self.keep(*self.b.foreach(items, (), body.done(), collects=1))
        if rng.random() < 0.5:
            self.keep(items)

    def items(self) -> None:
        match self.rng.randrange(4):
            case 0:
                self.keep(self.b.emit("append", (self.some(LIST), self.some(TEXT)), [("more", LIST)])[0])
            case 1:
                self.keep(self.b.emit("concat", (self.some(LIST), self.some(LIST)), [("both", LIST)])[0])
            case 2:
                self.keep(*self.pure("list(a)", self.some(TEXT), names="a", types=[LIST]))
            case _:
                self.keep(*self.pure("[]", names="", types=[LIST]))

    def shared_list(self) -> None:
        if self.rng.random() < 0.5:
            found = [v for v in self.visible if v.type in (ANY, sequence_of(TEXT))]
            self.b.py("push(a, b)", self.rng.choice(found), self.some(TEXT), params=["a", "b"], reads=("py",))
        else:
            self.some(ANY)

    def cell(self) -> None:
        if not self.cells or self.rng.random() < 0.4:
            self.cells.append(self.b.emit("cell", (self.some(TEXT),), [("cell", ANY)])[0])
        elif self.rng.random() < 0.5:
            self.b.emit("store", (self.rng.choice(self.cells), self.some(TEXT)), [("done", ANY)])
        else:
            self.keep(self.b.emit("load", (self.rng.choice(self.cells),), [("loaded", TEXT)])[0])

    def maybe_unbound(self) -> None:
        undef = self.b.emit("undef", (), [("x", NEVER)])[0]
        with self.inside() as then:
            then.yields = (self.some(TEXT),)
        with self.inside() as orelse:
            orelse.yields = (undef if self.rng.random() < 0.5 else self.some(TEXT),)
        (x,) = self.b.if_(self.some(BOOL), then.done(), orelse.done(), ["x"])
        self.next_line()
        self.keep(self.b.emit("bound", (x,), [("x", TEXT)], {"variable": "x"})[0])

    def literal_branch(self) -> None:
        flag = self.b.const(self.rng.random() < 0.5)
        self.branch(flag)

    # -- control flow
    @contextmanager
    def inside(self, params: Sequence[tuple[str, Type]] = ()) -> Any:
        visible, cells = len(self.visible), len(self.cells)
        self.depth += 1
        with self.b.region(params) as block:
            self.visible += block.params
            yield block
        self.depth -= 1
        del self.visible[visible:], self.cells[cells:]

    def body(self, block: Block, *types: Type) -> None:
        for _ in range(self.rng.randrange(4)):
            self.statement()
        block.yields = tuple(self.some(t) for t in types)

    def branch(self, flag: Value | None = None) -> None:
        flag = flag or (self.some(BOOL) if self.rng.random() < 0.8 else self.some(ANY))
        types = [self.rng.choice([TEXT, INT]) for _ in range(self.rng.randrange(3))]
        with self.inside() as then:
            self.body(then, *types)
        with self.inside() as orelse:
            self.body(orelse, *types)
        loc = self.b.loc
        self.next_line()
        del loc
        self.visible += self.b.if_(flag, then.done(), orelse.done(), ["v"] * len(types))

    def iterable(self) -> Value:
        match self.rng.randrange(5):
            case 0:
                return self.pure(f"range({self.rng.randrange(3)})", names="", types=[RANGE])[0]
            case 1:
                return self.pure("range(a)", self.some(INT), names="a", types=[RANGE])[0]
            case 2:
                return self.b.params[2]
            case _:
                return self.some(LIST)

    def loop(self) -> None:
        """Carries values, may break."""
        items = self.iterable()
        reads: dict[str, Any] = {"reads": ("py",)} if items.type.name == "sequence" else {}
        inits = [self.some(TEXT) for _ in range(self.rng.randrange(3))]
        breaks = self.rng.random() < 0.3
        item = INT if items.type == RANGE else TEXT
        with self.inside([("item", item), *[("c", TEXT)] * len(inits)]) as body:
            self.body(body, *([BOOL] if breaks else []), *[TEXT] * len(inits))
        self.next_line()
        self.visible += self.b.foreach(items, inits, body.done(), breaks=breaks, **reads)

    def gather(self) -> None:
        """Collects lists."""
        items = self.iterable()
        reads: dict[str, Any] = {"reads": ("py",)} if items.type.name == "sequence" else {}
        collects = self.rng.randrange(1, 3)
        item = INT if items.type == RANGE else TEXT
        with self.inside([("item", item)]) as body:
            self.body(body)
            body.yields = tuple(self.pure("[a]", self.some(TEXT), names="a", types=[LIST])[0] for _ in range(collects))
        self.next_line()
        self.visible += self.b.foreach(items, (), body.done(), collects=collects, **reads)

    def while_(self) -> None:
        inits = [self.some(INT), self.some(TEXT)]
        with self.inside([("i", INT), ("t", TEXT)]) as cond:
            if self.rng.random() < 0.3:
                self.statement()
            if self.rng.random() < 0.7:
                cond.yields = (self.pure("i < 2", cond.params[0], names="i", types=[BOOL])[0],)
            else:
                cond.yields = (self.b.const(True),)
        with self.inside([("i", INT), ("t", TEXT)]) as body:
            self.body(body, BOOL, INT, TEXT)
            if self.rng.random() < 0.8:
                go_on = self.b.const(True)
                (i,) = self.pure("i + 1", body.params[0], names="i", types=[INT])
                body.yields = (go_on, i, body.yields[2])
        self.next_line()
        self.visible += self.b.while_(inits, cond.done(), body.done(), limit=3)

    def try_(self) -> None:
        handlers = self.rng.choice([("ValueError",), ("",), ("(ValueError, KeyError)", ""), ("Exception",), ("kinds",)])
        with self.inside() as body:
            self.body(body, TEXT, INT)
        regions = [body.done()]
        for _ in handlers:
            with self.inside([("error", ANY)]) as handler:
                if self.rng.random() < 0.5:
                    self.keep(*self.pure("type(e).__name__", handler.params[0], names="e", types=[TEXT]))
                self.body(handler, TEXT, INT)
            regions.append(handler.done())
        self.next_line()
        self.visible += self.b.emit("try", (), [("t", TEXT), ("i", INT)], {"handlers": handlers}, regions)

    def call(self) -> None:
        callee = self.rng.choice(self.callees)
        effects: Any = {"reads": ("py", "db", "index:idx"), "writes": ("py", "db")}
        self.keep(self.b.call(callee, self.some(TEXT), self.some(INT), self.b.params[2], **effects))

    # -- whole workflows
    def graph(self, size: int) -> Graph:
        for _ in range(size):
            self.statement()
        self.next_line()
        if self.b.name != "w":
            return self.b.finish(self.some(TEXT))
        values = self.rng.sample(self.visible, min(4, len(self.visible)))
        names = [f"x{i}" for i in range(len(values))]
        whole = self.b.py(
            f"({', '.join(names)},)",
            *values,
            params=names,
            types=[ANY if values else tuple_of()],
            writes=(),
            raises=False,
        )
        return self.b.finish(whole[0])


def _shout(text: str) -> str:
    return text.upper()


def _risky(text: str) -> str:
    if mix("r", text) % 19 == 0:
        raise KeyError(text[:20])
    return text[::-1]


def make(rng: random.Random, size: int = 8) -> Program:
    """A random program of about `size` statements, with one workflow that it may call."""
    log: list[str] = []
    table: list[str] = []

    def write(text: str, state: list[str] = log) -> int:
        state.append(text)
        if mix("w", text) % 31 == 0:
            raise ValueError(f"cannot write {text[:20]!r}")
        return len(state)

    def save(text: str) -> int:
        return write(text, table)

    def push(items: list[str], text: str) -> None:
        log.append(f"push {text}")
        if len(log) > 40:
            raise RuntimeError("too long")  # a loop over a list that grows meanwhile has no other end
        items.append(text)

    async def later(text: str) -> int:
        await asyncio.sleep(0)
        return write(text)

    names = {"log": write, "push": push, "later": later, "count": lambda: len(log), "kinds": (ValueError, LookupError)}
    inner = Maker(rng, name="inner", first_line=1000)
    callee = inner.graph(rng.randrange(1, 4))
    maker = Maker(rng)
    maker.callees = [callee] if rng.random() < 0.5 else []
    graph = maker.graph(size)
    symbols = {"save": save, "shout": _shout, "risky": _risky}
    scopes = {name: Scope({"__builtins__": __builtins__, **names}, {}, FILE, name) for name in ("w", "inner")}

    def bind(g: Graph) -> None:
        for table, bound in ((g.scopes, scopes), (g.symbols, symbols)):
            assert isinstance(table, dict)
            table.clear()
            table.update(bound)
        for c in g.callees:
            bind(c)

    bind(graph)
    return Program(graph, log, table)


class Reference(_Interpreter):
    """The reference, noting on an error the line of the operation that raised it."""

    def op(self, graph: Graph, op: Op, env: dict[str, Any]) -> Sequence[Any]:
        try:
            return super().op(graph, op, env)
        except Exception as error:
            if op.loc is not None and not hasattr(error, "op_line"):
                error.op_line = op.loc.line  # type: ignore[attr-defined]
            raise


class Adversary(Reference):
    """Runs regions that are not ordered in a random order that data and effects allow; items of parallel loops too.

    Of what fails, the first in program order counts. A plan whose meaning depends on more order than that is wrong.
    Every guess is wrong.
    """

    def __init__(self, graph: Graph, resources: Any, rng: random.Random) -> None:
        super().__init__(graph, resources)
        self.rng = rng

    def op(self, graph: Graph, op: Op, env: dict[str, Any]) -> Sequence[Any]:
        if op.name == "ivf.partial":
            return [Docs([Doc(-1, "a wrong guess")])]
        return super().op(graph, op, env)

    def ops(self, graph: Graph, region: Region, env: dict[str, Any]) -> list[Any]:
        if region.ordered:
            return super().ops(graph, region, env)
        at = {v.name: i for i, op in enumerate(region.ops) for v in op.results}
        waits = [
            {at[n] for n in _used(op) if n in at} | set(order)
            for op, order in zip(region.ops, order_edges(region), strict=True)
        ]
        failed: dict[int, BaseException] = {}
        dropped: set[int] = set()
        left = set(range(len(region.ops)))
        while left:
            i = self.rng.choice([i for i in sorted(left) if not waits[i] & left])
            left.discard(i)
            if waits[i] & (failed.keys() | dropped) or (any(f < i for f in failed) and self.rng.random() < 0.5):
                dropped.add(i)
                continue
            try:
                super().ops(graph, Region((), (region.ops[i],)), env)
            except Exception as error:
                failed[i] = error
        if failed:
            raise failed[min(failed)]
        return [env[v.name] for v in region.yields]

    def foreach(self, graph: Graph, op: Op, operands: list[Any], env: dict[str, Any]) -> list[Any]:
        if not op.attrs.get("parallel"):
            return super().foreach(graph, op, operands, env)
        (items,) = map(list, operands)
        found: dict[int, list[Any]] = {}
        failed: dict[int, BaseException] = {}
        for i in self.rng.sample(range(len(items)), len(items)):
            try:
                found[i] = super().foreach(graph, op, [[items[i]]], env)
            except Exception as error:
                failed[i] = error
        if failed:
            raise failed[min(failed)]
        lists: list[list[Any]] = [[] for _ in op.results]
        for i in range(len(items)):
            for collected, more in zip(lists, found[i], strict=True):
                collected += more
        return lists


def in_order(graph: Graph, args: Sequence[Any]) -> Any:
    return Reference(graph, Resources()).run(args)


def in_any_order(rng: random.Random) -> Execute:
    return lambda graph, args: Adversary(graph, Resources(), rng).run(args)


def planned(graph: Graph, args: Sequence[Any]) -> Any:
    """By the runtime; the line of an error is the last one of the program in its traceback."""
    with Runtime(Resources()) as runtime:
        try:
            return runtime.run(build_plan(graph), args)
        except Exception as error:
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == FILE]
            error.op_line = lines[-1] if lines else 0  # type: ignore[attr-defined]
            raise


def _used(op: Op) -> set[str]:
    used = {v.name for v in op.operands}
    for region in op.regions:
        used.update(v.name for v in region.yields)
        for inner in region.ops:
            used |= _used(inner)
    return used
