"""Copies of blocks between the device and the host, beside the step loop: a job is handed over and its end is polled.

Copies go in bounded chunks on a thread of their own, on a GPU on a stream of its own; nothing in the engine waits for
them. A job that is cancelled stops before its next chunk.

On a GPU the two streams are ordered both ways. A copy waits for the steps that were launched before it was asked for:
they may still write the block that leaves, or read the block whose place is taken. A step that is launched after a
job's end was seen needs no waiting: the copying thread tells of a chunk only once the device has finished it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .pool import KVPool

CHUNK_BLOCKS = 8


@dataclass(slots=True, eq=False)
class Copy:
    """Blocks `pairs` (from, to) on their way from one pool to the other. `copied` of them have arrived."""

    source: KVPool
    target: KVPool
    pairs: list[tuple[int, int]]
    is_cancelled: bool = False
    copied: int = 0
    seconds: float = 0.0
    after: Any = None  # on a GPU the event of the last step that was launched before

    @property
    def device(self) -> torch.device | None:
        """The GPU that takes part in it."""
        return next((p.data.device for p in (self.source, self.target) if p.data.device.type == "cuda"), None)

    def mark(self) -> None:
        """Notes, on the thread that launches steps, what must be over before the copy begins."""
        if self.device is not None:
            self.after = torch.get_device_module(self.device).Event()
            self.after.record(torch.cuda.current_stream(self.device))

    def run(self, blocks: int) -> bool:
        """Copies up to `blocks` more; is the job at its end?"""
        if not self.is_cancelled:
            begin = time.perf_counter()
            chunk = self.pairs[self.copied : self.copied + blocks]
            for source, target in chunk:
                self.target.data[target].copy_(self.source.data[source], non_blocking=True)
            if self.device is not None:
                torch.cuda.current_stream(self.device).synchronize()  # this thread's own stream
            self.copied += len(chunk)
            self.seconds += time.perf_counter() - begin
        return self.is_cancelled or self.copied == len(self.pairs)


class Copier(Protocol):
    """Takes jobs and gives them back when they ended."""

    @property
    def is_busy(self) -> bool: ...
    def submit(self, job: Copy) -> None: ...
    def finished(self) -> list[Copy]: ...
    def close(self) -> None: ...


class HandCopier:
    """Copies when it is told to: for tests, which look at every state in between."""

    def __init__(self) -> None:
        self.jobs: deque[Copy] = deque()
        self._done: list[Copy] = []

    @property
    def is_busy(self) -> bool:
        return bool(self.jobs or self._done)

    def submit(self, job: Copy) -> None:
        self.jobs.append(job)

    def advance(self, blocks: int) -> None:
        """Copies so many blocks of the oldest job."""
        if self.jobs and self.jobs[0].run(blocks):
            self._done.append(self.jobs.popleft())

    def finished(self) -> list[Copy]:
        done, self._done = self._done, []
        return done

    def close(self) -> None:
        self.jobs.clear()


class ThreadCopier:
    """Copies on a thread, in chunks. `notify` is called there whenever a job ended."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._jobs: deque[Copy] = deque()
        self._done: list[Copy] = []
        self._open = 0  # jobs that were not given back yet
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    @property
    def is_busy(self) -> bool:
        return self._open > 0

    def submit(self, job: Copy) -> None:
        job.mark()
        with self._wake:
            self._jobs.append(job)
            self._open += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="flowc-copies", daemon=True)
                self._thread.start()
            self._wake.notify()

    def finished(self) -> list[Copy]:
        with self._wake:
            done, self._done = self._done, []
            self._open -= len(done)
        return done

    def close(self) -> None:
        with self._wake:
            self._is_closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def _work(self) -> None:
        stream: Any = None
        with torch.inference_mode():
            while True:
                with self._wake:
                    while not (self._jobs or self._is_closed):
                        self._wake.wait()
                    if self._is_closed:
                        return
                    job = self._jobs.popleft()
                if job.device is not None and stream is None:
                    stream = torch.get_device_module(job.device).Stream(job.device)
                with torch.cuda.stream(stream):
                    if job.after is not None:
                        stream.wait_event(job.after)
                    while not job.run(CHUNK_BLOCKS):
                        pass
                with self._wake:
                    self._done.append(job)
                self._notify()


class Costs:
    """Whether a block is loaded sooner than computed again, from what both took lately (exponential averages)."""

    def __init__(self, load_s: float | None = None, token_s: float | None = None) -> None:
        self.load_s = load_s  # a block, host to device
        self.token_s = token_s  # a token of prefill

    def note_load(self, blocks: int, seconds: float) -> None:
        if blocks:
            self.load_s = _average(self.load_s, seconds / blocks)

    def note_prefill(self, tokens: int, seconds: float) -> None:
        if tokens:
            self.token_s = _average(self.token_s, seconds / tokens)

    def loading_pays(self, blocks: int, tokens: int) -> bool:
        """Is loading so many blocks sooner than computing their tokens? Yes as long as nothing was measured."""
        if self.load_s is None or self.token_s is None:
            return True
        return blocks * self.load_s < tokens * self.token_s


def _average(old: float | None, new: float) -> float:
    return new if old is None else 0.8 * old + 0.2 * new
