"""Groups: what runs at once has no order, what is around it does."""

import pytest

from flowc.ir.core import Region
from flowc.ir.effects import order_edges
from flowc.ir.errors import VerifyError
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify


def body(lines: str, ordered: bool = False) -> Region:
    region = parse_graph(f"workflow @w(%q: text, %x: any) -> any {{\n{lines}\nreturn %x\n}}").body
    return Region(region.params, region.ops, region.yields, ordered)


WRITE = 'tool @t (%q) {{writes = ("{0}",), group = {1}}} : any'
AROUND = f"""
%v0 = py "log(x)" (%x) {{writes = ("py",)}} : any
%v1 = {WRITE.format("py", 1)}
%v2 = py "x[0]" (%x) {{raises = true}} : any
%v3 = {WRITE.format("py", 1)}
%v4 = generate @llm (%q) {{group = 1}} : text
%v5 = py "x.y" (%x) {{reads = ("py",)}} : any
%v6 = py "log(x)" (%x) {{writes = ("py",)}} : any
"""


def test_dataflow() -> None:
    assert order_edges(body(AROUND)) == [(), (0,), (), (0, 2), (), (1, 3), (1, 2, 3, 4, 5)]


def test_program_order() -> None:
    assert order_edges(body(AROUND, ordered=True)) == [(), (0,), (0,), (2,), (2,), (1, 2, 3, 4), (5,)]


def test_nothing_stands_before_the_first_member() -> None:
    lines = f"%v0 = {WRITE.format('py', 1)}\n%v1 = {WRITE.format('py', 1)}\n%v2 = search @i (%q) : docs"
    assert order_edges(body(lines)) == [(), (), ()]
    assert order_edges(body(lines, ordered=True)) == [(), (), (0, 1)]


def test_one_group_after_another() -> None:
    lines = "\n".join(f"%v{i} = {WRITE.format('py', 1 + i // 2)}" for i in range(4))
    for ordered in (False, True):
        assert order_edges(body(lines, ordered)) == [(), (), (0, 1), (0, 1)]


def test_states_are_told_apart() -> None:
    lines = f"""
%v0 = {WRITE.format("a", 1)}
%v1 = tool @t (%q) {{reads = ("a", "b"), group = 1}} : any
%v2 = tool @t (%q) {{reads = ("a",), raises = false}} : any
%v3 = tool @t (%q) {{writes = ("b",), raises = false}} : any
"""
    assert order_edges(body(lines)) == [(), (), (0,), (0, 1)]


def test_what_stands_between_and_needs_order_ends_the_group() -> None:
    lines = f"""
%v0 = {WRITE.format("py", 1)}
%v1 = py "x.y" (%x) {{reads = ("py",)}} : any
%v2 = {WRITE.format("py", 1)}
"""
    assert order_edges(body(lines)) == [(), (0,), (0, 1)]
    with pytest.raises(VerifyError, match="`py` stands between operations of group 1") as caught:
        verify(parse_graph(f"workflow @w(%q: text, %x: any) -> any {{\n{lines}\nreturn %x\n}}"))
    assert caught.value.code == "F028"


def test_pure_operations_may_stand_between_and_groups_print() -> None:
    text = f"workflow @w(%q: text, %x: any) -> any {{\n{AROUND}\nreturn %x\n}}"
    graph = parse_graph(text)
    verify(graph)
    assert parse_graph(print_graph(graph)) == graph
    assert "group = 1}" in print_graph(graph)


def test_groups_are_numbers() -> None:
    with pytest.raises(VerifyError, match="attribute `group` of `tool` is an int"):
        verify(parse_graph('workflow @w(%q: text) -> any { %a = tool @t (%q) {group = "a"} : any return %a }'))
