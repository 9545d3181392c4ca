"""Vector search: exact over the probed lists, the same in any batch, and clear about what cannot be searched."""

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, build_index, index_info, open_index
from flowc.backends.vector.ivf import IVFRetriever, plan_index
from flowc.backends.vector.store import read_manifest
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import Embedder, Retriever, SearchRequest

Built = Callable[[str], Path]
QUERIES = ("sort a list of tuples by the second item", "open a socket", "what is a coroutine?", "e", "", "import *")


def opened(path: Path, embedder: HashingEmbedder | None = None) -> IVFRetriever:
    index = open_index(path, embedder)
    assert isinstance(index, IVFRetriever)
    return index


def ask(index: Retriever, *requests: SearchRequest) -> list[Docs]:
    out = []
    for result in index.search(requests):
        assert isinstance(result, Docs), result
        out.append(result)
    return out


def rows(docs: Docs) -> list[tuple[int, float]]:
    return [(d.id, d.score) for d in docs]


class Points:
    """An embedder of given points: the text is the number of the row."""

    fingerprint = "points"
    spec = "points"

    def __init__(self, vectors: npt.NDArray[np.float32]) -> None:
        self.vectors = vectors
        self.dim = vectors.shape[1]

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        return self.vectors[[int(t) for t in texts]]


# ------------------------------------------------------------------------------------------------ results
@pytest.mark.parametrize("kind", ["flat", "ivf", "fp32"])
def test_results_are_the_passages_nearest_to_the_query(
    built: Built, passages: list[Passage], embedder: HashingEmbedder, kind: str
) -> None:
    index = opened(built(kind), embedder)
    assert isinstance(index, Retriever)
    assert isinstance(embedder, Embedder)
    vectors = embedder.embed([f"{p.title}: {p.text}" for p in passages])
    (docs,) = ask(index, SearchRequest(QUERIES[0], 5, nprobe=16))
    exact = vectors @ embedder.embed([QUERIES[0]])[0]
    assert docs.ids == tuple(np.argsort(-exact)[:5])
    assert [d.score for d in docs] == pytest.approx(exact[list(docs.ids)], abs=1e-3)
    for doc in docs:
        found = passages[doc.id]
        assert (doc.text, doc.title, doc.source) == (found.text, found.title, found.source)


@pytest.mark.parametrize("kind", ["flat", "ivf", "fp32"])
def test_a_batch_is_bitwise_its_single_searches(built: Built, embedder: HashingEmbedder, kind: str) -> None:
    index = opened(built(kind), embedder)
    requests = [SearchRequest(q, k, p) for q in QUERIES for k in (1, 7, 40) for p in (None, 1, 5, 99)]
    alone = [rows(ask(index, r)[0]) for r in requests]
    assert [rows(d) for d in ask(index, *requests)] == alone
    backwards = ask(index, *reversed(requests))
    assert [rows(d) for d in reversed(backwards)] == alone


@settings(max_examples=60)
@given(data=st.data())
def test_ties_and_small_lists_have_one_answer_whatever_the_batch(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    # Few directions and many copies: every result is full of equal scores, and lists differ wildly in size.
    count = data.draw(st.integers(1, 120), label="count")
    values = data.draw(st.lists(st.sampled_from([-1.0, 0.5, 2.0]), min_size=count * 2, max_size=count * 2))
    vectors = np.zeros((count, 8), dtype=np.float32)
    vectors[:, :2] = np.array(values).reshape(count, 2)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    points = Points(vectors)
    nlist = data.draw(st.integers(1, min(count, 9)), label="nlist")
    codec = data.draw(st.sampled_from(["fp16", "fp32"]), label="codec")
    out = tmp_path_factory.mktemp("ties") / "index"
    build_index([str(n) for n in range(count)], points, out, nlist=nlist, nprobe=1, codec=codec)  # type: ignore[arg-type]
    index = IVFRetriever(out, read_manifest(out), points)
    (whole,) = ask(index, SearchRequest("0", count, nprobe=nlist))
    assert sorted(whole.ids) == list(range(count))
    assert rows(whole) == sorted(rows(whole), key=lambda row: (-row[1], row[0]))
    assert [d.score for d in whole] == pytest.approx(vectors[list(whole.ids)] @ vectors[0], abs=1e-3)
    requests = data.draw(
        st.lists(
            st.builds(
                SearchRequest,
                st.integers(0, count - 1).map(str),
                st.integers(1, count + 3),
                st.none() | st.integers(1, nlist + 1),
            ),
            min_size=1,
            max_size=12,
        ),
        label="requests",
    )
    for request, docs in zip(requests, ask(index, *requests), strict=True):
        assert rows(docs) == rows(ask(index, request)[0])
        nprobe = min(request.nprobe or 1, nlist)
        probed = index.lists.nearest_lists(vectors[int(request.query)], nprobe, min(request.k, count))
        held = {int(i) for number, _, ids in index.lists.positions(np.arange(count)) if number in probed for i in ids}
        (full,) = ask(index, SearchRequest(request.query, count, nprobe=nlist))
        assert rows(docs) == [row for row in rows(full) if row[0] in held][: request.k]
        assert len(docs) == min(request.k, count)
        assert len(probed) >= nprobe
    index.close()


def test_more_than_there_is_returns_all_even_if_the_probed_list_holds_few(
    built: Built, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    index = opened(built("ivf"), embedder)
    smallest = int(index.lists.sizes.min())
    (docs,) = ask(index, SearchRequest(QUERIES[0], smallest + 100, nprobe=1))
    assert len(docs) == smallest + 100
    (docs,) = ask(index, SearchRequest(QUERIES[0], 10**9, nprobe=1))
    assert sorted(docs.ids) == list(range(len(passages)))


def test_nprobe_can_be_set_for_all_requests_without_their_own(built: Built, embedder: HashingEmbedder) -> None:
    wide = open_index(built("ivf"), embedder, nprobe=16)
    own = opened(built("ivf"), embedder)
    requests = [SearchRequest(q, 40) for q in QUERIES]
    asked = ask(own, *(SearchRequest(q, 40, nprobe=16) for q in QUERIES))
    assert ask(wide, *requests) == asked != ask(own, *requests)
    own.nprobe = 16
    assert ask(own, *requests) == asked
    with pytest.raises(ResourceError, match="nprobe"):
        open_index(built("ivf"), embedder, nprobe=0)


def test_search_by_vectors(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    queries = embedder.embed(QUERIES)
    scores, ids = index.search_vectors(queries, 4, nprobe=5)
    assert scores.shape == ids.shape == (len(QUERIES), 4)
    assert scores.dtype == np.float32
    for row, docs in enumerate(ask(index, *(SearchRequest(q, 4, 5) for q in QUERIES))):
        assert rows(docs) == list(zip(ids[row].tolist(), scores[row].tolist(), strict=True))
    none_scores, none_ids = index.search_vectors(np.empty((0, 64), dtype=np.float32), 3)
    assert none_scores.shape == none_ids.shape == (0, 3)


def test_stored_vectors_come_back(built: Built, passages: list[Passage], embedder: HashingEmbedder) -> None:
    index = opened(built("fp32"), embedder)
    ids = [5, 0, 5, len(passages) - 1]
    assert np.array_equal(index.vectors(ids), embedder.embed([f"{passages[i].title}: {passages[i].text}" for i in ids]))
    with pytest.raises(ResourceError, match="does not hold 1"):
        index.vectors([len(passages)])


def test_threads_get_what_one_thread_gets(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    requests = [SearchRequest(q, 9, p) for q in QUERIES for p in (1, 4, 16)]
    expected = [rows(d) for d in ask(index, *requests)]
    wrong: list[object] = []

    def work(start: int) -> None:
        for turn in range(40):
            at = (start + turn) % len(requests)
            if rows(ask(index, requests[at])[0]) != expected[at]:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(n * 5,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ------------------------------------------------------------------------------------------------ what goes wrong
def test_a_bad_request_fails_alone(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    good = SearchRequest(QUERIES[0], 3)
    bad = [SearchRequest("x", 0), SearchRequest("x", -2), SearchRequest("x", 1.5), SearchRequest("x", 3, nprobe=0)]  # type: ignore[arg-type]
    first, *failed, last = index.search([good, *bad, good])
    assert isinstance(first, Docs)
    assert first == last
    for error in failed:
        assert isinstance(error, ResourceError)
        assert error.code == "F063"
    assert "k must be an integer from 1, found 0" in str(failed[0])
    assert "nprobe" in str(failed[3])


class Moody(HashingEmbedder):
    """Gives NaN for one text, fails on another, and has the fingerprint of the embedder that it imitates."""

    calls = 0

    def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.calls += 1
        if "fail" in texts:
            raise ValueError("no thanks")
        out = super().embed(texts)
        out[[t == "nan" for t in texts]] = np.nan
        return out


def test_a_text_that_cannot_be_embedded_fails_alone(built: Built) -> None:
    moody = Moody(64)
    index = opened(built("ivf"), moody)
    results = index.search([SearchRequest(q, 2) for q in ("good", "nan", "good", "fail", "fine")])
    assert [type(r).__name__ for r in results] == ["Docs", "ResourceError", "Docs", "ValueError", "Docs"]
    assert "NaN" in str(results[1])
    moody.calls = 0
    ask(index, *(SearchRequest(q, 2) for q in ("a", "b", "a", "c")))
    assert moody.calls == 1


def test_an_embedder_that_gives_the_wrong_shape_is_named(built: Built) -> None:
    class Short(HashingEmbedder):
        def embed(self, texts: Sequence[str]) -> npt.NDArray[np.float32]:
            return super().embed(texts)[:, :32]

    (result,) = opened(built("ivf"), Short(64)).search([SearchRequest("x")])
    assert isinstance(result, ResourceError)
    assert result.code == "F063"


@pytest.mark.parametrize(
    ("other", "message"),
    [(HashingEmbedder(64, seed=1), "another embedder"), (HashingEmbedder(128), "vectors of 64 numbers")],
)
def test_the_wrong_embedder_is_refused_at_once_or_at_the_first_search(
    built: Built, other: HashingEmbedder, message: str
) -> None:
    with pytest.raises(ResourceError, match=message) as caught:
        open_index(built("ivf"), other)
    assert caught.value.code == "F063"
    index = open_index(built("ivf"), lambda: other)
    results = index.search([SearchRequest("a"), SearchRequest("b")])
    assert [r.code for r in results if isinstance(r, ResourceError)] == ["F063", "F063"]


def test_the_embedder_is_made_at_the_first_search_and_found_by_name(built: Built) -> None:
    made: list[int] = []

    def make() -> HashingEmbedder:
        made.append(1)
        return HashingEmbedder(64)

    index = open_index(built("ivf"), make)
    assert made == []
    first = ask(index, SearchRequest("x", 3))
    ask(index, SearchRequest("y", 3))
    assert made == [1]
    assert ask(open_index(built("ivf")), SearchRequest("x", 3)) == first  # "hashing:64" stands in the manifest


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, 63), dtype=np.float32), "do not fit an index of 64"),
        (np.zeros(64, dtype=np.float32), "do not fit an index of 64"),
        (np.full((1, 64), np.nan, dtype=np.float32), "NaN"),
        (np.full((1, 64), np.inf, dtype=np.float32), "NaN or infinity"),
    ],
)
def test_query_vectors_that_do_not_fit(
    built: Built, embedder: HashingEmbedder, vectors: npt.NDArray[np.float32], message: str
) -> None:
    with pytest.raises(ResourceError, match=message) as caught:
        opened(built("ivf"), embedder).search_vectors(vectors, 3)
    assert caught.value.code == "F063"


def test_a_closed_index_says_so(built: Built, embedder: HashingEmbedder) -> None:
    index = opened(built("ivf"), embedder)
    index.close()
    index.close()
    (result,) = index.search([SearchRequest("x")])
    assert isinstance(result, ResourceError)
    assert "closed" in str(result)


# ------------------------------------------------------------------------------------------------ building
def vectors_of(count: int, dim: int = 16) -> npt.NDArray[np.float32]:
    made = np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32)
    return np.asarray(made / np.linalg.norm(made, axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda v: v[:-1], "do not fit 30 passages"),
        (lambda v: v[:, :8], "do not fit 30 passages"),
        (lambda v: np.where(np.arange(30)[:, None] == 7, np.nan, v), "1 vectors hold NaN .* passage 7"),
        (lambda v: np.where(np.arange(30)[:, None] == 9, 0, v), "1 vectors are zero, .* passage 9"),
    ],
)
def test_vectors_that_cannot_be_indexed(
    tmp_path: Path, damage: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]], message: str
) -> None:
    vectors = vectors_of(30)
    texts = [str(n) for n in range(30)]
    build_index(texts, Points(vectors), tmp_path / "index")
    before = (tmp_path / "index" / "manifest.json").read_bytes()
    with pytest.raises(ResourceError, match=message) as caught:
        build_index(texts, Points(vectors), tmp_path / "index", vectors=damage(vectors))
    assert caught.value.code == "F063"
    assert (tmp_path / "index" / "manifest.json").read_bytes() == before


def test_vectors_are_normalised_and_scores_are_cosines(tmp_path: Path) -> None:
    vectors = vectors_of(30)
    points = Points(vectors)
    build_index([str(n) for n in range(30)], points, tmp_path / "i", vectors=vectors * 7, codec="fp32")
    (docs,) = ask(IVFRetriever(tmp_path / "i", read_manifest(tmp_path / "i"), points), SearchRequest("3", 1))
    assert docs.ids == (3,)
    assert docs[0].score == pytest.approx(1, abs=1e-6)


def test_nothing_to_index(tmp_path: Path, embedder: HashingEmbedder) -> None:
    for kind in ("flat", "ivf", "bm25"):
        with pytest.raises(ResourceError, match="nothing to index") as caught:
            build_index([], embedder, tmp_path / "index", kind=kind)
        assert caught.value.code == "F060"
    assert not (tmp_path / "index").exists()


def test_one_passage_is_enough(tmp_path: Path, embedder: HashingEmbedder) -> None:
    for kind in ("flat", "ivf"):
        build_index(["only this"], embedder, tmp_path / kind, kind=kind)
        (docs,) = ask(open_index(tmp_path / kind), SearchRequest("this", 4))
        assert docs.texts == ("only this",)


def test_building_twice_gives_the_same_bytes(built: Built, passages: list[Passage], tmp_path: Path) -> None:
    for kind, nlist in (("flat", None), ("ivf", 16)):
        nprobe = 3 if nlist else None
        manifest = build_index(passages, HashingEmbedder(64), tmp_path / kind, nlist=nlist, nprobe=nprobe, threads=2)
        assert (built(kind) / "manifest.json").read_text() == (tmp_path / kind / "manifest.json").read_text()
        assert manifest.to_json() == (tmp_path / kind / "manifest.json").read_text()


def test_passages_that_the_embedder_cannot_see_whole_are_counted(tmp_path: Path) -> None:
    class ShortSighted(HashingEmbedder):
        cut_short = 2

    manifest = build_index(["a", "b", "c"], ShortSighted(64), tmp_path / "i")
    assert "2 of 3 passages are longer than the embedder sees: their ends are not searched" in manifest.reasons


def test_progress_is_told_of_every_stage(passages: list[Passage], embedder: HashingEmbedder, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build_index(passages, embedder, tmp_path / "i", nlist=8, progress=lambda *step: told.append(step))
    assert list(dict.fromkeys(stage for stage, _, _ in told)) == ["embed", "train", "add", "measure", "calibrate"]
    assert all(done <= total for _, done, total in told)
    assert ("embed", len(passages), len(passages)) in told


def test_the_plan_follows_the_data_and_gives_reasons() -> None:
    small = plan_index(1000, 384)
    assert (small.kind, small.nlist, small.nprobe) == ("flat", 1, 1)
    large = plan_index(444_231, 256)
    assert (large.kind, large.nlist, large.nprobe) == ("ivf", 2048, 0)
    assert any("2048" in reason for reason in large.reasons)
    assert plan_index(30, 8, kind="ivf").nlist == 1  # too few to train more
    assert plan_index(1000, 8, nlist=10, nprobe=99).nprobe == 10
    mistakes: list[dict[str, Any]] = [
        {"nlist": 0},
        {"nlist": 1001},
        {"nprobe": 0},
        {"codec": "int3"},
        {"kind": "flat", "nlist": 2},
    ]
    for wrong in mistakes:
        with pytest.raises(ResourceError) as caught:
            plan_index(1000, 8, **wrong)
        assert caught.value.code == "F063"


def test_nprobe_is_measured_and_info_measures_the_same(
    passages: list[Passage], embedder: HashingEmbedder, tmp_path: Path
) -> None:
    manifest = build_index(passages, embedder, tmp_path / "i", nlist=16)
    assert 1 < manifest.nprobe <= 16
    assert math.log2(manifest.nprobe).is_integer()
    info = index_info(tmp_path / "i", recall=True, sample=100)
    assert info.recall is not None
    assert info.recall[16] == 1.0
    assert list(info.recall.values()) == sorted(info.recall.values())
    assert info.recall_on == "excerpts of 100 passages"
    assert info.recall[manifest.nprobe] >= 0.95 > info.recall[manifest.nprobe // 2]
    assert (info.count, info.dim, info.nlist, info.nprobe) == (len(passages), 64, 16, manifest.nprobe)
    assert info.list_sizes is not None
    assert info.imbalance is not None
    assert info.imbalance >= 1
    assert info.as_dict()["embedder"] == "hashing:64"
    asked = index_info(tmp_path / "i", recall=True, queries=QUERIES[:3], k=3)
    assert asked.recall_on == "3 given queries"
    assert index_info(tmp_path / "i").recall is None
    manifest_file = tmp_path / "i" / "manifest.json"
    manifest_file.write_text(manifest_file.read_text().replace("hashing:64", "no-such-embedder"))
    easier = index_info(tmp_path / "i", recall=True, sample=50)
    assert "own vectors" in easier.recall_on
    assert easier.recall is not None
    assert easier.recall[16] == 1.0
