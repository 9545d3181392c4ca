"""The reference: a graph run op by op in program order, one blocking call at a time. All else is compared with it."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from flowc.ir.core import Graph, Op, Region
from flowc.ir.errors import NodeTimeoutError
from flowc.ir.ops import OPS, keyword_operands
from flowc.ir.values import UNDEF, Docs

from . import pycode
from .protocols import Embedder, LLMBackend, Reranker, Retriever
from .requests import HINTS, LANE_OF, OPTIONS, label_of, make_request, read_answer, schema_of, timeout_of, told_of
from .stages import split
from .symbols import Symbols, declared_limits, function_of, is_async_callable
from .tracebacks import chain, clean

Env = dict[str, Any]


class Resources(Protocol):
    """Where resources come from by name. Each may raise ResourceError; asked once per name and kept."""

    def llm(self, name: str) -> LLMBackend: ...
    def index(self, name: str) -> Retriever: ...
    def embedder(self, name: str) -> Embedder: ...
    def reranker(self, name: str) -> Reranker: ...


def find_backend(resources: Resources, lane: str, name: str) -> Any:
    """The backend of a resource, by the kind of its lane."""
    match lane:
        case "llm":
            return resources.llm(name)
        case "search":
            return resources.index(name)
        case "embed":
            return resources.embedder(name)
        case _:
            return resources.reranker(name)


def interpret(graph: Graph, args: Sequence[Any], resources: Resources) -> Any:
    """The value that the workflow returns, computed naively: sequential, one call at a time, each awaited in place.

    What the stage level only hurries does nothing here: advice, work begun ahead, prefixes. Tools of one gather group
    that wait for each other never end: nothing here runs beside anything else.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _Interpreter(graph, resources).run(args)
    box: list[Any] = []  # a loop runs in this thread and cannot run another one inside: use a thread

    def work() -> None:
        try:
            box.append((True, _Interpreter(graph, resources).run(args)))
        except BaseException as e:
            box.append((False, e))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ok, value = box[0]
    if not ok:
        raise value
    return value


class _Interpreter:
    def __init__(self, graph: Graph, resources: Resources) -> None:
        self.graph = graph
        self.resources = resources
        self.symbols = Symbols(graph)
        self.loop: asyncio.AbstractEventLoop | None = None
        self.functions: dict[int, Any] = {}  # compiled code by id of its op

    def run(self, args: Sequence[Any]) -> Any:
        try:
            return self.workflow(self.graph, args)
        except BaseException as e:
            clean(e)
            raise
        finally:
            if self.loop is not None:
                self.loop.close()

    def workflow(self, graph: Graph, args: Sequence[Any]) -> Any:
        env = dict(zip((p.name for p in graph.params), args, strict=True))
        self.ops(graph, graph.body, env)
        return env[graph.result.name]

    def ops(self, graph: Graph, region: Region, env: Env) -> list[Any]:
        """Runs a region's ops in order; gives its yields."""
        for op in region.ops:
            try:
                values = self.op(graph, op, env)
            except BaseException as e:
                clean(e)
                raise
            assert len(values) == len(op.results), f"{op} gave {len(values)} values"
            for result, value in zip(op.results, values, strict=True):
                env[result.name] = value
        return [env[v.name] for v in region.yields]

    def op(self, graph: Graph, op: Op, env: Env) -> Sequence[Any]:
        operands = [env[v.name] for v in op.operands]
        attrs = op.attrs
        match op.name:
            case "const":
                return [attrs["value"]]
            case "undef":
                return [UNDEF]
            case "template":
                return [
                    self.compiled(op, lambda: pycode.template_function(op, self.symbols.scope(graph, op)))(*operands)
                ]
            case "append":
                return [pycode.append_item(*operands)]
            case "concat":
                return [pycode.concat_lists(*operands)]
            case "equals":
                return [pycode.equals_function(attrs["value"])(*operands)]
            case "bound":
                return [pycode.bound_function(str(attrs["variable"]))(*operands)]
            case "cell":
                return [operands]
            case "load":
                return [operands[0][0]]
            case "store":
                return [pycode.store_value(*operands)]
            case "py":
                value = self.compiled(op, lambda: pycode.py_function(op, self.symbols.scope(graph, op)))(
                    *operands, handled=env.get("")
                )
                value = self.wait(value) if attrs.get("is_async") else value
                return [value] if len(op.results) == 1 else value
            case "fused":
                return self.ops(graph, op.regions[0], dict(env))
            case "if":
                return self.ops(graph, op.regions[0 if operands[0] else 1], dict(env))
            case "while":
                return self.while_(graph, op, operands, env)
            case "foreach":
                return self.foreach(graph, op, operands, env)
            case "try":
                return self.try_(graph, op, operands, env)
            case "call":
                callee = self.symbols.callee(graph, str(attrs["callee"]), op.loc)
                return [self.workflow(callee, operands)]
            case "tool":
                tool = self.symbols.symbol(graph, str(attrs["tool"]), attrs.get("ref"), op.loc, "tool")
                keywords = keyword_operands(op)
                plain = operands[: len(operands) - len(keywords)]
                named = {name: operands[at] for name, at in keywords.items()}
                return [self.tool(tool, plain, named, attrs, label_of(op), op)]
            case "invoke":
                return [self.invoke(graph, op, *operands)]
            case "ivf.begin":
                return [_Search(*self.asked("search", op, operands))]
            case "ivf.scan":
                return operands
            case "ivf.partial":
                try:
                    return [self.found(op, operands[0])]
                except Exception:
                    return [Docs()]  # a guess raises nothing
            case "ivf.finish":
                return [self.found(op, operands[0])]
            case "llm.each":
                return self.each(graph, op, operands, env)
            case name if OPS[name].is_advice or name.startswith("ahead."):
                return [None] * len(op.results)
            case _:
                return [self.resource(graph, op, op.name, operands)]

    def compiled(self, op: Op, make: Any) -> Any:
        """An op's function, compiled once; with `handled` it runs as inside an `except` clause."""
        found = self.functions.get(id(op))
        if found is None:
            found = self.functions[id(op)] = make()

        def run(*args: Any, handled: BaseException | None = None) -> Any:
            return found(*args) if handled is None else pycode.while_handling(found)(handled, *args)

        return run

    def wait(self, awaitable: Any) -> Any:
        if self.loop is None:
            self.loop = asyncio.new_event_loop()
        return self.loop.run_until_complete(awaitable)

    # -- control flow
    def while_(self, graph: Graph, op: Op, carried: list[Any], env: Env) -> list[Any]:
        cond, body = op.regions
        limit = int(op.attrs["limit"])  # type: ignore[arg-type]
        count = 0
        while True:
            (go_on,) = self.ops(graph, cond, _with(env, cond, carried))
            if not go_on:
                return carried
            if count >= limit:
                raise pycode.loop_limit(limit, op.loc, graph.name)
            count += 1
            again, *carried = self.ops(graph, body, _with(env, body, carried))
            if not again:
                return carried

    def foreach(self, graph: Graph, op: Op, operands: list[Any], env: Env) -> list[Any]:
        (body,) = op.regions
        items, *carried = operands
        lists: list[list[Any]] = [[] for _ in range(int(op.attrs.get("collects") or 0))]  # type: ignore[arg-type]
        for item in items:
            yields = self.ops(graph, body, _with(env, body, [item, *carried]))
            go_on = yields.pop(0) if op.attrs.get("breaks") else True
            carried, new = yields[: len(carried)], yields[len(carried) :]
            for collected, more in zip(lists, new, strict=True):
                collected.extend(more)
            if not go_on:
                break
        return [*carried, *lists]

    def try_(self, graph: Graph, op: Op, operands: list[Any], env: Env) -> list[Any]:
        body, *handlers = op.regions
        try:
            return self.ops(graph, body, dict(env))
        except BaseException as e:
            error = e
        chosen = pycode.handler_matcher(op, self.symbols.scope(graph, op))(error, *operands)
        if chosen < 0:
            raise error
        handler = handlers[chosen]
        try:
            return self.ops(graph, handler, {**_with(env, handler, [error]), "": error})
        except BaseException as e:
            chain(e, error)
            raise

    # -- calls
    def tool(self, tool: Any, plain: Sequence[Any], named: Mapping[str, Any], attrs: Any, label: str, op: Op) -> Any:
        fn = function_of(tool)
        retries = int(attrs.get("retries") or 0) if attrs.get("idempotent") else 0
        timeout = attrs.get("timeout")
        start = time.monotonic()
        for attempt in range(retries + 1):
            try:
                value = fn(*plain, **named)
                if attrs.get("is_async") or is_async_callable(fn):
                    value = self.wait(value)
            except Exception:
                if attempt == retries:
                    raise
                time.sleep(backoff_s(attempt))
            else:
                if timeout is not None and time.monotonic() - start > timeout:
                    raise node_timeout(label, timeout, op)
                return value
        raise AssertionError

    def invoke(self, graph: Graph, op: Op, name: Any, arguments: Any) -> Any:
        names: Any = op.attrs["tools"]
        refs: Any = op.attrs.get("refs") or (None,) * len(names)
        if name not in names:
            raise no_such_tool(name, names)
        tool = self.symbols.symbol(graph, name, refs[names.index(name)], op.loc, "tool")
        return self.tool(tool, (), dict(arguments), declared_limits(tool), label_of(op), op)

    def asked(self, kind: str, op: Op, operands: list[Any], model: Any = None) -> tuple[Any, float | None]:
        """The request of an operation of this kind, and its timeout."""
        keywords = keyword_operands(op)
        plain = operands[: len(operands) - len(keywords)]
        options = {n: op.attrs[n] for n in (*OPTIONS[kind], "timeout") if op.attrs.get(n) is not None}
        options.update({name: operands[at] for name, at in keywords.items() if name not in HINTS})
        if model is not None:
            options["schema"] = schema_of(model)
        return make_request(kind, plain, options), timeout_of(options.get("timeout"))

    def each(self, graph: Graph, op: Op, operands: list[Any], env: Env) -> list[Any]:
        (body,) = op.regions
        text = self.resource(graph, op, "generate", operands)
        items = split(text, str(op.attrs["split"]))
        lists: list[list[Any]] = [[] for _ in op.results[2:]]
        for item in items:
            for collected, more in zip(lists, self.ops(graph, body, _with(env, body, [item])), strict=True):
                collected.extend(more)
        return [text, items, *lists]

    def found(self, op: Op, search: _Search) -> Docs:
        """What a search in pieces finds; it is run when somebody first asks."""
        if search.docs is not None:
            return search.docs
        search.docs = docs = self.answer(op, "search", search.request, search.timeout_s)
        return docs  # type: ignore[no-any-return]

    def resource(self, graph: Graph, op: Op, kind: str, operands: list[Any]) -> Any:
        model = None
        if kind == "parse":
            model = self.symbols.symbol(graph, str(op.attrs["model"]), op.attrs.get("ref"), op.loc, "model")
        request, timeout = self.asked(kind, op, operands, model)
        return self.answer(op, kind, request, timeout, model)

    def answer(self, op: Op, kind: str, request: Any, timeout: float | None, model: Any = None) -> Any:
        start = time.monotonic()
        backend = find_backend(self.resources, LANE_OF[kind], str(op.attrs["resource"]))
        method = getattr(backend, "generate" if kind == "parse" else kind)
        answers = method([request])
        if is_async_callable(method):
            answers = self.wait(answers)
        answer = answers[0]
        if isinstance(answer, BaseException):
            raise answer
        if timeout is not None and time.monotonic() - start > timeout:
            raise node_timeout(told_of(op), timeout, op)
        return read_answer(kind, request, answer, model)


@dataclass(slots=True)
class _Search:
    """What `ivf.begin` holds."""

    request: Any
    timeout_s: float | None
    docs: Docs | None = None


def _with(env: Env, region: Region, values: Sequence[Any]) -> Env:
    return {**env, **dict(zip((p.name for p in region.params), values, strict=True))}


def backoff_s(attempt: int) -> float:
    """Seconds to wait before trying again after the attempt of that number (from 0): 50 ms, doubled, at most 2 s."""
    return float(min(0.05 * 2**attempt, 2.0))


def node_timeout(label: str, timeout_s: float, op: Op) -> NodeTimeoutError:
    where = f" at {op.loc.file}:{op.loc.line}" if op.loc is not None and op.loc.line else ""
    return NodeTimeoutError(f"`{label}`{where} took longer than its timeout of {timeout_s:g} s", loc=op.loc)


def no_such_tool(name: Any, names: Sequence[str]) -> KeyError:
    """What looking a tool up by an unknown name raises."""
    error = KeyError(name)
    error.add_note(f"the tools are: {', '.join(names)}")
    return error


def recursion_limit() -> int:
    """How deep workflows may call each other: as deep as Python functions may."""
    return sys.getrecursionlimit()
