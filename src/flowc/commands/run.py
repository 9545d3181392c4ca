"""`flowc run` and `flowc verify`: programs over inputs, and the proof that optimising them changed nothing."""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from flowc.ir.errors import InputError, OutputError

from .console import (
    Failed,
    Progress,
    emit,
    emit_json,
    error_to_json,
    fail,
    note,
    show_error,
    style,
    table,
    write_file,
)
from .results import ResultWriter
from .targets import Target, load_target
from .values import bind_flags, bind_json, to_json

TargetArgument = Annotated[str, typer.Argument(help="file.py:workflow, module:workflow or plan.flow", metavar="TARGET")]
Config = Annotated[Path | None, typer.Option("--config", help="Configuration file.", metavar="FILE")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of inputs: its arguments, or why there are none."""

    index: int
    line: int
    value: Any = None
    error: InputError | None = None
    bound: Any = field(default=None, compare=False)

    @property
    def head(self) -> dict[str, int]:
        return {"index": self.index, "line": self.line}


def run(
    target: TargetArgument,
    inputs: Annotated[
        list[str] | None, typer.Option("--input", "-i", help="One argument; repeat for more.", metavar="K=V")
    ] = None,
    inputs_file: Annotated[
        str | None, typer.Option("--inputs", help="One program per JSON line; - is stdin.", metavar="FILE.jsonl")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write results here instead of to stdout.", metavar="FILE.jsonl")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", min=1, help="Most programs at a time.", show_default="64")
    ] = None,
    opt: Annotated[
        int | None,
        typer.Option("-O", "--opt", min=0, max=3, help="Optimisation level.", show_default="2", metavar="0..3"),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option("--timeout", min=0.0, help="Seconds that one program may take.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", help="Write a Chrome trace (for Perfetto) here.", metavar="FILE")
    ] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Run a workflow on one input (--input) or on many (--inputs).

    With --inputs each program gives one line, {"index", "line", "value"} or {"index", "line", "error"}, as soon as it
    has finished; sort by index for the order of the inputs. A line that is no JSON, or does not fit the parameters, is
    such an error row, and the others still run. Exit code 1 if anything failed.
    """
    if inputs and inputs_file is not None:
        fail("--input and --inputs exclude each other")
    if output is not None and inputs_file is not None and _same_file(output, inputs_file):
        fail(f"{output} is both input and output", hint="results would overwrite the inputs")
    _configure(config, {"opt": opt, "concurrency": concurrency, "timeout": timeout})
    found = load_target(target)
    job = Job(found, found.compiled(opt), output, trace, as_json)
    if inputs_file is None:
        job.run_one(bind_flags(found.signature, inputs or []))
    else:
        job.run_many(list(read_rows(inputs_file, found.signature)), concurrency)


def _same_file(output: Path, inputs: str) -> bool:
    try:
        return os.path.samefile(output, inputs) and output.is_file()
    except OSError:
        return False


def _configure(config: Path | None, flags: Mapping[str, Any]) -> None:
    """Makes flags part of the process-wide configuration, before anything opens a resource."""
    if config is not None:
        if not config.is_file():
            fail(f"there is no configuration file {config}")
        os.environ["FLOWC_CONFIG"] = str(config.resolve())
    for key, value in flags.items():
        if value is not None:
            os.environ[f"FLOWC_RUN__{key.upper()}"] = str(value)


def read_rows(file: str, signature: Any) -> Iterable[Row]:
    """The programs of a JSONL file; blank lines count as lines but not as programs. InputError if the file cannot be
    read.
    """
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    name = "<stdin>" if file == "-" else file
    index = 0
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            value = json.loads(line.decode("utf-8"))
            bound = bind_json(signature, value, where)
        except InputError as error:
            yield Row(index, number, error=error)
        except UnicodeDecodeError as error:
            yield Row(
                index,
                number,
                error=InputError(f"{where} is not UTF-8: {error.reason} at byte {error.start}", code="F081"),
            )
        except (ValueError, RecursionError) as error:
            place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            problem = InputError(f"{where} is not JSON: {what}{place}", code="F081", hint="each line is one JSON value")
            yield Row(index, number, error=problem)
        else:
            yield Row(index, number, value, bound=bound)
        index += 1


@dataclass(frozen=True, slots=True)
class Job:
    """A compiled target and where its results go."""

    target: Target
    compiled: Any
    output: Path | None
    trace: Path | None
    as_json: bool

    def run_one(self, bound: inspect.BoundArguments) -> None:
        """One program; its value goes to the file or to stdout, a text as it is, anything else as JSON."""
        start = time.perf_counter()
        with tracing(self.trace):
            value = self.compiled.run(*bound.args, **bound.kwargs)
        seconds = time.perf_counter() - start
        data = to_json(value)
        is_text = isinstance(value, str) or type(value).__name__ == "Docs"
        text = str(value) if is_text else json.dumps(data, ensure_ascii=False, indent=2)
        if self.output is not None:
            try:
                write_file(self.output, json.dumps(data, ensure_ascii=True, allow_nan=False) + "\n")
            except OutputError as error:
                show_error(error)
                note("the result goes to stdout")
                emit(text)
                raise Failed from error
        if self.as_json:
            emit_json({"value": data, "seconds": seconds})
        elif self.output is None:
            emit(text)
        note(style(f"{self.target.name}: {seconds:.2f} s", "2"))

    def run_many(self, rows: list[Row], concurrency: int | None) -> None:
        """A row of results for each row of inputs, as each is finished."""
        writer = ResultWriter(self.output) if self.output is not None or not self.as_json else None
        kept: list[dict[str, Any]] = []
        broken: list[Exception] = []
        good = [row for row in rows if row.error is None]
        start = time.perf_counter()
        with Progress(len(rows), self.target.name) as progress:

            def done(row: Row, data: dict[str, Any]) -> None:
                if writer is not None:
                    writer.write(row.head | data)
                else:
                    kept.append(row.head | data)
                progress.advance(failed="error" in data)

            def finished(position: int, outcome: Any) -> None:
                """Called by the runtime, which must not suffer from what goes wrong here."""
                try:
                    error = outcome.error
                    data = {"value": to_json(outcome.value)} if error is None else {"error": error_to_json(error)}
                    done(good[position], data)
                except Exception as error:
                    broken.append(error)

            try:
                for row in rows:
                    if row.error is not None:
                        show_error(row.error)
                        done(row, {"error": error_to_json(row.error)})
                # By name: the one form of an input that is never taken for anything else.
                inputs = [dict(row.bound.arguments) for row in good]
                with tracing(self.trace):
                    self.compiled.map(inputs, concurrency=concurrency, progress=False, on_done=finished)
            except KeyboardInterrupt:
                if writer is not None:
                    note(f"{writer.written} of {len(rows)} results are written")
                raise
            finally:
                if writer is not None:
                    writer.close()
        if broken:
            raise broken[0]
        seconds = time.perf_counter() - start
        if self.as_json:
            summary: dict[str, Any] = {"programs": len(rows), "failed": progress.failed, "seconds": seconds}
            summary["output"] = str(self.output) if self.output else None
            if writer is None:
                summary["results"] = sorted(kept, key=lambda row: int(row["index"]))
            emit_json(summary)
        counts = f"{len(rows) - progress.failed} of {len(rows)} done, {progress.failed} failed"
        note(style(f"{self.target.name}: {counts}, {seconds:.2f} s", "31" if progress.failed else "2"))
        if progress.failed or (writer is not None and writer.failed is not None):
            raise Failed


@contextlib.contextmanager
def tracing(path: Path | None) -> Iterator[None]:
    """Inside, programs are traced; the trace is written at the end, also of a run that fails."""
    if path is None:
        yield
        return
    from flowc.engine import default_engine
    from flowc.runtime.trace import Trace

    runtime = default_engine().runtime
    before, runtime.trace = runtime.trace, (trace := Trace())
    try:
        yield
    finally:
        runtime.trace = before
        write_file(path, json.dumps(trace.to_chrome()) + "\n")
        note(f"wrote {path}: open it in ui.perfetto.dev, or draw it with `flowc compile TARGET -o DIR --trace {path}`")


# -- verify


@dataclass(frozen=True, slots=True)
class Answer:
    """What a run gave: a value, or an error of that class."""

    value: Any = None
    error: BaseException | None = None

    @classmethod
    def of(cls, call: Callable[[], Any]) -> Answer:
        try:
            return cls(call())
        except Exception as error:
            return cls(error=error)

    def same(self, other: Answer) -> bool:
        if self.error is not None or other.error is not None:
            return type(self.error) is type(other.error)
        return same_value(self.value, other.value)

    def shown(self) -> str:
        if self.error is not None:
            return f"{type(self.error).__name__}: {self.error}"
        text = self.value if isinstance(self.value, str) else repr(self.value)
        return text if len(text) <= 60 else text[:57] + "..."

    def as_json(self) -> dict[str, Any]:
        return {"error": error_to_json(self.error)} if self.error is not None else {"value": to_json(self.value)}


def same_value(a: Any, b: Any) -> bool:
    """Equal, and of the same type all the way down. NaN equals NaN here: both programs computed it. Objects without an
    equality of their own are compared by their attributes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            same_value(k, j) and same_value(v, w) for (k, v), (j, w) in zip(a.items(), b.items(), strict=True)
        )
    if type(a).__module__ == "numpy":
        return _same_array(a, b)
    if a is b or _compares(a):
        return a is b or bool(a == b)
    return same_value(getattr(a, "__dict__", {}), getattr(b, "__dict__", {}))


def _same_array(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _compares(value: Any) -> bool:
    """Has its class an equality of its own?"""
    return "__eq__" in {name for kind in type(value).__mro__[:-1] for name in vars(kind)}


def verify(
    target: TargetArgument,
    inputs_file: Annotated[
        str, typer.Option("--inputs", help="One program per JSON line; - is stdin.", metavar="FILE.jsonl")
    ],
    levels: Annotated[str, typer.Option("--levels", help="Which -O levels.")] = "0,1,2,3",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Compare the plain Python function with every -O level, input by input: the value, or the class of the error.

    A saved plan is compared with the reference interpreter.

    Exit code 1 if any differs, or if any line cannot be read.
    """
    chosen = _levels(levels)
    _configure(config, {})
    found = load_target(target)
    signature = found.signature
    rows = list(read_rows(inputs_file, signature))
    compiled = {level: found.workflow.compile(opt=level) for level in chosen}
    report: list[dict[str, Any]] = []
    lines: list[tuple[str, ...]] = []
    wrong = 0
    with Progress(len(rows), f"verify {found.name}") as progress:
        for row in rows:
            if row.error is not None:
                show_error(row.error)
                wrong += 1
                report.append(row.head | {"error": error_to_json(row.error)})
                lines.append((str(row.line), "unreadable", *["-"] * len(chosen)))
                progress.advance(failed=True)
                continue
            # Arguments are read anew for every run: a program may change them.
            eager = Answer.of(lambda r=row: _eager(found.workflow, signature, r))  # type: ignore[misc]
            cells: list[str] = []
            verdicts: dict[str, Any] = {}
            for level in chosen:
                answer = Answer.of(lambda r=row, n=level: _call(compiled[n].run, signature, r))  # type: ignore[misc]
                equal = eager.same(answer)
                cells.append("same" if equal else f"differs: {answer.shown()}")
                verdicts[f"-O{level}"] = {"same": equal} | ({} if equal else answer.as_json())
            bad = any(cell != "same" for cell in cells)
            wrong += bad
            report.append({**row.head, "eager": eager.as_json(), "levels": verdicts})
            lines.append((str(row.line), eager.shown(), *cells))
            progress.advance(failed=bad)
    if as_json:
        emit_json({"name": found.name, "inputs": len(rows), "wrong": wrong, "rows": report})
    else:
        table(lines, ("line", "eager", *(f"-O{level}" for level in chosen)))
    note(
        style(
            f"{found.name}: {len(rows) - wrong} of {len(rows)} inputs the same at every level", "31" if wrong else "32"
        )
    )
    if wrong:
        raise Failed


def _call(function: Callable[..., Any], signature: inspect.Signature, row: Row) -> Any:
    bound = bind_json(signature, json.loads(json.dumps(row.value)), "")
    return function(*bound.args, **bound.kwargs)


def _eager(workflow: Any, signature: inspect.Signature, row: Row) -> Any:
    """What plain Python returns; of an `async def`, under a loop of its own."""
    result = _call(workflow.eager, signature, row)
    if not inspect.isawaitable(result):
        return result
    import asyncio

    async def wait() -> Any:
        return await result

    return asyncio.run(wait())


def _levels(text: str) -> list[int]:
    try:
        found = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        fail(f"--levels takes numbers with commas, not {text!r}")
    if not found or not all(0 <= level <= 3 for level in found):
        fail(f"--levels takes levels from 0 to 3, not {text!r}")
    return found
