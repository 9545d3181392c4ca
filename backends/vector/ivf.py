"""Vector indexes over FAISS inverted lists: what kind to build, building, and the retriever that searches one.

FAISS trains and holds the lists; what is probed, how ties are broken and what a result is, is decided in `scan`. A
search of [a, b, c] is, bit for bit, the three searches, and each of them is what it would be in any other pieces. A
"flat" index is the same thing with one list.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.options import as_where
from flowc.ir.values import Docs
from flowc.runtime.compute import processor
from flowc.runtime.protocols import Bounded, Budget, Embedder, ScanBudget, SearchRequest

from .bm25 import WORD_SETTINGS, write_words
from .calibrate import calibrate, stopping_gap
from .columns import Columns
from .confidence import confidence_of, put_first
from .delta import INDEX_FILE, Epoch, Main, VectorUpdates, saved_epoch, write_faiss
from .documents import Passage, embedded_text
from .encoding import QueryEncoder, check_request
from .graph import EF_SEARCH, new_graph
from .scan import F32, I64, Lists, ListSearch, Selection, load_faiss
from .store import EmbedderInfo, IndexWriter, Manifest, PassageStore, check_files, damaged
from .updates import Updatable

__all__ = [
    "IVFRetriever",
    "IndexPlan",
    "build_vectors",
    "excerpts",
    "own_queries",
    "plan_index",
    "recall_table",
]

# (what is done: "embed", "train", "add", "measure" or "calibrate"; how much; of how much)
Progress = Callable[[str, int, int], None]
Codec = Literal["fp16", "fp32", "sq8"]
Metric = Literal["cosine", "inner_product", "l2"]

FLAT_BELOW = 50_000  # vectors: one list is exact and takes about 3 ms at this size
_SEED = 1234
_CODE_BYTES: dict[str, int] = {"fp32": 4, "fp16": 2, "sq8": 1}
_DIRECT = 4096  # matches of a filter, and the share of passages that match, up to which all of them are scanned
_DIRECT_SHARE = 0.01
_RECALL_AIM = 0.95
_RECALL_SAMPLE = 100
_EXCERPT_WORDS = 8  # about a question's length
_CALIBRATION_SAMPLE = 400  # half to calibrate the early stop, half to measure what it then does


# ------------------------------------------------------------------------------------------------ choosing
@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The kind of index, its number of lists, and why. `nprobe` 0 means: to be measured once the lists are there."""

    kind: Literal["flat", "ivf", "hnsw"]
    nlist: int
    nprobe: int
    codec: Codec
    reasons: tuple[str, ...]
    metric: Metric = "cosine"


def plan_index(
    count: int,
    dim: int,
    *,
    kind: Literal["auto", "flat", "ivf", "hnsw"] = "auto",
    nlist: int | None = None,
    nprobe: int | None = None,
    codec: Codec = "fp16",
    metric: Metric = "cosine",
) -> IndexPlan:
    """The index for `count` vectors of `dim` numbers. What is given is kept, the rest is chosen.

    Raises `ResourceError` F063 for numbers that cannot be: no lists, more lists than vectors, an unknown codec.
    """
    if codec not in _CODE_BYTES:
        raise ResourceError(
            f"unknown codec {codec!r}",
            code="F063",
            hint='"fp16" (half the memory of fp32), "fp32" or "sq8" (a quarter)',
        )
    if metric not in ("cosine", "inner_product", "l2"):
        raise ResourceError(f"unknown metric {metric!r}", code="F063", hint='"cosine", "inner_product" or "l2"')
    if nlist is not None and not 1 <= nlist <= count:
        raise ResourceError(f"nlist must be between 1 and the number of vectors ({count}), found {nlist}", code="F063")
    if nprobe is not None and nprobe < 1:
        raise ResourceError(f"nprobe must be at least 1, found {nprobe}", code="F063")
    reasons = []
    if kind == "auto" and nlist is None and count < FLAT_BELOW:
        kind = "flat"
        reasons.append(
            f"flat: {count:,} vectors are fewer than {FLAT_BELOW:,}, a full scan is exact and takes milliseconds"
        )
    elif kind == "flat":
        reasons.append("flat: asked for")
    if kind == "flat":
        if nlist is not None and nlist != 1:
            raise ResourceError(f"a flat index has one list, not {nlist}", code="F063", hint='kind="ivf"')
        nlist = nprobe = 1
    elif kind == "hnsw":
        if nlist is not None:
            raise ResourceError("a graph index has no lists", code="F063", hint='kind="ivf"')
        nlist, nprobe = 1, nprobe or EF_SEARCH
        reasons.append("hnsw: asked for; one query alone is quicker, but nothing is shared, split or updated")
    else:
        kind = "ivf"
        if nlist is None:
            # About 3 sqrt(n) lists balance the search for lists against the search in them; a power of two, and
            # no more than leaves 39 vectors a list to train on (FAISS's own limit for a sound k-means).
            nlist = 2 ** round(math.log2(3 * math.sqrt(count)))
            nlist = max(1, min(nlist, 2 ** int(math.log2(max(1.0, count / 39)))))
            reasons.append(f"nlist {nlist}: about 3 times the square root of {count:,} vectors")
        else:
            reasons.append(f"nlist {nlist}: asked for")
        if nprobe is not None:
            nprobe = min(nprobe, nlist)
            reasons.append(f"nprobe {nprobe}: asked for")
    size = count * dim * _CODE_BYTES[codec]
    why = "half of fp32 at the same recall" if codec == "fp16" else "asked for"
    reasons.append(f"codec {codec}: {size / 1e6:,.1f} MB of vectors, {why}")
    if metric != "cosine":
        reasons.append(f"metric {metric}: asked for")
    return IndexPlan(kind, nlist, nprobe or 0, codec, tuple(reasons), metric)


# ------------------------------------------------------------------------------------------------ building
def build_vectors(
    passages: Sequence[Passage],
    embedder: Embedder,
    out: str | os.PathLike[str],
    *,
    plan: IndexPlan,
    vectors: npt.NDArray[np.floating[Any]] | None = None,
    progress: Progress | None = None,
    threads: int | None = None,
    fusion: Mapping[str, Any] | None = None,
) -> Manifest:
    """Builds and saves the planned index; see `flowc.backends.vector.build_index`. With `fusion` it is a hybrid one."""
    faiss = load_faiss()

    def tell(stage: str, done: int, total: int) -> None:
        if progress is not None:
            progress(stage, done, total)

    count, dim, cut = len(passages), embedder.dim, 0
    with IndexWriter(out) as writer:  # first: a folder that cannot be written should not cost ten minutes of embedding
        if vectors is None:
            texts = [embedded_text(p) for p in passages]
            vectors = _embed_all(embedder, texts, lambda done, total: tell("embed", done, total))
            cut = getattr(embedder, "cut_short", 0)
        data = fitting_vectors(vectors, count, dim, plan.metric)
        with _omp_threads(faiss, threads or os.cpu_count() or 1):
            tell("train", 0, 1)
            if plan.kind == "hnsw":
                index = new_graph(dim, plan.codec, _faiss_metric(faiss, plan.metric))
                index.train(data)
            else:
                index = _train(faiss, data, plan)
            tell("train", 1, 1)
            for start in range(0, count, 50_000):
                index.add(data[start : start + 50_000])
                tell("add", min(start + 50_000, count), count)
        reasons, nprobe = plan.reasons, plan.nprobe
        if cut:
            reasons += (
                f"{cut:,} of {count:,} passages are longer than the embedder sees: their ends are not searched",
            )
        if not nprobe:
            tell("measure", 0, 1)
            nprobe, reason = _choose_nprobe(Lists(index), embedder, passages)
            reasons += (reason,)
            tell("measure", 1, 1)
        calibration: dict[str, Any] = {}
        if plan.nlist > 1 and plan.metric == "cosine":
            tell("calibrate", 0, 1)
            calibration = _calibrate(Lists(index), embedder, passages, nprobe)
            tell("calibrate", 1, 1)
        settings: dict[str, Any] = {"seed": _SEED, "embedded": "{title}: {text}"}
        if fusion is not None:
            settings |= {**WORD_SETTINGS, "terms": write_words(writer, passages, progress), "fusion": dict(fusion)}
            reasons = ("hybrid: asked for; words and vectors are fused as `settings` says", *reasons)
        writer.passages(passages)
        write_faiss(writer, index)
        spec = str(getattr(embedder, "spec", "") or type(embedder).__name__)
        return writer.commit(
            Manifest(
                kind=plan.kind if fusion is None else "hybrid",
                count=count,
                metric=plan.metric,
                nlist=plan.nlist,
                nprobe=nprobe,
                codec=plan.codec,
                embedder=EmbedderInfo(spec, embedder.fingerprint, dim),
                settings=settings,
                reasons=reasons,
                calibration=calibration,
            )
        )


def _embed_all(embedder: Embedder, texts: Sequence[str], progress: Callable[[int, int], None]) -> F32:
    many = getattr(embedder, "embed_many", None)  # what an embedder may offer beyond the protocol: its way in bulk
    if many is not None:
        return np.asarray(many(texts, progress=progress), dtype=np.float32)
    parts = []
    for start in range(0, len(texts), 64):
        parts.append(embedder.embed(texts[start : start + 64]))
        progress(min(start + 64, len(texts)), len(texts))
    return np.concatenate(parts)


def fitting_vectors(vectors: npt.NDArray[np.floating[Any]], count: int, dim: int, metric: str) -> F32:
    """Float32 vectors that an index can hold; for cosines those that are off unit norm by more than fp16 rounding are
    normalised. Raises `ResourceError` F063 for another shape, NaN, infinity, and zero where a cosine is wanted."""
    shape = tuple(np.shape(vectors))
    if shape != (count, dim):
        raise ResourceError(
            f"vectors of shape {shape} do not fit {count:,} passages and an embedder of {dim} dimensions",
            code="F063",
            hint="one vector a passage, in the same order, from the same embedder",
        )
    data = np.ascontiguousarray(vectors, dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(data).all(axis=1))
    if len(bad):
        raise ResourceError(
            f"{len(bad):,} vectors hold NaN or infinity, the first one is that of passage {bad[0]}",
            code="F063",
            hint="look at that passage's text, or embed again",
        )
    if metric != "cosine":
        return data
    norms = np.sqrt(np.einsum("ij,ij->i", data, data))
    zero = np.flatnonzero(norms < 1e-6)
    if len(zero):
        raise ResourceError(
            f"{len(zero):,} vectors are zero, the first one is that of passage {zero[0]}",
            code="F063",
            hint="embed again",
        )
    if float(np.abs(norms - 1).max()) > 2e-3:
        data = data / norms[:, None]
    return data


def _train(faiss: Any, data: F32, plan: IndexPlan) -> Any:
    dim, metric = data.shape[1], _faiss_metric(faiss, plan.metric)
    quantizer = faiss.IndexFlat(dim, metric)
    if plan.codec == "fp32":
        index = faiss.IndexIVFFlat(quantizer, dim, plan.nlist, metric)
    else:
        kind = faiss.ScalarQuantizer.QT_fp16 if plan.codec == "fp16" else faiss.ScalarQuantizer.QT_8bit
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, plan.nlist, kind, metric, False)
    if plan.nlist == 1:
        quantizer.add(data.mean(axis=0, keepdims=True))  # k-means of one list
    index.cp.seed = _SEED
    index.cp.min_points_per_centroid = 1  # no warning on stderr for the few vectors of a small index
    index.train(data)
    index.own_fields = True
    quantizer.this.disown()
    return index


def _faiss_metric(faiss: Any, metric: str) -> int:
    return int(faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)


@contextlib.contextmanager
def _omp_threads(faiss: Any, count: int) -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


# ------------------------------------------------------------------------------------------------ measuring
def own_queries(count: int, sample: int) -> I64:
    rng = np.random.default_rng(_SEED)
    return np.sort(rng.choice(count, size=min(sample, count), replace=False))


def recall_table(
    lists: Lists, queries: F32, *, k: int = 10, own: I64 | None = None, stop_at: float | None = None
) -> dict[int, float]:
    """Recall@k by nprobe (powers of two), against a scan of every list, averaged over `queries`.

    `own` gives the queries' ids if they are the index's own vectors: a vector does not count as its own result. With
    `stop_at` the table ends at the first recall that reaches it.
    """
    skip = np.full(len(queries), -1) if own is None else own
    more = k if own is None else k + 1

    def results(nprobe: int) -> list[set[int]]:
        found = lists.search(queries, [more] * len(queries), [nprobe] * len(queries))
        return [set([i for i in ids.tolist() if i != s][:k]) for (_, ids), s in zip(found, skip, strict=True)]

    exact = results(lists.nlist)
    table: dict[int, float] = {}
    nprobe = 1
    while True:
        got = exact if nprobe >= lists.nlist else results(nprobe)
        share = [len(a & b) / len(b) for a, b in zip(got, exact, strict=True) if b]
        table[min(nprobe, lists.nlist)] = round(float(np.mean(share)), 4) if share else 1.0
        if nprobe >= lists.nlist or (stop_at is not None and table[nprobe] >= stop_at):
            return table
        nprobe *= 2


def excerpts(passages: Sequence[str], sample: int) -> list[str]:
    """Eight words in a row out of each of `sample` passages: what stands in for questions where there are none.

    A passage's own vector lies among its neighbours and finds them at a low nprobe; a question does not. On the Python
    documentation recall@10 at nprobe 8 and 32 is .963 and .995 for passages, .843 and .960 for excerpts, and .855 and
    .967 for the FAQ's real questions. Source: Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question
    Answering", 2019, section 4 (the inverse cloze task).
    """
    rng = np.random.default_rng(_SEED)
    out = []
    for at in own_queries(len(passages), sample):
        words = passages[int(at)].split()
        start = int(rng.integers(0, max(1, len(words) - _EXCERPT_WORDS + 1)))
        out.append(" ".join(words[start : start + _EXCERPT_WORDS]))
    return out


def _choose_nprobe(lists: Lists, embedder: Embedder, passages: Sequence[Passage]) -> tuple[int, str]:
    queries = np.ascontiguousarray(embedder.embed(excerpts([p.text for p in passages], _RECALL_SAMPLE)), np.float32)
    table = recall_table(lists, queries, stop_at=_RECALL_AIM)
    nprobe = max(table)
    return nprobe, (
        f"nprobe {nprobe}: recall@10 {table[nprobe]:.3f} on {len(queries)} excerpts of {_EXCERPT_WORDS} words "
        f"(the first power of two to reach {_RECALL_AIM})"
    )


def _calibrate(lists: Lists, embedder: Embedder, passages: Sequence[Passage], nprobe: int) -> dict[str, Any]:
    texts = excerpts([p.text for p in passages], _CALIBRATION_SAMPLE)
    queries = np.ascontiguousarray(embedder.embed(texts), np.float32)
    found = calibrate(lists, queries, nprobe)
    return {"queries": f"excerpts of {_EXCERPT_WORDS} words of the index's own passages, seed {_SEED}", **found}


# ------------------------------------------------------------------------------------------------ the retriever
class IVFRetriever(Updatable):
    """A mapped vector index, searched by text or by vector. Implements `flowc.runtime.protocols.ElasticRetriever`.

    `embedder` may be a function that makes one; it is called at the first search by text, and its fingerprint compared
    with the index's then (an embedder that is given as such is compared at once). Safe to use from several threads.
    """

    max_batch = 32

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        embedder: Embedder | Callable[[], Embedder],
        *,
        name: str | None = None,
        nprobe: int | None = None,
        verify: bool = False,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.manifest = manifest
        error = check_request(SearchRequest("", 1, nprobe))
        if error is not None:
            raise error
        self.nprobe = nprobe or manifest.nprobe  # what a request without its own takes
        self._encoder = QueryEncoder(self.path, self._info, embedder)
        self._lock = threading.Lock()
        check_files(self.path, manifest, verify=verify)
        main = self._main(manifest)
        try:
            self._epoch: Epoch | None = saved_epoch(main, self.path, manifest)
        except (OSError, ValueError, EOFError, IndexError) as e:
            raise damaged(self.path, f"its updates cannot be read ({e})") from e
        self._epoch.home = self
        self._updates: VectorUpdates | None = None

    def _main(self, manifest: Manifest) -> Main:
        """The main files of a generation, opened."""
        folder = self.path / manifest.generation
        faiss = load_faiss()
        try:
            index = faiss.read_index(str(folder / INDEX_FILE), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as e:
            raise damaged(
                self.path, f"{INDEX_FILE} cannot be read ({str(e).splitlines()[0] if str(e) else e!r})"
            ) from e
        kind = faiss.IndexIVFFlat if manifest.codec == "fp32" else faiss.IndexIVFScalarQuantizer
        metric = _faiss_metric(faiss, manifest.metric)
        found = (type(index), getattr(index, "nlist", 0), index.d, index.ntotal, index.metric_type)
        if found != (kind, manifest.nlist, self._info.dim, manifest.rows, metric):
            raise damaged(self.path, f"{INDEX_FILE} is not the index that the manifest describes")
        lists = Lists(index)
        if int(lists.sizes.sum()) != manifest.rows:
            raise damaged(self.path, f"{INDEX_FILE} holds lists of {int(lists.sizes.sum()):,} vectors")
        store = PassageStore(self.path, manifest)
        try:
            columns = Columns(folder, manifest.rows, present="fields.npy" in manifest.files)
        except (OSError, ValueError, EOFError) as e:
            raise damaged(self.path, f"its metadata cannot be opened ({e})") from e
        return Main(index, lists, store, columns)

    @property
    def _info(self) -> EmbedderInfo:
        assert self.manifest.embedder is not None  # read_manifest and build_vectors both see to it
        return self.manifest.embedder

    @property
    def embedder(self) -> Embedder:
        """The embedder for queries, made now if it was not before. Raises `ResourceError` F063 if it does not fit."""
        return self._encoder.embedder

    @property
    def lists(self) -> Epoch:
        """The index as it is now. It never changes: an update makes another one."""
        if self._epoch is None:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        return self._epoch

    @property
    def store(self) -> PassageStore:
        return self.lists.store

    def batch_key(self, request: SearchRequest) -> Hashable:
        """All searches of one index share batches: k and nprobe are the request's own even there."""
        return ("search", self.name, self.manifest.generation)

    def search(self, requests: Sequence[SearchRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request, or the error of that request, in order.

        Scores are inner products of unit vectors (cosines), equal ones in order of id. Fewer than k passages come back
        only if the index holds fewer, or a `Budget` ended the search. Queries are embedded in one call, each distinct
        text once, and their lists scanned together.
        """
        begun = self.begin(requests)
        try:
            self.scan([search for search in begun if isinstance(search, ListSearch)])
        except FlowcError as e:
            return [e if isinstance(search, ListSearch) else search for search in begun]
        out: list[Docs | Exception] = []
        for search in begun:
            try:
                out.append(self.finish(search) if isinstance(search, ListSearch) else search)
            except FlowcError as e:
                out.append(e)
        return out

    def begin(self, requests: Sequence[SearchRequest]) -> Sequence[ListSearch | Exception]:
        """A search with its lists ranked for each request, or that request's error. One embedding call for all."""
        out: list[ListSearch | Exception | None] = [check_request(r) for r in requests]
        only: dict[int, Selection | None] = {}
        try:
            epoch = self.lists
        except FlowcError as e:
            return [e if r is None else r for r in out]
        for n, request in enumerate(requests):
            if out[n] is None:
                try:
                    only[n] = epoch.selection(as_where(request.where))
                except FlowcError as e:
                    out[n] = e
        texts = list(dict.fromkeys(requests[n].query for n in only))
        vectors = dict(zip(texts, self._encoder.embed(texts), strict=True))
        good = []
        for n in only:
            vector = vectors[requests[n].query]
            if isinstance(vector, Exception):
                out[n] = vector
            else:
                good.append((n, vector))
        if good:
            rows = np.stack([vector for _, vector in good])
            begun = self._begin(epoch, [requests[n] for n, _ in good], rows, [only[n] for n, _ in good])
            for (n, _), search in zip(good, begun, strict=True):
                out[n] = search
        return [r if r is not None else AssertionError("unreachable") for r in out]

    def _begin(
        self, epoch: Epoch, requests: Sequence[SearchRequest], vectors: F32, only: Sequence[Selection | None]
    ) -> list[ListSearch]:
        ks = [request.k for request in requests]
        gaps: list[float | None] = [None] * len(requests)
        nprobes = [self._probes(epoch, request, among) for request, among in zip(requests, only, strict=True)]
        budgets = [request.stop if isinstance(request.stop, Budget) else None for request in requests]
        is_as_built = not epoch.added and not epoch.deleted
        for n, request in enumerate(requests):
            if isinstance(request.stop, Bounded) and request.where is None and is_as_built:
                found = stopping_gap(self.manifest.calibration, request.k, nprobes[n], request.stop.eps)
                if found is not None:
                    ks[n], gaps[n] = found
        begun = epoch.begin_many(vectors, ks, nprobes, requests, budgets, gaps, only)
        for request, search in zip(requests, begun, strict=True):
            if request.near and request.stop is None:
                put_first(search, request.near)
        return begun

    def _probes(self, epoch: Epoch, request: SearchRequest, only: Selection | None) -> int:
        """How many lists a search probes: all that hold a match where few match, else the more the fewer match."""
        nprobe = min(request.nprobe or self.nprobe, epoch.nlist)
        if request.where is None or only is None:
            return nprobe
        if only.count <= max(_DIRECT, _DIRECT_SHARE * epoch.count):
            return epoch.nlist
        return min(epoch.nlist, math.ceil(nprobe * epoch.count / only.count))

    def run(self, work: Sequence[tuple[ListSearch, Sequence[int] | I64]]) -> None:
        """Scans lists by their ranks in each search; see `ElasticRetriever`. Raises F060 if the index was closed."""
        for epoch, among in self._by_epoch([search for search, _ in work]):
            part = work if len(among) == len(work) else [item for item in work if item[0] in among]
            with processor.hold():
                epoch.run(part)

    def scan(self, searches: Sequence[ListSearch], budget: ScanBudget | None = None) -> None:
        """Scans on until every search is done or the budget is spent, everyone's nearest lists first."""
        for epoch, among in self._by_epoch(searches):
            with processor.hold():
                epoch.scan(among, budget)
            if budget is not None and not all(search.done for search in among):
                return

    def _by_epoch(self, searches: Sequence[ListSearch]) -> list[tuple[Lists, list[ListSearch]]]:
        """The searches, those together that began between the same two updates: nearly always all of them."""
        groups: dict[int, list[ListSearch]] = {}
        for search in searches:
            groups.setdefault(id(search.of), []).append(search)
        for group in groups.values():
            of = group[0].of
            if of is not self.lists and not (isinstance(of, Epoch) and of.home is self):
                raise ValueError("a search of another index")
        return [(group[0].of, group) for group in groups.values()]

    def partial(self, search: ListSearch) -> Docs:
        """The exact best k passages of the lists that the search has scanned."""
        return self._docs(search, *search.of.best(search))

    def confidence(self, search: ListSearch) -> float:
        """The probability that what `partial` gives is the result, as calibrated when the index was built."""
        return confidence_of(self.manifest.calibration, search)

    def finish(self, search: ListSearch) -> Docs:
        """The search's result, after scanning what is left of it. Raises `CancelledError` if it was cancelled."""
        if not search.done:
            self.scan([search])
        return self._docs(search, *search.of.finish(search))

    def _docs(self, search: ListSearch, scores: F32, ids: I64) -> Docs:
        k = search.request.k if search.request is not None else search.k
        store = cast(Epoch, search.of).store
        return Docs(store.doc(i, s) for i, s in zip(ids[:k].tolist(), scores[:k].tolist(), strict=True))

    def search_vectors(self, vectors: npt.ArrayLike, k: int, nprobe: int | None = None) -> tuple[F32, I64]:
        """Scores and ids of shape (len(vectors), min(k, number of passages)), best first.

        Raises `ResourceError` F063 for a wrong dimension, NaN, k < 1 or nprobe < 1.
        """
        error = check_request(SearchRequest("", k, nprobe))
        if error is not None:
            raise error
        queries = np.ascontiguousarray(vectors, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self._info.dim:
            raise ResourceError(
                f"query vectors of shape {queries.shape} do not fit an index of {self._info.dim} dimensions",
                code="F063",
                hint=f"one row a query, of {self._info.dim} numbers",
            )
        if not np.isfinite(queries).all():
            raise ResourceError("a query vector holds NaN or infinity", code="F063", hint="look at what embedded it")
        epoch = self.lists
        probes = min(nprobe or self.nprobe, epoch.nlist)
        k = min(k, epoch.count)
        with processor.hold():
            rows = epoch.search(queries, [k] * len(queries), [probes] * len(queries)) if k else []
        scores = np.array([row[0] for row in rows], dtype=np.float32).reshape(len(queries), k)
        ids = np.array([row[1] for row in rows], dtype=np.int64).reshape(len(queries), k)
        return scores, ids

    def vectors(self, ids: Sequence[int] | I64) -> F32:
        """The stored vectors of these passages as float32, of shape (len(ids), dim). Reads every list's ids."""
        lists = self.lists
        wanted, row_of = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        out = np.empty((len(wanted), self._info.dim), dtype=np.float32)
        left = len(wanted)
        for number, offsets, held in lists.positions(wanted):
            for offset, at in zip(offsets, np.searchsorted(wanted, held).tolist(), strict=True):
                out[at] = lists.decode(number, offset)
                left -= 1
        if left:
            raise ResourceError(f"the index at {self.path} does not hold {left} of the passages asked for", code="F063")
        return out[row_of]

    # -------------------------------------------------------------------------------------------- updates
    @property
    def updates(self) -> VectorUpdates:
        epoch = self.lists
        with self._lock:
            if self._updates is None:
                self._updates = VectorUpdates(
                    self.path, self.manifest, epoch, self._publish, self._main, self._embed_passages, self._fitting_rows
                )
            return self._updates

    def _publish(self, epoch: Epoch, manifest: Manifest) -> None:
        epoch.home = self
        with self._lock:
            if self._epoch is not None:
                self._epoch, self.manifest = epoch, manifest

    def _embed_passages(self, passages: Sequence[Passage]) -> F32:
        return _embed_all(self.embedder, [embedded_text(p) for p in passages], lambda done, total: None)

    def _fitting_rows(self, vectors: Any, count: int) -> F32:
        return fitting_vectors(vectors, count, self._info.dim, self.manifest.metric)

    def close(self) -> None:
        """Lets go of the files. A search after this answers with `ResourceError` F060; updates not saved are lost."""
        if self._updates is not None:
            self._updates.close()
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            epoch.store.close()
