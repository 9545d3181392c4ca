"""Vectors that were computed once, kept on the disk by the content of their text: building an index again embeds only
what is new, and a build that was killed goes on where it stood.

One SQLite file for each embedder, named after its fingerprint, so that no vector ever stands for another model's. Any
number of processes may use it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import ResourceError
from flowc.runtime.protocols import Embedder

__all__ = ["CachedEmbedder"]

F32 = npt.NDArray[np.float32]
_WINDOW = 4096  # texts that are computed before their vectors are on the disk
_ASKED = 500  # keys of one query; SQLite takes at most 999 in old releases


class CachedEmbedder:
    """An embedder whose `embed_many` keeps its vectors in the folder `cache`; `embed`, for queries, goes past it.

    Equal texts are looked up and computed once. `cut_short` counts those of the texts just computed.
    """

    def __init__(self, inner: Embedder, cache: str | os.PathLike[str]) -> None:
        self.inner = inner
        self.spec = str(getattr(inner, "spec", "") or type(inner).__name__)
        self.cut_short = 0
        self.hits = 0  # distinct texts that were found, over all calls
        self._folder = Path(cache)

    @property
    def fingerprint(self) -> str:
        return self.inner.fingerprint

    @property
    def dim(self) -> int:
        return self.inner.dim

    @property
    def path(self) -> Path:
        """The file."""
        return self._folder / f"{hashlib.sha256(self.fingerprint.encode()).hexdigest()[:16]}.sqlite"

    def embed(self, texts: Sequence[str]) -> F32:
        """What the embedder gives."""
        return self.inner.embed(texts)

    def embed_many(self, texts: Sequence[str], progress: Callable[[int, int], None] | None = None) -> F32:
        """Vectors of shape (len(texts), dim). Raises `ResourceError` F060 for a folder or file that cannot be used."""
        out = np.empty((len(texts), self.dim), dtype=np.float32)
        rows: dict[bytes, list[int]] = {}
        for row, text in enumerate(texts):
            rows.setdefault(_key(text), []).append(row)
        self.cut_short = 0
        with self._opened() as file:
            missing = []
            known = self._known(file, list(rows))
            for key, members in rows.items():
                if key in known:
                    out[members] = known[key]
                else:
                    missing.append(key)
            self.hits += len(known)
            done = len(texts) - sum(len(rows[key]) for key in missing)
            for start in range(0, len(missing), _WINDOW):
                keys = missing[start : start + _WINDOW]
                made = self._computed([texts[rows[key][0]] for key in keys])
                for key, vector in zip(keys, made, strict=True):
                    out[rows[key]] = vector
                    done += len(rows[key])
                with file:
                    data = [(key, vector.tobytes()) for key, vector in zip(keys, made, strict=True)]
                    file.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?)", data)
                if progress is not None:
                    progress(done, len(texts))
        if progress is not None and not missing:
            progress(len(texts), len(texts))
        return out

    def _computed(self, texts: Sequence[str]) -> F32:
        many: Any = getattr(self.inner, "embed_many", None)
        made = np.ascontiguousarray(self.inner.embed(texts) if many is None else many(texts), dtype=np.float32)
        self.cut_short += getattr(self.inner, "cut_short", 0)
        return made

    def _known(self, file: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, F32]:
        found: dict[bytes, F32] = {}
        for start in range(0, len(keys), _ASKED):
            asked = keys[start : start + _ASKED]
            marks = ",".join("?" * len(asked))
            for key, data in file.execute(f"SELECT key, vector FROM vectors WHERE key IN ({marks})", asked):
                if len(data) == 4 * self.dim:
                    found[key] = np.frombuffer(data, dtype=np.float32)
        return found

    @contextlib.contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        path = self.path
        hint = "delete it, or name another"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ResourceError(f"the cache of vectors at {path} cannot be used: {e}", code="F060", hint=hint) from e
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=60)) as file:
                file.execute("PRAGMA journal_mode = WAL")
                file.execute("PRAGMA synchronous = NORMAL")
                file.execute("CREATE TABLE IF NOT EXISTS vectors (key BLOB PRIMARY KEY, vector BLOB) WITHOUT ROWID")
                yield file
        except sqlite3.Error as e:
            raise ResourceError(f"the cache of vectors at {path} cannot be used: {e}", code="F060", hint=hint) from e

    def close(self) -> None:
        """Closes the embedder."""
        close = getattr(self.inner, "close", None)
        if close is not None:
            close()


def _key(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
