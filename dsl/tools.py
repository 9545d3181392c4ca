"""`@tool` and `@pure`: what a plain function says of itself, so that the compiler may move it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")


class Tool(Generic[P, R]):
    """A function with declared effects. Calling it calls the function; in a workflow it becomes a `tool` operation.

    A name in `reads` or `writes` stands for a state of the outside world ("db", "cache"): two tools keep their program
    order if one writes what the other reads or writes. A tool that declares neither is ordered like any other Python.
    """

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        reads: tuple[str, ...] | None = None,
        writes: tuple[str, ...] | None = None,
        idempotent: bool = False,
        timeout_s: float | None = None,
        retries: int = 0,
        name: str | None = None,
        description: str | None = None,
    ) -> None:
        if retries and not idempotent:
            raise ValueError(
                f"tool {fn.__name__!r}: retries need idempotent=True, since a failed call may have had its effect"
            )
        functools.update_wrapper(self, fn)
        self.fn = fn
        self.name = name or fn.__name__
        self.description = description or inspect.getdoc(fn) or ""
        declared = reads is not None or writes is not None
        self.reads = reads or ()
        self.writes = (writes or ()) if declared else ("py",)
        self.idempotent = idempotent
        self.timeout_s = timeout_s
        self.retries = retries
        self.is_async = inspect.iscoroutinefunction(fn)
        self.signature = inspect.signature(fn)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.name}{self.signature}>"

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self.fn, instance)  # type: ignore[arg-type]


@overload
def tool(fn: Callable[P, R], /) -> Tool[P, R]: ...
@overload
def tool(
    *,
    reads: str | Iterable[str] | None = None,
    writes: str | Iterable[str] | None = None,
    idempotent: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    name: str | None = None,
    description: str | None = None,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...
def tool(
    fn: Callable[P, R] | None = None,
    /,
    *,
    reads: str | Iterable[str] | None = None,
    writes: str | Iterable[str] | None = None,
    idempotent: bool = False,
    timeout: float | None = None,
    retries: int = 0,
    name: str | None = None,
    description: str | None = None,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Declares a function as a tool: a step of its own, with effects.

    `timeout` is in seconds; `retries` say how often to try again after an error, and need `idempotent`.

    @tool(reads="weather", timeout=2.0, idempotent=True, retries=2)
    async def forecast(city: str) -> str: ...
    """

    def declare(f: Callable[P, R]) -> Tool[P, R]:
        return Tool(
            f, reads=_names(reads), writes=_names(writes), idempotent=idempotent, timeout_s=timeout, retries=retries,
            name=name, description=description,
        )  # fmt: skip

    return declare(fn) if fn is not None else declare


def _names(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    return None if given is None else (given,) if isinstance(given, str) else tuple(given)


F = TypeVar("F", bound=Callable[..., Any] | Callable[..., Awaitable[Any]])


def pure(fn: F) -> F:
    """Declares that a function has no side effects and depends on its arguments alone; it may raise.

    The compiler may then move it, share it and run it beside other Python. The declaration is trusted.
    """
    marked: Any = fn
    marked.__flowc_pure__ = True
    return fn
