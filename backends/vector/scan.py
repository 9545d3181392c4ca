"""Elastic search over inverted lists: begun, scanned a few lists at a time in any order and company, always exact.

A search is plain arrays: the probe order with its scores, which lists were scanned, and a heap of the best k + 2 found
so far. At any moment these tell the exact best k of the lists scanned, so a search can pause, go on in another batch,
be cancelled, or take in what another device found. Three facts make the result independent of all that:

- *Distances are canonical.* The inner product that FAISS's list scanner computes is a function of the query and the
  stored code alone, whatever the batch, the thread or the order of the lists (measured bit for bit). Codes hold whole
  vectors, not residuals, so that it stays so.
- *Probes are canonical.* The nearest lists are ranked by (inner product descending, list number ascending), where the
  product is that of one pair; one of many would move last bits with the batch size, so those only find candidates.
  If the nearest hold fewer than k vectors, further lists are probed until they do.
- *Results are canonical.* A heap drops entries no better than its worst. If its worst is below the k-th best, nothing
  that belongs to the best k was dropped; if it ties with the k-th, the lists are scanned again for all entries as good
  as that. The best k are then ordered by (score descending, id ascending).

Searches that begin together lie together in arrays, one row each, and what all of them do at once is done to the
arrays: a `ListSearch` is a handle on a row. Many are scanned in one of three forms. *Query by query*, each goes through
its lists, all in one FAISS call. *List by list* (a wavefront), rows of (query, list) are sorted by list, so that a list
is read from memory once for all who want it, and one FAISS call runs them all; rows start with their query's worst kept
score as the bar, so few entries come out of them, and a C loop folds those into the heaps. *By products*, a list is
decoded once and multiplied with all queries that want it; a matrix product has other last bits, so it only finds what
may pass the bar, with a margin for its error, and FAISS's scanner scores just that.

Source of the sub-stages: Hu et al., "HedraRAG", 2025, section 4; of the wavefront's form and its limits: measured.
"""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import Budget, ScanBudget, SearchRequest

__all__ = ["SHARED_ENOUGH", "Accelerator", "Beside", "ListSearch", "Lists", "Selection", "load_faiss"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Ranks = range | I64  # rising, each once; a range has no steps
Form: TypeAlias = Literal["query", "list", "products"]

# Visits to lists per distinct list, from which on a wave may be scanned list by list, and by products. Below, the
# lists are read from memory once in any form and the rows only cost. Above, the forms are tried and the cheapest kept:
# an index that fits in the processor's cache gains nothing from reading a list once (16,425 x 384 in fp16).
SHARED_ENOUGH = 1.3
PRODUCTS_FROM = 12.0  # a list is decoded at the price of scanning it for ten
_SPARE = 2  # results kept beyond k, so that a tie at the end is seen; more would make every heap slower
_SPARE_LISTS = 8  # candidates beyond those wanted, for another order of summation
_GROUP_CODES = 16_384  # vectors a search scans before others and cancellation get their turn; about 0.4 ms
_STEP_CODES = 1_024  # the same where a rule may stop the search: about 25 us, against 4 us that a step costs
_ROW_PLACES = 16  # of a row in such a call; a row that fills them is scanned again with all
_ROW_BYTES = 4 << 20  # of queries and heaps that the rows of one call may take
_TOGETHER = 4  # queries from which on centroids are scored by matrix products
_BLOCK = 32  # queries of one such product
_FEW = 8  # queries up to which `search` does without
# Multiplications of one matrix product. OpenBLAS, which numpy brings, starts its threads above this, and they spin
# beside the other workers: 32 queries against 2,048 centroids cost 11 ms of processor time in one product on two busy
# cores, and 0.3 ms in tiles. Tiles are also what its kernels for small matrices take: 5.5 ns for a product of 256
# numbers, where 16 queries against a list in one product cost 14.
_TILE_PRODUCTS = 1 << 18
_LEARN_CODES = 20_000  # a wave of fewer takes too short a time to learn from
_BARS_FROM = 16  # the share of lists that are scanned before products find what passes their bar, as 1 / n
_HALF_BITS = np.int32(-0x70002000)  # sign, exponent and fraction of a half float that was moved up
_NO_HEAP_INIT = 1024  # IndexIVF::PARALLEL_MODE_NO_HEAP_INIT: scan on from the heaps given, and leave them heaps


def load_faiss() -> Any:
    """The module faiss. Raises `ResourceError` F060 with what to install where it is missing."""
    try:
        import faiss
    except ImportError as e:
        raise ResourceError(
            "the package faiss-cpu is not installed", code="F060", hint="pip install 'flowc[local]'"
        ) from e
    return faiss


class Selection:
    """Which vectors a search may find: bit `id % 8` of byte `id // 8` of `bits`. Immutable, shared by many searches.

    `sizes` is how many there are in each list, `count` in all. The scanner skips the others before it computes anything
    and gives the same bits for these, so a filter or a deletion moves no score.
    """

    __slots__ = ("_params", "_selector", "bits", "count", "sizes")

    def __init__(self, bits: npt.NDArray[np.uint8], sizes: I64) -> None:
        faiss = load_faiss()
        self.bits = np.ascontiguousarray(bits)
        self.sizes = sizes
        self.count = int(sizes.sum())
        self._selector = faiss.IDSelectorBitmap(len(self.bits), faiss.swig_ptr(self.bits))
        self._params: dict[int, Any] = {}

    def holds(self, ids: I64) -> npt.NDArray[np.bool_]:
        """Of each id whether it is selected."""
        bits = self.bits[ids >> 3] >> (ids & 7).astype(np.uint8)
        return np.asarray(bits & 1, dtype=np.bool_)

    def params(self, nprobe: int) -> Any:
        """FAISS's parameters of a call with so many lists a row."""
        found = self._params.get(nprobe)
        if found is None:
            found = self._params[nprobe] = load_faiss().SearchParametersIVF(nprobe=nprobe, sel=self._selector)
        return found


# ------------------------------------------------------------------------------------------------ the state of a search
@dataclass(slots=True, eq=False)
class _Batch:
    """Searches that began together with one k: row n of each array is the n-th search's.

    `lists` and `near`, of shape (n, width): the probed lists, nearest first, and their centroids' scores; where a row
    has fewer (`units` of them), -1 and -inf follow. `scores` and `ids`, of shape (n, places), are heaps with the worst
    first; (-inf, -1) are free places.
    """

    queries: F32
    k: int
    only: Selection | None
    lists: I64
    near: F32
    units: list[int]
    scores: F32
    ids: I64


class ListSearch:
    """One search under way. Belongs to one thread at a time, but for `cancel`, which any may call.

    A handle on a row of a batch: `lists` and `near` are the probed lists, nearest first, and the scores of their
    centroids; `scores` and `ids` a heap, worst first, of the best k + 2 found so far, with (-inf, -1) in free places.
    """

    __slots__ = (
        "_mask",
        "_taken",
        "batch",
        "began_s",
        "budget",
        "cancelled",
        "gap",
        "of",
        "rank",
        "request",
        "row",
        "stopped",
        "units",
    )

    def __init__(
        self,
        of: Lists,
        batch: _Batch,
        row: int,
        request: SearchRequest | None = None,
        budget: Budget | None = None,
        gap: float | None = None,
    ) -> None:
        self.of = of
        self.batch = batch
        self.row = row
        self.units = batch.units[row]  # how many lists there are to scan
        self.request = request
        self.budget = budget
        self.gap = gap  # stop where the next list's centroid lies this far below the k-th best
        self.rank = 0  # the nearest list that was not scanned
        self.stopped = ""  # the rule that ended the search early: "lists", "seconds", "gap"
        self.cancelled = False
        self.began_s = 0.0 if budget is None else time.perf_counter()
        self._taken = 0
        self._mask: npt.NDArray[np.bool_] | None = None  # what was scanned, where that is not the first `rank` lists

    @property
    def k(self) -> int:
        return self.batch.k

    @property
    def only(self) -> Selection | None:
        """What the search may find; None: every vector."""
        return self.batch.only

    @property
    def query(self) -> F32:
        query: F32 = self.batch.queries[self.row]
        return query

    @property
    def lists(self) -> I64:
        return self.batch.lists[self.row, : self.units]

    @property
    def near(self) -> F32:
        return self.batch.near[self.row, : self.units]

    @property
    def codes(self) -> I64:
        return self.of.sizes[self.lists]

    @property
    def scores(self) -> F32:
        scores: F32 = self.batch.scores[self.row]
        return scores

    @property
    def ids(self) -> I64:
        ids: I64 = self.batch.ids[self.row]
        return ids

    @property
    def scanned(self) -> npt.NDArray[np.bool_]:
        """Of each rank whether it was scanned."""
        return self._mask if self._mask is not None else np.arange(self.units) < self.rank

    @property
    def costs(self) -> I64:
        """Vectors in each list."""
        return self.codes

    @property
    def done(self) -> bool:
        """Whether nothing is left to scan: all was, or a stopping rule holds, or it was cancelled."""
        return self._taken == self.units or self.cancelled or bool(self.stopped)

    @property
    def _is_whole(self) -> bool:
        """Whether nothing was scanned and nothing but its end ends it."""
        return not self._taken and self.budget is None and self.gap is None and not self.cancelled

    def remaining(self) -> Ranks:
        """Ranks of the lists that were not scanned, nearest first; none once `done`."""
        if self.done:
            return range(0)
        if self._mask is None:
            return range(self.rank, self.units)
        return np.flatnonzero(~self._mask)

    def cancel(self) -> None:
        """Ends the search at the next step between two scans; `finish` refuses it then."""
        self.cancelled = True

    def _took(self, ranks: Ranks) -> None:
        """Notes what was scanned, and whether that is enough."""
        self._taken += len(ranks)
        if self._taken == self.units:
            self.rank, self._mask = self.units, None
            return
        if self._mask is None and isinstance(ranks, range) and ranks.start == self.rank:
            self.rank = ranks.stop
        else:
            if self._mask is None:
                self._mask = self.scanned
            self._mask[ranks if not isinstance(ranks, range) else slice(ranks.start, ranks.stop)] = True
            self.rank += int(self._mask[self.rank :].argmin())
            if self.rank == self._taken:
                self._mask = None
        if self.budget is not None:
            if self.budget.lists is not None and self._taken >= self.budget.lists:
                self.stopped = "lists"
            elif self.budget.seconds is not None and time.perf_counter() - self.began_s >= self.budget.seconds:
                self.stopped = "seconds"
        # Calibrated on the nearest lists in order: results of lists farther out must not raise the bar.
        if self.gap is not None and self._mask is None and float(self.near[self.rank]) < self.kth() - self.gap:
            self.stopped = "gap"

    def kth(self) -> float:
        """The k-th best score so far, -inf while there are fewer."""
        scores = self.scores
        return float(np.partition(scores, len(scores) - self.k)[len(scores) - self.k])


class _Room:
    """Room for the nearest lists of a few queries, with the addresses that FAISS wants."""

    __slots__ = ("lists", "lists_at", "near", "near_at")

    def __init__(self, count: int, width: int) -> None:
        ptr = load_faiss().swig_ptr
        self.near, self.lists = np.empty((count, width), dtype=np.float32), np.empty((count, width), dtype=np.int64)
        self.near_at, self.lists_at = ptr(self.near), ptr(self.lists)


class _Rooms(threading.local):
    """A thread's own, for one query, by width."""

    def __init__(self) -> None:
        self._made: dict[int, _Room] = {}

    def get(self, width: int) -> _Room:
        room = self._made.get(width)
        if room is None:
            room = self._made[width] = _Room(1, width)
        return room


def _of(values: I64, ranks: Ranks) -> I64:
    return values[ranks.start : ranks.stop] if isinstance(ranks, range) else values[ranks]


# ------------------------------------------------------------------------------------------------ which form is cheaper
class _Forms:
    """Chooses among the forms by what they cost before, for waves alike in sharing and in heap size.

    Costs are this thread's processor time per vector. Other work on the machine only ever adds to it, so the least that
    was seen counts, and fades by a hundredth a wave. One wave in 32 goes to a form that lost, so that the choice
    follows the machine. The choice moves time only, never a result.
    """

    def __init__(self, now: Callable[[], float] = time.thread_time) -> None:
        self.now = now
        self._cost: dict[tuple[int, int], dict[Form, float]] = {}
        self._waves: defaultdict[tuple[int, int], int] = defaultdict(int)

    def choose(self, share: float, keep: int, codes: int, products: bool) -> Form:
        """The form for a wave; `products` says whether that one can be had."""
        if share < SHARED_ENOUGH:
            return "query"
        forms: tuple[Form, ...] = ("list", "query")
        if products and share >= PRODUCTS_FROM:
            forms = ("products", "list", "query")
        key = self._key(share, keep)
        cost = self._cost.get(key, {})
        cheapest: Form = min(forms, key=lambda form: cost.get(form, math.inf)) if cost else "query"
        if codes < _LEARN_CODES:
            return cheapest
        wave = self._waves[key]
        self._waves[key] += 1
        if wave < 3 * len(forms):
            return forms[wave % len(forms)]
        if wave % 32 == 0:
            losers: list[Form] = [form for form in forms if form != cheapest]
            return losers[wave // 32 % len(losers)]
        return cheapest

    def learn(self, share: float, keep: int, codes: int, form: Form, seconds: float) -> None:
        """Takes in what a wave cost."""
        if share < SHARED_ENOUGH or codes < _LEARN_CODES:
            return
        cost = self._cost.setdefault(self._key(share, keep), {})
        new = seconds / codes
        cost[form] = min(1.01 * cost.get(form, new), new)

    @staticmethod
    def _key(share: float, keep: int) -> tuple[int, int]:
        return int(2 * math.log2(share)), keep.bit_length()


# ------------------------------------------------------------------------------------------------ another scanner
class Beside(Protocol):
    """A step of which a part is being scanned elsewhere, until `close`."""

    @property
    def rest(self) -> list[tuple[ListSearch, Ranks]]:
        """What is to be scanned here meanwhile."""
        ...

    def merge(self) -> list[tuple[ListSearch, Ranks]]:
        """Merges what was found elsewhere; gives back what could not be proven to be exact, to be scanned here."""
        ...

    def close(self) -> None: ...


class Accelerator(Protocol):
    """Scans lists that it holds copies of, on a device beside the CPU."""

    def start(self, work: list[tuple[ListSearch, Ranks]]) -> Beside: ...


# ------------------------------------------------------------------------------------------------ the lists
class Lists:
    """The inverted lists of an index, read only. Safe to use from several threads.

    Takes the index over: sets its parallel mode, so that plain searches of the same object are wrong from then on.
    Never add to `index`: FAISS aborts the process when a mapped index grows. What is added lies in further lists:
    with `base`, list number n + p * nlist is the p-th part of cluster n, and part 0 is list n of `base`; `sizes` says
    what each holds. `alive` are the vectors that were not deleted, None if none was.

    Higher scores are better: of an index with L2 distances they are the squared distances' negatives.
    """

    def __init__(
        self, index: Any, *, base: Lists | None = None, sizes: I64 | None = None, alive: Selection | None = None
    ) -> None:
        faiss = self._faiss = load_faiss()
        assert not getattr(index, "by_residual", False), "scores of residuals would need the centroids' scores"
        self._index = index
        self._base = None if base is None else base.base
        self.accelerator: Accelerator | None = None  # asked on `base`
        index.parallel_mode = _NO_HEAP_INIT
        self.dim: int = index.d
        self.nlist: int = index.nlist if base is None else base.nlist
        if sizes is None:
            lists = index.invlists
            sizes = np.array([lists.list_size(n) for n in range(index.nlist)], dtype=np.int64)
        self.sizes: I64 = sizes
        self.parts = len(sizes) // self.nlist
        self.alive = alive
        self.count: int = int(sizes.sum()) if alive is None else alive.count
        self._held = self._by_cluster(sizes if alive is None else alive.sizes)
        # How many vectors so many clusters hold, whichever they are.
        self._least: list[int] = [0, *np.cumsum(np.sort(self._held)).tolist()]
        self._largest = int(sizes.max(initial=0))
        self.is_l2 = index.metric_type == faiss.METRIC_L2
        quantized = isinstance(index, faiss.IndexIVFScalarQuantizer)
        self._is_half = quantized and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16
        assert quantized or type(index) is faiss.IndexIVFFlat
        self._has_products = not self.is_l2 and (self._is_half or not quantized)
        self._scale = np.float32(2.0**112 if self._is_half else 1)  # what decoded vectors are to be multiplied by
        self._norms = np.full(len(sizes), -1, dtype=np.float32)
        self._sorting = self._like(index.invlists)  # begins with empty heaps, and leaves them in order
        self._sorting.parallel_mode = 0
        self._rooms = _Rooms()
        self._views: dict[int, tuple[npt.NDArray[np.uint8], I64]] = {}
        self._is_plain = self.parts == 1 and alive is None and not self.is_l2
        self._flat: Any
        self._centroids: F32
        if base is not None:
            self._flat, self._centroids = base._flat, base._centroids
        else:
            centroids = index.quantizer.reconstruct_n(0, self.nlist)
            if self.is_l2:  # the nearest centroid c of q has the largest q.c - |c|^2 / 2, which is one inner product
                centroids = np.column_stack([centroids, np.einsum("ij,ij->i", centroids, centroids) / -2])
            # Out of the mapped file, where numbers stand at odd addresses, which costs matrix products a copy.
            self._flat = faiss.IndexFlatIP(centroids.shape[1])
            self._flat.add(np.ascontiguousarray(centroids))
            self._centroids = faiss.rev_swig_ptr(self._flat.get_xb(), centroids.size).reshape(centroids.shape)
        # How far below the bar a list may score by another order of summation and still be among the nearest: two sums
        # differ by at most d * 2^-23 * |query| * |centroid|, and both the list's and the bar's may.
        width = self._centroids.shape[1]
        self._reach = float(np.linalg.norm(self._centroids, axis=1).max()) * width * 2.0**-22
        self._params: dict[int, Any] = {}
        self._zeros = np.zeros(1 << 12, dtype=np.float32)
        self._ptr = faiss.swig_ptr
        self._forms = _Forms()

    @property
    def base(self) -> Lists:
        """The lists of part 0, which never change."""
        return self._base or self

    # -------------------------------------------------------------------------------------------- plan
    def nearest_lists(self, query: F32, nprobe: int, enough: int) -> I64:
        """List numbers, nearest first: `nprobe` of them, or as many more as it takes to hold `enough` vectors."""
        return self._nearest(query, nprobe, enough, self._held)[0]

    def _by_cluster(self, sizes: I64) -> I64:
        return sizes if len(sizes) == self.nlist else sizes.reshape(-1, self.nlist).sum(axis=0)

    def _as_probe(self, queries: F32) -> F32:
        """Queries as centroids are compared with them."""
        if not self.is_l2:
            return queries
        ones = np.ones((*queries.shape[:-1], 1), dtype=np.float32)
        return np.ascontiguousarray(np.concatenate([queries, ones], axis=-1))

    def _nearest(self, query: F32, nprobe: int, enough: int, held_in: I64) -> tuple[I64, F32]:
        if self.nlist == 1:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
        query = self._as_probe(query)
        ptr = self._ptr
        some = nprobe + _SPARE_LISTS
        if some < self.nlist:
            scores, near = np.empty((1, some), dtype=np.float32), np.empty((1, some), dtype=np.int64)
            self._flat.search_c(1, ptr(query), some, ptr(scores), ptr(near), None)
            if scores[0, nprobe - 1] - scores[0, -1] > self._reach * math.sqrt(float(query @ query)):
                scores, near = self._canonical(query, near)[0], near[0]
                order = np.lexsort((near, -scores))[:nprobe]
                near = near[order]
                if self._hold(near, held_in, enough):
                    return near, scores[order]
        scores = self._canonical(query, np.arange(self.nlist)[None])[0]
        order = np.argsort(-scores, kind="stable")
        held = np.cumsum(held_in[order])
        order = order[: max(nprobe, int(np.searchsorted(held, enough)) + 1)]
        return order, scores[order]

    def _hold(self, lists: I64, held_in: I64, enough: int) -> bool:
        """Whether these clusters hold enough."""
        if held_in is self._held and self._least[len(lists)] >= enough:
            return True
        return int(held_in[lists].sum()) >= enough

    def _canonical(self, queries: F32, lists: I64) -> F32:
        """Scores of these lists' centroids, of the shape of `lists`, -inf for list -1: bits that nothing else moves.

        FAISS's product of one pair. Its product of one query with all centroids sums in another order at some
        dimensions (at 8, for one), so it finds candidates only, as matrix products do.
        """
        scores = np.empty(lists.shape, dtype=np.float32)
        self._faiss.omp_set_num_threads(1)
        ptr = self._ptr
        self._faiss.fvec_inner_products_by_idx(
            ptr(scores), ptr(queries), ptr(self._centroids), ptr(lists), queries.shape[-1], len(lists), lists.shape[1]
        )
        return scores

    def _nearest_of_many(self, queries: F32, nprobe: int) -> tuple[I64, F32]:
        """What `_nearest` gives each query where `nprobe` lists hold enough; matrix products find the candidates.

        Shapes (queries, nprobe).
        """
        count = len(queries)
        queries = self._as_probe(queries)
        products = np.empty((count, self.nlist), dtype=np.float32)
        width = max(1, _TILE_PRODUCTS // (count * self._centroids.shape[1]))
        even = self.nlist - self.nlist % width
        tiles = self._centroids[:even].reshape(-1, width, self._centroids.shape[1]).transpose(0, 2, 1)
        np.matmul(queries, tiles, out=products[:, :even].reshape(count, -1, width).transpose(1, 0, 2))
        if even < self.nlist:
            np.matmul(queries, self._centroids[even:].T, out=products[:, even:])
        bars = _bars(products, nprobe) - self._reach * np.linalg.norm(queries, axis=1)
        rows, columns = np.divmod((products >= bars[:, None]).ravel().nonzero()[0], self.nlist)
        found = np.bincount(rows, minlength=count)
        lists = np.full((count, int(found.max(initial=1))), -1, dtype=np.int64)
        lists[rows, np.arange(len(rows)) - np.repeat(np.cumsum(found) - found, found)] = columns
        scores = self._canonical(queries, lists) + np.float32(0)  # no -0
        # One sort of integers: the score's bits, made to rise as it falls, above the list's number.
        bits = scores.view(np.int32)
        falling = ~(bits ^ ((bits >> 31) & 0x7FFFFFFF))
        keys = (falling.astype(np.int64) << 32) | (lists & 0xFFFFFFFF)
        keys.sort(axis=1)
        keys = keys[:, :nprobe]
        bits = ~(keys >> 32).astype(np.int32)
        scores = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(np.float32)
        return (keys << 32) >> 32, scores

    def _rank(
        self, queries: F32, nprobe: Sequence[int], enough: int, only: Selection | None
    ) -> tuple[I64, F32, list[int]]:
        """The lists of each query, nearest first, with their scores, and how many; -1 and -inf fill the rows up."""
        held = self._held if only is None else self._by_cluster(only.sizes)
        count, most = len(queries), max(nprobe)
        if count < _TOGETHER or most >= self.nlist:
            rows = [self._nearest(query, n, enough, held) for query, n in zip(queries, nprobe, strict=True)]
        else:
            parts = [self._nearest_of_many(queries[n : n + _BLOCK], most) for n in range(0, count, _BLOCK)]
            lists = np.concatenate([lists for lists, _ in parts])
            near = np.concatenate([near for _, near in parts])
            if min(nprobe) < most:
                beyond = np.arange(most) >= np.array(nprobe)[:, None]
                lists[beyond], near[beyond] = -1, -np.inf
            # A row that holds too little is ranked again, farther.
            enough_there = only is None and self._least[min(nprobe)] >= enough
            short = [] if enough_there else np.flatnonzero((held[lists] * (lists >= 0)).sum(axis=1) < enough).tolist()
            if not short:
                return self._spread(lists, near, list(nprobe), only)
            rows = [(one[:n], score[:n]) for one, score, n in zip(lists, near, nprobe, strict=True)]
            for row in short:
                rows[row] = self._nearest(queries[row], nprobe[row], enough, held)
        units = [len(lists) for lists, _ in rows]
        if count == 1:
            return self._spread(rows[0][0][None], rows[0][1][None], units, only)
        lists = np.full((count, max(units)), -1, dtype=np.int64)
        near = np.full(lists.shape, -np.inf, dtype=np.float32)
        for row, (one, scores) in enumerate(rows):
            lists[row, : len(one)], near[row, : len(one)] = one, scores
        return self._spread(lists, near, units, only)

    def _spread(self, lists: I64, near: F32, units: list[int], only: Selection | None) -> tuple[I64, F32, list[int]]:
        """Every part of a cluster in the cluster's place; what holds nothing that is wanted is left out."""
        if self.parts == 1 and only is None:
            return lists, near, units
        parts = self.nlist * np.arange(self.parts)
        lists = np.where(lists[:, :, None] < 0, -1, lists[:, :, None] + parts).reshape(len(lists), -1)
        near = np.repeat(near, self.parts, axis=1)
        wanted = (lists >= 0) & ((self.sizes if only is None else only.sizes)[lists] > 0)
        wanted[:, 0] |= ~wanted.any(axis=1)  # a search has at least one unit
        order = np.argsort(~wanted, axis=1, kind="stable")
        units = wanted.sum(axis=1).tolist()
        beyond = np.arange(lists.shape[1]) >= np.array(units)[:, None]
        lists, near = np.take_along_axis(lists, order, axis=1), np.take_along_axis(near, order, axis=1)
        lists[beyond], near[beyond] = -1, -np.inf
        return lists[:, : max(units)], near[:, : max(units)], units

    def _batch(self, queries: F32, k: int, nprobe: Sequence[int], only: Selection | None) -> _Batch:
        only = only or self.alive
        count = self.count if only is None else only.count
        k = max(1, min(k, count))  # a heap has a place
        lists, near, units = self._rank(queries, nprobe, k, only)
        shape = (len(queries), min(k + _SPARE, max(1, count)))
        scores, ids = np.full(shape, -np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
        return _Batch(queries, k, only, lists, near, units, scores, ids)

    def begin(
        self,
        query: F32,
        k: int,
        nprobe: int,
        *,
        request: SearchRequest | None = None,
        budget: Budget | None = None,
        gap: float | None = None,
        only: Selection | None = None,
    ) -> ListSearch:
        """A search of `query` (shape (dim,), contiguous) that has ranked its lists and scanned none.

        `only`: the vectors that it may find (a selection holds no deleted ones).
        """
        return ListSearch(self, self._batch(query[None], k, [nprobe], only), 0, request, budget, gap)

    def begin_many(
        self,
        queries: F32,
        k: Sequence[int],
        nprobe: Sequence[int],
        requests: Sequence[SearchRequest] | None = None,
        budgets: Sequence[Budget | None] | None = None,
        gaps: Sequence[float | None] | None = None,
        only: Sequence[Selection | None] | None = None,
    ) -> list[ListSearch]:
        """`begin` for each row of `queries` (shape (n, dim), contiguous), in a fraction of the time.

        Those with one k and one selection are one batch.
        """
        out: dict[int, ListSearch] = {}
        for alike in _alike(k, only):
            batch = self._batch(
                queries if len(alike) == len(k) else queries[alike],
                k[alike[0]],
                [nprobe[n] for n in alike],
                None if only is None else only[alike[0]],
            )
            for row, n in enumerate(alike):
                out[n] = ListSearch(
                    self,
                    batch,
                    row,
                    None if requests is None else requests[n],
                    None if budgets is None else budgets[n],
                    None if gaps is None else gaps[n],
                )
        return [out[n] for n in range(len(k))]

    # -------------------------------------------------------------------------------------------- run
    def search(
        self,
        queries: F32,
        k: Sequence[int],
        nprobe: Sequence[int],
        only: Sequence[Selection | None] | None = None,
    ) -> list[tuple[F32, I64]]:
        """For each query, scores and ids of its best k: fewer only where the index holds fewer.

        What `begin_many`, `scan` and `finish` give, without what it takes to stop in between.
        """
        queries = np.ascontiguousarray(queries)
        if self._are_few(k, nprobe, only):
            found = self._search_few(queries, k[0], nprobe[0])
            if found is not None:
                return found
        if self.base.accelerator is not None:
            searches = self.begin_many(queries, k, nprobe, only=only)
            self.scan(searches)
            return [self.best(search) for search in searches]
        out: dict[int, tuple[F32, I64]] = {}
        for alike in _alike(k, only):
            batch = self._batch(
                queries if len(alike) == len(k) else queries[alike],
                k[alike[0]],
                [nprobe[n] for n in alike],
                None if only is None else only[alike[0]],
            )
            self._faiss.omp_set_num_threads(1)
            self._wave(batch.queries, batch.lists, batch.scores, batch.ids, batch.only, whole=True)
            out.update(zip(alike, self._best_of_batch(batch), strict=True))
        return [out[n] for n in range(len(k))]

    def _are_few(self, k: Sequence[int], nprobe: Sequence[int], only: Sequence[Selection | None] | None) -> bool:
        count = len(k)
        if not 0 < count <= _FEW or not self._is_plain or self.base.accelerator is not None:
            return False
        if count * nprobe[0] >= self.nlist or (only is not None and any(only)):  # beyond, lists are shared
            return False
        return k.count(k[0]) == nprobe.count(nprobe[0]) == count

    def _search_few(self, queries: F32, k: int, nprobe: int) -> list[tuple[F32, I64]] | None:
        """The results of a few searches in two FAISS calls and little else; None if the lists are unproven.

        Needs the set of the nearest lists and not their order: no products of one pair where the last list's score is
        clear of the next one's. A scan leaves so little of the interpreter in the processor's caches that a function
        of numpy's costs 30 us at first: what products of matrices save is less, up to about 8 queries.
        """
        count, width, keep = len(queries), nprobe + nprobe // 32 + 1, k + _SPARE
        if width >= self.nlist or self._least[nprobe] < keep:
            return None
        faiss, ptr = self._faiss, self._ptr
        room = self._rooms.get(width) if count == 1 else _Room(count, width)
        address, near, lists = ptr(queries), room.near, room.lists
        faiss.omp_set_num_threads(1)
        self._flat.search_c(count, address, width, room.near_at, room.lists_at, None)
        norms = np.empty(count, dtype=np.float32)
        faiss.fvec_norms_L2(ptr(norms), address, self.dim, count)
        edges = near[:, nprobe - 1 : nprobe + 1].tolist()
        for row, (norm, (last, beyond)) in enumerate(zip(norms.tolist(), edges, strict=True)):
            if not last - beyond > self._reach * norm:
                if not last - near.item(row, width - 1) > self._reach * norm:
                    return None
                scores = self._canonical(queries[row : row + 1], lists[row : row + 1])[0]
                lists[row] = lists[row, np.lexsort((lists[row], -scores))]
        lists, lists_at = (lists, room.lists_at) if count == 1 else (kept := lists[:, :nprobe].copy(), ptr(kept))
        scores, ids = np.empty((count, keep), dtype=np.float32), np.empty((count, keep), dtype=np.int64)
        self._sorting.search_preassigned_c(
            count, address, keep, lists_at, room.near_at, ptr(scores), ptr(ids), False, self._params_of(nprobe)
        )
        out = [(scores[row, :k], ids[row, :k]) for row in range(count)]
        if np.count_nonzero(scores[:, 1:] == scores[:, :-1]):
            batch = _Batch(queries, k, None, lists[:, :nprobe], near, [nprobe] * count, scores, ids)
            return self._best_of_batch(batch)
        return out

    def scan(self, searches: Sequence[ListSearch], budget: ScanBudget | None = None) -> None:
        """Scans on until every search is done or the budget is spent, everyone's nearest lists first.

        A budget is for all searches together and is looked at between groups of lists, cut by the vectors that they
        hold and not by their number; at least one list is scanned where one is left.
        """
        units = codes = None
        until = None
        if budget is not None:
            units, codes = budget.units, budget.codes
            until = None if budget.seconds is None else time.perf_counter() + budget.seconds
        while active := [search for search in searches if not search.done]:
            work = [(search, self._group(search, until is not None)) for search in active]
            if units is not None or codes is not None:
                work, units, codes = _cut(work, units, codes)
            self._step(work)
            if (units is not None and units <= 0) or (codes is not None and codes <= 0):
                return
            if until is not None and time.perf_counter() >= until:
                return

    def _group(self, search: ListSearch, timed: bool) -> Ranks:
        """The next lists of one search: as many as are scanned before anyone looks up."""
        left = search.remaining()
        rule = search.budget
        size = _STEP_CODES if timed or search.gap is not None or (rule and rule.seconds is not None) else _GROUP_CODES
        if rule is not None and rule.lists is not None:
            left = left[: max(1, rule.lists - search._taken)]
        if len(left) * self._largest <= size:
            return left
        held = np.cumsum(_of(search.costs, left))
        return left if held[-1] <= size else left[: int(np.searchsorted(held, size)) + 1]

    def run(self, work: Sequence[tuple[ListSearch, Sequence[int] | I64]]) -> None:
        """Scans the given ranks of each search. Those that were scanned before, and cancelled searches, are left out.

        Raises `ValueError` for a search that stands there twice (one step at a time) or is one of another index.
        """
        if self._run_next(*work[0]) if len(work) == 1 else self._run_abreast(work):
            return
        if len({id(search) for search, _ in work}) < len(work):
            raise ValueError("a search stands twice in one step")
        steps: list[tuple[ListSearch, Ranks]] = []
        for search, wanted in work:
            if search.of is not self:
                raise ValueError("a search of another index")
            if search.cancelled:
                continue
            if isinstance(wanted, range) and wanted.start == search.rank == search._taken and wanted.step == 1:
                if wanted.stop > search.units:
                    wanted = wanted[: search.units - search.rank]
                if wanted:
                    steps.append((search, wanted))
                continue
            ranks = np.asarray(wanted, dtype=np.int64)
            if (ranks < 0).any():
                raise ValueError("ranks count from 0")
            fresh = ranks[~search.scanned[ranks]]
            if len(fresh) > 1 and (np.diff(fresh) <= 0).any():
                fresh = np.unique(fresh)  # nearest first
            if len(fresh):
                steps.append((search, fresh))
        self._step(steps)

    def _run_next(self, search: ListSearch, ranks: Sequence[int] | I64) -> bool:
        """Whether these are the next ranks of a search that goes on alone: then they were scanned, in little time."""
        if not isinstance(ranks, range) or ranks.start != search.rank or search._mask is not None or ranks.step != 1:
            return False
        if not search.rank < ranks.stop <= search.units or search.cancelled or search.of is not self:
            return False
        if self.base.accelerator is not None:
            return False
        batch, row = search.batch, search.row
        self._faiss.omp_set_num_threads(1)
        lists = batch.lists[row : row + 1, ranks.start : ranks.stop]
        self._call(batch.queries[row], lists, batch.scores[row], batch.ids[row], batch.only)
        search._took(ranks)
        return True

    def _run_abreast(self, work: Sequence[tuple[ListSearch, Sequence[int] | I64]]) -> bool:
        """Whether this is a whole batch, in order, that goes on together: then the ranks were scanned, as above."""
        if not work or self.base.accelerator is not None:
            return False
        batch, ranks = work[0][0].batch, work[0][1]
        if not isinstance(ranks, range) or ranks.step != 1 or len(work) != len(batch.queries) or not ranks:
            return False
        start, stop = ranks.start, ranks.stop
        for row, (search, wanted) in enumerate(work):
            if search.batch is not batch or search.row != row:
                return False
            if wanted is not ranks and not (isinstance(wanted, range) and wanted == ranks):
                return False
            if search.rank != start or search._mask is not None or search.units < stop or search.cancelled:
                return False
        if work[0][0].of is not self:
            return False
        self._faiss.omp_set_num_threads(1)
        self._wave(batch.queries, batch.lists[:, start:stop], batch.scores, batch.ids, batch.only)
        for search, _ in work:
            search._took(ranks)
        return True

    def _step(self, work: list[tuple[ListSearch, Ranks]]) -> None:
        """Scans these ranks, which were not scanned before, here and on the device if there is one."""
        accelerator = self.base.accelerator
        if accelerator is None:
            self._scan_here(work)
            return
        beside = accelerator.start(work)
        try:
            self._scan_here(beside.rest)
            self._scan_here(beside.merge())
        finally:
            beside.close()

    def _scan_here(self, work: list[tuple[ListSearch, Ranks]]) -> None:
        self._faiss.omp_set_num_threads(1)  # counted per calling thread, and this may be any worker
        # Heaps of one call have one size; up to twice their own is padding, beyond is another call. And one selection.
        if len(work) == 1 or len({search.batch for search, _ in work}) == 1:
            groups = [work] if work else []
        else:
            sizes: defaultdict[tuple[int, int], list[tuple[ListSearch, Ranks]]] = defaultdict(list)
            for item in work:
                sizes[item[0].batch.scores.shape[1].bit_length(), id(item[0].only)].append(item)
            groups = list(sizes.values())
        for alike in groups:
            self._run(alike)
            for search, ranks in alike:
                search._took(ranks)

    def _run(self, work: list[tuple[ListSearch, Ranks]]) -> None:
        search, ranks = work[0]
        batch = search.batch
        if len(work) == 1:
            self._call(search.query, _of(search.lists, ranks)[None], search.scores, search.ids, batch.only)
            return
        count = len(work)
        alike = isinstance(ranks, range) and all(isinstance(other, range) and other == ranks for _, other in work)
        if isinstance(ranks, range) and alike and all(s.batch is batch for s, _ in work):
            lists = batch.lists[:, ranks.start : ranks.stop]
            if count < len(batch.queries) or any(s.row != row for row, (s, _) in enumerate(work)):
                lists = lists[[s.row for s, _ in work]]
        else:
            lists = np.full((count, max(len(ranks) for _, ranks in work)), -1, dtype=np.int64)
            for row, (search, ranks) in enumerate(work):
                lists[row, : len(ranks)] = _of(search.lists, ranks)
        if count == len(batch.queries) and all(s.batch is batch and s.row == row for row, (s, _) in enumerate(work)):
            self._wave(batch.queries, lists, batch.scores, batch.ids, batch.only)  # the searches' own heaps
            return
        # One heap a row. Places beyond a search's own heap hold +inf: they are never the worst, so nothing goes there.
        shape = (count, max(s.batch.scores.shape[1] for s, _ in work))
        scores, ids = np.full(shape, np.inf, dtype=np.float32), np.full(shape, -1, dtype=np.int64)
        for row, (search, _) in enumerate(work):
            size = search.batch.scores.shape[1]
            scores[row, :size] = search.scores
            ids[row, :size] = search.ids
        self._wave(np.stack([search.query for search, _ in work]), lists, scores, ids, batch.only)
        for row, (search, _) in enumerate(work):
            size = search.batch.scores.shape[1]
            search.scores[:] = scores[row, :size]
            search.ids[:] = ids[row, :size]

    def _wave(
        self, queries: F32, lists: I64, scores: F32, ids: I64, only: Selection | None, *, whole: bool = False
    ) -> None:
        """Scans row n of `lists` (-1 is none) for query n, in the form that is cheapest, into the heaps in row n.

        `whole`: the heaps are empty before, and are left in order, the best first.
        """
        share, codes, keep, began = 1.0, 0, scores.shape[1], 0.0
        form: Form = "query"
        if len(queries) > 1:
            visits = np.bincount(lists.ravel() + 1, minlength=len(self.sizes) + 1)[1:]
            share = int(visits.sum()) / max(1, int(np.count_nonzero(visits)))
            if share >= SHARED_ENOUGH:
                codes = int(visits @ self.sizes)
                form = self._forms.choose(share, keep, codes, self._has_products)
                began = self._forms.now()
        if form == "query":
            self._call(queries, lists, scores, ids, only, whole=whole)
        elif form == "list":
            self._by_list(queries, lists, scores, ids, only)
        else:
            self._by_products(queries, lists, scores, ids, only)
        if whole and form != "query":
            self._heaps(scores, ids).reorder()
        if codes:
            self._forms.learn(share, keep, codes, form, self._forms.now() - began)

    def _pairs(self, lists: I64) -> tuple[I64, I64]:
        """Every (query, list) of `lists`, sorted by list: the lists, and the queries' rows."""
        flat = lists.ravel()
        owner = np.repeat(np.arange(len(lists)), lists.shape[1])
        order = flat.astype(np.uint16 if len(self.sizes) < 1 << 16 else np.int64).argsort(kind="stable")  # 16: by radix
        flat, owner = flat[order], owner[order]
        there = flat >= 0
        return (flat, owner) if there.all() else (flat[there], owner[there])

    def _by_list(self, queries: F32, lists: I64, scores: F32, ids: I64, only: Selection | None) -> None:
        """Every list through the queries that want it, in calls of bounded size whose rows are (query, list)."""
        # Everyone's nearest lists first, on their own: they set the bars that keep the other rows short.
        keep = scores.shape[1]
        few = min(keep, max(_ROW_PLACES, keep // 4))
        if (scores[:, 0] == -np.inf).any():
            first = -(-keep // (2 * _ROW_PLACES))
            self._call(queries, lists[:, :first], scores, ids, only)
            lists = lists[:, first:]
        wanted, owner = self._pairs(lists)
        step = max(1, _ROW_BYTES // (12 * few + 4 * self.dim))
        for start in range(0, len(wanted), step):
            who, rows = owner[start : start + step], wanted[start : start + step]
            full = self._rows(queries, rows, who, few, scores, ids, only)
            if full is not None:  # what such a row dropped may be good enough
                self._rows(queries, rows[full], who[full], keep, scores, ids, only)

    def _rows(
        self, queries: F32, lists: I64, who: I64, places: int, scores: F32, ids: I64, only: Selection | None
    ) -> I64 | None:
        """Scans list n for query who[n], which has so many places for what passes its heap's bar, into the heaps.

        Which rows had too few: these are left out.
        """
        bars = scores[:, 0][who]
        found = np.repeat(bars[:, None], places, axis=1)
        names = np.full(found.shape, -1, dtype=np.int64)
        self._call(queries[who], lists[:, None], found, names, only)
        full = None
        if places < scores.shape[1]:
            over = found[:, 0] > bars
            if over.any():
                full, there = over.nonzero()[0], ~over
                who, found, names = who[there], found[there], names[there]
        self._heaps(scores, ids).addn_query_subset_with_ids(
            len(who), self._ptr(who), places, self._ptr(found), self._ptr(names), places
        )
        return full

    def _heaps(self, scores: F32, ids: I64) -> Any:
        """FAISS's functions over these heaps, which must outlive it."""
        heap = self._faiss.float_minheap_array_t()
        heap.nh, heap.k, heap.val, heap.ids = len(scores), scores.shape[1], self._ptr(scores), self._ptr(ids)
        return heap

    def _by_products(self, queries: F32, lists: I64, scores: F32, ids: I64, only: Selection | None) -> None:
        """Every list decoded once and multiplied with the queries that want it; what may pass a bar is scored by FAISS.

        Two orders of summation differ by at most dim * 2^-23 * |query| * |vector|; twice that is the margin.
        """
        # Everyone's nearest lists first: they set the bars.
        first = max(1, lists.shape[1] // _BARS_FROM)
        self._call(queries, lists[:, :first], scores, ids, only)
        wanted, owner = self._pairs(lists[:, first:])
        if not len(wanted):
            return
        if not self._can_scale(queries):  # numbers too large, or a thread that flushes small ones
            self._by_list(queries, lists[:, first:], scores, ids, only)
            return
        scaled = queries * self._scale
        slack = np.linalg.norm(queries, axis=1).astype(np.float32) * np.float32(self.dim * 2.0**-22)
        ends = np.append(np.flatnonzero(np.diff(wanted)) + 1, len(wanted)).tolist()
        widest = max(int(self.sizes[wanted].max()), 1)
        buffer = np.empty(widest * self.dim, dtype=np.int32)
        found: list[tuple[I64, I64, npt.NDArray[np.uint8]]] = []  # rows of queries, ids, codes
        bars = scores[:, 0]
        start, fold_at = 0, len(wanted) // 4
        for end in ends:
            number, who = int(wanted[start]), owner[start:end]
            if self.sizes[number]:
                codes, held = self._view(number)
                vectors = self._decoded(codes, buffer)
                least = bars.take(who) - slack.take(who) * self._norm(number, vectors)
                passing = (_products(scaled.take(who, axis=0), vectors) >= least[:, None]).ravel().nonzero()[0]
                if len(passing):
                    row, place = np.divmod(passing, len(held))
                    if only is not None:
                        chosen = only.holds(held[place])
                        row, place = row[chosen], place[chosen]
                    found.append((who[row], held[place], codes[place]))
            start = end
            if end >= fold_at and found:
                self._fold(queries, found, scores, ids)
                found = []
                fold_at = len(wanted)
        if found:
            self._fold(queries, found, scores, ids)

    def _fold(self, queries: F32, found: list[tuple[I64, I64, npt.NDArray[np.uint8]]], scores: F32, ids: I64) -> None:
        """Scores these vectors for these queries as a scan of lists would, into the heaps."""
        faiss, ptr = self._faiss, self._ptr
        rows = np.concatenate([rows for rows, _, _ in found])
        order = rows.astype(np.uint16 if len(queries) <= 1 << 16 else np.int64).argsort(kind="stable")
        names = np.concatenate([names for _, names, _ in found]).take(order)
        codes = np.concatenate([codes for _, _, codes in found]).take(order, axis=0)
        counts = np.bincount(rows, minlength=len(queries))
        lists = faiss.ArrayInvertedLists(len(queries), self._index.code_size)
        start = 0
        for row, count in enumerate(counts.tolist()):
            if count:
                names_of, codes_of = names[start:], codes[start:]
                lists.add_entries(row, count, ptr(names_of), ptr(codes_of))
                start += count
        index = self._like(lists)
        own = np.where(counts > 0, np.arange(len(queries)), -1)[:, None]
        self._preassigned(index, queries, own, scores, ids, self._params_of(1))

    def _like(self, lists: Any) -> Any:
        """An index of other lists whose vectors are coded, and scored, as in this one."""
        faiss, index = self._faiss, self._index
        if isinstance(index, faiss.IndexIVFScalarQuantizer):
            kind = index.sq.qtype
            out = faiss.IndexIVFScalarQuantizer(
                index.quantizer, self.dim, lists.nlist, kind, index.metric_type, False, False
            )
        else:
            out = faiss.IndexIVFFlat(index.quantizer, self.dim, lists.nlist, index.metric_type, False)
        if out.code_size == self.dim:  # sq8 has learnt each dimension's range
            out.sq = index.sq
        out.is_trained = True
        out.parallel_mode = _NO_HEAP_INIT
        out.replace_invlists(lists, False)
        return out

    def _view(self, number: int) -> tuple[npt.NDArray[np.uint8], I64]:
        """`stored`, kept for the lists that never change."""
        if number >= self.nlist:
            return self.stored(number)
        views = self.base._views
        view = views.get(number)
        if view is None:
            view = views[number] = self.base.stored(number)
        return view

    def _decoded(self, codes: npt.NDArray[np.uint8], buffer: npt.NDArray[np.int32]) -> F32:
        """Vectors of shape (len(codes), dim), divided by `_scale`; they may lie in `buffer`.

        Half floats become floats by moving their bits: sign at the top, the rest 13 to the left, which divides by
        2^112 and takes 10 us where numpy's conversion takes 64 (39,000 numbers).
        """
        if not self._is_half:
            return codes.view(np.float32)
        bits = buffer[: len(codes) * self.dim].reshape(len(codes), self.dim)
        bits[:] = codes.view(np.int16)
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _HALF_BITS, out=bits)
        return bits.view(np.float32)

    def _can_scale(self, queries: F32) -> bool:
        if not self._is_half:
            return True
        tiny = np.full(1, 2.0**-140, dtype=np.float32)
        return float(np.abs(queries).max()) < 2.0**14 and float((tiny * self._scale)[0]) == 2.0**-28

    def _norm(self, number: int, vectors: F32) -> float:
        """The largest norm in a list, computed at the first visit."""
        norm = float(self._norms[number])
        if norm < 0:
            exact = vectors * self._scale
            norm = self._norms[number] = float(np.sqrt(np.einsum("ij,ij->i", exact, exact).max())) * (1 + 2.0**-10)
        return norm

    def _params_of(self, width: int) -> Any:
        params = self._params.get(width)
        if params is None:
            params = self._params[width] = self._faiss.SearchParametersIVF(nprobe=width)
        return params

    def _call(
        self, queries: F32, lists: I64, scores: F32, ids: I64, only: Selection | None, *, whole: bool = False
    ) -> None:
        """One FAISS call: row i of `lists` (-1 is skipped) for query i, into the heaps in row i of `scores`, `ids`."""
        params = self._params_of(lists.shape[1]) if only is None else only.params(lists.shape[1])
        self._preassigned(self._sorting if whole else self._index, queries, lists, scores, ids, params)

    def _preassigned(self, index: Any, queries: F32, lists: I64, scores: F32, ids: I64, params: Any) -> None:
        """Every array has a name while FAISS holds its address, which keeps nothing alive."""
        lists = np.ascontiguousarray(lists)
        coarse = self._zeros  # in place of the centroids' scores, which only residuals need
        if len(coarse) < lists.size:
            coarse = self._zeros = np.zeros(2 * lists.size, dtype=np.float32)
        ptr = self._ptr
        if self.is_l2:  # FAISS keeps distances, in heaps with the largest on top: the same heaps, negated
            np.negative(scores, out=scores)
        index.search_preassigned_c(
            len(lists),
            ptr(queries),
            scores.shape[-1],
            ptr(lists),
            ptr(coarse),
            ptr(scores),
            ptr(ids),
            False,
            params,
        )
        if self.is_l2:
            np.negative(scores, out=scores)

    # -------------------------------------------------------------------------------------------- merge
    def merge(self, search: ListSearch, ranks: I64 | Sequence[int], scores: F32, ids: I64) -> None:
        """Takes in what was found elsewhere in the lists of these ranks, and counts those as scanned.

        Scores must be canonical (the scanner's bits). All entries of the lists are to be given, or at least the best
        `len(search.scores)` of them, in any order; entries with id -1 are none. Raises `ValueError` if one of the
        lists was scanned before: its entries would stand in the result twice.
        """
        taken = np.unique(np.asarray(ranks, dtype=np.int64))
        if search.scanned[taken].any():
            raise ValueError("one of these lists was scanned before")
        found = ids >= 0
        every = np.concatenate([search.scores, scores[found]])
        names = np.concatenate([search.ids, ids[found]])
        keep = len(search.scores)
        top = np.argpartition(every, len(every) - keep)[len(every) - keep :]
        top = top[np.argsort(every[top])]  # rising scores are a heap
        search.scores[:] = every[top]
        search.ids[:] = names[top]
        search._took(taken)

    def best(self, search: ListSearch) -> tuple[F32, I64]:
        """Scores and ids of the exact best k of the lists scanned so far, by (score descending, id ascending)."""
        return self._best(search.batch, search.row, search)

    def _best(self, batch: _Batch, row: int, search: ListSearch | None = None) -> tuple[F32, I64]:
        """`best` of a row; all its lists were scanned where there is no `search` to ask."""
        scores, ids, k = batch.scores[row], batch.ids[row], batch.k
        order = np.lexsort((ids, -scores))
        worst = scores[order[-1]]
        if worst == scores[order[k - 1]] and worst != -np.inf:
            lists = batch.lists[row, : batch.units[row]] if search is None else search.lists[search.scanned]
            scores, ids = self._as_good_as(batch, row, lists, float(worst))
            order = np.lexsort((ids, -scores))
        order = order[:k]
        scores, ids = scores[order], ids[order]
        if len(ids) and ids[-1] < 0:
            found = ids >= 0
            scores, ids = scores[found], ids[found]
        return scores, ids

    def _best_of_batch(self, batch: _Batch) -> list[tuple[F32, I64]]:
        """The result of each search of a batch that was scanned whole and left in order."""
        scores, ids, k = batch.scores, batch.ids, batch.k
        # Neighbours that are equal: a tie, or places that stayed free.
        unclear = ((scores[:, 1:] == scores[:, :-1]).any(axis=1) | (ids[:, -1] < 0)).nonzero()[0].tolist()
        out = [(scores[row, :k], ids[row, :k]) for row in range(len(scores))]
        if unclear:
            scores[ids < 0] = -np.inf  # FAISS has the smallest number there
        for row in unclear:
            out[row] = self._best(batch, row)
        return out

    def _as_good_as(self, batch: _Batch, row: int, lists: I64, score: float) -> tuple[F32, I64]:
        """All entries of these lists with this score or a better one."""
        held = int(self.sizes[lists].sum())
        bar = np.nextafter(np.float32(score), np.float32(-np.inf))
        self._faiss.omp_set_num_threads(1)
        size = min(batch.scores.shape[1], held)
        while True:
            scores, ids = np.full(size, bar, dtype=np.float32), np.full(size, -1, dtype=np.int64)
            self._call(batch.queries[row], lists[None, :], scores, ids, batch.only)
            found = ids >= 0
            if size == held or not found.all():  # a free place is left: nothing was dropped
                return scores[found], ids[found]
            size = min(4 * size, held)

    def finish(self, search: ListSearch) -> tuple[F32, I64]:
        """The result, after scanning what is left and was not stopped. Raises `CancelledError` for a cancelled one."""
        if search.cancelled:
            raise CancelledError("the search was cancelled")
        if not search.done:
            self.scan([search])
        return self.best(search)

    # -------------------------------------------------------------------------------------------- vectors
    def positions(self, wanted: I64) -> Iterator[tuple[int, list[int], I64]]:
        """(list number, offsets in it, ids there) for those of the `wanted` ids, sorted, that each list holds."""
        for number, size in enumerate(self.sizes.tolist()):
            if size:
                held = self._faiss.rev_swig_ptr(self._index.invlists.get_ids(number), size)
                offsets = np.flatnonzero(np.isin(held, wanted, assume_unique=True))
                yield number, offsets.tolist(), held[offsets]

    def stored(self, number: int) -> tuple[npt.NDArray[np.uint8], I64]:
        """The codes, of shape (vectors, bytes), and the ids of a list, where they lie; `self` keeps them there."""
        size, lists = int(self.sizes[number]), self._index.invlists
        codes = self._faiss.rev_swig_ptr(lists.get_codes(number), size * lists.code_size)
        return codes.reshape(size, lists.code_size), self._faiss.rev_swig_ptr(lists.get_ids(number), size)

    @cached_property
    def _clusters(self) -> npt.NDArray[np.int32]:
        """Of each id the cluster, -1 for those that are not here."""
        held = [(n, self.stored(n)[1]) for n in np.flatnonzero(self.sizes).tolist()]
        out = np.full(max((int(ids.max()) for _, ids in held), default=-1) + 1, -1, dtype=np.int32)
        for number, ids in held:
            out[ids] = number
        return out

    def clusters_of(self, ids: I64) -> I64:
        """The clusters of these passages, each once; of those in part 0."""
        known = self.base._clusters
        found = np.unique(known[ids[(ids >= 0) & (ids < len(known))]]).astype(np.int64)
        return found[found >= 0]

    def decode(self, number: int, offset: int) -> F32:
        """The vector at a place of a list, as the scanner sees it."""
        out = np.empty(self.dim, dtype=np.float32)
        self._index.reconstruct_from_offset(number, offset, self._ptr(out))
        return out


def _alike(k: Sequence[int], only: Sequence[Selection | None] | None) -> list[list[int]]:
    """The numbers of the searches, those together that have one k and one selection."""
    if only is None and k.count(k[0] if k else 0) == len(k):
        return [list(range(len(k)))] if k else []
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for n, one in enumerate(k):
        groups[one, 0 if only is None else id(only[n])].append(n)
    return list(groups.values())


def _products(a: F32, b: F32) -> F32:
    """The inner product of each row of `a` with each of `b`, of shape (len(a), len(b)), in tiles (`_TILE_PRODUCTS`)."""
    (count, dim), size = a.shape, len(b)
    rows = max(1, _TILE_PRODUCTS // (size * dim))
    if size * dim > _TILE_PRODUCTS:
        step = max(1, _TILE_PRODUCTS // dim)
        return np.concatenate([_products(a, b[n : n + step]) for n in range(0, size, step)], axis=1)
    if count <= rows:
        return np.asarray(a @ b.T)
    even = count - count % rows
    out = np.empty((count, size), dtype=np.float32)
    np.matmul(a[:even].reshape(-1, rows, dim), b.T, out=out[:even].reshape(-1, rows, size))
    if even < count:
        np.matmul(a[even:], b.T, out=out[even:])
    return out


def _bars(scores: F32, nprobe: int) -> F32:
    """For each row a number that at least `nprobe` (fewer than there are) of its scores reach, and few more do.

    Where rows are long: the `nprobe`-th largest of the maxima of at least twice as many groups.
    """
    size = scores.shape[1] // (2 * nprobe)
    if size > 1:
        groups = scores.shape[1] // size
        scores = scores[:, : size * groups].reshape(len(scores), size, groups).max(axis=1)
    at = scores.shape[1] - nprobe
    return np.asarray(np.partition(scores, at, axis=1)[:, at])


def _cut(
    work: list[tuple[ListSearch, Ranks]], units: int | None, codes: int | None
) -> tuple[list[tuple[ListSearch, Ranks]], int | None, int | None]:
    """The part of the work that a budget allows, by nearness and then by search; and what the budget has left."""
    owner = np.repeat(np.arange(len(work)), [len(ranks) for _, ranks in work])
    place = np.concatenate([np.arange(len(ranks)) for _, ranks in work])
    held = np.concatenate([_of(search.costs, ranks) for search, ranks in work])
    order = np.argsort(place, kind="stable")
    spent = np.cumsum(held[order])
    count = len(order)
    if codes is not None:
        count = min(count, int(np.searchsorted(spent, codes)) + 1)
    if units is not None:
        count = min(count, max(1, units))
    taken = np.bincount(owner[order[:count]], minlength=len(work)).tolist()
    part = [(search, ranks[:n]) for (search, ranks), n in zip(work, taken, strict=True) if n]
    return (
        part,
        None if units is None else units - count,
        None if codes is None else codes - int(spent[count - 1]),
    )
