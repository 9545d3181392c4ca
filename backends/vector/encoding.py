"""What every index asks of a request: numbers that can be, and a vector of its text, by the embedder that fits.

One call embeds a batch, and one bad text or number spoils no other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.options import as_stop, as_where
from flowc.runtime.protocols import Embedder, SearchRequest

from .store import EmbedderInfo

__all__ = ["QueryEncoder", "check_request"]

F32 = npt.NDArray[np.float32]


class QueryEncoder:
    """The embedder of an index. One that is given as a function is made at the first text; see `IVFRetriever`."""

    def __init__(self, path: Path, info: EmbedderInfo, embedder: Embedder | Callable[[], Embedder]) -> None:
        self.path = path
        self.info = info
        self._make: Callable[[], Embedder] | None = None
        self._embedder: Embedder | None = None
        self._lock = threading.Lock()
        if callable(embedder) and not hasattr(embedder, "embed"):
            self._make = embedder
        else:
            self._embedder = self._fitting(cast(Embedder, embedder))

    @property
    def embedder(self) -> Embedder:
        """The embedder, made now if it was not before. Raises `ResourceError` F063 if it does not fit the index."""
        with self._lock:
            if self._embedder is None:
                assert self._make is not None
                self._embedder = self._fitting(self._make())
            return self._embedder

    def _fitting(self, embedder: Embedder) -> Embedder:
        info = self.info
        if embedder.dim != info.dim:
            raise ResourceError(
                f"the index at {self.path} holds vectors of {info.dim} numbers, the embedder makes {embedder.dim}",
                code="F063",
                hint=f"open it with the embedder {info.spec!r}, or build it again with this one",
            )
        if embedder.fingerprint != info.fingerprint:
            raise ResourceError(
                f"the index at {self.path} was made with another embedder:\n"
                f"  index    {info.fingerprint}\n  embedder {embedder.fingerprint}",
                code="F063",
                hint=f"open it with the embedder {info.spec!r}, or build it again with this one",
            )
        return embedder

    def embed(self, texts: Sequence[str]) -> list[F32 | Exception]:
        """A finite vector for each text, or the reason why not. One bad text does not spoil the others."""
        if not texts:
            return []
        try:
            embedder = self.embedder
        except FlowcError as e:
            return [e] * len(texts)
        try:
            vectors = np.asarray(embedder.embed(texts), dtype=np.float32)
        except Exception as e:
            if len(texts) == 1:
                return [e]
            return [self.embed([text])[0] for text in texts]
        if vectors.shape != (len(texts), self.info.dim):
            error = ResourceError(
                f"the embedder gave vectors of shape {vectors.shape}, not ({len(texts)}, {self.info.dim})",
                code="F063",
                hint="an embedder gives back one row a text",
            )
            return [error] * len(texts)
        nan = "the embedder gave a vector with NaN or infinity"
        return [
            vector if np.isfinite(vector).all() else ResourceError(nan, code="F063", hint=f"query: {text[:80]!r}")
            for vector, text in zip(vectors, texts, strict=True)
        ]


def check_request(request: SearchRequest) -> ResourceError | None:
    """What is wrong with the numbers of a request, if anything."""
    for name, value in (("k", request.k), ("nprobe", request.nprobe)):
        if name == "nprobe" and value is None:
            continue
        if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 1:
            return ResourceError(f"{name} must be an integer from 1, found {value!r}", code="F063")
    try:
        as_stop(request.stop)
        as_where(request.where)
    except ValueError as e:
        return ResourceError(str(e), code="F063")
    return None
