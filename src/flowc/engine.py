"""The engine: configuration, backends, passes, plans and the runtime wired together, once per process.

    import flowc
    flowc.bind(llm={"default": my_backend}, index={"pydocs": flowc.open_index("indexes/pydocs")})

What is not bound by hand comes from `flowc.toml`; what is not there either is the bundled reader (models) or
`.flowc/indexes/NAME` (indexes).
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

from flowc.backends.embed import open_embedder
from flowc.backends.llm.factory import open_llm
from flowc.backends.rerank import open_reranker
from flowc.backends.rerank.llm import LLMReranker
from flowc.backends.vector import open_index
from flowc.dsl.host import MapResult, set_host_factory
from flowc.dsl.workflow import Runner
from flowc.ir.core import Graph
from flowc.ir.errors import ParseError, ResourceError
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify
from flowc.passes.cost import CostModel, read_calibration
from flowc.passes.estimate import Forecast, forecast
from flowc.passes.manager import Compilation, PassManager, parse_pipeline, pipeline
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import Plan, build_plan
from flowc.trials import Trial, Trials

from .config import Config, load_config

INDEXES = Path(".flowc") / "indexes"
LANES = {"llm": "llm", "index": "search", "embedder": "embed", "reranker": "rerank"}  # kind of resource -> its lane


class BoundResources:
    """Backends by name, opened at first use: bound by hand, else configured, else the default of their kind."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._bound: dict[tuple[str, str], Any] = {}
        self._lock = threading.RLock()

    def bind(self, kind: str, name: str, backend: Any) -> None:
        with self._lock:
            self._bound[kind, name] = backend

    def _get(self, kind: str, name: str, make: Callable[[], Any]) -> Any:
        with self._lock:
            found = self._bound.get((kind, name))
            if found is None:
                found = self._bound[kind, name] = make()
            return found

    def llm(self, name: str) -> Any:
        """The model called `name`; the bundled reader if nothing is configured for "default"."""

        def make() -> Any:
            section = self.config.llm.get(name)
            if section is not None:
                return open_llm(section.backend, **section.arguments())
            if name in ("default", "reader"):
                return open_llm("reader")
            raise ResourceError(
                f"no model is called {name!r}",
                code="F064",
                hint=f'say what it is in flowc.toml ([llm.{name}] model = "path/to/model"), '
                f"or call flowc.bind(llm={{{name!r}: ...}})",
            )

        return self._get("llm", name, make)

    def index(self, name: str) -> Any:
        """The index called `name`; without configuration the folder `.flowc/indexes/NAME`."""

        def make() -> Any:
            section = self.config.index.get(name)
            path = section.path if section is not None else INDEXES / name
            if section is None and not path.exists():
                raise ResourceError(
                    f"no index is called {name!r}",
                    code="F061",
                    hint=f"build one with `flowc index build FOLDER -o {path}`, "
                    f'or say where it is in flowc.toml ([index.{name}] path = "...")',
                )
            if section is None:
                return open_index(path, name=name)
            spec = section.embedder
            return open_index(
                path,
                (lambda: self.embedder(spec)) if spec else None,
                name=name,
                nprobe=section.nprobe,
                device=section.device,
                device_bytes=section.device_bytes,
            )

        return self._get("index", name, make)

    def embedder(self, name: str) -> Any:
        """The embedder called `name`: configured, or one that flowc knows by that name (`minilm`, `hashing`)."""

        def make() -> Any:
            section = self.config.embedder.get(name)
            if section is not None:
                return open_embedder(section.spec, **section.arguments())
            return open_embedder("minilm" if name == "default" else name)

        return self._get("embedder", name, make)

    def reranker(self, name: str) -> Any:
        """The reranker called `name`, as configured: a cross-encoder in a folder, or a language model."""

        def make() -> Any:
            section = self.config.reranker.get(name)
            if section is None:
                raise ResourceError(
                    f"no reranker is called {name!r}",
                    code="F064",
                    hint=f'say what it is in flowc.toml ([reranker.{name}] model = "FOLDER", or llm = "default"), '
                    f"or call flowc.bind(reranker={{{name!r}: ...}})",
                )
            if section.model is not None:
                return open_reranker(section.model, name=name, **section.arguments())
            llm = section.llm or "default"
            return LLMReranker(lambda: self.llm(llm), name=name)

        return self._get("reranker", name, make)

    def close(self) -> None:
        """Closes what was opened."""
        with self._lock:
            for backend in self._bound.values():
                close = getattr(backend, "close", None)
                if close is not None:
                    close()
            self._bound.clear()


class Engine:
    """Compiles graphs and runs their plans over one set of backends."""

    def __init__(self, config: Config | None = None) -> None:
        self.config = config if config is not None else load_config()
        self.resources = BoundResources(self.config)
        shared = self.config.runtime
        self.runtime = Runtime(
            self.resources, policy=shared.policy, max_programs=shared.max_programs, max_queued=shared.max_queued
        )
        path = self.config.calibration_path
        self.is_calibrated = self.config.run.calibration is not None or path.is_file()
        self.costs = read_calibration(path) if self.is_calibrated else CostModel()

    def compile_graph(self, graph: Graph, opt: int | None = None, passes: str | None = None) -> CompiledGraph:
        """The graph rewritten by the passes of a level (or those named), with the plan that runs it."""
        level = self.config.run.opt if opt is None else opt
        steps = pipeline(level) if passes is None else parse_pipeline(passes)
        verify(graph)  # operations that do not fit together are the user's mistake, and are said in the user's words
        compilation = PassManager(steps, costs=self.costs, level=level if passes is None else None).run(graph)
        fired = {r.pass_name for r in compilation.remarks if r.fired}
        candidates = [s.name for s in steps if s.on_trial and s.name in fired]
        if passes is not None or not candidates or not self.config.run.adapt:
            return CompiledGraph(self, compilation)

        def plan_with(on: frozenset[str]) -> Plan:
            kept = [s for s in steps if s.name in on or s.name not in candidates]
            return build_plan(PassManager(kept, costs=self.costs).run(graph).graph)

        return CompiledGraph(self, compilation, lambda plan: Trials(candidates, plan_with, plan))

    def request(self, op: str, resource: str, operands: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """Runs one operation now, through the lanes that running programs use."""
        return self.runtime.call(op, resource, *operands, **options)

    def close(self) -> None:
        """Ends the runtime's threads and closes the backends."""
        self.runtime.close()
        self.resources.close()


class CompiledGraph:
    """A rewritten graph with its plan; what a workflow runs on."""

    def __init__(
        self, engine: Engine, compilation: Compilation, trials: Callable[[Plan], Trials] | None = None
    ) -> None:
        self.engine = engine
        self.compilation = compilation
        self.plan: Plan = build_plan(compilation.graph)
        self.trials = trials(self.plan) if trials is not None else None

    def _limit(self, timeout_s: float | None) -> float | None:
        return timeout_s if timeout_s is not None else self.engine.config.run.timeout

    def run(self, args: tuple[Any, ...], *, timeout_s: float | None = None) -> Any:
        if self.trials is None:
            return self.engine.runtime.run(self.plan, args, timeout_s=self._limit(timeout_s))
        trial = self.trials.choose()
        started = perf_counter()
        value = self.engine.runtime.run(trial.plan, args, timeout_s=self._limit(timeout_s))
        self.trials.note(trial, perf_counter() - started)
        return value

    async def run_async(self, args: tuple[Any, ...], *, timeout_s: float | None = None) -> Any:
        if self.trials is None:
            return await self.engine.runtime.run_async(self.plan, args, timeout_s=self._limit(timeout_s))
        trial = self.trials.choose()
        started = perf_counter()
        value = await self.engine.runtime.run_async(trial.plan, args, timeout_s=self._limit(timeout_s))
        self.trials.note(trial, perf_counter() - started)
        return value

    def _chosen(
        self, on_done: Callable[[int, Any], None] | None
    ) -> tuple[Plan | Callable[[int], Plan], Callable[[int, Any], None] | None]:
        """The plan of each program of a map, and what is to be told when one ends."""
        trials = self.trials
        if trials is None:
            return self.plan, on_done
        chosen: dict[int, Trial] = {}

        def plan_of(index: int) -> Plan:
            trial = chosen[index] = trials.choose()
            return trial.plan

        def done(index: int, outcome: Any) -> None:
            trial = chosen.pop(index, None)
            if trial is not None and outcome.error is None:
                trials.note(trial, outcome.seconds)
            if on_done is not None:
                on_done(index, outcome)

        return plan_of, done

    def stream(self, args: tuple[Any, ...]) -> Iterator[str]:
        return self.engine.runtime.stream(self.plan, args)

    def astream(self, args: tuple[Any, ...]) -> AsyncIterator[str]:
        return self.engine.runtime.astream(self.plan, args)

    def map(
        self,
        rows: Sequence[tuple[Any, ...]],
        *,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        progress: bool | None = None,
        on_done: Callable[[int, Any], None] | None = None,
        label: str = "",
        trace: Any = None,
    ) -> MapResult[Any]:
        shown = sys.stderr.isatty() and len(rows) > 1 if progress is None else progress
        with _bar(len(rows), label) if shown else nullcontext(None) as advance:

            def done(index: int, outcome: Any) -> None:
                if advance is not None:
                    advance(outcome.error is not None)
                if on_done is not None:
                    on_done(index, outcome)

            plan, told = self._chosen(done)
            outcomes = self.engine.runtime.map(
                plan,
                rows,
                concurrency=concurrency or self.engine.config.run.concurrency,
                timeout_s=self._limit(timeout_s),
                on_done=told,
                trace=trace,
            )
        return MapResult(outcomes)

    async def amap(
        self,
        rows: Sequence[tuple[Any, ...]],
        *,
        concurrency: int | None = None,
        timeout_s: float | None = None,
        on_done: Callable[[int, Any], None] | None = None,
    ) -> MapResult[Any]:
        plan, told = self._chosen(on_done)
        outcomes = await self.engine.runtime.map_async(
            plan,
            rows,
            concurrency=concurrency or self.engine.config.run.concurrency,
            timeout_s=self._limit(timeout_s),
            on_done=told,
        )
        return MapResult(outcomes)

    def explain(self) -> str:
        return self.compilation.explain(self.trials.gains() if self.trials is not None else None)

    def estimate(self) -> Forecast:
        """What one run will take, by the cost model."""
        return forecast(self.compilation.graph, self.compilation.costs)

    def save(self, path: str | Path) -> Path:
        """Writes the rewritten graph as text."""
        target = Path(path)
        target.write_text(print_graph(self.compilation.graph), encoding="utf-8", errors="surrogatepass")
        return target


def _bar(total: int, label: str) -> AbstractContextManager[Callable[[bool], None]]:
    """A progress bar on stderr; calling it says that one more ended, and whether it failed."""
    from contextlib import contextmanager

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    @contextmanager
    def show() -> Iterator[Callable[[bool], None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[failed]}"),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(label, total=total, failed="")
            failures = 0

            def advance(failed: bool) -> None:
                nonlocal failures
                failures += failed
                bar.update(task, advance=1, failed=f"{failures} failed" if failures else "")

            yield advance

    return show()


class LoadedPlan(Runner[..., Any]):
    """A plan that was read from text: runs as it stands, or rewritten further with `compile`."""

    def __init__(self, graph: Graph, executable: CompiledGraph) -> None:
        import inspect

        self.captured = graph
        self.name = graph.name
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.signature = inspect.Signature([inspect.Parameter(v.name, kind) for v in graph.params])
        self.is_async = False
        self._executable = executable

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def executable(self, args: tuple[Any, ...]) -> CompiledGraph:
        return self._executable

    def graph(self) -> Graph:
        """The graph as it was read."""
        return self.captured

    def compile(self, opt: int | None = 0, passes: str | None = None) -> LoadedPlan:
        """The same plan rewritten further; `opt=0` leaves it as it is."""
        return LoadedPlan(
            self.captured, self._executable.engine.compile_graph(self.captured, 0 if opt is None else opt, passes)
        )

    def eager(self, *args: Any) -> Any:
        """The reference interpreter's result: one operation after another, in program order."""
        from flowc.runtime.reference import interpret

        return interpret(self.captured, args, self._executable.engine.resources)

    @property
    def compilation(self) -> Compilation:
        return self._executable.compilation

    @property
    def plan(self) -> Plan:
        return self._executable.plan

    def explain(self) -> str:
        return self._executable.explain()

    def estimate(self) -> Forecast:
        """What one run will take, by the cost model."""
        return self._executable.estimate()


def load(path: str | Path) -> LoadedPlan:
    """The plan that `.save(path)` or `flowc compile --emit ir` wrote, ready to run.

    A plan holds Python text: load only plans that you would run as a program. Raises ParseError with line and column.
    """
    target = Path(path)
    try:
        text = target.read_text(encoding="utf-8", errors="surrogatepass")
    except OSError as error:
        raise ParseError(f"cannot read the plan {target}: {error.strerror}", code="F030") from None
    graph = parse_graph(text, filename=str(target))
    verify(graph)
    return LoadedPlan(graph, default_engine().compile_graph(graph, 0))


_lock = threading.Lock()
_engine: Engine | None = None


def default_engine() -> Engine:
    """The process-wide engine; made at first use from the configuration found from the working directory."""
    global _engine
    with _lock:
        if _engine is None:
            _engine = Engine()
            atexit.register(shutdown)
        return _engine


def shutdown() -> None:
    """Closes the process-wide engine; the next use makes a new one."""
    global _engine
    with _lock:
        engine, _engine = _engine, None
        set_host_factory(default_engine)  # the language asks anew
    if engine is not None:
        engine.close()


def bind(
    *,
    llm: Mapping[str, Any] | None = None,
    index: Mapping[str, Any] | None = None,
    embedder: Mapping[str, Any] | None = None,
    reranker: Mapping[str, Any] | None = None,
) -> None:
    """Binds names to live backends (see `flowc.runtime.protocols`), over what the configuration says."""
    engine = default_engine()
    for kind, given in (("llm", llm), ("index", index), ("embedder", embedder), ("reranker", reranker)):
        for name, backend in (given or {}).items():
            engine.resources.bind(kind, name, backend)
            engine.runtime.forget(LANES[kind], name)


__all__ = ["CompiledGraph", "Engine", "LoadedPlan", "bind", "default_engine", "load", "shutdown"]
