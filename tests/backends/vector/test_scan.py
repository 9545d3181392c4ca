"""Elastic search: whatever the pieces, their order and their company, the result is the one of a single search."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, open_index
from flowc.backends.vector.bm25 import BM25Retriever
from flowc.backends.vector.ivf import IVFRetriever
from flowc.backends.vector.scan import SHARED_ENOUGH, Form, Lists, ListSearch, Selection, _Forms, load_faiss
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import Bounded, Budget, ElasticRetriever, ScanBudget, SearchRequest

Built = Callable[[str], Path]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Row = list[tuple[float, int]]


def made(vectors: F32, nlist: int, codec: str = "fp16", is_l2: bool = False) -> Lists:
    """Inverted lists in memory, trained as `build_index` trains them but on centroids that are some of the vectors."""
    faiss = load_faiss()
    dim = vectors.shape[1]
    quantizer = faiss.IndexFlatL2(dim) if is_l2 else faiss.IndexFlatIP(dim)
    metric = faiss.METRIC_L2 if is_l2 else faiss.METRIC_INNER_PRODUCT
    if codec == "fp16":
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, kind, metric, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dim, nlist, metric)
    index.own_fields = True
    quantizer.this.disown()
    quantizer.add(np.ascontiguousarray(vectors[:nlist]))
    index.train(vectors)
    index.add(vectors)
    return Lists(index)


def unit(values: npt.NDArray[Any]) -> F32:
    out = np.asarray(values, dtype=np.float32)
    return np.ascontiguousarray(out / np.linalg.norm(out, axis=1, keepdims=True))


def few_directions(count: int, seed: int) -> F32:
    """Vectors with many equal ones and many equal scores."""
    rng = np.random.default_rng(seed)
    out = np.zeros((count, 8))
    out[:, :3] = rng.choice([-1.0, 0.5, 2.0], size=(count, 3))
    return unit(out)


def scattered(count: int, seed: int) -> F32:
    return unit(np.random.default_rng(seed).standard_normal((count, 8)))


def brute(lists: Lists, query: F32, k: int, probed: I64, vectors: F32) -> Row:
    """The best k of the probed lists by (score descending, id ascending), one canonical product at a time."""
    faiss = load_faiss()
    rows: Row = []
    every = np.arange(len(vectors))
    for number, offsets, ids in lists.positions(every):
        if number not in probed:
            continue
        for offset, i in zip(offsets, ids.tolist(), strict=True):
            code = lists.decode(number, offset)
            rows.append((float(faiss.fvec_inner_product(faiss.swig_ptr(query), faiss.swig_ptr(code), len(query))), i))
    return sorted(rows, key=lambda row: (-row[0], row[1]))[:k]


def rows(found: tuple[F32, I64]) -> Row:
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


class Always(_Forms):
    """Scans every wave in one form, where it can be had."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.always: Form = form
        self.asked = 0

    def choose(self, share: float, keep: int, codes: int, products: bool) -> Form:
        self.asked += 1
        return "list" if self.always == "products" and not products else self.always


FORMS: tuple[Form, ...] = ("query", "list", "products")
forms_ = st.sampled_from(FORMS)


vectors_ = st.builds(
    lambda make, count, seed: make(count, seed),
    st.sampled_from([few_directions, scattered]),
    st.integers(1, 150),
    st.integers(0, 5),
)


# ------------------------------------------------------------------------------------------------ exactness
@settings(max_examples=120)
@given(data=st.data(), vectors=vectors_, codec=st.sampled_from(["fp16", "fp32"]))
def test_any_split_order_company_and_form_gives_the_one_shot_search(
    data: st.DataObject, vectors: F32, codec: str
) -> None:
    lists = made(vectors, data.draw(st.integers(1, min(len(vectors), 12)), label="nlist"), codec)
    wanted = data.draw(
        st.lists(
            st.tuples(st.integers(0, len(vectors) - 1), st.integers(1, len(vectors) + 3), st.integers(1, lists.nlist)),
            min_size=1,
            max_size=9,
        ),
        label="query, k, nprobe",
    )
    queries = [vectors[at] for at, _, _ in wanted]
    expected = []
    for query, (_, k, nprobe) in zip(queries, wanted, strict=True):
        probed = lists.nearest_lists(query, nprobe, min(k, lists.count))
        # The scanner of fp16 codes multiplies in another order than the plain product, so bits are FAISS's alone.
        alone = lists.begin(query, k, nprobe)
        lists.scan([alone])
        exact = brute(lists, query, k, probed, vectors)
        assert [s for s, _ in rows(lists.best(alone))] == pytest.approx([s for s, _ in exact], abs=1e-6)
        if codec == "fp32":
            assert rows(lists.best(alone)) == exact
        expected.append(rows(lists.best(alone)))

    searches = [lists.begin(query, k, nprobe) for query, (_, k, nprobe) in zip(queries, wanted, strict=True)]
    cancelled: set[int] = data.draw(st.sets(st.sampled_from(range(len(searches)))), label="cancelled")
    for _ in range(data.draw(st.integers(0, 12), label="steps")):
        lists._forms = Always(data.draw(forms_, label="form"))
        who = data.draw(st.lists(st.sampled_from(range(len(searches))), unique=True, max_size=9), label="who")
        if data.draw(st.booleans(), label="by ranks"):
            work: list[tuple[ListSearch, Sequence[int] | I64]] = []
            for n in who:
                left = list(searches[n].remaining())
                ranks = data.draw(st.lists(st.sampled_from(left), unique=True), label="ranks") if left else []
                if data.draw(st.booleans(), label="in a row"):
                    work.append((searches[n], searches[n].remaining()[: len(ranks)]))
                else:
                    work.append((searches[n], ranks))
            lists.run(work)
        else:
            budget = ScanBudget(
                data.draw(st.none() | st.integers(1, 12), label="units"),
                data.draw(st.none() | st.integers(1, 200), label="codes"),
            )
            lists.scan([searches[n] for n in who], budget)
        stop_one: bool = data.draw(st.booleans(), label="cancel one")
        if cancelled and stop_one:
            searches[cancelled.pop()].cancel()
        for search, (_, k, _) in zip(searches, wanted, strict=True):
            at = data.draw(st.booleans(), label="look")
            if at:  # a partial result is exact over what was scanned, and looking changes nothing
                part = rows(lists.best(search))
                seen = {
                    i
                    for n, _, ids in lists.positions(np.arange(lists.count))
                    for i in ids.tolist()
                    if n in search.lists[search.scanned]
                }
                assert {i for _, i in part} <= seen
                assert len(part) == min(k, len(seen))
                assert part == sorted(part, key=lambda row: (-row[0], row[1]))
    for search, whole in zip(searches, expected, strict=True):
        if search.cancelled:
            with pytest.raises(CancelledError):
                lists.finish(search)
        else:
            assert rows(lists.finish(search)) == whole
            assert search.done
            assert not search.stopped
            assert search.scanned.all()


@settings(max_examples=60)
@given(data=st.data(), vectors=vectors_)
def test_what_another_device_found_merges_into_the_same_result(data: st.DataObject, vectors: F32) -> None:
    lists = made(vectors, data.draw(st.integers(1, min(len(vectors), 9)), label="nlist"))
    query = vectors[0]
    k = data.draw(st.integers(1, len(vectors)), label="k")
    (expected,) = lists.search(query[None], [k], [lists.nlist])
    here, there = lists.begin(query, k, lists.nlist), lists.begin(query, k, lists.nlist)
    away = data.draw(st.sets(st.sampled_from(range(here.units))), label="away")
    turns = data.draw(st.permutations(range(here.units)), label="turns")
    for rank in turns:
        if rank in away:
            other = lists.begin(query, k, lists.nlist)
            lists.run([(other, [rank])])
            shuffled = data.draw(st.permutations(range(len(other.ids))), label="order")
            lists.merge(there, [rank], other.scores[shuffled], other.ids[shuffled])
        else:
            lists.run([(there, [rank])])
    assert rows(lists.finish(there)) == rows(expected)
    if away:
        with pytest.raises(ValueError, match="scanned before"):
            lists.merge(there, sorted(away), here.scores, here.ids)


def test_every_list_read_once_for_all_is_what_each_reads_alone(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    texts = [f"how do I use the module {n}" for n in ("socket", "asyncio", "typing", "abc", "email", "sqlite3")] * 8
    requests = [SearchRequest(text + str(n % 13), 1 + n % 40, 1 + n % 16) for n, text in enumerate(texts)]
    expected = [index.search([request])[0] for request in requests]
    for form in FORMS:
        index.lists._forms = forms = Always(form)
        assert index.search(requests) == expected
        assert forms.asked > 0


def test_results_do_not_depend_on_how_rows_are_cut_into_calls(
    built: Built, embedder: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(built("ivf"), embedder)
    requests = [SearchRequest(f"open a file {n}", 3 + n % 6, 16) for n in range(20)]
    expected = index.search(requests)
    index.lists._forms = Always("list")
    for size in (1, 3_000, 10**9):
        monkeypatch.setattr("flowc.backends.vector.scan._ROW_BYTES", size)
        assert index.search(requests) == expected


def test_many_threads_with_one_index_and_their_own_searches(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    requests = [SearchRequest(f"what is number {n}?", 1 + n % 20, 1 + n % 16) for n in range(24)]
    expected = [index.search([request])[0] for request in requests]
    wrong: list[object] = []
    threads_of_faiss: set[int] = set()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(12):
            some = rng.choice(len(requests), size=6, replace=False)
            searches = [s for s in index.begin([requests[n] for n in some]) if isinstance(s, ListSearch)]
            index.scan(searches, ScanBudget(units=int(rng.integers(1, 40))))
            index.run([(s, rng.permutation(s.remaining())[:3]) for s in searches])
            threads_of_faiss.add(load_faiss().omp_get_max_threads())
            for n, search in zip(some, searches, strict=True):
                if index.finish(search) != expected[n]:
                    wrong.append(requests[n])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert threads_of_faiss == {1}  # calls are small: parallel work comes from worker threads


# ------------------------------------------------------------------------------------------------ steps
def opened(path: Path, embedder: HashingEmbedder) -> IVFRetriever:
    index = open_index(path, embedder)
    assert isinstance(index, IVFRetriever)
    return index


def begun(index: IVFRetriever, *requests: SearchRequest) -> list[ListSearch]:
    searches = [s for s in index.begin(requests) if isinstance(s, ListSearch)]
    assert len(searches) == len(requests)
    return searches


def test_a_budget_is_spent_on_everyones_nearest_lists_first(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    searches = begun(index, *(SearchRequest(f"query {n}", 4, 8) for n in range(3)))
    index.scan(searches, ScanBudget(units=4))
    assert [s.scanned.tolist() for s in searches] == [[True, True] + [False] * 6] + [[True] + [False] * 7] * 2
    codes = int(searches[1].costs[1]) + int(searches[2].costs[1])
    index.scan(searches[1:], ScanBudget(codes=codes))
    assert [s.rank for s in searches] == [2, 2, 2]
    index.scan(searches, ScanBudget(codes=1))  # at least one list
    assert [s.rank for s in searches] == [3, 2, 2]
    index.scan(searches, ScanBudget(seconds=60))
    assert all(s.done for s in searches)
    index.scan(searches)


def test_a_budget_of_time_ends_a_scan_between_groups(
    built: Built, embedder: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(built("ivf"), embedder)
    monkeypatch.setattr("flowc.backends.vector.scan._STEP_CODES", 1)
    clock = iter(range(100))
    monkeypatch.setattr("flowc.backends.vector.scan.time.perf_counter", lambda: float(next(clock)))
    (search,) = begun(index, SearchRequest("one two", 4, 8))
    index.scan([search], ScanBudget(seconds=3))
    assert search.rank == 3


def test_units_can_be_run_in_any_order_and_count_once(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    request = SearchRequest("sort a list", 30, 9)
    (expected,) = index.search([request])
    (search,) = begun(index, request)
    assert index.partial(search) == Docs(())
    index.run([(search, [7, 2, 7])])
    index.run([(search, [2])])
    assert list(search.remaining()) == [0, 1, 3, 4, 5, 6, 8]
    assert (search.rank, search.done) == (0, False)
    for rank in (8, 6, 5, 4, 3, 1, 0):
        assert not search.done
        index.run([(search, [rank])])
    assert (search.rank, search.done, list(search.remaining())) == (9, True, [])
    assert index.partial(search) == index.finish(search) == expected


def test_a_cancelled_search_is_left_alone_and_its_neighbours_go_on(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    requests = [SearchRequest(f"query {n}", 4, 8) for n in range(3)]
    searches = begun(index, *requests)
    index.scan(searches, ScanBudget(units=3))
    kept = index.partial(searches[1])
    searches[1].cancel()
    index.scan(searches)
    index.run([(searches[1], [5])])
    assert searches[1].done
    assert searches[1].scanned.sum() == 1
    assert index.partial(searches[1]) == kept
    with pytest.raises(CancelledError):
        index.finish(searches[1])
    assert [index.finish(s) for s in searches[::2]] == index.search(requests)[::2]


def test_steps_that_make_no_sense_are_refused(built: Built, embedder: HashingEmbedder) -> None:
    index, other = opened(built("ivf"), embedder), opened(built("ivf"), embedder)
    (search,) = begun(index, SearchRequest("x", 4, 8))
    with pytest.raises(ValueError, match="twice"):
        index.run([(search, [0]), (search, [1])])
    with pytest.raises(ValueError, match="another index"):
        other.run([(search, [0])])
    with pytest.raises(ValueError, match="from 0"):
        index.run([(search, [-1])])
    with pytest.raises(IndexError):
        index.run([(search, [8])])
    assert not search.scanned.any()
    index.close()
    with pytest.raises(ResourceError, match="closed"):
        index.finish(search)


# ------------------------------------------------------------------------------------------------ stopping by name
def test_a_search_stops_after_its_budget_of_lists(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    for lists in (1, 3, 7):
        (search,) = begun(index, SearchRequest("open a socket", 200, 16, Budget(lists=lists)))
        found = index.finish(search)
        assert search.scanned.tolist() == [True] * lists + [False] * (16 - lists)
        assert search.stopped == "lists"
        (part,) = begun(index, SearchRequest("open a socket", 200, 16))
        index.run([(part, range(lists))])
        assert found == index.partial(part)
    whole, enough = index.search(
        [SearchRequest("open a socket", 9, 4), SearchRequest("open a socket", 9, 4, Budget(lists=4))]
    )
    assert whole == enough


def test_a_search_stops_after_its_budget_of_seconds(
    built: Built, embedder: HashingEmbedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = opened(built("ivf"), embedder)
    monkeypatch.setattr("flowc.backends.vector.scan._STEP_CODES", 1)
    clock = iter(range(1000))
    monkeypatch.setattr("flowc.backends.vector.scan.time.perf_counter", lambda: float(next(clock)))
    (search, free) = begun(
        index, SearchRequest("open a socket", 4, 16, Budget(seconds=3)), SearchRequest("open a socket", 4, 16)
    )
    index.scan([search, free])
    assert (search.stopped, search.rank) == ("seconds", 3)
    assert (free.stopped, free.rank) == ("", 16)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        (Budget(), "needs a number"),
        (Budget(lists=0), "lists"),
        (Budget(lists=1.5), "lists"),  # type: ignore[arg-type]
        (Budget(seconds=0), "seconds"),
        (Budget(seconds=float("nan")), "seconds"),
        (Bounded(0), "eps"),
        (Bounded(1), "eps"),
        (Bounded("0.1"), "eps"),  # type: ignore[arg-type]
        ("soon", "must be"),
    ],
)
@pytest.mark.parametrize("kind", ["ivf", "bm25"])
def test_a_stop_that_makes_no_sense_fails_alone(
    built: Built, embedder: HashingEmbedder, kind: str, stop: Any, message: str
) -> None:
    index = open_index(built(kind), None if kind == "bm25" else embedder)
    good, bad = index.search([SearchRequest("x"), SearchRequest("x", stop=stop)])
    assert isinstance(good, Docs)
    assert isinstance(bad, ResourceError)
    assert bad.code == "F063"
    assert message in str(bad)


# ------------------------------------------------------------------------------------------------ the protocol
@pytest.mark.parametrize("kind", ["flat", "ivf", "fp32", "bm25"])
def test_every_engine_is_driven_by_one_protocol(built: Built, embedder: HashingEmbedder, kind: str) -> None:
    index = open_index(built(kind), None if kind == "bm25" else embedder)
    assert isinstance(index, ElasticRetriever)
    assert_driven(index, 1 if kind in ("flat", "bm25") else 3)


def assert_driven(index: Any, units: int) -> None:
    requests = [SearchRequest(q, 5) for q in ("sort a list", "open a socket", "a coroutine")]
    bad = SearchRequest("x", 0)
    expected = index.search(requests)
    *searches, error = index.begin([*requests, bad])
    assert isinstance(error, ResourceError)
    for search in searches:
        assert search.units == units == len(search.costs) == len(search.remaining())
        assert sum(search.costs) > 0
        assert not search.done
    index.scan(searches, ScanBudget(units=1))
    assert [len(s.remaining()) for s in searches] == [units - 1, units, units]
    while not all(s.done for s in searches):
        index.run([(s, list(s.remaining())[-1:]) for s in searches])
    assert [index.partial(s) for s in searches] == expected
    assert [index.finish(s) for s in searches] == expected
    first, second, third = index.begin(requests)
    index.scan([first, second, third], ScanBudget(codes=1))
    assert [len(s.remaining()) < units for s in (first, second, third)] == [True, False, False]
    second.cancel()
    index.scan([first, second, third], ScanBudget(seconds=60))
    with pytest.raises(CancelledError):
        index.finish(second)
    assert [index.finish(first), index.finish(third)] == [expected[0], expected[2]]


def test_a_word_search_knows_its_one_unit_and_its_index(built: Built) -> None:
    index, other = open_index(built("bm25")), open_index(built("bm25"))
    assert isinstance(index, BM25Retriever)
    assert isinstance(other, BM25Retriever)
    (search,) = index.begin([SearchRequest("sort a list")])
    assert not isinstance(search, Exception)
    with pytest.raises(ValueError, match="another index"):
        other.run([(search, [0])])
    with pytest.raises(ValueError, match="number is 0"):
        index.run([(search, [1])])
    assert index.partial(search) == Docs(())
    index.close()
    with pytest.raises(ResourceError, match="closed"):
        index.finish(search)


# ------------------------------------------------------------------------------------------------ which form
def test_waves_that_share_little_go_query_by_query() -> None:
    forms = _Forms()
    assert forms.choose(SHARED_ENOUGH - 0.01, 16, 10**6, True) == "query"
    forms.learn(SHARED_ENOUGH - 0.01, 16, 10**6, "query", 1.0)
    assert forms.choose(SHARED_ENOUGH, 16, 10**6, True) == "list"


def test_the_cheapest_form_is_learnt_and_the_others_tried_now_and_then() -> None:
    forms = _Forms()
    cost: dict[Form, float] = {"list": 3.0, "query": 1.0, "products": 2.0}
    taken: list[Form] = []

    def go(waves: int, products: bool = True) -> None:
        for _ in range(waves):
            form = forms.choose(24.0, 16, 100_000, products)
            taken.append(form)
            forms.learn(24.0, 16, 100_000, form, cost[form])

    go(100)
    assert taken[:9] == ["products", "list", "query"] * 3
    assert 2 <= len([form for form in taken[9:] if form != "query"]) <= 4
    cost = {"list": 1.0, "query": 3.0, "products": 2.0}  # the machine changes its mind
    go(600)
    assert taken[-64:].count("list") >= 60
    assert set(taken[100:]) == set(FORMS)
    assert forms.choose(96.0, 16, 100_000, True) == "products"  # sharing of another order is learnt apart
    assert {forms.choose(24.0, 16, 100, True) for _ in range(40)} == {"list"}  # nothing is tried on small waves
    cost = {"list": 3.0, "query": 2.0, "products": 1.0}
    del taken[:]
    go(600, products=False)  # an index that has none
    assert set(taken) == {"list", "query"}


def test_padding_of_unequal_heaps_never_enters_a_result(passages: list[Passage], built: Built) -> None:
    index = opened(built("ivf"), HashingEmbedder(64))
    requests = [SearchRequest("socket", k, 16) for k in (10, 13, 17, 25)]  # heaps of 16 to 31: one call
    alone = [index.search([request])[0] for request in requests]
    for form in FORMS:
        index.lists._forms = Always(form)
        searches = begun(index, *requests)
        for _ in range(4):
            index.run([(s, s.remaining()[:4]) for s in searches])
            for search in searches:
                assert np.isfinite(search.scores[search.ids >= 0]).all()
                assert (search.scores[search.ids < 0] == -np.inf).all()
                assert len(set(search.ids[search.ids >= 0].tolist())) == (search.ids >= 0).sum()
        assert [index.finish(s) for s in searches] == alone


def selected(lists: Lists, share: float, seed: int) -> Selection:
    """About that share of the vectors."""
    taken = np.random.default_rng(seed).random(lists.count) < share
    sizes = np.zeros(lists.nlist, dtype=np.int64)
    for number, _, ids in lists.positions(np.arange(lists.count)):
        sizes[number] = taken[ids].sum()
    return Selection(np.packbits(taken, bitorder="little"), sizes)


@settings(max_examples=80)
@given(data=st.data(), vectors=vectors_, codec=st.sampled_from(["fp16", "fp32"]), is_l2=st.booleans())
def test_a_batch_in_one_call_is_its_searches_one_by_one(
    data: st.DataObject, vectors: F32, codec: str, is_l2: bool
) -> None:
    vectors = vectors * np.float32(data.draw(st.sampled_from([1, 0.001, 30]), label="norm"))
    lists = made(vectors, data.draw(st.integers(1, min(len(vectors), 40)), label="nlist"), codec, is_l2)
    count = data.draw(st.integers(0, 40), label="queries")
    rng = np.random.default_rng(count)
    queries = unit(np.concatenate([vectors, rng.standard_normal((40, 8))])[rng.permutation(len(vectors) + 40)[:count]])
    queries *= np.float32(data.draw(st.sampled_from([1, 2.0**20]), label="norm of queries"))
    sizes = st.integers(1, len(vectors) + 2)
    same = data.draw(st.none() | sizes, label="k of all")
    k = [same or data.draw(sizes) for _ in range(count)]
    nprobe = [data.draw(st.integers(1, lists.nlist)) for _ in range(count)]
    share = data.draw(st.none() | st.sampled_from([0.1, 0.5]), label="selected")
    only = None if share is None else selected(lists, share, count)
    lists._forms = Always(data.draw(forms_, label="form"))
    together = lists.search(queries, k, nprobe, [only] * count)
    for query, want, probes, found in zip(queries, k, nprobe, together, strict=True):
        alone = lists.begin(query, want, probes, only=only)
        assert rows(found) == rows(lists.finish(alone))
        single = lists.search(query[None], [want], [probes], [only])[0]
        assert rows(single) == rows(found)
        assert np.array_equal(alone.lists, lists.begin_many(query[None], [want], [probes], only=[only])[0].lists)
    # The nearest lists by matrix products are the nearest lists by canonical scores, in their order.
    for search, query, want, probes in zip(lists.begin_many(queries, k, nprobe), queries, k, nprobe, strict=True):
        one = lists.begin(query, want, probes)
        assert np.array_equal(search.lists, one.lists)
        assert np.array_equal(search.near, one.near)
