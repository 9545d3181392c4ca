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
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import Bounded, Budget, Embedder, ScanBudget, SearchRequest

from .calibrate import calibrate, stopping_gap
from .documents import Passage, embedded_text
from .scan import F32, I64, Lists, ListSearch, load_faiss
from .store import EmbedderInfo, IndexWriter, Manifest, PassageStore, check_files, damaged

__all__ = [
    "IVFRetriever",
    "IndexPlan",
    "build_vectors",
    "check_request",
    "excerpts",
    "own_queries",
    "plan_index",
    "recall_table",
]

# (what is done: "embed", "train", "add", "measure" or "calibrate"; how much; of how much)
Progress = Callable[[str, int, int], None]
Codec = Literal["fp16", "fp32"]

FLAT_BELOW = 50_000  # vectors: one list is exact and takes about 3 ms at this size
_SEED = 1234
_FILE = "index.faiss"
_RECALL_AIM = 0.95
_RECALL_SAMPLE = 100
_EXCERPT_WORDS = 8  # about a question's length
_CALIBRATION_SAMPLE = 400  # half to calibrate the early stop, half to measure what it then does


# ------------------------------------------------------------------------------------------------ choosing
@dataclass(frozen=True, slots=True)
class IndexPlan:
    """The kind of index, its number of lists, and why. `nprobe` 0 means: to be measured once the lists are there."""

    kind: Literal["flat", "ivf"]
    nlist: int
    nprobe: int
    codec: Codec
    reasons: tuple[str, ...]


def plan_index(
    count: int,
    dim: int,
    *,
    kind: Literal["auto", "flat", "ivf"] = "auto",
    nlist: int | None = None,
    nprobe: int | None = None,
    codec: Codec = "fp16",
) -> IndexPlan:
    """The index for `count` vectors of `dim` numbers. What is given is kept, the rest is chosen.

    Raises `ResourceError` F063 for numbers that cannot be: no lists, more lists than vectors, an unknown codec.
    """
    if codec not in ("fp16", "fp32"):
        raise ResourceError(f"unknown codec {codec!r}", code="F063", hint='"fp16" (half the memory) or "fp32"')
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
    size = count * dim * (2 if codec == "fp16" else 4)
    why = "half of fp32 at the same recall" if codec == "fp16" else "asked for"
    reasons.append(f"codec {codec}: {size / 1e6:,.1f} MB of vectors, {why}")
    return IndexPlan(kind, nlist, nprobe or 0, codec, tuple(reasons))


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
) -> Manifest:
    """Builds and saves the planned index; see `flowc.backends.vector.build_index`."""
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
        data = _unit_vectors(vectors, count, dim)
        with _omp_threads(faiss, threads or os.cpu_count() or 1):
            tell("train", 0, 1)
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
        if plan.nlist > 1:
            tell("calibrate", 0, 1)
            calibration = _calibrate(Lists(index), embedder, passages, nprobe)
            tell("calibrate", 1, 1)
        writer.passages(passages)
        with writer.file(_FILE) as stream:
            # Through Python's file, because FAISS's own writer forgets what fclose says about a full disk.
            faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))
        spec = str(getattr(embedder, "spec", "") or type(embedder).__name__)
        return writer.commit(
            Manifest(
                kind=plan.kind,
                count=count,
                metric="inner_product",
                nlist=plan.nlist,
                nprobe=nprobe,
                codec=plan.codec,
                embedder=EmbedderInfo(spec, embedder.fingerprint, dim),
                settings={"seed": _SEED, "embedded": "{title}: {text}"},
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


def _unit_vectors(vectors: npt.NDArray[np.floating[Any]], count: int, dim: int) -> F32:
    """Float32 vectors of unit norm; those that are off by more than fp16 rounding are refused or normalised."""
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
    dim = data.shape[1]
    quantizer = faiss.IndexFlatIP(dim)
    if plan.codec == "fp16":
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, plan.nlist, kind, faiss.METRIC_INNER_PRODUCT, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dim, plan.nlist, faiss.METRIC_INNER_PRODUCT)
    if plan.nlist == 1:
        quantizer.add(data.mean(axis=0, keepdims=True))  # k-means of one list
    index.cp.seed = _SEED
    index.cp.min_points_per_centroid = 1  # no warning on stderr for the few vectors of a small index
    index.train(data)
    index.own_fields = True
    quantizer.this.disown()
    return index


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
class IVFRetriever:
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
        self._make: Callable[[], Embedder] | None = None
        self._embedder: Embedder | None = None
        if callable(embedder) and not hasattr(embedder, "embed"):
            self._make = embedder
        else:
            self._embedder = self._fitting(cast(Embedder, embedder))
        self._lock = threading.Lock()
        folder = check_files(self.path, manifest, verify=verify)
        faiss = load_faiss()
        try:
            index = faiss.read_index(str(folder / _FILE), faiss.IO_FLAG_MMAP_IFC)
        except (RuntimeError, MemoryError) as e:
            raise damaged(self.path, f"{_FILE} cannot be read ({str(e).splitlines()[0] if str(e) else e!r})") from e
        kind = faiss.IndexIVFScalarQuantizer if manifest.codec == "fp16" else faiss.IndexIVFFlat
        found = (type(index), getattr(index, "nlist", 0), index.d, index.ntotal, index.metric_type)
        wanted = (kind, manifest.nlist, self._info.dim, manifest.count, faiss.METRIC_INNER_PRODUCT)
        if found != wanted:
            raise damaged(self.path, f"{_FILE} is not the index that the manifest describes")
        self._lists: Lists | None = Lists(index)
        if int(self._lists.sizes.sum()) != manifest.count:
            raise damaged(self.path, f"{_FILE} holds lists of {int(self._lists.sizes.sum()):,} vectors")
        self.store = PassageStore(self.path, manifest)

    @property
    def _info(self) -> EmbedderInfo:
        assert self.manifest.embedder is not None  # read_manifest and build_vectors both see to it
        return self.manifest.embedder

    @property
    def embedder(self) -> Embedder:
        """The embedder for queries, made now if it was not before. Raises `ResourceError` F063 if it does not fit."""
        with self._lock:
            if self._embedder is None:
                assert self._make is not None
                self._embedder = self._fitting(self._make())
            return self._embedder

    def _fitting(self, embedder: Embedder) -> Embedder:
        info = self._info
        if embedder.dim != info.dim:
            raise ResourceError(
                f"the index at {self.path} holds vectors of {info.dim} numbers, the embedder makes {embedder.dim}",
                code="F063",
                hint=f"open it with the embedder {info.spec!r}, or build it again with this one",
            )
        if embedder.fingerprint != info.fingerprint:
            raise ResourceError(
                f"the index at {self.path} was made with another embedder:\n"
                f"  index    {info.fingerprint}\n  embedder {embedder.fingerprint}",
                code="F063",
                hint=f"open it with the embedder {info.spec!r}, or build it again with this one",
            )
        return embedder

    @property
    def lists(self) -> Lists:
        if self._lists is None:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        return self._lists

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
        ready = [n for n, error in enumerate(out) if error is None]
        texts = list(dict.fromkeys(requests[n].query for n in ready))
        vectors = dict(zip(texts, self._embed(texts), strict=True))
        good = []
        for n in ready:
            vector = vectors[requests[n].query]
            if isinstance(vector, Exception):
                out[n] = vector
            else:
                good.append((n, vector))
        if good:
            try:
                begun = self._begin([requests[n] for n, _ in good], np.stack([vector for _, vector in good]))
            except FlowcError as e:  # it was closed
                return [e if r is None else r for r in out]
            for (n, _), search in zip(good, begun, strict=True):
                out[n] = search
        return [r if r is not None else AssertionError("unreachable") for r in out]

    def _begin(self, requests: Sequence[SearchRequest], vectors: F32) -> list[ListSearch]:
        ks = [request.k for request in requests]
        gaps: list[float | None] = [None] * len(requests)
        nprobes = [min(request.nprobe or self.nprobe, self.manifest.nlist) for request in requests]
        budgets = [request.stop if isinstance(request.stop, Budget) else None for request in requests]
        for n, request in enumerate(requests):
            if isinstance(request.stop, Bounded):
                found = stopping_gap(self.manifest.calibration, request.k, nprobes[n], request.stop.eps)
                if found is not None:
                    ks[n], gaps[n] = found
        return self.lists.begin_many(vectors, ks, nprobes, requests, budgets, gaps)

    def run(self, work: Sequence[tuple[ListSearch, Sequence[int] | I64]]) -> None:
        """Scans lists by their ranks in each search; see `ElasticRetriever`. Raises F060 if the index was closed."""
        self.lists.run(work)

    def scan(self, searches: Sequence[ListSearch], budget: ScanBudget | None = None) -> None:
        """Scans on until every search is done or the budget is spent, everyone's nearest lists first."""
        self.lists.scan(searches, budget)

    def partial(self, search: ListSearch) -> Docs:
        """The exact best k passages of the lists that the search has scanned."""
        return self._docs(search, *self.lists.best(search))

    def finish(self, search: ListSearch) -> Docs:
        """The search's result, after scanning what is left of it. Raises `CancelledError` if it was cancelled."""
        return self._docs(search, *self.lists.finish(search))

    def _docs(self, search: ListSearch, scores: F32, ids: I64) -> Docs:
        k = search.request.k if search.request is not None else search.k
        return Docs(self.store.doc(i, s) for i, s in zip(ids[:k].tolist(), scores[:k].tolist(), strict=True))

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
        probes = min(nprobe or self.nprobe, self.manifest.nlist)
        k = min(k, self.manifest.count)
        rows = self.lists.search(queries, [k] * len(queries), [probes] * len(queries))
        scores = np.array([row[0] for row in rows], dtype=np.float32).reshape(-1, k)
        ids = np.array([row[1] for row in rows], dtype=np.int64).reshape(-1, k)
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

    def close(self) -> None:
        """Lets go of the files. A search after this answers with `ResourceError` F060."""
        self._lists = None
        self.store.close()

    def _embed(self, texts: Sequence[str]) -> list[F32 | Exception]:
        """A finite vector for each text, or the reason why not. One bad text does not spoil the others."""
        if not texts:
            return []
        try:
            embedder = self.embedder
        except FlowcError as e:
            return [e] * len(texts)
        try:
            vectors = np.asarray(embedder.embed(texts), dtype=np.float32)
        except Exception as e:
            if len(texts) == 1:
                return [e]
            return [self._embed([text])[0] for text in texts]
        if vectors.shape != (len(texts), self._info.dim):
            error = ResourceError(
                f"the embedder gave vectors of shape {vectors.shape}, not ({len(texts)}, {self._info.dim})",
                code="F063",
                hint="an embedder gives back one row a text",
            )
            return [error] * len(texts)
        nan = "the embedder gave a vector with NaN or infinity"
        return [
            vector if np.isfinite(vector).all() else ResourceError(nan, code="F063", hint=f"query: {text[:80]!r}")
            for vector, text in zip(vectors, texts, strict=True)
        ]


def check_request(request: SearchRequest) -> ResourceError | None:
    """What is wrong with the numbers of a request, if anything."""
    for name, value in (("k", request.k), ("nprobe", request.nprobe)):
        if name == "nprobe" and value is None:
            continue
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            return ResourceError(f"{name} must be an integer from 1, found {value!r}", code="F063")
    return _check_stop(request.stop)


def _check_stop(stop: object) -> ResourceError | None:
    match stop:
        case None:
            return None
        case Bounded(eps):
            if not isinstance(eps, (int, float)) or not 0 < eps < 1:
                return ResourceError(f"the eps of `Bounded` must lie between 0 and 1, found {eps!r}", code="F063")
        case Budget(lists, seconds):
            if lists is None and seconds is None:
                return ResourceError("a `Budget` needs a number of lists or of seconds", code="F063")
            if lists is not None and (not isinstance(lists, int) or isinstance(lists, bool) or lists < 1):
                return ResourceError(f"the lists of a `Budget` must be an integer from 1, found {lists!r}", code="F063")
            if seconds is not None and (not isinstance(seconds, (int, float)) or not seconds > 0):
                return ResourceError(f"the seconds of a `Budget` must be above 0, found {seconds!r}", code="F063")
        case _:
            return ResourceError(f"stop must be `Bounded`, `Budget` or None, found {stop!r}", code="F063")
    return None
