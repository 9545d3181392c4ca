"""What `flowc index info` shows of an index."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowc.ir.errors import ResourceError

from .bm25 import BM25Retriever
from .graph import GraphRetriever
from .hybrid import HybridRetriever
from .ivf import IVFRetriever, excerpts, own_queries, recall_table
from .scan import F32, Lists
from .store import Manifest

__all__ = ["IndexInfo", "inspect_index"]


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """`list_sizes`: the 5th, 50th, 95th and 100th percentile. `imbalance`: mean work of a probe against equal lists.

    `recall` maps nprobe to recall@k against a scan of everything, and `recall_s` to seconds of processor time a query,
    of queries in one batch without their embedding; `recall_on` says on which queries. Until `flowc index compact`
    `added` passages lie behind the mapped ones, and `deleted` ones are skipped. `fields` are what filters may name.
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
    recall_s: dict[int, float] | None = None
    added: int = 0
    deleted: int = 0
    fields: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for JSON."""
        return dataclasses.asdict(self)


def inspect_index(
    index: IVFRetriever | GraphRetriever | BM25Retriever | HybridRetriever,
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
            added=manifest.added,
            deleted=manifest.deleted,
            fields=field_names(index.path, manifest),
        )
        if isinstance(index, BM25Retriever):
            if recall:
                raise ResourceError(
                    "a bm25 index has no recall to measure: it always scans all of its words", code="F063"
                )
            return basic
        assert manifest.embedder is not None
        if isinstance(index, GraphRetriever):
            if recall:
                raise ResourceError("the recall of a graph index is not measured here", code="F063")
            made = manifest.embedder
            return dataclasses.replace(
                basic, embedder=made.spec, fingerprint=made.fingerprint, dim=made.dim, codec=manifest.codec
            )
        if isinstance(index, HybridRetriever):
            index = index.near  # what can be missed is missed by the vectors
        sizes = index.lists.sizes.reshape(-1, manifest.nlist).sum(axis=0)
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
            imbalance=round(float(manifest.nlist * (sizes.astype(float) ** 2).sum() / max(1, sizes.sum()) ** 2), 3),
        )
        if not recall:
            return info
        if k < 1 or sample < 1:
            raise ResourceError(f"k and sample must be at least 1, found {k} and {sample}", code="F063")
        own = index.lists.live()[own_queries(manifest.count, sample)] if manifest.count else np.empty(0, dtype=np.int64)
        skip = None
        if queries:
            vectors = index.embedder.embed(list(queries))
            on = f"{len(queries)} given queries"
        else:
            try:
                vectors = index.embedder.embed(excerpts([index.store.row(at)["text"] for at in own.tolist()], sample))
                on = f"excerpts of {len(vectors)} passages"
            except ResourceError as e:
                if e.code == "F062":
                    raise
                skip = own  # the embedder is not here: an easier measure, and named so
                vectors = index.vectors(own)
                on = f"{len(own)} of the index's own vectors (the embedder could not be opened)"
        data = np.ascontiguousarray(vectors, dtype=np.float32)
        table = recall_table(index.lists, data, k=k, own=skip)
        times = {nprobe: _seconds_of(index.lists, data, k, nprobe) for nprobe in table}
        return dataclasses.replace(info, recall_k=k, recall_on=on, recall=table, recall_s=times)
    finally:
        index.close()


def field_names(path: Path, manifest: Manifest) -> tuple[str, ...]:
    """What passages of the index can be filtered by."""
    if "fields.json" not in manifest.files:
        return ()
    return tuple(json.loads((path / manifest.generation / "fields.json").read_text("utf-8")))


def _seconds_of(lists: Lists, queries: F32, k: int, nprobe: int) -> float:
    """Processor time of this thread per query, the least of three runs."""
    if not len(queries):
        return 0.0
    runs = []
    for _ in range(3):
        began = time.thread_time()
        lists.search(queries, [k] * len(queries), [nprobe] * len(queries))
        runs.append(time.thread_time() - began)
    return min(runs) / len(queries)
