"""Early stops: the gap is the quantile that the promise needs, stops are never worse than it says, and only by name."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowc.backends.embed.hashing import HashingEmbedder
from flowc.backends.vector import Passage, build_index, open_index
from flowc.backends.vector.calibrate import EPS, RULE, _Trace, calibrate, stopping_gap
from flowc.backends.vector.ivf import IVFRetriever, excerpts
from flowc.backends.vector.scan import ListSearch
from flowc.backends.vector.store import read_manifest
from flowc.ir.errors import ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import Bounded, ScanBudget, SearchRequest

Built = Callable[[str], Path]


def opened(path: Path) -> IVFRetriever:
    index = open_index(path, HashingEmbedder(64))
    assert isinstance(index, IVFRetriever)
    return index


@pytest.fixture(scope="module")
def wide(passages: list[Passage], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of 24 lists, all of which are probed."""
    out = tmp_path_factory.mktemp("wide") / "index"
    build_index(passages, HashingEmbedder(64), out, nlist=24, nprobe=24)
    return out


def test_a_trace_knows_when_results_were_final_and_which_gap_would_have_waited() -> None:
    kth = {k: [-math.inf, 0.5, 0.6, 0.6, 0.7] for k in (4, 10, 32)}
    tops = [[], [1, 2, 3, 4], [5, 1, 2, 3], [5, 1, 2, 3], [6, 5, 1, 2]]
    trace = _Trace([0.6, 0.4, 0.3, 0.3], kth, tops)
    assert trace.final_after(4, 4) == 4
    assert trace.final_after(4, 3) == 2
    assert trace.final_after(3, 3) == 2
    assert trace.gap(4, 3) == pytest.approx(0.5 - 0.4)
    assert trace.gap(4, 4) == pytest.approx(0.6 - 0.3)
    assert trace.stops_after(4, 4, 0.05) == 1
    assert trace.stops_after(4, 4, 0.1) == 2  # 0.4 is not below 0.5 - 0.1, and 0.3 is below 0.6 - 0.1
    assert trace.stops_after(4, 4, 0.3) == 4
    assert trace.stops_after(4, 4, trace.gap(4, 4)) >= trace.final_after(4, 4)
    early = _Trace([0.6, 0.4], {k: [-math.inf, 0.9, 0.9] for k in (4, 10, 32)}, [[], [1], [1]])
    assert early.gap(4, 2) == -math.inf


def test_the_gap_is_the_quantile_of_the_calibration_queries(wide: Path, passages: list[Passage]) -> None:
    index = opened(wide)
    queries = index.embedder.embed(excerpts([p.text for p in passages], 200))
    found = calibrate(index.lists, queries, 24)
    assert (found["rule"], found["calibrated_on"], found["held_out"]) == (RULE, 100, 100)
    assert {row["eps"] for row in found["rows"]} == set(EPS)  # ceil(101 * 0.99) is the largest of 100
    for row in found["rows"]:
        at_risk = 0
        for query in queries[::2]:
            whole = lists_after(index, query, int(row["k"]), None)
            stopped = lists_after(index, query, int(row["k"]), row["gap"])
            at_risk += whole != stopped
        # At most n - ceil((n + 1)(1 - eps)) of the queries that chose the gap are changed by it.
        assert at_risk <= 100 - math.ceil(101 * (1 - row["eps"]))
        assert row["changed"] <= row["eps"] + 3 * math.sqrt(row["eps"] * (1 - row["eps"]) / 100) + 0.02
        assert 0 < row["lists"] <= 1
    gaps = {(row["k"], row["eps"]): row["gap"] for row in found["rows"]}
    for k in (4, 10, 32):
        assert [gaps[k, eps] for eps in EPS] == sorted((gaps[k, eps] for eps in EPS), reverse=True)
    assert min(row["lists"] for row in found["rows"]) < 0.9  # the rule does stop early somewhere
    few = calibrate(index.lists, queries[:20], 24)
    assert {row["eps"] for row in few["rows"]} == {0.1, 0.2, 0.3}  # ten queries cannot vouch for less
    assert calibrate(index.lists, queries[:1], 24)["rows"] == []


def lists_after(
    index: IVFRetriever, query: np.ndarray[tuple[int], np.dtype[np.float32]], k: int, gap: float | None
) -> list[int]:
    """Ids of the best k where the rule looks after every list."""
    search = index.lists.begin(query, k, 24, gap=gap)
    while not search.done:
        index.lists.scan([search], ScanBudget(units=1))
    return [int(i) for i in index.lists.best(search)[1]]


def test_a_bounded_search_stops_and_says_so(wide: Path) -> None:
    index = opened(wide)
    texts = [f"how to use {word} in a class" for word in ("print", "socket", "open", "list", "raise", "yield", "None")]
    searches = index.begin([SearchRequest(t, 3, stop=Bounded(0.3)) for t in texts])
    exact = index.search([SearchRequest(t, 3) for t in texts])
    stopped = 0
    same = 0
    for search, whole in zip(searches, exact, strict=True):
        assert isinstance(search, ListSearch)
        assert search.k == 4  # calibrated for 4, of which the first 3 stand
        while not search.done:
            index.scan([search], ScanBudget(units=1))
        found = index.finish(search)
        assert isinstance(whole, Docs)
        assert len(found) == 3
        stopped += search.stopped == "gap"
        same += found == whole
    assert stopped > 0
    assert same >= len(texts) // 2
    assert [s.scanned.all() for s in index_searches(index, texts, None)] == [True] * len(texts)


def index_searches(index: IVFRetriever, texts: list[str], stop: Bounded | None) -> list[ListSearch]:
    searches = [s for s in index.begin([SearchRequest(t, 3, stop=stop) for t in texts]) if isinstance(s, ListSearch)]
    index.scan(searches)
    return searches


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_larger_steps_and_company_only_ever_scan_more(wide_index: IVFRetriever, data: st.DataObject) -> None:
    index = wide_index
    words = data.draw(
        st.lists(st.sampled_from("file open class socket list error async".split()), min_size=2, max_size=6)
    )
    request = SearchRequest(
        " ".join(words), data.draw(st.integers(1, 32)), stop=Bounded(data.draw(st.sampled_from(EPS)))
    )
    (fine,) = (s for s in index.begin([request]) if isinstance(s, ListSearch))
    while not fine.done:
        index.scan([fine], ScanBudget(units=1))
    (coarse,) = (s for s in index.begin([request]) if isinstance(s, ListSearch))
    while not coarse.done:
        index.scan([coarse], ScanBudget(codes=data.draw(st.integers(1, 300))))
    assert fine.rank <= coarse.rank <= 24
    late = index.lists.begin(fine.query, fine.k, 24, gap=fine.gap)
    index.run([(late, range(12, 24))])  # far lists first: the rule was not calibrated for that
    assert not late.stopped
    index.scan([late])
    assert late.rank >= min(fine.rank, 24)


@pytest.fixture(scope="module")
def wide_index(wide: Path) -> IVFRetriever:
    return opened(wide)


def test_where_nothing_was_calibrated_the_search_runs_to_its_end(wide: Path, built: Built) -> None:
    rows = [
        {"k": k, "nprobe": nprobe, "eps": eps, "gap": k + nprobe / 100 + eps}
        for k in (4, 10)
        for nprobe in (8, 16)
        for eps in (0.05, 0.2)
    ]
    table = {"rule": RULE, "rows": rows}
    assert stopping_gap(table, 4, 8, 0.05) == (4, 4.13)
    assert stopping_gap(table, 5, 9, 0.1) == (10, 10 + 0.16 + 0.05)
    assert stopping_gap(table, 1, 1, 0.9) == (4, 4 + 0.08 + 0.2)
    assert stopping_gap(table, 11, 8, 0.05) is None
    assert stopping_gap(table, 4, 17, 0.05) is None
    assert stopping_gap(table, 4, 8, 0.04) is None
    assert stopping_gap({**table, "rule": "another"}, 4, 8, 0.05) is None
    assert stopping_gap({}, 4, 8, 0.05) is None
    index = opened(wide)
    (exact, tight, large) = index.search(
        [
            SearchRequest("a class", 3),
            SearchRequest("a class", 3, stop=Bounded(1e-6)),
            SearchRequest("a class", 400, stop=Bounded(0.3)),
        ]
    )
    assert tight == exact
    assert isinstance(large, Docs)
    assert len(large) == 400
    flat = open_index(built("flat"), HashingEmbedder(64))
    assert flat.search([SearchRequest("a class", 3, stop=Bounded(0.3))]) == flat.search([SearchRequest("a class", 3)])


def test_the_manifest_says_what_was_calibrated_and_older_ones_are_read(
    built: Built, wide: Path, tmp_path: Path
) -> None:
    calibration = read_manifest(wide).calibration
    assert calibration["rule"] == RULE
    assert calibration["queries"].startswith("excerpts of 8 words")
    assert calibration["calibrated_on"] == calibration["held_out"] > 100
    assert read_manifest(built("flat")).calibration == {}
    assert read_manifest(built("bm25")).calibration == {}
    row = json.loads((wide / "manifest.json").read_text())
    del row["calibration"]
    (tmp_path / "old").mkdir()
    for entry in wide.iterdir():
        (tmp_path / "old" / entry.name).symlink_to(entry)
    (tmp_path / "old" / "manifest.json").unlink()
    (tmp_path / "old" / "manifest.json").write_text(json.dumps(row))
    old = opened(tmp_path / "old")
    (bounded, exact) = old.search([SearchRequest("a class", 3, stop=Bounded(0.3)), SearchRequest("a class", 3)])
    assert bounded == exact


@pytest.mark.parametrize(
    "wrong", [7, {"rows": 7}, {"rows": [{"k": 4}]}, {"rows": [{"k": "4", "nprobe": 1, "eps": 1, "gap": 1}]}]
)
def test_a_garbled_calibration_is_damage(wide: Path, tmp_path: Path, wrong: object) -> None:
    row = json.loads((wide / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**row, "calibration": wrong}))
    with pytest.raises(ResourceError) as caught:
        read_manifest(tmp_path)
    assert caught.value.code == "F062"
