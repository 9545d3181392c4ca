"""What the runtime's tests share: scripted backends, resources by name, and random workflows that make sense to run."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any
from zlib import crc32

from flowc.ir.builder import Builder
from flowc.ir.core import Attr, Graph, Region, Scope, Value
from flowc.ir.errors import Loc, ResourceError
from flowc.ir.ops import effect_of_region
from flowc.ir.types import AHEAD, ANY, BOOL, DOCS, INT, KV, SCAN, TEXT, list_of
from flowc.ir.values import Doc, Docs
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, RerankRequest, SearchRequest


def unordered(region: Region) -> Region:
    """The region with nothing but data and effects to order it, as the pass prune-edges leaves it."""
    ops = tuple(replace(op, regions=tuple(map(unordered, op.regions))) for op in region.ops)
    return replace(region, ordered=False, ops=ops)


def pruned(graph: Graph) -> Graph:
    return replace(graph, body=unordered(graph.body), callees=tuple(map(pruned, graph.callees)))


# -- backends
class ScriptedLLM:
    """Answers `generate` with `answer(prompt)`; keeps the prompts of each batch. `delay_s` is real time per call."""

    name, kind = "fake", "scripted"

    def __init__(
        self, answer: Callable[[str], Any] = lambda prompt: f"<{prompt}>", delay_s: float = 0.0, max_batch: int = 64
    ) -> None:
        self.answer = answer
        self.delay_s = delay_s
        self.max_batch = max_batch
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()
        self.gate: threading.Event | None = None
        self.started = threading.Event()
        self.cancelled: list[str] = []

    def batch_key(self, request: GenerateRequest) -> Hashable:
        return request.temperature

    def generate(self, requests: Sequence[GenerateRequest], on_text: Any = None, is_cancelled: Any = None) -> list[Any]:
        self.threads.add(threading.get_ident())
        self.batches.append([r.prompt for r in requests])
        self.started.set()
        if self.gate is not None:
            assert self.gate.wait(20)
        if self.delay_s:
            time.sleep(self.delay_s)
        answers: list[Any] = []
        for i, request in enumerate(requests):
            if is_cancelled is not None and is_cancelled(i):
                self.cancelled.append(request.prompt)
            text = self.answer(request.prompt)
            if isinstance(text, str):
                for at in range(0, len(text), 3):
                    if on_text is not None:
                        on_text(i, text[at : at + 3])
                answers.append(Generation(text))
            else:
                answers.append(text)
        return answers

    def choose(self, requests: Sequence[ChooseRequest]) -> list[Any]:
        self.batches.append([r.prompt for r in requests])
        return [len(r.prompt) % len(r.options) for r in requests]

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def close(self) -> None:
        pass


class ScriptedIndex:
    """Finds `k` made-up passages for a query; one with "bad" in it fails alone, one with "broken" takes all along."""

    name, max_batch = "docs", 32

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.batches: list[list[str]] = []

    def batch_key(self, request: SearchRequest) -> Hashable:
        return None

    def search(self, requests: Sequence[SearchRequest]) -> list[Any]:
        self.batches.append([r.query for r in requests])
        if self.delay_s:
            time.sleep(self.delay_s)
        if any("broken" in r.query for r in requests):
            raise ArithmeticError("the whole call")
        return [
            ValueError(f"no {r.query}") if "bad" in r.query else Docs(Doc(i, f"{r.query}/{i}") for i in range(r.k))
            for r in requests
        ]

    def close(self) -> None:
        pass


class ScriptedReranker:
    name, max_batch = "rerank", 8

    def rerank(self, requests: Sequence[RerankRequest]) -> list[Any]:
        return [Docs(sorted(r.docs, key=lambda d: d.text, reverse=True)[: r.k]) for r in requests]


class ScriptedEmbedder:
    fingerprint, dim = "fake", 2

    def embed(self, texts: Sequence[str]) -> Any:
        return [(float(len(t)), 1.0) for t in texts]


class World:
    """Resources by name, any name: one of each kind."""

    def __init__(self, llm: Any = None, index: Any = None) -> None:
        self.the_llm = llm if llm is not None else ScriptedLLM()
        self.the_index = index if index is not None else ScriptedIndex()
        self.asked: list[str] = []

    def llm(self, name: str) -> Any:
        self.asked.append(name)
        return self.the_llm

    def index(self, name: str) -> Any:
        self.asked.append(name)
        if name == "missing":
            raise ResourceError("no index is called 'missing'", code="F061")
        return self.the_index

    def embedder(self, name: str) -> Any:
        return ScriptedEmbedder()

    def reranker(self, name: str) -> Any:
        return ScriptedReranker()


# -- random workflows
class Play:
    """The state that random workflows use, and latencies for what they await. Answers depend on requests alone."""

    def __init__(self, latency: random.Random | None = None) -> None:
        self.latency = latency
        self.logs: dict[str, list[Any]] = {"py": [], "db": [], "web": []}
        self.batches: list[int] = []
        self.name, self.kind, self.max_batch = "play", "scripted", 16

    async def pause(self) -> None:
        if self.latency is not None and self.latency.random() < 0.8:
            await asyncio.sleep(self.latency.choice([0.0, 0.001, 1.0]) * self.latency.random())

    # tools
    async def fetch(self, x: int) -> int:
        await self.pause()
        if x % 7 == 3:
            raise LookupError(f"fetch {x}")
        return x * 2 + 1

    async def count(self, x: int) -> int:
        """Reads "db"."""
        before = len(self.logs["db"])
        await self.pause()
        assert before == len(self.logs["db"]), "somebody wrote while this read"
        return x + before

    async def put(self, x: int) -> int:
        """Writes "db"."""
        await self.pause()
        self.logs["db"].append(x)
        if x % 11 == 5:
            raise PermissionError(f"put {x}")
        return len(self.logs["db"])

    async def post(self, x: int) -> int:
        await self.pause()
        self.logs["web"].append(x)
        return x - 1

    def half(self, x: int) -> int:
        if x % 13 == 7:
            raise OverflowError(f"half {x}")
        return x // 2

    # plain Python
    def emit(self, x: Any) -> Any:
        self.logs["py"].append(x)
        if isinstance(x, int) and x % 9 == 4:
            raise KeyError(f"emit {x}")
        return x

    # backends
    def batch_key(self, request: Any) -> Hashable:
        return None

    async def search(self, requests: Sequence[SearchRequest]) -> list[Any]:
        await self.pause()
        return [
            ValueError(f"no {r.query}") if "4" in r.query else Docs(Doc(i, f"{r.query}/{i}") for i in range(r.k))
            for r in requests
        ]

    async def generate(
        self, requests: Sequence[GenerateRequest], on_text: Any = None, is_cancelled: Any = None
    ) -> list[Any]:
        await self.pause()
        return [RuntimeError(r.prompt) if "77" in r.prompt else Generation(f"{len(r.prompt)}") for r in requests]

    async def choose(self, requests: Sequence[ChooseRequest]) -> list[Any]:
        await self.pause()
        return [len(r.prompt) % len(r.options) for r in requests]

    def llm(self, name: str) -> Any:
        return self

    def index(self, name: str) -> Any:
        return self

    def embedder(self, name: str) -> Any:
        return ScriptedEmbedder()

    def reranker(self, name: str) -> Any:
        return ScriptedReranker()


class StagePlay(Play):
    """`Play` with a model that streams what it writes, and backends that take advice and note what they hold."""

    def __init__(self, latency: random.Random | None = None) -> None:
        super().__init__(latency)
        self.told: dict[Hashable, str] = {}  # by key: what is announced and not taken back
        self.followed: list[tuple[Hashable, str]] = []
        self.asked: list[Any] = []
        self.running = 0

    # -- advice
    def prefill(self, key: Hashable, prefix: str, ticket: Any = None) -> None:
        self.told[key] = prefix

    def hint(self, key: Hashable, prefix: str, steps: float) -> None:
        self.told[key] = prefix
        if "8" in prefix:
            raise OSError("no advice, please")

    def predict(self, key: Hashable, text: str, window_s: float) -> None:
        self.told[key] = text

    def follow(self, key: Hashable, text_so_far: str) -> None:
        assert key in self.told
        self.followed.append((key, text_so_far))

    def release(self, key: Hashable) -> None:
        assert self.told.pop(key, None) is not None, "released twice"

    def pin(self, prefix: str, ttl_s: float) -> None:
        raise OSError("no advice, please")

    # -- operations
    async def search(self, requests: Sequence[SearchRequest]) -> list[Any]:
        self.asked += requests
        return await super().search(requests)

    async def generate(
        self, requests: Sequence[GenerateRequest], on_text: Any = None, is_cancelled: Any = None
    ) -> list[Any]:
        """A prompt has an answer of its own, `lines N` as many lines as N has digits; one with "77" fails half-way."""
        self.asked += requests
        self.running += len(requests)
        answers: list[Any] = []
        try:
            for i, request in enumerate(requests):
                text = f"{crc32(request.prompt.encode()) % 1000}"
                if request.prompt.startswith("lines"):
                    number = int(request.prompt.split()[1])
                    text = "\r\n".join(str(number + n) for n in range(len(str(number))))
                await self.pause()
                for at in range(0, len(text), 2):
                    if on_text is not None:
                        on_text(i, text[at : at + 2])
                    if at and "77" in request.prompt:
                        break
                    await self.pause()
                answers.append(RuntimeError(request.prompt) if "77" in request.prompt else Generation(text))
        finally:
            self.running -= len(requests)
        return answers


class _Writer:
    """Writes one random workflow over integers."""

    extra: tuple[str, ...] = ()  # kinds of steps besides
    only: tuple[str, ...] = ()  # if any: the kinds of steps that may stand here

    def __init__(self, rng: random.Random, play: Play, depth: int) -> None:
        self.rng = rng
        self.play = play
        self.depth = depth
        self.line = 1

    def workflow(self, name: str, callees: Sequence[Graph]) -> Graph:
        b = Builder(name, [("x", INT), ("y", INT)], scope="world")
        b.scopes["world"] = Scope({"emit": self.play.emit, "__name__": "play"}, {}, "play.py", name)
        self.b, self.callees = b, callees
        values = list(b.params)
        self.steps(values, self.rng.randrange(3, 9), self.depth)
        return b.finish(self.pick(values))

    def pick(self, values: list[Value]) -> Value:
        return self.rng.choice(values[-5:])

    def steps(self, values: list[Value], count: int, depth: int) -> None:
        for _ in range(count):
            self.line += 1
            self.b.loc = Loc("play.py", self.line)
            kinds = [
                "pure",
                "pure",
                "raises",
                "emit",
                "fetch",
                "count",
                "put",
                "post",
                "half",
                "search",
                "generate",
                "choose",
            ]
            if depth:
                kinds += ["if", "while", "foreach", "collect", "try", "call", "cell", "fused"] * 2
            kinds = [*(self.only or (*kinds, *self.extra * 2))]
            values.append(getattr(self, "make_" + self.rng.choice(kinds))(values, depth))

    def make_pure(self, values: list[Value], _: int) -> Value:
        return self.b.py(
            "(a * 3 + b) % 1000", self.pick(values), self.pick(values), params=["a", "b"], writes=(), raises=False
        )[0]

    def make_raises(self, values: list[Value], _: int) -> Value:
        return self.b.py("100 // (a % 8)", self.pick(values), params=["a"], writes=())[0]

    def make_emit(self, values: list[Value], _: int) -> Value:
        return self.b.py("emit(a)", self.pick(values), params=["a"])[0]

    def make_fetch(self, values: list[Value], _: int) -> Value:
        return self.b.tool(self.play.fetch, "fetch", self.pick(values), is_async=True)

    def make_count(self, values: list[Value], _: int) -> Value:
        return self.b.tool(self.play.count, "count", self.pick(values), is_async=True, reads=("db",))

    def make_put(self, values: list[Value], _: int) -> Value:
        return self.b.tool(self.play.put, "put", self.pick(values), is_async=True, writes=("db",))

    def make_post(self, values: list[Value], _: int) -> Value:
        return self.b.tool(self.play.post, "post", self.pick(values), is_async=True, writes=("web",))

    def make_half(self, values: list[Value], _: int) -> Value:
        return self.b.tool(self.play.half, "half", self.pick(values))

    def make_search(self, values: list[Value], _: int) -> Value:
        docs = self.b.search("docs", self.b.template("q{}", self.pick(values)), k=self.rng.randrange(1, 4))
        return self.b.py("sum(len(d.text) for d in docs)", docs, params=["docs"], writes=(), raises=False)[0]

    def make_generate(self, values: list[Value], _: int) -> Value:
        text = self.b.generate("llm", self.b.template("{} and {}", self.pick(values), self.pick(values)), max_tokens=8)
        return self.b.py("int(t)", text, params=["t"], writes=())[0]

    def make_choose(self, values: list[Value], _: int) -> Value:
        options = self.b.list_of(self.b.const("1"), self.b.const("2"), self.b.const("30"))
        text = self.b.choose("llm", self.b.template("{}", self.pick(values)), options)
        return self.b.py("int(t)", text, params=["t"], writes=())[0]

    def inner(self, values: list[Value], depth: int) -> list[Value]:
        mine = list(values)
        self.steps(mine, self.rng.randrange(1, 4), depth - 1)
        return mine

    def make_if(self, values: list[Value], depth: int) -> Value:
        (condition,) = self.b.py("a % 2", self.pick(values), params=["a"], writes=(), raises=False)
        regions = []
        for _ in range(2):
            with self.b.region() as block:
                mine = list(values) if self.rng.random() < 0.2 else self.inner(values, depth)
                block.yields = (self.pick(mine),)
            regions.append(block.done())
        return self.b.if_(condition, regions[0], regions[1])[0]

    def make_while(self, values: list[Value], depth: int) -> Value:
        b = self.b
        start, count = self.pick(values), b.const(0)
        stop = self.rng.randrange(1, 4)
        with b.region([("n", INT), ("v", ANY)]) as cond:
            cond.yields = b.py(f"n < {stop}", cond.params[0], params=["n"], writes=(), raises=False)
        with b.region([("n", INT), ("v", ANY)]) as body:
            mine = self.inner([*values, body.params[1]], depth)
            (n,) = b.py("n + 1", body.params[0], params=["n"], writes=(), raises=False)
            (again,) = b.py("a % 5 != 4", self.pick(mine), params=["a"], types=[BOOL], writes=(), raises=False)
            body.yields = (again, n, self.pick(mine))
        return b.while_([count, start], cond.done(), body.done(), limit=self.rng.choice([2, 3, 100]))[1]

    def items(self, values: list[Value]) -> Value:
        kind = self.rng.choice(
            ["[a, a + 1, a + 2]", "range(a % 4)", "(a, 5)", "iter([a, a + 3])", "{a: 1, a + 1: 2}", "[]"]
        )
        shown = ANY if "iter" in kind else list_of(INT)
        return self.b.py(kind, self.pick(values), params=["a"], writes=(), raises=False, types=[shown])[0]

    def make_foreach(self, values: list[Value], depth: int) -> Value:
        b = self.b
        items, start = self.items(values), self.pick(values)
        breaks = self.rng.random() < 0.4
        with b.region([("i", INT), ("acc", ANY)]) as body:
            mine = self.inner([*values, *body.params], depth)
            (acc,) = b.py("(i + a) % 1000", mine[-1], body.params[1], params=["i", "a"], writes=(), raises=False)
            go_on = b.py("a % 3 != 1", acc, params=["a"], writes=(), raises=False) if breaks else ()
            body.yields = (*go_on, acc)
        return b.foreach(items, [start], body.done(), breaks=breaks)[0]

    def make_collect(self, values: list[Value], depth: int) -> Value:
        b = self.b
        items = self.items(values)
        with b.region([("i", INT)]) as body:
            mine = self.inner([*values, body.params[0]], depth)
            body.yields = (b.list_of(mine[-1]), b.list_of())
        region = body.done()
        effect = effect_of_region(region)
        parallel = True if not effect.writes and self.rng.random() < 0.8 else None
        lists = b.foreach(items, [], region, collects=2, parallel=parallel)
        joined, _ = b.emit("append", [lists[0], self.pick(values)], [("joined", list_of(INT))]), lists[1]
        return b.py("sum(x) % 1000", joined[0], params=["x"], writes=(), raises=False)[0]

    def make_try(self, values: list[Value], depth: int) -> Value:
        b = self.b
        with b.region() as body:
            mine = self.inner(values, depth)
            body.yields = (self.pick(mine),)
        handlers = self.rng.choice(
            [("",), ("LookupError",), ("ZeroDivisionError", "(LookupError, OSError)"), ("Missing",)]
        )
        regions = []
        for _ in handlers:
            with b.region([("e", ANY)]) as handler:
                (size,) = b.py("len(str(e))", handler.params[0], params=["e"], writes=(), raises=False)
                mine = self.inner([*values, size], depth) if self.rng.random() < 0.5 else [size]
                handler.yields = (mine[-1],)
            regions.append(handler.done())
        return b.emit("try", [], [("v", ANY)], {"handlers": handlers}, [body.done(), *regions])[0]

    def make_call(self, values: list[Value], _: int) -> Value:
        if not self.callees:
            return self.make_pure(values, 0)
        callee = self.rng.choice(self.callees)
        effect = effect_of_region(callee.body)
        reads, writes = tuple(sorted(effect.reads)) or None, tuple(sorted(effect.writes)) or None
        return self.b.call(callee, self.pick(values), self.pick(values), reads=reads, writes=writes)

    def make_cell(self, values: list[Value], depth: int) -> Value:
        b = self.b
        (cell,) = b.emit("cell", [self.pick(values)], [("cell", ANY)])
        (condition,) = b.py("a % 2", self.pick(values), params=["a"], writes=(), raises=False)
        with b.region() as then:
            mine = self.inner(values, depth)
            b.emit("store", [cell, mine[-1]], [("stored", ANY)])
            then.yields = (mine[-1],)
        with b.region() as orelse:
            orelse.yields = (self.pick(values),)
        b.if_(condition, then.done(), orelse.done())
        return b.emit("load", [cell], [("loaded", ANY)])[0]

    def make_fused(self, values: list[Value], depth: int) -> Value:
        b = self.b
        with b.region() as body:
            mine = list(values)
            for _ in range(self.rng.randrange(1, 4)):
                make = self.rng.choice([self.make_pure, self.make_raises, self.make_emit])
                mine.append(make(mine, 0))
            (total,) = b.py("t = a + 1\nu = t * 2", mine[-1], params=["a"], outs=["u"], writes=(), raises=False)
            body.yields = (total, mine[-1])
        return b.emit("fused", [], [("u", ANY), ("w", ANY)], {}, [body.done()])[self.rng.randrange(2)]


class _StageWriter(_Writer):
    """Writes one with operations of the stage level, guesses that are wrong and advice that nobody needs."""

    extra = ("pieces", "pieces", "begun", "begun", "each", "each", "kv", "advice")

    def make_pieces(self, values: list[Value], depth: int) -> Value:
        """A search in pieces, with other work between them and perhaps a guess from a part of it."""
        b, rng = self.b, self.rng
        (begun,) = b.emit(
            "ivf.begin", [b.template("q{}", self.pick(values))], [("s", SCAN)], {"resource": "docs", "k": 2}
        )
        mine = list(values)
        guess = None
        if rng.random() < 0.5:
            (part,) = b.emit("ivf.partial", [begun], [("part", DOCS)], {"resource": "docs", "confidence": 0.5})
            (guess,) = b.emit(
                "ahead.generate", [b.template("of {}", part)], [("h", AHEAD)], {"resource": "llm", "max_tokens": 8}
            )
        if rng.random() < 0.5:
            self.steps(mine, 1, 0)
        (scanned,) = b.emit("ivf.scan", [begun], [("s", SCAN)], {"resource": "docs"})
        if rng.random() < 0.3:
            self.steps(mine, 1, depth - 1 if depth else 0)
        (docs,) = b.emit("ivf.finish", [scanned], [("docs", DOCS)], {"resource": "docs"})
        if guess is None:
            return b.py("sum(len(d.text) for d in docs)", docs, params=["docs"], writes=(), raises=False)[0]
        return self.consume(b.template("of {}", docs), guess)

    def consume(self, prompt: Value, begun: Value, **attrs: Attr) -> Value:
        fields = {"resource": "llm", "max_tokens": 8, "kw": ("ahead",), **attrs}
        (text,) = self.b.emit("generate", [prompt, begun], [("t", TEXT)], fields)
        return self.b.py("int(t)", text, params=["t"], writes=())[0]

    def make_begun(self, values: list[Value], depth: int) -> Value:
        """Something begun ahead that is needed, needed otherwise, perhaps needed, needed in every turn, or never."""
        b, rng = self.b, self.rng
        a, c = self.pick(values), self.pick(values)
        prompt = b.template("{} then {}", a, c)
        fields: dict[str, Attr] = {"resource": "llm", "max_tokens": rng.choice([8, 8, 9])}
        (begun,) = b.emit("ahead.generate", [prompt], [("h", AHEAD)], fields)
        mine = list(values)
        if rng.random() < 0.7:
            self.steps(mine, 1, max(0, depth - 1))
        match rng.choice(["same", "same", "other", "branch", "loop", "never", "search"]):
            case "never":
                return mine[-1]
            case "other":
                return self.consume(b.template("{} then {}", a, self.pick(mine)), begun)
            case "branch":
                (condition,) = b.py("a % 2", self.pick(mine), params=["a"], writes=(), raises=False)
                with b.region() as then:
                    then.yields = (self.consume(b.template("{} then {}", a, c), begun),)
                with b.region() as orelse:
                    orelse.yields = (self.pick(mine),)
                return b.if_(condition, then.done(), orelse.done())[0]
            case "loop":
                with b.region([("i", INT), ("acc", ANY)]) as body:
                    body.yields = (self.consume(b.template("{} then {}", a, body.params[1]), begun),)
                return b.foreach(self.items(mine), [c], body.done())[0]
            case "search":
                (found,) = b.emit("ahead.search", [b.template("q{}", a)], [("h", AHEAD)], {"resource": "docs", "k": 3})
                query = b.template("q{}", rng.choice([a, c]))
                attrs: dict[str, Attr] = {"resource": "docs", "k": 3, "kw": ("ahead",)}
                (docs,) = b.emit("search", [query, found], [("docs", DOCS)], attrs)
                return b.py("sum(len(d.text) for d in docs)", docs, params=["docs"], writes=(), raises=False)[0]
            case _:
                return self.consume(b.template("{} then {}", a, c), begun)

    def make_each(self, values: list[Value], depth: int) -> Value:
        b = self.b
        prompt = b.template("lines {}", self.pick(values))
        with b.region([("i", TEXT)]) as body:
            (n,) = b.py("int(i)", body.params[0], params=["i"], writes=())
            mine = [*values, n]
            self.only = ("fetch", "search", "raises", "generate", "pieces", "begun")  # nothing that writes
            self.steps(mine, self.rng.randrange(3), 0)
            self.only = ()
            body.yields = (b.list_of(mine[-1]),)
        results = [("text", TEXT), ("items", list_of(TEXT)), ("found", list_of(ANY))]
        attrs: dict[str, Attr] = {"resource": "llm", "split": self.rng.choice(["lines", "\r\n", "1"]), "collects": 1}
        text, items, found = b.emit("llm.each", [prompt], results, attrs, [body.done()])
        total = "(len(t) + len(i) + sum(f)) % 1000"
        return b.py(total, text, items, found, params=["t", "i", "f"], writes=(), raises=False)[0]

    def make_kv(self, values: list[Value], depth: int) -> Value:
        b = self.b
        first = b.template("on {}", self.pick(values))
        (kv,) = b.emit("llm.prefill", [first], [("kv", KV)], {"resource": "llm"})
        mine = list(values)
        self.steps(mine, 1, max(0, depth - 1))
        second = b.template("on {}", mine[-1])
        if self.rng.random() < 0.5:
            (kv,) = b.emit("llm.extend", [kv, second], [("kv", KV)], {"resource": "llm"})
        if self.rng.random() < 0.2:
            return mine[-1]
        attrs: dict[str, Attr] = {"resource": "llm", "kw": ("kv",), "drops": True, "lookahead": ("docs#1", "docs#2")}
        (text,) = b.emit("generate", [second, kv], [("t", TEXT)], attrs)
        return b.py("int(t)", text, params=["t"], writes=())[0]

    def make_advice(self, values: list[Value], depth: int) -> Value:
        b = self.b
        text = b.template("{}", self.pick(values))
        site = self.rng.randrange(3)
        for _ in range(self.rng.randrange(1, 4)):
            match self.rng.choice(["kv.hint", "kv.release", "kv.pin", "cluster.prefetch"]):
                case "kv.hint":
                    attrs: dict[str, Attr] = {"resource": "llm", "site": site, "prefix": "a", "steps": 2}
                    b.emit("kv.hint", [text], [], attrs)
                case "kv.release":
                    b.emit("kv.release", [], [], {"resource": "llm", "site": site})
                case "kv.pin":
                    b.emit("kv.pin", [text], [], {"resource": "llm", "site": site, "ttl": 1.5})
                case _:
                    b.emit("cluster.prefetch", [text], [], {"resource": "docs", "site": 10 + site, "window": 0.5})
        docs = b.search("docs", text, k=1, site=10 + site)
        return b.py("len(docs)", docs, params=["docs"], writes=(), raises=False)[0]


def stage_workflow(seed: int, play: StagePlay) -> Graph:
    """A workflow of two integers with operations of the stage level."""
    rng = random.Random(seed)
    inner = _StageWriter(rng, play, 1).workflow("inner", [])
    return _StageWriter(rng, play, 2).workflow("main", [inner])


def random_workflow(seed: int, play: Play) -> Graph:
    """A workflow of two integers; the same for the same seed, whatever the latencies."""
    rng = random.Random(seed)
    callees: list[Graph] = []
    for i in range(rng.randrange(3)):
        callees.append(_Writer(rng, play, 1).workflow(f"inner{i}", callees))
    return _Writer(rng, play, 3).workflow("main", callees)


def text_graph(name: str = "answer", **options: Any) -> Graph:
    """search, then generate over what it found: the smallest RAG workflow."""
    b = Builder(name, [("question", TEXT)], loc=Loc("qa.py", 12, 4, 20))
    docs = b.search("pydocs", b.params[0], k=2)
    prompt = b.template("{}|{}", b.params[0], docs)
    return b.finish(b.generate("default", prompt, **options))
