"""The world that generated workflows run in: helpers, tools, states and backends whose every answer follows from the
request.

What happens is written to `LOG` as (state, what): "py" for opaque Python, else the state that a tool declares to write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from zlib import crc32

from flowc import LLM, Index, pure, tool, workflow
from flowc.ir.core import Graph
from flowc.ir.values import Doc, Docs
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, Generation, SearchRequest
from flowc.runtime.reference import interpret
from flowc.runtime.requests import make_request, read_answer

LOG: list[tuple[str, str]] = []
STATE: dict[str, int] = {}
HELD: list[Any] = []


def reset() -> None:
    """Empties what the programs can see of each other."""
    LOG.clear()
    HELD.clear()
    STATE.clear()


def shown(value: Any) -> str:
    return repr(value)[:300]


def log(state: str, *what: Any) -> None:
    LOG.append((state, " ".join(w if isinstance(w, str) else shown(w) for w in what)))


# -- opaque Python
def note(x: Any) -> Any:
    """`x`, and a trace of having been called."""
    log("py", "note", x)
    return x


def boom(x: Any) -> Any:
    """Fails on about a quarter of all values."""
    log("py", "boom", x)
    if crc32(shown(x).encode()) % 4 == 0:
        raise ValueError(f"boom {shown(x)}")
    return x


def same(x: Any) -> Any:
    return x


def poke(xs: Any) -> int:
    """Changes a list in place."""
    xs.append(len(xs))
    return len(xs)


def hold(xs: Any) -> Any:
    """Keeps an alias."""
    HELD.append(xs)
    return xs


def stir() -> int:
    """Changes whatever lists are held."""
    for xs in HELD:
        if isinstance(xs, list) and len(xs) < 12:
            xs.append(7)
    return len(HELD)


def tick(name: str = "n") -> int:
    STATE[name] = STATE.get(name, 0) + 1
    return STATE[name]


def each(xs: Any) -> Iterator[Any]:
    """A generator whose turns can be seen."""
    for x in xs:
        log("py", "yields", x)
        yield x
    log("py", "exhausted")


def apply(f: Callable[..., Any], *args: Any) -> Any:
    return f(*args)


def declared_int(x: Any) -> int:
    return x  # type: ignore[no-any-return]  # the annotation may lie


class Box:
    """An object with an attribute and items, truthy if its value is; looking at its truth can be seen."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        plain = isinstance(self.value, (str, int, bool, type(None)))
        return f"Box({self.value!r})" if plain else f"Box of {type(self.value).__name__}"  # boxes may hold themselves

    def __bool__(self) -> bool:
        return bool(self.value)

    def __add__(self, other: Any) -> Box:
        return Box((self.value, getattr(other, "value", other)))

    def __getitem__(self, key: Any) -> Any:
        return (self.value, key)

    def __setitem__(self, key: Any, value: Any) -> None:
        log("py", "setitem", key, value)
        self.value = value

    def method(self, x: Any = 0) -> Any:
        log("py", "method", self, x)
        return x


class Guarded:
    """A context manager that is seen, and that may swallow a ValueError."""

    def __init__(self, swallows: bool = False) -> None:
        self.swallows = swallows

    def __enter__(self) -> int:
        log("py", "enter")
        return 1

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        log("py", "exit", kind.__name__ if kind else "-")
        return self.swallows and kind is ValueError


class OwnError(Exception):
    pass


# -- pure Python
@pure
def double(x: Any) -> Any:
    return x * 2 if not isinstance(x, str) else x[:20] * 2


@pure
def halve(n: Any) -> int:
    if n % 2:
        raise ArithmeticError(f"odd {n}")
    return n // 2  # type: ignore[no-any-return]


@pure
def cut(s: Any) -> str:
    return str(s)[:30]


# -- tools
@tool
def lookup(q: Any, k: int = 2) -> str:
    log("py", "lookup", q, k)
    if crc32(shown(q).encode()) % 7 == 0:
        raise LookupError(f"nothing for {shown(q)}")
    return f"{str(q)[:12]}/{k}"


@tool
def liar(x: Any) -> str:
    log("py", "liar", x)
    return x  # type: ignore[no-any-return]


@tool(writes="db")
def put(x: Any) -> int:
    log("db", "put", x)
    STATE["db"] = STATE.get("db", 0) + 1
    return STATE["db"]


@tool(reads="db")
def get(x: Any) -> str:
    return f"{str(x)[:12]}@{STATE.get('db', 0)}"


@tool(reads="mail", writes="mail")
def send(x: Any, to: str = "a") -> str:
    log("mail", "send", x, to)
    if crc32(shown(x).encode()) % 6 == 0:
        raise OSError(f"no mail for {to}")
    return f"sent {to}"


@tool(reads=())
def parse_int(s: Any) -> int:
    return int(s)


async def pause() -> None:
    """Lets others run; in virtual time for a while that is drawn anew each time."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(loop.random.random() if isinstance(loop, VirtualLoop) else 0)


@tool
async def alookup(q: Any, k: int = 2) -> str:
    log("py", "alookup", q, k)
    await pause()
    if crc32(shown(q).encode()) % 7 == 0:
        raise LookupError(f"nothing for {shown(q)}")
    return f"{str(q)[:12]}/{k}"


@tool(reads="db")
async def aget(x: Any) -> str:
    await pause()
    return f"{str(x)[:12]}@{STATE.get('db', 0)}"


@tool(writes="db")
async def aput(x: Any) -> int:
    log("db", "aput", x)
    STATE["db"] = STATE.get("db", 0) + 1
    await pause()
    return STATE["db"]


async def anote(x: Any) -> Any:
    log("py", "anote", x)
    return x


# -- resources
llm = LLM()
docs = Index("pydocs")


class FakeLLM:
    """Writes what follows from the prompt alone, whatever shares its batch; refuses some prompts."""

    name = "default"
    kind = "fake"
    max_batch = 5

    def batch_key(self, request: GenerateRequest) -> tuple[object, ...]:
        return ()

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        on_text: Callable[[int, str], None] | None = None,
        is_cancelled: Callable[[int], bool] | None = None,
    ) -> list[Generation | Exception]:
        return [self._one(r) for r in requests]

    @staticmethod
    def _one(r: GenerateRequest) -> Generation | Exception:
        seed = crc32(r.prompt.encode()) + r.max_tokens
        if seed % 19 == 0:
            return ConnectionError(f"the model refused {r.prompt[:10]!r}")
        return Generation("\n".join(f"line{(seed >> i) % 10}" for i in range(seed % 4)))

    def choose(self, requests: Sequence[ChooseRequest]) -> list[int | Exception]:
        return [crc32(r.prompt.encode()) % len(r.options) for r in requests]

    def count_tokens(self, text: str) -> int:
        return len(text)

    def close(self) -> None:
        pass


class FakeIndex:
    """Finds what follows from the query alone."""

    name = "pydocs"
    max_batch = 5

    def batch_key(self, request: SearchRequest) -> tuple[object, ...]:
        return ()

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs | Exception]:
        return [self._one(r) for r in requests]

    @staticmethod
    def _one(r: SearchRequest) -> Docs:
        seed = crc32(r.query.encode())
        return Docs(Doc((seed >> i) % 50, f"text {(seed >> i) % 50}", 1.0 - i / 10, "s", "T") for i in range(r.k))

    def close(self) -> None:
        pass


class LateLLM(FakeLLM):
    """The same model, as a service that answers after a while."""

    async def generate(self, requests: Sequence[GenerateRequest], *_: Any) -> list[Generation | Exception]:  # type: ignore[override]
        await pause()
        return super().generate(requests)

    async def choose(self, requests: Sequence[ChooseRequest]) -> list[int | Exception]:  # type: ignore[override]
        await pause()
        return super().choose(requests)


class LateIndex(FakeIndex):
    """The same index, as a service that answers after a while."""

    async def search(self, requests: Sequence[SearchRequest]) -> list[Docs | Exception]:  # type: ignore[override]
        await pause()
        return super().search(requests)


class Backends:
    """The resources of every program."""

    def __init__(self, llm: FakeLLM | None = None, index: FakeIndex | None = None) -> None:
        self._llm, self._index = llm or FakeLLM(), index or FakeIndex()

    def llm(self, name: str) -> FakeLLM:
        return self._llm

    def index(self, name: str) -> FakeIndex:
        return self._index

    def embedder(self, name: str) -> Any:
        raise AssertionError(name)

    def reranker(self, name: str) -> Any:
        raise AssertionError(name)


def interpret_graph(graph: Graph, args: Sequence[Any]) -> Any:
    """The reference interpreter over the fake backends."""
    return interpret(graph, args, Backends())


class DirectHost:
    """Serves the direct calls of `workflow.eager`: one request at a time, no runtime."""

    def __init__(self) -> None:
        self.backends = Backends()

    def request(self, op: str, resource: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        request = make_request(op, operands, options)
        backend: Any = self.backends.index(resource) if op == "search" else self.backends.llm(resource)
        answer = getattr(backend, op)([request])[0]
        if isinstance(answer, Exception):
            raise answer
        return read_answer(op, request, answer)

    def compile_graph(self, graph: Any, opt: int | None = None, passes: str | None = None) -> Any:
        raise AssertionError("the differential test compiles by itself")


__all__ = [
    "HELD",
    "LOG",
    "STATE",
    "Backends",
    "Box",
    "DirectHost",
    "Doc",
    "Docs",
    "Guarded",
    "OwnError",
    "aget",
    "alookup",
    "anote",
    "apply",
    "aput",
    "asyncio",
    "boom",
    "cut",
    "declared_int",
    "docs",
    "double",
    "each",
    "get",
    "halve",
    "hold",
    "liar",
    "llm",
    "log",
    "lookup",
    "note",
    "parse_int",
    "poke",
    "put",
    "reset",
    "same",
    "send",
    "stir",
    "tick",
    "tool",
    "workflow",
]  # fmt: skip
