"""Indexes: built from documents, saved atomically, opened by mmap, searched in batches.

Importing this package loads neither numpy nor faiss; building and opening do.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from flowc.ir.errors import ResourceError

from .documents import Passage, Reading, read_jsonl, read_passages

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from flowc.runtime.protocols import Embedder

    from .bm25 import BM25Retriever
    from .device.devices import Device
    from .graph import GraphRetriever
    from .hybrid import Fusion, HybridRetriever
    from .info import IndexInfo
    from .ivf import IVFRetriever
    from .store import Manifest

    AnyIndex = IVFRetriever | GraphRetriever | BM25Retriever | HybridRetriever

__all__ = ["Passage", "Reading", "build_index", "index_info", "open_index", "read_jsonl", "read_passages"]


def build_index(
    passages: Sequence[Passage | str],
    embedder: Embedder | None,
    out: str | os.PathLike[str],
    *,
    kind: Literal["auto", "flat", "ivf", "hnsw", "bm25", "hybrid"] = "auto",
    nlist: int | None = None,
    nprobe: int | None = None,
    codec: Literal["fp16", "fp32", "sq8"] = "fp16",
    metric: Literal["cosine", "inner_product", "l2"] = "cosine",
    vectors: npt.NDArray[np.floating[Any]] | None = None,
    fusion: Fusion | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    threads: int | None = None,
) -> Manifest:
    """The manifest of the index that it leaves in the folder `out`, with the reasons for what was chosen.

    A passage's id is its position. Without an embedder the index is a BM25 index of words; with one it is an index of
    vectors: flat below 50,000 passages, inverted lists (FAISS IVF) above or if `nlist` is given, with `nprobe` measured
    on excerpts of the passages. "hnsw" is a graph; "hybrid" searches words and vectors, and joins them by `fusion`
    (`flowc.backends.vector.hybrid`).

    `vectors`, of shape (len(passages), embedder.dim), spares the embedding: they must come from `embedder`, whose
    fingerprint they are stored under. They are scored by `metric`: "cosine" normalises them, "inner_product" takes them
    as they are, "l2" scores the negative squared distance. `codec` "sq8" halves "fp16" once more, at a little recall.
    `progress` is called with (stage, done, total).

    The save is atomic: an index that was at `out` stays whole until the new one is on the disk, and readers that have
    it open keep it. Raises `ResourceError`: F060 nothing to index, or `out` cannot be written (disk full, not an index,
    in use by another build); F063 vectors or numbers that do not fit.
    """
    items = [Passage(p) if isinstance(p, str) else p for p in passages]
    if not items:
        raise ResourceError(
            "there is nothing to index: no passages", code="F060", hint="check the folder, or the errors of reading it"
        )
    try:
        if kind == "bm25" or (kind == "auto" and embedder is None):
            from .bm25 import build_bm25

            reason = "asked for" if kind == "bm25" else "there is no embedder, so words are searched"
            return build_bm25(items, out, reason=reason, progress=progress)
        if embedder is None:
            raise ResourceError(f"an index of kind {kind!r} needs an embedder", code="F063", hint='or kind="bm25"')
        if kind not in ("auto", "flat", "ivf", "hnsw", "hybrid"):
            hint = '"auto", "flat", "ivf", "hnsw", "bm25" or "hybrid"'
            raise ResourceError(f"unknown kind of index {kind!r}", code="F063", hint=hint)
        from .ivf import build_vectors, plan_index

        fused = None
        if kind == "hybrid":
            from .hybrid import Fusion

            kind, fused = "auto", dataclasses.asdict(fusion or Fusion())
        plan = plan_index(len(items), embedder.dim, kind=kind, nlist=nlist, nprobe=nprobe, codec=codec, metric=metric)
        return build_vectors(
            items, embedder, out, plan=plan, vectors=vectors, progress=progress, threads=threads, fusion=fused
        )
    except ImportError as e:
        raise _not_installed(e) from e


def open_index(
    path: str | os.PathLike[str],
    embedder: Embedder | Callable[[], Embedder] | None = None,
    *,
    name: str | None = None,
    nprobe: int | None = None,
    fusion: Fusion | None = None,
    verify: bool = False,
    device: str | Device = "cpu",
    device_bytes: int = 1 << 30,
) -> AnyIndex:
    """The index at `path`, mapped, not read: opening takes milliseconds whatever its size.

    Sizes of all files are always checked, their SHA-256 with `verify`. Without an embedder the one that the index was
    made with is opened at the first search by text. `nprobe`, and for a hybrid index `fusion`, stand in for the index's
    own. On a `device` ("cuda", "cuda:1", "simulated", or a `flowc.backends.vector.device.devices.Device`) up to
    `device_bytes` of the lists in demand are kept and scanned; results stay what they are. Raises `ResourceError`: F060
    no such device, F061 no index there, F062 damaged, F063 the embedder is another one than the index was made with, or
    a device cannot hold it.
    """
    try:
        from .store import read_manifest

        for attempt in range(10):
            manifest = read_manifest(path)
            try:
                return _open(path, manifest, embedder, name, nprobe, fusion, verify, device, device_bytes)
            except ResourceError as e:
                # A build may have replaced the index between the two reads: then the manifest has moved on (or, after
                # two builds, is back where it was). What does not move is damaged.
                same = attempt > 0 and read_manifest(path).generation == manifest.generation
                if e.code != "F062" or attempt == 9 or same:
                    raise
        raise AssertionError("unreachable")
    except ImportError as e:
        raise _not_installed(e) from e


def _open(
    path: str | os.PathLike[str],
    manifest: Manifest,
    embedder: Embedder | Callable[[], Embedder] | None,
    name: str | None,
    nprobe: int | None,
    fusion: Fusion | None,
    verify: bool,
    device: str | Device,
    device_bytes: int,
) -> AnyIndex:
    if manifest.kind == "bm25":
        from .bm25 import BM25Retriever

        if device != "cpu":
            hint = 'device = "cpu", or an index of vectors'
            raise ResourceError("an index of words has nothing for a device to hold", code="F063", hint=hint)
        return BM25Retriever(path, manifest, name=name, verify=verify)
    from flowc.backends.embed import open_embedder

    from .ivf import IVFRetriever

    assert manifest.embedder is not None
    spec = manifest.embedder.spec
    embedder = embedder or (lambda: open_embedder(spec))
    if manifest.kind in ("hybrid", "hnsw") and device != "cpu":
        hint = 'device = "cpu", or an index of kind "ivf"'
        raise ResourceError(f"an index of kind {manifest.kind} has no lists for a device", code="F063", hint=hint)
    if manifest.kind == "hybrid":
        from .hybrid import HybridRetriever

        return HybridRetriever(path, manifest, embedder, name=name, nprobe=nprobe, fusion=fusion, verify=verify)
    if manifest.kind == "hnsw":
        from .graph import GraphRetriever

        return GraphRetriever(path, manifest, embedder, name=name, nprobe=nprobe, verify=verify)
    if device == "cpu":
        return IVFRetriever(path, manifest, embedder, name=name, nprobe=nprobe, verify=verify)
    from .device.retriever import DeviceRetriever, open_device

    there = open_device(device) if isinstance(device, str) else device
    return DeviceRetriever(
        path, manifest, embedder, device=there, device_bytes=device_bytes, name=name, nprobe=nprobe, verify=verify
    )


def index_info(
    path: str | os.PathLike[str],
    *,
    recall: bool = False,
    k: int = 10,
    sample: int = 200,
    queries: Sequence[str] | None = None,
) -> IndexInfo:
    """What the index at `path` is, after every file was read and found to match its checksum.

    With `recall` also recall@k by nprobe against a scan of all lists: on excerpts of `sample` of its passages (on their
    vectors, which is easier, if the embedder is not installed), or on `queries`. Raises as `open_index`.
    """
    try:
        from .info import inspect_index
    except ImportError as e:
        raise _not_installed(e) from e
    return inspect_index(open_index(path, verify=True), recall=recall, k=k, sample=sample, queries=queries)


def _not_installed(error: ImportError) -> ResourceError:
    if (error.name or "").startswith("flowc"):
        raise error  # a fault of ours, which no installation mends
    return ResourceError(f"the package {error.name} is not installed", code="F060", hint="pip install 'flowc[local]'")
