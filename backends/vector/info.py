"""What `flowc index info` shows of an index."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowc.ir.errors import ResourceError

from .bm25 import BM25Retriever
from .ivf import IVFRetriever, excerpts, own_queries, recall_table

__all__ = ["IndexInfo", "inspect_index"]


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """`list_sizes`: the 5th, 50th, 95th and 100th percentile. `imbalance`: mean work of a probe against equal lists.

    `recall` maps nprobe to recall@k; `recall_on` says on which queries.
    """

    path: str
    kind: str
    count: int
    generation: str
    size_bytes: int
    metric: str
    reasons: tuple[str, ...]
    settings: dict[str, Any]
    embedder: str = ""
    fingerprint: str = ""
    dim: int = 0
    codec: str = ""
    nlist: int = 0
    nprobe: int = 0
    list_sizes: tuple[int, int, int, int] | None = None
    imbalance: float | None = None
    recall_k: int | None = None
    recall_on: str = ""
    recall: dict[int, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return dataclasses.asdict(self)


def inspect_index(
    index: IVFRetriever | BM25Retriever,
    *,
    recall: bool = False,
    k: int = 10,
    sample: int = 200,
    queries: Sequence[str] | None = None,
) -> IndexInfo:
    """The facts of an opened index, which is closed afterwards."""
    manifest = index.manifest
    try:
        basic = IndexInfo(
            path=str(index.path),
            kind=manifest.kind,
            count=manifest.count,
            generation=manifest.generation,
            size_bytes=manifest.size_bytes,
            metric=manifest.metric,
            reasons=manifest.reasons,
            settings=dict(manifest.settings),
        )
        if isinstance(index, BM25Retriever):
            if recall:
                raise ResourceError(
                    "a bm25 index has no recall to measure: it always scans all of its words", code="F063"
                )
            return basic
        assert manifest.embedder is not None
        sizes = index.lists.sizes
        low, middle, high, top = (int(n) for n in np.percentile(sizes, (5, 50, 95, 100), method="nearest"))
        info = dataclasses.replace(
            basic,
            embedder=manifest.embedder.spec,
            fingerprint=manifest.embedder.fingerprint,
            dim=manifest.embedder.dim,
            codec=manifest.codec,
            nlist=manifest.nlist,
            nprobe=manifest.nprobe,
            list_sizes=(low, middle, high, top),
            imbalance=round(float(manifest.nlist * (sizes.astype(float) ** 2).sum() / manifest.count**2), 3),
        )
        if not recall:
            return info
        if k < 1 or sample < 1:
            raise ResourceError(f"k and sample must be at least 1, found {k} and {sample}", code="F063")
        if queries:
            table = recall_table(index.lists, np.ascontiguousarray(index.embedder.embed(list(queries))), k=k)
            on = f"{len(queries)} given queries"
        else:
            try:
                texts = [index.store.row(at)["text"] for at in own_queries(manifest.count, sample).tolist()]
                vectors = index.embedder.embed(excerpts(texts, sample))
                table = recall_table(index.lists, np.ascontiguousarray(vectors, dtype=np.float32), k=k)
                on = f"excerpts of {len(vectors)} passages"
            except ResourceError as e:
                if e.code == "F062":
                    raise
                own = own_queries(manifest.count, sample)  # the embedder is not here: an easier measure, and named so
                table = recall_table(index.lists, index.vectors(own), k=k, own=own)
                on = f"{len(own)} of the index's own vectors (the embedder could not be opened)"
        return dataclasses.replace(info, recall_k=k, recall_on=on, recall=table)
    finally:
        index.close()
