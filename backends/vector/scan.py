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

Many searches are scanned in one of two forms. *Query by query*, each goes through its lists. *List by list* (a
wavefront), rows of (query, list) are sorted by list, so that a list is read from memory once for all who want it, and
one FAISS call runs them all. Rows start with their query's worst kept score as the bar, so few entries come out of
them, and a C loop folds those into the heaps.

Source of the sub-stages: Hu et al., "HedraRAG", 2025, section 4; of the wavefront's form and its limits: measured.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import Budget, ScanBudget, SearchRequest

__all__ = ["SHARED_ENOUGH", "Accelerator", "Beside", "ListSearch", "Lists", "Selection", "load_faiss"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Ranks = range | I64  # rising, each once; a range has no steps

# Visits to lists per distinct list, from which on a wave may be scanned list by list. Below, the lists are read from
# memory once in either form and the rows only cost. Above, both forms are tried and the cheaper one kept: an index
# that fits in the processor's cache gains nothing at any share (16,425 x 384 in fp16: never; 262,800 x 384: from about
# 2, 1.35 times at 4.5 and 1.45 times at 16).
SHARED_ENOUGH = 1.3
_SPARE = 2  # results kept beyond k, so that a tie at the end is seen; more would make every heap slower
_GROUP_CODES = 16_384  # vectors a search scans before others and cancellation get their turn; about 0.4 ms
_STEP_CODES = 1_024  # the same where a rule may stop the search: about 25 us, against 4 us that a step costs
_ROW_BYTES = 4 << 20  # of queries and heaps that the rows of one call may take
_TOGETHER = 4  # queries from which on centroids are scored by matrix products
_BLOCK = 32  # queries of one such product
# Multiplications of one matrix product. OpenBLAS, which numpy brings, starts its threads above this, and they spin
# beside the other workers: 32 queries against 2,048 centroids cost 11 ms of processor time in one product on two busy
# cores, and 0.3 ms in tiles.
_TILE_PRODUCTS = 1 << 18
_LEARN_CODES = 20_000  # a wave of fewer takes too short a time to learn from
_NONE, _NO_SCORES = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32)
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

    def params(self, nprobe: int) -> Any:
        """FAISS's parameters of a call with so many lists a row."""
        found = self._params.get(nprobe)
        if found is None:
            found = self._params[nprobe] = load_faiss().SearchParametersIVF(nprobe=nprobe, sel=self._selector)
        return found


# ------------------------------------------------------------------------------------------------ the state of a search
@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """Searches that began together lie together: row n of each array is the n-th search's."""

    queries: F32
    scores: F32
    ids: I64


@dataclass(slots=True, eq=False)
class ListSearch:
    """One search under way. Belongs to one thread at a time, but for `cancel`, which any may call.

    `lists`, `near` and `codes` are the probed lists, nearest first: number, inner product with the query, vectors held
    (`total` of them).
    `scores` and `ids`, of shape (min(k + 2, vectors in the index),), are a heap with the worst first; (-inf, -1) are
    its free places.
    """

    of: Lists
    query: F32
    k: int
    lists: I64
    near: F32
    codes: I64
    total: int
    scores: F32
    ids: I64
    request: SearchRequest | None = None
    budget: Budget | None = None
    block: _Block | None = None
    row: int = 0
    gap: float | None = None  # stop where the next list's centroid lies this far below the k-th best
    only: Selection | None = None  # None: every vector
    scanned: npt.NDArray[np.bool_] = field(init=False)
    rank: int = field(default=0, init=False)  # the nearest list that was not scanned
    stopped: str = field(default="", init=False)  # the rule that ended the search early: "lists", "seconds", "gap"
    cancelled: bool = field(default=False, init=False)
    began_s: float = field(default=0.0, init=False)
    _taken: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scanned = np.zeros(len(self.lists), dtype=np.bool_)
        if self.budget is not None:
            self.began_s = time.perf_counter()

    @property
    def units(self) -> int:
        """How many lists there are to scan."""
        return len(self.lists)

    @property
    def costs(self) -> I64:
        """Vectors in each list."""
        return self.codes

    @property
    def done(self) -> bool:
        """Whether nothing is left to scan: all was, or a stopping rule holds, or it was cancelled."""
        return self._taken == len(self.lists) or self.cancelled or bool(self.stopped)

    @property
    def _is_plain(self) -> bool:
        """Whether all lists are to be scanned, in one go."""
        return (
            self.budget is None
            and self.gap is None
            and not self._taken
            and not self.cancelled
            and self.total <= _GROUP_CODES
        )

    def remaining(self) -> Ranks:
        """Ranks of the lists that were not scanned, nearest first; none once `done`."""
        if self.done:
            return range(0)
        if self._taken == self.rank:
            return range(self.rank, len(self.lists))
        return np.flatnonzero(~self.scanned)

    def cancel(self) -> None:
        """Ends the search at the next step between two scans; `finish` refuses it then."""
        self.cancelled = True

    def _took(self, ranks: Ranks) -> None:
        """Notes what was scanned, and whether that is enough."""
        self._taken += len(ranks)
        if self._taken == len(self.lists):
            self.scanned[:] = True
            self.rank = self._taken
            return
        if isinstance(ranks, range):
            self.scanned[ranks.start : ranks.stop] = True
        else:
            self.scanned[ranks] = True
        self.rank += int(self.scanned[self.rank :].argmin())
        if self.budget is not None:
            if self.budget.lists is not None and self._taken >= self.budget.lists:
                self.stopped = "lists"
            elif self.budget.seconds is not None and time.perf_counter() - self.began_s >= self.budget.seconds:
                self.stopped = "seconds"
        # Calibrated on the nearest lists in order: results of lists farther out must not raise the bar.
        ordered = self._taken == self.rank
        if ordered and self.gap is not None and float(self.near[self.rank]) < self.kth() - self.gap:
            self.stopped = "gap"

    def kth(self) -> float:
        """The k-th best score so far, -inf while there are fewer."""
        return float(np.partition(self.scores, len(self.scores) - self.k)[len(self.scores) - self.k])


def _of(values: I64, ranks: Ranks) -> I64:
    return values[ranks.start : ranks.stop] if isinstance(ranks, range) else values[ranks]


# ------------------------------------------------------------------------------------------------ which form is cheaper
class _Forms:
    """Chooses between the two forms by what they cost before, for waves alike in sharing and in heap size.

    Costs are this thread's processor time per vector. Other work on the machine only ever adds to it, so the least that
    was seen counts, and fades by a hundredth a wave. One wave in 32 goes to the form that lost, so that the choice
    follows the machine. The choice moves time only, never a result.
    """

    def __init__(self, now: Callable[[], float] = time.thread_time) -> None:
        self.now = now
        self._cost: dict[tuple[int, int, bool], float] = {}
        self._waves: defaultdict[tuple[int, int], int] = defaultdict(int)

    @staticmethod
    def _key(share: float, keep: int) -> tuple[int, int]:
        return int(2 * np.log2(share)), keep.bit_length()

    def by_list(self, share: float, keep: int, codes: int) -> bool:
        if share < SHARED_ENOUGH:
            return False
        key = self._key(share, keep)
        rows, each = self._cost.get((*key, True)), self._cost.get((*key, False))
        cheaper = rows is not None and each is not None and rows < each
        if codes < _LEARN_CODES:
            return cheaper
        wave = self._waves[key]
        self._waves[key] += 1
        if wave < 6:  # three of each
            return wave % 2 == 0
        return cheaper != (wave % 32 == 0)

    def learn(self, share: float, keep: int, codes: int, by_list: bool, seconds: float) -> None:
        if share < SHARED_ENOUGH or codes < _LEARN_CODES:
            return
        key = (*self._key(share, keep), by_list)
        old, new = self._cost.get(key), seconds / codes
        self._cost[key] = new if old is None else min(1.01 * old, new)


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
        self.is_l2 = index.metric_type == faiss.METRIC_L2
        if base is None:
            self._centroids = np.ascontiguousarray(index.quantizer.reconstruct_n(0, self.nlist))
            if self.is_l2:  # the nearest centroid c of q has the largest q.c - |c|^2 / 2, which is one inner product
                half = np.einsum("ij,ij->i", self._centroids, self._centroids) / -2
                self._centroids = np.ascontiguousarray(np.column_stack([self._centroids, half]))
        else:
            self._centroids = base._centroids
        self._tiles: F32 | None = None if base is None else base._tiles
        # How far below the bar a list may score by another order of summation and still be among the nearest: two sums
        # differ by at most d * 2^-23 * |query| * |centroid|, and both the list's and the bar's may.
        width = self._centroids.shape[1]
        self._reach = float(np.linalg.norm(self._centroids, axis=1).max()) * width * 2.0**-20
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
        return self._nearest(query, nprobe, enough)[0]

    def _by_cluster(self, sizes: I64) -> I64:
        return sizes if len(sizes) == self.nlist else sizes.reshape(-1, self.nlist).sum(axis=0)

    def _as_probe(self, queries: F32) -> F32:
        """Queries as centroids are compared with them."""
        if not self.is_l2:
            return queries
        ones = np.ones((*queries.shape[:-1], 1), dtype=np.float32)
        return np.ascontiguousarray(np.concatenate([queries, ones], axis=-1))

    def _nearest(self, query: F32, nprobe: int, enough: int, held_in: I64 | None = None) -> tuple[I64, F32]:
        if self.nlist == 1:
            return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.float32)
        if held_in is None:
            held_in = self._held
        query = self._as_probe(query)
        scores = np.empty(self.nlist, dtype=np.float32)
        self._faiss.fvec_inner_products_ny(
            self._ptr(scores), self._ptr(query), self._ptr(self._centroids), len(query), self.nlist
        )
        if nprobe < self.nlist:
            bar = _bars(scores[None, :], nprobe)[0] - self._reach * math.sqrt(float(query @ query))
            near = np.flatnonzero(scores >= bar)
            scores = self._canonical(query[None], near[None])[0]
            order = np.argsort(-scores, kind="stable")[:nprobe]
            near = near[order]
            if len(near) == nprobe and int(held_in[near].sum()) >= enough:
                return near, scores[order]
        scores = self._canonical(query[None], np.arange(self.nlist)[None])[0]
        order = np.argsort(-scores, kind="stable")
        held = np.cumsum(held_in[order])
        order = order[: max(nprobe, int(np.searchsorted(held, enough)) + 1)]
        return order, scores[order]

    def _canonical(self, queries: F32, lists: I64) -> F32:
        """Scores of these lists' centroids, of the shape of `lists`, -inf for list -1: bits that nothing else moves.

        FAISS's product of one pair. Its product of one query with all centroids sums in another order at some
        dimensions (at 8, for one), so it finds candidates only, as matrix products do.
        """
        scores = np.empty(lists.shape, dtype=np.float32)
        self._faiss.omp_set_num_threads(1)
        ptr = self._ptr
        self._faiss.fvec_inner_products_by_idx(
            ptr(scores), ptr(queries), ptr(self._centroids), ptr(lists), queries.shape[1], len(lists), lists.shape[1]
        )
        return scores

    def _nearest_of_many(self, queries: F32, nprobe: int) -> list[tuple[I64, F32]]:
        """What `_nearest` gives each query where `nprobe` lists hold enough; matrix products find the candidates."""
        count = len(queries)
        queries = self._as_probe(queries)
        if self._tiles is None:
            dim = self._centroids.shape[1]
            width = max(1, _TILE_PRODUCTS // (_BLOCK * dim))
            padded = np.zeros((-(-self.nlist // width) * width, dim), dtype=np.float32)
            padded[: self.nlist] = self._centroids
            self._tiles = np.ascontiguousarray(padded.reshape(-1, width, dim).transpose(0, 2, 1))
        products = np.matmul(queries[None], self._tiles).transpose(1, 0, 2).reshape(count, -1)[:, : self.nlist]
        bars = _bars(products, nprobe) - self._reach * np.linalg.norm(queries, axis=1)
        rows, columns = np.nonzero(products >= bars[:, None])
        found = np.bincount(rows, minlength=count)
        lists = np.full((count, int(found.max(initial=1))), -1, dtype=np.int64)
        lists[rows, np.arange(len(rows)) - np.repeat(np.cumsum(found) - found, found)] = columns
        scores = self._canonical(queries, lists)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :nprobe]
        lists, scores = np.take_along_axis(lists, order, axis=1), np.take_along_axis(scores, order, axis=1)
        return list(zip(lists, scores, strict=True))

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
        only = only or self.alive
        k = _most(k, self.count if only is None else only.count)
        held = None if only is None else self._by_cluster(only.sizes)
        return self._begun(query, k, *self._nearest(query, nprobe, k, held), request, budget, gap, only=only)

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
        """`begin` for each row of `queries` (shape (n, dim), contiguous), in a fraction of the time."""
        out: list[ListSearch] = []
        chosen = [self.alive] * len(queries) if only is None else [one or self.alive for one in only]
        home = None
        if len(queries) > 1 and len(set(k)) == len(set(map(id, chosen))) == 1:
            home = _Block(queries, *_empty(len(queries), self._heap(k[0], chosen[0])))
        for start in range(0, len(queries), _BLOCK):
            block = queries[start : start + _BLOCK]
            most = max(nprobe[start : start + _BLOCK])
            ranked: list[tuple[I64, F32]] | None = None
            if len(block) >= _TOGETHER and most < self.nlist:
                ranked = self._nearest_of_many(block, most)
            for at, query in enumerate(block, start=start):
                among = chosen[at]
                want, probes = _most(k[at], self.count if among is None else among.count), nprobe[at]
                held = self._held if among is None else self._by_cluster(among.sizes)
                lists, near = (_NONE, _NO_SCORES) if ranked is None else ranked[at - start]
                lists, near = lists[:probes], near[:probes]
                if len(lists) < probes or lists[-1] < 0 or int(held[lists].sum()) < want:
                    lists, near = self._nearest(query, probes, want, held)
                request = None if requests is None else requests[at]
                budget = None if budgets is None else budgets[at]
                gap = None if gaps is None else gaps[at]
                out.append(
                    self._begun(
                        query, want, lists, near, request, budget, gap, home, at if home is not None else 0, among
                    )
                )
        return out

    def _heap(self, k: int, only: Selection | None) -> int:
        """Places in the heap of a search for the best k."""
        count = self.count if only is None else only.count
        return min(_most(k, count) + _SPARE, max(1, count))

    def _begun(
        self,
        query: F32,
        k: int,
        lists: I64,
        near: F32,
        request: SearchRequest | None,
        budget: Budget | None,
        gap: float | None,
        block: _Block | None = None,
        row: int = 0,
        only: Selection | None = None,
    ) -> ListSearch:
        if self.parts > 1 or only is not None:
            # Every part of a cluster stands where the cluster does; what holds nothing that is wanted is left out.
            lists = (lists[:, None] + self.nlist * np.arange(self.parts)).ravel()
            near = np.repeat(near, self.parts)
            wanted = (self.sizes if only is None else only.sizes)[lists] > 0
            wanted[0] |= not wanted.any()  # a search has at least one unit
            lists, near = lists[wanted], near[wanted]
        codes = self.sizes[lists]
        if block is None:
            block = _Block(query[None], *_empty(1, self._heap(k, only)))
        return ListSearch(
            self,
            query,
            k,
            lists,
            near,
            codes,
            int(codes.sum()),
            block.scores[row],
            block.ids[row],
            request,
            budget,
            block,
            row,
            gap,
            only,
        )

    # -------------------------------------------------------------------------------------------- run
    def search(self, queries: F32, k: Sequence[int], nprobe: Sequence[int]) -> list[tuple[F32, I64]]:
        """For each query, scores and ids of its best k: fewer only where the index holds fewer."""
        queries = np.ascontiguousarray(queries)
        searches = self.begin_many(queries, k, nprobe)
        self.scan(searches)
        return self._best_of_all(searches)

    def scan(self, searches: Sequence[ListSearch], budget: ScanBudget | None = None) -> None:
        """Scans on until every search is done or the budget is spent, everyone's nearest lists first.

        A budget is for all searches together and is looked at between groups of lists, cut by the vectors that they
        hold and not by their number; at least one list is scanned where one is left.
        """
        if budget is None and len(searches) == 1 and searches[0]._is_plain and self.base.accelerator is None:
            search = searches[0]  # the common case of one question, without the bookkeeping of many
            self._faiss.omp_set_num_threads(1)
            self._call(search.query, search.lists[None], search.scores, search.ids, search.only)
            search._took(range(len(search.lists)))
            return
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
        if rule is None and search.gap is None and not timed and search.total <= _GROUP_CODES:
            return left
        size = _STEP_CODES if timed or search.gap is not None or (rule and rule.seconds is not None) else _GROUP_CODES
        if rule is not None and rule.lists is not None:
            left = left[: max(1, rule.lists - search._taken)]
        held = np.cumsum(_of(search.codes, left))
        return left if held[-1] <= size else left[: int(np.searchsorted(held, size)) + 1]

    def run(self, work: Sequence[tuple[ListSearch, Sequence[int] | I64]]) -> None:
        """Scans the given ranks of each search. Those that were scanned before, and cancelled searches, are left out.

        Raises `ValueError` for a search that stands there twice (one step at a time) or is one of another index.
        """
        if len({id(search) for search, _ in work}) < len(work):
            raise ValueError("a search stands twice in one step")
        steps: list[tuple[ListSearch, Ranks]] = []
        for search, wanted in work:
            if search.of is not self:
                raise ValueError("a search of another index")
            if search.cancelled:
                continue
            if isinstance(wanted, range) and wanted.step == 1 and wanted.start == search.rank == search._taken:
                wanted = wanted[: len(search.lists) - search.rank]
                if len(wanted):
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
        sizes: defaultdict[tuple[int, int], list[tuple[ListSearch, Ranks]]] = defaultdict(list)
        for item in work:
            sizes[len(item[0].scores).bit_length(), id(item[0].only)].append(item)
        for alike in sizes.values():
            self._run(alike)
            for search, ranks in alike:
                search._took(ranks)

    def _run(self, work: list[tuple[ListSearch, Ranks]]) -> None:
        if len(work) == 1:
            search, ranks = work[0]
            self._call(search.query, _of(search.lists, ranks)[None, :], search.scores, search.ids, search.only)
            return
        only = work[0][0].only
        rows = [_of(search.lists, ranks) for search, ranks in work]
        wanted = np.concatenate(rows)
        codes = int(self.sizes[wanted].sum())
        share = len(wanted) / np.count_nonzero(np.bincount(wanted, minlength=len(self.sizes)))
        block = work[0][0].block
        if (
            block is not None
            and len(block.queries) == len(work)
            and all(search.block is block and search.row == row for row, (search, _) in enumerate(work))
        ):
            self._wave(rows, block.queries, block.scores, block.ids, only, share, codes)  # the searches' own heaps
            return
        keep = max(len(search.scores) for search, _ in work)
        # One heap a row. Places beyond a search's own heap hold +inf: they are never the worst, so nothing goes there.
        scores = np.full((len(work), keep), np.inf, dtype=np.float32)
        ids = np.full((len(work), keep), -1, dtype=np.int64)
        for row, (search, _) in enumerate(work):
            size = len(search.scores)
            scores[row, :size] = search.scores
            ids[row, :size] = search.ids
        self._wave(rows, np.stack([search.query for search, _ in work]), scores, ids, only, share, codes)
        for row, (search, _) in enumerate(work):
            size = len(search.scores)
            search.scores[:] = scores[row, :size]
            search.ids[:] = ids[row, :size]

    def _wave(
        self, rows: list[I64], queries: F32, scores: F32, ids: I64, only: Selection | None, share: float, codes: int
    ) -> None:
        """Scans the lists in `rows` for the queries, in the form that is cheaper, into their heaps."""
        keep = scores.shape[1]
        by_list = self._forms.by_list(share, keep, codes)
        began = self._forms.now()
        if by_list:
            self._by_list(rows, queries, scores, ids, only)
        else:
            self._by_query(rows, queries, scores, ids, only)
        self._forms.learn(share, keep, codes, by_list, self._forms.now() - began)

    def _by_query(
        self, rows: Sequence[I64], queries: F32, scores: F32, ids: I64, only: Selection | None = None
    ) -> None:
        """Every query through its own lists, one after another, in one call."""
        width = max(len(row) for row in rows)
        lists = np.full((len(rows), width), -1, dtype=np.int64)  # -1: FAISS skips it
        for at, row in enumerate(rows):
            lists[at, : len(row)] = row
        self._call(queries, lists, scores, ids, only)

    def _by_list(self, rows: list[I64], queries: F32, scores: F32, ids: I64, only: Selection | None = None) -> None:
        """Every list through the queries that want it, in calls of bounded size whose rows are (query, list)."""
        # Everyone's nearest list first, on its own: it sets the bar that keeps the other rows short.
        if (scores[:, 0] == -np.inf).any():
            self._by_query([row[:1] for row in rows], queries, scores, ids, only)
            rows = [row[1:] for row in rows]
        lists = np.concatenate(rows)
        owner = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        order = np.argsort(lists, kind="stable")
        lists, owner = lists[order], owner[order]
        keep = scores.shape[1]
        free = np.isposinf(scores)  # the places that are no one's
        padded = bool(free.any())
        step = max(1, _ROW_BYTES // (12 * keep + 4 * self.dim))
        heap = self._faiss.float_minheap_array_t()
        heap.nh, heap.k, heap.val, heap.ids = len(scores), keep, self._ptr(scores), self._ptr(ids)
        for start in range(0, len(lists), step):
            who = owner[start : start + step]
            rows_scores = np.repeat(scores[who, :1], keep, axis=1)
            if padded:
                rows_scores[free[who]] = np.inf
            rows_ids = np.full(rows_scores.shape, -1, dtype=np.int64)
            self._call(queries[who], lists[start : start + step, None], rows_scores, rows_ids, only)
            if padded:
                rows_scores[free[who]] = -np.inf  # or they would be taken for results
            heap.addn_query_subset_with_ids(
                len(who), self._ptr(who), keep, self._ptr(rows_scores), self._ptr(rows_ids), keep
            )

    def _call(self, queries: F32, lists: I64, scores: F32, ids: I64, only: Selection | None = None) -> None:
        """One FAISS call: row i of `lists` (-1 is skipped) for query i, into the heaps in row i of `scores`, `ids`.

        Every array has a name while FAISS holds its address, which keeps nothing alive.
        """
        lists = np.ascontiguousarray(lists)
        count, width = lists.shape
        coarse = self._zeros  # in place of the centroids' scores, which only residuals need
        if len(coarse) < count * width:
            coarse = self._zeros = np.zeros(2 * count * width, dtype=np.float32)
        if only is not None:
            params = only.params(width)
        else:
            params = self._params.get(width)
            if params is None:
                params = self._params[width] = self._faiss.SearchParametersIVF(nprobe=width)
        ptr = self._ptr
        if self.is_l2:  # FAISS keeps distances, in heaps with the largest on top: the same heaps, negated
            np.negative(scores, out=scores)
        self._index.search_preassigned_c(
            count,
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
        scores, ids = search.scores, search.ids
        order = np.lexsort((ids, -scores))
        worst, k = scores[order[-1]], search.k
        if worst == scores[order[k - 1]] and worst != -np.inf:
            scores, ids = self._as_good_as(search, float(worst))
            order = np.lexsort((ids, -scores))
        order = order[:k]
        scores, ids = scores[order], ids[order]
        if len(ids) and ids[-1] < 0:
            found = ids >= 0
            scores, ids = scores[found], ids[found]
        return scores, ids

    def _best_of_all(self, searches: Sequence[ListSearch]) -> list[tuple[F32, I64]]:
        """`best` of searches that began together, whose heaps can be put in order together."""
        block = searches[0].block if len(searches) > 1 else None
        if block is None or any(search.block is not block for search in searches):
            return [self.best(search) for search in searches]
        order = np.lexsort((block.ids, -block.scores), axis=1)
        scores = np.take_along_axis(block.scores, order, axis=1)
        ids = np.take_along_axis(block.ids, order, axis=1)
        k = searches[0].k
        clear = ((ids[:, -1] >= 0) & (scores[:, -1] < scores[:, k - 1])).tolist()  # full, and no tie at the end
        return [
            (scores[search.row, :k], ids[search.row, :k]) if clear[search.row] else self.best(search)
            for search in searches
        ]

    def _as_good_as(self, search: ListSearch, score: float) -> tuple[F32, I64]:
        """All entries of the scanned lists with this score or a better one."""
        lists = np.ascontiguousarray(search.lists[search.scanned])
        held = int(self.sizes[lists].sum())
        bar = np.nextafter(np.float32(score), np.float32(-np.inf))
        self._faiss.omp_set_num_threads(1)
        size = min(len(search.scores), held)
        while True:
            scores, ids = np.full(size, bar, dtype=np.float32), np.full(size, -1, dtype=np.int64)
            self._call(search.query, lists[None, :], scores, ids, search.only)
            found = ids >= 0
            if size == held or not found.all():  # a free place is left: nothing was dropped
                return scores[found], ids[found]
            size = min(4 * size, held)

    def finish(self, search: ListSearch) -> tuple[F32, I64]:
        """The result, after scanning what is left and was not stopped. Raises `CancelledError` for a cancelled one."""
        if search.cancelled:
            raise CancelledError("the search was cancelled")
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

    def decode(self, number: int, offset: int) -> F32:
        """The vector at a place of a list, as the scanner sees it."""
        out = np.empty(self.dim, dtype=np.float32)
        self._index.reconstruct_from_offset(number, offset, self._ptr(out))
        return out


def _most(k: int, count: int) -> int:
    """How many of the best k there can be; 1 where there are none, for a heap has a place."""
    return max(1, min(k, count))


def _empty(count: int, keep: int) -> tuple[F32, I64]:
    return np.full((count, keep), -np.inf, dtype=np.float32), np.full((count, keep), -1, dtype=np.int64)


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
    held = np.concatenate([_of(search.codes, ranks) for search, ranks in work])
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
