"""Updates: what a search finds is what brute force finds among the passages that are there, at any moment, in any order
of adding, deleting, saving, compacting and opening again."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flowc
from flowc.backends.vector import Passage, build_index, open_index
from flowc.backends.vector.delta import Epoch
from flowc.backends.vector.ivf import IVFRetriever
from flowc.backends.vector.store import read_manifest
from flowc.ir.errors import InputError, ResourceError
from flowc.ir.options import as_where, holds
from flowc.ir.values import Docs
from flowc.runtime.protocols import Bounded, Budget, ScanBudget, SearchRequest

F32 = npt.NDArray[np.float32]
DIM = 8


class Points:
    """An embedder of given points: the text is the number of the row. Few directions, so equal scores abound."""

    fingerprint = "points"
    spec = "points"
    dim = DIM

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        rows = rng.choice([-1.0, 0.0, 0.5, 1.0], size=(160, DIM)).astype(np.float32)
        rows[:, 0] += 2
        rows[100:] = rows[:60] * rng.choice([1.0, 2.0], size=(60, 1)).astype(np.float32)
        self.rows = rows

    def embed(self, texts: Sequence[str]) -> F32:
        found = self.rows[[int(t) for t in texts]]
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), dtype=np.float32)


POINTS = Points()


def opened(path: Path) -> IVFRetriever:
    index = open_index(path, POINTS)
    assert isinstance(index, IVFRetriever)
    return index


def passage(row: int, key: str = "") -> Passage:
    return Passage(str(row), key=key, meta={"mod": row % 3, "name": "even" if row % 2 == 0 else "odd"})


_MADE: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _MADE["root"] = tmp_path_factory.mktemp("made")
    yield
    _MADE.clear()


def built(out: Path, **options: Any) -> IVFRetriever:
    """An index of 40 passages at `out`: a copy of one that was built before."""
    name = repr(sorted(options.items()))
    if name not in _MADE:
        _MADE[name] = _MADE["root"] / str(len(_MADE))
        items = [passage(n, f"k{n}") for n in range(40)]
        raw = POINTS.rows[:40] if options.get("metric", "cosine") != "cosine" else None
        build_index(items, POINTS, _MADE[name], vectors=raw, **{"nlist": 4, "nprobe": 2, **options})
    shutil.copytree(_MADE[name], out)
    return opened(out)


def found(index: IVFRetriever, *requests: SearchRequest) -> list[Docs]:
    out = []
    for docs in index.search(requests):
        assert isinstance(docs, Docs), docs
        out.append(docs)
    return out


def rows(docs: Docs) -> list[tuple[int, float, str]]:
    return [(d.id, d.score, d.text) for d in docs]


# ------------------------------------------------------------------------------------------------ the oracle
def check_search(index: IVFRetriever, there: dict[int, Passage], request: SearchRequest, metric: str) -> None:
    """The search against brute force over the passages of the clusters that it has to probe."""
    where = as_where(request.where)
    query = POINTS.embed([request.query])[0].astype(np.float64)
    epoch = index.lists
    members: dict[int, list[int]] = {}
    for number in range(len(epoch.sizes)):
        if epoch.sizes[number]:
            members.setdefault(number % epoch.nlist, []).extend(epoch.stored(number)[1].tolist())

    def matches(id: int) -> bool:
        fields = {**there[id].meta, "key": there[id].key}
        return all(c[0] in fields and holds(c, fields[c[0]]) for c in where or ())

    wanted = {id for id in there if matches(id)}
    nprobe = min(request.nprobe or index.nprobe, epoch.nlist)
    if where is not None:  # so few match that all of them are scanned
        nprobe = epoch.nlist
    probed: set[int] = set()
    for at, cluster in enumerate(epoch.nearest_lists(query.astype(np.float32), epoch.nlist, 0).tolist()):
        if at >= nprobe and len(probed) >= min(request.k, len(wanted)):
            break
        probed |= wanted & set(members.get(cluster, []))
    (docs,) = found(index, request)
    assert len(docs) == min(request.k, len(wanted))
    ids = list(docs.ids)
    assert len(set(ids)) == len(ids)
    assert set(ids) <= probed
    vectors = dict(zip(sorted(probed), index.vectors(sorted(probed)).astype(np.float64), strict=True)) if probed else {}

    def score(id: int) -> float:
        return float(-np.sum((vectors[id] - query) ** 2) if metric == "l2" else vectors[id] @ query)

    scale = max([1.0, *(abs(score(id)) for id in probed)])
    assert [d.score for d in docs] == pytest.approx([score(id) for id in ids], abs=2e-6 * scale)
    order = [(-d.score, d.id) for d in docs]
    assert order == sorted(order)
    if docs:
        last = docs[-1]
        for id in probed - set(ids):  # nothing that was left out is better; of equal ones those with lower ids are in
            assert score(id) <= last.score + 2e-6 * scale
            if np.array_equal(vectors[id], vectors[last.id]):
                assert id > last.id
    assert all(d.text == there[d.id].text for d in docs)


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.lists(st.integers(0, 159), min_size=1, max_size=9)),
        st.tuples(st.just("upsert"), st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True)),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 70), max_size=9)),
        st.tuples(st.just("delete where"), st.sampled_from([{"mod": 1}, {"mod": {">": 3}}, {"name": ["odd"]}])),
        st.tuples(st.just("save"), st.booleans()),
        st.tuples(st.just("compact"), st.booleans()),
    ),
    min_size=1,
    max_size=8,
)
FILTERS = st.none() | st.sampled_from(
    [{"mod": 0}, {"mod": [0, 2]}, {"name": "odd", "mod": {"<": 2}}, {"mod": 9}, {"key": ["k1", "k2", "new3"]}]
)


@settings(max_examples=25)
@given(data=st.data())
def test_every_search_is_brute_force_among_what_is_there(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    metric = data.draw(st.sampled_from(["cosine", "inner_product", "l2"]))
    codec = data.draw(st.sampled_from(["fp32", "fp16", "sq8"]))
    nlist = data.draw(st.sampled_from([1, 4]))
    out = tmp_path_factory.mktemp("delta") / "index"
    index = built(out, metric=metric, codec=codec, nlist=nlist, nprobe=1)
    there = {n: passage(n, f"k{n}") for n in range(40)}
    keys = {f"k{n}": n for n in range(40)}
    requests = st.builds(
        SearchRequest,
        st.integers(0, 159).map(str),
        st.sampled_from([1, 3, 10, 500]),
        st.sampled_from([None, 1, 2, 4]),
        where=FILTERS.map(as_where),
    )

    def raw(items: list[Passage]) -> F32 | None:
        return None if metric == "cosine" else POINTS.rows[[int(p.text) for p in items]]

    fresh = 0
    for kind, what in data.draw(OPERATIONS):
        if kind == "add":
            items = [passage(row, f"new{fresh + n}") for n, row in enumerate(what)]
            fresh += len(items)
            ids = index.add(items, raw(items))
            assert min(ids) > max(there, default=-1)
            there |= dict(zip(ids, items, strict=True))
            keys |= {p.key: id for p, id in zip(items, ids, strict=True)}
        elif kind == "upsert":
            items = [passage(row, f"k{row}") for row in what]
            for item in items:
                there.pop(keys.get(item.key, -1), None)
            ids = index.upsert(items, raw(items))
            there |= dict(zip(ids, items, strict=True))
            keys |= {p.key: id for p, id in zip(items, ids, strict=True)}
        elif kind == "delete":
            assert index.delete(what) == len(set(what) & set(there))
            for id in what:
                there.pop(id, None)
        elif kind == "delete where":
            conditions = as_where(what)
            gone = [id for id, p in there.items() if all(holds(c, p.meta[c[0]]) for c in conditions or ())]
            assert index.delete(where=what) == len(gone)
            for id in gone:
                del there[id]
        else:
            asked = [data.draw(requests) for _ in range(3)]
            before = [rows(docs) for docs in found(index, *asked)]
            if kind == "save":
                index.save()
                index.updates.close()
            else:
                index.compact().result()
                assert index.lists.deleted == index.lists.added == 0
            if what:
                index.close()
                index = opened(out)
            assert [rows(docs) for docs in found(index, *asked)] == before
        keys = {key: id for key, id in keys.items() if id in there}
        assert index.lists.count == len(there)
        assert sorted(there) == index.lists.live().tolist()
        check_search(index, there, data.draw(requests), metric)
    wave = [data.draw(requests) for _ in range(6)]
    assert [rows(d) for d in found(index, *wave)] == [rows(found(index, r)[0]) for r in wave]
    index.save()
    index.close()


# ------------------------------------------------------------------------------------------------ readers
def test_a_search_under_way_goes_on_in_the_epoch_it_began_in(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    request = SearchRequest("3", 10, 4)
    (whole,) = found(index, request)
    begun = [search for search in index.begin([request] * 4) if not isinstance(search, Exception)]
    index.run([(begun[0], [0]), (begun[1], [2, 3])])
    index.delete(whole.ids)
    index.add([passage(3, "again")])
    index.run([(begun[1], [0])])
    later = [search for search in index.begin([request]) if not isinstance(search, Exception)]
    index.compact().result()
    index.scan([*begun[:3], *later], ScanBudget(units=1))
    assert [rows(index.finish(search)) for search in begun] == [rows(whole)] * 4
    (after,) = found(index, request)
    assert rows(index.finish(later[0])) == rows(after)
    assert after[0].id == 40
    assert not set(after.ids) & set(whole.ids)
    index.close()


def test_readers_and_a_writer_at_once(tmp_path: Path) -> None:
    index = built(tmp_path / "index", nlist=4, nprobe=4)
    marks = [passage(50, f"mark{n}") for n in range(30)]
    stop = threading.Event()
    errors: list[BaseException] = []

    def read() -> None:
        seen = 0
        try:
            while not stop.is_set():
                (docs,) = found(index, SearchRequest("50", 500))
                count = sum(d.text == "50" for d in docs)
                assert count >= seen  # marks are only ever added
                seen = count
        except BaseException as e:
            errors.append(e)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    compacting = None
    for n, mark in enumerate(marks):
        index.add([mark])
        if n % 10 == 5:
            compacting = index.compact()
        if n % 7 == 6:
            index.delete([n])
    assert compacting is not None
    compacting.result()
    stop.set()
    for reader in readers:
        reader.join()
    assert errors == []
    (docs,) = found(index, SearchRequest("50", 500))
    assert sum(d.text == "50" for d in docs) == 30
    assert len(docs) == 40 + 30 - 4
    index.save()
    index.close()
    assert rows(found(opened(tmp_path / "index"), SearchRequest("50", 500))[0]) == rows(docs)


def test_another_process_s_readers_keep_what_they_opened(tmp_path: Path) -> None:
    reader, writer = built(tmp_path / "index"), opened(tmp_path / "index")
    (before,) = found(reader, SearchRequest("1", 40, 4))
    writer.delete(range(20))
    writer.save()
    writer.compact().result()
    assert rows(found(reader, SearchRequest("1", 40, 4))[0]) == rows(before)
    assert len(found(opened(tmp_path / "index"), SearchRequest("1", 40, 4))[0]) == 20
    writer.close()


DOCS = flowc.Index("delta-docs")


@flowc.workflow
def nearest(number: str, mod: int) -> Any:
    return DOCS.search(number, k=3, where={"mod": mod}) + DOCS.search(number, k=3)


def test_a_running_engine_finds_what_was_updated_meanwhile(tmp_path: Path) -> None:
    index = built(tmp_path / "index", nlist=4, nprobe=4)
    flowc.shutdown()
    flowc.bind(index={"delta-docs": index})
    try:
        before = nearest("1", 1)
        assert [d.id for d in before] == [d.id for d in nearest.eager("1", 1)]
        index.delete(before.ids)
        (mark,) = index.add([Passage("1", meta={"mod": 1})])
        results = nearest.map([("1", 1)] * 20, concurrency=8)
        for docs in results:
            assert docs.ids[0] == docs.ids[3] == mark
            assert not set(docs.ids) & set(before.ids)
            assert [d.id for d in docs] == [d.id for d in nearest.eager("1", 1)]
        assert nearest("1", 7)[:3] == results[0][3:]  # a filter that nothing meets finds nothing
        index.save()
    finally:
        flowc.shutdown()


# ------------------------------------------------------------------------------------------------ writers
def test_one_writer_at_a_time_and_none_that_has_missed_something(tmp_path: Path) -> None:
    first, second = built(tmp_path / "index"), opened(tmp_path / "index")
    first.add(["41"])
    with pytest.raises(ResourceError, match="another process is writing") as caught:
        second.add(["42"])
    assert caught.value.code == "F060"
    with pytest.raises(ResourceError, match="another process is writing"):
        build_index(["1"], POINTS, tmp_path / "index")
    first.save()
    first.close()
    with pytest.raises(ResourceError, match="changed since it was opened") as caught:
        second.delete([1])
    assert "open it again" in (caught.value.hint or "")
    third = opened(tmp_path / "index")
    assert third.add(["42"]) == [41]
    third.save()
    third.close()


def test_updates_that_cannot_be(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    epoch = index.lists
    nan = np.full((1, DIM), np.nan, dtype=np.float32)
    for call, message in (
        (lambda: index.add(["1"], nan), "NaN"),
        (lambda: index.add(["1"], nan[:, :3]), "do not fit 1 passages and an embedder of 8"),
        (lambda: index.add([passage(1, "k1")]), "holds a passage with the key 'k1'"),
        (lambda: index.add([passage(1, "x"), passage(2, "x")]), "two of the passages have the key 'x'"),
        (lambda: index.upsert([passage(1)]), "without a key"),
        (lambda: index.delete(where={"year": 1}), "no passage of the index has the metadata field 'year'"),
        (lambda: index.delete(where={"mod": {"~": 1}}), "unknown operator"),
    ):
        with pytest.raises(ResourceError, match=message) as caught:
            call()
        assert caught.value.code == "F063"
    with pytest.raises(InputError, match="'source'"):
        index.add([Passage("1", meta={"source": "x"})])
    assert index.lists is epoch
    assert index.add([]) == []
    assert index.delete([99, -1]) == index.delete(keys=["nobody"]) == 0
    index.close()
    with pytest.raises(ResourceError, match="was closed"):
        index.add(["1"])


def test_updates_that_were_not_saved_are_warned_of(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    index.add(["41"])
    with pytest.warns(ResourceWarning, match="were not saved"):
        index.close()
    assert read_manifest(tmp_path / "index").count == 40


def test_everything_deleted_is_an_index_that_finds_nothing(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    assert index.delete(range(40)) == 40
    index.save()
    for _ in range(2):
        assert found(index, SearchRequest("1", 3), SearchRequest("1", 3, where=as_where({"mod": 1}))) == [
            Docs(),
            Docs(),
        ]
        scores, ids = index.search_vectors(POINTS.rows[:2], 3)
        assert scores.shape == ids.shape == (2, 0)
        index.compact().result()
        index.close()
        index = opened(tmp_path / "index")
    assert index.manifest.count == index.manifest.rows == 0
    assert index.add(["7"]) == [40]
    assert found(index, SearchRequest("7", 3))[0].ids == (40,)
    index.save()
    index.close()


def test_parts_merge_so_that_they_stay_few(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    for n in range(64):
        index.add([str(n)])
    assert len(index.lists.segments) <= 7
    assert [len(s.ids) for s in index.lists.segments] == [64]
    assert index.lists.live().tolist() == list(range(104))
    index.save()
    index.compact().result()
    index.close()


def test_a_save_is_links_and_a_large_one_compacts_in_the_background(tmp_path: Path) -> None:
    out = tmp_path / "index"
    index = built(out)
    main = out / index.manifest.generation / "index.faiss"
    inode = main.stat().st_ino
    index.add(["41"])
    manifest = index.save()
    assert (out / manifest.generation / "index.faiss").stat().st_ino == inode
    assert not main.exists()
    assert (manifest.count, manifest.rows, manifest.added) == (41, 40, 1)
    assert index.save() is manifest  # nothing new
    index.add([str(n) for n in range(20)])
    index.save()
    index.close()  # waits for the compaction that the save began
    after = read_manifest(out)
    assert (after.count, after.rows, after.added) == (61, 61, 0)


# ------------------------------------------------------------------------------------------------ stops and filters
def test_an_index_that_has_changed_or_is_filtered_is_searched_to_the_end(tmp_path: Path) -> None:
    index = built(tmp_path / "index", nprobe=4)
    for stop in (None, Bounded(0.3)):
        index.delete([0])
        (search,) = index.begin([SearchRequest("3", 2, 4, stop)])
        assert not isinstance(search, Exception)
        assert search.gap is None
    (search,) = index.begin([SearchRequest("3", 2, 4, Budget(lists=1), as_where({"mod": 1}))])
    assert not isinstance(search, Exception)
    index.finish(search)
    assert search.stopped == "lists"
    index.save()
    index.close()


# ------------------------------------------------------------------------------------------------ damage
KILLED = """
import os, shutil, signal, sys
import numpy as np
from flowc.backends.vector import open_index
from flowc.backends.vector.ivf import load_faiss

load_faiss()  # once for all children
rows = np.load(sys.argv[3])

class Points:
    fingerprint = spec = "points"
    dim = rows.shape[1]

    def embed(self, texts):
        found = rows[[int(t) for t in texts]]
        return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)

def update(out, moment):
    steps = 0
    def deadly(call):
        def wrapped(*args, **kwargs):
            nonlocal steps
            steps += 1
            if steps == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return wrapped
    index = open_index(out, Points())
    index.delete(range(10))
    index.add([str(n) for n in range(100, 105)])
    for name in ("fsync", "rename", "replace", "link"):
        setattr(os, name, deadly(getattr(os, name)))
    index.save() if sys.argv[2] == "save" else index.compact().result()
    index.close()

for moment in range(1, 100):
    out = f"{sys.argv[1]}-{moment}"
    shutil.copytree(sys.argv[1], out)
    child = os.fork()
    if not child:
        update(out, moment)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    print(os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
    if status == 0:
        break
"""


@pytest.mark.parametrize("what", ["save", "compact"])
def test_killed_at_any_moment_leaves_the_old_index_or_the_new_one(tmp_path: Path, what: str) -> None:
    path = tmp_path / "index"
    built(path).close()
    request = SearchRequest("3", 100, 4)
    index = opened(path)
    old = rows(found(index, request)[0])
    index.delete(range(10))
    index.add([str(n) for n in range(100, 105)])
    new = rows(found(index, request)[0])
    with pytest.warns(ResourceWarning):
        index.close()
    np.save(tmp_path / "rows.npy", POINTS.rows)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, str(path), what, str(tmp_path / "rows.npy")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    ends = [int(line) for line in done.stdout.split()]
    assert set(ends[:-1]) == {signal.SIGKILL}, done.stderr
    assert ends[-1] == 0, done.stderr
    seen = []
    for moment in range(1, len(ends) + 1):
        index = opened(Path(f"{path}-{moment}"))
        now = rows(found(index, request)[0])
        assert now in (old, new)
        seen.append(now == new)
        index.add(["7"])  # what was left behind is in nobody's way
        index.save()
        index.close()
    assert seen == sorted(seen)  # before the manifest is replaced always the old index, after it always the new one
    assert seen.count(False) >= 8
    assert seen.count(True) >= 2


def test_a_saved_update_that_is_damaged_is_named(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    index.add(["41", "42"])
    index.delete([3])
    manifest = index.save()
    index.close()
    names = {"added.jsonl", "added.codes.npy", "added.clusters.npy", "deleted.npy", "fields.json", "fields.npy"}
    assert names <= set(manifest.files)
    for name in names:
        file = tmp_path / "index" / manifest.generation / name
        whole = file.read_bytes()
        for content in (whole[:-1], bytes(len(whole)), None):
            file.unlink()
            if content is not None:
                file.write_bytes(content)
            with pytest.raises(ResourceError) as caught:
                open_index(tmp_path / "index", POINTS, verify=True)
            assert caught.value.code == "F062"
            with contextlib.suppress(ResourceError):  # unchecked it may answer something, and never ends the process
                opened(tmp_path / "index").search([SearchRequest("1", 2, where=as_where({"mod": 1}))])
            file.unlink(missing_ok=True)
            file.write_bytes(whole)


def test_adding_to_a_mapped_index_does_not_end_the_process(tmp_path: Path) -> None:
    index = built(tmp_path / "index")
    assert isinstance(index.lists, Epoch)
    for _ in range(40):
        index.add([str(n) for n in range(40)])
    assert index.lists.count == 40 * 41
    began = time.perf_counter()
    index.save()
    index.close()
    assert time.perf_counter() - began < 30
