"""Text is the graph: whatever prints parses back, and whatever parses was written with care for errors."""

from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.ir.core import Attrs, Graph, Op, Region, walk
from flowc.ir.errors import ParseError
from flowc.ir.parser import parse_graph
from flowc.ir.printer import all_graphs, print_graph, print_op
from flowc.ir.verifier import verify
from tests.strategies import graphs, without_locs


def exact(graph: Graph) -> list[object]:
    """Every attribute with its class: `1`, `1.0` and `True` are equal to Python, and so are `0.0` and `-0.0`."""
    return [
        (g.name, [(op.name, sorted((k, repr(v)) for k, v in op.attrs.items())) for op in walk(g.body)])
        for g in all_graphs(graph)
    ]


@given(graphs())
@settings(max_examples=300)
def test_what_prints_parses_back(graph: Graph) -> None:
    verify(graph)
    text = print_graph(graph)
    again = parse_graph(text)
    assert again == graph
    assert exact(again) == exact(graph)
    assert print_graph(again) == text


@given(graphs())
@settings(max_examples=100)
def test_text_is_portable(graph: Graph) -> None:
    text = print_graph(graph)
    text.encode("utf-8")  # no lone surrogates
    assert all(c == "\n" or c.isprintable() for c in text)
    assert text.splitlines() == text.split("\n")[:-1]
    assert all(line == line.rstrip() for line in text.split("\n"))
    assert parse_graph(text.replace("\n", "\r\n")) == graph
    assert parse_graph("\ufeff" + text) == graph


@given(graphs())
@settings(max_examples=100)
def test_without_locations(graph: Graph) -> None:
    bare = without_locs(graph)
    text = print_graph(graph, locs=False)
    assert text == print_graph(bare)
    assert parse_graph(text) == bare


@given(graphs())
@settings(max_examples=100)
def test_an_operation_alone_is_one_line(graph: Graph) -> None:
    for op in walk(graph.body):
        line = print_op(op)
        assert "\n" not in line
        assert op.name in line


@given(graphs(max_ops=5), st.data())
@settings(max_examples=400)
def test_damaged_text_is_a_parse_error_with_a_place(graph: Graph, data: st.DataObject) -> None:
    text = print_graph(graph)
    start = data.draw(st.integers(0, len(text) - 1))
    length = data.draw(st.integers(0, 12))
    inserted = data.draw(
        st.sampled_from(
            ("", " ", "\n", '"', '"""', "{", "}", "(", ")", "%", "%x", "=", ",", ":", "\\", "@", "é", "-", "1e", "seq")
        )
    )
    damaged = text[:start] + inserted + text[start + length :]
    error: ParseError | None = None
    try:
        again = parse_graph(damaged, "damaged.flow")
        assert parse_graph(print_graph(again)) == again
    except ParseError as e:
        error = e
    if error is not None:
        assert error.loc is not None
        assert error.loc.file == "damaged.flow"
        lines = damaged.split("\n")
        assert 1 <= error.loc.line <= len(lines)
        assert 0 <= error.loc.col <= len(lines[error.loc.line - 1])
        assert error.loc.end_col > error.loc.col
        assert error.code in {"F030", "F031", "F032", "F033", "F034"}
        assert not error.message.endswith("expected ")


@given(graphs())
@settings(max_examples=100)
def test_attributes_stand_in_the_order_of_the_table(graph: Graph) -> None:
    def turned(region: Region) -> Region:
        ops = [
            Op(
                op.name,
                op.operands,
                op.results,
                Attrs(reversed(op.attrs.items())),
                tuple(map(turned, op.regions)),
                op.loc,
            )
            for op in region.ops
        ]
        return Region(region.params, tuple(ops), region.yields, region.ordered)

    assert print_graph(graph.with_body(turned(graph.body))) == print_graph(graph)
