"""BM25: the textbook's scores, ties by id, and nothing but words needed."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.vector import Passage, build_index, index_info, open_index
from flowc.backends.vector.bm25 import BM25Retriever, words_of
from flowc.ir.errors import ResourceError
from flowc.ir.options import as_where
from flowc.ir.values import Docs
from flowc.runtime.protocols import Retriever, SearchRequest

WORDS = ["cat", "dog", "bird", "fish", "ant", "asyncio.gather"]


def search(path: Path, query: str, k: int) -> list[tuple[int, float]]:
    index = open_index(path)
    assert isinstance(index, BM25Retriever)
    assert isinstance(index, Retriever)
    (docs,) = index.search([SearchRequest(query, k)])
    assert isinstance(docs, Docs), docs
    return [(d.id, d.score) for d in docs]


def textbook(texts: list[str], query: str) -> dict[int, float]:
    """Robertson and Zaragoza 2009, equation 3.15, written down as it stands there."""
    bags = [Counter(words_of(t)) for t in texts]
    mean = sum(sum(b.values()) for b in bags) / len(bags)
    scores = {}
    for at, bag in enumerate(bags):
        total = 0.0
        for word, times in Counter(words_of(query)).items():
            df = sum(word in b for b in bags)
            idf = math.log(1 + (len(bags) - df + 0.5) / (df + 0.5))
            tf = bag[word]
            total += times * idf * tf * 2.2 / (tf + 1.2 * (0.25 + 0.75 * sum(bag.values()) / mean))
        if total > 0:
            scores[at] = total
    return scores


@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join), min_size=1, max_size=14),
    query=st.lists(st.sampled_from([*WORDS, "zebra"]), max_size=4).map(" ".join),
    k=st.integers(1, 20),
)
def test_scores_are_the_textbook_s(
    texts: list[str], query: str, k: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("bm25") / "index"
    build_index(texts, None, out)
    found = search(out, query, k)
    expected = textbook(texts, query)
    assert len(found) == min(k, len(expected))
    assert found == search(out, query, 1000)[:k]
    assert found == sorted(found, key=lambda row: (-row[1], row[0]))
    for at, score in found:
        assert score == pytest.approx(expected[at], rel=1e-5)
    if found:
        assert min(s for _, s in found) >= sorted(expected.values(), reverse=True)[len(found) - 1] - 1e-4


def test_words() -> None:
    assert words_of("Classes' __init__ uses asyncio.gather(*tasks)") == [
        "classe",
        "init",
        "use",
        "asyncio.gather",
        "asyncio",
        "gather",
        "task",
    ]
    assert words_of("policies class is bus") == ["policy", "class", "is", "bus"]
    assert words_of("東京都 test") == ["東京", "京都", "test"]
    assert words_of("naïve ÉTÉ") == ["naïve", "été"]
    assert words_of("!?") == []


def test_real_questions_find_their_page(passages: list[Passage], tmp_path: Path) -> None:
    manifest = build_index(passages, None, tmp_path / "i")
    assert manifest.kind == "bm25"
    target = next(p for p in passages if "asyncio" in p.text)
    index = open_index(tmp_path / "i")
    results = index.search([SearchRequest(" ".join(target.text.split()[:8]), 3), SearchRequest("x", 0)])
    assert isinstance(results[0], Docs)
    assert results[0][0].text == target.text
    assert isinstance(results[1], ResourceError)
    info = index_info(tmp_path / "i")
    assert (info.kind, info.count, info.dim) == ("bm25", len(passages), 0)
    with pytest.raises(ResourceError, match="no recall"):
        index_info(tmp_path / "i", recall=True)


def test_nothing_in_common_finds_nothing_and_passages_without_words_are_no_trouble(tmp_path: Path) -> None:
    build_index(["cat", "!!!", "dog"], None, tmp_path / "i")
    assert search(tmp_path / "i", "zebra", 3) == []
    assert search(tmp_path / "i", "", 3) == []
    assert [at for at, _ in search(tmp_path / "i", "cats", 3)] == [0]
    build_index(["!!!", "???"], None, tmp_path / "none")
    assert search(tmp_path / "none", "cat", 3) == []


def test_a_closed_index_says_so(tmp_path: Path) -> None:
    build_index(["cat"], None, tmp_path / "i")
    index = open_index(tmp_path / "i")
    index.close()
    (result,) = index.search([SearchRequest("cat")])
    assert isinstance(result, ResourceError)
    assert "closed" in str(result)


# ------------------------------------------------------------------------------------------------ updates
CHANGES = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"),
            st.lists(
                st.lists(st.sampled_from([*WORDS, "newt"]), min_size=1, max_size=5).map(" ".join),
                min_size=1,
                max_size=4,
            ),
        ),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 12), max_size=4)),
        st.tuples(st.just("upsert"), st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True)),
        st.tuples(st.just("save"), st.booleans()),
    ),
    max_size=6,
)


@settings(max_examples=30)
@given(changes=CHANGES, query=st.lists(st.sampled_from([*WORDS, "newt"]), min_size=1, max_size=3).map(" ".join))
def test_an_index_that_was_updated_is_one_that_was_built_of_what_is_there(
    changes: list[tuple[str, Any]], query: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out = tmp_path_factory.mktemp("bm25") / "index"
    there = {n: Passage(w, key=f"k{n}", meta={"n": n}) for n, w in enumerate(WORDS)}
    build_index(list(there.values()), None, out)
    index = open_index(out)
    assert isinstance(index, BM25Retriever)
    under_way = [s for s in index.begin([SearchRequest("cat dog", 9)]) if not isinstance(s, Exception)]
    old = search(out, "cat dog", 9)
    for kind, what in changes:
        if kind == "add":
            items = [Passage(text, meta={"n": 99}) for text in what]
            there |= dict(zip(index.add(items), items, strict=True))
        elif kind == "delete":
            assert index.delete(what) == len(set(what) & set(there))
            there = {id: p for id, p in there.items() if id not in what}
        elif kind == "upsert":
            items = [Passage(f"newt {n}", key=f"k{n}", meta={"n": n}) for n in what]
            ids = index.upsert(items)
            there = {id: p for id, p in there.items() if p.key not in {i.key for i in items}}
            there |= dict(zip(ids, items, strict=True))
        else:
            index.save()
            if what:
                index.close()
                index, under_way = open_index(out), []
                assert isinstance(index, BM25Retriever)
        (docs,) = index.search([SearchRequest(query, 20)])
        assert isinstance(docs, Docs), docs
        expected = textbook([p.text for p in there.values()], query) if there else {}
        ids = sorted(there)
        assert {d.id: d.score for d in docs} == pytest.approx({ids[row]: s for row, s in expected.items()}, rel=1e-5)
        assert all(d.text == there[d.id].text for d in docs)
        (filtered,) = index.search([SearchRequest(query, 20, where=as_where({"n": {"<": 50}}))])
        assert filtered == Docs(d for d in docs if int(there[d.id].meta["n"]) < 50)
    assert [[(d.id, d.score) for d in index.finish(s)] for s in under_way] in ([], [old])
    index.save()
    index.close()


def test_updates_of_words_that_cannot_be(tmp_path: Path) -> None:
    build_index([Passage("cat", key="k")], None, tmp_path / "index")
    first, second = open_index(tmp_path / "index"), open_index(tmp_path / "index")
    assert isinstance(first, BM25Retriever)
    assert isinstance(second, BM25Retriever)
    with pytest.raises(ResourceError, match="holds no vectors"):
        first.add(["dog"], np.zeros((1, 4)))
    with pytest.raises(ResourceError, match="holds a passage with the key 'k'"):
        first.add([Passage("dog", key="k")])
    with pytest.raises(ResourceError, match="another process is writing"):
        second.add(["dog"])
    assert first.compact().result().count == 1
    first.close()
