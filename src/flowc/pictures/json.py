"""A plan as JSON for other programs: versioned, keys in a fixed order, the same bytes for the same plan on every
machine.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flowc.ir.core import Graph, Op, Region, Value
from flowc.ir.ops import DEFAULT_RATES, OPS, Rates, effect_of

__all__ = ["FORMAT", "VERSION", "graph_to_json", "plan_hash", "plan_to_json"]

FORMAT, VERSION = "flowc.plan", 1
"""`VERSION` goes up when a reader of the old form would misread the new one; added keys do not count."""


def plan_hash(graph: Graph) -> str:
    """`sha256:` and the hash of what the graph computes: places in source files do not count, so moving a file changes
    nothing.
    """
    text = json.dumps(_graph(graph, None), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def graph_to_json(graph: Graph, *, rates: Rates = DEFAULT_RATES) -> dict[str, Any]:
    """A graph as a JSON object: parameters, result, regions with their operations, and the workflows that it calls."""
    return _graph(graph, rates)


def plan_to_json(
    graph: Graph,
    *,
    captured: Graph | None = None,
    passes: Iterable[Mapping[str, Any]] = (),
    remarks: Iterable[Mapping[str, Any]] = (),
    rates: Rates = DEFAULT_RATES,
) -> str:
    """The whole plan as JSON text. Times of passes are left out: they differ from run to run."""
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "hash": plan_hash(graph),
        "name": graph.name,
        "graph": _graph(graph, rates),
    }
    if captured is not None:
        data["captured"] = _graph(captured, rates)
    data["passes"] = list(passes)
    data["remarks"] = list(remarks)
    return json.dumps(data, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def _graph(graph: Graph, rates: Rates | None) -> dict[str, Any]:
    data: dict[str, Any] = {"name": graph.name, "scope": graph.scope, "body": _region(graph.body, rates)}
    if rates is not None and graph.loc is not None:
        data["loc"] = {"file": graph.loc.file, "line": graph.loc.line}
    data["callees"] = [_graph(callee, rates) for callee in graph.callees]
    return data


def _region(region: Region, rates: Rates | None) -> dict[str, Any]:
    return {
        "ordered": region.ordered,
        "params": [_value(v) for v in region.params],
        "ops": [_op(op, rates) for op in region.ops],
        "yields": [v.name for v in region.yields],
    }


def _value(value: Value) -> dict[str, str]:
    return {"name": value.name, "type": str(value.type)}


def _op(op: Op, rates: Rates | None) -> dict[str, Any]:
    """Without `rates` only what the operation computes; with them also what is known about it."""
    data: dict[str, Any] = {
        "op": op.name,
        "operands": [v.name for v in op.operands],
        "results": [_value(v) for v in op.results],
        "attrs": {key: encode(op.attrs[key]) for key in sorted(op.attrs)},
        "regions": [_region(r, rates) for r in op.regions],
    }
    if rates is None:
        return data
    spec = OPS.get(op.name)
    if spec is not None:
        effect = effect_of(op)
        data["lane"] = spec.lane
        data["cost_s"] = round(spec.cost_s(op, rates), 9)
        data["effect"] = {
            "reads": sorted(effect.reads),
            "writes": sorted(effect.writes),
            "may_raise": effect.may_raise,
            "is_sampled": effect.is_sampled,
        }
    if op.loc is not None:
        data["loc"] = {"file": op.loc.file, "line": op.loc.line, "col": op.loc.col, "end_col": op.loc.end_col}
    return data


def encode(value: object) -> Any:
    """An attribute as JSON. What JSON lacks is an object with one key: `{"bytes": base64}`, `{"float": "nan"}`."""
    if isinstance(value, tuple | list):
        return [encode(item) for item in value]
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return {"repr": repr(value)}
