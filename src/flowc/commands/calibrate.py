"""`flowc calibrate` and `flowc estimate`: what things take on this machine, and what a run will take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .console import Failed, emit, emit_json, fail, note, show_error, table
from .targets import load_target

if TYPE_CHECKING:
    from flowc.passes.estimate import Forecast

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]


def calibrate(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Only these: llm.NAME, index.NAME. Default: everything configured.", metavar="[NAME]..."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Where the rates go.", show_default=".flowc/calibration.json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure this machine, its models and indexes, for the cost model. Every later compilation uses it.

    Takes some seconds for each; nothing else should run meanwhile.
    """
    from flowc.calibrate import Measured, save
    from flowc.calibrate import calibrate as measure
    from flowc.engine import default_engine
    from flowc.ir.errors import FlowcError
    from flowc.passes.gain import show_s

    engine = default_engine()
    path = out if out is not None else engine.config.calibration_path
    wanted = frozenset(names or ())
    known = {f"llm.{n}" for n in (engine.config.llm or ("default",))} | {f"index.{n}" for n in engine.config.index}
    for name in sorted(wanted - known):
        fail(f"nothing is configured as `{name}`", hint=f"there is {', '.join(sorted(known))}")
    found: list[Measured] = []
    errors: list[FlowcError] = []
    for one in measure(engine, wanted):
        if isinstance(one, FlowcError):
            errors.append(one)
            show_error(one)
        else:
            found.append(one)
            if not as_json:
                shown = f"{one.seconds:,.0f}" if "bytes" in one.rate else show_s(one.seconds)
                note(f"{one.of}: {one.rate} {shown}, spread {one.spread:.0%}")
    if found:
        save(path, found)
    if as_json:
        rows = [{"of": m.of, "rate": m.rate, "seconds": m.seconds, "spread": m.spread} for m in found]
        emit_json({"file": str(path) if found else None, "rates": rows, "errors": len(errors)})
    else:
        note(f"wrote {path}" if found else "nothing was measured")
    if errors:
        raise Failed


def estimate(
    target: Annotated[str, typer.Argument(help="file.py:workflow, module:workflow or plan.flow", metavar="TARGET")],
    opt: Annotated[
        int | None,
        typer.Option("-O", "--opt", min=0, max=3, help="Optimisation level.", show_default="2", metavar="0..3"),
    ] = None,
    programs: Annotated[int, typer.Option("--programs", min=1, help="How many programs run in all.")] = 1,
    as_json: Json = False,
) -> None:
    """Say what a run will take before it runs: seconds, calls and tokens of each resource, and how sure that is."""
    from flowc.engine import default_engine

    forecast: Forecast = load_target(target).compiled(opt).estimate()
    if as_json:
        emit_json(forecast.to_json(programs))
        return
    rows: list[tuple[str, ...]] = [
        (
            name,
            f"{use.calls:.3g}",
            f"{use.most_calls:.3g}",
            f"{use.prompt_tokens * programs:.0f}" if use.prompt_tokens else "",
            f"{use.written_tokens * programs:.0f}" if use.written_tokens else "",
            f"{use.seconds:.3g}",
        )
        for name, use in forecast.resources.items()
    ]
    table(rows, ("resource", "calls", "at most", "tokens read", "written", "seconds"))
    emit("\n".join(forecast.lines(programs)))
    if not default_engine().is_calibrated:
        note("the rates are flowc's defaults; `flowc calibrate` measures this machine")


__all__ = ["calibrate", "estimate"]
