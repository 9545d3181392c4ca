"""`flowc compile` and `flowc opt`: what becomes of a program, as text, pictures and files."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowc.config import load_config
from flowc.ir.errors import Loc, VerifyError

from .console import emit, emit_json, fail, many, note, table, write_error, write_file
from .targets import load_target

if TYPE_CHECKING:
    from flowc.ir.core import Graph
    from flowc.passes.core import Remark
    from flowc.passes.manager import Compilation

EMITS = ("html", "svg", "dot", "mermaid", "json", "ir")
_SUFFIX = {"html": ".html", "svg": ".svg", "dot": ".dot", "mermaid": ".mmd", "json": ".json"}

Opt = Annotated[
    int | None, typer.Option("-O", "--opt", min=0, max=3, show_default="2", help="Optimisation level.", metavar="0..3")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def compile_(
    target: Annotated[str, typer.Argument(help="file.py:workflow, module:workflow or plan.flow", metavar="TARGET")],
    out: Annotated[Path | None, typer.Option("-o", "--out", help="Folder for the files.", metavar="DIR")] = None,
    emits: Annotated[
        str | None, typer.Option("--emit", help=f"What to write: {','.join(EMITS)}.", show_default="html,json,ir")
    ] = None,
    opt: Opt = None,
    passes: Annotated[
        str | None, typer.Option("-p", "--passes", help="These passes instead of a level's.", metavar="LIST")
    ] = None,
    print_after: Annotated[
        list[str] | None, typer.Option("--print-after", help="Print the IR after this pass (or `all`).", metavar="PASS")
    ] = None,
    print_all: Annotated[bool, typer.Option("--print-after-all", help="Print the IR after every pass.")] = False,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--diff", help="Print how B differs from A: a pass, `captured`, `final`, or O0 to O3.", metavar="A B"
        ),
    ] = None,
    remarks: Annotated[
        bool, typer.Option("--remarks", help="Print what each pass did where, and why not elsewhere.")
    ] = False,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", help="A trace of a run, to be drawn beside the prediction.", metavar="FILE"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile a workflow; print its IR, or write IR, pictures and JSON with -o.

    Without -o, --print-after, --diff and --remarks the compiled IR goes to stdout.
    """
    if print_all:
        print_after = ["all"]
    wanted = _emits(emits)
    if emits is not None and out is None:
        fail("--emit needs a folder to write to", hint="add -o DIR")
    if passes is not None and opt is not None:
        fail("-O and -p exclude each other", hint="a level is a list of passes: `flowc opt` shows it")
    measured = _trace(trace)
    found = load_target(target)
    level = None if passes is not None else found.level(opt, load_config())
    compilation = _run_passes(found.workflow.graph(), level, passes)
    _check_names(print_after or (), [s.pass_name for s in compilation.stages])
    shown = f"-O{level}" if passes is None else f"-p {passes}"
    written = _write(compilation, out, wanted, shown, measured) if out is not None else []
    if as_json:
        emit_json(_summary(compilation, shown, written, remarks))
        return
    for index, stage in enumerate(compilation.stages):
        if print_after and ("all" in print_after or stage.pass_name in print_after):
            emit(f"# {index + 1:02d} {stage.pass_name}{'' if stage.changed else ' (unchanged)'}")
            emit(_text(stage.graph))
    if diff is not None and (changed := _diff(compilation, *diff)):
        emit(changed)
    if remarks:
        print_remarks(compilation.remarks)
    if out is None and not print_after and not remarks and diff is None:
        emit(_text(compilation.graph))
    stages = [path for path in written if Path(path).parent.name == "ir"]
    for path in written:
        if path not in stages:
            note(f"wrote {path}")
    if stages:
        note(f"wrote {Path(stages[0]).parent}, {many(len(stages), 'file')}")
    fired = many(sum(r.fired for r in compilation.remarks), "rewrite")
    before, after = _count(compilation.captured), _count(compilation.graph)
    note(f"{compilation.graph.name} {shown}: {before} -> {after} operations, {fired}, {_predicted(compilation)}")


def opt(
    file: Annotated[str, typer.Argument(help="An IR file, or - for stdin.", metavar="FILE.flow")],
    passes: Annotated[
        str | None, typer.Option("-p", "--passes", help="The passes, in order: cse,dce", metavar="LIST")
    ] = None,
    level: Opt = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Write here instead of to stdout.", metavar="FILE")
    ] = None,
    print_after: Annotated[
        list[str] | None, typer.Option("--print-after", help="Print the IR after this pass (or `all`).", metavar="PASS")
    ] = None,
    remarks: Annotated[bool, typer.Option("--remarks", help="Print the remarks to stderr.")] = False,
    as_json: Json = False,
) -> None:
    """Run passes over an IR file and print what comes out. Without -p and -O: parse, verify and print."""
    from flowc.ir.parser import parse_graph
    from flowc.ir.verifier import verify

    if passes is not None and level is not None:
        fail("-O and -p exclude each other")
    name = "<stdin>" if file == "-" else file
    graph = parse_graph(_read(file), name)
    try:
        verify(graph)
    except VerifyError as error:
        error.loc = error.loc or Loc(name, 0)  # text without locations: at least say which
        raise
    compilation = _run_passes(graph, level, passes if passes is not None or level is not None else "")
    _check_names(print_after or (), [s.pass_name for s in compilation.stages])
    text = _text(compilation.graph)
    if out is not None:
        write_file(out, text)
    if as_json:
        data = _summary(compilation, "", [str(out)] if out else [], remarks)
        emit_json(data | ({} if out else {"ir": text}))
        return
    for index, stage in enumerate(compilation.stages):
        if print_after and ("all" in print_after or stage.pass_name in print_after):
            emit(f"# {index + 1:02d} {stage.pass_name}{'' if stage.changed else ' (unchanged)'}")
            emit(_text(stage.graph))
    if remarks:
        print_remarks(compilation.remarks, to_stderr=True)
    if out is None and not print_after:
        emit(text)


def _emits(text: str | None) -> list[str]:
    if text is None:
        return ["html", "json", "ir"]
    wanted = [part.strip() for part in text.split(",") if part.strip()]
    for part in wanted:
        if part not in EMITS:
            import difflib

            close = difflib.get_close_matches(part, EMITS, n=1)
            fail(
                f"`{part}` cannot be emitted",
                hint=f"did you mean `{close[0]}`?" if close else f"one of {', '.join(EMITS)}",
            )
    return list(dict.fromkeys(wanted)) or fail("--emit names nothing", hint=f"one of {', '.join(EMITS)}")


def _check_names(wanted: Sequence[str], names: Sequence[str]) -> None:
    for name in wanted:
        if name != "all" and name not in names:
            shown = ", ".join(dict.fromkeys(names)) or "none"
            fail(f"no pass `{name}` runs here", hint=f"the passes are {shown}; or `all`")


def _run_passes(graph: Graph, level: int | None, passes: str | None) -> Compilation:
    """The compilation at a level or, without one, by the named passes; the graph is verified after each."""
    from flowc.passes.manager import PassManager, parse_pipeline, pipeline

    chosen = parse_pipeline(passes or "") if level is None else pipeline(level)
    return PassManager(chosen, verify_each=True, level=level).run(graph)


def _diff(c: Compilation, a: str, b: str) -> str:
    """The unified difference between the IR at two points; empty if there is none."""
    import difflib

    old, new = (_text(_at(c, name)).splitlines(keepends=True) for name in (a, b))
    return "".join(difflib.unified_diff(old, new, fromfile=a, tofile=b))


def _at(c: Compilation, name: str) -> Graph:
    """The workflow as captured, after a pass (its last run), at the end, or at a level."""
    stages = {"captured": c.captured, **{s.pass_name: s.graph for s in c.stages}, "final": c.graph}
    if name in stages:
        return stages[name]
    if name in ("O0", "O1", "O2", "O3"):
        return _run_passes(c.captured, int(name[1]), None).graph
    return fail(f"there is no point `{name}` to compare", hint=f"one of {', '.join(stages)}, or O0 to O3")


def _read(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror or error}")
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        fail(f"{file} is not UTF-8 (line {line})", hint="an IR file is text")


def _trace(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        data = json.loads(_read(str(path)))
    except ValueError as error:
        fail(f"{path} is not JSON: {error}", hint="a trace is what `flowc run --trace FILE` writes")
    if isinstance(data, list):
        data = {"traceEvents": data}
    if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
        fail(f"{path} is no trace: it has no `traceEvents`", hint="a trace is what `flowc run --trace FILE` writes")
    return data


def _text(graph: Graph) -> str:
    from flowc.ir.printer import print_graph

    text = print_graph(graph)
    return text if text.endswith("\n") else text + "\n"


def _count(graph: Graph) -> int:
    from flowc.passes.facts import count_ops

    return count_ops(graph.body)


def _predicted(c: Compilation) -> str:
    from flowc.passes.facts import predicted_s
    from flowc.passes.gain import show_s

    return f"{show_s(predicted_s(c.captured, c.costs))} -> {show_s(predicted_s(c.graph, c.costs))} predicted"


def remark_to_json(r: Remark) -> dict[str, Any]:
    """A remark as JSON has it."""
    return {
        "pass": r.pass_name,
        "op": r.op,
        "place": str(r.loc) if r.loc is not None else None,
        "fired": r.fired,
        "legal": r.verdict.is_legal,
        "why": r.verdict.why,
        "gain_s": round(r.gain_s, 9),
        "detail": r.detail,
    }


def print_remarks(remarks: Sequence[Remark], *, to_stderr: bool = False) -> None:
    """The remarks as a table."""
    rows = [
        (
            r.pass_name,
            "yes" if r.fired else "no",
            r.op,
            str(r.loc or ""),
            "; ".join(filter(None, (r.verdict.why, r.detail))),
        )
        for r in remarks
    ]
    table(rows, ("pass", "fired", "operation", "place", "why"), stream=sys.stderr if to_stderr else None)


def _summary(c: Compilation, level: str, written: Sequence[str], remarks: bool) -> dict[str, Any]:
    from flowc.passes.facts import predicted_s
    from flowc.pictures.json import plan_hash

    data: dict[str, Any] = {
        "name": c.graph.name,
        "level": level,
        "hash": plan_hash(c.graph),
        "operations": {"captured": _count(c.captured), "compiled": _count(c.graph)},
        "predicted_s": {"captured": predicted_s(c.captured, c.costs), "compiled": predicted_s(c.graph, c.costs)},
        "passes": [{"name": s.pass_name, "changed": s.changed, "seconds": s.seconds} for s in c.stages],
        "files": list(written),
    }
    if remarks:
        data["remarks"] = [remark_to_json(r) for r in c.remarks]
    return data


def _write(c: Compilation, out: Path, wanted: Sequence[str], level: str, trace: Any) -> list[str]:
    """Writes what is wanted; the paths."""
    from flowc.pictures import html, mermaid, svg
    from flowc.pictures import json as plan_json
    from flowc.pictures.dot import to_dot

    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(out, error) from error
    name = "".join(ch if ch.isalnum() or ch in "._-" else "_" for ch in c.graph.name)
    written = []
    for kind in wanted:
        if kind == "ir":
            written += _write_stages(c, out / "ir")
            continue
        path = out / f"{name}{_SUFFIX[kind]}"
        match kind:
            case "html":
                text = html.page_of(c, level=level, trace=trace)
            case "svg":
                text, engine = svg.to_svg(c.graph)
                note(f"the SVG was laid out by {engine}")
            case "dot":
                text = to_dot(c.graph)
            case "mermaid":
                text = mermaid.to_mermaid(c.graph)
            case _:
                text = plan_json.plan_to_json(
                    c.graph,
                    captured=c.captured,
                    passes=[{"name": s.pass_name, "changed": s.changed} for s in c.stages],
                    remarks=[remark_to_json(r) for r in c.remarks],
                    rates=c.costs.rates,
                )
        write_file(path, text)
        written.append(str(path))
    return written


def _write_stages(c: Compilation, folder: Path) -> list[str]:
    """One file per stage, `NN-pass.flow`, and `passes.json` about them. Files of an earlier compilation are removed."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        for row in json.loads((folder / "passes.json").read_bytes()):
            (folder / Path(row["file"]).name).unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    stages = [("captured", c.captured, True, 0.0), *((s.pass_name, s.graph, s.changed, s.seconds) for s in c.stages)]
    written = []
    before = _count(c.captured)
    for number, (name, graph, changed, seconds) in enumerate(stages):
        path = folder / f"{number:02d}-{name}.flow"
        write_file(path, _text(graph))
        after = _count(graph)
        mine = [remark_to_json(r) for r in c.remarks if r.pass_name == name]
        rows.append(
            {
                "file": path.name,
                "pass": name,
                "changed": changed,
                "seconds": seconds,
                "operations": [before, after],
                "remarks": mine,
            }
        )
        before = after
        written.append(str(path))
    write_file(folder / "passes.json", json.dumps(rows, indent=1) + "\n")
    return [*written, str(folder / "passes.json")]
