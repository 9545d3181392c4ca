"""Runs one program in every way there is and compares: value, error and its line, order of effects.

`python -m tests.differential SEED COUNT [--reduce]` runs many programs and prints those that differ.
"""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import linecache
import random
import re
import signal
import sys
import tempfile
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from flowc.dsl import host as host_module
from flowc.dsl.signatures import argument_types
from flowc.ir.core import Graph
from flowc.ir.errors import CaptureError, FlowcError
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify
from flowc.passes.manager import PASSES, PIPELINES, PassManager, parse_pipeline, pipeline
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import Plan, build_plan

from . import program_world as world
from .programs import Program, generate, reduce


@dataclass(frozen=True)
class Outcome:
    """What a run shows of itself. `effects` are per state, in order."""

    value: Any
    error: Any
    effects: tuple[tuple[str, tuple[str, ...]], ...]
    arguments: Any


def described(value: Any, seen: dict[int, int] | None = None, depth: int = 0) -> Any:
    """A value with its types, and with which mutable parts of it are the same object."""
    seen = {} if seen is None else seen
    if depth > 40:
        return "..."
    kind = type(value).__name__
    if isinstance(value, (list, dict, world.Box)):
        if id(value) in seen:
            return ("same", seen[id(value)])
        seen[id(value)] = len(seen)
    if isinstance(value, dict):
        return (kind, [(described(k, seen, depth + 1), described(v, seen, depth + 1)) for k, v in value.items()])
    if isinstance(value, (list, tuple)):
        return (kind, [described(v, seen, depth + 1) for v in value])
    if isinstance(value, world.Box):
        return (kind, described(value.value, seen, depth + 1))
    if isinstance(value, BaseException):
        return (kind, clean_text(str(value)))
    return (kind, clean_text(repr(value)))


def clean_text(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x", text)


def described_error(error: BaseException, filename: str) -> Any:
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == filename]
    cause = error.__cause__
    inner = (
        [described_error(e, filename)[:2] for e in error.exceptions] if isinstance(error, BaseExceptionGroup) else None
    )
    if isinstance(error, UnboundLocalError) and sys.version_info < (3, 12):
        lines = []  # CPython 3.11's STORE_FAST__LOAD_FAST, once warm, blames the line of the store
    kind = type(error).__name__
    message = error.message if isinstance(error, FlowcError) else str(error)
    free = re.fullmatch(r"cannot access free variable ('\w+') where it is not associated with .*", message)
    if free:  # inside a comprehension, which is a function of its own before Python 3.12 (PEP 709)
        kind = "UnboundLocalError"
        message = f"cannot access local variable {free[1]} where it is not associated with a value"
        lines = []
    return (
        kind, clean_text(message), lines[-1] if lines else None, inner,
        None if cause is None else (type(cause).__name__, str(cause)), error.__suppress_context__,
    )  # fmt: skip


class Loaded:
    """A program as an imported module."""

    folder: tempfile.TemporaryDirectory[str] | None = None
    count = 0

    def __init__(self, program: Program) -> None:
        if Loaded.folder is None:
            Loaded.folder = tempfile.TemporaryDirectory(prefix="flowc-programs-")
        Loaded.count += 1
        name = f"flowc_program_{Loaded.count}"
        self.path = Path(Loaded.folder.name) / f"{name}.py"
        self.path.write_text(program.source, encoding="utf-8")
        spec = importlib.util.spec_from_file_location(name, self.path)
        assert spec is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        sys.modules[name] = self.module
        self.module.__dict__["__builtins__"] = __builtins__
        code = compile(program.source, str(self.path), "exec")
        exec(code, self.module.__dict__)
        self.program = program

    def close(self) -> None:
        sys.modules.pop(self.module.__name__, None)
        linecache.cache.pop(str(self.path), None)
        self.path.unlink()

    def fresh_arguments(self, call: str) -> tuple[Any, ...]:
        """The state of the world at the start of every run, and the arguments."""
        world.reset()
        m = self.module.__dict__
        if "CONST_INTS" in m:
            m["GLOBAL"] = 5
            m["BOX"].value = 1
            m["CONST_INTS"][:] = [5, 6]
            m["CONST_WORDS"][:] = ["k", "l"]
        args: tuple[Any, ...] = eval(call, self.module.__dict__)
        return args

    def outcome(self, call: str, run: Callable[[tuple[Any, ...]], Any]) -> Outcome:
        args = self.fresh_arguments(call)
        value, error = None, None
        try:
            result = run(args)
            value = described(result)
        except Exception as e:
            error = described_error(e, str(self.path))
        effects: dict[str, list[str]] = {}
        for state, what in world.LOG:
            effects.setdefault(state, []).append(clean_text(what))
        return Outcome(value, error, tuple(sorted((s, tuple(w)) for s, w in effects.items())), described(args))


@contextmanager
def direct_host() -> Iterator[None]:
    """Inside, direct calls of resources are served by the fake backends."""
    saved = host_module._factory, host_module._host
    host_module.set_host_factory(world.DirectHost)
    try:
        yield
    finally:
        host_module._factory, host_module._host = saved


@dataclass(frozen=True)
class Difference:
    """A way of running a program that does not do what plain Python does."""

    how: str
    call: str
    expected: Any
    found: Any
    graph: Graph | None

    def __str__(self) -> str:
        text = print_graph(self.graph) if self.graph is not None else ""
        return f"{self.how}, called with {self.call}\n  eager: {self.expected}\n  found: {self.found}\n{text}"


WAYS = ("reference", "-O0", "-O1", "-O2", "-O2 late", "-O3", "random passes")


def random_pipeline(rng: random.Random) -> str:
    """A random order of passes. `fuse-py` and what needs it comes last, as the pass asks."""
    names = [n for n in PASSES if n not in ("fuse-py", "wavefront")]
    chosen = [rng.choice(names) for _ in range(rng.randrange(1, 7))]
    return ",".join(
        [*chosen, *(["fuse-py"] if rng.random() < 0.4 else []), *(["wavefront"] if rng.random() < 0.3 else [])]
    )


def differences(
    program: Program, runtime: Runtime, rng: random.Random, ways: Sequence[str] = WAYS
) -> Iterator[Difference]:
    """Everything in which a compiled run differs from the eager one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = Loaded(program)
        try:
            yield from _differences(loaded, runtime, rng, ways)
        finally:
            loaded.close()


Run = Callable[[tuple[Any, ...]], Any]


def _compiled(
    graph: Graph, runtime: Runtime, rng: random.Random, ways: Sequence[str]
) -> Iterator[tuple[str, Graph, Run]]:
    """The ways to run a graph: name, rewritten graph, what runs it. Ways that change nothing are left out."""
    for how in ways:
        if how == "reference":
            yield how, graph, partial(_interpret, graph)
        elif how == "-O2 late":
            rewritten = PassManager(pipeline(2), verify_each=True).run(graph).graph
            yield how, rewritten, partial(_late, build_plan(rewritten), rng.randrange(1000))
        elif how != "-O3" or PIPELINES[3] != PIPELINES[2]:
            text = random_pipeline(rng) if how == "random passes" else ""
            steps = parse_pipeline(text) if text else pipeline(int(how[2:]))
            rewritten = PassManager(steps, verify_each=True).run(graph).graph
            if rewritten is not graph or how == "-O0":
                yield f"{how} {text}".strip(), rewritten, partial(runtime.run, build_plan(rewritten), timeout_s=5)


def _late(plan: Plan, seed: int, args: tuple[Any, ...]) -> Any:
    """Runs a plan over services that answer after random times, in virtual time."""

    async def run() -> Any:
        with Runtime(world.Backends(world.LateLLM(), world.LateIndex())) as runtime:
            return await runtime.run_async(plan, args)

    return VirtualLoop(seed).run(run())


def _interpret(graph: Graph, args: tuple[Any, ...]) -> Any:
    return world.interpret_graph(graph, args)


def _differences(loaded: Loaded, runtime: Runtime, rng: random.Random, ways: Sequence[str]) -> Iterator[Difference]:
    main = loaded.module.main

    def eager(args: tuple[Any, ...]) -> Any:
        found = main.eager(*args)
        return asyncio.run(found) if asyncio.iscoroutine(found) else found

    known: dict[Graph, list[tuple[str, Graph, Run]]] = {}
    for call in loaded.program.calls:
        try:
            with at_most(2.0):
                expected = loaded.outcome(call, eager)
        except TooLong:
            return
        if expected.error is not None and expected.error[0] == "RecursionError":
            continue
        try:
            args = main.bind(loaded.fresh_arguments(call), {})
            graph = main.graph(argument_types(main._declared, args))
        except CaptureError as e:
            yield Difference(f"capture: {e}", call, expected, None, None)
            return
        except Exception as e:
            yield Difference(f"capture crashed: {''.join(traceback.format_exception(e))}", call, expected, None, None)
            return
        if graph not in known:
            try:
                verify(graph)
                again = parse_graph(print_graph(graph))
            except Exception as e:
                yield Difference(f"verify or print: {e}", call, None, None, graph)
                continue
            if again != graph:
                yield Difference("parse(print(graph)) != graph", call, graph, again, again)
            try:
                known[graph] = list(_compiled(graph, runtime, rng, ways))
            except Exception as e:
                yield Difference(f"compile: {''.join(traceback.format_exception(e))}", call, None, None, graph)
                continue
        for name, shown, run in known[graph]:
            found = loaded.outcome(call, run)
            if name == "reference" and found.error is not None and expected.error is not None:
                found = replace(
                    found, error=(*found.error[:2], expected.error[2], *found.error[3:])
                )  # it shows no lines
            if found != expected:
                yield Difference(name, call, expected, found, shown)
                break


HEAD = "from tests.program_world import *\n"


def same(source: str, *calls: str) -> None:
    """Fails unless `main` of this module does the same in every way it can run, called with each of these arguments."""
    program = Program(HEAD + textwrap.dedent(source).lstrip("\n"), calls or ("()",), "async def main" in source)
    with direct_host(), Runtime(world.Backends()) as runtime:
        for found in differences(program, runtime, random.Random(0)):
            raise AssertionError(str(found))


class TooLong(BaseException):
    pass


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Inside, at most so many seconds of processor time pass: a loop over a list that it lengthens is endless."""

    def stop(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.05)  # again and again: a bare `except:` may swallow it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def kind_of(d: Difference) -> Any:
    """What must stay the same while a program is reduced."""
    if not isinstance(d.expected, Outcome) or not isinstance(d.found, Outcome):
        return d.how[:30]
    parts = tuple(getattr(d.expected, f) == getattr(d.found, f) for f in Outcome.__dataclass_fields__)
    same_class = (d.expected.error or [None])[0], (d.found.error or [None])[0]
    return d.how[:12], parts, same_class


def has_forgotten_await(program: Program) -> bool:
    """Did the reduction leave a coroutine that nobody awaits?"""
    if not program.is_async:
        return False
    tree = ast.parse(program.source)
    covered: set[int] = set()
    for n in ast.walk(tree):
        if isinstance(n, ast.Await) or (
            isinstance(n, ast.Call) and ast.unparse(n.func).endswith(("create_task", "gather"))
        ):
            covered.update(id(x) for x in ast.walk(n))
    names = ("llm.", "docs.", "alookup", "aget", "aput", "anote", "helper")
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func).startswith(names)]
    return any(id(c) not in covered and not (ast.unparse(c.func).startswith("helper")) for c in calls)


def main() -> None:
    start, count = int(sys.argv[1]), int(sys.argv[2])
    ways = WAYS if "--all" in sys.argv else ("reference",)
    failed = refused = 0
    codes: dict[str, int] = {}
    with direct_host(), Runtime(world.Backends()) as runtime:
        for seed in range(start, start + count):
            program = generate(random.Random(seed))
            found = next(differences(program, runtime, random.Random(seed), ways), None)
            if found is None:
                continue
            if found.how.startswith("capture: error["):
                refused += 1
                key = found.how.splitlines()[0]
                codes[key] = codes.get(key, 0) + 1
                continue
            failed += 1
            print(f"=== seed {seed}")
            if "--reduce" in sys.argv:
                kind = kind_of(found)

                def fails(p: Program, kind: Any = kind, seed: int = seed) -> bool:
                    if has_forgotten_await(p):
                        return False
                    with at_most(3.0):
                        again = next(differences(p, runtime, random.Random(seed), ways), None)
                    return again is not None and kind_of(again) == kind

                program = reduce(program, fails)
                found = next(differences(program, runtime, random.Random(seed), ways), None) or found
            print(program.source.split("OPTIONS = ('yes', 'no')\n")[-1].strip())
            print(found, flush=True)
            if failed >= int(next((a[6:] for a in sys.argv if a.startswith("--max=")), "10")):
                break
    print(f"{count} programs from seed {start}: {failed} differ, {refused} refused")
    for key, n in sorted(codes.items(), key=lambda x: -x[1]):
        print(f"  {n:5} {key}")


if __name__ == "__main__":
    main()
