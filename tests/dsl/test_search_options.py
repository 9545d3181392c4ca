"""`where` and `stop` of a search: literals become attributes, all else operands, nothing is ever on by default."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowc import Bounded, Budget, Doc, Docs, Engine, FlowcError, Index, RunError, workflow
from flowc.engine import bind, default_engine, shutdown
from flowc.ir.options import as_stop, as_where, holds, stop_literal, where_key
from flowc.ir.parser import parse_graph
from flowc.ir.printer import print_graph
from flowc.ir.verifier import verify
from flowc.runtime.protocols import SearchRequest

docs = Index("docs")
FILTER = {"lang": "en"}
STOP = Budget(lists=8)


class Asked:
    """An index that remembers what it was asked."""

    name = "docs"
    max_batch = 8

    def __init__(self) -> None:
        self.requests: list[SearchRequest] = []

    def batch_key(self, request: SearchRequest) -> str:
        return "docs"

    def search(self, requests: Sequence[SearchRequest]) -> list[Docs]:
        self.requests += requests
        return [Docs([Doc(0, r.query)]) for r in requests]

    def close(self) -> None: ...


@pytest.fixture
def engine() -> Iterator[Engine]:
    shutdown()
    bind(index={"docs": Asked()})
    yield default_engine()
    shutdown()


@workflow
def literals(q: str) -> Docs:
    return docs.search(q, where={"year": {">=": 2020, "<": 2024}, "kind": ["b", "a"], "ok": True}, stop=Bounded(0.05))


@workflow
def values(q: str, year: int) -> Any:
    a = docs.search(q, where={"year": year}, stop=STOP)
    return a + docs.search(q, where=FILTER, stop=Budget(seconds=0.5))


@workflow
def plain(q: str) -> Any:
    return docs.search(q, where=None, stop=None) + docs.search(q, k=2, nprobe=3)


@workflow
def wrong(q: str) -> Docs:
    return docs.search(q, where={"year": {"~": 3}})


def asked(engine: Engine) -> list[SearchRequest]:
    backend = engine.resources.index("docs")
    out = list(backend.requests)
    backend.requests.clear()
    return out


@pytest.mark.parametrize("run", [plain, values, literals], ids=lambda w: str(w.name))
def test_compiled_and_eager_ask_the_same(engine: Engine, run: Any) -> None:
    args = ("q", 2021)[: len(run.signature.parameters)]
    run.eager(*args)
    eager = asked(engine)
    for level in range(4):
        run.compile(opt=level)(*args)
        again = asked(engine)
        assert sorted(map(repr, again)) == sorted(map(repr, eager))
    assert all((r.stop is None and r.where is None) == (run is plain) for r in eager)


def test_literals_are_attributes_that_print_and_parse(engine: Engine) -> None:
    graph = literals.graph()
    (search,) = graph.body.ops
    assert search.attrs["stop"] == ("bounded", 0.05)
    assert search.attrs["where"] == (
        ("kind", "in", ("a", "b")),
        ("ok", "==", True),
        ("year", "<", 2024),
        ("year", ">=", 2020),
    )
    assert parse_graph(print_graph(graph)) == graph
    verify(graph)
    literals("q")
    (request,) = asked(engine)
    assert request.stop == Bounded(0.05)
    assert request.where == search.attrs["where"]


def test_an_early_stop_is_said_and_nothing_else_is(engine: Engine) -> None:
    assert "approximate    search @docs may stop early, asked for by name (A)" in literals.compile().explain()
    assert "approximate" in values.compile(opt=0).explain()
    for level in range(4):
        assert "approximate" not in plain.compile(opt=level).explain()


def test_searches_that_may_stop_early_are_not_merged(engine: Engine) -> None:
    @workflow
    def twice(q: str) -> Any:
        return docs.search(q, stop=Budget(lists=1)) + docs.search(q, stop=Budget(lists=1))

    @workflow
    def exactly(q: str) -> Any:
        return docs.search(q, where={"a": 1}) + docs.search(q, where={"a": 1}) + docs.search(q, where={"a": True})

    twice("q")
    assert len(asked(engine)) == 2
    exactly("q")
    assert len(asked(engine)) == 2


def test_a_filter_that_makes_no_sense_is_an_error_where_python_has_it(engine: Engine) -> None:
    for run in (wrong.eager, wrong, wrong.compile(opt=0)):
        with pytest.raises(RunError, match=r"`year` has the unknown operator '~': a range takes `<`, `<=`, `>` and"):
            run("q")


# ------------------------------------------------------------------------------------------------ the grammar
@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["lang"], "a mapping of fields"),
        ({1: 2}, "a field of `where` is a text"),
        ({"": 2}, "a field of `where` is a text"),
        ({"a": None}, "not with None"),
        ({"a": float("nan")}, "not with nan"),
        ({"a": {}}, "the range of `a` is empty"),
        ({"a": {"==": 1}}, "unknown operator"),
        ({"a": {"<": True}}, "the limit of `a` < is a number or a text"),
        ({"a": {"<": [1]}}, "the limit of `a` < is a number or a text"),
        ({"a": [1, [2]]}, "compared with texts, numbers"),
    ],
)
def test_what_is_no_filter(where: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_where(where)


@pytest.mark.parametrize("stop", ["x", ("bounded", 2), ("budget", None, None), ("budget", True, None), Bounded(0), 3])
def test_what_is_no_stop(stop: Any) -> None:
    with pytest.raises(ValueError, match=r"stop|eps|Budget"):
        as_stop(stop)


SCALARS = st.one_of(st.sampled_from(["a", "b", ""]), st.integers(-2, 2), st.sampled_from([0.5, 1.0]), st.booleans())
LIMITS = st.one_of(st.sampled_from(["a", "b"]), st.integers(-2, 2), st.just(0.5))
CONDITIONS = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3),
    st.dictionaries(st.sampled_from(["<", "<=", ">", ">="]), LIMITS, min_size=1),
)


def kind(value: Any) -> type:
    return float if type(value) is int else type(value)


@given(st.dictionaries(st.sampled_from("xyz"), CONDITIONS), SCALARS)
def test_conditions_mean_what_python_means(where: dict[str, Any], value: Any) -> None:
    made = as_where(where)
    assert as_where(made) == made
    assert where_key(as_where(dict(reversed(where.items())))) == where_key(made)
    for field, wanted in where.items():
        if isinstance(wanted, dict):
            python = all(
                kind(limit) is kind(value)
                and {"<": value < limit, "<=": value <= limit, ">": value > limit, ">=": value >= limit}[op]
                for op, limit in wanted.items()
                if kind(limit) is kind(value)
            ) and all(kind(limit) is kind(value) for limit in wanted.values())
        else:
            options = wanted if isinstance(wanted, list) else [wanted]
            python = any(kind(one) is kind(value) and one == value for one in options)
        assert python == all(holds(c, value) for c in made or () if c[0] == field)


@given(st.one_of(st.builds(Bounded, st.floats(0.01, 0.99)), st.builds(Budget, st.integers(1, 9), st.none())))
def test_a_stop_is_its_literal(stop: Bounded | Budget) -> None:
    assert as_stop(stop_literal(stop)) == stop == as_stop(stop)


def test_errors_have_the_run_s_code(engine: Engine) -> None:
    with pytest.raises(FlowcError) as error:
        docs.search("q", stop=Bounded(2))
    assert error.value.code == "F07F"
