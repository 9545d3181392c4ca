"""Writes results as they come: a result that was finished is somewhere, whatever happens to the disk or to the run."""

from __future__ import annotations

import os
import stat
import sys
import threading
from pathlib import Path
from typing import Any

from flowc.ir.errors import OutputError

from .console import note, show_error, write_error
from .values import json_line

__all__ = ["ResultWriter"]


class ResultWriter:
    """Writes each row as one JSON line, at once and whole.

    When the file can no longer be written, it is cut back to its last whole line, the error is said, and this row and
    all after it go to stdout; when stdout fails, to a file in the temporary folder. `failed` is then the first error.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.written = 0
        self.failed: OutputError | None = None
        self._lock = threading.Lock()
        self._name = str(path) if path is not None else "stdout"
        self._good = 0  # bytes of whole lines in the file
        self._here = 0  # rows in the current place
        if path is None:
            self._fd = _stdout()
        else:
            try:
                self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            except OSError as error:
                raise write_error(path, error) from error

    def write(self, row: dict[str, Any]) -> None:
        """Writes one row; safe from any thread. OutputError only when there is no place left to write to."""
        data = json_line(row)
        with self._lock:
            while True:
                try:
                    self._put(data)
                except BrokenPipeError:
                    if self._name == "stdout":
                        raise  # who reads has gone: there is nobody to save results for
                    self._move(write_error(self._name, BrokenPipeError(32, "the reader has closed the pipe")))
                except OSError as error:
                    self._move(write_error(self._name, error))
                else:
                    self.written += 1
                    self._here += 1
                    return

    def _put(self, data: bytes) -> None:
        if self._fd < 0:
            sys.stdout.write(data.decode("utf-8"))
            sys.stdout.flush()
            return
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._good += len(data)

    def _move(self, error: OutputError) -> None:
        """Goes on to the next place, after the file was cut back to whole lines."""
        self.failed = self.failed or error
        if self._name != "stdout" and stat.S_ISREG(os.fstat(self._fd).st_mode):
            try:
                os.ftruncate(self._fd, self._good)
            except OSError:
                note(f"{self._name} may end in half a line")
        show_error(error)
        if self._name == str(self.path):
            os.close(self._fd)
            note(f"{self._here} finished results are in {self._name}; the rest goes to stdout")
            self._fd, self._name = _stdout(), "stdout"
        elif self._name == "stdout":
            import tempfile

            handle, name = tempfile.mkstemp(prefix="flowc-results-", suffix=".jsonl")
            note(f"{self._here} finished results went to stdout; the rest goes to {name}")
            self._fd, self._name = handle, name
        else:
            raise error
        self._good = self._here = 0

    def close(self) -> None:
        """Puts what was written on the disk."""
        with self._lock:
            if self._name == "stdout":
                return
            try:
                if stat.S_ISREG(os.fstat(self._fd).st_mode):
                    os.fsync(self._fd)
                os.close(self._fd)
            except OSError as error:
                failure = write_error(self._name, error)
                self.failed = self.failed or failure
                show_error(failure)


def _stdout() -> int:
    """The descriptor behind stdout: past Python's buffer, which would fail once more at exit. -1 if there is none (in
    a test).
    """
    sys.stdout.flush()
    try:
        return sys.stdout.fileno()
    except (OSError, ValueError):
        return -1
