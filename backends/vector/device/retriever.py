"""An index some of whose lists lie on a device, chosen by demand and by what is known of the searches to come.

Searches give what `IVFRetriever` gives, to the bit; see `hybrid`. Beside them stand the three calls of
`flowc.runtime.protocols.ClusterCache`.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import Embedder, SearchRequest

from ..ivf import IVFRetriever
from ..scan import F32, I64, Lists, ListSearch
from ..store import Manifest
from .cache import ListCache
from .devices import Device
from .hybrid import HostLists, HybridScanner
from .lookahead import AHEAD, Lookahead

__all__ = ["DeviceRetriever"]

_RECENT = 512  # searches whose results may be mixed into a prediction
_MIXED = 5  # passages of a result that are mixed in


class DeviceRetriever(IVFRetriever):
    """A mapped index with a cache of its lists on a device. Implements `ElasticRetriever` and `ClusterCache`.

    `device_bytes` is the bound on what the cache takes; `set_bound` moves it while searches run. When the index's lists
    are replaced (it was compacted), the cache starts anew at the next search.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        manifest: Manifest,
        embedder: Embedder | Callable[[], Embedder],
        *,
        device: Device,
        device_bytes: int,
        page: int = 64,
        chunks: int = 16,
        threads: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(path, manifest, embedder, **options)
        self.device = device
        self._bytes = device_bytes
        self._cut = {"page": page, "chunks": chunks}
        self._threads = threads
        self._swap = threading.Lock()
        self._recent: OrderedDict[str, tuple[I64, I64]] = OrderedDict()  # query -> lists, best ids
        self._start(self.lists.base)

    def _start(self, base: Lists) -> None:
        try:
            source = HostLists(base)
        except TypeError as e:
            raise ResourceError(str(e), code="F063", hint='device = "cpu", or build with codec "fp16"') from e
        self.cache = ListCache(self.device, source, self._bytes, threads=self._threads, **self._cut)
        self.scanner = HybridScanner(source, self.cache)
        self.lookahead = Lookahead(self.cache, self._plan, self._threads)
        base.accelerator = self.scanner
        self._base = base

    # -------------------------------------------------------------------------------------------- advice
    def predict(self, key: Hashable, text: str, window_s: float) -> None:
        """Announces a search for something like `text` in about `window_s` seconds; see `ClusterCache`."""
        self.lookahead.predict(key, text, window_s)

    def follow(self, key: Hashable, text_so_far: str) -> None:
        """Says what has been written since."""
        self.lookahead.follow(key, text_so_far)

    def release(self, key: Hashable) -> None:
        """Takes back what was announced under the key."""
        self.lookahead.release(key)

    def set_bound(self, size_bytes: int) -> int:
        """The device's bytes still held after the bound was set; see `ListCache`."""
        self._bytes = size_bytes
        return self.cache.set_bound(size_bytes)

    def value_per_byte(self) -> float:
        """Milliseconds that the least valuable byte on the device is expected to save in the next search."""
        return self.cache.value_per_byte()

    def rates(self) -> dict[str, float]:
        """What the cost model asks of an index with a device, in bytes and bytes a second, as measured by now.

        The scan is timed on what lies on the device; without anything there, its rate is left out.
        """
        source, layout = self.scanner.source, self.cache.layout
        size = layout.dim * layout.dtype.itemsize
        whole = float(source.sizes.sum() * size)
        out = {
            "h2d_bytes_per_s": self.device.bandwidth(),
            "device_bytes": float(self.cache.bound_bytes),
            "index_bytes": whole,
            "probe_bytes": whole * min(self.nprobe, len(source.sizes)) / len(source.sizes),
            "scan_bytes_per_s": size / self.cache.code_s,
        }
        with self.cache.pinned([np.flatnonzero(source.sizes)]) as pages:
            if pages:
                every = np.concatenate(list(pages.values()))
                query = np.zeros((1, layout.dim), dtype=np.float32)
                began = self.device.now()
                self.device.scan(query, [every], 16).result()
                seconds = max(1e-9, self.device.now() - began)
                out["device_scan_bytes_per_s"] = float(source.sizes[list(pages)].sum() * size) / seconds
        return out

    def _plan(self, texts: Sequence[str]) -> list[tuple[I64, int] | None]:
        out: list[tuple[I64, int] | None] = []
        vectors = np.asarray(self.embedder.embed(texts), dtype=np.float32)
        for text, vector in zip(texts, vectors, strict=True):
            if not np.isfinite(vector).all():
                out.append(None)
                continue
            mixed = self._found_by(text)
            if mixed is not None:
                vector = vector + mixed
                vector = np.ascontiguousarray(vector / max(float(np.linalg.norm(vector)), 1e-9))
            nprobe = min(self.nprobe, self.lists.nlist)
            out.append((self.lists.nearest_lists(vector, min(AHEAD * nprobe, self.lists.nlist), 0), nprobe))
        return out

    # -------------------------------------------------------------------------------------------- searches
    def begin(self, requests: Sequence[SearchRequest]) -> Sequence[ListSearch | Exception]:
        """As `IVFRetriever.begin`, after a look whether the index was compacted meanwhile."""
        with contextlib.suppress(FlowcError):  # it was closed: the searches say so
            base = self.lists.base
            if base is not self._base:
                with self._swap:
                    if base is not self._base:
                        self._stop()
                        self._start(base)
        return super().begin(requests)

    def finish(self, search: ListSearch) -> Docs:
        """The search's result; its passages are remembered for predictions from the same text."""
        docs = super().finish(search)
        if search.request is not None and docs:
            best = np.array([doc.id for doc in docs[:_MIXED]], dtype=np.int64)
            self._recent[search.request.query] = search.lists[search.scanned], best
            while len(self._recent) > _RECENT:
                self._recent.popitem(last=False)
        return docs

    def _found_by(self, text: str) -> F32 | None:
        """The mean of the best passages' vectors, if there was a search for just this text."""
        numbers, ids = self._recent.get(text, (None, None))
        if numbers is None or ids is None:
            return None
        vectors: list[F32] = []
        for number in numbers[numbers < self._base.nlist].tolist():
            codes, held = self.scanner.source.view(number)
            there = np.flatnonzero(np.isin(held, ids))
            vectors += [codes[at].astype(np.float32) for at in there.tolist()]
            if len(vectors) == len(ids):
                break
        return np.mean(vectors, axis=0) if vectors else None

    def _stop(self) -> None:
        self._base.accelerator = None
        self.lookahead.close()
        self.cache.close()

    def close(self) -> None:
        """Lets go of the device and the files."""
        with self._swap:
            self._stop()
        super().close()


def open_device(kind: str, **options: Any) -> Device:
    """The device of this kind: "simulated" or "cuda" ("cuda:1"). Raises `ResourceError` F060 where there is none."""
    if kind == "simulated":
        from .simulated import SimulatedDevice

        return SimulatedDevice(**options)
    try:
        from .cuda import TorchDevice
    except ImportError as e:
        hint = "pip install 'flowc[local,gpu]'"
        raise ResourceError(f"a device of kind {kind!r} needs the package {e.name}", code="F060", hint=hint) from e
    return TorchDevice(kind, **options)
