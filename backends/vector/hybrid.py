"""Words and meanings together: a BM25 search and a vector search of the same passages, fused into one ranking.

Two ways to fuse: by *reciprocal rank*, where a passage gets w / (60 + its place among the nearest) plus (1 - w) / (60 +
its place among the words' best); and by *score*, where both searches' scores are first brought to 0..1 within their
results. `weight`, w, is the nearest's share. Neither is right for every collection: on the FAQ of the Python
documentation plain fusion finds less than vectors alone (.74 against .82), on its index more (.86 against .77); so the
weight is a setting, and `HybridRetriever.tune` measures it on questions whose answers are known.

Source: Cormack, Clarke and Buettcher, "Reciprocal Rank Fusion Outperforms Condorcet and Individual Rank Learning
Methods", 2009; of the scores: Bruch, Gai and Ingber, "An Analysis of Fusion Functions for Hybrid Retrieval", 2023.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Doc, Docs
from flowc.runtime.protocols import Embedder, ScanBudget, SearchRequest

from .bm25 import BM25Retriever, WordSearch
from .ivf import IVFRetriever
from .scan import I64, ListSearch
from .store import Manifest

__all__ = ["Fusion", "HybridRetriever", "HybridSearch", "fuse"]

_RANK_CONSTANT = 60


@dataclass(frozen=True, slots=True)
class Fusion:
    """How two rankings become one. `depth`: results of each that are looked at; a search for more looks at more."""

    method: Literal["rank", "score"] = "rank"
    weight: float = 0.5
    depth: int = 50

    def __post_init__(self) -> None:
        if self.method not in ("rank", "score"):
            raise ResourceError(f"unknown fusion {self.method!r}", code="F063", hint='"rank" or "score"')
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float) or not 0 <= self.weight <= 1:
            raise ResourceError(f"the weight of a fusion lies between 0 and 1, found {self.weight!r}", code="F063")
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 1:
            raise ResourceError(f"the depth of a fusion is an integer from 1, found {self.depth!r}", code="F063")


def fuse(near: Docs, words: Docs, k: int, fusion: Fusion) -> Docs:
    """The best k passages of both rankings, by (fused score descending, id ascending)."""
    scores: dict[int, float] = {}
    docs: dict[int, Doc] = {}
    for found, share in ((near, fusion.weight), (words, 1 - fusion.weight)):
        low, high = min((d.score for d in found), default=0.0), max((d.score for d in found), default=0.0)
        for rank, doc in enumerate(found, 1):
            if fusion.method == "rank":
                part = 1 / (_RANK_CONSTANT + rank)
            else:
                part = (doc.score - low) / (high - low) if high > low else 1.0
            scores[doc.id] = scores.get(doc.id, 0.0) + share * part
            docs.setdefault(doc.id, doc)
    best = sorted(scores, key=lambda id: (-scores[id], id))[:k]
    return Docs(dataclasses.replace(docs[id], score=scores[id]) for id in best)


@dataclass(slots=True, eq=False)
class HybridSearch:
    """Both searches under way. Unit 0 is the one by words, the others are the lists of the other, nearest first."""

    request: SearchRequest
    near: ListSearch
    words: WordSearch

    @property
    def units(self) -> int:
        return 1 + self.near.units

    @property
    def costs(self) -> I64:
        return np.concatenate([np.array(self.words.costs, dtype=np.int64), self.near.costs])

    @property
    def done(self) -> bool:
        return self.words.done and self.near.done

    def remaining(self) -> I64:
        """The units not run yet; none once `done`."""
        return np.array([*self.words.remaining(), *(rank + 1 for rank in self.near.remaining())], dtype=np.int64)

    def cancel(self) -> None:
        """Ends the search before its next unit."""
        self.words.cancel()
        self.near.cancel()


class HybridRetriever:
    """A mapped index that is searched by words and by vectors. Implements `flowc.runtime.protocols.ElasticRetriever`.

    `fusion` stands in for the index's own. Safe to use from several threads.
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
        fusion: Fusion | None = None,
        verify: bool = False,
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.manifest = manifest
        self.near = IVFRetriever(path, manifest, embedder, name=name, nprobe=nprobe, verify=verify)
        self.words = BM25Retriever(path, manifest, name=name)
        self.fusion = fusion or Fusion(**manifest.settings["fusion"])
        self.nprobe = self.near.nprobe
        self.store = self.near.store

    def batch_key(self, request: SearchRequest) -> Hashable:
        return ("search", self.name, self.manifest.generation)

    def search(self, requests: Sequence[SearchRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request by the fused score, or that request's error, in order."""
        begun = self.begin(requests)
        out: list[Docs | Exception] = []
        try:
            self.scan([search for search in begun if isinstance(search, HybridSearch)])
        except FlowcError as e:
            return [e if isinstance(search, HybridSearch) else search for search in begun]
        for search in begun:
            try:
                out.append(self.finish(search) if isinstance(search, HybridSearch) else search)
            except FlowcError as e:
                out.append(e)
        return out

    def begin(self, requests: Sequence[SearchRequest]) -> Sequence[HybridSearch | Exception]:
        """Both searches planned for each request, or that request's error."""
        deep = [self._deeper(request) for request in requests]
        out: list[HybridSearch | Exception] = []
        for request, near, words in zip(requests, self.near.begin(deep), self.words.begin(deep), strict=True):
            if isinstance(near, Exception):
                out.append(near)
            elif isinstance(words, Exception):
                out.append(words)
            else:
                out.append(HybridSearch(request, near, words))
        return out

    def _deeper(self, request: SearchRequest) -> SearchRequest:
        """The request to each side; one that makes no sense stays so, and is refused by both."""
        k = request.k
        return dataclasses.replace(request, k=max(k, self.fusion.depth)) if type(k) is int and k > 0 else request

    def run(self, work: Sequence[tuple[HybridSearch, Sequence[int] | I64]]) -> None:
        """Runs these units; see `ElasticRetriever`. Raises F060 if the index was closed."""
        self.words.run([(search.words, [0]) for search, units in work if 0 in units])
        lists = [
            (search.near, np.array([unit - 1 for unit in units if unit], dtype=np.int64)) for search, units in work
        ]
        self.near.run([(search, ranks) for search, ranks in lists if len(ranks)])

    def scan(self, searches: Sequence[HybridSearch], budget: ScanBudget | None = None) -> None:
        """Runs on until every search is done or the budget is spent: words first, then everyone's nearest lists."""
        began = time.perf_counter()
        open_words = [search.words for search in searches if not search.words.done]
        self.words.scan(open_words, budget)
        if budget is not None and open_words:
            run = [search for search in open_words if search.done]
            left = dataclasses.replace(
                budget,
                units=None if budget.units is None else budget.units - len(run),
                codes=None if budget.codes is None else budget.codes - sum(search.cost for search in run),
                seconds=None if budget.seconds is None else budget.seconds - (time.perf_counter() - began),
            )
            if any(part is not None and part <= 0 for part in (left.units, left.codes, left.seconds)):
                return
            budget = left
        self.near.scan([search.near for search in searches], budget)

    def partial(self, search: HybridSearch) -> Docs:
        """The fused ranking of what both searches have found so far."""
        return fuse(self.near.partial(search.near), self.words.partial(search.words), search.request.k, self.fusion)

    def finish(self, search: HybridSearch) -> Docs:
        """The search's result, after what is left of it was run. Raises `CancelledError` if it was cancelled."""
        near = self.near.finish(search.near)
        return fuse(near, self.words.finish(search.words), search.request.k, self.fusion)

    def tune(
        self, queries: Sequence[str], relevant: Sequence[Collection[int]], *, k: int = 10
    ) -> tuple[Fusion, Mapping[Fusion, float]]:
        """The fusion with the highest mean reciprocal rank at k on these queries, and the table it was chosen from.

        `relevant` are the ids that answer each query. Each side is searched once; of equal fusions the one nearest to
        equal shares is taken. Raises the first error of a query.
        """
        deep = [SearchRequest(query, max(k, self.fusion.depth)) for query in queries]
        rankings: list[tuple[Docs, Docs]] = []
        for near, words in zip(self.near.search(deep), self.words.search(deep), strict=True):
            for found in (near, words):
                if isinstance(found, Exception):
                    raise found
            assert isinstance(near, Docs)
            assert isinstance(words, Docs)
            rankings.append((near, words))
        table: dict[Fusion, float] = {}
        for method in ("rank", "score"):
            for tenths in sorted(range(11), key=lambda n: abs(n - 5)):
                fusion = Fusion(method, tenths / 10, self.fusion.depth)
                ranks = [
                    next((1 / at for at, d in enumerate(fuse(*both, k, fusion), 1) if d.id in wanted), 0.0)
                    for both, wanted in zip(rankings, relevant, strict=True)
                ]
                table[fusion] = float(np.mean(ranks)) if ranks else 0.0
        return max(table, key=lambda fusion: table[fusion]), table

    def close(self) -> None:
        """Lets go of the files. A search after this answers with `ResourceError` F060."""
        self.near.close()
        self.words.close()
