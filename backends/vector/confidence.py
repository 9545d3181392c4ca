"""How likely the best k found so far are the result of a search: a probability, calibrated on the index.

What tells: how far the k-th best lies above the centroid of the next list, for how many lists nothing has changed, and
how many are left. A logistic regression on these three is fitted to the index's own queries, at every list of each;
on as many queries that it had not seen it is checked that of the searches with a confidence of p a share p had in fact
their result. Nothing about a single search follows from it: speculation compares its guess with the result in the end.

Source: Hu et al., "HedraRAG", 2025, section 4.3 (searches settle early, and generation may start from what they hold);
the check after Niculescu-Mizil and Caruana, "Predicting Good Probabilities with Supervised Learning", 2005.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .scan import I64, ListSearch

__all__ = ["confidence_of", "fit_confidence", "put_first", "reliability"]

F64 = npt.NDArray[np.float64]
_BINS = 10


class Trace(Protocol):
    """What one query saw, list by list; see `calibrate`."""

    @property
    def near(self) -> list[float]: ...
    @property
    def kth(self) -> dict[int, list[float]]: ...
    @property
    def tops(self) -> list[list[int]]: ...

    def final_after(self, k: int, nprobe: int) -> int: ...


# ------------------------------------------------------------------------------------------------ calibrating
def _points(traces: Sequence[Trace], k: int, nprobe: int) -> tuple[F64, F64]:
    """What is known after each list but the last, one row each, and whether the result stood then."""
    rows: list[tuple[float, float, float, float]] = []
    final: list[bool] = []
    for trace in traces:
        last = min(nprobe, len(trace.near))
        end, changed = trace.final_after(k, nprobe), 0
        for r in range(1, last):
            if trace.tops[r][:k] != trace.tops[r - 1][:k]:
                changed = r
            if trace.kth[k][r] > -math.inf:
                rows.append(_features(trace.kth[k][r] - trace.near[r], r - changed, last - r))
                final.append(r >= end)
    return np.array(rows, dtype=np.float64).reshape(-1, 4), np.array(final, dtype=np.float64)


def _features(gap: float, unchanged: int, left: int) -> tuple[float, float, float, float]:
    return 1.0, 10 * max(-1.0, min(1.0, gap)), math.log1p(unchanged), math.log(left)


def _logistic(rows: F64, labels: F64) -> F64:
    """The weights, by Newton's method, with a little shrinkage so that labels that can be told apart have an end."""
    weights = np.zeros(rows.shape[1])
    for _ in range(25):
        p = _probability(rows, weights)
        slope = rows.T @ (labels - p) / len(rows) - 1e-3 * weights
        curve = (rows * (p * (1 - p))[:, None]).T @ rows / len(rows) + 1e-3 * np.eye(len(weights))
        weights = weights + np.linalg.solve(curve, slope)
    return weights


def _probability(rows: F64, weights: F64) -> F64:
    return np.asarray(1 / (1 + np.exp(-np.clip(rows @ weights, -30, 30))), dtype=np.float64)


def reliability(predicted: F64, observed: F64) -> tuple[float, list[tuple[float, float, int]]]:
    """The mean difference of predicted and observed, and both with the count for each tenth of the predictions."""
    bins, error = [], 0.0
    which = np.minimum((predicted * _BINS).astype(np.int64), _BINS - 1)
    for number in np.unique(which).tolist():
        here = which == number
        p, o, count = float(predicted[here].mean()), float(observed[here].mean()), int(np.count_nonzero(here))
        bins.append((round(p, 4), round(o, 4), count))
        error += abs(p - o) * count / len(predicted)
    return error, bins


def fit_confidence(
    seen: Sequence[Trace], held_out: Sequence[Trace], ks: Sequence[int], probes: Sequence[int]
) -> list[dict[str, Any]]:
    """The weights for each k and nprobe, and on the queries held out the reliability, as plain values.

    Rows are left out where there is nothing to learn from: one list, or results that never (always) stood.
    """
    out: list[dict[str, Any]] = []
    for k in ks:
        for nprobe in probes:
            rows, labels = _points(seen, k, nprobe)
            tests, truths = _points(held_out, k, nprobe)
            if not len(tests) or not len(rows) or labels.min() == labels.max():
                continue
            weights = _logistic(rows, labels)
            error, bins = reliability(_probability(tests, weights), truths)
            row = {"k": k, "nprobe": nprobe, "weights": [round(float(w), 6) for w in weights]}
            out.append(row | {"error": round(error, 4), "reliability": [list(one) for one in bins]})
    return out


# ------------------------------------------------------------------------------------------------ using
def confidence_of(calibration: Mapping[str, Any], search: ListSearch) -> float:
    """The probability that the best k so far are the result: 1 once nothing is left, 0 where nothing is known of it.

    Nothing is known for indexes without calibration, filters, a larger k or nprobe than was calibrated, and while
    there are fewer than k.
    """
    if search.done:
        return 1.0
    request = search.request
    k = search.k if request is None else request.k
    rows: Sequence[Mapping[str, Any]] = calibration.get("confidence", ())
    fit = [row for row in rows if row["k"] >= k and row["nprobe"] >= search.units]
    kth = search.kth()
    if not fit or kth == -math.inf or (request is not None and getattr(request, "where", None) is not None):
        return 0.0
    row = min(fit, key=lambda row: (row["k"], row["nprobe"]))
    scanned = np.asarray(search.scanned)
    near = np.asarray(search.near)
    left = int(np.count_nonzero(~scanned))
    # The scanned lists by nearness, whatever the order in which they were scanned, and the last that holds a result.
    ranks = np.flatnonzero(scanned)
    ranks = ranks[np.argsort(-near[ranks], kind="stable")]
    held = np.isin(search.lists[ranks] % search.of.nlist, search.of.clusters_of(search.of.best(search)[1]))
    unchanged = len(ranks) - 1 - int(np.flatnonzero(held).max(initial=0))
    features = _features(kth - float(near[~scanned].max()), unchanged, left)
    return float(_probability(np.array([features]), np.array(row["weights"]))[0])


# ------------------------------------------------------------------------------------------------ order
def put_first(search: ListSearch, ids: Sequence[int]) -> None:
    """Has the lists of these passages scanned before the others, of both the nearest first; nothing else changes.

    Ids that the index does not hold are passed over. For a search that has not begun to scan, and has no rule that
    stops it. Source: HedraRAG, section 4.2.
    """
    held = np.isin(search.lists % search.of.nlist, search.of.clusters_of(np.asarray(ids, dtype=np.int64)))
    if held.any():
        order: I64 = np.argsort(~held, kind="stable")
        search.lists[:] = search.lists[order]
        search.near[:] = search.near[order]
