"""Every operation, through the driver (as captured and pruned, traced and not) and the reference: the same value."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Attrs, Graph, Scope
from flowc.ir.errors import CompileError
from flowc.ir.types import ANY, INT, TEXT
from flowc.ir.values import Doc, Docs
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from flowc.runtime.reference import interpret
from flowc.runtime.trace import Trace
from tests.runtime.worlds import ScriptedLLM, World, pruned


def run(graph: Graph, *args: Any, world: World | None = None) -> Any:
    """The value, which every way of running gives alike."""
    values = [interpret(graph, args, world or World())]
    for plan in (build_plan(graph), build_plan(pruned(graph))):
        with Runtime(world or World()) as runtime:
            values.append(runtime.run(plan, args))
            values.append(runtime.run(plan, args, trace=Trace()))
            values.append(asyncio.run(runtime.run_async(plan, args)))
            (outcome,) = runtime.map(plan, [args])
            assert outcome.error is None
            values.append(outcome.value)
    assert all(v == values[0] and type(v) is type(values[0]) for v in values), values
    return values[0]


def one(kind: str, *values: Any, symbols: dict[str, Any] | None = None, **attrs: Any) -> Any:
    """The value of a single op over parameters."""
    b = Builder("w", [(f"x{i}", ANY) for i in range(len(values))])
    b.symbols.update(symbols or {})
    (v,) = b.emit(kind, b.params, [("v", ANY)], attrs)
    return run(b.finish(v), *values)


# -- plain values
def test_const_and_undef() -> None:
    b = Builder("w")
    a, c = b.const(("x", 1, None)), b.const(None)
    (v,) = b.py("[a, c]", a, c, params=["a", "c"])
    assert run(b.finish(v)) == [("x", 1, None), None]
    b = Builder("w")
    assert run(b.finish(b.const("just this"))) == "just this"


def test_a_parameter_is_a_result() -> None:
    b = Builder("w", [("x", ANY)])
    assert run(b.finish(b.params[0]), 7) == 7


def test_lists() -> None:
    mine = [1]
    assert one("append", mine, 2) == [1, 2]
    assert one("concat", mine, (2, 3)) == [1, 2, 3]
    assert mine == [1]


@pytest.mark.parametrize(
    ("value", "literal", "expected"),
    [(1, 1, True), ("a", "b", False), (1, True, False), (None, None, True), (0, None, False), (1.0, 1, True)],
)
def test_equals(value: Any, literal: Any, expected: bool) -> None:
    assert one("equals", value, value=literal) is expected


def test_bound() -> None:
    assert one("bound", 5, variable="x") == 5


def test_python_with_no_and_many_results() -> None:
    b = Builder("w", [("xs", ANY)], scope="s")
    b.scopes["s"] = Scope({"__name__": "user"}, {}, "user.py", "w")
    b.py("xs.append(1)", b.params[0], params=["xs"], outs=[], types=[])
    x, y, z = b.py(
        "a = len(xs)\nb = a + 1\nc = b + 1", b.params[0], params=["xs"], outs=["a", "b", "c"], types=[INT] * 3
    )
    (v,) = b.py("(x, y, z)", x, y, z, params=["x", "y", "z"])
    with Runtime(World()) as runtime:
        assert runtime.run(build_plan(b.finish(v)), ([],)) == (1, 2, 3)


def test_cells() -> None:
    b = Builder("w", [("x", INT)])
    (cell,) = b.emit("cell", [b.params[0]])
    (before,) = b.emit("load", [cell])
    b.emit("store", [cell, b.const(9)])
    (after,) = b.emit("load", [cell])
    (v,) = b.py("[before, after]", before, after, params=["before", "after"])
    assert run(b.finish(v), 1) == [1, 9]


# -- resources
def test_search_embed_rerank() -> None:
    docs = one("search", "q", resource="docs", k=2)
    assert docs == Docs([Doc(0, "q/0"), Doc(1, "q/1")])
    assert len(one("search", "q", resource="docs")) == 4
    assert len(one("search", "q", 3, resource="docs", kw=("k",))) == 3
    assert one("embed", "abc", resource="e") == (3.0, 1.0)
    assert one("rerank", "q", docs, resource="r", k=1) == Docs([Doc(1, "q/1")])
    assert len(one("rerank", "q", list(docs), resource="r")) == 2


def test_generate_choose_parse() -> None:
    class Model:
        def __init__(self, text: str) -> None:
            self.text = text

        @classmethod
        def model_validate_json(cls, text: str) -> Any:
            return cls(text)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Model) and other.text == self.text

    assert one("generate", "hi", resource="m", max_tokens=4, stop=("\n",)) == "<hi>"
    assert one("generate", "hi", 5, 0.5, resource="m", kw=("max_tokens", "temperature")) == "<hi>"
    assert one("choose", "four", ["a", "b", "c"], resource="m") == "b"
    b = Builder("w", [("p", TEXT)])
    b.symbols["Model"] = Model
    (v,) = b.emit("parse", b.params, [("v", ANY)], {"resource": "m", "model": "Model"})
    world = World(ScriptedLLM(lambda prompt: 'Sure: {"a": {}} done'))
    assert run(b.finish(v), "p", world=world).text == '{"a": {}}'


def test_an_unknown_option() -> None:
    b = Builder("w", [("x", ANY), ("y", ANY)])
    (v,) = b.emit("search", b.params, [("v", ANY)], {"resource": "docs", "kw": ("depth",)})
    with pytest.raises(CompileError, match="no option `depth`"):
        build_plan(b.finish(v))


# -- tools
def add(a: int, b: int = 10, *, c: int = 100) -> int:
    return a + b + c


async def add_later(a: int, *, b: int = 10) -> int:
    await asyncio.sleep(0)
    return a + b


class Declared:
    """As a `@tool` is: an object with its function inside."""

    def __init__(self, fn: Any, **limits: Any) -> None:
        self.fn = fn
        self.__dict__.update(limits)

    def __call__(self, *args: Any) -> Any:
        raise AssertionError("the runtime calls the function itself")


@pytest.mark.parametrize("thread", [None, True, False])
def test_tools_with_keywords(thread: bool | None) -> None:
    tool = Declared(add, thread=thread)
    assert one("tool", 1, tool="add", symbols={"add": tool}) == 111
    assert one("tool", 1, 2, tool="add", symbols={"add": tool}) == 103
    assert one("tool", 1, 3, tool="add", kw=("c",), symbols={"add": tool}) == 14
    assert one("tool", 1, 2, 3, tool="add", kw=("b", "c"), symbols={"add": tool}) == 6


def test_async_tools() -> None:
    assert one("tool", 1, 3, tool="add", kw=("b",), is_async=True, symbols={"add": Declared(add_later)}) == 4
    assert one("tool", 1, tool="add", symbols={"add": add_later}) == 11


def test_objects_and_bound_methods_as_tools() -> None:
    class Caller:
        def __call__(self, x: int) -> int:
            return x + 1

        def method(self, x: int) -> int:
            return x + 2

        async def later(self, x: int) -> int:
            return x + 3

    assert one("tool", 1, tool="t", symbols={"t": Caller()}) == 2
    assert one("tool", 1, tool="t", symbols={"t": Caller().method}) == 3
    assert one("tool", 1, tool="t", symbols={"t": Caller().later}) == 4
    assert one("tool", [3, 1], tool="t", symbols={"t": sorted}) == [1, 3]


def test_invoke() -> None:
    symbols = {"add": Declared(add), "later": add_later}
    assert one("invoke", "add", {"a": 1, "c": 0}, tools=("add", "later"), symbols=symbols) == 11
    assert one("invoke", "later", {"a": 1}, tools=("add", "later"), symbols=symbols) == 11
    with pytest.raises(KeyError, match="'mul'"):
        one("invoke", "mul", {}, tools=("add",), symbols=symbols)
    with pytest.raises(TypeError):
        one("invoke", "add", {"z": 1}, tools=("add",), symbols=symbols)


# -- control flow
def test_if_with_many_and_no_results() -> None:
    b = Builder("w", [("x", ANY)])
    with b.region() as then:
        (a,) = b.py("x * 2", b.params[0], params=["x"])
        then.yields = (a, b.const("then"))
    with b.region() as orelse:
        orelse.yields = (b.params[0], b.const("else"))
    p, q = b.if_(b.params[0], then.done(), orelse.done(), ["p", "q"])
    with b.region() as t2:
        b.py("None", params=[])
    with b.region() as e2:
        pass
    b.emit("if", [b.params[0]], [], None, [t2.done(), e2.done()])
    (v,) = b.py("(p, q)", p, q, params=["p", "q"])
    graph = b.finish(v)
    assert run(graph, 3) == (6, "then")
    assert run(graph, []) == ([], "else")


def test_while_swaps_what_it_carries() -> None:
    b = Builder("w", [("n", INT)])
    with b.region([("i", INT), ("a", INT), ("c", INT)]) as cond:
        cond.yields = b.py("i > 0", cond.params[0], params=["i"])
    with b.region([("i", INT), ("a", INT), ("c", INT)]) as body:
        i, a, c = body.params
        (j,) = b.py("i - 1", i, params=["i"])
        body.yields = (b.const(True), j, c, a)
    _, a, c = b.while_([b.params[0], b.const(1), b.const(2)], cond.done(), body.done(), limit=100)
    (v,) = b.py("(a, c)", a, c, params=["a", "c"])
    graph = b.finish(v)
    assert [run(graph, n) for n in range(3)] == [(1, 2), (2, 1), (1, 2)]


def _each(items: str, *, breaks: bool = False, parallel: bool = False) -> Graph:
    b = Builder("w", [("xs", ANY)])
    (items_value,) = b.py(items, b.params[0], params=["xs"])
    with b.region([("x", ANY)] if parallel else [("x", ANY), ("n", INT)]) as body:
        (one_item,) = b.py("[x, x]", body.params[0], params=["x"], writes=(), raises=False)
        docs = b.search("docs", b.template("{}", body.params[0]), k=1)
        (found,) = b.py("[d.text for d in docs]", docs, params=["docs"], writes=(), raises=False)
        carried = () if parallel else b.py("n + 1", body.params[1], params=["n"], writes=(), raises=False)
        go_on = b.py("x != 2", body.params[0], params=["x"], writes=(), raises=False) if breaks else ()
        body.yields = (*go_on, *carried, one_item, found)
    inits = [] if parallel else [b.const(0)]
    results = b.foreach(items_value, inits, body.done(), collects=2, breaks=breaks, parallel=parallel or None)
    (v,) = b.py("(n, a, c)", *([b.const(0)] if parallel else []), *results, params=["n", "a", "c"])
    return b.finish(v)


def test_foreach() -> None:
    assert run(_each("xs"), [1, 2, 3]) == (3, [1, 1, 2, 2, 3, 3], ["1/0", "2/0", "3/0"])
    assert run(_each("xs"), []) == (0, [], [])
    assert run(_each("xs", breaks=True), [1, 2, 3]) == (2, [1, 1, 2, 2], ["1/0", "2/0"])
    assert run(_each("(y for y in xs)", breaks=True), [1, 2, 3]) == (2, [1, 1, 2, 2], ["1/0", "2/0"])
    assert run(_each("xs"), "ab") == (2, ["a", "a", "b", "b"], ["a/0", "b/0"])


@pytest.mark.parametrize(
    "items", ["xs", "tuple(xs)", "range(len(xs))", "dict.fromkeys(xs)", "(y for y in xs)", "iter(xs)"]
)
def test_parallel_foreach(items: str) -> None:
    value = run(_each(items, parallel=True), [5, 6, 7])
    names = range(3) if "range" in items else [5, 6, 7]
    assert value == (0, [x for n in names for x in (n, n)], [f"{n}/0" for n in names])
    assert run(_each("xs", parallel=True), []) == (0, [], [])


def test_parallel_foreach_inside_itself() -> None:
    b = Builder("w", [("rows", ANY), ("k", INT)])
    with b.region([("row", ANY)]) as outer:
        with b.region([("x", ANY)]) as inner:
            (scaled,) = b.py("[x * k]", inner.params[0], b.params[1], params=["x", "k"], writes=(), raises=False)
            inner.yields = (scaled,)
        (row,) = b.foreach(outer.params[0], [], inner.done(), collects=1, parallel=True)
        (shown,) = b.py("[row]", row, params=["row"], writes=(), raises=False)
        outer.yields = (shown,)
    (v,) = b.foreach(b.params[0], [], outer.done(), collects=1, parallel=True)
    assert run(b.finish(v), [[1, 2], [], [3]], 10) == [[10, 20], [], [30]]


def test_a_list_changed_while_it_is_iterated() -> None:
    b = Builder("w")
    (xs,) = b.py("[1, 2]", params=[])
    with b.region([("x", ANY), ("n", INT)]) as body:
        b.py("xs.append(x) if len(xs) < 4 else None", xs, body.params[0], params=["xs", "x"])
        body.yields = b.py("n + 1", body.params[1], params=["n"])
    (v,) = b.foreach(xs, [b.const(0)], body.done())
    assert run(b.finish(v)) == 4


def test_an_iterator_that_fails() -> None:
    b = Builder("w", [("n", INT)])
    (xs,) = b.py("(1 // (n - i) for i in range(5))", b.params[0], params=["n"])
    with b.region([("x", ANY)]) as body:
        body.yields = b.py("[x]", body.params[0], params=["x"])
    (v,) = b.foreach(xs, [], body.done(), collects=1)
    graph = b.finish(v)
    for plan in (build_plan(graph), build_plan(pruned(graph))):
        with Runtime(World()) as runtime, pytest.raises(ZeroDivisionError):
            runtime.run(plan, (3,))


def test_try() -> None:
    b = Builder("w", [("x", INT), ("kinds", ANY)])
    with b.region() as body:
        body.yields = b.py("100 / x", b.params[0], params=["x"])
    with b.region([("e", ANY)]) as first:
        first.yields = b.py("str(e)", first.params[0], params=["e"])
    with b.region([("e", ANY)]) as second:
        second.yields = (b.const("rest"),)
    attrs = {"handlers": ("kinds", ""), "params": ("kinds",)}
    (v,) = b.emit("try", [b.params[1]], [("v", ANY)], attrs, [body.done(), first.done(), second.done()])
    graph = b.finish(v)
    assert run(graph, 5, KeyError) == 20.0
    assert run(graph, 0, ZeroDivisionError) == "division by zero"
    assert run(graph, 0, KeyError) == "rest"


def test_calls_among_workflows() -> None:
    b = Builder("inner", [("x", INT), ("y", INT)])
    (v,) = b.py("x - y", *b.params)
    inner = b.finish(v)
    b = Builder("outer", [("x", INT)])
    first = b.call(inner, b.params[0], b.const(1))
    assert run(b.finish(b.call(inner, b.const(100), first)), 5) == 96


def test_fused_loops_and_handlers() -> None:
    b = Builder("w", [("n", INT), ("kinds", ANY)])
    with b.region() as fused:
        with b.region([("i", INT), ("acc", ANY)]) as cond:
            cond.yields = b.py("i < n", cond.params[0], b.params[0], params=["i", "n"])
        with b.region([("i", INT), ("acc", ANY)]) as body:
            (i,) = b.py("i + 1", body.params[0], params=["i"])
            acc = b.emit("append", [body.params[1], i])[0]
            (go_on,) = b.py("i != 3", i, params=["i"])
            body.yields = (go_on, i, acc)
        _, acc = b.while_([b.const(0), b.list_of()], cond.done(), body.done(), limit=50)
        with b.region([("x", ANY), ("s", ANY)]) as each:
            (s,) = b.py("s + x", each.params[1], each.params[0], params=["s", "x"])
            (more,) = b.py("s < 4", s, params=["s"])
            (item,) = b.py("[x]", each.params[0], params=["x"])
            each.yields = (more, s, item)
        s, items = b.foreach(acc, [b.const(0)], each.done(), collects=1, breaks=True)
        with b.region() as risky:
            risky.yields = b.py("10 // (n - 2)", b.params[0], params=["n"])
        with b.region([("e", ANY)]) as handler:
            handler.yields = b.py("type(e).__name__", handler.params[0], params=["e"])
        attrs = {"handlers": ("kinds",), "params": ("kinds",)}
        (t,) = b.emit("try", [b.params[1]], [("t", ANY)], attrs, [risky.done(), handler.done()])
        with b.region() as then:
            then.yields = (b.const("big"), s)
        with b.region() as orelse:
            orelse.yields = (b.const("small"), t)
        (big,) = b.emit("equals", [s], attrs={"value": 6})
        size, shown = b.if_(big, then.done(), orelse.done(), ["size", "shown"])
        text = b.template("{}-{}", size, shown, formats=["!r", ":>3"])
        joined = b.emit("concat", [items, acc])[0]
        (cell,) = b.emit("cell", [text])
        b.emit("store", [cell, b.template("{}!", text)])
        (loaded,) = b.emit("load", [cell])
        fused.yields = (loaded, joined, t)
    out = b.emit("fused", [], [("a", ANY), ("b", ANY), ("c", ANY)], None, [fused.done()])
    (v,) = b.py("(a, b, c)", *out, params=["a", "b", "c"])
    graph = b.finish(v)
    assert run(graph, 2, ZeroDivisionError) == (
        "'small'-ZeroDivisionError!",
        [1, 2, 1, 2],
        "ZeroDivisionError",
    )
    assert run(graph, 5, KeyError) == ("'big'-  6!", [1, 2, 3, 1, 2, 3], 3)


def test_the_number_of_arguments_is_checked() -> None:
    b = Builder("w", [("x", INT)])
    graph = b.finish(b.params[0])
    with Runtime(World()) as runtime, pytest.raises(TypeError, match="takes 1 value"):
        runtime.run(build_plan(graph), ())


def test_names_that_are_not_there() -> None:
    b = Builder("w", scope="no_such_module:f")
    (v,) = b.py("1", params=[])
    with pytest.raises(CompileError, match="no_such_module"):
        build_plan(b.finish(v))
    b = Builder("w")
    (v,) = b.emit("tool", [], [("v", ANY)], {"tool": "gone", "ref": "json:gone"})
    with pytest.raises(CompileError, match="`gone`"):
        build_plan(b.finish(v))
    b = Builder("w")
    (v,) = b.emit("call", [], [("v", ANY)], {"callee": "gone"})
    with pytest.raises(CompileError, match="@gone"):
        build_plan(b.finish(v))


def test_names_found_by_import(tmp_path: Any) -> None:
    file = tmp_path / "mine.py"
    file.write_text("K = 5\ndef helper(x):\n    return x * K\ndef answer(x):\n    return helper(x)\n")
    b = Builder("answer", [("x", INT)], scope=f"{file}:answer")
    (v,) = b.py("helper(x) + K", b.params[0], params=["x"])
    (u,) = b.emit("tool", [v], [("u", ANY)], {"tool": "helper", "ref": f"{file}:helper"})
    (w,) = b.emit("tool", [u], [("w", ANY)], {"tool": "dumps", "ref": "json:dumps"})
    assert run(b.finish(w), 2) == "75"


def test_attrs_are_left_alone() -> None:
    """A plan never writes into the graph it was made from."""
    b = Builder("w", [("q", TEXT)])
    graph = b.finish(b.search("docs", b.params[0], k=1))
    before = [op.attrs for op in graph.body.ops]
    run(graph, "q")
    assert [op.attrs for op in graph.body.ops] == before
    assert all(isinstance(a, Attrs) for a in before)
