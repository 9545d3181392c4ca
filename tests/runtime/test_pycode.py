"""Python text as functions: live names, places in tracebacks, results that are not bound, fused regions."""

from __future__ import annotations

import asyncio
import sys
import traceback
from types import CellType
from typing import Any

import pytest

from flowc.ir.builder import Builder
from flowc.ir.core import Attrs, Op, Scope, Value
from flowc.ir.errors import CompileError, Loc
from flowc.ir.types import ANY, INT
from flowc.ir.values import UNDEF
from flowc.runtime import pycode


def py(
    source: str, *params: str, outs: tuple[str, ...] | None = None, loc: Loc | None = None, is_async: bool = False
) -> Op:
    attrs: dict[str, Any] = {"source": source, "params": params}
    if outs is not None:
        attrs["outs"] = outs
    if is_async:
        attrs["is_async"] = True
    values = tuple(Value(p, ANY) for p in params)
    results = tuple(Value(f"r.{n}", ANY) for n in (outs if outs is not None else ("v",)))
    return Op("py", values, results, Attrs(attrs), (), loc)


def scope(**names: Any) -> Scope:
    return Scope({"__name__": "user", **names}, {}, "user.py", "answer")


def test_globals_are_live_and_not_written_to() -> None:
    names = scope(g=1)
    fn = pycode.py_function(py("x + g", "x"), names)
    assert fn(1) == 2
    names.globals["g"] = 10
    assert fn(1) == 11
    statements = pycode.py_function(py("t = x + g\ny = t", "x", outs=("y",)), names)
    before = set(names.globals)
    assert statements(1) == 11
    assert set(names.globals) - before <= {"__builtins__"}


def test_closure_cells_are_live() -> None:
    cell = CellType(1)
    names = Scope({"__name__": "user"}, {"n": cell, "unused": CellType()}, "user.py", "answer")
    fn = pycode.py_function(py("x + n", "x"), names)
    assert fn(1) == 2
    cell.cell_contents = 5
    assert fn(1) == 6
    pycode.py_function(py("nonlocal n\nn = x", "x", outs=()), names)(9)
    assert cell.cell_contents == 9


def test_an_unset_cell_is_a_name_error() -> None:
    fn = pycode.py_function(py("n", outs=None), Scope({"__name__": "user"}, {"n": CellType()}, "user.py", "answer"))
    with pytest.raises(NameError, match="n"):
        fn()


@pytest.mark.parametrize(("flag", "expected"), [(True, (1, 2)), (False, (UNDEF, 2))])
def test_results_that_are_not_bound(flag: bool, expected: tuple[Any, Any]) -> None:
    fn = pycode.py_function(py("if flag:\n    a = 1\nb = 2", "flag", outs=("a", "b")), scope())
    assert fn(flag) == expected


def test_an_unbound_operand_is_unbound_inside() -> None:
    fn = pycode.py_function(py("if flag:\n    a = a + 1", "flag", "a", outs=("a",)), scope())
    assert fn(False, UNDEF) is UNDEF
    assert fn(True, 1) == 2
    with pytest.raises(UnboundLocalError):
        fn(True, UNDEF)


def test_deleted_results() -> None:
    assert pycode.py_function(py("a = 1\ndel a", outs=("a",)), scope())() is UNDEF


def test_results_that_inner_functions_share() -> None:
    fn = pycode.py_function(py("n = 0\ndef f():\n    nonlocal n\n    n += 1\n    return n", outs=("n", "f")), scope())
    n, f = fn()
    assert (n, f(), f()) == (0, 1, 2)


def test_async_text() -> None:
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    fn = pycode.py_function(py("await double(x) + 1", "x", is_async=True), scope(double=double))
    assert asyncio.run(fn(3)) == 7


@pytest.mark.parametrize(
    ("source", "outs", "line"),
    [
        ("1 // x", None, 40),
        ("a = 1\nb = 2\nc = 1 // x", ("c",), 42),
        ("[1 // y for y in [1, x]]", None, 40),
        ("(1 +\n 1 // x)", None, 41),
    ],
)
def test_tracebacks_stand_at_the_users_line(source: str, outs: tuple[str, ...] | None, line: int) -> None:
    op = py(source, "x", outs=outs, loc=Loc("user.py", 40, 4, 10))
    fn = pycode.py_function(op, scope())
    with pytest.raises(ZeroDivisionError) as caught:
        fn(0)
    last = traceback.extract_tb(caught.value.__traceback__)[1]
    assert (last.filename, last.lineno, last.name) == ("user.py", line, "answer")


def test_the_same_text_on_many_lines_is_compiled_once_and_moved() -> None:
    names = scope()
    first = pycode.py_function(py("[1 // y for y in [x]]", "x", loc=Loc("user.py", 10)), names)
    size = len(pycode._code_cache)
    second = pycode.py_function(py("[1 // y for y in [x]]", "x", loc=Loc("user.py", 30)), names)
    assert len(pycode._code_cache) == size
    for fn, line in ((first, 10), (second, 30)):
        with pytest.raises(ZeroDivisionError) as caught:
            fn(0)
        assert {f.lineno for f in traceback.extract_tb(caught.value.__traceback__)[1:]} == {line}


def test_text_that_is_no_python() -> None:
    with pytest.raises(CompileError, match="no Python") as caught:
        pycode.py_function(py("1 +", loc=Loc("user.py", 7)), scope())
    assert caught.value.loc == Loc("user.py", 7)


def test_a_parameter_may_have_the_name_of_a_cell() -> None:
    names = Scope({"__name__": "user"}, {"x": CellType("cell")}, "user.py", "answer")
    assert pycode.py_function(py("x", "x"), names)("given") == "given"


# -- templates
@pytest.mark.parametrize(
    ("text", "values", "formats", "expected"),
    [
        ("a {} b {}", (1, "x"), None, "a 1 b x"),
        ("{{}} {}", ("x",), None, "{} x"),
        ("", (), None, ""),
        ("{}", ("x",), ("!r",), "'x'"),
        ("{}|{}", (3.14159, "x"), (":.2f", "!r:>6"), "3.14|   'x'"),
    ],
)
def test_templates(text: str, values: tuple[Any, ...], formats: tuple[str, ...] | None, expected: str) -> None:
    attrs: dict[str, Any] = {"text": text}
    if formats:
        attrs["formats"] = formats
    op = Op("template", tuple(Value(f"v{i}", ANY) for i in range(len(values))), (Value("t", ANY),), Attrs(attrs))
    assert pycode.template_function(op, scope())(*values) == expected


# -- handlers
def matcher(*handlers: str, params: tuple[str, ...] = (), **names: Any) -> Any:
    op = Op("try", (), (), Attrs({"handlers": handlers, "params": params}), (), Loc("user.py", 5))
    return pycode.handler_matcher(op, scope(**names))


def test_matching_is_lazy_and_in_order() -> None:
    match = matcher("KeyError", "(ValueError, OSError)", "Undefined")
    assert match(KeyError(1)) == 0
    assert match(FileNotFoundError()) == 1
    error = RuntimeError("first")
    with pytest.raises(NameError) as caught:
        match(error)
    assert caught.value.__context__ is error


def test_matching_leaves_the_error_as_it_was() -> None:
    try:
        raise ValueError("x")
    except ValueError as e:
        error, trace = e, e.__traceback__
    assert matcher("KeyError")(error) == -1
    assert error.__traceback__ is trace
    assert error.__context__ is None


def test_a_bare_handler_takes_everything() -> None:
    assert matcher("ValueError", "")(KeyboardInterrupt()) == 1
    assert matcher("Exception")(KeyboardInterrupt()) == -1


def test_types_come_from_operands() -> None:
    assert matcher("kinds", params=("kinds",))(KeyError(), (KeyError, ValueError)) == 0
    with pytest.raises(TypeError, match="catching classes"):
        matcher("kinds", params=("kinds",))(KeyError(), 3)


def test_a_handled_error_is_seen_by_sys_exc_info() -> None:
    error = ValueError("handled")
    seen = pycode.while_handling(lambda: sys.exc_info()[1])(error)
    assert seen is error
    with pytest.raises(KeyError) as caught:
        pycode.while_handling(lambda: dict[str, int]()["x"])(error)
    assert caught.value.__context__ is error


# -- fused
def fused(b: Builder, block: Any) -> Op:
    return Op(
        "fused",
        (),
        tuple(Value(f"out{i}", ANY) for i in range(len(block.yields))),
        Attrs(),
        (block.done(),),
        Loc("user.py", 1),
    )


def run_fused(op: Op, names: Scope, *args: Any) -> Any:
    return pycode.fused_function(op, names, lambda _: names, "answer")[0](*args)


def test_fused_statements_keep_their_lines() -> None:
    b = Builder("answer", [("x", INT)])
    with b.region() as block:
        (a,) = b.py("x + 1", b.params[0], params=["x"], loc=Loc("user.py", 10))
        (c,) = b.py("t = y * 2\nz = 1 // t", a, params=["y"], outs=["z"], loc=Loc("user.py", 20))
        block.yields = (a, c)
    op = fused(b, block)
    assert run_fused(op, scope(), 1) == (2, 0)
    with pytest.raises(ZeroDivisionError) as caught:
        run_fused(op, scope(), -1)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert [(f.filename, f.lineno, f.name) for f in frames[2:]] == [("user.py", 21, "answer")]


def test_fused_text_with_scopes_of_its_own() -> None:
    b = Builder("answer", [("x", INT)])
    with b.region() as block:
        (a,) = b.py("(lambda y: y + x)(1)", b.params[0], params=["x"])
        (c,) = b.py("[x + i for i in range(y)]", a, b.params[0], params=["y", "x"])
        (d,) = b.py("sum(x for x in y)", c, params=["y"])
        (e,) = b.py("[y for y in y]", c, params=["y"])
        (f,) = b.py("def g(n):\n    return n * k\nr = g(2)", d, params=["k"], outs=["r"])
        (g,) = b.py("(q := k) + q", d, params=["k"])
        block.yields = (a, c, d, e, f, g)
    a1, c1, d1, e1, f1, g1 = run_fused(fused(b, block), scope(), 2)
    assert (a1, c1, d1, e1, f1, g1) == (3, [2, 3, 4], 9, [2, 3, 4], 18, 18)


def test_fused_names_do_not_meet() -> None:
    """The same names in the text of different ops are different variables, and none is the module's."""
    names = scope(t=100, x=200)
    b = Builder("answer", [("p", INT)])
    with b.region() as block:
        (a,) = b.py("t = x + 1\ny = t", b.params[0], params=["x"], outs=["y"])
        (c,) = b.py("t + x", params=[])
        (d,) = b.py("t = y\nt += 1", a, params=["y"], outs=["t"])
        (e,) = b.py("x, y = y, x", a, d, params=["x", "y"], outs=["x"])
        block.yields = (a, c, d, e)
    assert run_fused(fused(b, block), names, 1) == (2, 300, 3, 3)
    assert names.globals["t"] == 100


def test_fused_unbound_locals_fail_as_they_would() -> None:
    b = Builder("answer", [("p", INT)])
    with b.region() as block:
        (a,) = b.py("y = t\nt = 1", params=[], outs=["y"])
        block.yields = (a,)
    with pytest.raises(UnboundLocalError, match="'t'"):
        run_fused(fused(b, block), scope())


def test_fused_reads_cells_live() -> None:
    cell = CellType(1)
    names = Scope({"__name__": "user"}, {"n": cell}, "user.py", "answer")
    b = Builder("answer", [("p", INT)])
    with b.region() as block:
        (a,) = b.py("x + n", b.params[0], params=["x"])
        block.yields = (a,)
    fn, _ = pycode.fused_function(fused(b, block), names, lambda _: names, "answer")
    assert fn(1) == 2
    cell.cell_contents = 10
    assert fn(1) == 11


def test_fused_of_other_scopes_sees_theirs() -> None:
    mine, other = scope(g=1), Scope({"__name__": "other", "g": 2}, {}, "other.py", "inner")
    b = Builder("answer")
    with b.region() as block:
        (a,) = b.py("g", params=[])
        (c,) = b.py("g", params=[], scope="other")
        block.yields = (a, c)
    fn, _ = pycode.fused_function(fused(b, block), mine, lambda op: other if op.attrs.get("scope") else mine, "answer")
    assert fn() == (1, 2)


def test_fused_that_awaits() -> None:
    async def double(x: int) -> int:
        await asyncio.sleep(0)
        return 2 * x

    b = Builder("answer", [("x", INT)])
    with b.region() as block:
        (a,) = b.py("await double(x)", b.params[0], params=["x"], is_async=True)
        (c,) = b.py("y + 1", a, params=["y"])
        block.yields = (c,)
    names = scope(double=double)
    fn, is_async = pycode.fused_function(fused(b, block), names, lambda _: names, "answer")
    assert is_async
    assert asyncio.run(fn(4)) == 9
