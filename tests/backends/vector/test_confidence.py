"""How sure a search is of its best k so far, and which lists come first: neither changes a result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, open_index
from flowc.backends.vector.calibrate import _trace, calibrate
from flowc.backends.vector.confidence import (
    _points,
    _probability,
    confidence_of,
    fit_confidence,
    put_first,
    reliability,
)
from flowc.backends.vector.ivf import IVFRetriever
from flowc.backends.vector.scan import Lists
from flowc.ir.values import Docs
from flowc.runtime.protocols import SearchRequest
from tests.backends.vector.device.rig import index_of, rows, scattered

Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def lists() -> Lists:
    return Lists(index_of(scattered(3000, 1, dim=16), 48))


def test_on_queries_that_it_has_not_seen_it_is_right_as_often_as_it_says(lists: Lists) -> None:
    found = calibrate(lists, scattered(400, 2, dim=16), 12)["confidence"]
    assert {(row["k"], row["nprobe"]) for row in found} == {(k, n) for k in (4, 10, 32) for n in (12, 24, 48)}
    for row in found:
        assert row["error"] < 0.08
        assert sum(count for _, _, count in row["reliability"]) > 1000
        sure = [observed for predicted, observed, _ in row["reliability"] if predicted > 0.9]
        unsure = [observed for predicted, observed, _ in row["reliability"] if predicted < 0.2]
        assert min(sure, default=1.0) > 0.8 > 0.4 > max(unsure, default=0.0)


def test_reliability_tells_a_liar() -> None:
    observed = (np.arange(1000) % 2).astype(np.float64)
    assert reliability(np.full(1000, 0.5), observed)[0] == 0.0
    error, bins = reliability(np.full(1000, 0.9), observed)
    assert error == pytest.approx(0.4)
    assert bins == [(0.9, 0.5, 1000)]
    assert reliability(observed, observed)[0] == 0.0


def test_a_search_is_judged_by_what_the_calibration_looked_at(lists: Lists) -> None:
    """In order of nearness, list by list, it has the features of the trace; in another order, at the end, the same."""
    queries = scattered(60, 3, dim=16)
    traces = [_trace(lists, query, 12) for query in queries]
    fitted = fit_confidence(traces[::2], traces[1::2], (10,), (12,))
    weights = np.array(fitted[0]["weights"])
    for query, trace in list(zip(queries, traces, strict=True))[:10]:
        expected = _probability(_points([trace], 10, 12)[0], weights).tolist()
        search = lists.begin(query, 10, 12)
        found = []
        for rank in range(11):
            lists.run([(search, [rank])])
            if search.kth() > -np.inf:
                found.append(confidence_of({"confidence": fitted}, search))
        assert found == pytest.approx(expected, abs=1e-5)
        shuffled = lists.begin(query, 10, 12)
        for rank in np.random.default_rng(4).permutation(11).tolist():
            lists.run([(shuffled, [rank])])
        assert confidence_of({"confidence": fitted}, shuffled) == pytest.approx(found[-1])
        lists.scan([search])
        assert confidence_of({"confidence": fitted}, search) == 1.0


def test_where_nothing_was_calibrated_it_is_not_sure_before_the_end(lists: Lists) -> None:
    search = lists.begin(scattered(1, 5, dim=16)[0], 10, 12)
    lists.run([(search, range(11))])
    assert confidence_of({}, search) == 0.0
    few = fit_confidence([_trace(lists, q, 12) for q in scattered(20, 6, dim=16)], [], (10,), (12,))
    assert few == []
    lists.scan([search])
    assert confidence_of({}, search) == 1.0


def test_lists_of_earlier_hits_come_first_and_results_stay(lists: Lists) -> None:
    vectors = scattered(3000, 1, dim=16)
    queries = np.ascontiguousarray(vectors[:50])
    for query in queries:
        plain, moved = lists.begin(query, 10, 12), lists.begin(query, 10, 12)
        ids = [5, 17, 2999, 10**6, -1]
        put_first(moved, ids)
        held = set(lists.clusters_of(np.array(ids)).tolist())
        first = [n in held for n in moved.lists.tolist()]
        assert first == sorted(first, reverse=True)
        assert sorted(moved.lists.tolist()) == sorted(plain.lists.tolist())
        for part in (True, False):  # within both, the nearest first
            near = [s for s, one in zip(moved.near.tolist(), first, strict=True) if one is part]
            assert near == sorted(near, reverse=True)
        assert rows(lists.finish(moved)) == rows(lists.finish(plain))


def test_an_index_orders_by_the_request_and_knows_its_confidence(
    built: Built, passages: list[Passage], embedder: HashingEmbedder
) -> None:
    index = open_index(built("ivf"), embedder)
    assert isinstance(index, IVFRetriever)
    text = passages[9].text[:50]
    plain = index.search([SearchRequest(text, 5)])[0]
    assert isinstance(plain, Docs)
    request = SearchRequest(text, 5, near=(plain[-1].id,))
    search = index.begin([request])[0]
    assert not isinstance(search, Exception)
    assert search.lists[0] in index.lists.clusters_of(np.array([plain[-1].id]))
    index.run([(search, [0])])
    assert 0.0 <= index.confidence(search) < 1.0
    assert index.search([request])[0] == plain
    index.scan([search])
    assert index.confidence(search) == 1.0
    index.close()
