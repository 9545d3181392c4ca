"""The language's one door to the engine: what `flowc.engine` plugs in when something has to be compiled or run.

The language layer knows no runtime. It asks the host, which the facade installs with `set_host_factory`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from flowc.ir.core import Graph

T = TypeVar("T")


class MapResult(list[T]):
    """Results in the order of their inputs. A failed input's error stands in its place; `errors` has them all."""

    def __init__(self, outcomes: Iterable[Any]) -> None:
        self.outcomes = tuple(outcomes)
        super().__init__(o.error if o.error is not None else o.value for o in self.outcomes)

    @property
    def errors(self) -> dict[int, BaseException]:
        return {i: o.error for i, o in enumerate(self.outcomes) if o.error is not None}

    def raise_errors(self) -> None:
        """Raises an ExceptionGroup of all errors, if there are any."""
        if self.errors:
            raise BaseExceptionGroup(f"{len(self.errors)} of {len(self)} inputs failed", list(self.errors.values()))


class Executable(Protocol):
    """A compiled graph as the host runs it. Times are in seconds, for each program."""

    @property
    def compilation(self) -> Any: ...
    @property
    def plan(self) -> Any: ...
    def run(self, args: tuple[Any, ...], *, timeout_s: float | None = None) -> Any: ...
    async def run_async(self, args: tuple[Any, ...], *, timeout_s: float | None = None) -> Any: ...
    def stream(self, args: tuple[Any, ...]) -> Iterator[str]: ...
    def astream(self, args: tuple[Any, ...]) -> AsyncIterator[str]: ...
    def map(
        self,
        rows: Sequence[tuple[Any, ...]],
        *,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
        on_done: Callable[[int, Any], None] | None = None,
        label: str = "",
    ) -> MapResult[Any]: ...
    async def amap(
        self,
        rows: Sequence[tuple[Any, ...]],
        *,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        on_done: Callable[[int, Any], None] | None = None,
    ) -> MapResult[Any]: ...
    def explain(self) -> str: ...
    def save(self, path: str | Path) -> Path: ...


class Host(Protocol):
    """Compiles graphs and serves direct calls of resources."""

    def compile_graph(self, graph: Graph, opt: int | None = None, passes: str | None = None) -> Executable: ...
    def request(self, op: str, resource: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Runs one operation of a resource now and blocks for its result."""
        ...


_factory: Callable[[], Host] | None = None
_host: Host | None = None


def set_host_factory(factory: Callable[[], Host]) -> None:
    """Says how to make the host; it is made at first use."""
    global _factory, _host
    _factory, _host = factory, None


def host() -> Host:
    """The host; made at the first call."""
    global _host
    if _host is None:
        assert _factory is not None, "flowc.dsl needs a host: import flowc, or call set_host_factory"
        _host = _factory()
    return _host


EAGER: ContextVar[str] = ContextVar("flowc_eager", default="")
"""Inside `workflow.eager(...)`: "sync" or "async", after the workflow's kind. Elsewhere empty."""


@contextmanager
def eager_mode(kind: str) -> Iterator[None]:
    """Inside, workflows called from workflows run as plain Python; in "async" mode resources give awaitables."""
    token = EAGER.set(kind)
    try:
        yield
    finally:
        EAGER.reset(token)


async def _later(call: Callable[[], Any]) -> Any:
    return call()


def deliver(call: Callable[[], Any]) -> Any:
    """`call()`, or inside an async workflow's eager run an awaitable of it."""
    return _later(call) if EAGER.get() == "async" else call()
