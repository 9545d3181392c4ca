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
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flowc.backends.embed.hashing import stem
from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import SearchRequest

from .documents import Passage, embedded_text
from .ivf import check_request
from .store import IndexWriter, Manifest, PassageStore, check_files, damaged

__all__ = ["BM25Retriever", "build_bm25", "words_of"]

K1 = 1.2
B = 0.75
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
    count = len(passages)
    with IndexWriter(out) as writer:
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
        writer.passages(passages)
        with writer.file("terms.txt") as stream:
            stream.write("\n".join(vocabulary).encode("utf-8", "replace"))
        writer.array("starts.npy", starts)
        writer.array("docs.npy", docs.astype(np.int32))
        writer.array("weights.npy", weights)
        return writer.commit(
            Manifest(
                kind="bm25",
                count=count,
                metric="bm25",
                settings={"k1": K1, "b": B, "terms": len(vocabulary), "words": "{title}: {text}"},
                reasons=(f"bm25: {reason}",),
            )
        )


class BM25Retriever:
    """A mapped BM25 index, searched by words. Implements `flowc.runtime.protocols.Retriever`; safe in threads."""

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

    def batch_key(self, request: SearchRequest) -> Hashable:
        return ("search", self.name, self.manifest.generation)

    def search(self, requests: Sequence[SearchRequest]) -> Sequence[Docs | Exception]:
        """The best k passages of every request that share a word with it, or that request's error, in order.

        Equal scores are in order of id; `nprobe` has no meaning here. A result does not depend on the batch.
        """
        out: list[Docs | Exception] = []
        for request in requests:
            try:
                error = check_request(request)
                if error is not None:
                    raise error
                out.append(self._search(request.query, request.k))
            except FlowcError as e:
                out.append(e)
        return out

    def _search(self, query: str, k: int) -> Docs:
        if self._closed:
            raise ResourceError(f"the index at {self.path} was closed", code="F060", hint="open it again")
        terms = self._vocabulary()
        scores = np.zeros(self.manifest.count, dtype=np.float32)
        counts = Counter(terms[w] for w in words_of(query) if w in terms)
        try:
            for term in sorted(counts):  # one order of addition, so that the last bits do not depend on the wording
                at = slice(int(self._starts[term]), int(self._starts[term + 1]))
                scores[self._docs[at]] += self._weights[at] * np.float32(counts[term])
        except IndexError as e:
            raise damaged(self.path, f"a word list names a passage that is not there ({e})") from e
        ids = best(scores, k)
        return Docs(self.store.doc(int(i), float(scores[i])) for i in ids)

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
