"""What a search that is still to come will probe: predicted from its text so far, again and again as that grows.

While a model writes the query of a search (a rewritten question, a hypothetical answer, the next sub-question), what
it is asked and what it has written so far already point at the lists. `predict` starts from the earliest text there is;
`follow` predicts anew once enough words are there; each prediction takes the place of the one before, and what left it
is not brought in any more. Where a search for the same text was made before, as in programs that search in rounds, its
passages are mixed in: the next query comes from what they say.

Each list gets a probability from its rank among the nearest, by how much of the text was known. Those were measured
(docs/lookahead.md); the cache weighs them against demand, bytes and the time that is left.

Source: Lin et al., "TeleRAG", 2025, section 3, which predicts once. Predicting again while the text is written is ours:
on real text it takes what a prediction covers of the probed lists from 69 or 82 of 100 to 94 or 96. The mixture:
Rocchio, "Relevance Feedback in Information Retrieval", 1971.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from .cache import ListCache, Prediction
from .devices import I64

__all__ = ["CHANCES", "WORDS", "Lookahead", "LookaheadStats", "Plan", "chances"]

WORDS = (5, 10, 20, 40, 80)  # written words after which a search is predicted again
AHEAD = 4  # times the lists that a search probes which a prediction names

# By words known of the text to come (none, then from 5, 10, 20): the probability that the search probes a list whose
# rank among the prediction's, in units of nprobe, is below 1/4, 1/2, 1, 2 and 4. The mean over the two corpora of
# benchmarks/lookahead.py; where one is off by a fifth, the order of the lists within a prediction is the same.
CHANCES: tuple[tuple[float, ...], ...] = (
    (0.75, 0.60, 0.42, 0.19, 0.07),
    (0.84, 0.70, 0.48, 0.19, 0.06),
    (0.90, 0.77, 0.55, 0.18, 0.05),
    (0.97, 0.90, 0.65, 0.16, 0.02),
)
_EDGES = np.array([0.25, 0.5, 1.0, 2.0])
_MOST = 4096  # announcements that are kept; those of callers that never release fall out
_FORGET = 30.0  # seconds after its time, or ten times the window, after which an announcement counts no more

# Lists for each text, nearest first, and how many of them a search probes; None for a text that cannot be embedded.
Plan = Callable[[Sequence[str]], Sequence[tuple[I64, int] | None]]


def chances(ranks: int, nprobe: int, words: int) -> npt.NDArray[np.float64]:
    """The probability for each rank that a list is probed, where so many words of the text to come are known."""
    row = CHANCES[min(bisect.bisect_right(WORDS, words), len(CHANCES) - 1)]
    return np.array(row)[np.searchsorted(_EDGES, (np.arange(ranks) + 0.5) / nprobe)]


@dataclass(frozen=True, slots=True)
class LookaheadStats:
    """Counts since the start. `late` predictions were made after the search was due."""

    announced: int = 0
    predictions: int = 0
    late: int = 0
    errors: int = 0


@dataclass(slots=True, eq=False)
class _Announcement:
    text: str
    began_s: float
    due_s: float
    window_s: float
    words: int = 0  # that the last prediction knew


@dataclass(slots=True, eq=False)
class Lookahead:
    """Announcements turned into predictions for a cache. Implements `flowc.runtime.protocols.ClusterCache`.

    Texts are embedded on a thread of its own, the newest of each key only; with `threads=False`, at once. Nothing here
    raises: what goes wrong is counted, and costs a prediction.
    """

    cache: ListCache
    plan: Plan
    threads: bool = True
    words: Sequence[int] = WORDS
    _announced: OrderedDict[Hashable, _Announcement] = field(default_factory=OrderedDict, init=False)
    _todo: dict[Hashable, tuple[str, int]] = field(default_factory=dict, init=False)
    _stats: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LookaheadStats.__slots__, 0), init=False)
    _changed: threading.Condition = field(default_factory=threading.Condition, init=False)
    _thread: threading.Thread | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)

    def stats(self) -> LookaheadStats:
        with self._changed:
            return LookaheadStats(**self._stats)

    def predict(self, key: Hashable, text: str, window_s: float) -> None:
        """Announces a search for something like `text` in about `window_s` seconds; takes the place of the last."""
        try:
            now = self.cache.device.now()
            window = max(0.0, float(window_s))
            with self._changed:
                self._stats["announced"] += 1
                self._announced[key] = _Announcement(str(text), now, now + window, window)
                self._announced.move_to_end(key)
                self._forget(now)
            self._ask(key, str(text), 0)
        except Exception:
            self._failed()

    def follow(self, key: Hashable, text_so_far: str) -> None:
        """Says what has been written since; predicts again where 5, 10, 20, 40 and 80 words of it are passed."""
        try:
            with self._changed:
                known = self._announced.get(key)
                if known is None:
                    return
                # A word that may still grow is none yet; no word is shorter than two characters with its space.
                if len(text_so_far) < 2 * self._next(known.words):
                    return
                words = max(0, len(text_so_far.split()) - (not text_so_far[-1:].isspace()))
                if words < self._next(known.words):
                    return
                known.words = words
                now = self.cache.device.now()
                if now >= known.due_s:  # it takes longer than was thought: for half as long again, then
                    known.due_s = now + 0.5 * (now - known.began_s)
            self._ask(key, f"{known.text} {text_so_far}", words)
        except Exception:
            self._failed()

    def release(self, key: Hashable) -> None:
        """Takes back what was announced under the key; transfers that nobody else needs end."""
        try:
            with self._changed:
                self._todo.pop(key, None)
                if self._announced.pop(key, None) is not None:
                    self.cache.announce(key, None)
        except Exception:
            self._failed()

    def close(self) -> None:
        """Ends the thread and forgets every announcement."""
        with self._changed:
            self._closed = True
            self._todo.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        for key in list(self._announced):
            self.release(key)

    def _next(self, words: int) -> float:
        at = bisect.bisect_right(self.words, words)
        return self.words[at] if at < len(self.words) else float("inf")

    def _failed(self) -> None:
        with self._changed:
            self._stats["errors"] += 1

    def _forget(self, now: float) -> None:
        for key, known in list(self._announced.items()):
            old = now > known.due_s + max(_FORGET, 10 * known.window_s)
            if not old and len(self._announced) <= _MOST:
                break  # they stand in the order in which they came
            del self._announced[key]
            self._todo.pop(key, None)
            self.cache.announce(key, None)

    def _ask(self, key: Hashable, text: str, words: int) -> None:
        if not self.threads:
            self._answer({key: (text, words)})
            return
        with self._changed:
            if self._closed:
                return
            self._todo[key] = text, words
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="flowc-lookahead", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._todo or self._closed)
                if self._closed:
                    return
                todo, self._todo = self._todo, {}
            try:
                self._answer(todo)
            except Exception:
                self._failed()

    def _answer(self, todo: dict[Hashable, tuple[str, int]]) -> None:
        planned = self.plan([text for text, _ in todo.values()])
        for (key, (_, words)), found in zip(todo.items(), planned, strict=True):
            with self._changed:
                known = self._announced.get(key)
                if found is None or known is None:  # released meanwhile
                    self._stats["errors"] += found is None
                    continue
                self._stats["predictions"] += 1
                self._stats["late"] += self.cache.device.now() > known.due_s
                lists, nprobe = found
                self.cache.announce(key, Prediction(lists, chances(len(lists), nprobe, words), known.due_s))
