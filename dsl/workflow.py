"""`@workflow`: a function that is compiled on first call, and what can be done with it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, overload

from flowc.ir.errors import CaptureError, InputError
from flowc.ir.tracebacks import clean
from flowc.ir.types import ANY, Type

from .host import EAGER, Executable, Host, MapResult, eager_mode, host
from .signatures import argument_types, parameter_types

if TYPE_CHECKING:
    from flowc.ir.core import Graph

    from .frontend.names import Guard

P = ParamSpec("P")
R = TypeVar("R")
MAX_ITERATIONS = 10_000
MAX_VARIANTS = 8  # argument types to compile for, before every argument is taken to be anything


class Runner(Generic[P, R]):
    """The ways to run a workflow or a plan. Subclasses say which executable serves which arguments."""

    name: str
    signature: inspect.Signature
    is_async: bool

    def executable(self, args: tuple[Any, ...]) -> Executable:
        """What runs these arguments."""
        raise NotImplementedError

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
        """The arguments in the order of the parameters, with defaults. TypeError as Python's where they do not fit."""
        if not kwargs and len(args) == len(self.signature.parameters):
            return args
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.name}() {error}") from None
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def run(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result; blocks."""
        values = self.bind(args, kwargs)
        try:
            result: R = self.executable(values).run(values)
        except BaseException as error:
            clean(error)
            raise
        return result

    async def aio(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result, under the running event loop; cancelling the awaiting task cancels the program."""
        values = self.bind(args, kwargs)
        try:
            result: R = await self.executable(values).run_async(values)
        except BaseException as error:
            clean(error)
            raise
        return result

    def stream(self, *args: P.args, **kwargs: P.kwargs) -> Iterator[str]:
        """Pieces of the resulting text as they are written; joined, they are the result."""
        values = self.bind(args, kwargs)
        return self.executable(values).stream(values)

    def astream(self, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[str]:
        """As `stream`, under the running event loop."""
        values = self.bind(args, kwargs)
        return self.executable(values).astream(values)

    def map(
        self,
        inputs: Iterable[Any],
        *,
        concurrency: int | None = None,
        timeout: float | None = None,
        progress: bool | None = None,
        on_done: Callable[[int, Any], None] | None = None,
    ) -> MapResult[R]:
        """The results for many inputs, in their order; at most `concurrency` programs run at a time.

        An input is the argument of a workflow with one parameter, else a tuple of arguments or a dict by name. An input
        that fails does not stop the others: the error stands in its place, and `.errors` has them by position.
        `timeout` is in seconds for each program. `progress` shows a bar on stderr (default: if it is a terminal);
        `on_done(position, outcome)` is called as each one ends.
        """
        rows = [self.row(x) for x in inputs]
        run = self._executable_for_all(rows)
        return run.map(
            rows, concurrency=concurrency, timeout_s=timeout, progress=progress, on_done=on_done, label=self.name
        )

    async def amap(
        self,
        inputs: Iterable[Any],
        *,
        concurrency: int | None = None,
        timeout: float | None = None,
        on_done: Callable[[int, Any], None] | None = None,
    ) -> MapResult[R]:
        """As `map`, under the running event loop."""
        rows = [self.row(x) for x in inputs]
        return await self._executable_for_all(rows).amap(
            rows, concurrency=concurrency, timeout_s=timeout, on_done=on_done
        )

    def _executable_for_all(self, rows: list[tuple[Any, ...]]) -> Executable:
        return self.executable(rows[0] if rows else ())

    def row(self, given: Any) -> tuple[Any, ...]:
        """One input of `map` as arguments. InputError F081 if it does not fit the parameters."""
        many = len(self.signature.parameters) != 1
        try:
            if isinstance(given, Mapping) and (many or set(given) == set(self.signature.parameters)):
                return self.bind((), given)
            return self.bind(tuple(given) if many and isinstance(given, (tuple, list)) else (given,), {})
        except TypeError as error:
            raise InputError(str(error), code="F081", hint=f"the parameters are {self.signature}") from None


class Workflow(Runner[P, R]):
    """A function as a workflow. Calling it compiles it for the types of its arguments, once, and runs the plan."""

    __flowc_workflow__ = True
    __flowc_resource__ = True
    __flowc_agent__ = False

    def __init__(
        self,
        fn: Callable[P, R],
        *,
        name: str | None = None,
        opt: int | None = None,
        max_iterations: int = MAX_ITERATIONS,
    ) -> None:
        functools.update_wrapper(self, fn)
        self.fn: Any = fn
        self.name = name or fn.__name__
        self.signature = _signature(fn)
        self.is_async: bool = inspect.iscoroutinefunction(fn)
        self.opt = opt
        self.max_iterations = max_iterations
        self._declared = parameter_types(self.signature)
        self._captured: dict[tuple[Type, ...], tuple[Graph, tuple[Guard, ...]]] = {}
        self._compiled: dict[tuple[Any, ...], tuple[Graph, Host, Executable]] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The result; of an `async def` an awaitable of it."""
        if EAGER.get():
            return self._eager_call(*args, **kwargs)  # type: ignore[no-any-return]
        if self.is_async:
            return self.aio(*args, **kwargs)  # type: ignore[return-value]
        try:
            result: R = self.run(*args, **kwargs)
            return result
        except BaseException as error:
            clean(error)
            raise

    def _eager_call(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_async or EAGER.get() == "sync":
            return self.fn(*args, **kwargs)
        with eager_mode("sync"):  # plain functions called from a coroutine block, as their resources do
            result = self.fn(*args, **kwargs)
        return _finished(result) if self.__flowc_agent__ else result

    def eager(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What plain Python returns, one blocking call after another; of an `async def` an awaitable of it."""
        if not self.is_async:
            with eager_mode("sync"):
                result: R = self.fn(*args, **kwargs)
                return result
        return self._eager_async(*args, **kwargs)  # type: ignore[return-value]

    async def _eager_async(self, *args: Any, **kwargs: Any) -> Any:
        with eager_mode("async"):
            return await self.fn(*args, **kwargs)

    def graph(self, types: tuple[Type, ...] | None = None) -> Graph:
        """The captured graph, as written, for arguments of the annotated (or the given) types."""
        return self._capture(self._declared if types is None else types)

    def compile(self, opt: int | None = None, passes: str | None = None) -> CompiledWorkflow[P, R]:
        """A plan, callable like the workflow, at a level (default: as configured, 2) or by passes (`"cse,dce"`)."""
        return CompiledWorkflow(self, self.opt if opt is None else opt, passes)

    def explain(self) -> str:
        """What was rewritten and why, at the default level."""
        return self.compile().explain()

    def executable(self, args: tuple[Any, ...]) -> Executable:
        return self.specialise(argument_types(self._declared, args), self.opt, None)

    def _executable_for_all(self, rows: list[tuple[Any, ...]]) -> Executable:
        return self.specialise(self.types_for_all(rows), self.opt, None)

    def types_for_all(self, rows: list[tuple[Any, ...]]) -> tuple[Type, ...]:
        """Types that fit every row."""
        seen = {argument_types(self._declared, row) for row in rows} or {self._declared}
        return (
            tuple(column[0] if len(set(column)) == 1 else ANY for column in zip(*seen, strict=True))
            if len(seen) > 1
            else seen.pop()
        )

    def specialise(self, types: tuple[Type, ...], opt: int | None, passes: str | None) -> Executable:
        """The executable for arguments of these types; compiled again when a global that it relies on changed."""
        graph = self._capture(types)
        key = (types, opt, passes)
        found = self._compiled.get(key)
        if found is None or found[0] is not graph or found[1] is not host():  # after `shutdown` there is another host
            found = self._compiled[key] = (graph, host(), host().compile_graph(graph, opt, passes))
        return found[2]

    def _capture(self, types: tuple[Type, ...]) -> Graph:
        found = self._captured.get(types)
        if found is not None:
            for guard in found[1]:
                if not guard.holds():
                    break
            else:
                return found[0]
        elif len(self._captured) >= MAX_VARIANTS and any(t != ANY for t in types):
            return self._capture((ANY,) * len(types))
        from .frontend.capture import capture  # the frontend is loaded when something is compiled

        try:
            found = capture(self, types)
        except CaptureError as error:
            raise error.with_traceback(None) from None
        self._captured[types] = found
        return found[0]

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else functools.partial(self, instance)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<workflow {self.name}{self.signature}>"


async def _finished(value: Any) -> Any:
    return value


class CompiledWorkflow(Runner[P, R]):
    """A workflow at a fixed optimisation level."""

    def __init__(self, workflow: Workflow[P, R], opt: int | None, passes: str | None) -> None:
        self.workflow = workflow
        self.name, self.signature, self.is_async = workflow.name, workflow.signature, workflow.is_async
        self.opt, self.passes = opt, passes
        self._declared = parameter_types(workflow.signature)
        self._main: Any = workflow.specialise(self._declared, opt, passes)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return self.aio(*args, **kwargs) if self.is_async else self.run(*args, **kwargs)  # type: ignore[return-value]
        except BaseException as error:
            clean(error)
            raise

    def eager(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What plain Python returns."""
        return self.workflow.eager(*args, **kwargs)

    def executable(self, args: tuple[Any, ...]) -> Executable:
        return self.workflow.specialise(argument_types(self._declared, args), self.opt, self.passes)

    def _executable_for_all(self, rows: list[tuple[Any, ...]]) -> Executable:
        return self.workflow.specialise(self.workflow.types_for_all(rows), self.opt, self.passes)

    @property
    def compilation(self) -> Any:
        """The graph as captured, after each pass and at the end, with remarks: `passes.manager.Compilation`."""
        return self._main.compilation

    @property
    def graph(self) -> Graph:
        """The rewritten graph."""
        graph: Graph = self._main.compilation.graph
        return graph

    @property
    def plan(self) -> Any:
        """The plan that runs."""
        return self._main.plan

    def explain(self) -> str:
        """For every pass and place: whether it fired, why or why not, the predicted gain, the source line."""
        return str(self._main.explain())

    def estimate(self) -> Any:
        """What a run will take, said before it runs: `passes.estimate.Forecast`."""
        return self._main.estimate()

    def save(self, path: str | Path) -> Path:
        """Writes the plan as IR text; `flowc.load(path)` and `flowc run plan.flow` take it up again."""
        saved: Path = self._main.save(path)
        return saved

    def __repr__(self) -> str:
        return f"<plan of {self.name}{self.signature} at -O{self._main.compilation.level}>"


def _signature(fn: Callable[..., Any]) -> inspect.Signature:
    try:
        return inspect.signature(fn, eval_str=True)
    except Exception:  # an annotation that cannot be evaluated says nothing
        return inspect.signature(fn)


@overload
def workflow(fn: Callable[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *, name: str | None = None, opt: int | None = None, max_iterations: int = MAX_ITERATIONS
) -> Callable[[Callable[P, R]], Workflow[P, R]]: ...
def workflow(
    fn: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    opt: int | None = None,
    max_iterations: int = MAX_ITERATIONS,
) -> Workflow[P, R] | Callable[[Callable[P, R]], Workflow[P, R]]:
    """Makes a function a workflow. It is captured and compiled at its first call, not here.

    `opt` fixes the optimisation level; `max_iterations` bounds every `while` loop that holds operations.
    """

    def declare(f: Callable[P, R]) -> Workflow[P, R]:
        return Workflow(f, name=name, opt=opt, max_iterations=max_iterations)

    return declare(fn) if fn is not None else declare
