"""Writes docs/benchmarks.md from the results in benchmarks/results/, so that no number is copied by hand.

python benchmarks/report.py              # after any benchmark with --json benchmarks/results/NAME.json
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
Lines = Iterator[str]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> Lines:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(str(cell) for cell in row) + " |"
    yield ""


def about(machine: dict[str, Any]) -> Lines:
    """Where it was measured, on one line."""
    shown = ", ".join(f"{k} {v}" for k, v in machine.items() if not isinstance(v, dict | list))
    load = machine.get("load")
    yield f"*{shown}{f', load {load[0]} at the start' if load else ''}.*"
    yield ""


def workloads(data: dict[str, Any]) -> Lines:
    yield (
        f"{data['programs']} programs, {data['concurrency']} at a time, the `{data['size']}` random-weight model on "
        f"flowc's engine for every side but the last; medians of {data['repeat']} repetitions."
    )
    yield ""
    yield from about(data["machine"])
    found = data["workloads"]
    sides = list(dict.fromkeys(side for row in found.values() for side in row["sides"]))
    yield "Programs a second:"
    yield ""
    yield from table(
        ("workload", *sides, "answers"),
        (
            (
                f"`{name}`",
                *(f"{row['sides'][s]['programs_per_s']:.2f}" if s in row["sides"] else "" for s in sides),
                "equal" if row["answers_equal"] else "DIFFER",
            )
            for name, row in found.items()
        ),
    )
    yield "One program alone, in seconds:"
    yield ""
    alone = [s for s in sides if any(row["sides"].get(s, {}).get("single_s") for row in found.values())]
    yield from table(
        ("workload", *alone),
        (
            (f"`{name}`", *(f"{row['sides'][s]['single_s']:.3f}" if s in row["sides"] else "" for s in alone))
            for name, row in found.items()
        ),
    )
    yield "Tokens computed, and taken from the cache, by flowc at its highest level and by the others:"
    yield ""
    ours = [s for s in sides if s.startswith("flowc")][-1]
    theirs = "langgraph" if "langgraph" in sides else "threads"
    keys = ("prefill_tokens", "decode_tokens", "reused_tokens")
    yield from table(
        ("workload", *(f"{k.removesuffix('_tokens')}, {s}" for k in keys for s in (ours, theirs))),
        (
            (f"`{name}`", *(row["sides"][s]["engine"][k] for k in keys for s in (ours, theirs)))
            for name, row in found.items()
            if {ours, theirs} <= row["sides"].keys()
        ),
    )
    yield from _ahead(found, ours)


def _ahead(found: dict[str, Any], ours: str) -> Lines:
    """Every point where somebody else is in front, and the ratios in the middle."""
    behind = []
    for name, row in found.items():
        mine = row["sides"][ours]
        for side, other in row["sides"].items():
            if side.startswith("flowc"):
                continue
            if other["programs_per_s"] > mine["programs_per_s"]:
                behind.append((f"`{name}`", side, "programs a second", mine["programs_per_s"], other["programs_per_s"]))
            if (other.get("single_s") or 9e9) < mine["single_s"]:
                behind.append((f"`{name}`", side, "one program, seconds", mine["single_s"], other["single_s"]))
    for side in dict.fromkeys(s for row in found.values() for s in row["sides"] if not s.startswith("flowc")):
        ratios = [
            row["sides"][ours]["programs_per_s"] / row["sides"][side]["programs_per_s"]
            for row in found.values()
            if side in row["sides"]
        ]
        spread = f"{min(ratios):.2f}x to {max(ratios):.2f}x"
        yield f"- {ours} over {side}: median {statistics.median(ratios):.2f}x, {spread}."
    yield ""
    if behind:
        yield f"Where somebody is ahead of {ours}:"
        yield ""
        yield from table(
            ("workload", "who", "in", ours, "they"), ((*r[:3], f"{r[3]:.3f}", f"{r[4]:.3f}") for r in behind)
        )


def ablation(data: dict[str, Any]) -> Lines:
    many, at_a_time = data["programs"], data["concurrency"]
    yield (
        f"{many} programs, {at_a_time} at a time, -O{data['level']} against the clean program in its written order "
        "(-O1). *With* is the gain of having the pass among all others, *alone* over the base."
    )
    yield ""
    yield from about(data["machine"])
    found = data["workloads"]
    passes = list(
        dict.fromkeys(
            v.partition(" ")[2] for row in found.values() for v in row["variants"] if v.startswith(("without", "alone"))
        )
    )

    def gain(row: dict[str, Any], variant: str) -> str:
        return f"{row['variants'][variant]['gain']:.2f}" if variant in row["variants"] else ""

    yield from table(
        ("workload", "all", *(f"{p}: alone / with" for p in passes), "answers"),
        (
            (
                f"`{name}`",
                gain(row, "all"),
                *(
                    " / ".join(filter(None, (gain(row, f"alone {p}"), gain(row, f"without {p}")))) or "-"
                    for p in passes
                ),
                "equal" if row["answers_equal"] else "DIFFER",
            )
            for name, row in found.items()
        ),
    )
    slower = [f"`{name}`: {', '.join(row['slower_with'])}" for name, row in found.items() if row["slower_with"]]
    yield "Passes that made a workflow more than 3 % slower: " + ("; ".join(slower) if slower else "none") + "."
    yield ""


def overhead(data: dict[str, Any]) -> Lines:
    yield "Microseconds a node that does nothing, medians; the fixed cost of a run is in the number."
    yield ""
    rows = data["overhead"]
    shapes = ("chain", "fan_out", "loop")
    yield from table(
        ("", *shapes),
        ((name, *(f"{row[s]['us_per_node']:.2f}" if s in row else "" for s in shapes)) for name, row in rows.items()),
    )
    yield from table(
        ("statements", "nodes", "compile", "a node"),
        (
            (r["statements"], r["nodes"], f"{r['seconds'] * 1e3:.0f} ms", f"{r['us_per_node']:.0f} us")
            for r in data["compile"]
        ),
    )


def engine_cache(data: dict[str, Any]) -> Lines:
    yield "Share of prompt tokens that came from the cache, by policy, beside Belady's optimum on the same trace."
    yield ""
    yield from about(data["machine"])
    rows = data["rows"]
    columns = [
        k for k, v in rows[0].items() if isinstance(v, int | float) and k not in ("blocks", "workflow_of_belady")
    ]
    yield from table(("work", *columns), ((r["work"], *(r.get(c, "") for c in columns)) for r in rows))


def engine_speed(data: dict[str, Any]) -> Lines:
    yield (
        "A Qwen3-shaped model of 109 M parameters, float32 where nothing else is said, the same requests for all. "
        "Processor seconds, medians with the quartiles; *times ours* is theirs over the engine's."
    )
    yield ""
    yield from about(data["machine"])
    for part in data["tables"]:
        limits = part["limits"]
        yield (
            f"{part['threads']} thread(s). What the machine can do, measured in the same run: prefill "
            f"{limits['prefill_tokens_per_s']:.0f} tokens/s, decoding {limits['decode_tokens_per_s_at_16']:.0f} "
            f"tokens/s at 16 sequences and {limits['decode_tokens_per_s_at_1']:.0f} at one."
        )
        yield ""
        yield from table(
            ("work", "engine", "CPU s", "tokens per CPU s", "decoding alone", "times ours", "answers equal"),
            (
                (
                    r["work"],
                    r["variant"],
                    f"{r['cpu_s'][1]:.2f} ({r['cpu_s'][0]:.2f}-{r['cpu_s'][2]:.2f})",
                    r["tokens_per_cpu_s"],
                    r.get("decode_tokens_per_cpu_s", ""),
                    r["engine_is_faster_by"],
                    r["equal"],
                )
                for r in part["rows"]
            ),
        )


def retrieval(data: dict[str, Any]) -> Lines:
    yield (
        f"{data['corpus']}: {data['vectors']} vectors of {data['dim']}, {data['nlist']} lists, FAISS {data['faiss']}, "
        f"{data['processor']}, load {data['load']:.1f} at the start. Processor time of the better of FAISS query by "
        "query and FAISS batched, over flowc's, for the same result bit for bit; one thread."
    )
    yield ""
    for codec in ("fp16", "fp32"):
        rows = data[codec]
        batches = list(dict.fromkeys(r["batch"] for r in rows))
        points = {(r["nprobe"], r["k"], r["batch"]): r for r in rows}
        yield from table(
            (f"{codec}: nprobe, k", *(f"{b} at once" for b in batches)),
            (
                (f"{nprobe}, {k}", *(f"{points[nprobe, k, b]['times_faiss'][0]:.2f}" for b in batches))
                for nprobe, k in dict.fromkeys((r["nprobe"], r["k"]) for r in rows)
            ),
        )
    for row in data["pieces"]:
        times = row["times_whole"][0]
        yield f"- A search in 8 pieces, {row['batch']} at once, {row['caches']}: {times:.2f} of it in one."
    tail = data["under_load"]["p99_by_p50"]
    yield f"- Single searches, p99 over p50: {tail['alone']} alone, {tail['under load']} while batches are scanned."
    lost = ", ".join(f"{name} {row['lost']:.1%}" for name, row in data["beside"].items())
    yield f"- A scan and a decode side by side, processor time lost: {lost}."
    yield f"- Points that miss what is wanted of them: {len(data['missed'])} of {len(data['fp16'])}."
    yield ""


def scheduling(rows: list[dict[str, Any]]) -> Lines:
    first = rows[0]
    yield f"Simulated: {first['programs']} programs, machine profile `{first['machine']}`, seed {first['seed']}."
    yield ""
    yield from table(
        ("mix", "load", "policy", "mean latency", "P95", "latency per token", "waiting over service, worst"),
        (
            (
                r["mix"],
                r["load"],
                r["policy"],
                f"{r['latency']['mean']:.0f} s",
                f"{r['latency']['p95']:.0f} s",
                f"{r['token_latency_s'] * 1e3:.0f} ms",
                f"{r['waiting_ratio']['max']:.0f}" if isinstance(r["waiting_ratio"], dict) else r["waiting_ratio"],
            )
            for r in rows
        ),
    )


SECTIONS: dict[str, tuple[str, str, Callable[[Any], Lines]]] = {
    "workloads": ("The workloads, side by side", "make bench-workloads", workloads),
    "ablation": ("Every pass on every workload", "make bench-ablation", ablation),
    "overhead": ("Overhead of a node", "make bench", overhead),
    "engine-speed": ("The engine's speed", "python benchmarks/engine_speed.py", engine_speed),
    "engine-cache": ("The prefix cache", "python benchmarks/engine.py cache", engine_cache),
    "retrieval": ("Searches", "python benchmarks/retrieval.py", retrieval),
    "scheduling": ("Scheduling", "python benchmarks/simulate.py shapes", scheduling),
}


def page() -> Lines:
    yield "# Benchmarks"
    yield ""
    yield "Written by `benchmarks/report.py` from `benchmarks/results/`; a section's command measures it again."
    yield "Nothing here decides a test. All models have random weights: answers mean nothing, times are what they are."
    yield ""
    for name, (title, command, show) in SECTIONS.items():
        path = RESULTS / f"{name}.json"
        if not path.is_file():
            continue
        yield f"## {title}"
        yield ""
        yield f"`{command}`"
        yield ""
        yield from show(json.loads(path.read_text(encoding="utf-8")))


def main() -> None:
    text = "\n".join(page()).rstrip() + "\n"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
