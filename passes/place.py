"""Say where each search runs: on the processor, on the device, or on both.

Before:
    workflow @w(%q: text) -> docs {
      %docs = search @pydocs (%q) {k = 4} : docs
      return %docs
    }
After:
    workflow @w(%q: text) -> docs {
      %docs = search @pydocs (%q) {k = 4, place = "cpu"} : docs
      return %docs
    }

The device's memory goes to the indexes that save most for a byte of it. An index that does not fit is searched on
both: its clusters on the device there, the others here. A model runs where it was loaded; there is nothing to choose.

Source: Lin et al., "SuperScaler", 2023, scheduling in space as a phase of its own; Jiang et al., "RAGO", ISCA 2025,
placement under a memory budget; hybrid search as in TeleRAG and HedraRAG.
Legal when: always: the same clusters are scanned and results merged by (score, id), wherever.
Pays when: the predicted scan is shorter than on the processor; with no device, or where it is no faster, the place is
`cpu`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Final

from flowc.ir.core import Graph, Op, walk
from flowc.ir.ops import Rates

from .core import Outcome, Pass, Remark, Verdict, describe, map_ops
from .cost import CostModel

_SEARCHES: Final = frozenset({"search", "ahead.search", "ivf.begin", "ivf.scan", "ivf.finish"})
_ALWAYS = Verdict(True, "the same clusters are scanned, wherever")


@dataclass(frozen=True, slots=True)
class Place(Pass):
    name: ClassVar[str] = "place"

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        searches = [op for op in walk(graph.body) if op.name in _SEARCHES]
        places = _places(searches, costs)
        remarks: list[Remark] = []

        def placed(op: Op) -> Op:
            if op.name not in _SEARCHES:
                return op
            place, saved_s = places[str(op.attrs["resource"])]
            fired = op.attrs.get("place") != place
            remarks.append(
                self.remark(describe(op), op.loc, _ALWAYS, fired=fired, gain_s=saved_s, detail=f"runs on {place}")
            )
            return op.with_attrs(place=place) if fired else op

        body = map_ops(graph.body, placed)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))


def _places(searches: list[Op], costs: CostModel) -> dict[str, tuple[str, float]]:
    """Index -> where it is searched, and the seconds that a search saves by it."""
    asked = Counter(str(op.attrs["resource"]) for op in searches)
    rates = {str(op.attrs["resource"]): costs.of(op) for op in searches}
    left = max((r["device_bytes"] for r in rates.values()), default=0.0)
    found: dict[str, tuple[str, float]] = {}

    def worth(index: str) -> float:
        r = rates[index]
        return asked[index] * _saved_s(r, 1.0) / r["index_bytes"] if r["index_bytes"] else 0.0

    for index in sorted(rates, key=worth, reverse=True):
        r = rates[index]
        share = min(1.0, left / r["index_bytes"]) if r["index_bytes"] else 0.0
        saved_s = _saved_s(r, share)
        if saved_s > 0:
            left -= share * r["index_bytes"]
            found[index] = ("gpu" if share == 1.0 else "hybrid", saved_s)
        else:
            found[index] = ("cpu", 0.0)
    return found


def _saved_s(rates: Rates, share: float) -> float:
    """The seconds that a search saves with this share of the index on the device, both sides scanning at once."""
    if not rates["device_scan_bytes_per_s"]:
        return 0.0
    probed = rates["probe_bytes"]
    here, there = (1 - share) * probed / rates["scan_bytes_per_s"], share * probed / rates["device_scan_bytes_per_s"]
    return probed / rates["scan_bytes_per_s"] - max(here, there)
