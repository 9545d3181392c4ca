"""A GPU behind the device's interface: a slab of pages in its memory, copies on a stream of their own, one scan kernel.

Copies go through one ring of pinned memory, never a pinned index: a list's codes are packed there, brought over in one
asynchronous copy, and put into their pages on the same stream. An event after that says when they are there; the host
looks at it before a list counts as resident, so scans need not wait for a stream.

Scans run on the current stream, chunk by chunk of the slab, and leave their candidates in pinned memory; `result` waits
for an event. On a device of torch without streams ("cpu") the same code runs one thing after another, and the kernel's
reference stands in for the kernel: that is how it is tested where there is no GPU.

Source: the ring after the staging buffers of PyTorch's own `pin_memory` copies; Lin et al., "TeleRAG", 2025, section 4.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from flowc.backends.kernels.page_scan import MAX_K, Pages, page_scan, page_scan_reference, plan_pages
from flowc.ir.errors import ResourceError

from .devices import F32, I64, Codes, Layout

__all__ = ["TorchDevice"]

_RING_BYTES = 32 << 20
_LEARN = 0.1  # weight of the newest transfer in the bandwidth
_TELLING = 1 << 16  # bytes from which on a transfer says something about the bandwidth


@dataclass(slots=True, eq=False)
class _Transfer:
    start: Any  # torch.cuda.Event, None on a device without streams
    end: Any
    ring_end: int  # where its part of the ring ends
    size: int
    landed: bool = False

    @property
    def done(self) -> bool:
        if not self.landed:
            self.landed = self.end is None or bool(self.end.query())
        return self.landed


@dataclass(slots=True, eq=False)
class _Scan:
    scores: torch.Tensor
    names: torch.Tensor
    end: Any

    def result(self) -> tuple[F32, I64]:
        if self.end is not None:
            self.end.synchronize()
        return self.scores.numpy(), self.names.numpy()


class TorchDevice:
    """A device of torch. `kind` is "cuda", "cuda:1", or "cpu" for tests. Raises `ResourceError` F060 without a GPU."""

    max_k = MAX_K

    def __init__(self, kind: str = "cuda", *, launch_s: float = 60e-6, ring_bytes: int = _RING_BYTES) -> None:
        self._device = torch.device(kind)
        self._is_cuda = self._device.type == "cuda"
        if self._is_cuda and not torch.cuda.is_available():
            raise ResourceError(
                f"there is no GPU that torch can use for device = {kind!r}", code="F060", hint='device = "cpu"'
            )
        self.name = torch.cuda.get_device_name(self._device) if self._is_cuda else kind
        self.launch_s = launch_s
        self._ring_bytes = ring_bytes
        self._side: Any = None
        if self._is_cuda:
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._rate = 20e9 if self._is_cuda else 5e9
        self._lock = threading.Lock()
        self._chunks: list[Pages] = []
        self._flying: deque[_Transfer] = deque()

    def now(self) -> float:
        return time.monotonic()

    # -------------------------------------------------------------------------------------------- memory
    def open(self, layout: Layout) -> None:
        self.close()
        self._layout = layout
        self._dtype = torch.float16 if layout.dtype == np.float16 else torch.float32
        most = layout.pages_of(layout.largest) * (layout.page_bytes + 8)
        size = max(self._ring_bytes, 2 * most)
        self._ring = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
        self._head = 0  # where the next list is packed; what lies between the oldest transfer's begin and here is taken
        self._tail = 0
        # What a copy leaves on the device before it is put into pages; one at a time on the side stream.
        self._landing = torch.empty(most, dtype=torch.uint8, device=self._device)

    def resize(self, chunks: int) -> None:
        layout = self._layout
        try:
            while len(self._chunks) < chunks:
                shape = (layout.chunk, layout.page)
                self._chunks.append(
                    Pages(
                        torch.empty(*shape, layout.dim, dtype=self._dtype, device=self._device),
                        torch.full(shape, -1, dtype=torch.int64, device=self._device),
                        torch.zeros(layout.chunk, dtype=torch.int32, device=self._device),
                    )
                )
                if self._side is not None:  # what was filled here is used there
                    self._side.wait_stream(torch.cuda.current_stream(self._device))
        except torch.OutOfMemoryError as e:
            raise MemoryError(str(e)) from e
        if len(self._chunks) > chunks:
            if self._side is not None:
                self._side.synchronize()
            del self._chunks[chunks:]
            if self._is_cuda:
                torch.cuda.empty_cache()  # what the planner was promised is free for others

    def close(self) -> None:
        if self._side is not None:
            self._side.synchronize()
        self._flying.clear()
        self._chunks.clear()

    # -------------------------------------------------------------------------------------------- transfers
    def _room(self, size: int) -> int | None:
        """Where in the ring so many bytes are free, None where they are not."""
        while self._flying and self._flying[0].done:
            transfer = self._flying.popleft()
            self._tail = transfer.ring_end
            if transfer.end is not None and transfer.size >= _TELLING:
                took = transfer.start.elapsed_time(transfer.end) / 1e3
                self._rate += _LEARN * (transfer.size / max(took, 1e-9) - self._rate)
        if not self._flying:
            self._head = self._tail = 0
            return 0
        if self._head >= self._tail:
            if self._head + size <= len(self._ring):
                return self._head
            return 0 if size < self._tail else None
        return self._head if self._head + size < self._tail else None

    def copy(self, pages: I64, codes: Codes, name: int) -> _Transfer | None:
        layout = self._layout
        body = len(pages) * layout.page * layout.dim * layout.dtype.itemsize
        body += -body % 8
        size = body + 8 * len(pages)
        at = self._room(size)
        if at is None:
            return None
        packed = self._ring[at : at + size].numpy()
        packed[: codes.nbytes] = np.ascontiguousarray(codes).reshape(-1).view(np.uint8)
        packed[body:] = pages.view(np.uint8)
        self._head = at + size
        with self._on_side() as (start, end):
            self._landing[:size].copy_(self._ring[at : at + size], non_blocking=True)
            self._place(pages, len(codes), name, body)
        transfer = _Transfer(start, end, self._head, size)
        self._flying.append(transfer)
        return transfer

    def _place(self, pages: I64, count: int, name: int, body: int) -> None:
        """Puts what has landed into its pages."""
        layout, held = self._layout, len(pages)
        vectors = self._landing[: held * layout.page * layout.dim * layout.dtype.itemsize]
        vectors = vectors.view(self._dtype).view(held, layout.page, layout.dim)
        where = self._landing[body : body + 8 * held].view(torch.int64)
        offsets = torch.arange(held * layout.page, device=self._device).view(held, layout.page)
        names = torch.where(offsets < count, offsets + name, -1)
        lengths = (count - offsets[:, 0]).clamp(max=layout.page).to(torch.int32)
        for number in np.unique(pages // layout.chunk).tolist():
            here = np.flatnonzero(pages // layout.chunk == number)
            rows: Any = slice(None)
            if len(here) < held:  # a list that lies in several chunks
                rows = torch.from_numpy(here).to(self._device)
            chunk, slots = self._chunks[number], where[rows] % layout.chunk
            chunk.vectors.index_copy_(0, slots, vectors[rows])
            chunk.ids.index_copy_(0, slots, names[rows])
            chunk.lengths.index_copy_(0, slots, lengths[rows])

    @contextlib.contextmanager
    def _on_side(self) -> Any:
        if self._side is None:
            yield None, None
            return
        start, end = _event(), _event()
        with torch.cuda.stream(self._side):
            start.record(self._side)
            yield start, end
            end.record(self._side)

    def move(self, sources: I64, targets: I64) -> None:
        # Before any later scan on the current stream, and after the copies that filled the sources: those had ended.
        for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
            (chunk, slot), (to, place) = divmod(source, self._layout.chunk), divmod(target, self._layout.chunk)
            for one, other in zip(_tensors(self._chunks[chunk]), _tensors(self._chunks[to]), strict=True):
                other[place].copy_(one[slot])
        if self._is_cuda:
            torch.cuda.current_stream(self._device).synchronize()  # other threads scan on streams of their own

    def bandwidth(self) -> float:
        return self._rate

    def wait(self, most_s: float) -> None:
        flying = list(self._flying)
        end = time.monotonic() + most_s
        while flying and not flying[0].done and time.monotonic() < end:
            time.sleep(50e-6)

    # -------------------------------------------------------------------------------------------- scans
    def scan(self, queries: F32, pages: Sequence[I64], k: int) -> _Scan:
        asked = torch.from_numpy(np.ascontiguousarray(queries)).to(self._device)
        metric: Any = "l2" if self._layout.is_l2 else "ip"
        found = []
        for number, chunk in enumerate(self._chunks):
            first = number * self._layout.chunk
            mine = [p[(p >= first) & (p < first + self._layout.chunk)] - first for p in pages]
            if any(len(p) for p in mine):
                work = plan_pages(mine, page_size=self._layout.page, device=self._device)
                kernel = page_scan if self._is_cuda else page_scan_reference
                found.append(kernel(asked, chunk, work, k, metric=metric))
        scores, names = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
        scores, order = torch.sort(scores.float(), dim=1, descending=True, stable=True)
        scores, names = scores[:, :k], names.gather(1, order)[:, :k]
        if not self._is_cuda:
            return _Scan(scores.contiguous(), names.contiguous(), None)
        host_scores = torch.empty(scores.shape, dtype=torch.float32, pin_memory=True)
        host_names = torch.empty(names.shape, dtype=torch.int64, pin_memory=True)
        host_scores.copy_(scores, non_blocking=True)
        host_names.copy_(names, non_blocking=True)
        end = _event()
        end.record(torch.cuda.current_stream(self._device))
        return _Scan(host_scores, host_names, end)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _tensors(pages: Pages) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return pages.vectors, pages.ids, pages.lengths
