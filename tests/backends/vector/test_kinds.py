"""Every kind of index beside brute force: filters, metrics, codecs; graphs, and words and vectors together."""

from collections.abc import Callable
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, build_index, index_info, open_index
from flowc.backends.vector.graph import GraphRetriever
from flowc.backends.vector.hybrid import Fusion, HybridRetriever, fuse
from flowc.backends.vector.ivf import IVFRetriever, plan_index
from flowc.backends.vector.store import read_manifest
from flowc.ir.errors import InputError, ResourceError
from flowc.ir.options import as_where, holds
from flowc.ir.values import Doc, Docs
from flowc.runtime.protocols import Bounded, Budget, ElasticRetriever, ScanBudget, SearchRequest

EMBEDDER = HashingEmbedder(32)
WORDS = "sort list tuple dict socket file regex class thread async".split()
KINDS = ("flat", "ivf", "hnsw", "bm25", "hybrid")
COUNT = 160


def passages() -> list[Passage]:
    rng = np.random.default_rng(3)
    out = []
    for n in range(COUNT):
        text = " ".join(rng.choice(WORDS, size=int(rng.integers(1, 6))))
        meta: dict[str, Any] = {"year": 2000 + n % 20, "lang": ["en", "fr"][n % 7 == 0], "rare": n == 77}
        if n % 3:
            meta["date"] = f"2024-{1 + n % 12:02}-01"
        out.append(Passage(text, source=f"{'ab'[n % 2]}.html", key=f"k{n}", meta=meta))
    return out


PASSAGES = passages()


@pytest.fixture(scope="module")
def index_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def build(kind: str) -> Any:
        if kind not in made:
            out = tmp_path_factory.mktemp("kinds") / kind
            options: dict[str, Any] = {"nlist": 8, "nprobe": 2} if kind in ("ivf", "hybrid") else {}
            build_index(PASSAGES, EMBEDDER, out, kind=kind, **options)  # type: ignore[arg-type]
            made[kind] = open_index(out, EMBEDDER)
        return made[kind]

    return build


def found(index: Any, *requests: SearchRequest) -> list[Docs]:
    out = []
    for docs in index.search(requests):
        assert isinstance(docs, Docs), docs
        out.append(docs)
    return out


def rows(docs: Docs) -> list[tuple[int, float]]:
    return [(d.id, d.score) for d in docs]


FILTERS: list[dict[str, Any]] = [
    {"lang": "fr"},
    {"year": {">=": 2005, "<": 2008}},
    {"source": ["a.html", "nowhere.html"], "lang": "en"},
    {"rare": True},
    {"rare": 1},
    {"date": {">": "2024-06"}},
    {"key": "k9"},
    {"year": 1999},
    {"year": []},
]


def meets(where: Any, passage: Passage) -> bool:
    fields = {**passage.meta, "source": passage.source, "key": passage.key}
    return all(c[0] in fields and holds(c, fields[c[0]]) for c in as_where(where) or ())


# ------------------------------------------------------------------------------------------------ filters
@pytest.mark.parametrize("kind", KINDS)
def test_a_filter_finds_the_best_of_what_meets_it(index_of: Callable[[str], Any], kind: str) -> None:
    index = index_of(kind)
    assert isinstance(index, ElasticRetriever)
    for where in FILTERS:
        wanted = {n for n, p in enumerate(PASSAGES) if meets(where, p)}
        for query in ("sort a list", "async file"):
            (docs,) = found(index, SearchRequest(query, 5, where=as_where(where)))
            assert set(docs.ids) <= wanted
            if kind in ("bm25", "hybrid"):  # words: those that share none are not found
                (everything,) = found(index, SearchRequest(query, COUNT))
                best = [d for d in everything if d.id in wanted][:5]
                if kind == "bm25":
                    assert rows(docs) == [(d.id, d.score) for d in best]
            else:
                (everything,) = found(index, SearchRequest(query, COUNT, nprobe=COUNT))
                assert rows(docs) == [row for row in rows(everything) if row[0] in wanted][:5]
    unknown = index.search([SearchRequest("x", 2, where=as_where({"yaer": 1})), SearchRequest("sort", 2)])
    assert isinstance(unknown[0], ResourceError)
    assert (unknown[0].code, unknown[0].hint) == ("F063", "did you mean 'year'?")
    assert isinstance(unknown[1], Docs)  # one bad filter spoils no other search


def test_the_fewer_match_the_wider_a_search_probes(tmp_path: Path) -> None:
    texts = [Passage(f"{WORDS[n % 10]} {n}", meta={"half": n % 2, "tenth": n % 10}) for n in range(12_000)]
    build_index(texts, EMBEDDER, tmp_path / "index", nlist=64, nprobe=4)
    index = open_index(tmp_path / "index", EMBEDDER)
    assert isinstance(index, IVFRetriever)
    probed = []
    for where in (None, {"half": 0}, {"tenth": 3}):
        (search,) = index.begin([SearchRequest("sort 3", 3, where=as_where(where))])
        assert not isinstance(search, Exception)
        probed.append(search.units)
    assert probed[0] == 4
    assert probed[1] == 8  # half of the passages: twice the lists
    held = {n for n in range(64) if any(i % 10 == 3 for i in index.lists.stored(n)[1].tolist())}
    assert probed[2] == len(held)  # few enough that all of them are scanned


# ------------------------------------------------------------------------------------------------ metrics and codecs
@pytest.mark.parametrize("metric", ["cosine", "inner_product", "l2"])
@pytest.mark.parametrize(("kind", "codec"), [("flat", "fp32"), ("ivf", "sq8"), ("ivf", "fp16"), ("hnsw", "fp32")])
def test_scores_are_the_metric_s(tmp_path: Path, metric: Any, kind: Any, codec: Any) -> None:
    rng = np.random.default_rng(1)
    data = rng.standard_normal((300, 32)).astype(np.float32) * rng.uniform(0.5, 2, (300, 1)).astype(np.float32)
    items = [f"{WORDS[n % 10]} {n}" for n in range(300)]
    options: dict[str, Any] = {"nlist": 4, "nprobe": 4} if kind == "ivf" else {}
    manifest = build_index(
        items, EMBEDDER, tmp_path / "index", kind=kind, codec=codec, metric=metric, vectors=data, **options
    )
    assert (manifest.metric, manifest.codec) == (metric, codec)
    index = open_index(tmp_path / "index", EMBEDDER)
    assert isinstance(index, IVFRetriever | GraphRetriever)
    query = EMBEDDER.embed(["sort"])[0]
    kept = data / np.linalg.norm(data, axis=1, keepdims=True) if metric == "cosine" else data
    exact = -((kept - query) ** 2).sum(axis=1) if metric == "l2" else kept @ query
    (docs,) = found(index, SearchRequest("sort", 10))
    slack = {"fp32": 1e-5, "fp16": 5e-3, "sq8": 0.15}[codec]
    assert [d.score for d in docs] == pytest.approx(exact[list(docs.ids)], abs=slack)
    assert [d.score for d in docs] == pytest.approx(np.sort(exact)[::-1][:10], abs=slack)
    if codec == "fp32":
        assert docs.ids == tuple(np.argsort(-exact)[:10])


# ------------------------------------------------------------------------------------------------ graphs
def test_a_graph_finds_what_a_scan_finds_nearly_always(index_of: Callable[[str], Any]) -> None:
    graph, flat = index_of("hnsw"), index_of("flat")
    queries = [f"{a} {b}" for a in WORDS for b in WORDS]
    both = [found(index, *(SearchRequest(q, 5) for q in queries)) for index in (graph, flat)]
    hits = [sum(d.score >= b[-1].score - 1e-5 for d in a) for a, b in zip(*both, strict=True)]  # many are as good
    assert sum(hits) / (5 * len(queries)) > 0.98
    one = [found(graph, SearchRequest(q, 5))[0] for q in queries]
    assert [rows(d) for d in one] == [rows(d) for d in both[0]]
    info = index_info(graph.path)
    assert (info.kind, info.dim) == ("hnsw", 32)
    assert "date" in info.fields
    with pytest.raises(ResourceError, match="not measured"):
        index_info(graph.path, recall=True)


def test_a_graph_s_search_is_one_unit(index_of: Callable[[str], Any]) -> None:
    graph = index_of("hnsw")
    first, second = graph.begin([SearchRequest("sort", 3), SearchRequest("list", 3, where=as_where({"rare": True}))])
    assert (first.units, list(first.remaining()), second.costs) == (1, [0], (1,))
    graph.scan([first, second], ScanBudget(units=1))
    assert first.done
    assert not second.done
    assert graph.partial(second) == Docs()
    second.cancel()
    with pytest.raises(CancelledError):
        graph.finish(second)
    with pytest.raises(ValueError, match="its number is 0"):
        graph.run([(first, [1])])
    assert rows(graph.finish(first)) == rows(found(graph, SearchRequest("sort", 3))[0])


# ------------------------------------------------------------------------------------------------ hybrid
RANKINGS = st.lists(
    st.tuples(st.integers(0, 12), st.sampled_from([0.1, 0.5, 0.9])), unique_by=lambda r: r[0], max_size=8
)


@given(RANKINGS, RANKINGS, st.integers(1, 9), st.builds(Fusion, st.sampled_from(["rank", "score"]), st.floats(0, 1)))
def test_fusing_is_what_it_says(near: Any, words: Any, k: int, fusion: Fusion) -> None:
    near, words = (Docs(Doc(i, str(i), s) for i, s in sorted(r, key=lambda r: -r[1])) for r in (near, words))

    def part(found: Docs, id: int) -> float:
        if id not in found.ids:
            return 0.0
        if fusion.method == "rank":
            return 1 / (60 + 1 + found.ids.index(id))
        scores = [d.score for d in found]
        spread = max(scores) - min(scores)
        return (scores[found.ids.index(id)] - min(scores)) / spread if spread else 1.0

    all_ids = set(near.ids) | set(words.ids)
    expected = {i: fusion.weight * part(near, i) + (1 - fusion.weight) * part(words, i) for i in all_ids}
    got = fuse(near, words, k, fusion)
    assert len(got) == min(k, len(all_ids))
    assert [d.score for d in got] == pytest.approx(sorted(expected.values(), reverse=True)[:k])
    assert [(-d.score, d.id) for d in got] == sorted((-d.score, d.id) for d in got)
    assert all(d.score == pytest.approx(expected[d.id]) for d in got)


@settings(max_examples=30)
@given(data=st.data())
def test_a_hybrid_search_in_pieces_is_the_fused_whole(index_of: Callable[[str], Any], data: st.DataObject) -> None:
    index = index_of("hybrid")
    requests = data.draw(
        st.lists(
            st.builds(
                SearchRequest,
                st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join),
                st.sampled_from([1, 4, 200]),
                st.sampled_from([None, 1, 5]),
                where=st.sampled_from([None, *FILTERS[:6]]).map(as_where),
            ),
            min_size=1,
            max_size=4,
        )
    )
    expected = []
    for request in requests:
        deep = SearchRequest(request.query, max(50, request.k), request.nprobe, where=request.where)
        (near,), (words,) = found(index.near, deep), found(index.words, deep)
        expected.append(rows(fuse(near, words, request.k, Fusion())))
    assert [rows(d) for d in found(index, *requests)] == expected
    begun = list(index.begin(requests))
    while not all(search.done for search in begun):
        search = data.draw(st.sampled_from([s for s in begun if not s.done]))
        assert len(search.costs) == search.units
        if data.draw(st.booleans()):
            units = data.draw(st.lists(st.sampled_from(search.remaining().tolist()), min_size=1, unique=True))
            index.run([(search, units)])
        else:
            index.scan(begun, ScanBudget(units=data.draw(st.integers(1, 5))))
        index.partial(search)
    assert [rows(index.finish(search)) for search in begun] == expected


def test_the_weight_of_a_fusion_is_a_setting_and_can_be_measured(
    index_of: Callable[[str], Any], tmp_path: Path
) -> None:
    path = index_of("hybrid").path
    request = SearchRequest("sort a list", 5)
    only_near = open_index(path, EMBEDDER, fusion=Fusion(weight=1))
    only_words = open_index(path, EMBEDDER, fusion=Fusion(weight=0))
    assert isinstance(only_near, HybridRetriever)
    assert isinstance(only_words, HybridRetriever)
    near = found(only_near.near, SearchRequest("sort a list", 50))[0].ids[:5]
    assert found(only_near, request)[0].ids == near
    assert found(only_words, request)[0].ids == found(only_words.words, request)[0].ids
    queries = [p.text for p in PASSAGES[:20]]
    best, table = only_near.tune(
        queries, [{d.id} for d in (found(only_near.words, SearchRequest(q, 1))[0][0] for q in queries)]
    )
    assert len(table) == 22
    assert table[best] == max(table.values()) == 1.0
    assert best.weight < 1  # the words' own best were asked for
    build_index(PASSAGES, EMBEDDER, tmp_path / "tuned", kind="hybrid", fusion=best)
    assert getattr(open_index(tmp_path / "tuned", EMBEDDER), "fusion", None) == best
    wrong: dict[str, Any]
    for wrong in ({"method": "max"}, {"weight": 1.5}, {"depth": 0}):
        with pytest.raises(ResourceError, match="fusion"):
            Fusion(**wrong)


# ------------------------------------------------------------------------------------------------ nothing by default
@pytest.mark.parametrize("kind", KINDS)
def test_no_search_stops_early_unless_it_is_asked_to(index_of: Callable[[str], Any], kind: str) -> None:
    assert SearchRequest("x").stop is None
    index = index_of(kind)
    for stop in (Bounded(0.3), Budget(lists=1)):
        (plain, stopped) = index.begin([SearchRequest("sort", 3), SearchRequest("sort", 3, stop=stop)])
        assert len(list(plain.remaining())) == plain.units
        index.scan([plain, stopped])
        near = getattr(plain, "near", plain)
        assert getattr(near, "stopped", "") == ""
        assert len(list(plain.remaining())) == 0


def test_metadata_that_cannot_be_is_named(tmp_path: Path) -> None:
    from flowc.backends.vector import read_jsonl

    for meta, message in (
        ('{"source": 1}', "cannot have a field called 'source'"),
        ('{"a": [1]}', "must be a text, a finite number, true or false"),
        ("[1]", '"meta" must be an object'),
        ('{"a": NaN}', "finite"),
    ):
        (tmp_path / "rows.jsonl").write_text(f'{{"text": "x", "meta": {meta}}}\n')
        with pytest.raises(InputError, match=message):
            read_jsonl(tmp_path / "rows.jsonl", strict=True)
    (tmp_path / "rows.jsonl").write_text('{"text": "x", "meta": {"a": 1, "b": true, "c": "d", "e": 0.5}}\n')
    (read,) = read_jsonl(tmp_path / "rows.jsonl", strict=True).passages
    assert read.meta == {"a": 1, "b": True, "c": "d", "e": 0.5}
    build_index([read], None, tmp_path / "index")
    assert open_index(tmp_path / "index").store.passage(0) == Passage("x", source="rows.jsonl:1", meta=read.meta)


def test_kinds_that_cannot_be(tmp_path: Path) -> None:
    options: dict[str, Any]
    for options, message in (
        ({"kind": "tree"}, "unknown kind"),
        ({"kind": "hnsw", "nlist": 4}, "no lists"),
        ({"codec": "pq"}, "unknown codec"),
        ({"metric": "hamming"}, "unknown metric"),
    ):
        with pytest.raises(ResourceError, match=message) as caught:
            build_index(PASSAGES, EMBEDDER, tmp_path / "index", **options)
        assert caught.value.code == "F063"
    plan = plan_index(100, 32, codec="sq8", metric="l2")
    assert "metric l2: asked for" in plan.reasons
    assert plan.reasons[0].startswith("flat: 100 vectors are fewer than 50,000")


def test_an_index_of_the_first_format_is_read(index_of: Callable[[str], Any], tmp_path: Path) -> None:
    import json
    import shutil

    old = index_of("ivf").path
    shutil.copytree(old, tmp_path / "old")
    row = json.loads((tmp_path / "old" / "manifest.json").read_text())
    row |= {"format": "flowc-index/1", "metric": "inner_product"}
    for name in ("rows", "added", "deleted", "next_id"):
        del row[name]
    row["files"] = {name: info for name, info in row["files"].items() if not name.startswith("fields")}
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(row))
    assert read_manifest(tmp_path / "old").next_id == COUNT
    request = SearchRequest("sort a list", 9)
    assert rows(found(open_index(tmp_path / "old", EMBEDDER), request)[0]) == rows(found(index_of("ivf"), request)[0])


def test_recall_is_measured_with_its_time(index_of: Callable[[str], Any]) -> None:
    info = index_info(index_of("hybrid").path, recall=True, k=5, queries=["sort a list", "open a file"])
    assert info.recall is not None
    assert info.recall_s is not None
    assert list(info.recall) == list(info.recall_s) == [1, 2, 4, 8]
    assert info.recall[8] == 1.0
    assert all(seconds > 0 for seconds in info.recall_s.values())
    assert info.recall_on == "2 given queries"
    assert {"year", "lang", "rare", "date", "key", "source"} == set(info.fields)
