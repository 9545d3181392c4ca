"""Updates of a vector index: a mapped base that nobody writes, small parts in memory behind it, and a bitmap of what
was deleted.

An *epoch* is all that a search needs, and never changes. An update makes the next one, which shares all but what is
new: what was added lies in further lists under the same centroids, stacked behind those of the base without a copy;
what was deleted is skipped by the scanner. A search goes on in the epoch that it began in, so readers take no lock and
neither they nor the updates wait. Parts that were added double in size as they merge, so there are few.

`save` writes what was added and deleted beside links to the base's files. `compact` writes one base of all of it, on a
thread of its own, and swaps it in; what was updated meanwhile stays behind the new base. Centroids, codes and ids stay,
so every search finds the same before and after, bit for bit: an id is given once and never again.

FAISS has no call for any of this: adding to a mapped index aborts the process, and removing moves vectors about.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flowc.ir.options import Where, where_key

from .columns import Columns, Mask
from .documents import Passage
from .scan import F32, I64, Lists, Selection, load_faiss
from .store import IndexWriter, Manifest, PassageStore
from .updates import Snapshot, Updates

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMPACT_ABOVE", "INDEX_FILE", "Epoch", "Main", "VectorUpdates", "write_faiss"]

INDEX_FILE = "index.faiss"
COMPACT_ABOVE = 0.2  # of the base's rows, added or deleted, from which on `save` compacts
_SELECTIONS = 64  # filters of one epoch that are remembered


# ------------------------------------------------------------------------------------------------ what a search sees
@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """Vectors that were added: ids (rising), clusters and codes, and the same as FAISS lists."""

    ids: I64
    clusters: I64
    codes: npt.NDArray[np.uint8]
    lists: Any
    sizes: I64

    @staticmethod
    def of(ids: I64, clusters: I64, codes: npt.NDArray[np.uint8], nlist: int) -> Segment:
        """The segment of these, with its lists."""
        faiss = load_faiss()
        lists = faiss.ArrayInvertedLists(nlist, codes.shape[1])
        order = np.argsort(clusters, kind="stable")
        sizes = np.bincount(clusters, minlength=nlist)
        ends = np.cumsum(sizes)
        for number in np.flatnonzero(sizes).tolist():
            rows = order[ends[number] - sizes[number] : ends[number]]
            held, kept = np.ascontiguousarray(ids[rows]), np.ascontiguousarray(codes[rows])
            lists.add_entries(number, len(rows), faiss.swig_ptr(held), faiss.swig_ptr(kept))
        return Segment(ids, clusters, codes, lists, sizes)

    def with_next(self, other: Segment) -> Segment:
        """Both as one."""
        ids, clusters = np.concatenate([self.ids, other.ids]), np.concatenate([self.clusters, other.clusters])
        return Segment.of(ids, clusters, np.concatenate([self.codes, other.codes]), len(self.sizes))


@dataclass(frozen=True, eq=False)
class Main:
    """The base of an index as its epochs share it: mapped lists, passages, fields."""

    index: Any
    lists: Lists
    store: PassageStore
    columns: Columns

    @cached_property
    def order(self) -> I64:
        """The ids in the order of the lists."""
        faiss, found = load_faiss(), [np.empty(0, dtype=np.int64)]
        for number, size in enumerate(self.lists.sizes.tolist()):
            if size:
                found.append(faiss.rev_swig_ptr(self.index.invlists.get_ids(number), size).copy())
        return np.concatenate(found)

    def sizes(self, mask: Mask) -> I64:
        """How many of the selected ids each list holds."""
        before = np.concatenate([[0], np.cumsum(mask[self.order])])
        ends = np.cumsum(self.lists.sizes)
        return np.asarray(before[ends] - before[ends - self.lists.sizes], dtype=np.int64)


class Epoch(Lists, Snapshot):
    """Lists, passages and fields that belong together; never changes. `mask`: which of the ids were not deleted."""

    def __init__(self, main: Main, segments: tuple[Segment, ...], mask: Mask) -> None:
        self.main = main
        self.home: object = None  # the opened index that it is of
        self.segments = segments
        self.mask = mask
        self.store, self.columns = main.store, main.columns
        self._selections: OrderedDict[tuple[Any, ...], Selection] = OrderedDict()
        sizes = np.concatenate([main.lists.sizes, *(segment.sizes for segment in segments)])
        self.deleted = int(np.count_nonzero(~mask[self.present()]))
        alive = Selection(_packed(mask), self._sizes(mask)) if self.deleted else None
        super().__init__(self._stacked() if segments else main.index, base=main.lists, sizes=sizes, alive=alive)

    def _stacked(self) -> Any:
        """An index whose lists are the base's and then each segment's, which they remain the owners of."""
        faiss, base = load_faiss(), self.main.index
        pointers = faiss.InvertedListsPtrVector()
        for lists in (base.invlists, *(segment.lists for segment in self.segments)):
            pointers.push_back(lists)
        self._stack = faiss.VStackInvertedLists(pointers.size(), pointers.data())
        return like(base, base.quantizer, self._stack)

    def _sizes(self, mask: Mask) -> I64:
        nlist = self.main.lists.nlist
        parts = [np.bincount(s.clusters[mask[s.ids]], minlength=nlist) for s in self.segments]
        return np.concatenate([self.main.sizes(mask), *parts])

    def selection(self, where: Where | None) -> Selection | None:
        """The passages that meet the conditions and were not deleted; None for all there are.

        Raises `ResourceError` F063 for a field that no passage has.
        """
        if where is None:
            return self.alive
        found = self._selections.get(where_key(where))
        if found is None:
            mask = self.matching(where) & self.mask
            found = self._selections[where_key(where)] = Selection(_packed(mask), self._sizes(mask))
            while len(self._selections) > _SELECTIONS:
                self._selections.popitem(last=False)
        return found


def like(index: Any, quantizer: Any, lists: Any) -> Any:
    """An index of other lists, with the coding and the metric of this one; it owns neither lists nor quantizer."""
    faiss = load_faiss()
    if isinstance(index, faiss.IndexIVFScalarQuantizer):
        kind = index.sq.qtype
        out = faiss.IndexIVFScalarQuantizer(quantizer, index.d, lists.nlist, kind, index.metric_type, False, False)
        out.sq = index.sq
    else:
        out = faiss.IndexIVFFlat(quantizer, index.d, lists.nlist, index.metric_type, False)
    out.own_fields = False
    out.is_trained = True
    out.replace_invlists(lists, False)
    return out


def _packed(mask: Mask) -> npt.NDArray[np.uint8]:
    return np.packbits(mask, bitorder="little")


def write_faiss(writer: IndexWriter, index: Any) -> None:
    """The FAISS index as a file of the index."""
    with writer.file(INDEX_FILE) as stream:
        # Through Python's file, because FAISS's own writer forgets what fclose says about a full disk.
        faiss = load_faiss()
        faiss.write_index(index, faiss.PyCallbackIOWriter(stream.write))


def saved_epoch(main: Main, path: Path, manifest: Manifest) -> Epoch:
    """The epoch that was saved. Raises `ValueError` or `OSError` if its files do not fit each other."""
    folder, nlist = path / manifest.generation, main.lists.nlist
    mask = np.ones(manifest.next_id, dtype=np.bool_)
    segments: tuple[Segment, ...] = ()
    if manifest.added:
        codes = np.load(folder / "added.codes.npy", allow_pickle=False)
        clusters = np.load(folder / "added.clusters.npy", allow_pickle=False)
        fits = codes.shape == (manifest.added, main.index.code_size) and clusters.shape == (manifest.added,)
        if not fits or codes.dtype != np.uint8 or not ((clusters >= 0) & (clusters < nlist)).all():
            raise ValueError("what was added does not fit the index")
        ids = np.arange(main.store.first, manifest.next_id)
        segments = (Segment.of(ids, clusters.astype(np.int64), codes, nlist),)
    if manifest.deleted:
        mask[np.load(folder / "deleted.npy", allow_pickle=False)] = False
    epoch = Epoch(main, segments, mask)
    if epoch.deleted != manifest.deleted:
        raise ValueError("what was deleted does not fit the index")
    return epoch


# ------------------------------------------------------------------------------------------------ the one who writes
class VectorUpdates(Updates[Epoch]):
    """The writer of a vector index. A save takes time by what was updated, and not by the index's size."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        snapshot: Epoch,
        publish: Callable[[Epoch, Manifest], None],
        reopen: Callable[[Manifest], Main],
        embed: Callable[[Sequence[Passage]], F32],
        fitting: Callable[[Any, int], F32],
    ) -> None:
        super().__init__(path, manifest, snapshot, publish)
        self._reopen, self._embed, self._fitting = reopen, embed, fitting
        self._sealed = 0  # segments with ids below are being compacted, and merge with none above

    def _prepared(self, items: Sequence[Passage], vectors: Any) -> F32:
        return self._fitting(self._embed(items) if vectors is None else vectors, len(items))

    def _next(self, ids: I64, prepared: F32 | None, mask: Mask) -> Epoch:
        segments = self.now.segments
        if prepared is not None:
            segments = self._merged((*segments, self._segment(prepared, ids)))
        return Epoch(self.now.main, segments, mask)

    def _segment(self, data: F32, ids: I64) -> Segment:
        faiss, index = load_faiss(), self.now.main.index
        clusters = np.zeros(len(data), dtype=np.int64)
        if index.nlist > 1:
            clusters = np.ascontiguousarray(index.quantizer.search(data, 1)[1][:, 0])
        codes = np.empty((len(data), index.code_size), dtype=np.uint8)
        index.encode_vectors(len(data), faiss.swig_ptr(data), faiss.swig_ptr(clusters), faiss.swig_ptr(codes))
        return Segment.of(ids, clusters, codes, index.nlist)

    def _merged(self, segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
        while (
            len(segments) > 1
            and len(segments[-2].ids) < 2 * len(segments[-1].ids)
            and not (segments[-2].ids[0] < self._sealed <= segments[-1].ids[0])
        ):
            segments = (*segments[:-2], segments[-2].with_next(segments[-1]))
        return segments

    def _written(self, snapshot: Epoch) -> Manifest:
        with IndexWriter(self.path, self._lock) as writer:
            writer.keep(self.path, self.manifest)
            if snapshot.added:
                writer.rows("added.jsonl", snapshot.store.added[: snapshot.added])
                writer.array("added.codes.npy", np.concatenate([s.codes for s in snapshot.segments]))
                clusters = np.concatenate([s.clusters for s in snapshot.segments])
                writer.array("added.clusters.npy", clusters.astype(np.int32))
            if snapshot.deleted:
                present = snapshot.present()
                writer.array("deleted.npy", present[~snapshot.mask[present]])
            return writer.commit(
                dataclasses.replace(
                    self.manifest,
                    count=snapshot.count,
                    added=snapshot.added,
                    deleted=snapshot.deleted,
                    next_id=len(snapshot.mask),
                    calibration={},
                )
            )

    @property
    def is_due(self) -> bool:
        """Whether so much was added and deleted that a new base is worth its while."""
        return self.now.added + self.now.deleted > COMPACT_ABOVE * max(1, self.manifest.rows)

    def _compact(self) -> Manifest:
        with self._memory:
            before = self.now
            self._sealed = len(before.mask)
            self._changed = False
        try:
            self.manifest = self._rewritten(before)
            main = self._reopen(self.manifest)
        except BaseException:
            self._changed, self._sealed = True, 0
            raise
        with self._memory:
            now = self.now
            main.store.added.extend(now.store.added[before.added : now.added])
            later = tuple(segment for segment in now.segments if segment.ids[0] >= self._sealed)
            self.now = Epoch(main, later, now.mask)
            self._sealed = 0
            self._publish(self.now, self.manifest)
        return self.manifest

    def _rewritten(self, epoch: Epoch) -> Manifest:
        faiss, base = load_faiss(), epoch.main.index
        lists = faiss.ArrayInvertedLists(epoch.nlist, base.code_size)
        for cluster in range(epoch.nlist):
            codes, ids = [], []
            for number in range(cluster, len(epoch.sizes), epoch.nlist):
                if epoch.sizes[number]:
                    part_codes, part_ids = epoch.stored(number)
                    keep = epoch.mask[part_ids]
                    codes.append(part_codes[keep])
                    ids.append(part_ids[keep])
            if ids:
                held, kept = np.ascontiguousarray(np.concatenate(ids)), np.ascontiguousarray(np.concatenate(codes))
                lists.add_entries(cluster, len(held), faiss.swig_ptr(held), faiss.swig_ptr(kept))
        index = like(base, base.quantizer, lists)
        index.ntotal = epoch.count
        live = epoch.live()
        with IndexWriter(self.path, self._lock) as writer:
            dense = len(live) == 0 or int(live[-1]) == len(live) - 1
            writer.passages((epoch.store.passage(int(id)) for id in live), None if dense else live)
            write_faiss(writer, index)
            return writer.commit(
                dataclasses.replace(
                    self.manifest,
                    count=epoch.count,
                    rows=epoch.count,
                    added=0,
                    deleted=0,
                    next_id=len(epoch.mask),
                    calibration={},
                )
            )
