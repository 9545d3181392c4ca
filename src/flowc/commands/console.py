"""Where output goes: data to stdout, everything else to stderr; what files are written, whole or not at all.

Exit codes: 0 all went well; 1 the work was started and failed; 2 the command line, the configuration or a target is
wrong, nothing was started; 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from flowc.ir.errors import ConfigError, FlowcError, InputError, OutputError, PassError

FAILED, USAGE, INTERRUPTED = 1, 2, 130
INDEXES = Path(".flowc") / "indexes"  # where `Index("NAME")` is looked for without configuration


class UsageError(ConfigError):
    """The command line asks for something that does not exist: exit code 2."""

    code = "F051"


class Failed(Exception):
    """The command has said what is wrong; only the exit code is left. No error of flowc: it shows no message."""

    def __init__(self, code: int = FAILED) -> None:
        super().__init__(code)
        self.code = code


def exit_code(error: FlowcError) -> int:
    """2 for what is wrong before anything starts, 1 for everything that failed while it was done."""
    if isinstance(error, PassError):
        return USAGE if error.code in ("F040", "F041") else FAILED  # no such pass, no such option
    return USAGE if isinstance(error, ConfigError | InputError) else FAILED


# -- the two streams


def emit(text: str) -> None:
    """Writes data to stdout, a line at the end."""
    out = sys.stdout
    text = text if text.endswith("\n") else text + "\n"
    try:
        out.write(text)
    except UnicodeEncodeError:  # a terminal that is not UTF-8, or half of a surrogate pair
        out.write(text.encode(out.encoding or "ascii", "backslashreplace").decode(out.encoding or "ascii"))
    out.flush()


def emit_json(data: object) -> None:
    """Writes one JSON document to stdout."""
    emit(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False, default=str))


def note(text: str) -> None:
    """Says something to the person at the terminal: stderr, so that it never mixes with data."""
    err = sys.stderr
    try:
        print(text, file=err)
    except UnicodeEncodeError:
        print(text.encode(err.encoding or "ascii", "backslashreplace").decode(err.encoding or "ascii"), file=err)
    except (OSError, ValueError):  # stderr is closed
        pass


def is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:
        return False


def style(text: str, code: str, stream: TextIO | None = None) -> str:
    """The text in an ANSI style where the stream is a terminal and NO_COLOR is not set."""
    out = sys.stderr if stream is None else stream
    if not is_terminal(out) or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


def show_error(error: BaseException, *, as_json: bool = False) -> None:
    """Says an error on stderr, and with `as_json` also as JSON on stdout."""
    if isinstance(error, FlowcError):
        head, _, rest = str(error).partition("\n")
        note(style(head, "1;31") + ("\n" + rest if rest else ""))
    else:
        note("".join(traceback.format_exception(_without_our_frames(error))).rstrip())
    if as_json:
        emit_json({"error": error_to_json(error)})


def error_to_json(error: BaseException) -> dict[str, Any]:
    """`type` and `message`; of flowc's own errors also `code`, `place` and `hint`; of a user's error its place in the
    user's code.
    """
    data: dict[str, Any] = {"type": type(error).__name__, "message": _message(error)}
    if isinstance(error, FlowcError):
        data["code"] = error.code
        if error.loc is not None:
            data["place"] = str(error.loc)
        if error.hint:
            data["hint"] = error.hint
    elif (place := _place(error)) is not None:
        data["place"] = place
    return data


def _message(error: BaseException) -> str:
    if isinstance(error, FlowcError):
        return error.message
    try:
        return str(error)
    except Exception:  # a user's `__str__`
        return f"<{type(error).__name__} that cannot be shown>"


def _is_ours(filename: str) -> bool:
    return os.path.realpath(filename).startswith(_roots())


def _roots() -> tuple[str, ...]:
    """Where code lies that is not the user's: the package, the folders that its links lead to, the command line's
    library.
    """
    here = Path(__file__).resolve().parent.parent
    inside = (here / name for name in ("dsl", "ir", "passes", "runtime", "backends"))
    typer = Path(sys.modules["typer"].__file__ or "typer").resolve().parent if "typer" in sys.modules else here
    return (f"{here}{os.sep}", f"{typer}{os.sep}", *(f"{path.resolve()}{os.sep}" for path in inside), "<frozen ")


def _place(error: BaseException) -> str | None:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else None


def _without_our_frames(error: BaseException) -> BaseException:
    """The error with the frames at the start of its traceback that are flowc's own taken off."""
    tb = error.__traceback__
    while tb is not None and _is_ours(tb.tb_frame.f_code.co_filename):
        tb = tb.tb_next
    return error.with_traceback(tb) if tb is not None else error


# -- files


def write_file(path: Path, text: str) -> None:
    """Writes a whole file or leaves what was there. Raises OutputError, which says why (a full disk, no permission)."""
    target = path.resolve()
    try:
        if target.exists() and not target.is_file():  # a device or a pipe: there is nothing to replace
            with open(target, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
                stream.write(text)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        import tempfile

        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        try:
            with open(handle, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        raise write_error(path, error) from error


def write_error(path: Path | str, error: OSError) -> OutputError:
    hint = {
        errno.ENOSPC: "the disk is full: make room, or write somewhere else",
        errno.EDQUOT: "your share of the disk is used up: make room, or write somewhere else",
        errno.EACCES: "you may not write there",
        errno.EROFS: "that file system is read-only",
        errno.EISDIR: "that is a folder",
        errno.ENOTDIR: "a part of that path is a file, not a folder",
    }.get(error.errno or 0)
    return OutputError(f"{path} cannot be written: {error.strerror or error}", hint=hint)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# -- tables and progress


def table(rows: Sequence[Sequence[str]], header: Sequence[str], *, stream: TextIO | None = None) -> None:
    """Prints a table: by rich on a terminal, else as lines with tabs, which `cut` and `sort` understand."""
    out = sys.stdout if stream is None else stream
    if not is_terminal(out):
        for row in (header, *rows):
            out.write("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in row) + "\n")
        out.flush()
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    view = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for name in header:
        view.add_column(name, overflow="fold")
    for row in rows:
        view.add_row(*map(Text, row))  # Text: a `[` in a cell is no markup
    Console(file=out).print(view)


class Progress:
    """Counts finished programs on stderr: a bar on a terminal, a line every few seconds elsewhere when the work is
    long.
    """

    def __init__(self, total: int, label: str) -> None:
        self.total, self.done, self.failed, self.label = total, 0, 0, label
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if is_terminal(sys.stderr) and self.total > 1:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def advance(self, *, failed: bool = False) -> None:
        self.done += 1
        self.failed += failed
        if self._bar is not None:
            text = f"{self.label}, {self.failed} failed" if self.failed else self.label
            self._bar.update(self._task, completed=self.done, description=text)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the command with 130 and without a traceback; a closed pipe on stdout ends it quietly."""
    try:
        yield
    except KeyboardInterrupt:
        note("interrupted")
        raise Failed(INTERRUPTED) from None
    except BrokenPipeError:
        # The reader (`head`, say) has seen enough. Python would complain again when it flushes stdout at exit.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise Failed(FAILED) from None


def fail(message: str, *, hint: str | None = None, code: str | None = None) -> NoReturn:
    """Raises UsageError."""
    raise UsageError(message, hint=hint, code=code)


def many(count: int, one: str, more: str = "") -> str:
    """`1 file`, `2 files`."""
    return f"{count} {one if count == 1 else more or one + 's'}"
