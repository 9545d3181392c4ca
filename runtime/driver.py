"""The driver: runs programs' instructions, and hands to lanes, tasks and threads what has to wait.

One driver belongs to one thread or one event loop and runs any number of programs. It holds no task, no lock and no
object per instruction: `advance` sweeps over a region's instructions in program order and runs each on the spot while
nothing is open. What has to wait is left open, what needs it is passed over and counted, and the sweep goes on. When
an open instruction completes, those whose count reaches zero run. Regions inside regions and calls are walked by the
same loop, without Python's stack, so depth costs memory only.

Of several instructions that fail in one region, the first in program order wins, once nothing before it is open: until
then a failure only stops what comes after it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import replace
from heapq import heapify, heappop, heappush
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from flowc.ir.errors import OperationTypeError, ProgramTimeoutError, RunError
from flowc.ir.ops import OPS
from flowc.ir.values import Docs

from .lanes import Answer, Lane, LoopLane, worker
from .plan import (
    ADVICE,
    AHEAD,
    CALL,
    CALL0,
    CALL1,
    CALL2,
    CALLN,
    COROUTINE,
    EACH,
    FOREACH,
    IF,
    INVOKE,
    LANE,
    SEARCH,
    SLOW_S,
    TASK,
    TOOL,
    TRY,
    WHILE,
    AdviceNode,
    ForeachNode,
    InvokeNode,
    LaneNode,
    Pace,
    Plan,
    Target,
    TaskNode,
    WhileNode,
)
from .program import (
    BODY,
    CALLEE,
    CONDITION,
    GENERATION,
    HANDLER,
    ITEM,
    ITEMS,
    NOTHING_OPEN,
    NOTHING_READY,
    PARALLEL_ITEM,
    PLAIN,
    ROOT,
    CallItem,
    Frame,
    Handle,
    LaneItem,
    Program,
    Waiter,
)
from .program import TRY as TRY_BODY
from .pycode import loop_limit, while_handling
from .reference import backoff_s, no_such_tool, node_timeout, recursion_limit
from .requests import LANE_OF, make_request, timeout_of, told_of
from .scheduling import tenant
from .stages import Announced, Follower, Searching, Splitter, Words, all_of, close_items
from .trace import Record, Trace, current
from .tracebacks import blame, chain, clean, locate

if TYPE_CHECKING:
    from .engine import Runtime
    from .scheduling import Turn

_END = object()
_AT_ONCE = frozenset({list, tuple, range, str, Docs, dict, set, frozenset})
"""Types whose items can be taken all at once: iterating over them runs nobody's code."""

_NOTED = frozenset({"tool", "invoke", *(name for name, spec in OPS.items() if spec.has_resource)})
_OWN_FRAME = frozenset({"py", "fused", "template"})  # their code stands at the user's line already

clock = time.perf_counter


class Interrupted(RunError):
    """The end of a program whose caller went away. The caller sees its own exception, not this one."""

    def __init__(self) -> None:
        super().__init__("the program was interrupted")


class Cancellable(Protocol):
    def cancel(self) -> None: ...


class _Timer:
    __slots__ = ("call", "due_s", "number")

    def __init__(self, due_s: float, number: int, call: Callable[[], None]) -> None:
        self.due_s = due_s
        self.number = number
        self.call: Callable[[], None] | None = call

    def __lt__(self, other: _Timer) -> bool:
        return (self.due_s, self.number) < (other.due_s, other.number)

    def cancel(self) -> None:
        self.call = None

    def fire(self) -> None:
        call, self.call = self.call, None
        if call is not None:
            call()


class Driver:
    """Runs programs in one thread. Until it is given a loop it needs none: it waits on a queue."""

    def __init__(self, runtime: Runtime, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.runtime = runtime
        self.loop = loop
        self.active: dict[int, Program] = {}
        self.hooks: list[Callable[[], None]] = []  # called after a turn in which a program ended
        self._outbox: dict[Lane, list[LaneItem]] = {}
        self._loop_lanes: dict[Lane, LoopLane] = {}
        self._unstarted: list[CallItem] = []  # coroutines that wait for a loop
        self._inbox: deque[list[Answer] | Callable[[], None]] = deque()
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._is_rung = False
        self._timers: list[_Timer] = []
        self._timer_count = 0
        self._has_flush = self._has_ended = False
        self._has_room = False  # may the task that runs now take on a coroutine?
        self._next: CallItem | None = None
        self._prefix_count = 0  # of prefixes computed ahead: part of their keys

    # -- programs
    def start(
        self,
        plan: Plan,
        args: Iterable[Any],
        *,
        timeout_s: float | None = None,
        trace: Trace | None = None,
        on_done: Callable[[Program], None] | None = None,
        on_text: Callable[[str], None] | None = None,
        context: Context | None = None,
    ) -> Program:
        """A new program, with all run that can run at once: in `context`, or in the caller's and then in a copy."""
        program = Program(self, plan, self.runtime.next_program(), trace)
        function = plan.entry
        slots = function.slots.copy()
        values = tuple(args)
        if len(values) != function.n_params:
            raise TypeError(f"workflow {plan.name} takes {function.n_params} value(s), not {len(values)}")
        slots[: len(values)] = values
        root = program.root = Frame(program, function.block, slots, None, 0, ROOT, None, 1, True)
        program.on_done = on_done
        program.on_text = on_text
        program.tenant = tenant.get() if context is None else context.get(tenant, "")
        program.started_s = self.now()
        if timeout_s is not None:
            program.timeout_s = timeout_s
            program.deadline_s = self.now() + timeout_s
            program.timer = self.call_later(timeout_s, lambda: self._program_timed_out(program))
        self.active[program.id] = program
        if trace is not None:
            trace.program_started(program)
        try:
            if context is not None:
                program.context = context
                context.run(self.advance, root)
            else:
                if self.loop is not None:
                    program.context = copy_context()
                self.advance(root)
        except BaseException:
            self.cancel(program, Interrupted())
            raise
        return program

    def cancel(self, program: Program, error: BaseException) -> None:
        """Ends a program now: everything open is cancelled and its value is of no interest any more.

        A coroutine that is cancelled runs its own `finally` blocks; those of the workflow are not begun.
        """
        if program.is_done:
            return
        if program.root is not None:
            _cancel(program.root)
        self._finish(program, None, error)

    def cancel_all(self, error: BaseException) -> None:
        for program in list(self.active.values()):
            self.cancel(program, error)

    def _finish(self, program: Program, value: Any, error: BaseException | None) -> None:
        locate(error)
        program.is_done = True
        program.value = value
        program.error = error
        program.root = None
        if program.timer is not None:
            program.timer.cancel()
            program.timer = None
        self.active.pop(program.id, None)
        self._has_ended = True
        if program.announced is not None:
            for announced in program.announced.values():
                announced.cancel()
        if self.runtime.table is not None:
            self.runtime.table.leave(program)
        if program.trace is not None:
            program.trace.program_ended(program, error)
        if program.on_done is not None:
            program.on_done(program)

    def _program_timed_out(self, program: Program) -> None:
        self.cancel(program, timed_out(program.plan, program.timeout_s))

    # -- time
    def now(self) -> float:
        return self.loop.time() if self.loop is not None else time.monotonic()

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Cancellable:
        if self.loop is not None:
            return self.loop.call_later(delay_s, self._on_timer, call)
        self._timer_count += 1
        timer = _Timer(time.monotonic() + delay_s, self._timer_count, call)
        heappush(self._timers, timer)
        return timer

    def _on_timer(self, call: Callable[[], None]) -> None:
        call()
        self.end_turn()

    # -- messages from other threads
    def post(self, message: list[Answer] | Callable[[], None]) -> None:
        """Gives answers, or a call to make, to the driver's thread. From any thread; one wake-up for many messages."""
        self._inbox.append(message)
        if not self._is_rung:
            self._is_rung = True
            self._ring()

    def _ring(self) -> None:
        loop = self.loop
        if loop is None:
            self._bell.put(None)
            return
        try:
            loop.call_soon_threadsafe(self._on_bell)
        except RuntimeError:  # the loop is closed: nobody waits for an answer any more
            self._inbox.clear()

    def _on_bell(self) -> None:
        self._read_inbox()
        self.end_turn()

    def _read_inbox(self) -> None:
        self._is_rung = False  # before reading: what comes from here on rings again
        inbox = self._inbox
        frames: list[Frame] = []
        while inbox:
            message = inbox.popleft()
            if callable(message):
                message()
            else:
                for item, ok, value in message:
                    frame = self.settle_handle(item, ok, value)
                    if frame is not None:
                        frames.append(frame)
        for frame in frames:
            self._run(frame)

    def deliver(self, answers: list[Answer]) -> None:
        """Answers from within the driver's own thread."""
        frames = [self.settle_handle(item, ok, value) for item, ok, value in answers]
        for frame in frames:
            if frame is not None:
                self._run(frame)
        self.end_turn()

    def _run(self, frame: Frame) -> None:
        if frame.dead:
            return
        context = frame.program.context
        if context is None:
            self.advance(frame)
        else:
            context.run(self.advance, frame)

    def end_turn(self) -> None:
        """After everything that could run has run: admit more programs, then send what has gathered for the lanes."""
        if self._has_ended:
            self._has_ended = False
            for hook in self.hooks:
                hook()
        if self._outbox and not self._has_flush:
            loop = self.loop
            if loop is None:
                self.flush()
            else:  # other programs of this loop may be about to run: let them add to the wavefront
                self._has_flush = True
                loop.call_soon(self.flush)

    def flush(self) -> None:
        self._has_flush = False
        outbox, self._outbox = self._outbox, {}
        for lane, items in outbox.items():
            alive = [item for item in items if not item.dead]
            if not alive:
                continue
            if lane.is_async:
                if self.loop is None:
                    self._outbox[lane] = alive
                    continue
                if lane not in self._loop_lanes:
                    self._loop_lanes[lane] = LoopLane(lane, self.loop, self.deliver)
                self._loop_lanes[lane].put(alive)
            else:
                try:
                    lane.put(alive)
                except RunError as e:
                    for item in alive:
                        self.post([(item, False, e)])

    def forget(self, item: LaneItem) -> None:
        """Takes a cancelled item out of wherever it waits."""
        if not item.lane.is_async:
            item.lane.forget(item)
        elif item.lane in self._loop_lanes:
            self._loop_lanes[item.lane].forget(item)

    # -- waiting without a loop
    def drive(self) -> None:
        """Runs until no program is active, in the caller's thread; starts an event loop when something needs one."""
        self.end_turn()
        while self.active:
            if self._unstarted or self._outbox:
                self._drive_in_loop()
                return
            wait_s = None
            while self._timers:
                timer = self._timers[0]
                if timer.call is None:
                    heappop(self._timers)
                    continue
                wait_s = timer.due_s - time.monotonic()
                if wait_s > 0:
                    break
                heappop(self._timers)
                timer.fire()
                wait_s = 0.0
            if not self._inbox:
                try:
                    if wait_s is None:
                        self._bell.get()
                    elif wait_s > 0:
                        self._bell.get(timeout=wait_s)
                except Empty:
                    pass
            self._read_inbox()
            self.end_turn()

    def _drive_in_loop(self) -> None:
        loop = self.runtime.private_loop()
        try:
            loop.run_until_complete(self._adopt(loop))
        finally:
            self.cancel_all(Interrupted())
            self.loop = None
            left = asyncio.all_tasks(loop)
            for task in left:
                task.cancel()
            if left:
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))

    async def _adopt(self, loop: asyncio.AbstractEventLoop) -> None:
        """Goes on inside a loop: what waited for one starts, timers move over, and bells ring there."""
        done = loop.create_future()

        def look() -> None:
            if not self.active and not done.done():
                done.set_result(None)

        self.hooks.append(look)
        self.loop = loop
        for program in self.active.values():
            if program.context is None:
                program.context = copy_context()
        timers, self._timers = self._timers, []
        now = time.monotonic()
        for timer in timers:
            if timer.call is not None:
                loop.call_later(max(0.0, timer.due_s - now), self._on_timer, timer.fire)
        for program in self.active.values():
            if program.deadline_s is not None:
                program.deadline_s += loop.time() - now
        unstarted, self._unstarted = self._unstarted, []
        for item in unstarted:
            if not item.dead:
                self._start_task(item)
        self._on_bell()
        await done

    # -- the inner loop
    def advance(self, at: Frame | None) -> None:
        """Runs a frame and whatever that leads to, until nothing more can run now."""
        frame = at
        if frame is not None and frame.program.trace is not None:
            current.program = frame.program
        while frame is not None:
            program = frame.program
            if program.is_done:
                return
            if program.deadline_s is not None and self.now() > program.deadline_s:
                self._program_timed_out(program)
                return
            if frame.ret == ITEMS:
                frame = self._advance_items(frame)
                continue
            block = frame.block
            opened = frame.open
            if opened and block.ordered:
                frame = self._suspend(frame)
                continue
            ready = frame.ready
            if ready:
                i = heappop(ready)
                stop = i + 1
                sweeping = False
            else:
                i = frame.pc
                stop = block.n
                sweeping = True
            code = frame.code
            slots = frame.slots
            waits = frame.waits
            at = frame
            try:
                while i < stop:
                    if waits is not None and waits[i]:
                        opened[i] = None
                        for s in block.successors[i]:
                            waits[s] += 1
                        i += 1
                        continue
                    kind, fn, a, b, out = code[i]
                    i += 1
                    if kind == CALL1:
                        slots[out] = fn(slots[a])
                        continue
                    if kind == TOOL:
                        if not b.is_slow or self._has_no_threads():
                            start = clock()
                            slots[out] = fn(*a(slots))
                            spent = clock() - start
                            if spent > SLOW_S:
                                b.note(spent)
                                if sweeping and program.deadline_s is not None:  # look whether it has passed
                                    frame.pc = i
                                    break
                            continue
                        target = Target("", fn, False, b)
                        handle: Any = CallItem(self, frame, i - 1, out, target, a(slots), {})
                        if program.trace is not None:
                            program.trace.queued(handle, block.ops[i - 1], handle.where)
                        self._call_in_thread(handle)
                    elif kind == CALL2:
                        slots[out] = fn(slots[a], slots[b])
                        continue
                    elif kind == CALLN:
                        slots[out] = fn(*a(slots))
                        continue
                    elif kind == CALL0:
                        slots[out] = fn()
                        continue
                    elif kind <= CALL:  # control flow: walk into a region
                        if kind == IF:
                            inner = fn.then if slots[a] else fn.orelse
                            if not inner.n:
                                slots[out] = inner.give(slots)
                                continue
                            tail = frame.tail and i - 1 in block.tails
                            child = Frame(program, inner, slots, frame, i - 1, PLAIN, fn, frame.depth, tail)
                        elif kind == WHILE:
                            child = Frame(program, fn.cond, slots, frame, i - 1, CONDITION, fn, frame.depth, False)
                            child.state = 0
                            slots[fn.carried] = fn.inits(slots)
                        elif kind == FOREACH:
                            items = slots[a]
                            if fn.is_parallel:
                                at_once = fn.is_gathered or type(items) in _AT_ONCE
                                child = Frame(program, fn.body, slots, frame, i - 1, ITEMS, fn, frame.depth, False)
                                items = list(items) if at_once else iter(items)
                                child.state = [items, [], at_once]
                                child.pc = 0
                            else:
                                iterator = iter(items)
                                item = next(iterator, _END)
                                lists: list[list[Any]] = [[] for _ in fn.lists]
                                if item is _END:
                                    slots[out] = [*fn.inits(slots), *lists]
                                    continue
                                slots[fn.carried] = fn.inits(slots)
                                slots[fn.item] = item
                                child = Frame(program, fn.body, slots, frame, i - 1, ITEM, fn, frame.depth, False)
                                child.state = (iterator, lists)
                        elif kind == TRY:
                            child = Frame(program, fn.body, slots, frame, i - 1, TRY_BODY, fn, frame.depth, False)
                        elif kind == EACH:
                            child = self._each(frame, i - 1, fn)
                        else:
                            depth = frame.depth + 1
                            if depth > recursion_limit():
                                raise RecursionError("maximum recursion depth exceeded")
                            callee = fn.function
                            own = callee.slots.copy()
                            given = fn.args(slots)
                            own[: len(given)] = given
                            tail = frame.tail and fn.is_tail
                            child = Frame(program, callee.block, own, frame, i - 1, CALLEE, fn, depth, tail)
                        if sweeping:
                            frame.pc = i
                        frame = child
                        break
                    else:
                        handle = self._begin(kind, frame, i - 1, fn)
                        if handle is None:
                            continue
                    # the instruction has to wait
                    if opened is NOTHING_OPEN:
                        opened = frame.open = {}
                    opened[i - 1] = handle
                    if sweeping:
                        if block.ordered:
                            frame.pc = i
                            break
                        if waits is None:
                            waits = frame.waits = [0] * block.n
                        for s in block.successors[i - 1]:
                            waits[s] += 1
                else:
                    if sweeping:
                        frame.pc = stop
                        if not opened:
                            frame = self._complete(frame)
                            continue
                    elif opened[i - 1] is None:  # it had waited for others and has now run
                        _settle(frame, i - 1)
                    if frame.ready or frame.pc < block.n:
                        continue
                    frame = self._suspend(frame) if frame.open else self._complete(frame)
            except BaseException as error:
                frame = self._op_failed(at, i - 1, error)

    def _advance_items(self, frame: Frame) -> Frame | None:
        """Advances the frame that stands for all items of a `foreach`: each of its instructions is one item's body."""
        node: ForeachNode = frame.node
        items, results, at_once = frame.state
        if frame.error is None and (at_once or not frame.open):
            index = frame.pc
            if at_once:
                item = items[index] if index < len(items) else _END
            else:
                try:
                    item = next(items, _END)
                except BaseException as error:
                    assert frame.parent is not None
                    frame.dead = True
                    return self._op_failed(frame.parent, frame.index, error)
            if item is not _END:
                frame.pc += 1
                results.append(None)
                body = node.body
                assert body.slots is not None
                slots = body.slots.copy()
                outer = frame.slots
                for source, own in body.captures:
                    slots[own] = outer[source]
                slots[node.item] = item
                if body.n:
                    return Frame(frame.program, body, slots, frame, index, PARALLEL_ITEM, node, frame.depth, False)
                results[index] = slots
                return frame
        if frame.open:
            return self._suspend(frame)
        if frame.error is not None:
            return self._fail(frame, frame.error_at, frame.error)
        parent = frame.parent
        assert parent is not None
        lists: list[list[Any]] = [[] for _ in node.lists]
        try:
            for own in results:
                for collected, slot in zip(lists, node.lists, strict=True):
                    collected.extend(own[slot])
        except BaseException as e:
            frame.dead = True
            return self._op_failed(parent, frame.index, e)
        if node.generation is not None:
            lists = [parent.slots[node.generation.out], items, *lists]
        parent.slots[node.out] = lists
        return _return_to(parent, frame)

    def _suspend(self, frame: Frame) -> Frame | None:
        """Leaves a frame that waits; gives the parent, which goes on with what does not need it."""
        if frame.told:
            return None
        frame.told = True
        parent = frame.parent
        if parent is None:
            return None
        index = frame.index
        opened = parent.open
        if opened is NOTHING_OPEN:
            opened = parent.open = {}
        known = index in opened
        opened[index] = frame
        if not known and not parent.block.ordered and parent.ret != ITEMS:
            waits = parent.waits
            if waits is None:
                waits = parent.waits = [0] * parent.block.n
            for s in parent.block.successors[index]:
                waits[s] += 1
        return parent

    def _complete(self, frame: Frame) -> Frame | None:
        """Nothing of a region is open any more: what comes next."""
        if frame.error is not None:
            return self._fail(frame, frame.error_at, frame.error)
        if frame.held is not None:
            frame.drop()
        ret = frame.ret
        slots = frame.slots
        parent = frame.parent
        if parent is None:
            frame.dead = True
            self._finish(frame.program, frame.block.give(slots)[0], None)
            return None
        node = frame.node
        try:
            if ret == CONDITION:
                if not slots[node.condition]:
                    slots[node.out] = slots[node.carried]
                    return _return_to(parent, frame)
                if frame.state >= node.limit:
                    op = parent.block.ops[frame.index]
                    raise loop_limit(node.limit, op.loc, parent.block.workflow)
                frame.state += 1
                slots[node.body_in] = slots[node.carried]
                return self._again(frame, node.body, BODY)
            if ret == BODY:
                going_on = slots[node.go_on]
                slots[node.carried] = node.following(slots)
                if not going_on:
                    slots[node.out] = slots[node.carried]
                    return _return_to(parent, frame)
                return self._again(frame, node.cond, CONDITION)
            if ret == ITEM:
                iterator, lists = frame.state
                for collected, slot in zip(lists, node.lists):  # noqa: B905 - the plan made them equal
                    collected.extend(slots[slot])
                going_on = node.go_on is None or slots[node.go_on]
                slots[node.carried] = node.following(slots)
                if going_on:
                    item = next(iterator, _END)
                    if item is not _END:
                        slots[node.item] = item
                        return self._again(frame, node.body, ITEM)
                slots[node.out] = [*slots[node.carried], *lists]
                return _return_to(parent, frame)
            if ret == PARALLEL_ITEM:
                parent.state[1][frame.index] = slots
                return _return_to(parent, frame)
            if ret == CALLEE:
                parent.slots[node.out] = frame.block.give(slots)[0]
                return _return_to(parent, frame)
            parent.slots[node.out] = frame.block.give(slots)
            return _return_to(parent, frame)
        except BaseException as error:
            frame.dead = True
            return self._op_failed(parent, frame.index, error)

    def _again(self, frame: Frame, block: Any, ret: int) -> Frame:
        """The same frame for a loop's next region."""
        if frame.block is not block:
            frame.block = block
            frame.code = Frame.code_of(frame.program, block)
        frame.ret = ret
        frame.pc = 0
        if frame.open is not NOTHING_OPEN:
            frame.open = NOTHING_OPEN
            frame.waits = None
            frame.ready = NOTHING_READY
        return frame

    # -- failures
    def _op_failed(self, frame: Frame, index: int, error: BaseException) -> Frame | None:
        """An instruction raised: puts its line into the traceback and looks what that means."""
        block = frame.block
        if index == GENERATION:
            assert frame.parent is not None
            op = frame.parent.block.ops[frame.index]
        else:
            op = block.ops[index]
        if op.name in _OWN_FRAME:
            clean(error)
        else:
            blame(error, told_of(op) if op.name in _NOTED else None, op.loc, block.frame_of(op), block.workflow)
        return self._fail(frame, index, error)

    def _fail(self, frame: Frame, index: int, error: BaseException) -> Frame | None:
        while True:
            opened = frame.open
            if opened:
                opened.pop(index, None)
            frame.error, frame.error_at = error, index  # what comes after an error never runs, so this is the earliest
            frame.pc = max(frame.block.n, frame.pc) if frame.ret != ITEMS else frame.pc
            at = frame.error_at
            if opened:
                for later in [j for j in opened if j > at]:
                    handle = opened.pop(later)
                    if handle is not None:
                        _cancel(handle)
                if frame.ready:
                    frame.ready = [j for j in frame.ready if j < at]
                    heapify(frame.ready)
                if opened:
                    return frame  # something before it is open and may still fail itself
            error = frame.error
            frame.dead = True
            if frame.held is not None:
                frame.drop()
            parent = frame.parent
            if parent is None:
                self._finish(frame.program, None, error)
                return None
            ret = frame.ret
            if ret == TRY_BODY:
                node = frame.node
                try:
                    chosen = node.match(error, *node.operands(frame.slots))
                except BaseException as e:
                    clean(e)
                    error, chosen = e, -1
                if chosen >= 0:
                    slots = frame.slots
                    slots[node.errors[chosen]] = error
                    handler = Frame(
                        frame.program,
                        node.handlers[chosen],
                        slots,
                        parent,
                        frame.index,
                        HANDLER,
                        node,
                        frame.depth,
                        False,
                    )
                    handler.state = error
                    handler.told = frame.told
                    if frame.told:
                        parent.open[frame.index] = handler
                    return handler
            elif ret == HANDLER:
                if error is not frame.state:
                    chain(error, frame.state)
            elif ret == CALLEE:
                op = parent.block.ops[frame.index]
                blame(error, None, op.loc, parent.block.frame_of(op), parent.block.workflow)
            index = frame.index
            frame = parent

    # -- what waits
    def _begin(self, kind: int, frame: Frame, index: int, node: Any) -> Handle | None:
        """Starts an instruction that may wait; None if it is done already."""
        if kind == LANE:
            return self._enqueue(frame, index, node)
        if kind == SEARCH:
            return self._search_stage(frame, index, node)
        if kind == AHEAD:
            self._begin_ahead(frame, index, node)
            return None
        if kind == ADVICE:
            self._advise(frame, index, node)
            return None
        slots = frame.slots
        kwargs: dict[str, Any] = {}
        target: Target
        if kind == INVOKE:
            target, kwargs = _invoked(node, slots)
            args: Any = ()
            if node.handling is not None and not target.is_async:
                fn = while_handling(target.fn)
                args = (slots[node.handling],)
                target = Target(target.name, fn, False, target.pace, target.thread, target.timeout_s, target.retries)
        else:
            target, args = node.target, node.args(slots)
        item = CallItem(self, frame, index, node.out, target, args, kwargs)
        trace = frame.program.trace
        if trace is not None:
            trace.queued(item, frame.block.ops[index], item.where)
        if target.is_async:
            item.task = target.fn(*args, **kwargs)
            self._watch(item, target.timeout_s)
            self._start_task(item)
            return item
        in_thread = target.thread is True or target.timeout_s is not None or target.pace.is_slow
        if target.thread is False or not in_thread or self._has_no_threads():
            if self._call_here(item):
                if trace is not None:
                    item.note_end("finished")
                return None
            return item
        self._watch(item, target.timeout_s)
        self._call_in_thread(item)
        return item

    def _has_no_threads(self) -> bool:
        """Must tools run on the spot? In a pool's own thread, which could wait for itself, and where there is none."""
        return worker.is_pool or self.runtime.pool is None

    def _call_here(self, item: CallItem) -> bool:
        """Calls in this thread. False if it failed and will be tried again."""
        target = item.target
        start = clock()
        try:
            value = target.fn(*item.args, **item.kwargs)
        except Exception:
            if item.attempt >= target.retries:
                raise
            self._retry(item)
            return False
        spent = clock() - start
        if spent > SLOW_S:
            target.pace.note(spent)
        item.frame.slots[item.out] = value
        return True

    def _watch(self, handle: Handle, timeout_s: float | None, left_s: float | None = None) -> None:
        if timeout_s is not None:
            delay_s = timeout_s if left_s is None else left_s
            handle.timer = self.call_later(delay_s, lambda: self._node_timed_out(handle, timeout_s))

    def _node_timed_out(self, handle: Handle, timeout_s: float) -> None:
        if handle.dead:
            return
        handle.timer = None
        op = handle.op
        error = node_timeout(told_of(op), timeout_s, op)
        if isinstance(handle, LaneItem) and handle.searching is not None:
            after = self.settle_handle(handle, False, error)
            self.forget(handle)
        else:
            handle.cancel()
            after = self._op_failed(handle.frame, handle.index, error)
        if after is not None:
            self._run(after)

    def _enqueue(self, frame: Frame, index: int, node: LaneNode) -> LaneItem | None:
        """Asks a lane for an operation; None if what was begun ahead has answered it."""
        slots = frame.slots
        options: Mapping[str, Any] = node.options
        if node.dynamic:
            options = {**options, **{name: slots[slot] for name, slot in node.dynamic}}
        kind = node.kind
        timeout = options.get("timeout")
        item: LaneItem | None = None
        if node.ahead is not None:
            asked = make_request(kind, node.operands(slots), {**options, "timeout": None})
            item = _fitting(slots[node.ahead], node, asked)
        if item is not None:
            if self._take(item, frame, index, node):
                return None
        else:
            ticket = self._ticket(frame, index)
            request = make_request(kind, node.operands(slots), options, ticket)
            lane = self.runtime.lane(LANE_OF[kind], node.resource)
            item = LaneItem(self, frame, index, node, lane, request, lane.key(kind, request), ticket)
            item.on_text = self._listener(frame, index, node)
            self._put(item)
        if node.kv is not None:
            item.kv = slots[node.kv]
        if timeout is not None:
            self._watch(item, timeout_of(timeout))
        return item

    def _ticket(self, frame: Frame, index: int) -> Turn | None:
        table = self.runtime.table
        if table is None:
            return None
        if index == GENERATION:
            assert frame.parent is not None
            frame, index = frame.parent, frame.index
        return table.turn(frame.program, frame, index, self.now())

    def _put(self, item: LaneItem) -> None:
        """Into its lane, with all else that this turn comes to."""
        lane = item.lane
        trace = item.frame.program.trace
        if trace is not None:
            trace.queued(item, item.op, lane.label)
        waiting = self._outbox.get(lane)
        if waiting is None:
            self._outbox[lane] = [item]
        else:
            waiting.append(item)

    def _listener(self, frame: Frame, index: int, node: LaneNode) -> Callable[[str], None] | None:
        """Who hears what a generation writes, as it is written."""
        program = frame.program
        listeners: list[Callable[[str], None]] = []
        if node.is_tail and frame.tail and program.on_text is not None:
            listeners.append(program.on_text)
        if node.lookahead and program.announced is not None:
            told = [program.announced.get(("search", resource, site)) for resource, site in node.lookahead]
            follow = [(one.follow, one.key) for one in told if one is not None and one.follow is not None]
            if follow:
                listeners.append(Follower(follow))
        if index == GENERATION:
            listeners.append(self._splitting(frame))
        return all_of(listeners)

    # -- a generation that is split while it is written
    def _each(self, frame: Frame, index: int, node: ForeachNode) -> Frame:
        """The frame for all items of an `llm.each`, with the generation open in it as what comes before them."""
        child = Frame(frame.program, node.body, frame.slots, frame, index, ITEMS, node, frame.depth, frame.tail)
        child.state = [[], [], True]
        assert node.generation is not None
        child.open = {GENERATION: self._enqueue(child, GENERATION, node.generation)}
        return child

    def _splitting(self, frame: Frame) -> Callable[[str], None]:
        splitter = Splitter(frame.node.split)

        def on_text(piece: str) -> None:  # in a lane's thread
            items = splitter.feed(piece)
            if items and not frame.dead:
                self.post(lambda: self._go_on_with(frame, items))

        return on_text

    def _go_on_with(self, frame: Frame, items: Sequence[str]) -> None:
        if not frame.dead:
            frame.state[0].extend(items)
            self._run(frame)

    # -- what is begun ahead
    def _begin_ahead(self, frame: Frame, index: int, node: LaneNode) -> None:
        """Begins an operation that may turn out not to be needed, if its lane has room. Nobody waits for it yet."""
        slots = frame.slots
        slots[node.out] = None
        options: Mapping[str, Any] = node.options
        if node.dynamic:
            options = {**options, **{name: slots[slot] for name, slot in node.dynamic if name != "timeout"}}
        kind = node.kind
        try:
            request = make_request(kind, node.operands(slots), options)
            lane = self.runtime.lane(LANE_OF[kind], node.resource)
            key = lane.key(kind, request)
        except Exception:
            return  # who needs it in earnest will be told
        if self._is_busy(lane):
            return
        item = slots[node.out] = self._ahead(frame, index, node, lane, request, key)
        if kind == "generate" and frame.program.on_text is not None:
            item.on_text = item.words = Words()
        self._put(item)

    def _is_busy(self, lane: Lane) -> bool:
        """Would work that is perhaps not needed get into the way of other work? HedraRAG's T_curr / T_max >= tau."""
        at = self._loop_lanes.get(lane)
        waiting = len(self._outbox.get(lane, ())) + (lane.load() if at is None else at.load())
        return waiting >= self.runtime.ahead_share * (lane.max_calls if lane.max_calls > 1 else lane.max_batch)

    def _ahead(
        self, frame: Frame, index: int, node: LaneNode, lane: Lane, request: Any, key: tuple[Any, ...]
    ) -> LaneItem:
        """An item that belongs to no instruction yet: it ends with the region unless one takes it."""
        item = LaneItem(self, frame, index, node, lane, request, key, self._ticket(frame, index))
        item.is_ahead = True
        frame.hold(item)
        return item

    def _take(self, item: LaneItem, frame: Frame, index: int, node: LaneNode) -> bool:
        """Makes what was begun ahead the instruction's own request. True if it has been answered already."""
        assert item.frame.held is not None
        item.frame.held.remove(item)
        trace, record = frame.program.trace, item.record
        if record is not None:  # what began it ends here, and has won the time since
            item.record = Record(record.number, record.queued_s)
            item.note_end("finished")
        item.frame, item.index, item.node, item.out, item.is_ahead = frame, index, node, node.out, False
        if item.ticket is not None:
            item.ticket.block, item.ticket.index = frame.block, index
        if trace is not None:
            trace.queued(item, item.op, item.lane.label)
        if item.words is not None:
            listener = self._listener(frame, index, node)
            if listener is not None:
                item.words.pass_to(listener)
        if item.answer is None:
            return False
        if item.record is not None and record is not None and record.ended_s is not None:
            assert record.started_s is not None
            item.record.ended_s = self.now()
            item.record.started_s = item.record.ended_s - (record.ended_s - record.started_s)
        item.dead = True
        frame.slots[item.out] = item.read(item.answer[1])
        item.note_end("finished")
        return True

    # -- searches in pieces
    def _search_stage(self, frame: Frame, index: int, node: LaneNode) -> Handle | None:
        slots = frame.slots
        trace = frame.program.trace
        start_s = self.now() if trace is not None else 0.0
        if node.stage == "begin":
            options = {**node.options, **{name: slots[slot] for name, slot in node.dynamic}}
            request = make_request("search", node.operands(slots), options)
            timeout_s = timeout_of(options.get("timeout"))
            searching = slots[node.out] = Searching(request, self.now(), timeout_s)
            try:
                searching.lane = self.runtime.lane("search", node.resource)
            except Exception as error:
                searching.error = error
        else:
            (searching,) = node.operands(slots)
            is_over = searching.docs is not None or searching.error is not None
            match node.stage:
                case "scan" if is_over:
                    slots[node.out] = searching
                case "partial" if is_over:
                    slots[node.out] = Docs() if searching.docs is None else searching.docs
                case "partial":
                    return self._partial(frame, index, node, searching)
                case "finish" if is_over:
                    if searching.error is not None:
                        raise searching.error
                    slots[node.out] = searching.docs
                case _:
                    return self._scan(frame, index, node, searching)
        if trace is not None:
            trace.ran(frame.program, node.label, frame.block.ops[index].loc, start_s, True)
        return None

    def _scan(self, frame: Frame, index: int, node: LaneNode, searching: Searching) -> LaneItem:
        item = searching.item
        if item is not None and item.is_ahead and item.answer is None and not item.dead:
            self._take(item, frame, index, node)
        else:
            item = self._asked(frame, index, node, searching)
            self._put(item)
        timeout_s = searching.timeout_s
        if timeout_s is not None:
            self._watch(item, timeout_s, max(0.0, searching.begun_s + timeout_s - self.now()))
        return item

    def _partial(self, frame: Frame, index: int, node: LaneNode, searching: Searching) -> Waiter:
        if searching.item is None or searching.item.dead or searching.item.answer is not None:
            item = self._asked(frame, index, node, searching)
            item.is_ahead = True  # until the scan takes it
            frame.hold(item)
            self._outbox.setdefault(item.lane, []).append(item)
        waiter = Waiter(self, frame, index, node.out, searching.lane.label)
        searching.partials.append((waiter, node.confidence))
        trace = frame.program.trace
        if trace is not None:
            trace.queued(waiter, waiter.op, waiter.where)
        return waiter

    def _asked(self, frame: Frame, index: int, node: LaneNode, searching: Searching) -> LaneItem:
        """The item in the lane that runs a search in pieces."""
        ticket = self._ticket(frame, index)
        request = searching.request if ticket is None else replace(searching.request, ticket=ticket)
        lane = searching.lane
        item = LaneItem(self, frame, index, node, lane, request, lane.key("search", request), ticket)
        item.searching, searching.item = searching, item
        return item

    # -- advice
    def _advise(self, frame: Frame, index: int, node: AdviceNode) -> None:
        """Tells a backend that is in use already and takes advice what is to come. Never fails."""
        program, slots = frame.program, frame.slots
        if node.out is not None:
            slots[node.out] = None
        lane = self.runtime.known_lane(node.lane, node.resource)
        if lane is None:
            return
        start_s = self.now() if program.trace is not None else 0.0
        try:
            self._tell(frame, node, lane.backend, node.operands(slots))
        except Exception:
            pass
        if program.trace is not None:
            program.trace.ran(program, node.label, frame.block.ops[index].loc, start_s, True)

    def _tell(self, frame: Frame, node: AdviceNode, backend: Any, operands: Sequence[Any]) -> None:
        program = frame.program
        site = (node.lane, node.resource, node.site)
        announced = program.announced
        if node.what == "kv.release":
            told = announced.pop(site, None) if announced is not None else None
            if told is not None:
                told.cancel()
            return
        if not hasattr(backend, "release") or not all(isinstance(v, str) for v in operands[-1:]):
            return
        if announced is None:
            announced = program.announced = {}
        key: Hashable = (program.id, node.site)
        match node.what:
            case "kv.hint":
                announced[site] = Announced(key, backend.release)
                backend.hint(key, node.prefix + _joined(operands), node.value)
            case "kv.pin":
                backend.pin(_joined(operands), node.value)
            case "cluster.prefetch":
                announced[site] = Announced(key, backend.release, backend.follow)
                backend.predict(key, operands[0], node.value)
            case "llm.prefill" | "llm.extend":
                before = operands[0] if node.what == "llm.extend" else None
                if before is None:
                    self._prefix_count += 1
                    before = Announced((program.id, "kv", self._prefix_count), backend.release)
                    frame.hold(before)
                frame.slots[node.out] = before
                backend.prefill(before.key, operands[-1])

    def _start_task(self, item: CallItem) -> None:
        """Lets a task of the loop, if there is one yet, await the item's coroutine: the task at hand if it has room."""
        if self.loop is None:
            self._unstarted.append(item)
        elif self._has_room:
            self._has_room = False
            self._next = item
        else:
            self.loop.create_task(self._work(item), context=item.frame.program.context)

    @contextmanager
    def room(self) -> Iterator[None]:
        """While it is open, this task takes on the first coroutine that turns up; `next_item` gives it."""
        self._has_room, self._next = True, None
        try:
            yield
        finally:
            self._has_room = False

    def next_item(self) -> CallItem | None:
        item, self._next = self._next, None
        return item

    async def _work(self, item: CallItem) -> None:
        await self.work(item, is_callers=False)

    async def work(self, first: CallItem, *, is_callers: bool) -> None:
        """Awaits an item's coroutine, goes on with its program, and awaits what that comes to next: a chain of
        awaits costs one task, and within it `asyncio.current_task()` stays the same, as in a plain coroutine.

        The task may be that of the program's caller: then CancelledError if somebody cancelled it (a cancelled item is
        another matter). In a task of the driver's own that is the coroutine's error.
        """
        me = asyncio.current_task()
        assert me is not None
        item: CallItem | None = first
        cancelled_before = me.cancelling()
        while item is not None and not item.dead:
            coroutine, item.task = item.task, me
            if item.record is not None:
                item.record.started_s = self.now()
            try:
                ok, value = True, await coroutine
            except GeneratorExit:
                raise
            except BaseException as error:
                ok, value = False, error
            del coroutine
            if item.dead:  # cancelled by its program: that is over, whatever the coroutine made of it
                me.uncancel()
            if is_callers and me.cancelling() > cancelled_before and isinstance(value, asyncio.CancelledError):
                item.task = None  # it is being cancelled already
                raise value
            if item.dead:
                return
            item.task = None
            frame = self.settle_handle(item, ok, value)
            del value
            item = None
            if frame is not None and not frame.dead:
                self._has_room, self._next = True, None
                try:
                    self.advance(frame)
                finally:
                    self._has_room = False
                item, self._next = self._next, None
            self.end_turn()

    def _call_in_thread(self, item: CallItem) -> None:
        target = item.target
        program_context = item.frame.program.context
        context = copy_context() if program_context is None else program_context.copy()

        def job() -> None:
            if item.dead:
                return
            start = clock()
            if item.record is not None:
                item.record.started_s = item.driver.now()
            try:
                answer: Answer = (item, True, context.run(target.fn, *item.args, **item.kwargs))  # type: ignore[assignment]
            except BaseException as e:
                answer = (item, False, e)  # type: ignore[assignment]
            if item.record is not None:
                item.record.ended_s = item.driver.now()
            target.pace.note(clock() - start)
            item.driver.post([answer])

        pool = self.runtime.pool
        assert pool is not None
        pool.submit(job)

    def _retry(self, item: CallItem) -> None:
        delay_s = backoff_s(item.attempt)
        item.attempt += 1
        self.call_later(delay_s, lambda: self._try_again(item))

    def _try_again(self, item: CallItem) -> None:
        if item.dead:
            return
        target = item.target
        error: BaseException | None = None
        value: Any = None
        try:
            if target.is_async:
                item.task = target.fn(*item.args, **item.kwargs)
                self._start_task(item)
                return
            in_thread = target.thread is True or target.timeout_s is not None or target.pace.is_slow
            if in_thread and not self._has_no_threads():
                self._call_in_thread(item)
                return
            if not self._call_here(item):
                return
            value = item.frame.slots[item.out]
        except BaseException as e:
            error = e
        frame = self.settle_handle(item, error is None, value if error is None else error)
        if frame is not None:
            self._run(frame)

    def settle_handle(self, handle: Handle, ok: bool, value: Any) -> Frame | None:
        """Takes the answer to something open; gives the frame that may go on."""
        if handle.dead:
            return None
        frame = handle.frame
        if type(handle) is LaneItem:
            if handle.ticket is not None:
                handle.ticket.end(self.now())
            if handle.is_ahead:
                _keep(handle, ok, value)
                return None
            if ok:
                try:
                    value = handle.read(value)
                    if handle.index == GENERATION:
                        close_items(frame.state[0], value, frame.node.split)
                except BaseException as e:
                    ok, value = False, e
            ok, value = _after(handle, ok, value)
        elif (
            not ok
            and isinstance(handle, CallItem)
            and handle.attempt < handle.target.retries
            and isinstance(value, Exception)
        ):
            self._retry(handle)
            return None
        handle.dead = True
        if handle.timer is not None:
            handle.timer.cancel()
            handle.timer = None
        if handle.record is not None:
            handle.note_end("finished" if ok else "failed")
        if not ok:
            return self._op_failed(frame, handle.index, value)
        frame.slots[handle.out] = value
        _settle(frame, handle.index)
        return frame


def timed_out(plan: Plan, seconds: float | None) -> ProgramTimeoutError:
    message = f"workflow {plan.name} took longer than its timeout of {seconds:g} s"
    return ProgramTimeoutError(message, loc=plan.graph.loc)


def _settle(frame: Frame, index: int) -> None:
    """An open instruction is done: what waited for it alone is ready."""
    del frame.open[index]
    block = frame.block
    if block.ordered or frame.ret == ITEMS:
        return
    waits = frame.waits
    assert waits is not None
    swept = frame.pc
    for s in block.successors[index]:
        waits[s] -= 1
        if not waits[s] and s < swept and (frame.error is None or s < frame.error_at):
            if frame.ready is NOTHING_READY:
                frame.ready = []
            heappush(frame.ready, s)


def _return_to(parent: Frame, child: Frame) -> Frame:
    """The child's instruction in its parent is done."""
    child.dead = True
    if child.index in parent.open:
        _settle(parent, child.index)
    return parent


def _cancel(handle: Any) -> None:
    """Cancels what an instruction waits for, however deep."""
    stack = [handle]
    while stack:
        one = stack.pop()
        if isinstance(one, Frame):
            one.dead = True
            if one.held is not None:
                one.drop()
            stack.extend(h for h in reversed(one.open.values()) if h is not None)  # in program order
        else:
            one.cancel()


def _fitting(begun: Any, node: LaneNode, asked: Any) -> LaneItem | None:
    """What was begun ahead, if just this was asked and it has not failed; otherwise that is cancelled."""
    if not isinstance(begun, LaneItem) or not begun.is_ahead or begun.dead:
        return None
    theirs = begun.node
    assert theirs is not None
    has_failed = begun.answer is not None and not begun.answer[0]
    if has_failed or theirs.resource != node.resource or theirs.kind != node.kind or begun.request != asked:
        begun.cancel()
        return None
    return begun


def _keep(item: LaneItem, ok: bool, answer: Any) -> None:
    """The answer to what was begun ahead is there before anybody needs it."""
    item.answer = (ok, answer)
    if item.searching is not None:
        try:
            item.searching.answer(item.read(answer) if ok else None)
        except Exception:
            item.searching.answer(None)


def _after(item: LaneItem, ok: bool, value: Any) -> tuple[bool, Any]:
    """What else the end of an item means, and what its instruction comes to: a scan never fails, the finish does."""
    if item.kv is not None:
        item.kv.cancel()
    node, program = item.node, item.frame.program
    if node is not None and node.site is not None and program.announced is not None and node.kind == "search":
        told = program.announced.pop(("search", node.resource, node.site), None)
        if told is not None:
            told.cancel()
    searching = item.searching
    if searching is not None:
        searching.answer(value if ok else None)
        if node is not None and node.stage == "scan":
            searching.error = None if ok else value
            return True, searching
    return ok, value


def _joined(values: Sequence[Any]) -> str:
    """The beginning of a text made of these, as far as it is known how they read."""
    text = []
    for value in values:
        if not isinstance(value, str | Docs):
            break
        text.append(str(value))
    return "".join(text)


def _invoked(node: InvokeNode, slots: list[Any]) -> tuple[Target, dict[str, Any]]:
    name, arguments = slots[node.name], slots[node.arguments]
    target = node.targets.get(name) if isinstance(name, str) else None
    if target is None:
        raise no_such_tool(name, tuple(node.targets))
    if not isinstance(arguments, Mapping):
        raise OperationTypeError(f"the arguments of tool {name!r} must be a mapping, not {type(arguments).__name__}")
    return target, dict(arguments)


def in_other_thread(call: Callable[[], Any], interrupt: Callable[[], None], name: str) -> Any:
    """The value of `call`, run in a thread of its own in a copy of this context; on an interrupt it is told to end."""
    box: list[tuple[bool, Any]] = []
    context = copy_context()

    def work() -> None:
        try:
            box.append((True, context.run(call)))
        except BaseException as e:
            box.append((False, e))

    thread = threading.Thread(target=work, name=name, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        interrupt()
        raise
    ok, value = box[0]
    if not ok:
        raise value
    return value


__all__ = ["COROUTINE", "TASK", "Driver", "Pace", "TaskNode", "WhileNode", "in_other_thread"]
