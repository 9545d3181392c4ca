"""Move to the device the clusters that a search will probe, while the model still writes its query.

Before:
    workflow @w(%q: text) -> docs {
      %prompt = template "Write a passage that answers: {}" (%q) : text
      %hypo = generate @llm (%prompt) {max_tokens = 64} : text
      %docs = search @pydocs (%hypo) {k = 4} : docs
      return %docs
    }
After:
    workflow @w(%q: text) -> docs {
      cluster.prefetch @pydocs (%q) {site = 1, window = 1.216}
      %prompt = template "Write a passage that answers: {}" (%q) : text
      %hypo = generate @llm (%prompt) {max_tokens = 64, lookahead = ("pydocs#1",)} : text
      %docs = search @pydocs (%hypo) {k = 4, site = 1} : docs
      return %docs
    }
Rates: h2d_bytes_per_s=5e10, probe_bytes=4e8, device_scan_bytes_per_s=2e12.

The proxy of the query is the text in the prompt of the generation that writes it which is known earliest; as the model
writes, the runtime predicts again from what there is.

Source: Lin et al., "TeleRAG: Efficient Retrieval-Augmented Generation Inference with Lookahead Retrieval", MLSys 2026,
there with a table of budgets: here bytes are what the window and the bandwidth allow. Predicting again is ours.
Legal when: always: it only moves data; what is scanned is what is probed.
Pays when: the machine has a device with a transfer rate, and scanning there what can be moved in the window is faster
than scanning it here, by more than a turn on the lane.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from flowc.ir.core import Attrs, Graph, Op, Region, Value
from flowc.ir.types import TEXT

from .core import Additions, Estimate, Outcome, Pass, Remark, Verdict, describe, next_site
from .cost import CostModel
from .facts import Facts, texts
from .prompts import Slot, parts_of
from .slices import makers_of, slice_of

_ALWAYS = Verdict(True, "it only moves data")


@dataclass(frozen=True, slots=True)
class _Wait:
    """A search whose query `writer` writes. `proxy` is known before the op `before`, `window_s` before the search."""

    search: Op
    writer: Op
    proxy: Value
    before: Op
    window_s: float


@dataclass(frozen=True, slots=True)
class Lookahead(Pass):
    name: ClassVar[str] = "lookahead"
    on_trial: ClassVar[bool] = True

    def run(self, graph: Graph, costs: CostModel) -> Outcome:
        facts = Facts(graph, costs)
        added = Additions()
        remarks: list[Remark] = []
        site = next_site(graph)
        for wait in _waits(graph.body, facts):
            estimate = self.profit(wait, costs)
            fired = estimate.pays
            if fired:
                index = str(wait.search.attrs["resource"])
                known = Attrs({"resource": index, "site": site, "window": round(wait.window_s, 3)})
                prefetch = Op("cluster.prefetch", (wait.proxy,), (), known, loc=wait.search.loc)
                added.before.setdefault(id(wait.before), []).append(prefetch)
                added.attrs[id(wait.search)] = {"site": site}
                told = added.attrs.setdefault(id(wait.writer), {"lookahead": texts(wait.writer.attrs.get("lookahead"))})
                told["lookahead"] = (*texts(told["lookahead"]), f"{index}#{site}")
                site += 1
            op, loc = describe(wait.search), wait.search.loc
            remarks.append(self.remark(op, loc, _ALWAYS, fired=fired, gain_s=estimate.gain_s, detail=estimate.why))
        body = added.apply(graph.body)
        return Outcome(graph if body is graph.body else graph.with_body(body), tuple(remarks))

    def profit(self, wait: _Wait, costs: CostModel) -> Estimate:
        rates = costs.of(wait.search)
        if not (rates["h2d_bytes_per_s"] and rates["device_scan_bytes_per_s"] and rates["probe_bytes"]):
            return Estimate(0.0, "no device holds clusters of this index")
        moved = min(rates["probe_bytes"], rates["h2d_bytes_per_s"] * wait.window_s)
        saved = moved / rates["scan_bytes_per_s"] - moved / rates["device_scan_bytes_per_s"]
        if saved <= rates["substage_s"]:
            return Estimate(0.0, "scanning there what can be moved in time is no faster")
        return Estimate(saved, f"{moved / 1e6:.3g} MB in {wait.window_s * 1e3:.3g} ms")


def _waits(region: Region, facts: Facts) -> Iterator[_Wait]:
    """The searches whose query the model writes in this region, or in one of it, and that have no site yet."""
    made = makers_of(region)
    writers = {op.result.name: op for op in region.ops if op.name == "generate"}
    each = [op for op in region.ops if op.name == "llm.each"]
    if writers or each:
        times = facts.schedule(region)
        for op, (begins_s, _) in zip(region.ops, times, strict=True):
            if _is_open(op):
                written = [v.name for v in _sources(op, region, made, facts, writers) if v.name in writers]
                if written:
                    last = max(written, key=lambda name: times[made[name]][1])
                    yield _wait(op, writers[last], begins_s, region, made, times, facts)
        for op in each:
            (body,) = op.regions
            made_there = makers_of(body)
            for inner in body.ops:
                if _is_open(inner) and body.params[0] in _sources(inner, body, made_there, facts, ()):
                    yield _wait(inner, op, times[made[op.results[0].name]][1], region, made, times, facts)
    for op in region.ops:
        for inner_region in op.regions if op.name != "fused" else ():
            yield from _waits(inner_region, facts)


def _is_open(op: Op) -> bool:
    return op.name in ("search", "ivf.begin") and "site" not in op.attrs


def _sources(
    op: Op, region: Region, made: Mapping[str, int], facts: Facts, stops: Collection[str]
) -> tuple[Value, ...]:
    found = slice_of(op, region, made, facts, stops=stops)
    return found.sources if found is not None else op.operands


def _wait(
    search: Op,
    writer: Op,
    begins_s: float,
    region: Region,
    made: dict[str, int],
    times: list[tuple[float, float]],
    facts: Facts,
) -> _Wait:
    def ready_s(value: Value) -> float:
        return times[made[value.name]][1] if value.name in made else 0.0

    slots = [p.value for p in parts_of(writer.operands[0], facts) if isinstance(p, Slot) and p.value.type == TEXT]
    proxy = min(slots, key=ready_s, default=writer.operands[0])
    before = region.ops[made.get(proxy.name, -1) + 1]
    return _Wait(search, writer, proxy, before, begins_s - ready_s(proxy))
