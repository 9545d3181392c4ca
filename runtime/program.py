"""One running request, and the pieces of state it is made of: region instances and what they wait for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flowc.ir.core import Op

from .plan import Block, Instruction, LaneNode, Plan, Target
from .requests import read_answer
from .stages import Announced, Searching, Words
from .trace import Kind, Record, Trace, traced_code

if TYPE_CHECKING:
    from .driver import Cancellable, Driver
    from .lanes import Lane
    from .scheduling import Turn

# What happens when a frame is done.
ROOT, PLAIN, CONDITION, BODY, ITEM, ITEMS, PARALLEL_ITEM, TRY, HANDLER, CALLEE = range(10)


class Frame:
    """One instance of a region.

    `pc` is how far the sweep in program order has come. Nothing more is kept while nothing is open: then every
    earlier instruction is done, so the next one's turn has come. Once one has to wait, it and those that it holds up
    are in `open` (with what they wait for, or None where it is for each other), and `waits` counts for each
    instruction how many open ones it needs; one that the sweep has passed runs when its count is back at zero.
    """

    __slots__ = (
        "block",
        "code",
        "dead",
        "depth",
        "error",
        "error_at",
        "held",
        "index",
        "node",
        "open",
        "parent",
        "pc",
        "program",
        "ready",
        "ret",
        "slots",
        "state",
        "tail",
        "told",
        "waits",
    )

    def __init__(
        self,
        program: Program,
        block: Block,
        slots: list[Any],
        parent: Frame | None,
        index: int,
        ret: int,
        node: Any,
        depth: int,
        tail: bool,
    ) -> None:
        self.program = program
        self.block = block
        self.code = block.code if program.trace is None else traced_code(block)
        self.slots = slots
        self.parent = parent
        self.index = index  # of the parent's instruction that this frame belongs to
        self.ret = ret
        self.node = node
        self.depth = depth  # of workflow calls
        self.tail = tail  # does this region's yield become the workflow's result?
        self.pc = 0
        self.waits: list[int] | None = None
        self.open: dict[int, Any] = NOTHING_OPEN
        self.ready: list[int] = NOTHING_READY
        self.error: BaseException | None = None
        self.error_at = -1
        self.state: Any = None
        self.told = False  # does the parent know that this frame waits?
        self.dead = False
        self.held: list[Cancellable] | None = None  # begun and not waited for: ends with the frame

    def hold(self, begun: Cancellable) -> None:
        """Lets something go on until the region ends, or somebody takes it."""
        if self.held is None:
            self.held = []
        self.held.append(begun)

    def drop(self) -> None:
        """The region is over: nobody will take what was begun in it."""
        held, self.held = self.held, None
        for begun in held or ():
            begun.cancel()

    @staticmethod
    def code_of(program: Program, block: Block) -> list[Instruction]:
        return block.code if program.trace is None else traced_code(block)


GENERATION = -1
"""Where a frame for all items of an `llm.each` keeps the generation that writes them: before the first of them."""

# Shared and never written to: most frames never have anything open.
NOTHING_OPEN: dict[int, Any] = {}
NOTHING_READY: list[int] = []


class Handle:
    """Something that an instruction waits for. Once `dead`, what it may still answer is of no interest."""

    __slots__ = ("dead", "driver", "frame", "index", "out", "record", "timer")

    driver: Any  # that gets the answer
    frame: Frame
    index: int
    out: Any
    dead: bool
    timer: Cancellable | None
    record: Record | None  # what the trace notes of it

    @property
    def op(self) -> Op:
        frame, index = self.frame, self.index
        if index == GENERATION:
            assert frame.parent is not None
            frame, index = frame.parent, frame.index
        return frame.block.ops[index]

    @property
    def where(self) -> str:
        """The lane, for the trace."""
        return ""

    def note_end(self, kind: Kind) -> None:
        """Tells the trace, if there is one."""
        if self.record is not None:
            trace = self.frame.program.trace
            assert trace is not None
            trace.ended(self, self.record, kind, self.op, self.where)

    def cancel(self) -> None:
        if not self.dead:
            self.note_end("cancelled")
        self.dead = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class LaneItem(Handle):
    """A request in a lane."""

    __slots__ = (
        "answer",
        "is_ahead",
        "key",
        "kv",
        "lane",
        "node",
        "on_text",
        "request",
        "searching",
        "ticket",
        "told",
        "words",
    )

    def __init__(
        self,
        driver: Any,
        frame: Any,
        index: int,
        node: LaneNode | None,
        lane: Lane,
        request: Any,
        key: tuple[Any, ...],
        ticket: Turn | None = None,
    ) -> None:
        self.driver = driver
        self.frame = frame
        self.index = index
        self.out = node.out if node is not None else None
        self.dead = False
        self.timer = self.record = None
        self.node = node
        self.lane = lane
        self.request = request
        self.key = key
        self.ticket = ticket  # None: first come, first served
        self.on_text: Callable[[str], None] | None = None
        self.told = 0  # characters that `on_text` was given
        self.is_ahead = False  # begun, and no instruction waits for it yet
        self.answer: tuple[bool, Any] | None = None  # that nobody has taken yet
        self.words: Words | None = None  # of what was begun ahead: what it has written may still be streamed
        self.kv: Announced | None = None  # the prefix that was computed for it
        self.searching: Searching | None = None  # the search in pieces that it runs

    @property
    def where(self) -> str:
        return str(self.lane.label)

    def read(self, answer: Any) -> Any:
        """The operation's value from the backend's answer."""
        node = self.node
        return answer if node is None else read_answer(node.kind, self.request, answer, node.model)

    def cancel(self) -> None:
        super().cancel()
        if self.ticket is not None:
            self.ticket.drop(self.driver.now())
        self.driver.forget(self)
        if self.kv is not None:
            self.kv.cancel()
        if self.searching is not None and self.searching.item is self:
            self.searching.answer(None)


class Waiter(Handle):
    """An instruction that waits for a part of what another one asked for."""

    __slots__ = ("label",)

    def __init__(self, driver: Any, frame: Frame, index: int, out: Any, label: str) -> None:
        self.driver = driver
        self.frame = frame
        self.index = index
        self.out = out
        self.dead = False
        self.timer = self.record = None
        self.label = label

    @property
    def where(self) -> str:
        return self.label


class CallItem(Handle):
    """A call of an async function, or of a tool on another thread; with its retries."""

    __slots__ = ("args", "attempt", "kwargs", "target", "task")

    def __init__(
        self,
        driver: Driver,
        frame: Frame,
        index: int,
        out: Any,
        target: Target,
        args: Sequence[Any],
        kwargs: dict[str, Any],
    ) -> None:
        self.driver = driver
        self.frame = frame
        self.index = index
        self.out = out
        self.dead = False
        self.timer = self.record = None
        self.target = target
        self.args = args
        self.kwargs = kwargs
        self.attempt = 0
        self.task: Any = None  # the task that awaits it, or the coroutine that nobody awaits yet

    @property
    def where(self) -> str:
        return "async" if self.target.is_async else "io"

    def cancel(self) -> None:
        super().cancel()
        task = self.task
        if task is not None:
            self.task = None
            end = getattr(task, "cancel", None) or getattr(task, "close", None)
            if end is not None:
                end()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one program of a `map`: `value`, or `error` if it is not None."""

    value: Any
    error: BaseException | None
    seconds: float


class Program:
    """One run of a plan."""

    __slots__ = (
        "announced",
        "context",
        "deadline_s",
        "driver",
        "error",
        "id",
        "is_done",
        "on_done",
        "on_text",
        "plan",
        "root",
        "started_s",
        "tenant",
        "timeout_s",
        "timer",
        "trace",
        "value",
    )

    def __init__(self, driver: Driver, plan: Plan, number: int, trace: Trace | None) -> None:
        self.driver = driver
        self.plan = plan
        self.id = number
        self.trace = trace
        self.context: Context | None = None
        self.timeout_s: float | None = None
        self.deadline_s: float | None = None
        self.timer: Cancellable | None = None
        self.root: Frame | None = None
        self.is_done = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.on_done: Callable[[Program], None] | None = None
        self.on_text: Callable[[str], None] | None = None
        self.started_s = 0.0
        self.announced: dict[tuple[str, str, int], Announced] | None = None  # by lane, resource and site
        self.tenant = ""
