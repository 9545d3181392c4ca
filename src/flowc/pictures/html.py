"""One HTML page with everything known about a compilation: graph before and after, passes, timeline, remarks. It is
one file, fetches nothing, and works from a folder.

Whoever wrote the prompts does not write this page. Their text is in a JSON block whose `<`, `>` and `&` are escaped,
and reaches the document through `textContent` alone; the content security policy allows the page's own style and
script by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import difflib
import hashlib
import json
import linecache
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

from flowc.ir.core import Graph, Op, walk
from flowc.ir.ops import OPS, Rates, effect_of
from flowc.ir.printer import print_graph, print_literal, print_op
from flowc.passes.core import Remark, describe, plural
from flowc.passes.cost import CostModel
from flowc.passes.facts import count_ops, predicted_s
from flowc.passes.manager import PASSES, Compilation, Stage

from .json import plan_hash
from .layout import lay_out
from .model import LANES, Drawing, draw, item_ids
from .svg import COLOURS, WAVES, render
from .timeline import Timeline, predict

__all__ = ["page_of", "to_html"]

_MOST_TEXT = 6000  # characters of one operation's text in the side panel
_MOST_LINES = 600  # source lines shown of one file
_MOST_DIFF = 1500  # rows of one pass's difference
_MOST_SLICES = 2000  # of a trace
_CONTEXT = 3


def page_of(compilation: Compilation, *, level: str = "", trace: Mapping[str, Any] | None = None) -> str:
    """The page of a compilation: `to_html` with everything that it knows."""
    return to_html(
        compilation.graph,
        captured=compilation.captured,
        stages=compilation.stages,
        remarks=compilation.remarks,
        level=level or (f"-O{compilation.level}" if compilation.level is not None else ""),
        rates=compilation.costs.rates,
        trace=trace,
    )


def to_html(
    graph: Graph,
    *,
    captured: Graph | None = None,
    stages: Sequence[Stage] = (),
    remarks: Iterable[Remark] = (),
    level: str = "",
    rates: Rates | None = None,
    trace: Mapping[str, Any] | None = None,
) -> str:
    """The page of one compilation, as text.

    `captured` is the graph before, `level` what the compilation is called (`-O2`), `trace` a Chrome trace of a run,
    whose slices are drawn beside the predicted ones.
    """
    costs = CostModel(rates or {})
    sides = [("before", captured), ("after", graph)] if captured is not None else [("after", graph)]
    drawings = {side: draw(g, prefix=side[0]) for side, g in sides}
    said = [_remark(r) for r in remarks]
    ops: dict[str, Any] = {}
    for side, g in sides:
        ops.update(_ops(g, side, drawings[side], costs, said))
    for i, remark in enumerate(said):
        remark["ids"] = [key for key, op in ops.items() if i in op["remarks"]]
    timelines: dict[str, Any] = {
        side: _timeline(predict(g, prefix=side[0], rates=rates), predicted_s(g, costs)) for side, g in sides
    }
    if trace is not None:
        timelines["measured"] = _measured(trace)
    data = {
        "name": graph.name,
        "level": level,
        "lanes": [lane for lane in LANES if any(lane in d.lanes for d in drawings.values())],
        "waves": list(drawings["after"].waves),
        "palette": len(WAVES),
        "ops": ops,
        "sources": _sources(g for _, g in sides),
        "passes": _passes(captured, stages),
        "remarks": said,
        "timeline": timelines,
        "assumed": f"{costs['foreach_items']:g} items in each loop over a list, up to {costs['while_trips']:g} turns "
        "of each while, every lane free",
    }
    style = _resource("page.css") + _colours()
    script = _resource("page.js")
    panes = "".join(_pane(side, drawings[side], g, level) for side, g in sides)
    policy = f"default-src 'none'; style-src '{_sha(style)}'; script-src '{_sha(script)}'"
    parts = {
        "policy": f"{policy}; base-uri 'none'; form-action 'none'",
        "title": escape(f"{graph.name}: flowc plan"),
        "name": escape(graph.name),
        "level": f'<span class="chip">{escape(level)}</span>' if level else "",
        "hash": plan_hash(graph).removeprefix("sha256:")[:12],
        "full_hash": plan_hash(graph),
        "style": style,
        "script": script,
        "panes": panes,
        "one": "" if len(sides) == 2 else " one",
        "show": _SHOW if len(sides) == 2 else "",
        "data": _safe_json(data),
    }
    # One pass over the template: what is put in is never looked at again.
    return re.sub(r"@(\w+)@", lambda slot: parts[slot[1]], _resource("page.html"))


def _resource(name: str) -> str:
    return files("flowc.pictures").joinpath(name).read_text("utf-8")


def _safe_json(data: object) -> str:
    """JSON that may stand inside `<script>`: ASCII, and none of the characters that could end the element or start
    another.
    """
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _sha(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _colours() -> str:
    """Rules for lanes and wavefronts, from the tables that the other pictures use."""
    out = [":root{" + "".join(f"--{lane}:{light};" for lane, (light, _) in COLOURS.items()) + "}"]
    out.append(":root.dark{" + "".join(f"--{lane}:{dark};" for lane, (_, dark) in COLOURS.items()) + "}")
    out += [
        f".l-{lane}{{fill:var(--{lane})}}.bg-{lane}{{background:var(--{lane})}}"
        f".lane-{lane}>.card{{fill:color-mix(in srgb,var(--{lane}) 7%,var(--card))}}"
        for lane in COLOURS
    ]
    out.append(".l-none{fill:var(--line2)}.c-before{fill:var(--faint)}.c-after{fill:var(--accent)}")
    out.append(".by-wave .node>.card{fill:var(--card)}.by-wave .stripe{fill:var(--line2)}")
    for i, colour in enumerate(WAVES):
        out.append(
            f".f-w{i}{{fill:{colour}}}"
            f".by-wave .w{i}>.card{{fill:color-mix(in srgb,{colour} 20%,var(--card));stroke:{colour}}}"
            f".by-wave .w{i}>.stripe,.by-wave .w{i}>.badge circle{{fill:{colour}}}"
        )
    return "\n".join(out) + "\n"


def _pane(side: str, drawing: Drawing, graph: Graph, level: str) -> str:
    layout = lay_out(drawing)
    count = count_ops(graph.body)
    name = "As captured" if side == "before" else f"After {level}" if level else "Graph"
    return (
        f'<div class="pane" id="pane-{side}">'
        f'<svg data-w="{layout.width:.0f}" data-h="{layout.height:.0f}" role="group" aria-label="{escape(name)}">'
        f'<g class="world">{render(layout, marker="tip-" + side, interactive=True)}</g></svg>'
        f'<div class="caption"><b>{escape(name)}</b><span>{plural(count, "operation")}</span></div></div>'
    )


# -- what the script shows


def _remark(r: Remark) -> dict[str, Any]:
    return {
        "pass": r.pass_name,
        "op": r.op,
        "at": f"{r.loc.file.rsplit('/', 1)[-1]}:{r.loc.line}" if r.loc is not None and r.loc.line else "",
        "where": [r.loc.file, r.loc.line, r.loc.col] if r.loc is not None else None,
        "fired": bool(r.fired),
        "verdict": r.verdict.why,
        "detail": r.detail,
        "gain_s": round(r.gain_s, 9) if r.gain_s else 0,
    }


def _ops(
    graph: Graph, side: str, drawing: Drawing, costs: CostModel, remarks: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Item id -> what the side panel says, for each operation that is drawn."""
    ids = item_ids(graph.body, side[0])
    drawn = {item.id for item in drawing.items()}
    constants = {op.results[0].name: op for op in walk(graph.body) if op.name == "const"}
    out = {}
    for op in walk(graph.body):
        key = ids[id(op)]
        if key not in drawn:
            continue
        spec = OPS.get(op.name)
        loc = op.loc
        text = print_op(op)
        line = linecache.getline(loc.file, loc.line).strip() if loc is not None and loc.line else ""
        names = {describe(op), *(str(v) for v in op.results)}
        out[key] = {
            "side": side,
            "name": op.name,
            "doc": spec.doc if spec else "",
            "lane": spec.lane if spec else "python",
            "boxed": bool(op.regions),
            "text": text
            if len(text) <= _MOST_TEXT
            else text[:_MOST_TEXT] + f"\n... {len(text) - _MOST_TEXT} more characters",
            "attrs": [
                [k, print_literal(v)[:_MOST_TEXT]]
                for k, v in op.attrs.items()
                if k not in ("wave", "batch", "kw", "params")
            ],
            "consts": [
                [v.name, print_literal(constants[v.name].attr("value"))[:400]]
                for v in dict.fromkeys(op.operands)
                if v.name in constants
            ],
            "wave": op.attr("wave"),
            "batch": op.attr("batch"),
            "effect": _effect(op),
            "cost_s": None if op.regions else costs.own_s(op),
            "loc": [loc.file, loc.line, loc.col] if loc is not None and loc.line else None,
            "line": line or None,
            "remarks": [
                i
                for i, r in enumerate(remarks)
                if r["where"] is not None
                and loc is not None
                and r["where"][:2] == [loc.file, loc.line]
                and _is_about(r["op"], names)
            ],
        }
    return out


def _is_about(described: str, names: set[str]) -> bool:
    """Does a remark's `%a, %b = if`, or `inside %a = if`, mean the operation of these names?"""
    described = described.removeprefix("inside ")
    return described in names or not names.isdisjoint(described.split(" = ")[0].split(", "))


def _effect(op: Op) -> str:
    effect = effect_of(op)
    parts = [f"reads {', '.join(sorted(effect.reads))}"] if effect.reads else []
    if effect.writes:
        parts.append(f"writes {', '.join(sorted(effect.writes))}")
    if effect.is_sampled:
        parts.append("sampled")
    if not parts:
        parts.append("pure")
    if effect.may_raise:
        parts.append("may raise")
    return ", ".join(parts)


def _sources(graphs: Iterable[Graph]) -> list[dict[str, Any]]:
    """The source lines that operations come from, file by file; of a workflow's own file the whole function."""
    spans: dict[str, tuple[int, int]] = {}
    for graph in graphs:
        for loc in [graph.loc, *(op.loc for op in walk(graph.body))]:
            if loc is not None and loc.line:
                low, high = spans.get(loc.file, (loc.line, loc.line))
                spans[loc.file] = (min(low, loc.line), max(high, loc.line))
    out = []
    for file, (low, high) in spans.items():
        lines = linecache.getlines(file)
        if not lines or low > len(lines):
            continue
        while low > 1 and lines[low - 2].lstrip().startswith("@"):
            low -= 1  # decorators
        indent = _indent(lines[low - 1])
        while high < len(lines) and lines[high].strip() and _indent(lines[high]) > indent:
            high += 1  # the rest of the function: a `return`, say
        high = min(high, len(lines), low + _MOST_LINES)
        out.append({"file": file, "first": low, "lines": [text.rstrip("\n") for text in lines[low - 1 : high]]})
    return out


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _timeline(t: Timeline, expected_s: float) -> dict[str, Any]:
    return {
        "expected": expected_s,
        "makespan": t.makespan_s,
        "bars": [[b.item, b.title, b.lane, round(b.start_s, 7), round(b.end_s, 7)] for b in t.bars],
    }


def _measured(trace: Mapping[str, Any]) -> dict[str, Any]:
    """What a Chrome trace shows of its lanes, in the form of a timeline; times from the first slice.

    Batches come as complete slices on a thread named after their lane; what runs in no batch, a tool say, as a pair of
    asynchronous events that name it.
    """
    events = [e for e in trace.get("traceEvents", ()) if isinstance(e, dict)]
    threads = {
        (e.get("pid"), e.get("tid")): str(e.get("args", {}).get("name", ""))
        for e in events
        if e.get("ph") == "M" and e.get("name") == "thread_name"
    }
    spans: list[tuple[float, float, str, str]] = []
    began: dict[Any, dict[str, Any]] = {}
    for e in events:
        match e.get("ph"):
            case "X" if e.get("cat") != "program":
                lane = threads.get((e.get("pid"), e.get("tid"))) or str(e.get("cat") or "python")
                start = float(e.get("ts", 0))
                spans.append((start, start + float(e.get("dur", 0)), lane, str(e.get("name", ""))))
            case "b":
                began[e.get("id")] = e
            case "e" if (first := began.pop(e.get("id"), None)) is not None:
                lane = str(first.get("args", {}).get("lane") or "python")
                if lane not in threads.values():
                    spans.append((float(first.get("ts", 0)), float(e.get("ts", 0)), lane, str(first.get("name", ""))))
            case _:
                pass
    spans = sorted(spans)[:_MOST_SLICES]
    zero = spans[0][0] if spans else 0.0
    return {
        "makespan": max((end - zero for _, end, _, _ in spans), default=0.0) / 1e6,
        "bars": [["", name, _lane(lane), (a - zero) / 1e6, (b - zero) / 1e6] for a, b, lane, name in spans],
    }


def _lane(name: str) -> str:
    """`llm` for `llm @default`."""
    head = re.split(r"\W", name, maxsplit=1)[0]
    return head if head in LANES else name


def _passes(captured: Graph | None, stages: Sequence[Stage]) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    before = captured
    text = print_graph(captured, locs=False).splitlines() if captured is not None else []
    for i, stage in enumerate(stages):
        now = print_graph(stage.graph, locs=False).splitlines() if stage.changed or before is None else text
        rows = _diff(text, now) if stage.changed and before is not None else []
        note = ""
        if len(rows) > _MOST_DIFF:
            rows, note = [], f"{len(rows)} lines differ, too many to show here. `--emit ir` writes both texts."
        elif stage.changed and not rows:
            note = "Only places in the source changed."
        out.append(
            {
                "index": i,
                "name": stage.pass_name,
                "doc": _first_line(PASSES.get(stage.pass_name)),
                "changed": stage.changed,
                "seconds": stage.seconds,
                "before": count_ops(before.body) if before is not None else 0,
                "after": count_ops(stage.graph.body),
                "diff": rows,
                "note": note,
            }
        )
        before, text = stage.graph, now
    return out


def _first_line(rewrite: object) -> str:
    """What a pass says of itself, in a sentence: the first paragraph of its class or of its file."""
    text = getattr(rewrite, "__doc__", None) or ""
    if not text or text.startswith(f"{getattr(rewrite, '__name__', '')}("):  # what `dataclass` writes
        text = getattr(sys.modules.get(getattr(rewrite, "__module__", "")), "__doc__", None) or ""
    return " ".join(text.strip().split("\n\n")[0].split())


def _diff(old: list[str], new: list[str]) -> list[list[Any]]:
    """Rows of `[number, old line, number, new line]` (None where a side has none), or `[n]` for n equal lines left
    out.
    """
    rows: list[list[Any]] = []
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=len(old) > 2000)
    blocks = matcher.get_opcodes()
    if all(tag == "equal" for tag, *_ in blocks):
        return []
    for n, (tag, a0, a1, b0, b1) in enumerate(blocks):
        if tag == "equal":
            head = 0 if n == 0 else _CONTEXT
            tail = 0 if n == len(blocks) - 1 else _CONTEXT
            skipped = a1 - a0 - head - tail
            for k in range(a1 - a0):
                if skipped <= 1 or k < head or k >= a1 - a0 - tail:
                    rows.append([a0 + k + 1, old[a0 + k], b0 + k + 1, new[b0 + k]])
                elif k == head:
                    rows.append([skipped])
        else:
            for k in range(max(a1 - a0, b1 - b0)):
                left = [a0 + k + 1, old[a0 + k]] if a0 + k < a1 else [None, None]
                right = [b0 + k + 1, new[b0 + k]] if b0 + k < b1 else [None, None]
                rows.append([*left, *right])
    return rows


_SHOW = """<div class="bar show" role="group" aria-label="which graph">
<button data-show="before" aria-pressed="false">Captured</button>
<button data-show="both" aria-pressed="true">Both</button>
<button data-show="after" aria-pressed="false">Compiled</button></div>"""
