"""Every error that flowc raises on purpose, in one tree.

    FlowcError
    |-- CompileError            a workflow, a plan or an option that cannot be compiled
    |   |-- CaptureError        F01x  Python that cannot become a workflow
    |   |-- VerifyError         F02x  a graph that breaks a rule of the IR
    |   |-- ParseError          F03x  a malformed .flow text (line and column)
    |   `-- PassError           F04x  an unknown pass, a bad option, a pass that broke the graph
    |-- ConfigError             F05x  flowc.toml, environment or flags
    |-- ResourceError           F06x  an index, model or embedder that is missing, damaged or does not fit
    |-- RunError                F07x  a run that cannot go on
    |   |-- LoopLimitError      F070  a loop that reached its bound
    |   |-- NodeTimeoutError    F071  also a TimeoutError
    |   |-- ProgramTimeoutError F072  also a TimeoutError
    |   |-- ReplayMismatch      F073  replay met a call that was not recorded
    |   |-- OperationTypeError  F074  also a TypeError: an operation was given a value of the wrong type
    |   |-- AdmissionError      F075  more programs than may run and wait
    |   `-- ClosedError         F076  the runtime is closed, or was closed while the program ran
    `-- InputError              F08x  a malformed input file or value

A code never changes its meaning. `str(error)` is the whole message a user sees:

    error[F012]: `yield` cannot be captured in a workflow
      --> app/qa.py:31:8
       |
    31 |         yield answer
       |         ^^^^^^^^^^^^
    hint: return the list, and read tokens as they come with `workflow.stream(...)`
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Loc:
    """A place in a source file. Lines count from 1, columns from 0; 0 for `line` means unknown."""

    file: str
    line: int
    col: int = 0
    end_col: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.col + 1}" if self.line else self.file


class FlowcError(Exception):
    """Base of everything flowc raises on purpose: `code`, `message`, `hint`, `loc`."""

    code = "F000"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        loc: Loc | None = None,
        hint: str | None = None,
        source: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.loc = loc
        self.raised_at: Loc | None = None  # `loc` once the error leaves its workflow; inside, its text is Python's
        self.hint = hint
        self.source = source  # the line of text the caret stands under, when `loc.file` cannot be read back

    def __str__(self) -> str:
        out = [f"error[{self.code}]: {self.message}"]
        if self.loc is not None:
            out.append(f"  --> {self.loc}")
            text = self.source if self.source is not None else linecache.getline(self.loc.file, self.loc.line)
            text = text.rstrip("\n")
            if text.strip():
                number = str(self.loc.line)
                gutter = " " * len(number)
                width = max(1, min(self.loc.end_col or len(text), len(text)) - self.loc.col)
                pad = "".join("\t" if c == "\t" else " " for c in text[: self.loc.col])
                out += [f"{gutter} |", f"{number} | {text}", f"{gutter} | {pad}{'^' * width}"]
        if self.hint:
            out.append(f"hint: {self.hint}")
        return "\n".join(out)


class CompileError(FlowcError):
    """A workflow, a plan or an option that cannot be compiled."""

    code = "F001"


class CaptureError(CompileError):
    """Python that cannot become a workflow; the message says why and the hint what to write instead."""

    code = "F010"


class VerifyError(CompileError):
    """A graph that breaks a rule of the IR."""

    code = "F020"


class ParseError(CompileError):
    """A malformed .flow text, with line and column."""

    code = "F030"


class PassError(CompileError):
    """An unknown pass, a bad pass option, or a pass that broke the graph (then with a reproducer)."""

    code = "F040"


class ConfigError(FlowcError):
    """A mistake in flowc.toml, in a FLOWC_ environment variable or in a flag."""

    code = "F050"


class ResourceError(FlowcError):
    """An index, a model or an embedder that is missing, damaged, or does not fit what is asked of it."""

    code = "F060"


class RunError(FlowcError):
    """A run that cannot go on."""

    code = "F07F"


class LoopLimitError(RunError):
    """A loop reached its bound; the message names the loop."""

    code = "F070"


class NodeTimeoutError(RunError, TimeoutError):
    """One operation took longer than its timeout."""

    code = "F071"


class ProgramTimeoutError(RunError, TimeoutError):
    """A whole program took longer than its timeout."""

    code = "F072"


class ReplayMismatch(RunError):
    """The replay backend was asked for a call that the recording does not hold."""

    code = "F073"


class OperationTypeError(RunError, TypeError):
    """An operation was given a value of a type that it does not take."""

    code = "F074"


class AdmissionError(RunError):
    """More programs were sent than may run and wait: send it again later.

    Fails: `Runtime(..., max_programs=2, max_queued=0)` and a third `run` beside two that are under way.
    Repaired: a larger `max_queued` lets it wait its turn; `map` never sends more than there is room for.
    """

    code = "F075"


class ClosedError(RunError):
    """The runtime is closed or closing: it takes no new program, and one that outlived the grace period was cancelled.

    Fails: `runtime.close()`, then `runtime.run(plan, args)`.
    Repaired: run first, then close; `close(grace_s=30)` lets what runs finish.
    """

    code = "F076"


class InputError(FlowcError):
    """A malformed input: a JSONL line, a `--input` value, a missing argument."""

    code = "F080"


class OutputError(FlowcError):
    """An output file cannot be written: a full disk, no permission. What was there before, or is finished, is kept."""

    code = "F090"
