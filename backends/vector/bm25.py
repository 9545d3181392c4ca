"""Word search with BM25 weights: no model, no FAISS, numpy only. What to use where nothing may be installed.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, with the idf that is
never negative, log(1 + (N - df + 0.5) / (df + 0.5)). A posting holds its passage's whole weight for the word, computed
once at build time, so that a search only adds up (Lin et al. call such a list impact-ordered, we keep it by passage).
"""

from __future__ import annotations

import dataclasses
import mmap
import os
import re
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flowc.backends.embed.hashing import stem
from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.options import Where, as_where
from flowc.ir.values import Docs
from flowc.runtime.protocols import ScanBudget, SearchRequest

from .columns import Columns, Mask
from .documents import Passage, embedded_text
from .encoding import check_request
from .store import IndexWriter, Manifest, PassageStore, check_files, damaged
from .updates import I64, Snapshot, Updatable, Updates

__all__ = ["WORD_SETTINGS", "BM25Retriever", "WordSearch", "build_bm25", "words_of", "write_words"]

K1 = 1.2
B = 0.75
WORD_SETTINGS = {"k1": K1, "b": B, "words": "{title}: {text}"}
_TOKEN = re.compile(r"\w+(?:[._-]\w+)*")
_PART = re.compile(r"[^\W_]+")
# Chinese, Japanese kana and Thai run words together: pairs of neighbouring letters stand for words.
_RUN = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")


def words_of(text: str) -> list[str]:
    """The index words of a text: lower case, without a plural s; `asyncio.gather` counts as itself and as its parts."""
    out: list[str] = []
    for token in _TOKEN.findall(text.lower()):
        parts = _PART.findall(token)
        if len(parts) > 1:
            out.append(token)
        for part in parts:
            runs = _RUN.findall(part)
            if runs:
                out += [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
                part = _RUN.sub("", part)
            if part:
                out.append(stem(part))
    return out


def build_bm25(
    passages: Sequence[Passage],
    out: str | os.PathLike[str],
    *,
    reason: str = "asked for",
    progress: Callable[[str, int, int], None] | None = None,
) -> Manifest:
    """Builds and saves a BM25 index; see `flowc.backends.vector.build_index`."""
    with IndexWriter(out) as writer:
        terms = write_words(writer, passages, progress)
        writer.passages(passages)
        return writer.commit(
            Manifest(
                kind="bm25",
                count=len(passages),
                metric="bm25",
                settings={**WORD_SETTINGS, "terms": terms},
                reasons=(f"bm25: {reason}",),
            )
        )


@dataclass(frozen=True, slots=True, eq=False)
class Postings:
    """Which words stand in which passages: `words[term]` stands `times` times in passage number `rows` of `lengths`."""

    words: Mapping[str, int]
    terms: I64
    rows: I64
    times: I64
    lengths: I64

    @staticmethod
    def of(passages: Sequence[Passage], progress: Callable[[str, int, int], None] | None = None) -> Postings:
        """The postings of these passages."""
        numbers: dict[str, int] = {}
        terms, rows, times = array("q"), array("q"), array("q")
        lengths = np.zeros(len(passages), dtype=np.int64)
        for at, passage in enumerate(passages):
            words = words_of(embedded_text(passage))
            lengths[at] = len(words)
            for word, n in Counter(words).items():
                terms.append(numbers.setdefault(word, len(numbers)))
                rows.append(at)
                times.append(n)
            if progress is not None and (at % 1000 == 999 or at == len(passages) - 1):
                progress("words", at + 1, len(passages))
        return Postings(numbers, np.array(terms), np.array(rows), np.array(times), lengths)

    def kept(self, rows: I64) -> Postings:
        """Those of these passages (rising) alone, which are numbered anew."""
        place = np.full(len(self.lengths), -1, dtype=np.int64)
        place[rows] = np.arange(len(rows))
        keep = place[self.rows] >= 0
        return Postings(self.words, self.terms[keep], place[self.rows[keep]], self.times[keep], self.lengths[rows])

    def followed_by(self, other: Postings) -> Postings:
        """Those of these passages and then of the others."""
        words = dict(self.words)
        number = np.array([words.setdefault(word, len(words)) for word in other.words], dtype=np.int64)
        return Postings(
            words,
            np.concatenate([self.terms, number[other.terms]]),
            np.concatenate([self.rows, other.rows + len(self.lengths)]),
            np.concatenate([self.times, other.times]),
            np.concatenate([self.lengths, other.lengths]),
        )

    def weighed(self) -> WordLists:
        """The lists of all words, in order of their spelling, with every passage's weight."""
        count = len(self.lengths)
        used = np.zeros(len(self.words), dtype=np.bool_)
        used[self.terms] = True
        vocabulary = sorted(word for word, number in self.words.items() if used[number])
        rank = np.full(len(self.words), -1, dtype=np.int64)
        rank[[self.words[word] for word in vocabulary]] = np.arange(len(vocabulary))
        terms = rank[self.terms]
        order = np.lexsort((self.rows, terms))
        terms, rows, tf = terms[order], self.rows[order], self.times[order].astype(np.float64)
        df = np.bincount(terms, minlength=len(vocabulary)).astype(np.float64)
        starts = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
        idf = np.log1p((count - df + 0.5) / (df + 0.5))
        mean = float(self.lengths.mean()) if count else 1.0
        norm = K1 * (1 - B + B * self.lengths / max(1.0, mean))
        weights = (idf[terms] * tf * (K1 + 1) / (tf + norm[rows])).astype(np.float32)
        return WordLists(tuple(vocabulary), starts, rows.astype(np.int32), weights)


@dataclass(frozen=True, slots=True, eq=False)
class WordLists:
    """Words, where the list of each starts, and in the lists the passages' numbers and weights."""

    words: Sequence[str]
    starts: npt.NDArray[np.int64]
    docs: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]

    def write(self, writer: IndexWriter) -> None:
        """Puts them into files of an index."""
        with writer.file("terms.txt") as stream:
            stream.write("\n".join(self.words).encode("utf-8", "replace"))
        writer.array("starts.npy", self.starts)
        writer.array("docs.npy", self.docs)
        writer.array("weights.npy", self.weights)


def write_words(
    writer: IndexWriter, passages: Sequence[Passage], progress: Callable[[str, int, int], None] | None = None
) -> int:
    """The word lists of the passages as files of an index; returns how many words there are."""
    lists = Postings.of(passages, progress).weighed()
    lists.write(writer)
    return len(lists.words)


class WordSnapshot(Snapshot):
    """The word lists, passages and fields of an index at one moment; never changes. `ids` are those of the rows."""

    def __init__(
        self,
        lists: WordLists,
        ids: I64,
        mask: Mask,
        store: PassageStore,
        columns: Columns,
        terms: Callable[[], Mapping[str, int]],
    ) -> None:
        self.lists, self.ids, self.mask, self.store, self.columns = lists, ids, mask, store, columns
        self.count = len(ids)
        self.terms = terms  # word -> its number, made at the first search

    def rows(self, where: Where | None) -> Mask | None:
        """Of each row whether it meets the conditions; None for no conditions."""
        return None if where is None else self.matching(where)[self.ids]


class WordUpdates(Updates[WordSnapshot]):
    """The writer of a BM25 index. A weight depends on every passage, so each update computes all weights again, and a
    save writes the whole index: 16,000 passages cost about two seconds at the first update and 0.2 at the others."""

    _postings: Postings | None = None  # of the snapshot's rows

    def _prepared(self, items: Sequence[Passage], vectors: Any) -> Postings:
        if vectors is not None:
            raise ResourceError("an index of words holds no vectors", code="F063", hint="leave them out")
        return Postings.of(items)

    def _next(self, ids: I64, prepared: Postings | None, mask: Mask) -> WordSnapshot:
        now = self.now
        if self._postings is None:
            self._postings = Postings.of([now.store.passage(int(id)) for id in now.ids])
        kept = np.flatnonzero(mask[now.ids])
        postings = self._postings.kept(kept)
        if prepared is not None:
            postings = postings.followed_by(prepared)
        lists = postings.weighed()
        self._postings = postings
        numbers = {word: number for number, word in enumerate(lists.words)}
        rows = np.concatenate([now.ids[kept], ids])
        return WordSnapshot(lists, rows, mask, now.store, now.columns, lambda: numbers)

    def _written(self, snapshot: WordSnapshot) -> Manifest:
        with IndexWriter(self.path, self._lock) as writer:
            ids, next_id = snapshot.ids, len(snapshot.mask)
            dense = len(ids) == 0 or int(ids[-1]) == len(ids) - 1
            snapshot.lists.write(writer)
            writer.passages((snapshot.store.passage(int(id)) for id in ids), None if dense else ids)
            settings = {**self.manifest.settings, "terms": len(snapshot.lists.words)}
            return writer.commit(
                dataclasses.replace(self.manifest, count=len(ids), rows=len(ids), next_id=next_id, settings=settings)
            )


@dataclass(slots=True, eq=False)
class WordSearch:
    """A search of a BM25 index under way: one unit, which costs `cost` postings."""

    of: BM25Retriever
    at: WordSnapshot
    request: SearchRequest
    counts: Mapping[int, int]
    cost: int
    only: Mask | None = None  # passages that it may find
    found: list[tuple[int, float]] | None = None
    cancelled: bool = False

    @property
    def units(self) -> int:
        return 1

    @property
    def costs(self) -> Sequence[int]:
        return (self.cost,)

    @property
    def done(self) -> bool:
        return self.found is not None or self.cancelled

    def remaining(self) -> Sequence[int]:
        return () if self.done else (0,)

    def cancel(self) -> None:
        """Keeps the search from being run, if it was not yet; `finish` refuses it then."""
        self.cancelled = True


class BM25Retriever(Updatable):
    """A mapped BM25 index, searched by words. Implements `flowc.runtime.protocols.ElasticRetriever`; thread-safe."""

    max_batch = 256

    def __init__(
        self, path: str | os.PathLike[str], manifest: Manifest, *, name: str | None = None, verify: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.manifest = manifest
        self.nprobe = 1  # there are no lists to choose from; here so that every index has it
        self._lock = threading.Lock()
        self._updates: WordUpdates | None = None
        folder = check_files(self.path, manifest, verify=verify)
        try:
            starts, docs, weights = (
                np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in ("starts", "docs", "weights")
            )
            # Every file is opened here, so that a build that replaces the index does not take one away later.
            with (folder / "terms.txt").open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                words = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        except (OSError, ValueError, EOFError) as e:
            raise damaged(self.path, f"its word lists cannot be opened ({e})") from e
        if len(docs) != len(weights) or not len(starts) or starts[-1] != len(docs):
            raise damaged(self.path, "its word lists do not fit each other")
        store = PassageStore(self.path, manifest)
        try:
            columns = Columns(folder, manifest.rows, present="fields.npy" in manifest.files)
        except (OSError, ValueError, EOFError) as e:
            raise damaged(self.path, f"its metadata cannot be opened ({e})") from e
        mask = np.ones(manifest.next_id, dtype=np.bool_)
        lists = WordLists((), starts, docs, weights)
        terms = _once(lambda: self._vocabulary(words, len(starts)), self._lock)
        self._now: WordSnapshot | None = WordSnapshot(lists, store.ids, mask, store, columns, terms)

    @property
    def now(self) -> WordSnapshot:
        """The index as it is now. It never changes: an update makes another one."""
        if self._now is None:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        return self._now

    @property
    def store(self) -> PassageStore:
        return self.now.store

    @property
    def updates(self) -> WordUpdates:
        now = self.now
        with self._lock:
            if self._updates is None:
                self._updates = WordUpdates(self.path, self.manifest, now, self._publish)
            return self._updates

    def _publish(self, now: WordSnapshot, manifest: Manifest) -> None:
        if self._now is not None:
            self._now, self.manifest = now, manifest

    def batch_key(self, request: SearchRequest) -> Hashable:
        return ("search", self.name, self.manifest.generation)

    def search(self, requests: Sequence[SearchRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request that share a word with it, or that request's error, in order.

        Equal scores are in order of id; `nprobe` has no meaning here. A result does not depend on the batch.
        """
        out: list[Docs | Exception] = []
        for search in self.begin(requests):
            try:
                out.append(self.finish(search) if isinstance(search, WordSearch) else search)
            except FlowcError as e:
                out.append(e)
        return out

    def begin(self, requests: Sequence[SearchRequest]) -> Sequence[WordSearch | Exception]:
        """A search of one unit for each request, or that request's error. A score is a sum over all words, so there
        is no part of the work whose result means anything; a `stop` has nothing to stop."""
        out: list[WordSearch | Exception] = []
        for request in requests:
            try:
                error = check_request(request)
                if error is not None:
                    raise error
                now = self.now
                only = now.rows(as_where(request.where))
                terms, starts = now.terms(), now.lists.starts
                counts = Counter(terms[w] for w in words_of(request.query) if w in terms)
                cost = sum(int(starts[t + 1] - starts[t]) for t in counts)
                out.append(WordSearch(self, now, request, counts, cost, only))
            except FlowcError as e:
                out.append(e)
        return out

    def run(self, work: Sequence[tuple[WordSearch, Sequence[int] | npt.NDArray[np.int64]]]) -> None:
        """Runs searches whose one unit is named. Raises F060 if the index was closed, F062 if it is damaged."""
        for search, units in work:
            if search.of is not self:
                raise ValueError("a search of another index")
            if any(unit != 0 for unit in units):
                raise ValueError("there is one unit, and its number is 0")
            if len(units) and not search.done:
                search.found = self._score(search)

    def scan(self, searches: Sequence[WordSearch], budget: ScanBudget | None = None) -> None:
        """Runs searches one after another until all are done or the budget is spent."""
        began, spent = time.perf_counter(), 0
        for units, search in enumerate((search for search in searches if not search.done), start=1):
            self.run([(search, [0])])
            spent += search.cost
            if budget is not None and (
                (budget.units is not None and units >= budget.units)
                or (budget.codes is not None and spent >= budget.codes)
                or (budget.seconds is not None and time.perf_counter() - began >= budget.seconds)
            ):
                return

    def partial(self, search: WordSearch) -> Docs:
        """The result if the search was run, and no passages before."""
        return Docs(search.at.store.doc(i, s) for i, s in search.found or ())

    def finish(self, search: WordSearch) -> Docs:
        """The search's result, run now if it was not. Raises `CancelledError` if it was cancelled."""
        if search.cancelled:
            raise CancelledError("the search was cancelled")
        self.run([(search, [0])])
        return self.partial(search)

    def _score(self, search: WordSearch) -> list[tuple[int, float]]:
        if self._now is None:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        at, lists = search.at, search.at.lists
        scores = np.zeros(len(at.ids), dtype=np.float32)
        try:
            for term in sorted(search.counts):  # one order of addition: the last bits do not depend on the wording
                part = slice(int(lists.starts[term]), int(lists.starts[term + 1]))
                scores[lists.docs[part]] += lists.weights[part] * np.float32(search.counts[term])
        except IndexError as e:
            raise damaged(self.path, f"a word list names a passage that is not there ({e})") from e
        if search.only is not None:
            scores[~search.only] = 0
        return [(int(at.ids[row]), float(scores[row])) for row in best(scores, search.request.k)]

    def _vocabulary(self, mapped: mmap.mmap | None, starts: int) -> dict[str, int]:
        try:
            text = mapped[:].decode("utf-8") if mapped is not None else ""
        except UnicodeDecodeError as e:
            raise damaged(self.path, f"terms.txt cannot be read ({e})") from e
        words = text.split("\n") if text else []
        if len(words) + 1 != starts:
            raise damaged(self.path, "terms.txt does not fit the word lists")
        return {word: number for number, word in enumerate(words)}

    def close(self) -> None:
        """Lets go of the files. A search after this answers with `ResourceError` F060; updates not saved are lost."""
        if self._updates is not None:
            self._updates.close()
        now, self._now = self._now, None
        if now is not None:
            now.store.close()


def _once(make: Callable[[], Mapping[str, int]], lock: threading.Lock) -> Callable[[], Mapping[str, int]]:
    """What `make` gives, made at the first call."""
    made: list[Mapping[str, int]] = []

    def get() -> Mapping[str, int]:
        with lock:
            if not made:
                made.append(make())
            return made[0]

    return get


def best(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Positions of the k highest positive scores, by (score descending, position ascending)."""
    found = np.flatnonzero(scores > 0)
    if k < len(found):
        last = np.partition(scores[found], len(found) - k)[len(found) - k]
        found = found[scores[found] >= last]
    return found[np.argsort(-scores[found], kind="stable")][:k]
