"""`flowc simulate`: many programs of a workflow on a machine that is not there, in virtual time."""

from __future__ import annotations

import contextlib
import html
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from flowc.ir.errors import OutputError

from .console import emit, emit_json, fail, note, write_file
from .run import TargetArgument, read_rows
from .targets import Target, load_target


def simulate(
    target: TargetArgument,
    arrivals: Annotated[
        str, typer.Option("--arrivals", help="poisson:RATE, trace:FILE or closed:N.", metavar="HOW")
    ] = "poisson:1",
    programs: Annotated[int, typer.Option("--programs", "-n", min=1, help="How many programs.")] = 100,
    machine: Annotated[
        str, typer.Option("--machine", help="cpu-2core, h200 or a profile.toml.", metavar="PROFILE")
    ] = "cpu-2core",
    policy: Annotated[
        str, typer.Option("--policy", help="fcfs, mlfq, plas, atlas, remaining, deadline or fair.")
    ] = "fcfs",
    seed: Annotated[int, typer.Option("--seed", help="All that is drawn comes from it.")] = 0,
    faults: Annotated[
        list[str] | None,
        typer.Option("--fault", help="slow:LANE:FACTOR, fail:LANE:SHARE or lost:LANE, then :FROM-TO; repeat for more."),
    ] = None,
    slo: Annotated[float | None, typer.Option("--slo", min=0.0, help="Seconds that a program should take.")] = None,
    timeout: Annotated[float | None, typer.Option("--timeout", min=0.0, help="Seconds that one may take.")] = None,
    max_programs: Annotated[int | None, typer.Option("--max-programs", min=1, help="Most programs at a time.")] = None,
    inputs_file: Annotated[
        str | None,
        typer.Option("--inputs", help="Arguments, a JSON line each, in turn.", metavar="FILE.jsonl"),
    ] = None,
    opt: Annotated[
        int | None, typer.Option("-O", "--opt", min=0, max=3, help="Optimisation level.", show_default="2")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", help="Write every event here, a line each.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Write the distribution of latencies.", metavar="FILE.svg|.html")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")] = False,
) -> None:
    """Run many programs of a workflow in virtual time, with the same driver, lanes, scheduler and plan as in earnest.

    Models, indexes and tools are simulated by the machine's profile; plain Python runs as it is. Answers are filler, so
    branches that depend on them are taken as the seed has it. The same seed gives the same log, byte for byte.
    """
    from flowc import simulate as simulation
    from flowc.backends.simulated.faults import parse_fault
    from flowc.backends.simulated.profiles import load_machine

    if plot is not None and plot.suffix not in (".svg", ".html"):
        fail(f"{plot} is neither .svg nor .html")
    found = load_target(target)
    profile = load_machine(machine)
    wrong = [parse_fault(text) for text in faults or ()]
    plan = simulation.simulated(found.compiled(opt).compilation.graph, profile, wrong, seed)
    arguments = _arguments(found, inputs_file)
    with contextlib.ExitStack() as stack:
        out = None
        if log is not None:
            try:
                out = stack.enter_context(log.open("w", encoding="utf-8"))
            except OSError as error:
                raise OutputError(f"{log} cannot be written: {error.strerror or error}") from error
        report = simulation.simulate(
            lambda n: simulation.Job(plan, arguments(n)),
            programs=programs,
            arrivals=arrivals,
            machine=profile,
            policy=policy,
            seed=seed,
            faults=wrong,
            slo_s=slo,
            timeout_s=timeout,
            max_programs=max_programs,
            log=out,
        )
    if plot is not None:
        picture = draw(report.latencies, f"{found.name}: {policy} on {profile.name}, {arrivals}, seed {seed}")
        write_file(plot, picture if plot.suffix == ".svg" else _page(picture, report.text()))
        note(f"wrote {plot}")
    if as_json:
        emit_json(report.to_json())
    else:
        emit(report.text())


def _arguments(target: Target, file: str | None) -> Callable[[int], Sequence[Any]]:
    """The arguments of the n-th program: from the file's rows in turn, or made up for the parameters' types."""
    signature = target.signature
    if file is not None:
        rows = list(read_rows(file, signature))
        for row in rows:
            if row.error is not None:
                raise row.error
        if not rows:
            fail(f"{file} holds no inputs")

        def from_row(number: int) -> Sequence[Any]:
            bound = rows[number % len(rows)].bound
            bound.apply_defaults()
            return tuple(bound.arguments.values())

        return from_row

    def made_up(number: int) -> Sequence[Any]:
        return tuple(_example(p.annotation, p.name, number) for p in signature.parameters.values())

    return made_up


def _example(annotation: Any, name: str, number: int) -> Any:
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (list, tuple):
        return origin(_example(parts[0] if parts else str, f"{name} {i}", number) for i in range(3))
    plain: dict[Any, Any] = {int: 3, float: 1.0, bool: True, bytes: b"", list: [], dict: {}}
    return plain.get(annotation, f"What about {name} number {number} of this simulation?")


WIDTH, HEIGHT, MARGIN = 640, 320, 48


def draw(latencies: Sequence[float], title: str) -> str:
    """An SVG of the share of programs that took at most so long, with the 50th, 95th and 99th percentiles."""
    ranked = sorted(latencies)
    most = ranked[-1] if ranked else 1.0
    across, up = (WIDTH - 2 * MARGIN) / (most or 1.0), HEIGHT - 2 * MARGIN

    def at(share: float) -> tuple[float, float]:
        value = ranked[min(len(ranked) - 1, int(share * len(ranked)))]
        return MARGIN + value * across, HEIGHT - MARGIN - share * up

    points = [at(i / 200) for i in range(200)] + [at(1.0)] if ranked else []
    marks = []
    for share in (0.5, 0.95, 0.99) if ranked else ():
        x, y = at(share)
        value = ranked[min(len(ranked) - 1, int(share * len(ranked)))]
        marks.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3"/><text x="{x + 6:.1f}" y="{y + 12:.1f}">P{share * 100:.0f} '
            f"{value:.3g} s</text>"
        )
    axes = f"M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}"
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>'
        f'<text x="{MARGIN}" y="24" font-size="13">{html.escape(title)}</text>'
        f'<path d="{axes}" fill="none" stroke="#888"/>'
        f'<text x="{MARGIN - 36}" y="{MARGIN + 4}">100 %</text><text x="{MARGIN - 24}" y="{HEIGHT - MARGIN}">0 %</text>'
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - MARGIN + 16}" text-anchor="end">{most:.3g} s</text>'
        f'<polyline points="{line}" fill="none" stroke="#2a6fdb" stroke-width="1.5"/>{"".join(marks)}</svg>\n'
    )


def _page(picture: str, text: str) -> str:
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>flowc simulate</title><body>{picture}<pre>{html.escape(text)}</pre></body></html>\n"
    )
