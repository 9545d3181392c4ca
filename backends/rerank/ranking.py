"""What every reranker does around its model: one score for each distinct pair, and a ranking from scores."""

from __future__ import annotations

import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

from flowc.ir.errors import FlowcError, ResourceError
from flowc.ir.values import Docs
from flowc.runtime.protocols import RerankRequest

__all__ = ["Pair", "ScoreCache", "ranked"]

Pair = tuple[str, str]
"""The query, and the passage as the model reads it: `str(doc)`, "title: text"."""


class ScoreCache:
    """Scores by content, the last `size` of them. Safe to use from several threads."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._scores: OrderedDict[Pair, float] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, pairs: Sequence[Pair], score: Callable[[Sequence[Pair]], Sequence[float]]) -> list[float]:
        """A score for each pair; `score` is asked once for those that are not known, each of them once."""
        with self._lock:
            known = {pair: self._scores[pair] for pair in pairs if pair in self._scores}
        missing = [pair for pair in dict.fromkeys(pairs) if pair not in known]
        if missing:
            known |= dict(zip(missing, score(missing), strict=True))
        with self._lock:
            for pair in dict.fromkeys(pairs):
                self._scores[pair] = known[pair]
                self._scores.move_to_end(pair)
            while len(self._scores) > self._size:
                self._scores.popitem(last=False)
        return [known[pair] for pair in pairs]


def ranked(
    requests: Sequence[RerankRequest], score: Callable[[Sequence[Pair]], Sequence[float]]
) -> list[Docs | Exception]:
    """Each request's best passages with their new scores, equal ones as they came; or that request's error.

    `score` is called once for the pairs of all requests; if that fails, once for each request, so that an error is
    nobody else's.
    """
    out: list[Docs | Exception] = []
    pairs = [[(request.query, str(doc)) for doc in request.docs] for request in requests]
    try:
        scores = iter(score([pair for group in pairs for pair in group]))
        found = [[float(next(scores)) for _ in group] for group in pairs]
    except Exception as e:
        if len(requests) > 1:
            return [ranked([request], score)[0] for request in requests]
        return [e]
    for request, values in zip(requests, found, strict=True):
        try:
            if any(value != value for value in values):
                raise ResourceError("the reranker gave a score that is not a number", code="F065")
            order = sorted(range(len(values)), key=lambda n, v=values: -v[n])  # type: ignore[misc]
            docs = [dataclasses.replace(request.docs[n], score=values[n]) for n in order]
            out.append(Docs(docs[: request.k]))
        except FlowcError as e:
            out.append(e)
    return out
