"""Where a search may stop early: a rule with one number, chosen on the index's own queries so that its risk is known.

The rule: stop once the next list's centroid scores less than the k-th best result by more than `gap`. For a query i let
g_i be the smallest gap under which it would not have stopped before its result was final. The gap for a risk eps is the
ceil((n + 1)(1 - eps))-th smallest of the n values g_i; a further query from where those came from then has its result
changed with probability at most eps, whatever the distribution. Queries of another kind carry no such promise, which is
why the result says what was asked, and what the rule did to as many queries that it had not seen.

Scanning in larger steps than one list only makes a search stop later, and later is never worse: the k-th best rises and
centroids fall, so the rule goes on to hold.

Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, chapter 2 (the quantile, known as
split conformal prediction); the rule after Li et al., "Improving Approximate Nearest Neighbor Search through Learned
Adaptive Early Termination", 2020, with a measured threshold in place of a learned model. Exact geometric bounds on
lists were measured too: at 256 to 384 dimensions they skip 0.01 % of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .confidence import fit_confidence
from .scan import F32, Lists

__all__ = ["EPS", "RULE", "calibrate", "stopping_gap"]

RULE = "centroid-gap"
EPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_KS = (4, 10, 32)  # a search with another k is run with the next larger of these, whose first k stand when all do
_WIDER = (1, 2, 4)  # times the index's nprobe; a search with another nprobe takes the next larger


@dataclass(frozen=True, slots=True)
class _Trace:
    """What one query saw, list by list. `near[r]` is the score of the r-th list's centroid."""

    near: list[float]
    kth: dict[int, list[float]]  # k -> the k-th best after 0, 1, 2, ... lists
    tops: list[list[int]]  # ids of the best max(_KS) after 0, 1, 2, ... lists

    def final_after(self, k: int, nprobe: int) -> int:
        """After how many of the first `nprobe` lists the best k are what they are after all of those."""
        last = min(nprobe, len(self.near))
        final = self.tops[last][:k]
        while last and self.tops[last - 1][:k] == final:
            last -= 1
        return last

    def gap(self, k: int, nprobe: int) -> float:
        """The smallest gap under which the rule does not stop before the best k are final."""
        return max((self.kth[k][r] - self.near[r] for r in range(1, self.final_after(k, nprobe))), default=-math.inf)

    def stops_after(self, k: int, nprobe: int, gap: float) -> int:
        """After how many lists the rule stops."""
        last = min(nprobe, len(self.near))
        return next((r for r in range(1, last) if self.near[r] < self.kth[k][r] - gap), last)


def _trace(lists: Lists, query: F32, nprobe: int) -> _Trace:
    most = min(max(_KS), lists.count)
    search = lists.begin(query, most, nprobe)
    trace = _Trace([float(s) for s in search.near], {k: [-math.inf] for k in _KS}, [[]])
    for rank in range(search.units):
        lists.run([(search, [rank])])
        scores, ids = lists.best(search)
        trace.tops.append(ids.tolist())
        for k in _KS:
            at = min(k, lists.count) - 1
            trace.kth[k].append(float(scores[at]) if len(scores) > at else -math.inf)
    return trace


def calibrate(lists: Lists, queries: npt.NDArray[np.float32], nprobe: int) -> dict[str, Any]:
    """The gaps for each k, nprobe and eps, from every other query, and what they did to the others, as plain values.

    A row's `changed` is the share of the held-out queries whose best k changed, `lists` the share of lists they took.
    Rows are left out where there are too few queries for their eps. `confidence` is what `confidence_of` takes.
    """
    probes = sorted({min(n * nprobe, lists.nlist) for n in _WIDER})
    traces = [_trace(lists, query, probes[-1]) for query in queries]
    seen, held_out = traces[::2], traces[1::2]
    rows: list[dict[str, float]] = []
    for k in _KS:
        for probed in probes:
            gaps = sorted(trace.gap(k, probed) for trace in seen)
            for eps in EPS:
                at = math.ceil((len(gaps) + 1) * (1 - eps))
                if at > len(gaps) or not held_out:
                    continue
                # Rounded up: a larger gap stops later. -2 is below every difference of two cosines.
                gap = math.ceil(max(gaps[at - 1], -2.0) * 1e6) / 1e6
                stops = [trace.stops_after(k, probed, gap) for trace in held_out]
                changed = [t.final_after(k, probed) > stop for t, stop in zip(held_out, stops, strict=True)]
                rows.append(
                    {
                        "k": k,
                        "nprobe": probed,
                        "eps": eps,
                        "gap": gap,
                        "changed": round(float(np.mean(changed)), 4),
                        "lists": round(float(np.mean(stops)) / probed, 4),
                    }
                )
    confidence = fit_confidence(seen, held_out, _KS, probes)
    return {
        "rule": RULE,
        "calibrated_on": len(seen),
        "held_out": len(held_out),
        "rows": rows,
        "confidence": confidence,
    }


def stopping_gap(calibration: Mapping[str, Any], k: int, nprobe: int, eps: float) -> tuple[int, float] | None:
    """The k to search with and the gap to stop at, so that the best k change with probability at most `eps`.

    None where nothing was calibrated that holds for these numbers, so that the search must not stop early: a larger k,
    a larger nprobe, a smaller eps, another rule, or an index without calibration.
    """
    if calibration.get("rule") != RULE:
        return None
    rows: Sequence[Mapping[str, float]] = calibration.get("rows", ())
    fit = [row for row in rows if row["k"] >= k and row["nprobe"] >= nprobe and row["eps"] <= eps]
    if not fit:
        return None
    row = min(fit, key=lambda row: (row["k"], row["nprobe"], -row["eps"]))
    return int(row["k"]), float(row["gap"])
