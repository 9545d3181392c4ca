"""Simulated search, embedding, reranking and tools: calls that take the profile's time and answer at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar
from zlib import crc32

from flowc.ir.values import Doc, Docs
from flowc.runtime.protocols import RerankRequest, SearchRequest

from .faults import Faults, SimulatedFailure
from .profiles import LaneProfile

__all__ = ["SimulatedEmbedder", "SimulatedReranker", "SimulatedRetriever", "SimulatedTool"]

A = TypeVar("A")
PASSAGES = 1000
_WORDS = "the of a value list call index name type file object module string returns number path given".split()


def filler(number: int, words: int) -> str:
    """A text of so many words that differs with the number."""
    return " ".join([f"{number:x}", *(_WORDS[(number >> i % 16) % len(_WORDS)] for i in range(1, words))])


class _Lane:
    """A backend whose calls take time and nothing else. With a lost worker, calls wait until one is free again."""

    def __init__(self, name: str, profile: LaneProfile, faults: Faults) -> None:
        self.name = name
        self.profile = profile
        self.faults = faults
        self.max_batch = profile.max_batch
        self.max_calls = profile.workers
        self.busy_s = 0.0
        self.items = self.calls = self.running = 0

    async def work(self, count: int) -> list[SimulatedFailure | None]:
        """Passes the time of a call of so many items; the failure of each, or None."""
        loop = asyncio.get_running_loop()
        self.calls += 1
        self.items += count
        while self.running >= (alive := self.max_calls - self.faults.lost(loop.time())):
            if alive <= 0 and not any(t > loop.time() for t in self.faults.changes):
                return [SimulatedFailure(f"every worker of {self.name!r} is lost")] * count
            await asyncio.sleep(self._until_change(loop.time()))
        self.running += 1
        try:
            seconds = (self.profile.call_s + count * self.profile.item_s) * self.faults.factor(loop.time())
            self.busy_s += seconds
            await asyncio.sleep(seconds)
        finally:
            self.running -= 1
        now_s = loop.time()
        return [self.faults.failure(now_s) for _ in range(count)]

    def _until_change(self, now_s: float) -> float:
        """Seconds until a worker may be free: no longer than a call, and no later than the next fault's end."""
        call_s = max(self.profile.call_s + self.profile.item_s, 1e-3)
        return min([call_s, *(t - now_s for t in self.faults.changes if t > now_s)])

    async def answers(self, requests: Sequence[Any], answer: Callable[[Any], A]) -> list[A | Exception]:
        failures = await self.work(len(requests))
        return [answer(r) if f is None else f for r, f in zip(requests, failures, strict=True)]

    def close(self) -> None:
        """Nothing is held."""


class SimulatedRetriever(_Lane):
    """An index of a thousand passages of `passage_words` words; which ones a query finds follows from its text."""

    kind = "simulated"

    def __init__(self, name: str, profile: LaneProfile, faults: Faults, passage_words: int = 60) -> None:
        super().__init__(name, profile, faults)
        self._passages = [Doc(i, filler(i * 2654435761 % 2**32, passage_words)) for i in range(PASSAGES)]

    def batch_key(self, request: SearchRequest) -> Hashable:
        return self.name

    def _find(self, request: SearchRequest) -> Docs:
        first = crc32(request.query.encode("utf-8", "surrogatepass"))
        return Docs(self._passages[(first + 37 * i) % PASSAGES] for i in range(request.k))

    async def search(self, requests: Sequence[SearchRequest]) -> list[Docs | Exception]:
        return await self.answers(requests, self._find)


class SimulatedReranker(_Lane):
    """Keeps the first k passages as they come."""

    kind = "simulated"

    async def rerank(self, requests: Sequence[RerankRequest]) -> list[Docs | Exception]:
        return await self.answers(requests, lambda r: Docs(r.docs[: r.k]))


class SimulatedEmbedder(_Lane):
    """Unit vectors along one of `dim` axes, chosen by the text."""

    kind = "simulated"
    fingerprint = "simulated"
    dim = 64

    async def embed(self, texts: Sequence[str]) -> list[list[float] | Exception]:
        def vector(text: str) -> list[float]:
            axis = crc32(text.encode("utf-8", "surrogatepass")) % self.dim
            return [float(i == axis) for i in range(self.dim)]

        return await self.answers(texts, vector)


class SimulatedTool(_Lane):
    """Stands where a tool would: takes its time, and gives what the annotation `returns` promises, empty or short."""

    def __init__(self, name: str, profile: LaneProfile, faults: Faults, returns: Any = str) -> None:
        super().__init__(name, profile, faults)
        self._value = _value_of(returns)

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        (failure,) = await self.work(1)
        if failure is not None:
            raise failure
        value = self._value
        return value.copy() if isinstance(value, list | dict) else value


def _value_of(returns: Any) -> Any:
    """A value of an annotated type: of scalars and containers the simplest, of anything else a short text."""
    name = getattr(returns, "__name__", str(returns)).partition("[")[0]
    plain: dict[str, Any] = {"int": 1, "float": 1.0, "bool": True, "None": None, "NoneType": None, "bytes": b"result"}
    plain |= {"list": ["result"], "dict": {"result": "result"}, "tuple": ("result",), "Docs": Docs()}
    return plain.get(name, "result")
