"""Word search with BM25 weights: no model, no FAISS, numpy only. What to use where nothing may be installed.

Source: Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, with the idf that is
never negative, log(1 + (N - df + 0.5) / (df + 0.5)). A posting holds its passage's whole weight for the word, computed
once at build time, so that a search only adds up (Lin et al. call such a list impact-ordered, we keep it by passage).
"""

from __future__ import annotations

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

import numpy as np
import numpy.typing as npt

from flowc.backends.embed.hashing import stem
from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.options import as_where
from flowc.ir.values import Docs
from flowc.runtime.protocols import ScanBudget, SearchRequest

from .columns import Columns, Mask
from .documents import Passage, embedded_text
from .encoding import check_request
from .store import IndexWriter, Manifest, PassageStore, check_files, damaged

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


def write_words(
    writer: IndexWriter, passages: Sequence[Passage], progress: Callable[[str, int, int], None] | None = None
) -> int:
    """The word lists of the passages as files of an index; returns how many words there are."""
    count = len(passages)
    numbers: dict[str, int] = {}
    term_of, passage_of, times = array("i"), array("i"), array("i")
    lengths = np.zeros(count, dtype=np.float64)
    for at, passage in enumerate(passages):
        words = words_of(embedded_text(passage))
        lengths[at] = len(words)
        for word, n in Counter(words).items():
            term_of.append(numbers.setdefault(word, len(numbers)))
            passage_of.append(at)
            times.append(n)
        if progress is not None and (at % 1000 == 999 or at == count - 1):
            progress("words", at + 1, count)
    vocabulary = sorted(numbers)
    rank = np.empty(len(vocabulary), dtype=np.int64)  # terms in order of their spelling, not of their first use
    rank[[numbers[word] for word in vocabulary]] = np.arange(len(vocabulary))
    terms = rank[np.frombuffer(term_of, dtype=np.int32)] if len(term_of) else np.empty(0, dtype=np.int64)
    docs = np.frombuffer(passage_of, dtype=np.int32) if len(passage_of) else np.empty(0, dtype=np.int32)
    tf = np.frombuffer(times, dtype=np.int32).astype(np.float64) if len(times) else np.empty(0)
    order = np.lexsort((docs, terms))
    terms, docs, tf = terms[order], docs[order], tf[order]
    df = np.bincount(terms, minlength=len(vocabulary)).astype(np.float64)
    starts = np.concatenate([[0], np.cumsum(df)]).astype(np.int64)
    idf = np.log1p((count - df + 0.5) / (df + 0.5))
    norm = K1 * (1 - B + B * lengths / max(1.0, float(lengths.mean())))
    weights = (idf[terms] * tf * (K1 + 1) / (tf + norm[docs])).astype(np.float32)
    with writer.file("terms.txt") as stream:
        stream.write("\n".join(vocabulary).encode("utf-8", "replace"))
    writer.array("starts.npy", starts)
    writer.array("docs.npy", docs.astype(np.int32))
    writer.array("weights.npy", weights)
    return len(vocabulary)


@dataclass(slots=True, eq=False)
class WordSearch:
    """A search of a BM25 index under way: one unit, which costs `cost` postings."""

    of: BM25Retriever
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


class BM25Retriever:
    """A mapped BM25 index, searched by words. Implements `flowc.runtime.protocols.ElasticRetriever`; thread-safe."""

    max_batch = 256

    def __init__(
        self, path: str | os.PathLike[str], manifest: Manifest, *, name: str | None = None, verify: bool = False
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.name
        self.manifest = manifest
        self.nprobe = 1  # there are no lists to choose from; here so that every index has it
        self._closed = False
        self._lock = threading.Lock()
        self._terms: dict[str, int] | None = None
        folder = check_files(self.path, manifest, verify=verify)
        try:
            self._starts, self._docs, self._weights = (
                np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False) for n in ("starts", "docs", "weights")
            )
            # Every file is opened here, so that a build that replaces the index does not take one away later.
            with (folder / "terms.txt").open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                self._words = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        except (OSError, ValueError, EOFError) as e:
            raise damaged(self.path, f"its word lists cannot be opened ({e})") from e
        if len(self._docs) != len(self._weights) or not len(self._starts) or self._starts[-1] != len(self._docs):
            raise damaged(self.path, "its word lists do not fit each other")
        self.store = PassageStore(self.path, manifest)
        try:
            self._columns = Columns(folder, manifest.rows, present="fields.npy" in manifest.files)
        except (OSError, ValueError, EOFError) as e:
            raise damaged(self.path, f"its metadata cannot be opened ({e})") from e

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
                if self._closed:
                    raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
                only = None
                if (where := as_where(request.where)) is not None:
                    self._columns.check(where, ())
                    only = self._columns.rows(where)
                terms = self._vocabulary()
                counts = Counter(terms[w] for w in words_of(request.query) if w in terms)
                cost = sum(int(self._starts[t + 1] - self._starts[t]) for t in counts)
                out.append(WordSearch(self, request, counts, cost, only))
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
        return Docs(self.store.doc(i, s) for i, s in search.found or ())

    def finish(self, search: WordSearch) -> Docs:
        """The search's result, run now if it was not. Raises `CancelledError` if it was cancelled."""
        if search.cancelled:
            raise CancelledError("the search was cancelled")
        self.run([(search, [0])])
        return self.partial(search)

    def _score(self, search: WordSearch) -> list[tuple[int, float]]:
        if self._closed:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        scores = np.zeros(self.manifest.rows, dtype=np.float32)
        try:
            for term in sorted(search.counts):  # one order of addition: the last bits do not depend on the wording
                at = slice(int(self._starts[term]), int(self._starts[term + 1]))
                scores[self._docs[at]] += self._weights[at] * np.float32(search.counts[term])
        except IndexError as e:
            raise damaged(self.path, f"a word list names a passage that is not there ({e})") from e
        if search.only is not None:
            scores[~search.only] = 0
        return [(int(i), float(scores[i])) for i in best(scores, search.request.k)]

    def _vocabulary(self) -> dict[str, int]:
        with self._lock:
            if self._terms is None:
                try:
                    text = self._words[:].decode("utf-8") if self._words is not None else ""
                except UnicodeDecodeError as e:
                    raise damaged(self.path, f"terms.txt cannot be read ({e})") from e
                words = text.split("\n") if text else []
                if len(words) + 1 != len(self._starts):
                    raise damaged(self.path, "terms.txt does not fit the word lists")
                self._terms = {word: number for number, word in enumerate(words)}
            return self._terms

    def close(self) -> None:
        """Lets go of the files. A search after this answers with `ResourceError` F060."""
        self._closed = True
        self.store.close()


def best(scores: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Positions of the k highest positive scores, by (score descending, position ascending)."""
    found = np.flatnonzero(scores > 0)
    if k < len(found):
        last = np.partition(scores[found], len(found) - k)[len(found) - k]
        found = found[scores[found] >= last]
    return found[np.argsort(-scores[found], kind="stable")][:k]
