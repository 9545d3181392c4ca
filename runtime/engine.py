"""The runtime: what the facade talks to. It owns the lanes, the thread pool and the drivers; one a process is usual."""

from __future__ import annotations

import asyncio
import functools
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from contextvars import copy_context
from queue import SimpleQueue
from types import TracebackType
from typing import Any

from flowc.ir.errors import ClosedError, RunError

from .admission import Gate, Place, closed, inside
from .driver import Driver, Interrupted, in_other_thread, timed_out
from .lanes import Answer, Lane, ThreadPool, make_lane
from .plan import Plan
from .program import LaneItem, Outcome, Program
from .reference import Resources, find_backend
from .requests import LANE_OF, make_request, read_answer, schema_of
from .scheduling import Policy, ProgramTable, make_policy, tenant
from .trace import Trace
from .tracebacks import clean

__all__ = ["Outcome", "Resources", "Runtime"]

_KINDS = {"llm": ("generate", "choose"), "search": ("search",), "embed": ("embed",), "rerank": ("rerank",)}


POLL_S = 0.005  # between two looks whether the last program has ended


class _ThreadLoop(threading.local):
    loop: asyncio.AbstractEventLoop | None = None


class Runtime:
    """Runs plans over backends. Thread-safe; use as a context manager or `close` it.

    `resources` is asked for each backend once, when the first operation needs it. `io_threads` bounds how many
    synchronous tools run at once outside the driver's thread; with 0 they never leave it (a simulation wants that:
    nothing then depends on real time). `trace` records every run that names no trace of its own. `policy` says whose
    requests go first where programs meet, by name (see `flowc.runtime.scheduling`) or as a `Policy`; `shares` are the
    weights of tenants under "fair", 1 where not named. ConfigError where there is no such policy. What may turn out not
    to be needed is begun ahead in a lane of which less than `ahead_share` is taken (0: never).

    At most `max_programs` run at a time, of one tenant at most `tenants[its name]` (`tenants[""]`: of any other);
    others wait in order of arrival. Where `max_queued` wait, more are refused with `AdmissionError`. What programs
    start counts as part of them. A program's tenant is what `flowc.runtime.scheduling.tenant` names where it starts.
    """

    def __init__(
        self,
        resources: Resources,
        *,
        trace: Trace | None = None,
        io_threads: int = 64,
        name: str = "flowc",
        policy: str | Policy = "fcfs",
        shares: Mapping[str, float] | None = None,
        ahead_share: float = 0.5,
        max_programs: int | None = None,
        max_queued: int | None = None,
        tenants: Mapping[str, int] | None = None,
    ) -> None:
        bounded = max_programs is not None or bool(tenants)
        self.gate = Gate(max_programs, max_queued, tenants) if bounded else None
        chosen = make_policy(policy) if isinstance(policy, str) else policy
        self.table = ProgramTable(chosen, shares) if chosen is not None else None
        self.resources = resources
        self.ahead_share = ahead_share
        self.trace = trace
        self.name = name
        self.pool = ThreadPool(io_threads, name) if io_threads else None
        self._lanes: dict[tuple[str, str], Lane] = {}
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._drivers: dict[asyncio.AbstractEventLoop, Driver] = {}
        self._thread_loop = _ThreadLoop()
        self._loops: list[asyncio.AbstractEventLoop] = []
        self._running: set[Driver] = set()
        self._is_draining = self._is_closed = False

    # -- one program
    def run(
        self, plan: Plan, args: Sequence[Any], *, timeout_s: float | None = None, trace: Trace | None = None
    ) -> Any:
        """The workflow's value. Works in the caller's thread, or on another one if an event loop runs in this one."""
        try:
            return self._run(plan, args, timeout_s, trace, None)
        except BaseException as error:
            clean(error)
            raise

    def _run(
        self,
        plan: Plan,
        args: Sequence[Any],
        timeout_s: float | None,
        trace: Trace | None,
        on_text: Callable[[str], None] | None,
    ) -> Any:
        driver = self._new_driver()
        if _has_running_loop():
            call = functools.partial(self._drive, driver, plan, args, timeout_s, trace, on_text)
            return in_other_thread(call, lambda: self._interrupt(driver), f"{self.name}-run")
        return self._drive(driver, plan, args, timeout_s, trace, on_text)

    def _drive(
        self,
        driver: Driver,
        plan: Plan,
        args: Sequence[Any],
        timeout_s: float | None,
        trace: Trace | None,
        on_text: Callable[[str], None] | None,
    ) -> Any:
        if self.gate is not None and not inside.get():
            with self._place(plan, timeout_s) as left_s:
                return self._drive(driver, plan, args, left_s, trace, on_text)
        program = driver.start(plan, args, timeout_s=timeout_s, trace=trace or self.trace, on_text=on_text)
        if not program.is_done:
            self._drive_to_end(driver)
        if program.error is not None:
            raise program.error
        return program.value

    @contextmanager
    def _place(self, plan: Plan, timeout_s: float | None) -> Iterator[float | None]:
        """Waits, in this thread, until the gate lets a program in; gives what is left of its time."""
        gate = self.gate
        assert gate is not None
        start = time.monotonic()
        told = threading.Event()
        place = gate.enter(tenant.get(), told.set)
        try:
            if not place.is_held:
                if not told.wait(timeout_s):
                    raise timed_out(plan, timeout_s)
                if not place.is_held:
                    raise closed()
            token = inside.set(True)
            try:
                yield None if timeout_s is None else max(0.0, timeout_s - (time.monotonic() - start))
            finally:
                inside.reset(token)
        finally:
            gate.leave(place)

    @asynccontextmanager
    async def _async_place(self, plan: Plan, timeout_s: float | None) -> AsyncIterator[float | None]:
        """`_place` inside the running loop."""
        gate = self.gate
        assert gate is not None
        loop = asyncio.get_running_loop()
        start = loop.time()
        told = asyncio.Event()
        place = gate.enter(tenant.get(), lambda: _tell(loop, told.set))
        try:
            if not place.is_held:
                try:
                    async with asyncio.timeout(timeout_s):
                        await told.wait()
                except TimeoutError:
                    raise timed_out(plan, timeout_s) from None
                if not place.is_held:
                    raise closed()
            token = inside.set(True)
            try:
                yield None if timeout_s is None else max(0.0, timeout_s - (loop.time() - start))
            finally:
                inside.reset(token)
        finally:
            gate.leave(place)

    def _drive_to_end(self, driver: Driver) -> None:
        self._running.add(driver)
        try:
            driver.drive()
        finally:
            driver.cancel_all(Interrupted())
            self._running.discard(driver)

    def _new_driver(self) -> Driver:
        if self._is_closed or self._is_draining:
            raise closed()
        return Driver(self)

    def _interrupt(self, driver: Driver) -> None:
        driver.post(lambda: driver.cancel_all(Interrupted()))

    async def run_async(
        self, plan: Plan, args: Sequence[Any], *, timeout_s: float | None = None, trace: Trace | None = None
    ) -> Any:
        """The workflow's value, under the running loop. Cancelling the awaiting task cancels the program at once."""
        try:
            return await self._run_async(plan, args, timeout_s, trace, None)
        except BaseException as error:
            clean(error)
            raise

    async def _run_async(
        self,
        plan: Plan,
        args: Sequence[Any],
        timeout_s: float | None,
        trace: Trace | None,
        on_text: Callable[[str], None] | None,
    ) -> Any:
        if self.gate is not None and not inside.get():
            async with self._async_place(plan, timeout_s) as left_s:
                return await self._run_async(plan, args, left_s, trace, on_text)
        loop = asyncio.get_running_loop()
        driver = self._loop_driver(loop)
        done: asyncio.Future[None] | None = None

        def on_done(_: Program) -> None:
            if done is not None and not done.done():
                done.set_result(None)

        with driver.room():
            program = driver.start(
                plan, args, timeout_s=timeout_s, trace=trace or self.trace, on_done=on_done, on_text=on_text
            )
        item = driver.next_item()
        if not program.is_done:
            driver.end_turn()
            try:
                if item is not None:
                    await driver.work(item, is_callers=True)
                if not program.is_done:
                    done = loop.create_future()
                    await done
            except BaseException:
                driver.cancel(program, Interrupted())
                raise
            finally:
                self._release(driver)
        else:
            self._release(driver)
        if program.error is not None:
            raise program.error
        return program.value

    def _loop_driver(self, loop: asyncio.AbstractEventLoop) -> Driver:
        """The one driver of a loop; it is forgotten when it has no programs, so that it keeps no loop alive."""
        driver = self._drivers.get(loop)
        if driver is None or self._is_draining:
            driver = self._drivers[loop] = self._new_driver()
            driver.loop = loop
        return driver

    def _release(self, driver: Driver) -> None:
        if not driver.active and not driver.hooks and driver.loop is not None:
            self._drivers.pop(driver.loop, None)

    def launch(
        self,
        plan: Plan,
        args: Sequence[Any],
        on_done: Callable[[Program], None],
        *,
        timeout_s: float | None = None,
        trace: Trace | None = None,
    ) -> None:
        """Starts a program in the running loop and returns at once; `on_done` is called there when it has ended.

        It costs no task: thousands may be under way. The gate counts it like any other; what is wrong with `args`, and
        AdmissionError, are raised here.
        """
        if len(args) != plan.entry.n_params:
            raise TypeError(f"workflow {plan.name} takes {plan.entry.n_params} value(s), not {len(args)}")
        loop = asyncio.get_running_loop()
        context = copy_context()
        place: Place | None = None

        def ended(program: Program) -> None:
            if place is not None:
                assert self.gate is not None
                self.gate.leave(place)
            on_done(program)
            self._release(program.driver)

        def start() -> None:
            driver = self._loop_driver(loop)
            driver.start(plan, args, timeout_s=timeout_s, trace=trace or self.trace, on_done=ended, context=context)
            driver.end_turn()

        if self.gate is not None and not inside.get():
            context.run(inside.set, True)
            place = self.gate.enter(tenant.get(), lambda: _tell(loop, start))
            if not place.is_held:
                return
        try:
            start()
        except BaseException:
            if place is not None and self.gate is not None:
                self.gate.leave(place)
            raise

    # -- many programs
    def map(
        self,
        plan: Plan | Callable[[int], Plan],
        inputs: Iterable[Sequence[Any]],
        *,
        concurrency: int = 64,
        timeout_s: float | None = None,
        on_done: Callable[[int, Outcome], None] | None = None,
        trace: Trace | None = None,
    ) -> list[Outcome]:
        """What became of each input, in order. A plan may be chosen for each input by its position.

        At most `concurrency` programs are in flight; inputs are drawn as they are needed. One program's
        error is its own outcome and nobody else's. After a KeyboardInterrupt those that had finished have been told to
        `on_done`, and are in the interrupt's attribute `outcomes` (index -> Outcome).
        """
        driver = self._new_driver()
        feed = _Feed(driver, plan, inputs, concurrency, timeout_s, on_done, trace or self.trace)
        try:
            if _has_running_loop():
                in_other_thread(lambda: self._map(driver, feed), lambda: self._interrupt(driver), f"{self.name}-map")
            else:
                self._map(driver, feed)
        except BaseException as error:
            feed.stop()
            clean(error)
            error.outcomes = dict(feed.outcomes)  # type: ignore[attr-defined]
            raise
        return feed.result()

    def _map(self, driver: Driver, feed: _Feed) -> None:
        driver.hooks.append(feed.admit)
        feed.admit()
        while driver.active or feed.waits():
            if driver.active:
                self._drive_to_end(driver)
            else:
                feed.wait()
                feed.admit()
        feed.check()

    async def map_async(
        self,
        plan: Plan | Callable[[int], Plan],
        inputs: Iterable[Sequence[Any]],
        *,
        concurrency: int = 64,
        timeout_s: float | None = None,
        on_done: Callable[[int, Outcome], None] | None = None,
        trace: Trace | None = None,
    ) -> list[Outcome]:
        """`map` inside the running loop."""
        loop = asyncio.get_running_loop()
        driver = self._loop_driver(loop)
        feed = _Feed(driver, plan, inputs, concurrency, timeout_s, on_done, trace or self.trace)
        done = loop.create_future()

        def hook() -> None:
            feed.admit()
            if not feed.active and not feed.waits() and not done.done():
                done.set_result(None)

        def placed() -> None:
            hook()
            driver.end_turn()

        feed.on_place = lambda: _tell(loop, placed)
        driver.hooks.append(hook)
        try:
            hook()
            driver.end_turn()
            await done
            feed.check()
        except BaseException as error:
            feed.stop()
            feed.cancel()
            clean(error)
            error.outcomes = dict(feed.outcomes)  # type: ignore[attr-defined]
            raise
        finally:
            driver.hooks.remove(hook)
            self._release(driver)
        return feed.result()

    # -- streams
    def stream(
        self, plan: Plan, args: Sequence[Any], *, timeout_s: float | None = None, trace: Trace | None = None
    ) -> Iterator[str]:
        """The pieces of the workflow's text as they come; together they are its value.

        A generation is passed on live only if its text is certain to be the result: it is what the workflow returns,
        at its top level, in the taken branch of an `if` or in a workflow called in that place. (A loop may write it
        again, a handler may replace it: there, and where the result is anything else, the text comes whole at the
        end.) A result that is no text comes as its `str`. Errors come out of the iterator. Closing it early cancels
        the program.
        """
        pieces: SimpleQueue[tuple[str, Any]] = SimpleQueue()
        driver = self._new_driver()

        def work() -> None:
            try:
                value = self._drive(driver, plan, args, timeout_s, trace, lambda text: pieces.put(("text", text)))
                pieces.put(("end", value))
            except BaseException as error:
                pieces.put(("error", error))

        context = copy_context()
        thread = threading.Thread(target=lambda: context.run(work), name=f"{self.name}-stream", daemon=True)
        thread.start()
        sent = _Sent()
        try:
            while not sent.is_all:
                piece = sent.next(*pieces.get())
                if piece:
                    yield piece
        except BaseException as error:
            clean(error)
            raise
        finally:
            if thread.is_alive():
                self._interrupt(driver)

    async def astream(
        self, plan: Plan, args: Sequence[Any], *, timeout_s: float | None = None, trace: Trace | None = None
    ) -> AsyncIterator[str]:
        """`stream` inside the running loop."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()

        def on_text(text: str) -> None:  # from a lane's thread, or from the loop itself
            if _has_running_loop():
                pieces.put_nowait(("text", text))
            else:
                loop.call_soon_threadsafe(pieces.put_nowait, ("text", text))

        async def work() -> None:
            try:
                pieces.put_nowait(("end", await self._run_async(plan, args, timeout_s, trace, on_text)))
            except BaseException as error:
                pieces.put_nowait(("error", error))
                if isinstance(error, asyncio.CancelledError):
                    raise

        task = loop.create_task(work())
        sent = _Sent()
        try:
            while not sent.is_all:
                piece = sent.next(*await pieces.get())
                if piece:
                    yield piece
        except BaseException as error:
            clean(error)
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    # -- single operations, outside any workflow
    def call(self, kind: str, resource: str, *operands: Any, model: Any = None, **options: Any) -> Any:
        """The value of one operation (`search`, `generate`, ...), through the same lanes as in workflows. Blocks."""
        options = {name: value for name, value in options.items() if value is not None}
        if model is not None:
            options["schema"] = schema_of(model)
        return self.submit_blocking(kind, resource, make_request(kind, operands, options), model=model)

    def submit_blocking(self, kind: str, resource: str, request: Any, *, model: Any = None) -> Any:
        """The operation's value for a request: text for `generate`, an option for `choose`, Docs for `search`.

        Batches with whatever else the lane holds. From any thread; blocks. `model` is the pydantic class of a `parse`.
        """
        try:
            lane = self.lane(LANE_OF[kind], resource)
            if lane.is_async:
                ask = _ask(lane, kind, request)
                if _has_running_loop():
                    answer = in_other_thread(lambda: asyncio.run(ask), lambda: None, f"{self.name}-call")
                else:
                    answer = asyncio.run(ask)
            else:
                waiter = _Waiter()
                item = LaneItem(waiter, None, 0, None, lane, request, lane.key(kind, request))
                lane.put([item])
                answer = waiter.wait(item)
            return read_answer(kind, request, answer, model)
        except BaseException as error:
            clean(error)
            raise

    # -- what drivers ask for
    def next_program(self) -> int:
        return next(self._numbers)

    def lane(self, kind: str, name: str) -> Lane:
        """The lane of a resource; finds its backend when first asked. ResourceError if there is none."""
        lane = self._lanes.get((kind, name))
        if lane is not None:
            return lane
        with self._lock:
            if self._is_closed:
                raise closed()
            lane = self._lanes.get((kind, name))
            if lane is None:
                backend = find_backend(self.resources, kind, name)
                lane = self._lanes[kind, name] = make_lane(kind, name, backend, self.name)
        return lane

    def known_lane(self, kind: str, name: str) -> Lane | None:
        """The lane of a resource that has been used before."""
        return self._lanes.get((kind, name))

    def forget(self, lane: str, name: str) -> None:
        """Closes a resource's lane: the next use finds its backend again. Calls in progress finish."""
        with self._lock:
            found = self._lanes.pop((lane, name), None)
        if found is not None:
            error = RunError(f"{lane} {name!r} was bound to another backend while the program ran")
            for item in found.close():
                item.driver.post([(item, False, error)])

    def private_loop(self) -> asyncio.AbstractEventLoop:
        """This thread's event loop for synchronous runs; kept, as clients of async tools are bound to it."""
        loop = self._thread_loop.loop
        if loop is None or loop.is_closed():
            loop = self._thread_loop.loop = asyncio.new_event_loop()
            with self._lock:
                self._loops.append(loop)
        return loop

    # -- the end
    def close(self, timeout_s: float = 5.0, *, grace_s: float = 0.0) -> None:
        """Takes no new programs, lets those that run finish for `grace_s` seconds, then ends what is left.

        A program that is ended has ClosedError, whatever it waited for. Backend calls in progress may finish within
        `timeout_s`. A loop's own thread uses `aclose`: here its programs could not go on.
        """
        self._drain()
        end = time.monotonic() + grace_s
        while self._is_busy() and time.monotonic() < end:
            time.sleep(POLL_S)
        self._close(timeout_s)

    async def aclose(self, timeout_s: float = 5.0, *, grace_s: float = 0.0) -> None:
        """`close` inside a running loop, whose programs go on meanwhile."""
        self._drain()
        loop = asyncio.get_running_loop()
        end = loop.time() + grace_s
        while self._is_busy() and loop.time() < end:  # noqa: ASYNC110 - programs end in any thread
            await asyncio.sleep(POLL_S)
        driver = self._drivers.get(loop)
        if driver is not None:
            driver.cancel_all(_was_closed())
            driver.end_turn()
        await asyncio.to_thread(self._close, timeout_s)

    def _drain(self) -> None:
        self._is_draining = True
        if self.gate is not None:
            self.gate.close()

    def _is_busy(self) -> bool:
        return any(driver.active for driver in [*self._running, *self._drivers.values()])

    def _close(self, timeout_s: float) -> None:
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            lanes = list(self._lanes.values())
        error = _was_closed()
        for driver in [*self._running, *self._drivers.values()]:
            driver.post(lambda d=driver: d.cancel_all(error))  # type: ignore[misc]
        for lane in lanes:
            for item in lane.close():
                item.driver.post([(item, False, error)])
        if self.pool is not None:
            self.pool.close()
        deadline = time.monotonic() + timeout_s
        for lane in lanes:
            lane.join(max(0.0, deadline - time.monotonic()))
        if self.pool is not None:
            self.pool.join(max(0.0, deadline - time.monotonic()))
        for loop in self._loops:
            if not loop.is_running():
                loop.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _was_closed() -> ClosedError:
    return ClosedError("the runtime was closed while the program ran")


def _tell(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """Makes a call in the loop's thread, if the loop is still there."""
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(call)


class _Feed:
    """The programs of one `map`: starts one when another ends, and the runtime's gate lets it in."""

    def __init__(
        self,
        driver: Driver,
        plan: Plan | Callable[[int], Plan],
        inputs: Iterable[Sequence[Any]],
        concurrency: int,
        timeout_s: float | None,
        on_done: Callable[[int, Outcome], None] | None,
        trace: Trace | None,
    ) -> None:
        if concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {concurrency}")
        self.driver = driver
        self.plan_of = (lambda _: plan) if isinstance(plan, Plan) else plan
        self.inputs = enumerate(inputs)
        self.concurrency = concurrency
        self.timeout_s = timeout_s
        self.on_done = on_done
        self.trace = trace
        self.outcomes: dict[int, Outcome] = {}
        self.context = copy_context()
        self.total = 0
        self.active: dict[int, Program] = {}
        self.is_over = self.is_stopped = False
        self.failure: BaseException | None = None
        self.gate = None if inside.get() else driver.runtime.gate
        self.tenant = tenant.get()
        self.on_place: Callable[[], None] = lambda: driver.post(self.admit)
        self.places: dict[int, Place] = {}  # of programs in flight
        self.place: Place | None = None  # of the next one: held, or waited for
        self.told = threading.Event()
        if self.gate is not None:
            self.context.run(inside.set, True)

    def admit(self) -> None:
        """Starts programs as long as there are inputs and fewer than `concurrency` in flight."""
        while len(self.active) < self.concurrency and not self.is_over:
            if not self._has_place():
                return
            try:
                index, args = next(self.inputs)
            except StopIteration:
                self.is_over = True
                self._give_back()
                return
            except BaseException as error:  # the caller's iterable: the programs in flight still finish
                self._fail(error)
                return
            self.total = index + 1
            if self.place is not None:
                self.places[index], self.place = self.place, None
            ended = functools.partial(self._ended, index)
            try:
                program = self.driver.start(
                    self.plan_of(index),
                    args,
                    timeout_s=self.timeout_s,
                    trace=self.trace,
                    on_done=ended,
                    context=self.context.copy(),
                )
            except TypeError as error:  # too few or too many arguments
                if (place := self.places.pop(index, None)) is not None and self.gate is not None:
                    self.gate.leave(place)
                self._tell(index, Outcome(None, error, 0.0))
                continue
            if not program.is_done:
                self.active[index] = program

    def _ended(self, index: int, program: Program) -> None:
        self.active.pop(index, None)
        place = self.places.pop(index, None)
        if place is not None and self.gate is not None:
            self.gate.leave(place)
        error = program.error
        if isinstance(error, Interrupted) or self.is_stopped:
            return
        if isinstance(error, KeyboardInterrupt):  # in the middle of a program's own Python: it means all of them
            self._fail(error)
            self.stop()
            self.driver.post(self.cancel)
            return
        if error is not None:
            clean(error)
        self._tell(index, Outcome(program.value, error, self.driver.now() - program.started_s))

    def _has_place(self) -> bool:
        """May one more program start? If not, `on_place` is called when it may."""
        if self.gate is None:
            return True
        if self.place is None:
            self.told.clear()
            self.place = self.gate.enter(self.tenant, self._placed, is_patient=True)
        elif not self.place.is_held and self.told.is_set():  # the gate was closed
            self._fail(closed())
        return self.place.is_held

    def _placed(self) -> None:
        self.told.set()
        self.on_place()

    def waits(self) -> bool:
        """Does it wait for the gate?"""
        return self.place is not None and not self.is_over

    def wait(self) -> None:
        self.told.wait()

    def _give_back(self) -> None:
        if self.place is not None and self.gate is not None:
            self.gate.leave(self.place)
            self.place = None

    def _tell(self, index: int, outcome: Outcome) -> None:
        self.outcomes[index] = outcome
        if self.on_done is not None:
            try:
                self.on_done(index, outcome)
            except BaseException as error:
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """The `map` itself fails, once what is in flight has ended."""
        self.is_over = True
        self._give_back()
        if self.failure is None:
            self.failure = error

    def cancel(self) -> None:
        for program in list(self.active.values()):
            self.driver.cancel(program, Interrupted())

    def stop(self) -> None:
        self.is_over = self.is_stopped = True
        self._give_back()

    def check(self) -> None:
        if self.failure is not None:
            raise self.failure

    def result(self) -> list[Outcome]:
        return [self.outcomes[i] for i in range(self.total)]


class _Sent:
    """What a stream has given out so far."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.is_all = False

    def next(self, kind: str, value: Any) -> str:
        """What to give out now: a piece of `text`, or what is left of the value at the `end`. Raises an `error`."""
        if kind == "error":
            raise value
        if kind == "text":
            self.pieces.append(value)
            return str(value)
        self.is_all = True
        text = value if isinstance(value, str) else str(value)
        sent = "".join(self.pieces)
        if not text.startswith(sent):
            raise RunError(
                "the backend's pieces of text are not the text that it returned",
                hint="`on_text` must see all of it, in order",
            )
        return text[len(sent) :]


class _Waiter:
    """Stands where a driver would for a single call: what it is posted, another thread waits for."""

    def __init__(self) -> None:
        self._answers: SimpleQueue[Answer] = SimpleQueue()

    def post(self, answers: list[Answer]) -> None:
        for answer in answers:
            self._answers.put(answer)

    def wait(self, item: LaneItem) -> Any:
        try:
            _, ok, value = self._answers.get()
        except BaseException:
            item.cancel()
            raise
        if not ok:
            raise value
        return value


async def _ask(lane: Lane, kind: str, request: Any) -> Any:
    method = "generate" if kind == "parse" else kind
    (answer,) = await getattr(lane.backend, method)([request])
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _has_running_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
