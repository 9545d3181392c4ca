"""A graph made ready to run: per region a flat list of instructions over numbered slots.

A workflow is a `Function`: one list of slots for its values, which its regions share, because no region of it runs
twice at the same time. Only the body of a `foreach` whose items run at once has slots of its own, with the values
that it captures copied in. Constants are in the slots from the start and are no instructions.

An instruction is a tuple `(kind, fn, a, b, out)`, ready for the driver's inner loop: `a` and `b` are slots or a
getter of several, `out` is a slot or a slice of slots. What an instruction waits for is kept the other way round, as
the list of those that wait for it, and it is read only once something is still open: see `flowc.runtime.driver`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from flowc.ir.core import Graph, Op, Region, Value, free_values, walk
from flowc.ir.effects import has_groups, order_edges
from flowc.ir.errors import CompileError
from flowc.ir.ops import OPS, effect_of, keyword_operands
from flowc.ir.values import UNDEF

from . import pycode
from .requests import HINTS, OPTIONS, label_of, schema_of
from .symbols import Symbols, declared_limits, function_of, is_async_callable

# Kinds of instructions. Up to TOOL they run on the spot.
CALL0, CALL1, CALL2, CALLN, TOOL = range(5)
IF, WHILE, FOREACH, TRY, EACH, CALL = range(5, 11)
LANE, COROUTINE, TASK, INVOKE, AHEAD, SEARCH, ADVICE = range(11, 18)

Fn = Callable[..., Any]
Getter = Callable[[list[Any]], Sequence[Any]]
Instruction = tuple[int, Any, Any, Any, Any]

SLOW_S = 1e-3
"""A synchronous tool that takes longer is worth a thread: a hop there and back costs less than a tenth of it."""


class Pace:
    """How long a tool's calls take, over all plans of the process: the rule for where a synchronous tool runs.

    A tool runs in the driver's thread at first. A call that takes more than `SLOW_S` counts: from then on calls go to
    the thread pool, where those of other programs and branches overlap with them. One slow call (an import, a cold
    cache) is no verdict: each call in the pool moves the average too, and below a fifth of `SLOW_S` the tool comes
    back. Opaque `py` never leaves the driver's thread: only a tool's author has said that it may run elsewhere.
    """

    __slots__ = ("__weakref__", "average_s", "is_slow")

    def __init__(self) -> None:
        self.average_s = 0.0
        self.is_slow = False

    def note(self, seconds: float) -> None:
        self.average_s = seconds if not self.average_s else 0.7 * self.average_s + 0.3 * seconds
        if self.average_s > SLOW_S:
            self.is_slow = True
        elif self.average_s < SLOW_S / 5:
            self.is_slow = False


_paces: weakref.WeakKeyDictionary[Any, Pace] = weakref.WeakKeyDictionary()


def _pace_of(fn: Any) -> Pace:
    try:
        pace = _paces.get(fn)
        if pace is None:
            pace = _paces[fn] = Pace()
        return pace
    except TypeError:  # neither hashable nor weakly referable
        return Pace()


@dataclass(slots=True)
class Target:
    """A callable with all that matters of how it is called."""

    name: str
    fn: Fn
    is_async: bool
    pace: Pace
    thread: bool | None = None  # True: always a thread; False: never; None: by its pace
    timeout_s: float | None = None
    retries: int = 0


@dataclass(slots=True)
class TaskNode:
    """A call that may wait: an async function, or a tool with a timeout, retries or a thread of its own."""

    target: Target
    args: Getter
    out: Any


@dataclass(slots=True)
class InvokeNode:
    """A call of the tool that a value names."""

    targets: dict[str, Target]
    name: int
    arguments: int
    out: Any
    handling: int | None


@dataclass(slots=True)
class LaneNode:
    """An operation on a resource."""

    kind: str
    resource: str
    operands: Getter
    options: dict[str, Any]
    dynamic: tuple[tuple[str, int], ...]  # keyword operands: option -> slot
    model: Any
    out: Any
    is_tail: bool
    label: str
    ahead: int | None = None  # slot of what was begun ahead for it
    kv: int | None = None  # slot of its prompt's prefix, computed ahead
    site: int | None = None
    lookahead: tuple[tuple[str, int], ...] = ()  # (index, site) of each search to predict again while it writes
    stage: str = ""  # of a search in pieces: begin, scan, partial or finish
    confidence: float = 1.0  # how certain a partial result must be


@dataclass(slots=True)
class AdviceNode:
    """Advice for a backend. `what` is the operation, `value` its number of seconds or steps."""

    what: str
    lane: str
    resource: str
    operands: Getter
    site: int
    prefix: str
    value: float
    out: Any
    label: str


@dataclass(slots=True)
class IfNode:
    then: Block
    orelse: Block
    out: slice


@dataclass(slots=True)
class WhileNode:
    cond: Block
    body: Block
    inits: Getter
    condition: int
    go_on: int
    following: Getter
    limit: int
    out: slice
    carried: slice  # parameters of `cond`
    body_in: slice  # parameters of `body`


@dataclass(slots=True)
class ForeachNode:
    body: Block
    inits: Getter
    item: int
    carried: slice
    go_on: int | None
    following: Getter
    lists: tuple[int, ...]
    is_parallel: bool
    is_gathered: bool  # all items are taken before the first one's body starts
    out: slice
    generation: LaneNode | None = None  # of an `llm.each`: what writes the items
    split: str = ""


@dataclass(slots=True)
class TryNode:
    body: Block
    handlers: tuple[Block, ...]
    match: Fn
    operands: Getter
    errors: tuple[int, ...]  # per handler the slot of its parameter
    out: slice


@dataclass(slots=True)
class CallNode:
    function: Function
    args: Getter
    out: int
    is_tail: bool


@dataclass(slots=True, eq=False)
class Block:
    """A region: its instructions in program order, and for each of them who waits for it."""

    workflow: str
    ordered: bool
    ops: list[Op] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    successors: list[list[int]] = field(default_factory=list)
    n: int = 0
    give: Getter = itemgetter(slice(0, 0))  # its yields
    frame_of: Callable[[Op], str] = field(default=lambda op: "workflow")
    slots: list[Any] | None = None  # of a body with slots of its own
    captures: list[tuple[int, int]] = field(default_factory=list)  # (outer slot, own slot)
    tails: frozenset[int] = frozenset()  # `if` instructions on the path of the workflow's result
    traced: list[Instruction] | None = None

    def labels(self, index: int) -> str:
        return label_of(self.ops[index])


@dataclass(slots=True, eq=False)
class Function:
    """A workflow: its body, and its slots as they are before it runs."""

    name: str
    block: Block
    slots: list[Any] = field(default_factory=list)
    n_params: int = 0


@dataclass(slots=True, eq=False, weakref_slot=True)
class Plan:
    """What `Runtime.run` takes. `streams` says whether some generation's text is certain to be the result."""

    graph: Graph
    entry: Function
    functions: tuple[Function, ...]
    build_s: float = 0.0
    streams: bool = False

    @property
    def name(self) -> str:
        return self.graph.name


def _getter(slots: Sequence[int]) -> Getter:
    """Reads several slots at once, in C; always a sequence."""
    if not slots:
        return itemgetter(slice(0, 0))
    if len(slots) == 1 or list(slots) == list(range(slots[0], slots[0] + len(slots))):
        return itemgetter(slice(slots[0], slots[0] + len(slots)))
    return itemgetter(*slots)


class _Space:
    """A list of slots under construction, and which value is where."""

    __slots__ = ("captures", "outer", "slots", "where")

    def __init__(self, outer: _Space | None = None) -> None:
        self.outer = outer
        self.slots: list[Any] = []
        self.where: dict[str, int] = {}
        self.captures: list[tuple[int, int]] = []

    def add(self, values: Sequence[Value]) -> slice:
        """New slots, side by side."""
        start = len(self.slots)
        for value in values:
            self.where[value.name] = len(self.slots)
            self.slots.append(None)
        return slice(start, len(self.slots))

    def constant(self, value: Value, literal: Any) -> None:
        self.where[value.name] = len(self.slots)
        self.slots.append(literal)

    def __getitem__(self, name: str) -> int:
        found = self.where.get(name)
        if found is None:
            if self.outer is None:
                raise CompileError(f"%{name} is used and never defined")
            source = self.outer[name]
            found = self.where[name] = len(self.slots)
            self.slots.append(None)
            self.captures.append((source, found))
        return found

    def all(self, values: Sequence[Value]) -> Getter:
        return _getter([self[v.name] for v in values])


def _lazily(code: list[Instruction], index: int, make: Callable[[], Fn]) -> Fn:
    """A function that is compiled when it is first called: most of a large workflow's branches never are."""

    def first(*args: Any) -> Any:
        fn = make()
        kind, now, a, b, out = code[index]
        if now is first:
            code[index] = (kind, fn, a, b, out)
        return fn(*args)

    return first


class _Builder:
    def __init__(self, graph: Graph) -> None:
        self.symbols = Symbols(graph)
        self.functions: dict[int, Function] = {}
        self.pending: list[tuple[Graph, Function]] = []
        self.targets: dict[tuple[int, str], Target] = {}
        self.streams = False

    def function(self, graph: Graph) -> Function:
        found = self.functions.get(id(graph))
        if found is None:
            found = Function(graph.name, Block(graph.name, graph.body.ordered), n_params=len(graph.params))
            self.functions[id(graph)] = found
            self.pending.append((graph, found))
        return found

    def build(self, graph: Graph) -> Function:
        entry = self.function(graph)
        while self.pending:
            current, function = self.pending.pop()
            space = _Space()
            space.add(current.params)
            body = _Body(self, current, space, current is graph)
            function.block, _ = body.block(current.body, frozenset({current.result.name}), None)
            function.slots = space.slots
        return entry

    def target(self, graph: Graph, op: Op, name: str, ref: Any) -> Target:
        tool = self.symbols.symbol(graph, name, ref, op.loc, "tool")
        fn = function_of(tool)
        if not callable(fn):
            raise CompileError(
                f"the tool `{name}` of workflow {graph.name} is a {type(fn).__name__}, nothing to call", loc=op.loc
            )
        given: dict[str, Any] = dict(op.attrs) if op.name == "tool" else declared_limits(tool)
        timeout, retries = given.get("timeout"), given.get("retries") or 0
        thread = getattr(tool, "thread", None)
        return Target(
            name,
            fn,
            bool(given.get("is_async")) or is_async_callable(fn),
            _pace_of(fn),
            thread if isinstance(thread, bool) else None,
            float(timeout) if timeout is not None else None,
            int(retries) if given.get("idempotent") else 0,
        )


class _Body:
    """Builds the blocks of one workflow."""

    def __init__(self, builder: _Builder, graph: Graph, space: _Space, is_root: bool) -> None:
        self.builder = builder
        self.graph = graph
        self.space = space
        self.is_root = is_root
        self.frames: dict[Any, str] = {}

    def frame_of(self, op: Op) -> str:
        """The name of the user's function that an op's line belongs to."""
        key = op.attrs.get("scope")
        if key not in self.frames:
            try:
                self.frames[key] = self.builder.symbols.scope(self.graph, op).function
            except CompileError:
                self.frames[key] = self.graph.name
        return self.frames[key]

    def block(self, region: Region, tails: frozenset[str], handling: int | None) -> tuple[Block, set[str]]:
        """The block of a region whose parameters have their slots, and the names that it uses from outside."""
        ordered = region.ordered and not has_groups(region)
        block = Block(self.graph.name, ordered, frame_of=self.frame_of)
        code, ops, space = block.code, block.ops, self.space
        producer: dict[str, int] = {}
        used: set[str] = set()
        uses: list[set[str]] = []
        tail_ifs: list[int] = []
        for op in region.ops:
            if op.name == "const":
                space.constant(op.result, op.attrs["value"])
                producer[op.result.name] = -1
                continue
            if op.name == "undef":
                space.constant(op.result, UNDEF)
                producer[op.result.name] = -1
                continue
            index = len(code)
            needs = {v.name for v in op.operands}
            is_tail = bool(tails) and any(v.name in tails for v in op.results)
            if op.name == "if" and is_tail:
                tail_ifs.append(index)
            ops.append(op)
            code.append((CALL0, None, None, None, None))
            code[index] = self.instruction(op, code, index, needs, tails if is_tail else frozenset(), handling)
            uses.append(needs)
            for value in op.results:
                producer[value.name] = index
        for needs in uses:
            used |= needs
        used.update(v.name for v in region.yields)
        block.n = len(code)
        if not ordered:
            waits: list[set[int]] = [{producer[n] for n in needs if producer.get(n, -1) >= 0} for needs in uses]
            if region.ordered or any(effect_of(op).reads or effect_of(op).writes for op in ops):
                for index, earlier in enumerate(order_edges(Region((), tuple(ops), (), region.ordered))):
                    waits[index].update(earlier)
            block.successors = [[] for _ in code]
            for index, before in enumerate(waits):
                for e in before:
                    block.successors[e].append(index)
        block.give = space.all(region.yields)
        block.tails = frozenset(tail_ifs)
        return block, used - producer.keys() - {p.name for p in region.params}

    def instruction(
        self, op: Op, code: list[Instruction], index: int, needs: set[str], tails: frozenset[str], handling: int | None
    ) -> Instruction:
        space, symbols, graph = self.space, self.builder.symbols, self.graph
        match op.name:
            case "py":
                scope = symbols.scope(graph, op)
                return self.python(
                    op,
                    lambda: pycode.py_function(op, scope),
                    bool(op.attrs.get("is_async")),
                    code,
                    index,
                    op.operands,
                    handling,
                )
            case "template":
                scope = symbols.scope(graph, op)
                return self.python(
                    op, lambda: pycode.template_function(op, scope), False, code, index, op.operands, None
                )
            case "append":
                return self.simple(op, pycode.append_item)
            case "concat":
                return self.simple(op, pycode.concat_lists)
            case "equals":
                return self.simple(op, pycode.equals_function(op.attrs["value"]))
            case "bound":
                return self.simple(op, pycode.bound_function(str(op.attrs["variable"])))
            case "cell":
                return self.simple(op, _new_cell)
            case "load":
                return self.simple(op, itemgetter(0))
            case "store":
                return self.simple(op, pycode.store_value)
            case "fused":
                free = free_values(op.regions[0])
                needs.update(v.name for v in free)
                scope = symbols.scope(graph, None)
                is_async = any(o.attrs.get("is_async") for o in walk(op.regions[0]))
                scope_of = lambda o: symbols.scope(graph, o if o.attrs.get("scope") else None)  # noqa: E731
                make = lambda: pycode.fused_function(op, scope, scope_of, graph.name)[0]  # noqa: E731
                return self.python(op, make, is_async, code, index, free, handling)
            case "if":
                return self.if_(op, needs, tails, handling)
            case "while":
                return self.while_(op, needs, handling)
            case "foreach":
                return self.foreach(op, needs, handling)
            case "try":
                return self.try_(op, needs, handling)
            case "call":
                callee = symbols.callee(graph, str(op.attrs["callee"]), op.loc)
                if len(callee.params) != len(op.operands):
                    raise CompileError(
                        f"workflow {callee.name} takes {len(callee.params)} value(s), not {len(op.operands)}",
                        loc=op.loc,
                    )
                function = self.builder.function(callee)
                node = CallNode(function, space.all(op.operands), space.add(op.results).start, bool(tails))
                return (CALL, node, None, None, node.out)
            case "tool":
                return self.tool(op, handling)
            case "invoke":
                refs: Any = op.attrs.get("refs") or ()
                names: Any = op.attrs["tools"]
                found = {
                    n: self.builder.target(graph, op, n, r)
                    for n, r in zip(names, [*refs, *[None] * (len(names) - len(refs))], strict=True)
                }
                name, arguments = (space[v.name] for v in op.operands)
                return (INVOKE, InvokeNode(found, name, arguments, self.out(op), handling), None, None, None)
            case "embed" | "search" | "rerank" | "generate" | "choose" | "parse":
                return self.lane(op, bool(tails))
            case "ivf.begin" | "ivf.scan" | "ivf.partial" | "ivf.finish":
                return self.search_stage(op)
            case "llm.each":
                return self.each(op, needs, tails)
            case name if name.startswith("ahead."):
                begun = self.lane_node(op, name.removeprefix("ahead."), False)
                begun.options.pop("timeout", None)  # time counts from where it is needed
                return (AHEAD, begun, None, None, begun.out)
            case name if name in OPS and OPS[name].is_advice:
                return self.advice(op)
            case _:
                raise CompileError(f"the runtime does not know the operation `{op.name}`", loc=op.loc)

    def out(self, op: Op) -> Any:
        """A slot for one result, a slice for any other number."""
        where = self.space.add(op.results)
        return where.start if len(op.results) == 1 else where

    def inline(self, fn: Fn, slots: list[int], out: Any) -> Instruction:
        match slots:
            case []:
                return (CALL0, fn, None, None, out)
            case [a]:
                return (CALL1, fn, a, None, out)
            case [a, b]:
                return (CALL2, fn, a, b, out)
            case _:
                return (CALLN, fn, _getter(slots), None, out)

    def simple(self, op: Op, fn: Fn) -> Instruction:
        slots = [self.space[v.name] for v in op.operands]
        return self.inline(fn, slots, self.out(op))

    def python(
        self,
        op: Op,
        make: Callable[[], Fn],
        is_async: bool,
        code: list[Instruction],
        index: int,
        operands: Sequence[Value],
        handling: int | None,
    ) -> Instruction:
        slots = [self.space[v.name] for v in operands]
        out = self.out(op)
        if is_async:
            target = Target("py", lambda *args: None, True, Pace())

            def first(*args: Any) -> Any:
                target.fn = make()
                return target.fn(*args)

            target.fn = first
            return (COROUTINE, TaskNode(target, _getter(slots), out), None, None, out)
        if handling is not None:
            fn = _lazily(code, index, lambda: pycode.while_handling(make()))
            return self.inline(fn, [handling, *slots], out)
        return self.inline(_lazily(code, index, make), slots, out)

    def tool(self, op: Op, handling: int | None) -> Instruction:
        target = self.builder.target(self.graph, op, str(op.attrs["tool"]), op.attrs.get("ref"))
        slots = [self.space[v.name] for v in op.operands]
        keywords = tuple(keyword_operands(op))
        out = self.out(op)
        if keywords:
            target.fn = _with_keywords(target.fn, len(slots) - len(keywords), keywords)
        is_plain = not target.is_async and target.timeout_s is None and not target.retries and target.thread is not True
        if is_plain:
            fn = target.fn
            if handling is not None:
                fn, slots = pycode.while_handling(fn), [handling, *slots]
            if target.thread is False:
                return self.inline(fn, slots, out)
            return (TOOL, fn, _getter(slots), target.pace, out)
        node = TaskNode(target, _getter(slots), out)
        return (COROUTINE if target.is_async and not target.retries else TASK, node, None, None, out)

    def lane(self, op: Op, is_tail: bool) -> Instruction:
        node = self.lane_node(op, op.name, is_tail)
        return (LANE, node, None, None, node.out)

    def lane_node(self, op: Op, kind: str, is_tail: bool) -> LaneNode:
        """What an operation asks its lane for; `kind` is the program-level operation whose request it is."""
        keywords = keyword_operands(op)
        plain = len(op.operands) - len(keywords)
        allowed = {*OPTIONS[kind], *HINTS, "timeout"}
        for name in keywords:
            if name not in allowed:
                raise CompileError(f"`{kind}` takes no option `{name}`", loc=op.loc)
        options = {n: op.attrs[n] for n in (*OPTIONS[kind], "timeout") if op.attrs.get(n) is not None}
        if op.attrs.get("drops"):
            options["drop"] = True
        model = None
        if kind == "parse":
            model = self.builder.symbols.symbol(
                self.graph, str(op.attrs["model"]), op.attrs.get("ref"), op.loc, "model"
            )
            options["schema"] = schema_of(model)
        operands = self.space.all(op.operands[:plain])
        slots = {name: self.space[op.operands[at].name] for name, at in keywords.items()}
        ahead, kv = slots.pop("ahead", None), slots.pop("kv", None)
        is_tail = is_tail and kind == "generate"
        self.builder.streams |= is_tail
        return LaneNode(
            kind,
            str(op.attrs["resource"]),
            operands,
            options,
            tuple(slots.items()),
            model,
            self.out(op),
            is_tail,
            label_of(op),
            ahead,
            kv,
            _site(op),
            tuple(map(_lookahead, _texts(op.attrs.get("lookahead")))),
        )

    def search_stage(self, op: Op) -> Instruction:
        node = self.lane_node(op, "search", False)
        node.stage = op.name.removeprefix("ivf.")
        node.confidence = float(op.attrs.get("confidence", 1.0))  # type: ignore[arg-type]
        return (SEARCH, node, None, None, node.out)

    def advice(self, op: Op) -> Instruction:
        attrs = op.attrs
        value: Any = next((attrs[n] for n in ("steps", "ttl", "window") if n in attrs), 0.0)
        node = AdviceNode(
            op.name,
            OPS[op.name].lane,
            str(attrs["resource"]),
            self.space.all(op.operands),
            _site(op) or 0,
            str(attrs.get("prefix") or ""),
            float(value),
            self.out(op) if op.results else None,
            label_of(op),
        )
        return (ADVICE, node, None, None, node.out)

    def each(self, op: Op, needs: set[str], tails: frozenset[str]) -> Instruction:
        (region,) = op.regions
        outer = self.space
        generation = self.lane_node(op, "generate", op.results[0].name in tails)
        where = generation.out
        generation.out = where.start
        self.space = inner = _Space(outer)
        params = inner.add(region.params)
        body = self.inner(region, needs, frozenset(), None)
        lists = tuple(inner[v.name] for v in region.yields)
        body.slots, body.captures = inner.slots, inner.captures
        self.space = outer
        none = _getter([])
        node = ForeachNode(
            body,
            none,
            params.start,
            slice(params.stop, params.stop),
            None,
            none,
            lists,
            True,
            True,
            where,
            generation,
            str(op.attrs["split"]),
        )
        return (EACH, node, None, None, where)

    # -- control flow
    def inner(self, region: Region, needs: set[str], tails: frozenset[str], handling: int | None) -> Block:
        block, used = self.block(region, tails, handling)
        needs |= used
        return block

    def if_(self, op: Op, needs: set[str], tails: frozenset[str], handling: int | None) -> Instruction:
        at = [i for i, v in enumerate(op.results) if v.name in tails]
        blocks = [self.inner(r, needs, frozenset(r.yields[i].name for i in at), handling) for r in op.regions]
        condition = self.space[op.operands[0].name]
        node = IfNode(blocks[0], blocks[1], self.space.add(op.results))
        return (IF, node, condition, None, node.out)

    def while_(self, op: Op, needs: set[str], handling: int | None) -> Instruction:
        cond_region, body_region = op.regions
        space = self.space
        inits = space.all(op.operands)
        carried = space.add(cond_region.params)
        cond = self.inner(cond_region, needs, frozenset(), handling)
        body_in = space.add(body_region.params)
        body = self.inner(body_region, needs, frozenset(), handling)
        node = WhileNode(
            cond,
            body,
            inits,
            space[cond_region.yields[0].name],
            space[body_region.yields[0].name],
            space.all(body_region.yields[1:]),
            int(op.attrs["limit"]),  # type: ignore[arg-type]
            space.add(op.results),
            carried,
            body_in,
        )
        return (WHILE, node, None, None, node.out)

    def foreach(self, op: Op, needs: set[str], handling: int | None) -> Instruction:
        (region,) = op.regions
        space = self.space
        collects = int(op.attrs.get("collects") or 0)  # type: ignore[arg-type]
        breaks = bool(op.attrs.get("breaks"))
        is_parallel = bool(op.attrs.get("parallel")) and len(op.operands) == 1 and not breaks
        items = space[op.operands[0].name]
        inits = space.all(op.operands[1:])
        if is_parallel:
            self.space = _Space(space)
            handling = None  # the slot of an error that is being handled is not theirs
        inner = self.space
        params = inner.add(region.params)
        body = self.inner(region, needs, frozenset(), handling)
        yields = list(region.yields)
        go_on = inner[yields.pop(0).name] if breaks else None
        n_carried = len(region.params) - 1
        if len(yields) != n_carried + collects:
            raise CompileError(
                f"the body of a foreach yields {len(yields)} values, not {n_carried} carried and {collects} lists",
                loc=op.loc,
            )
        following = inner.all(yields[:n_carried])
        lists = tuple(inner[v.name] for v in yields[n_carried:])
        if is_parallel:
            body.slots, body.captures = inner.slots, inner.captures
            self.space = space
        out = space.add(op.results)
        node = ForeachNode(
            body,
            inits,
            params.start,
            slice(params.start + 1, params.stop),
            go_on,
            following,
            lists,
            is_parallel,
            is_parallel and "group" in op.attrs,
            out,
        )
        return (FOREACH, node, items, None, out)

    def try_(self, op: Op, needs: set[str], handling: int | None) -> Instruction:
        body_region, *handler_regions = op.regions
        space = self.space
        operands = space.all(op.operands)
        body = self.inner(body_region, needs, frozenset(), handling)
        handlers, errors = [], []
        for region in handler_regions:
            at = space.add(region.params).start
            errors.append(at)
            handlers.append(self.inner(region, needs, frozenset(), at))
        scope = self.builder.symbols.scope(self.graph, op)
        matcher: list[Fn] = []

        def match(error: BaseException, *args: Any) -> Any:
            if not matcher:
                matcher.append(pycode.handler_matcher(op, scope))
            return matcher[0](error, *args)

        node = TryNode(body, tuple(handlers), match, operands, tuple(errors), space.add(op.results))
        return (TRY, node, None, None, node.out)


def _site(op: Op) -> int | None:
    site = op.attrs.get("site")
    return site if isinstance(site, int) else None


def _texts(value: Any) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else ()


def _lookahead(text: str) -> tuple[str, int]:
    """`resource#site` of a prediction."""
    resource, _, site = text.rpartition("#")
    return resource, int(site) if site.isdecimal() else -1


def _new_cell(value: Any) -> list[Any]:
    return [value]


def _with_keywords(fn: Fn, positional: int, names: tuple[str, ...]) -> Fn:
    def call(*args: Any) -> Any:
        return fn(*args[:positional], **dict(zip(names, args[positional:], strict=True)))

    return call


def build_plan(graph: Graph) -> Plan:
    """The plan of a graph, in linear time. CompileError where a scope, tool, model or workflow cannot be found."""
    start = time.perf_counter()
    builder = _Builder(graph)
    entry = builder.build(graph)
    return Plan(graph, entry, tuple(builder.functions.values()), time.perf_counter() - start, builder.streams)
