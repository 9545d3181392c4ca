"""What every pass is worth on every workload of `examples/`: each alone, all without it, and all.

    make bench-ablation                      # every workload, some minutes on two calm cores
    python benchmarks/ablation.py --only hyde --level 2

The base is -O1 (cleaned up, in program order). *Alone* is the base with one pass more; one that works on unordered
regions also has `prune-edges`, and its gain is then over that. Passes that did not fire on a workload leave the plan
as it is and are not run. Runs of all variants are interleaved, each on an engine of its own that starts empty; answers
must be equal throughout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import flowc  # noqa: E402
from benchmarks.peers.by_hand import PROGRAMS  # noqa: E402
from benchmarks.workloads import SIZES, Bench, machine, question_sets, workflow_of  # noqa: E402
from flowc.backends.llm.tiny import write_tiny_model  # noqa: E402
from flowc.backends.vector.bundle import index_bundle  # noqa: E402
from flowc.dsl.workflow import Workflow  # noqa: E402
from flowc.ir.printer import print_graph  # noqa: E402
from flowc.passes.manager import PASSES, PIPELINES  # noqa: E402

MARGIN = 0.03  # a pass that makes a workflow slower by more has failed


def names(level: int) -> list[str]:
    return [name for name in PIPELINES[level].split(",") if name]


def variants(workflow: Workflow[..., Any], level: int) -> dict[str, str]:
    """Pipelines by name. Those whose compiled text equals another's are left out, but for the base and all."""
    base, full = names(1), names(level)
    fired = {r.pass_name for r in workflow.compile(opt=level).compilation.remarks if r.fired}
    found = {"base": ",".join(base), "all": ",".join(full)}
    for name in full:
        if name in base or name not in fired or not (PASSES[name].on_trial or name == "prune-edges"):
            continue  # the others only write down what runs together
        kept = {*base, name, "prune-edges"}
        found[f"alone {name}"] = ",".join(n for n in full if n in kept)
        found[f"without {name}"] = ",".join(n for n in full if n != name)
    seen: dict[str, str] = {}
    for name, passes in list(found.items()):
        text = print_graph(workflow.compile(passes=passes).graph)
        if name not in ("base", "all") and text in seen:
            del found[name]
        seen.setdefault(text, name)
    return found


def run(workflow: Workflow[..., Any], passes: str, bench: Bench, questions: Sequence[str]) -> tuple[float, list[str]]:
    """Seconds for all questions on an engine that starts empty, and the answers."""
    with bench.engine() as llm:
        flowc.bind(llm={"default": llm}, index={"pydocs": bench.index})
        plan = workflow.compile(passes=passes)
        plan.map(questions[:1], concurrency=1, progress=False).raise_errors()
        start = time.perf_counter()
        found = plan.map(questions[1:], concurrency=bench.concurrency, progress=False)
        seconds = time.perf_counter() - start
        found.raise_errors()
        return seconds, list(found)


def ablate(name: str, bench: Bench, questions: Sequence[str], level: int, repeat: int) -> dict[str, Any]:
    workflow = workflow_of(name)
    pipelines = variants(workflow, level)
    times: dict[str, list[float]] = {variant: [] for variant in pipelines}
    answers: list[list[str]] = []
    for _ in range(repeat):
        for variant, passes in pipelines.items():
            seconds, found = run(workflow, passes, bench, questions)
            times[variant].append(seconds)
            answers.append(found)
    medians = {variant: statistics.median(t) for variant, t in times.items()}
    rows: dict[str, Any] = {
        variant: {"seconds": medians[variant], "spread": [min(t), max(t)]} for variant, t in times.items()
    }
    for variant, row in rows.items():
        if variant.startswith("without "):
            row["gain"] = medians[variant] / medians["all"]  # of having the pass
        elif variant.startswith("alone ") and variant != "alone prune-edges":
            row["gain"] = medians.get("alone prune-edges", medians["base"]) / medians[variant]
        else:
            row["gain"] = medians["base"] / medians[variant]
    slower = [v.removeprefix("without ") for v in rows if v.startswith("without ") and rows[v]["gain"] < 1 - MARGIN]
    return {"variants": rows, "answers_equal": all(a == answers[0] for a in answers), "slower_with": slower}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="workloads, separated by commas", default=",".join(PROGRAMS))
    parser.add_argument("--level", type=int, choices=(2, 3), default=3)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--programs", type=int, default=6)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", context=4096, vocab=4096, **SIZES[options.size])
        where = Path(folder) / "pydocs"
        index_bundle("pydocs", where, kind="ivf")
        bench = Bench(model, flowc.open_index(where, name="pydocs"), options.concurrency, options.threads)
        (questions,) = question_sets(options.programs + 1, 0)
        result: dict[str, Any] = {"machine": machine(), "level": options.level, "size": options.size}
        result |= {"programs": options.programs, "concurrency": options.concurrency, "repeat": options.repeat}
        result["workloads"] = {}
        for name in options.only.split(","):
            row = result["workloads"][name] = ablate(name, bench, questions, options.level, options.repeat)
            print(f"{name}: answers {'equal' if row['answers_equal'] else 'DIFFER'}", file=sys.stderr)
            for variant, found in row["variants"].items():
                print(f"  {variant:28s} {found['seconds']:8.3f} s  gain {found['gain']:.3f}", file=sys.stderr)
            if options.json is not None:  # what is measured is kept, whatever happens next
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    flowc.shutdown()
    if options.json is None:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
