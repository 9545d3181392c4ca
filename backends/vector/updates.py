"""What every index that takes updates has: snapshots that never change, and one writer that makes the next one.

A search goes on in the snapshot that it began in. A writer adds and deletes by id: ids are given in order, and never
again, so that a passage keeps its id whatever happens to others, and equal scores their order.
"""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from flowc.ir.errors import InputError, ResourceError
from flowc.ir.options import Where, as_where

from .columns import Columns, Mask
from .documents import Passage, check_meta
from .store import Manifest, PassageStore, WriteLock, read_manifest, stored

__all__ = ["Snapshot", "Updatable", "Updates"]

I64 = npt.NDArray[np.int64]


class Snapshot:
    """The passages and fields of an index at one moment. `mask`: which of the ids given so far were not deleted."""

    mask: Mask
    store: PassageStore
    columns: Columns
    count: int

    @property
    def added(self) -> int:
        """How many of the store's added passages belong to it."""
        return len(self.mask) - self.store.first

    def present(self) -> I64:
        """The ids that it holds, deleted or not, rising."""
        return np.concatenate([self.store.ids, np.arange(self.store.first, len(self.mask))])

    def live(self) -> I64:
        """The ids that are searched, rising."""
        present = self.present()
        return np.asarray(present[self.mask[present]])

    def matching(self, where: Where) -> Mask:
        """For each id whether its passage meets the conditions, deleted or not.

        Raises `ResourceError` F063 for a field that no passage has.
        """
        rows = self.store.added[: self.added]
        if self.count:  # an index of nothing finds nothing, whatever it is asked
            self.columns.check(where, rows)
        mask = np.zeros(len(self.mask), dtype=np.bool_)
        mask[self.store.ids] = self.columns.rows(where)
        if rows:
            mask[self.store.first :] = self.columns.added(where, rows)
        return mask


S = TypeVar("S", bound=Snapshot)


class Updates(ABC, Generic[S]):
    """The writer of one opened index. Its calls may come from any thread; each is whole, or has not happened.

    The first update takes the index's lock, so that there is one writer on the machine; `close` gives it back.
    """

    def __init__(self, path: Path, manifest: Manifest, snapshot: S, publish: Callable[[S, Manifest], None]) -> None:
        self.path = path
        self.manifest = manifest
        self.now = snapshot
        self._publish = publish
        self._lock: WriteLock | None = None
        self._memory = threading.Lock()  # of the current snapshot
        self._disk = threading.RLock()  # of the files
        self._keys: dict[str, int] | None = None
        self._changed = False
        self._compacting: Future[Manifest] | None = None

    # -------------------------------------------------------------------------------------------- what a kind says
    @abstractmethod
    def _prepared(self, items: Sequence[Passage], vectors: Any) -> Any:
        """What is to be added, computed before anyone is kept waiting."""

    @abstractmethod
    def _next(self, ids: I64, prepared: Any, mask: Mask) -> S:
        """The snapshot with these ids added (none: `prepared` is None), of which those in `mask` are there."""

    @abstractmethod
    def _written(self, snapshot: S) -> Manifest:
        """Saves a snapshot."""

    def _compact(self) -> Manifest:
        """Writes everything as one, and goes on from that; `save` where that is all there is to it."""
        return self.save()

    @property
    def is_due(self) -> bool:
        """Whether so much has changed that compacting is worth its while."""
        return False

    # -------------------------------------------------------------------------------------------- updates
    def add(self, passages: Sequence[Passage | str], vectors: Any = None, *, replace: bool = False) -> list[int]:
        """The ids of the passages that it adds; with `replace` each takes the place of the one with its key."""
        items = [Passage(p) if isinstance(p, str) else p for p in passages]
        keys = [p.key for p in items if p.key]
        for item in items:
            problem = check_meta(item.meta)
            if problem:
                raise InputError(problem, hint=f"passage {item.text[:60]!r}")
        if replace and len(keys) < len(items):
            raise ResourceError("a passage without a key takes no other's place", code="F063", hint="give it one")
        if len(set(keys)) < len(keys):
            twice = next(key for n, key in enumerate(keys) if key in keys[:n])
            raise ResourceError(f"two of the passages have the key {twice!r}", code="F063", hint="keys are unique")
        if not items:
            return []
        prepared = self._prepared(items, vectors)
        with self._memory:
            self._writable()
            known = self._known_keys()
            taken = [key for key in keys if key in known]
            if taken and not replace:
                raise ResourceError(
                    f"the index holds a passage with the key {taken[0]!r}", code="F063", hint="upsert replaces it"
                )
            first = len(self.now.mask)
            ids = np.arange(first, first + len(items))
            mask = np.concatenate([self.now.mask, np.ones(len(items), dtype=np.bool_)])
            mask[[known[key] for key in taken]] = False
            after = self._next(ids, prepared, mask)
            self.now.store.added.extend(stored(item) for item in items)
            known.update((item.key, int(id)) for item, id in zip(items, ids, strict=True) if item.key)
            self._go_on(after)
            return [int(id) for id in ids]

    def delete(
        self, ids: Iterable[int] | None = None, keys: Iterable[str] | None = None, where: Where | None = None
    ) -> int:
        """How many passages it deletes: those with these ids, those with these keys, those that meet the conditions."""
        with self._memory:
            self._writable()
            mask = self.now.mask.copy()
            for id in ids or ():
                if 0 <= id < len(mask):
                    mask[id] = False
            known = self._known_keys()
            for key in keys or ():
                if key in known:
                    mask[known[key]] = False
            if where is not None:
                mask &= ~self.now.matching(where)
            before = self.now.live()
            gone = int(np.count_nonzero(~mask[before]))
            if gone:
                self._keys = {key: id for key, id in known.items() if mask[id]}
                self._go_on(self._next(np.empty(0, dtype=np.int64), None, mask))
            return gone

    def _go_on(self, after: S) -> None:
        self.now = after
        self._changed = True
        self._publish(after, self.manifest)

    def _known_keys(self) -> dict[str, int]:
        """Key -> id of the passages that are there."""
        if self._keys is None:
            now = self.now
            values, codes = now.columns.key_rows()
            ids = now.store.ids
            rows = np.flatnonzero(codes >= 0)
            keys = {str(values[code]): int(ids[row]) for row, code in zip(rows, codes[rows], strict=True)}
            first = now.store.first
            keys |= {str(r["key"]): first + n for n, r in enumerate(now.store.added[: now.added]) if r.get("key")}
            self._keys = {key: id for key, id in keys.items() if now.mask[id]}
        return self._keys

    def _writable(self) -> None:
        """Takes the lock, and sees that the index on the disk is still the one that was opened."""
        if self._lock is None:
            lock = WriteLock(self.path)
            if read_manifest(self.path).generation != self.manifest.generation:
                lock.release()
                raise ResourceError(
                    f"the index at {self.path} was changed since it was opened", code="F060", hint="open it again"
                )
            self._lock = lock

    # -------------------------------------------------------------------------------------------- saving
    def save(self) -> Manifest:
        """The manifest once every update so far is on the disk."""
        with self._disk:
            with self._memory:
                now, changed = self.now, self._changed
                self._changed = False
            if not changed:
                return self.manifest
            try:
                self.manifest = self._written(now)
            except BaseException:
                self._changed = True
                raise
            with self._memory:
                self._publish(self.now, self.manifest)
        return self.manifest

    def compact(self) -> Future[Manifest]:
        """Begins to write one base of everything, and gives the manifest once that is the index; one at a time."""
        with self._memory:
            self._writable()
            if self._compacting is None or self._compacting.done():
                self._compacting = Future()
                thread = threading.Thread(target=self._run, args=(self._compacting,), name="flowc-compact")
                thread.daemon = True
                thread.start()
            return self._compacting

    def _run(self, result: Future[Manifest]) -> None:
        try:
            with self._disk:
                manifest = self._compact()
        except BaseException as e:
            result.set_exception(e)
        else:
            result.set_result(manifest)

    def close(self) -> None:
        """Waits for a compaction under way and gives the lock back. What was not saved is lost, with a warning."""
        if self._compacting is not None:
            self._compacting.exception()
        with self._disk, self._memory:
            if self._changed:
                warnings.warn(f"updates of the index at {self.path} were not saved", ResourceWarning, stacklevel=3)
            if self._lock is not None:
                self._lock.release()
                self._lock = None


class Updatable(ABC):
    """An opened index that takes updates."""

    @property
    @abstractmethod
    def updates(self) -> Updates[Any]:
        """The writer of this index, made at the first use. Raises `ResourceError` F060 if the index was closed."""

    def add(self, passages: Sequence[Passage | str], vectors: npt.ArrayLike | None = None) -> list[int]:
        """Ids of the passages, which searches that begin from now on find; `save` puts them on the disk.

        `vectors`, of shape (len(passages), dim), spares the embedding. Raises `ResourceError` and adds nothing: F060 if
        another process writes or has changed the index, F063 for vectors that do not fit or a key that is taken.
        """
        return self.updates.add(passages, vectors)

    def upsert(self, passages: Sequence[Passage], vectors: npt.ArrayLike | None = None) -> list[int]:
        """New ids of the passages; each takes the place of the one with its key, where there is one. See `add`."""
        return self.updates.add(passages, vectors, replace=True)

    def delete(
        self,
        ids: Iterable[int] | None = None,
        *,
        keys: Iterable[str] | None = None,
        where: Mapping[str, Any] | None = None,
    ) -> int:
        """How many passages it deletes, of these ids or keys, or that meet these conditions (see `Index.search`).

        What is not there is not counted. Raises `ResourceError` F060 as `add`, F063 for a field that no passage has.
        """
        try:
            conditions = as_where(where)
        except ValueError as e:
            raise ResourceError(str(e), code="F063") from None
        return self.updates.delete(ids, keys, conditions)

    def save(self) -> Manifest:
        """The manifest once all updates are on the disk. Where they have become many, `compact` begins."""
        manifest = self.updates.save()
        if self.updates.is_due:
            self.compact()
        return manifest

    def compact(self) -> Future[Manifest]:
        """Writes base and updates as one, in the background; readers and searches under way are not disturbed.

        Everything up to its begin is saved then. Results stay what they are, bit for bit, and so do ids.
        """
        return self.updates.compact()
