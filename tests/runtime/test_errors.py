"""Errors: their class, their traceback (the user's frames and no others), their note, and which of several wins."""

from __future__ import annotations

import asyncio
import traceback
from pathlib import Path
from typing import Any

import pytest

from flowc import workflow
from flowc.ir.builder import Builder
from flowc.ir.core import Graph, Scope
from flowc.ir.errors import Loc, LoopLimitError, OperationTypeError, ResourceError
from flowc.ir.types import ANY, INT, TEXT
from flowc.ir.values import UNDEF
from flowc.runtime.clock import VirtualLoop
from flowc.runtime.engine import Runtime
from flowc.runtime.plan import build_plan
from tests.runtime.worlds import World, pruned, text_graph


def frames(error: BaseException) -> list[tuple[str, int | None, str]]:
    return [(Path(f.filename).name, f.lineno, f.name) for f in traceback.extract_tb(error.__traceback__)]


def fails(graph: Graph, *args: Any, world: World | None = None) -> BaseException:
    with Runtime(world or World()) as runtime:
        try:
            runtime.run(build_plan(graph), args)
        except BaseException as error:
            return error
    raise AssertionError("it did not fail")


def lookup(x: Any) -> Any:
    return {}[x]


def test_an_operations_error_has_its_line_and_a_note() -> None:
    error = fails(text_graph(), "bad question")
    assert type(error) is ValueError
    assert frames(error)[-1] == ("qa.py", 12, "answer")
    assert error.__notes__ == ["in `search @pydocs` at qa.py:12, workflow answer"]


def test_a_backends_own_frames_stay() -> None:
    error = fails(text_graph(), "broken")
    assert type(error) is ArithmeticError
    assert [f[::2] for f in frames(error)[-2:]] == [("qa.py", "answer"), ("worlds.py", "search")]


def test_no_frame_of_flowc() -> None:
    b = Builder("inner", [("x", ANY)], loc=Loc("inner.py", 3))
    inner = b.finish(b.tool(lookup, "lookup", b.params[0]))
    b = Builder("outer", [("x", ANY)], loc=Loc("outer.py", 7))
    error = fails(b.finish(b.call(inner, b.params[0])), "key")
    assert type(error) is KeyError
    own = Path(__file__).name
    assert [f[::2] for f in frames(error)] == [
        (own, "fails"),
        ("outer.py", "outer"),
        ("inner.py", "inner"),
        (own, "lookup"),
    ]


def test_async_runs_show_no_frame_of_flowc_either() -> None:
    b = Builder("outer", [("x", ANY)], loc=Loc("outer.py", 7))

    async def find(x: Any) -> Any:
        await asyncio.sleep(0)
        return lookup(x)

    plan = build_plan(b.finish(b.tool(find, "find", b.params[0])))

    async def user() -> None:
        with Runtime(World()) as runtime:
            await runtime.run_async(plan, ("key",))

    with pytest.raises(KeyError) as caught:
        asyncio.run(user())
    own = Path(__file__).name
    names = [f[::2] for f in frames(caught.value) if f[0] in (own, "outer.py") or "flowc" in f[0]]
    assert names[1:] == [(own, "user"), ("outer.py", "outer"), (own, "find"), (own, "lookup")]


def test_plain_python_fails_at_its_own_line() -> None:
    b = Builder("answer", [("x", INT)], scope="s")
    b.scopes["s"] = Scope({"__name__": "user"}, {}, "user.py", "answer")
    (v,) = b.py("1 // x", b.params[0], params=["x"], loc=Loc("user.py", 30))
    error = fails(b.finish(v), 0)
    assert frames(error)[-1] == ("user.py", 30, "answer")
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize(("question", "got"), [(3, "int (3)"), (None, "NoneType (None)"), (b"x", "bytes")])
def test_a_wrong_type_names_the_operation(question: Any, got: str) -> None:
    error = fails(text_graph(), question)
    assert isinstance(error, OperationTypeError)
    assert isinstance(error, TypeError)
    assert "the query of `search` must be a str, not " + got in str(error)
    assert "qa.py:12" in str(error)


def test_wrong_types_of_the_other_operations() -> None:
    def one(kind: str, *values: Any, **attrs: Any) -> str:
        b = Builder("w", [(f"x{i}", ANY) for i in range(len(values))])
        (v,) = b.emit(kind, b.params, [("v", ANY)], {"resource": "r", **attrs})
        error = fails(b.finish(v), *values)
        assert isinstance(error, TypeError), error
        return str(error).splitlines()[0]

    assert "the prompt of `generate` must be a str" in one("generate", 1)
    assert "the options of `choose` must be a list of str" in one("choose", "p", "abc")
    assert "the options of `choose` must be a list of str" in one("choose", "p", [1])
    assert "the passages of `rerank` must be Docs" in one("rerank", "q", ["text"])
    assert "the text of `embed` must be a str" in one("embed", None)
    assert "`k` of `search` must be an int" in one("search", "q", "four", kw=("k",))
    assert "`temperature` of `generate` must be a number" in one("generate", "p", "hot", kw=("temperature",))


def test_a_missing_resource() -> None:
    b = Builder("w", [("q", TEXT)], loc=Loc("qa.py", 3))
    error = fails(b.finish(b.search("missing", b.params[0])), "q")
    assert isinstance(error, ResourceError)
    assert error.loc == Loc("qa.py", 3)


def test_a_loop_that_reaches_its_bound() -> None:
    b = Builder("w", [("x", INT)], loc=Loc("loop.py", 9))
    with b.region([("n", INT)]) as cond:
        cond.yields = (b.const(True),)
    with b.region([("n", INT)]) as body:
        (n,) = b.py("n + 1", body.params[0], params=["n"])
        body.yields = (b.const(True), n)
    (v,) = b.while_([b.params[0]], cond.done(), body.done(), limit=5)
    error = fails(b.finish(v), 0)
    assert isinstance(error, LoopLimitError)
    assert "loop.py:9" in str(error)
    assert "5 iterations" in str(error)


def test_recursion_ends_as_in_python() -> None:
    b = Builder("down", [("n", INT)])
    g = Graph("down", b.block.done())  # calls itself by name
    (m,) = b.py("n + 1", b.params[0], params=["n"])
    (v,) = b.emit("call", [m], [("v", ANY)], {"callee": "down"})
    g = b.finish(v)
    error = fails(g, 0)
    assert type(error) is RecursionError


def test_recursion_that_ends() -> None:
    b = Builder("down", [("n", INT)])
    (done,) = b.py("n <= 0", b.params[0], params=["n"], writes=(), raises=False)
    with b.region() as then:
        then.yields = (b.params[0],)
    with b.region() as orelse:
        (m,) = b.py("n - 1", b.params[0], params=["n"], writes=(), raises=False)
        (v,) = b.emit("call", [m], [("v", ANY)], {"callee": "down"})
        orelse.yields = (v,)
    graph = b.finish(b.if_(done, then.done(), orelse.done())[0])
    with Runtime(World()) as runtime:
        assert runtime.run(build_plan(graph), (800,)) == 0


def test_an_unbound_variable() -> None:
    b = Builder("w")
    (u,) = b.emit("undef")
    (v,) = b.emit("bound", [u], attrs={"variable": "draft"})
    error = fails(b.finish(v))
    assert type(error) is UnboundLocalError
    assert str(error) == "cannot access local variable 'draft' where it is not associated with a value"
    assert repr(UNDEF) == "UNDEF"


# -- of several failures the first in program order is the one raised
def _race(delays: list[float], failing: set[int], ordered: bool = False) -> tuple[str, float]:
    loop = VirtualLoop()
    b = Builder("race")
    v = b.none()
    for i, delay in enumerate(delays):

        async def wait(i: int = i, delay: float = delay) -> int:
            await asyncio.sleep(delay)
            if i in failing:
                raise ValueError(f"number {i}")
            return i

        v = b.tool(wait, f"wait{i}")
    graph = b.finish(v)

    async def run() -> str:
        with Runtime(World()) as runtime:
            try:
                return str(await runtime.run_async(build_plan(graph if ordered else pruned(graph)), ()))
            except ValueError as e:
                return str(e)

    async def main() -> tuple[str, float]:
        value = await run()
        return value, asyncio.get_running_loop().time()

    return loop.run(main())


def test_a_late_failure_before_an_early_one_wins() -> None:
    assert _race([3.0, 2.0, 1.0], {0, 2}) == ("number 0", 3.0)


def test_a_failure_waits_for_what_comes_before_it_and_for_nothing_else() -> None:
    assert _race([2.0, 1.0, 9.0], {1}) == ("number 1", 2.0)
    assert _race([2.0, 1.0, 9.0], {1, 2}) == ("number 1", 2.0)
    assert _race([2.0, 1.0, 0.5], {0, 1, 2}) == ("number 0", 2.0)


def test_in_order_nothing_runs_ahead() -> None:
    assert _race([1.0, 1.0, 1.0], {1}, ordered=True) == ("number 1", 2.0)
    assert _race([1.0, 1.0, 1.0], set(), ordered=True) == ("2", 3.0)
    assert _race([1.0, 1.0, 1.0], set()) == ("2", 1.0)


def test_what_comes_after_a_failure_is_not_begun() -> None:
    begun: list[int] = []

    async def slow(x: int) -> int:
        await asyncio.sleep(2)
        return x

    async def fails(x: int) -> int:
        await asyncio.sleep(1)
        raise ValueError(x)

    b = Builder("w", [("x", INT)])
    first = b.tool(slow, "slow", b.params[0])
    second = b.tool(fails, "fails", b.params[0])
    third = b.tool(begun.append, "append", first)

    async def main() -> None:
        with Runtime(World()) as runtime:
            with pytest.raises(ValueError, match="1"):
                await runtime.run_async(build_plan(pruned(b.finish(b.list_of(second, third)))), (1,))

    loop = VirtualLoop()
    loop.run(main())
    assert loop.time() == 2.0
    assert begun == []


def test_errors_in_handlers_are_chained() -> None:
    b = Builder("w", [("x", INT)])
    with b.region() as body:
        body.yields = b.py("1 // x", b.params[0], params=["x"])
    with b.region([("e", ANY)]) as handler:
        docs = b.search("docs", b.const("bad"))
        handler.yields = (docs,)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("ZeroDivisionError",)}, [body.done(), handler.done()])
    error = fails(b.finish(v), 0)
    assert type(error) is ValueError
    assert type(error.__context__) is ZeroDivisionError


def test_raising_the_handled_error_again_is_no_ring() -> None:
    b = Builder("w", [("x", INT)])
    with b.region() as body:
        body.yields = b.py("1 // x", b.params[0], params=["x"])
    with b.region([("e", ANY)]) as handler:
        b.py("raise e", handler.params[0], params=["e"], outs=[], types=[])
        handler.yields = (b.none(),)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("Exception",)}, [body.done(), handler.done()])
    error = fails(b.finish(v), 0)
    assert type(error) is ZeroDivisionError
    assert error.__context__ is None
    traceback.format_exception(error)


def test_handlers_see_the_error_in_sys_exc_info() -> None:
    b = Builder("w", [("x", INT)], scope="s")
    import sys

    b.scopes["s"] = Scope({"sys": sys, "__name__": "user"}, {}, "user.py", "w")
    with b.region() as body:
        body.yields = b.py("1 // x", b.params[0], params=["x"])
    with b.region([("e", ANY)]) as handler:
        with b.region() as then:
            then.yields = b.py("sys.exc_info()[1] is e", handler.params[0], params=["e"])
        with b.region() as orelse:
            orelse.yields = (b.none(),)
        handler.yields = b.if_(b.const(True), then.done(), orelse.done())
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("Exception",)}, [body.done(), handler.done()])
    with Runtime(World()) as runtime:
        assert runtime.run(build_plan(b.finish(v)), (0,)) is True


def test_system_exit_is_nobodys_exception() -> None:
    b = Builder("w")
    with b.region() as body:
        b.py("raise SystemExit(3)", outs=[], types=[])
        body.yields = (b.none(),)
    with b.region([("e", ANY)]) as handler:
        handler.yields = (b.none(),)
    (v,) = b.emit("try", [], [("v", ANY)], {"handlers": ("Exception",)}, [body.done(), handler.done()])
    error = fails(b.finish(v))
    assert isinstance(error, SystemExit)
    assert error.code == 3


@workflow
def failing(x: str) -> int:
    found = int(x)
    return 1 // found


def test_a_workflow_fails_as_plain_python_does() -> None:
    def seen(call: Any) -> list[tuple[str, int | None, str]]:
        with pytest.raises(ZeroDivisionError) as caught:
            call("0")
        return frames(caught.value)[1:]

    assert seen(failing) == seen(failing.fn)
