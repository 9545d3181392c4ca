"""One step of a search on two processors: lists that lie on the device are scanned there, the others here, exactly.

The device answers with more candidates than are wanted, by scores that are not canonical. They are scored again here,
from the host's codes, in one FAISS call, and merged with what the CPU found. That is exact if nothing that the device
left out could belong to the result, which is checked for each search:

    the last candidate's score on the device + eps <= the worst score that the search keeps

where eps bounds what two float32 sums of d products may differ by. If fewer candidates came than were asked for, none
were left out. Where the check fails (many vectors with nearly the same score, a filter that few candidates pass) the
device is asked for as many as it can give, and after that the lists are scanned here like any other.

So which lists are resident moves time and nothing else: results are the same ids and the same bits.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", 2002, section 3.1 (the bound); Hu et al., "HedraRAG",
2025, section 4.4, and Lin et al., "TeleRAG", 2025, section 4, which scan on both and do not check.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..scan import F32, I64, Lists, ListSearch, Ranks, load_faiss
from .cache import ListCache
from .devices import Codes, Scan

__all__ = ["HostLists", "HybridScanner"]

_SPARE = 4  # candidates beyond the k + 2 that a search keeps; with fp16 codes 6 beyond k were enough in every case met
Work = list[tuple[ListSearch, Ranks]]


class HostLists:
    """The codes of an index's lists as arrays. Implements `ListSource`.

    Raises `TypeError` for codes that are not the vectors themselves, in fp16 or fp32.
    """

    def __init__(self, lists: Lists) -> None:
        self.lists = lists  # keeps what the arrays point at
        self.dim = lists.dim
        self.is_l2 = lists.is_l2
        self.sizes: I64 = lists.sizes[: lists.nlist]
        faiss, index = load_faiss(), lists._index
        if isinstance(index, faiss.IndexIVFFlat):
            self.dtype: Any = np.dtype(np.float32)
        elif isinstance(index, faiss.IndexIVFScalarQuantizer) and index.sq.qtype == faiss.ScalarQuantizer.QT_fp16:
            self.dtype = np.dtype(np.float16)
        else:
            raise TypeError(f"the codes of a {type(index).__name__} are not vectors in fp16 or fp32")
        self.norms = np.zeros(len(self.sizes), dtype=np.float64)  # the longest vector of each list once it was read
        self._views: dict[int, tuple[Codes, I64]] = {}

    def view(self, number: int) -> tuple[Codes, I64]:
        """Codes of shape (vectors, dim) and ids of a list that is not empty."""
        found = self._views.get(number)
        if found is None:
            raw, ids = self.lists.stored(number)
            found = self._views[number] = raw.view(self.dtype), ids
        return found

    def codes(self, number: int) -> Codes:
        codes = self.view(number)[0]
        if not self.norms[number]:
            wide = codes.astype(np.float32)
            self.norms[number] = np.sqrt(np.einsum("ij,ij->i", wide, wide).max()) * (1 + 1e-4)
        return codes

    def error(self, query: F32, numbers: npt.NDArray[np.int64]) -> float:
        """The most by which two float32 scores of the query and a vector of these lists may differ."""
        length, longest = float(np.linalg.norm(query)), float(self.norms[numbers].max())
        # Each sum is off by at most d * 2^-24 / (1 - d * 2^-24) of the sum of magnitudes; a distance has a difference
        # and a square before it is summed.
        unit = 2.0**-24
        terms = self.dim + 3 if self.is_l2 else self.dim
        size = (length + longest) ** 2 if self.is_l2 else length * longest
        return 2 * terms * unit / (1 - terms * unit) * size


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one search gave to the device: ranks of its own, and the lists there."""

    search: ListSearch
    ranks: I64
    numbers: I64
    pages: I64


@dataclass(slots=True, eq=False)
class _Step:
    """A step of which a part runs on the device. Implements `Beside`."""

    scanner: HybridScanner
    rest: Work
    parts: list[_Part]
    probed: list[I64]
    hits: int
    hit_codes: int
    held: contextlib.ExitStack
    scan: Scan | None = None
    k: int = 0
    rest_codes: int = 0
    began_s: float = field(default_factory=time.thread_time)

    def merge(self) -> Work:
        self.scanner.cache.learn(self.rest_codes, time.thread_time() - self.began_s)
        if self.scan is None:
            return []
        try:
            left = self.scanner.take(self.parts, self.scan, self.k)
            if left and self.k < self.scanner.cache.device.max_k:
                k = self.scanner.cache.device.max_k
                left = self.scanner.take(left, self.scanner.launch(left, k), k)
        except Exception as e:  # a device that fails is one without any list
            self.scanner.fail(e)
            left = [part for part in self.parts if not part.search.scanned[part.ranks].any()]
        self.scanner.unproven += len(left)
        return [(part.search, part.ranks) for part in left]

    def close(self) -> None:
        self.held.close()
        if self.probed:
            self.scanner.cache.note(self.probed, self.hits, self.hit_codes)


class HybridScanner:
    """Scans steps of searches on a device and on the CPU at once. Implements `Accelerator`.

    `unproven` counts the searches of a step that had to be scanned again on the CPU; `failure` is the device's error
    after which it was not used any more.
    """

    def __init__(self, source: HostLists, cache: ListCache) -> None:
        self.source = source
        self.cache = cache
        self.unproven = 0
        self.failure: Exception | None = None
        self._scratch = threading.local()

    def start(self, work: Work) -> _Step:
        """The step, after its device part was launched."""
        device, nlist = self.cache.device, self.source.lists.nlist
        rest: Work = []
        mine: list[tuple[ListSearch, I64, I64]] = []
        for search, ranks in work:
            every = np.arange(ranks.start, ranks.stop) if isinstance(ranks, range) else ranks
            numbers = search.lists[every]
            # Rules that stop a search early look at what was scanned in which order; the steps of those stay here. So
            # do those with a filter that few pass: candidates would be of no use.
            filtered = search.only is not None and 2 * search.only.count < search.of.count
            ruled = search.gap is not None or search.budget is not None
            if ruled or filtered or len(search.scores) + _SPARE > device.max_k:
                rest.append((search, ranks))
                continue
            base = numbers < nlist  # what was added since lies in further lists, which grow
            if not base.all():
                rest.append((search, every[~base]))
            mine.append((search, every[base], numbers[base]))
        held = contextlib.ExitStack()
        probed = [numbers for _, _, numbers in mine if len(numbers)]
        step = _Step(self, rest, [], probed, 0, 0, held)
        if not probed or self.failure is not None:
            step.probed = []
            rest += [(search, ranks) for search, ranks, numbers in mine if len(numbers)]
            return step
        try:
            pages = held.enter_context(self.cache.pinned(probed))
            self._split(step, mine, pages)
        except BaseException:
            held.close()
            raise
        return step

    def _split(self, step: _Step, mine: Sequence[tuple[ListSearch, I64, I64]], pages: Mapping[int, I64]) -> None:
        parts, misses = [], []
        for search, ranks, numbers in mine:
            here = np.array([number in pages for number in numbers.tolist()], dtype=np.bool_)
            if here.any():
                found = numbers[here]
                step.hits += len(found)
                step.hit_codes += int(self.source.sizes[found].sum())
                wanted = np.concatenate([pages[number] for number in found.tolist()])
                parts.append(_Part(search, ranks[here], found, wanted))
            if not here.all():
                misses.append((search, ranks[~here]))
        if step.hit_codes * self.cache.code_s <= self.cache.device.launch_s:  # too little to be worth a launch
            step.rest += [(search, ranks) for search, ranks, _ in mine if len(ranks)]
        else:
            try:
                step.k = max(len(part.search.scores) for part in parts) + _SPARE
                step.scan = self.launch(parts, step.k)
                step.parts = parts
                step.rest += misses
            except Exception as e:
                self.fail(e)
                step.scan = None
                step.rest += [(search, ranks) for search, ranks, _ in mine if len(ranks)]
        step.rest_codes = sum(int(search.codes[ranks].sum()) for search, ranks in _arrays(step.rest))
        step.began_s = time.thread_time()

    def launch(self, parts: Sequence[_Part], k: int) -> Scan:
        queries = np.stack([part.search.query for part in parts])
        return self.cache.device.scan(queries, [part.pages for part in parts], k)

    def fail(self, error: Exception) -> None:
        """Uses the device no more."""
        self.failure = error

    def take(self, parts: Sequence[_Part], scan: Scan, k: int) -> list[_Part]:
        """Merges what the scan found into the searches; gives back those for which that could not be proven exact."""
        approximate, names = scan.result()
        scores, ids = self.canonical([part.search for part in parts], names)
        left = []
        for row, part in enumerate(parts):
            search, found = part.search, ids[row] >= 0
            if names[row, k - 1] >= 0:  # there may be more
                bar = float(approximate[row, k - 1]) + self.source.error(search.query, part.numbers)
                every = np.concatenate([search.scores, scores[row][found]])
                keep = len(search.scores)
                if bar > float(np.partition(every, len(every) - keep)[len(every) - keep]):
                    left.append(part)
                    continue
            search.of.merge(search, part.ranks, scores[row][found], ids[row][found])
        return left

    def canonical(self, searches: Sequence[ListSearch], names: I64) -> tuple[F32, I64]:
        """Canonical scores and ids, of the shape of `names`, of those candidates that the searches may find.

        The candidates' codes become lists of an index of their own, one a search, so that the scanner that scans lists
        scores them: one FAISS call for all searches that share a selection.
        """
        scores = np.full(names.shape, -np.inf, dtype=np.float32)
        ids = np.full(names.shape, -1, dtype=np.int64)
        flat = names.ravel()
        at = np.flatnonzero(flat >= 0)
        at = at[np.argsort(flat[at], kind="stable")]
        if not len(at):
            return scores, ids
        codes = np.empty((flat.size, self.source.dim), dtype=self.source.dtype)
        called = np.empty(flat.size, dtype=np.int64)
        number, offset = flat[at] >> 32, flat[at] & 0xFFFFFFFF
        cuts = np.flatnonzero(np.diff(number)) + 1
        for places, offsets in zip(np.split(at, cuts), np.split(offset, cuts), strict=True):
            held, names_there = self.source.view(int(flat[places[0]] >> 32))
            codes[places] = held[offsets]
            called[places] = names_there[offsets]
        groups: dict[int, list[int]] = {}
        for row, search in enumerate(searches):
            groups.setdefault(id(search.only), []).append(row)
        for rows in groups.values():
            only = searches[rows[0]].only
            queries = np.stack([searches[row].query for row in rows])
            by_row = codes.reshape(*names.shape, self.source.dim), called.reshape(names.shape)
            scores[rows], ids[rows] = self._scores(queries, *by_row, names, rows, only)
        return scores, ids

    def _scores(
        self, queries: F32, codes: npt.NDArray[Any], called: I64, names: I64, rows: list[int], only: Any
    ) -> tuple[F32, I64]:
        faiss = load_faiss()
        faiss.omp_set_num_threads(1)
        ptr = faiss.swig_ptr
        index = self._like(faiss)
        lists = faiss.ArrayInvertedLists(len(rows), index.code_size)
        for number, row in enumerate(rows):
            there = names[row] >= 0
            mine, my_ids = np.ascontiguousarray(codes[row][there]), np.ascontiguousarray(called[row][there])
            raw = mine.view(np.uint8)
            if len(my_ids):
                lists.add_entries(number, len(my_ids), ptr(my_ids), ptr(raw))
        index.nlist = len(rows)
        index.replace_invlists(lists, False)
        k = names.shape[1]
        scores, ids = np.empty((len(rows), k), dtype=np.float32), np.empty((len(rows), k), dtype=np.int64)
        own, coarse = np.arange(len(rows))[:, None].copy(), np.zeros((len(rows), 1), dtype=np.float32)
        params = self._scratch.params if only is None else only.params(1)
        index.search_preassigned_c(
            len(rows), ptr(queries), k, ptr(own), ptr(coarse), ptr(scores), ptr(ids), False, params
        )
        index.nlist = 1
        index.replace_invlists(self._scratch.empty, False)  # `lists` ends here
        if self.source.is_l2:
            np.negative(scores, out=scores)
        return scores, ids

    def _like(self, faiss: Any) -> Any:
        """This thread's index without vectors, whose scanner is that of the lists."""
        index = getattr(self._scratch, "index", None)
        if index is None:
            dim, l2 = self.source.dim, self.source.is_l2
            metric = faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
            self._scratch.quantizer = faiss.IndexFlat(dim, metric)
            if self.source.dtype == np.float16:
                codec = faiss.ScalarQuantizer.QT_fp16
                index = faiss.IndexIVFScalarQuantizer(self._scratch.quantizer, dim, 1, codec, metric, False)
            else:
                index = faiss.IndexIVFFlat(self._scratch.quantizer, dim, 1, metric)
            index.is_trained = True
            self._scratch.empty = faiss.ArrayInvertedLists(1, index.code_size)
            self._scratch.params = faiss.SearchParametersIVF(nprobe=1)
            self._scratch.index = index
        return index


def _arrays(work: Work) -> list[tuple[ListSearch, I64]]:
    return [(s, np.arange(r.start, r.stop) if isinstance(r, range) else r) for s, r in work]
