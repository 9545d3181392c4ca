"""Two indexes of the same vectors, one with a simulated device beside it, in virtual time."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.backends.vector.device.cache import ListCache, Prediction
from flowc.backends.vector.device.devices import F32, I64, Device
from flowc.backends.vector.device.hybrid import HostLists, HybridScanner
from flowc.backends.vector.device.simulated import SimulatedDevice, VirtualTime
from flowc.backends.vector.scan import Lists, ListSearch, load_faiss

Row = list[tuple[float, int]]


def unit(values: npt.NDArray[Any]) -> F32:
    out = np.asarray(values, dtype=np.float32)
    return np.ascontiguousarray(out / np.linalg.norm(out, axis=1, keepdims=True))


def scattered(count: int, seed: int, dim: int = 8) -> F32:
    return unit(np.random.default_rng(seed).standard_normal((count, dim)))


def few_directions(count: int, seed: int) -> F32:
    """Vectors with many equal ones and many equal scores."""
    rng = np.random.default_rng(seed)
    out = np.zeros((count, 8))
    out[:, :3] = rng.choice([-1.0, 0.5, 2.0], size=(count, 3))
    return unit(out)


def index_of(vectors: F32, nlist: int, codec: str = "fp16", *, l2: bool = False) -> Any:
    faiss = load_faiss()
    dim, metric = vectors.shape[1], faiss.METRIC_L2 if l2 else faiss.METRIC_INNER_PRODUCT
    quantizer = faiss.IndexFlat(dim, metric)
    if codec == "fp16":
        kind = faiss.ScalarQuantizer.QT_fp16
        index = faiss.IndexIVFScalarQuantizer(quantizer, dim, nlist, kind, metric, False)
    else:
        index = faiss.IndexIVFFlat(quantizer, dim, nlist, metric)
    index.own_fields = True
    quantizer.this.disown()
    quantizer.add(np.ascontiguousarray(vectors[:nlist]))
    index.train(vectors)
    index.add(vectors)
    return index


class Rig:
    """`lists` with a device and `plain` without. Time stands still until `elapse`."""

    def __init__(
        self,
        vectors: F32,
        nlist: int,
        codec: str = "fp16",
        *,
        l2: bool = False,
        share: float = 0.3,
        device: Device | None = None,
        threads: bool = False,
        **options: Any,
    ) -> None:
        self.lists = Lists(index_of(vectors, nlist, codec, l2=l2))
        self.plain = Lists(index_of(vectors, nlist, codec, l2=l2))
        self.clock = VirtualTime()
        self.device = device or SimulatedDevice(clock=self.clock, launch_s=0.0, link_rate=1e8, jitter=0.3)
        self.source = HostLists(self.lists)
        self.bytes = int(share * vectors.nbytes)
        self.cache = ListCache(self.device, self.source, self.bytes, threads=threads, **{"page": 8, **options})
        self.scanner = HybridScanner(self.source, self.cache)
        self.lists.accelerator = self.scanner

    def elapse(self, seconds: float) -> None:
        """Lets time pass, with every transfer ending when it does and the next ones starting then."""
        assert isinstance(self.device, SimulatedDevice)
        end = self.clock.now_s + seconds
        self.cache.pump()
        while (arrival := self.device.arrival_s()) is not None and arrival <= end:
            self.clock.now_s = max(self.clock.now_s, arrival)
            self.cache.pump()
        self.clock.now_s = max(self.clock.now_s, end)
        self.cache.pump()

    def announce(self, key: str, lists: npt.ArrayLike, window_s: float = 1.0, chance: float = 0.9) -> None:
        numbers: I64 = np.asarray(lists, dtype=np.int64)
        due = self.device.now() + window_s
        self.cache.announce(key, Prediction(numbers, np.full(len(numbers), chance), due))

    def check(self) -> None:
        """Every page is free or belongs to one list, and what is counted agrees with that."""
        cache = self.cache
        owned = [int(page) for pages in cache._where.values() for page in pages]
        every = sorted(owned + cache._free)
        assert every == list(range(cache._chunks * cache.layout.chunk))
        assert set(cache._where) == set(np.flatnonzero(cache._state).tolist())
        assert (cache._pins == 0).all()
        assert cache._readers == 0


def rows(found: tuple[F32, I64]) -> Row:
    return list(zip(found[0].tolist(), found[1].tolist(), strict=True))


def results(lists: Lists, searches: list[ListSearch]) -> list[Row]:
    return [rows(lists.finish(search)) for search in searches]
