"""Lanes: where operations of all programs meet before a backend and leave as one batch.

Each resource has a lane with one worker thread (a backend with `async def` methods has one in each event loop
instead). A free lane takes a *wavefront*: of everything queued, all that may share a call with the item chosen first.
While the backend works, the next wavefront gathers; nobody waits for a timer. A backend with `max_calls` above 1 takes
so many calls at a time, for it batches by itself: then a wavefront leaves at once, on a worker thread of its own.
"""

from __future__ import annotations

import asyncio
import copy
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from time import monotonic, perf_counter
from typing import Any, NamedTuple

from flowc.ir.errors import FlowcError, RunError

from .program import LaneItem
from .protocols import ScanBudget
from .requests import batch_key_of
from .symbols import is_async_callable

DEFAULT_MAX_BATCH = 64  # of backends that do not say

Answer = tuple[LaneItem, bool, Any]


def next_wavefront(queue: deque[LaneItem], max_batch: int) -> list[LaneItem]:
    """Takes the next batch out of a queue that is not empty: one item, and those with its batch key.

    The oldest go first; where they hold tickets, those with the lowest priority, and of equals the oldest.
    """
    if queue[0].ticket is not None:
        return _next_by_priority(queue, max_batch)
    first = queue.popleft()
    batch = [first]
    key = first.key
    kept: list[LaneItem] = []
    while queue and len(batch) < max_batch:
        item = queue.popleft()
        if item.key == key:
            batch.append(item)
        else:
            kept.append(item)
    queue.extendleft(reversed(kept))
    return batch


def _next_by_priority(queue: deque[LaneItem], max_batch: int) -> list[LaneItem]:
    first = min(queue, key=_priority)
    mates = [item for item in queue if item.key == first.key]
    batch = sorted(mates, key=_priority)[:max_batch]  # equals stay in the order in which they came
    if len(batch) == len(queue):
        queue.clear()
    else:
        taken = set(map(id, batch))
        left = [item for item in queue if id(item) not in taken]
        queue.clear()
        queue.extend(left)
    return batch


def _priority(item: LaneItem) -> float:
    return item.ticket.priority if item.ticket is not None else 0.0


def _arguments(method: str, batch: list[LaneItem]) -> tuple[Any, ...]:
    """What a backend's method is called with for a batch."""
    requests = [item.request for item in batch]
    if method != "generate":
        return (requests,)

    written = [0] * len(batch)

    def on_text(index: int, piece: str) -> None:
        item = batch[index]
        if item.on_text is None or item.dead:
            return
        told = item.told - written[index]  # by a call that failed and is made again
        written[index] += len(piece)
        if told < len(piece):
            item.told = written[index]
            item.on_text(piece[told:] if told > 0 else piece)

    listens = any(item.on_text is not None for item in batch)
    return (requests, on_text if listens else None, lambda index: batch[index].dead)


def _pair(batch: list[LaneItem], answers: Sequence[Any], name: str) -> list[Answer]:
    """Each item with its own answer. An error that several share is copied, as each program adds its own line to it."""
    if len(answers) != len(batch):
        error = RunError(f"the backend {name!r} gave {len(answers)} answers to {len(batch)} requests")
        return [(item, False, _own(error)) for item in batch]
    seen: set[int] = set()
    result: list[Answer] = []
    for item, answer in zip(batch, answers, strict=True):
        if isinstance(answer, BaseException):
            result.append((item, False, _own(answer) if id(answer) in seen else answer))
            seen.add(id(answer))
        else:
            result.append((item, True, answer))
    return result


def _own(error: BaseException) -> BaseException:
    try:
        twin = copy.copy(error)
    except Exception:
        return error
    if type(twin) is not type(error) or twin.args != error.args:
        return error
    twin.__traceback__, twin.__cause__, twin.__context__ = error.__traceback__, error.__cause__, error.__context__
    return twin


def _may_be_one_items_fault(error: BaseException, batch: list[LaneItem]) -> bool:
    """Is it worth asking item by item after a call failed as a whole? Not if a file or a server is the reason."""
    return len(batch) > 1 and isinstance(error, Exception) and not isinstance(error, OSError | MemoryError | FlowcError)


class Lane:
    """The queue in front of one backend, and its workers: as many threads as it takes calls, started when needed."""

    def __init__(self, kind: str, name: str, backend: Any, runtime_name: str = "flowc") -> None:
        self.kind = kind
        self.name = name
        self.backend = backend
        self.label = f"{kind} @{name}"
        self.max_batch = max(1, int(getattr(backend, "max_batch", DEFAULT_MAX_BATCH)))
        self.max_calls = max(1, int(getattr(backend, "max_calls", 1)))
        methods = {"llm": ("generate", "choose"), "search": ("search",), "embed": ("embed",)}.get(kind, ("rerank",))
        self.is_async = any(is_async_callable(getattr(backend, m, None)) for m in methods)
        self._queue: deque[LaneItem] = deque()
        self._ready = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._waiting = 0  # workers that have nothing to do
        self._in_calls = 0  # items that the backend works on
        self._thread_name = f"{runtime_name}-{kind}-{name}"
        self._is_closed = False

    def key(self, kind: str, request: Any) -> tuple[Any, ...]:
        return batch_key_of(kind, self.backend, request)

    def method(self, batch: list[LaneItem]) -> str:
        kind: str = batch[0].key[0]
        return kind

    def put(self, items: Iterable[LaneItem]) -> None:
        """Queues items, all before the worker looks: they leave together if they may."""
        with self._ready:
            if self._is_closed:
                raise RunError("the runtime is closed")
            self._queue.extend(items)
            self._staff()

    def forget(self, item: LaneItem) -> None:
        """Takes a cancelled item out of the queue, if it is still there."""
        with self._ready:
            try:
                self._queue.remove(item)
            except ValueError:
                pass

    def load(self) -> int:
        """How many items wait or are being worked on."""
        return len(self._queue) + self._in_calls

    def close(self) -> list[LaneItem]:
        """Ends the workers after the calls that they are in; gives the items that nobody will answer."""
        with self._ready:
            self._is_closed = True
            left = list(self._queue)
            self._queue.clear()
            self._ready.notify_all()
        return left

    def join(self, timeout_s: float) -> None:
        end = monotonic() + timeout_s
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, end - monotonic()))

    def _staff(self) -> None:
        """Sees to it that a worker looks at the queue, unless all are busy. Under the lock."""
        if self._waiting:
            self._ready.notify()
        elif len(self._threads) < self.max_calls:
            number = f"-{len(self._threads)}" if self._threads else ""
            thread = threading.Thread(target=self._work, name=f"{self._thread_name}{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _work(self) -> None:
        served = 0
        while True:
            with self._ready:
                self._in_calls -= served
                while not self._queue and not self._is_closed:
                    self._waiting += 1
                    self._ready.wait()
                    self._waiting -= 1
                if self._is_closed:
                    return
                batch = next_wavefront(self._queue, self.max_batch)
                served = len(batch)
                self._in_calls += served
                if self._queue:
                    self._staff()  # what is left need not wait for this call
            self._answer(batch)
            del batch  # an idle worker keeps nothing alive

    def _answer(self, batch: list[LaneItem]) -> None:
        """Serves a batch."""
        self._post(self._serve(batch))

    def _post(self, answers: list[Answer]) -> None:
        """Each driver gets its answers in one message."""
        posts: dict[Any, list[Answer]] = {}
        for answer in answers:
            posts.setdefault(answer[0].driver, []).append(answer)
        for driver, answers in posts.items():
            driver.post(answers)

    def _serve(self, batch: list[LaneItem]) -> list[Answer]:
        method = self.method(batch)
        call = getattr(self.backend, method)
        start = monotonic()
        try:
            answers = _pair(batch, call(*_arguments(method, batch)), self.name)
        except BaseException as error:
            if _may_be_one_items_fault(error, batch):
                answers = [one for item in batch for one in self._serve([item])]
            else:
                answers = [(item, False, _own(error)) for item in batch]
        note_batch(batch, self.label, method, start, monotonic())
        return answers


class Under(NamedTuple):
    """A search under way in an `ElasticLane`: the item that asked for it, the index's state, and when it began."""

    item: LaneItem
    search: Any
    start_s: float


class SubStages:
    """How long one step of all searches under way may take: what splitting saves in waiting against what it costs.

    A search that comes while others run waits for the step and not for their end: steps of mb seconds save
    (t_R - mb) / 2 on average and cost beta each, best at mb = sqrt(2 * beta * t_R), which pays if t_R > 8 * beta.
    Source: HedraRAG, equation 1, with the overhead subtracted. `t_R`, a search's seconds from its first step to its
    last, and `beta`, a step's seconds beyond what it was given, are measured as they come; before any search was split,
    beta is what a step takes besides scanning.
    """

    def __init__(self) -> None:
        self.search_s = 0.0
        self.overhead_s = 0.0

    @property
    def pays(self) -> bool:
        return self.search_s > 8 * self.overhead_s > 0

    @property
    def step_s(self) -> float:
        return math.sqrt(2 * self.overhead_s * self.search_s)

    def took(self, beyond_s: float, is_split: bool) -> None:
        """A step took so much longer than it was given."""
        if is_split or not self.overhead_s:
            self.overhead_s = _towards(self.overhead_s, max(0.0, beyond_s))

    def ended(self, seconds: float) -> None:
        """A search was under way for so long."""
        self.search_s = _towards(self.search_s, seconds)


def _towards(mean: float, x: float) -> float:
    return x if not mean else 0.9 * mean + 0.1 * x


class ElasticLane(Lane):
    """The lane of an index whose searches run a step at a time.

    Searches join between steps and leave when they are done, each with its own answer at once; one that is cancelled is
    dropped before the next step. Who waits for a part of a search gets it as soon as the index says that it is likely
    enough to be the whole. Where all are plain `search`es the step is the whole: they are equally long, and taking
    turns would make every one of them late.
    """

    def __init__(self, kind: str, name: str, backend: Any, runtime_name: str = "flowc") -> None:
        super().__init__(kind, name, backend, runtime_name)
        self.max_calls = 1  # the steps are the calls
        self.pace = SubStages()
        self._confidence = getattr(backend, "confidence", None)

    def _work(self) -> None:
        under: list[Under] = []
        while True:
            with self._ready:
                while not self._queue and not under and not self._is_closed:
                    self._waiting += 1
                    self._ready.wait()
                    self._waiting -= 1
                if self._is_closed and not under:
                    return
                fresh: list[LaneItem] = []
                while self._queue and len(fresh) + len(under) < self.max_batch:
                    fresh += next_wavefront(self._queue, self.max_batch - len(under) - len(fresh))
                self._in_calls = len(fresh) + len(under)
            under = self._step(under, fresh)
            del fresh

    def _step(self, under: list[Under], fresh: list[LaneItem]) -> list[Under]:
        """Begins what has come and scans on for one step. Gives what is still under way."""
        answers: list[Answer] = []
        under = [*under, *self._begin(fresh, answers)] if fresh else under
        entered_s = perf_counter()
        for one in under:
            if one.item.dead:
                one.search.cancel()
        under = [one for one in under if not one.item.dead]
        in_pieces = [one for one in under if one.item.searching is not None]
        waits = self._confidence is not None and any(self._listeners(one) for one in in_pieces)
        step_s = self.pace.step_s if waits or (in_pieces and self.pace.pays) else None
        scan_s = perf_counter()
        try:
            self.backend.scan([one.search for one in under], None if step_s is None else ScanBudget(seconds=step_s))
        except BaseException as error:
            under = self._one_by_one(under, error, answers)
        took_s = perf_counter() - scan_s
        left = [one for one in under if not one.search.done]
        ended = [one for one in under if one.search.done]
        for one in ended:
            try:
                answers.append((one.item, True, self.backend.finish(one.search)))
            except BaseException as error:
                answers.append((one.item, False, error))
        self._note(ended)
        self._post(answers)
        offered_s = perf_counter()
        for one in left:
            self._offer(one)
        if under:
            beyond_s = 0.0 if step_s is None or not left else took_s - step_s
            self.pace.took(scan_s - entered_s + beyond_s + perf_counter() - offered_s, bool(left))
        return left

    def _begin(self, fresh: list[LaneItem], answers: list[Answer]) -> list[Under]:
        start_s = monotonic()
        try:
            begun = _pair(fresh, self.backend.begin([item.request for item in fresh]), self.name)
        except BaseException as error:
            if _may_be_one_items_fault(error, fresh):
                return [one for item in fresh for one in self._begin([item], answers)]
            begun = [(item, False, _own(error)) for item in fresh]
        answers += [answer for answer in begun if not answer[1]]
        return [Under(item, search, start_s) for item, ok, search in begun if ok]

    def _one_by_one(self, under: list[Under], error: BaseException, answers: list[Answer]) -> list[Under]:
        """After a step failed as a whole: those that can be run alone."""
        alone = len(under) > 1 and isinstance(error, Exception)
        good = []
        for one in under:
            failed: BaseException | None = error
            if alone:
                try:
                    self.backend.scan([one.search])
                    failed = None
                except BaseException as e:
                    failed = e
            if failed is None:
                good.append(one)
            else:
                answers.append((one.item, False, _own(failed)))
        return good

    def _listeners(self, one: Under) -> list[tuple[Any, float]]:
        searching = one.item.searching
        return [] if searching is None else [pair for pair in searching.partials if not pair[0].dead]

    def _offer(self, one: Under) -> None:
        """Answers those who wait for a part of a search, if it is good enough for them."""
        waiting = self._listeners(one)
        if not waiting or self._confidence is None:
            return
        try:
            likely = self._confidence(one.search)
            docs = self.backend.partial(one.search) if any(likely >= least for _, least in waiting) else None
        except Exception:
            return  # a guess: they get the whole
        for handle, least in waiting:
            if likely >= least:
                handle.driver.post([(handle, True, docs)])

    def _note(self, ended: list[Under]) -> None:
        end_s = monotonic()
        starts: dict[float, list[LaneItem]] = {}
        for one in ended:
            self.pace.ended(end_s - one.start_s)
            starts.setdefault(one.start_s, []).append(one.item)
        for start_s, items in starts.items():
            note_batch(items, self.label, "search", start_s, end_s)


def make_lane(kind: str, name: str, backend: Any, runtime_name: str = "flowc") -> Lane:
    """The lane for a backend: one that works step by step where the backend's searches do."""
    methods = [getattr(backend, m, None) for m in ("begin", "scan", "partial", "finish")]
    is_elastic = kind == "search" and all(map(callable, methods)) and not any(map(is_async_callable, methods))
    return (ElasticLane if is_elastic else Lane)(kind, name, backend, runtime_name)


class LoopLane:
    """The queue of one event loop in front of an async backend: as many calls at a time as it takes, awaited there."""

    def __init__(self, lane: Lane, loop: asyncio.AbstractEventLoop, deliver: Callable[[list[Answer]], None]) -> None:
        self.lane = lane
        self.loop = loop
        self.deliver = deliver
        self.queue: deque[LaneItem] = deque()
        self.calls: dict[asyncio.Task[list[Answer]], list[LaneItem]] = {}

    def load(self) -> int:
        """How many items wait or are being worked on."""
        return len(self.queue) + sum(map(len, self.calls.values()))

    def forget(self, item: LaneItem) -> None:
        """Takes a cancelled item out; a call that nobody waits for any more is cancelled itself."""
        for task, batch in self.calls.items():
            if item in batch:
                if all(other.dead for other in batch):
                    task.cancel()
                return
        if item in self.queue:
            self.queue.remove(item)

    def put(self, items: Iterable[LaneItem]) -> None:
        self.queue.extend(items)
        self._next()

    def _next(self) -> None:
        while self.queue and len(self.calls) < self.lane.max_calls:
            batch = next_wavefront(self.queue, self.lane.max_batch)
            task = self.loop.create_task(self._serve(batch))
            self.calls[task] = batch
            task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[list[Answer]]) -> None:
        del self.calls[task]
        if not task.cancelled():
            self.deliver(task.result())
        self.loop.call_soon(self._next)  # after what the answers lead to has been queued: it may go first

    async def _serve(self, batch: list[LaneItem]) -> list[Answer]:
        method = self.lane.method(batch)
        call = getattr(self.lane.backend, method)
        start = self.loop.time()
        try:
            answers = _pair(batch, await call(*_arguments(method, batch)), self.lane.name)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if _may_be_one_items_fault(error, batch):
                answers = [one for item in batch for one in await self._serve([item])]
            else:
                answers = [(item, False, _own(error)) for item in batch]
        note_batch(batch, self.lane.label, method, start, self.loop.time())
        return answers


def note_batch(batch: list[LaneItem], lane: str, method: str, start_s: float, end_s: float) -> None:
    """Tells the program table how long a batch's requests ran, and the traces of their programs about it, each once."""
    for item in batch:
        if item.ticket is not None:
            item.ticket.ran_s = end_s - start_s
    traces = {id(t): t for item in batch if item.record is not None and (t := item.frame.program.trace) is not None}
    for trace in traces.values():
        trace.batch(lane, method, batch, start_s, end_s)


class ThreadPool:
    """A bounded pool of daemon threads that grows when all are busy. A job is called and must not raise."""

    def __init__(self, size: int, name: str) -> None:
        self._size = size
        self._name = name
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._lock = threading.Lock()
        self._is_closed = False

    def submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._is_closed:
                raise RunError("the runtime is closed")
            if self._idle > 0:
                self._idle -= 1  # promised to this job
            elif len(self._threads) < self._size:
                thread = threading.Thread(target=self._work, name=f"{self._name}-io-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
            self._jobs.put(job)

    def _work(self) -> None:
        worker.is_pool = True
        while True:
            job = self._jobs.get()
            if job is None:
                return
            job()
            del job
            with self._lock:
                self._idle += 1

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            for _ in self._threads:
                self._jobs.put(None)

    def join(self, timeout_s: float) -> None:
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(timeout_s)


class _Worker(threading.local):
    is_pool = False


worker = _Worker()
"""Says of the current thread whether it belongs to a pool: there a program runs its tools on the spot, so that a pool
full of tools that start programs of their own cannot wait for itself."""
