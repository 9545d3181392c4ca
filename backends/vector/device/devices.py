"""What a device must do to hold lists: keep pages in chunks of memory, take copies in, and scan some for a query.

A page holds up to `Layout.page` vectors of one list, their codes byte for byte as the index stores them. Pages lie in
chunks, the unit in which memory is taken and given back; page p lies in chunk p // `Layout.chunk`. A vector is known
on the device by its *name*, list << 32 | offset.

A device computes its own scores, in float32 and in any order of summation. They serve to find candidates; what they
may be off by is bounded, and the CPU scores the candidates again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Device", "Layout", "Scan", "Transfer", "name_of"]

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]
Codes = npt.NDArray[np.floating[Any]]  # float16 or float32


def name_of(number: int, offset: int = 0) -> int:
    """What the vector at this place of this list is called on a device."""
    return number << 32 | offset


@dataclass(frozen=True, slots=True)
class Layout:
    """How a slab is cut. `page` is in vectors, `chunk` in pages, `largest` the vectors of the longest list.

    Scores are inner products, or with `is_l2` squared distances with a minus.
    """

    dim: int
    dtype: np.dtype[np.floating[Any]]
    page: int
    chunk: int
    largest: int
    is_l2: bool = False

    @property
    def page_bytes(self) -> int:
        """With the names and the length that stand beside the codes."""
        return self.page * (self.dim * self.dtype.itemsize + 8) + 4

    @property
    def chunk_bytes(self) -> int:
        return self.chunk * self.page_bytes

    def pages_of(self, vectors: int) -> int:
        return -(-vectors // self.page)


class Transfer(Protocol):
    """A list on its way to the device."""

    @property
    def done(self) -> bool:
        """Whether all of it is there, for every scan that starts from now on."""
        ...


class Scan(Protocol):
    """A scan under way."""

    def result(self) -> tuple[F32, I64]:
        """Scores and names, of shape (queries, k), best first; -inf and -1 fill up. Waits for the device."""
        ...


class Device(Protocol):
    """Memory for pages and something that scans them.

    One thread at a time calls it, but for `scan` and what it gives, which may come from any thread meanwhile: their
    pages are neither filled, moved nor given back before the result was taken.
    """

    name: str
    max_k: int
    launch_s: float  # what a scan costs however little it reads

    def now(self) -> float:
        """Seconds on the device's clock."""
        ...

    def open(self, layout: Layout) -> None:
        """Starts with no chunk; a slab from before is given back."""
        ...

    def resize(self, chunks: int) -> None:
        """Takes memory for more chunks, or gives back the last ones. Raises `MemoryError` and has what it had."""
        ...

    def copy(self, pages: I64, codes: Codes, name: int) -> Transfer | None:
        """Starts to bring vectors, of shape (n, dim), into these pages, named `name`, `name` + 1, and so on.

        `codes` may change once this returns. None where the staging memory is full: try again after the next transfer.
        """
        ...

    def move(self, sources: I64, targets: I64) -> None:
        """Copies pages within the device, before any scan that starts later."""
        ...

    def scan(self, queries: F32, pages: Sequence[I64], k: int) -> Scan:
        """Starts to look for each query's best k, up to `max_k`, in its own pages."""
        ...

    def bandwidth(self) -> float:
        """Bytes a second into the device, as measured on the transfers so far; a guess before the first."""
        ...

    def wait(self, most_s: float) -> None:
        """Returns when a transfer may have ended, after at most so many seconds."""
        ...

    def close(self) -> None:
        """Gives all memory back."""
        ...
