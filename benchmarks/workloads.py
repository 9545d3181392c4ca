"""The workloads of `examples/` through flowc and through what one would otherwise use, on the same model and index.

    make bench-workloads                     # all, about 15 minutes on two cores; results to benchmarks/results/
    python benchmarks/workloads.py --only hyde,fan_in --programs 8 --repeat 1

Sides: flowc at -O0 to -O3; the same program written by hand (benchmarks/peers/by_hand.py) on a thread pool and as
LangGraph tasks, each over flowc's engine; LangGraph over plain `transformers` generation. Every side has an engine of
its own that starts empty, the same weights (random: answers mean nothing, and lengths are what `max_tokens` says), the
same index of real text, the same questions in the same order. Warm-up questions are not measured; each repetition has
questions of its own, so that no cache answers from the last. Answers of all sides over one engine must be equal.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import importlib
import json
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import flowc  # noqa: E402
from benchmarks.peers.by_hand import PROGRAMS, Program  # noqa: E402
from flowc.backends.llm.hf import HFBackend  # noqa: E402
from flowc.backends.llm.paged.backend import PagedBackend  # noqa: E402
from flowc.backends.llm.tiny import write_tiny_model  # noqa: E402
from flowc.backends.vector.bundle import index_bundle  # noqa: E402
from flowc.dsl.workflow import Workflow  # noqa: E402
from flowc.runtime.protocols import ChooseRequest, GenerateRequest, SearchRequest  # noqa: E402

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2},
    "small": {"layers": 6, "hidden": 256, "heads": 8, "kv_heads": 2},
    "medium": {"layers": 12, "hidden": 768, "heads": 12, "kv_heads": 4},
}


@dataclass
class Bench:
    """What all sides share."""

    model: Path
    index: Any
    concurrency: int
    threads: int
    levels: tuple[int, ...] = (0, 1, 2, 3)

    @contextmanager
    def engine(self) -> Iterator[PagedBackend]:
        backend = PagedBackend(
            str(self.model), max_sequences=self.concurrency, kv_blocks=self.concurrency * 128, threads=self.threads
        )
        try:
            yield backend
        finally:
            backend.close()


class Calls:
    """`Ops` as futures of a thread pool over backends: concurrency by hand."""

    def __init__(self, index: Any, llm: Any, pool: ThreadPoolExecutor, lock: threading.Lock | None = None) -> None:
        self.index, self.llm, self.pool, self.lock = index, llm, pool, lock
        self.search_lock = threading.Lock()

    def search(self, query: str, k: int) -> Future[Any]:
        return self.pool.submit(self.search_now, query, k)

    def generate(self, prompt: str, max_tokens: int, stop: tuple[str, ...] = ()) -> Future[Any]:
        return self.pool.submit(self.generate_now, prompt, max_tokens, stop)

    def choose(self, prompt: str, options: Sequence[str]) -> Future[Any]:
        return self.pool.submit(self.choose_now, prompt, tuple(options))

    def search_now(self, query: str, k: int) -> Any:
        with self.search_lock:  # one search at a time, as one index in one process is used
            return _one(self.index.search([SearchRequest(query, k)]))

    def generate_now(self, prompt: str, max_tokens: int, stop: tuple[str, ...]) -> str:
        request = GenerateRequest(prompt, max_tokens=max_tokens, stop=stop)
        if self.lock is None:
            return str(_one(self.llm.generate([request])).text)
        with self.lock:
            return str(_one(self.llm.generate([request])).text)

    def choose_now(self, prompt: str, options: tuple[str, ...]) -> str:
        request = ChooseRequest(prompt, options)
        if self.lock is None:
            return options[int(_one(self.llm.choose([request])))]
        with self.lock:
            return options[int(_one(self.llm.choose([request])))]


def _one(answers: Sequence[Any]) -> Any:
    if isinstance(answers[0], Exception):
        raise answers[0]
    return answers[0]


class Tasks:
    """`Ops` as LangGraph tasks, as its functional API has them."""

    def __init__(self, calls: Calls) -> None:
        from langgraph.func import task

        self.search = task(calls.search_now)
        self.choose = task(calls.choose_now)
        generate = task(calls.generate_now)
        self.generate = lambda prompt, max_tokens, stop=(): generate(prompt, max_tokens, stop)


Runner = Callable[[Sequence[str], int], tuple[list[str], list[float]]]
"""Answers and latencies of questions, at most so many programs at a time."""


def flowc_side(workflow: Workflow[..., Any], level: int, bench: Bench, llm: Any) -> Runner:
    flowc.bind(llm={"default": llm}, index={"pydocs": bench.index})
    plan = workflow.compile(opt=level)

    def run(questions: Sequence[str], concurrency: int) -> tuple[list[str], list[float]]:
        found = plan.map(questions, concurrency=concurrency, progress=False)
        found.raise_errors()
        return list(found), [o.seconds for o in found.outcomes]

    return run


def pool_side(program: Program, bench: Bench, llm: Any, lock: threading.Lock | None = None) -> Runner:
    def run(questions: Sequence[str], concurrency: int) -> tuple[list[str], list[float]]:
        with ThreadPoolExecutor(concurrency) as outer, ThreadPoolExecutor(concurrency * 8) as inner:
            calls = Calls(bench.index, llm, inner, lock)
            return _timed(outer.map, lambda q: program(calls, q), questions)

    return run


def langgraph_side(program: Program, bench: Bench, llm: Any, lock: threading.Lock | None = None) -> Runner:
    from langgraph.func import entrypoint

    tasks = Tasks(Calls(bench.index, llm, ThreadPoolExecutor(1), lock))

    @entrypoint()
    def graph(question: str) -> str:
        return program(tasks, question)

    def run(questions: Sequence[str], concurrency: int) -> tuple[list[str], list[float]]:
        with ThreadPoolExecutor(concurrency) as outer:
            return _timed(outer.map, graph.invoke, questions)

    return run


def _timed(
    over: Callable[..., Any], call: Callable[[str], str], questions: Sequence[str]
) -> tuple[list[str], list[float]]:
    def timed(question: str) -> tuple[str, float]:
        start = time.perf_counter()
        return call(question), time.perf_counter() - start

    rows = list(over(timed, questions))
    return [answer for answer, _ in rows], [seconds for _, seconds in rows]


def measure(run: Runner, questions: list[list[str]], concurrency: int) -> dict[str, Any]:
    """Programs per second of each repetition (the first set warms up), with latencies."""
    run(questions[0][: max(2, concurrency // 4)], concurrency)
    rates, latencies, answers, cpu = [], [], [], []
    for some in questions[1:]:
        start, cpu_start = time.perf_counter(), time.process_time()
        found, seconds = run(some, concurrency)
        rates.append(len(some) / (time.perf_counter() - start))
        cpu.append((time.process_time() - cpu_start) / len(some))
        latencies += seconds
        answers.append(found)
    return {
        "programs_per_s": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "latency_s": statistics.median(latencies),
        "p95_s": sorted(latencies)[int(0.95 * (len(latencies) - 1))],
        "cpu_s_per_program": statistics.median(cpu),
        "answers": answers,
    }


def counters(llm: Any) -> dict[str, int]:
    stats = llm.engine.stats
    return {name: getattr(stats, name) for name in stats.__slots__ if isinstance(getattr(stats, name), int)}


def workflow_of(name: str) -> Workflow[..., Any]:
    module = importlib.import_module(f"examples.{name}")
    return [v for v in vars(module).values() if isinstance(v, Workflow) and not v.__flowc_agent__][-1]


def sides_of(name: str, bench: Bench, wanted: Sequence[str]) -> Iterator[tuple[str, Callable[[Any], Runner], str]]:
    """Name, maker and model side of each side."""
    program = PROGRAMS[name]
    workflow = workflow_of(name)
    for level in bench.levels:
        yield f"flowc -O{level}", functools.partial(flowc_side, workflow, level, bench), "engine"
    yield "threads", lambda llm: pool_side(program, bench, llm), "engine"
    if "langgraph" in wanted:
        yield "langgraph", lambda llm: langgraph_side(program, bench, llm), "engine"
        lock = threading.Lock()
        yield "langgraph, plain generation", lambda llm: langgraph_side(program, bench, llm, lock), "plain"


def compare(name: str, bench: Bench, sets: list[list[str]], wanted: Sequence[str], single: int) -> dict[str, Any]:
    """Every side of one workload."""
    rows: dict[str, Any] = {}
    for side, make, model_side in sides_of(name, bench, wanted):
        if model_side == "plain":
            plain = HFBackend(str(bench.model), max_batch=1, threads=bench.threads)
            some = [s[: max(2, len(s) // 8)] for s in sets[:2]]  # one call at a time: more programs change nothing
            row = measure(make(plain), some, bench.concurrency)
            row["single_s"] = row["latency_s"] if bench.concurrency == 1 else None
            plain.close()
        else:
            with bench.engine() as llm:
                run = make(llm)
                row = measure(run, sets, bench.concurrency)
                row["engine"] = counters(llm)
            with bench.engine() as llm:
                row["single_s"] = measure(make(llm), [s[:single] for s in sets[:2]], 1)["latency_s"]
        rows[side] = row
        print(f"  {side:30s} {row['programs_per_s']:8.2f}/s  single {row['single_s'] or 0:.3f} s", file=sys.stderr)
    ours = [row.pop("answers") for side, row in rows.items() if not side.endswith("plain generation")]
    for row in rows.values():
        row.pop("answers", None)
    return {"sides": rows, "answers_equal": all(a == ours[0] for a in ours)}


def question_sets(programs: int, repeat: int) -> list[list[str]]:
    """Disjoint sets of real questions: one to warm up, one for each repetition."""
    with gzip.open(ROOT / "data" / "pydocs" / "queries.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    texts = [row["text"] for row in rows if row["kind"] == "faq"] + [r["text"] for r in rows if r["kind"] != "faq"]
    return [texts[i * programs : (i + 1) * programs] for i in range(repeat + 1)]


def machine() -> dict[str, Any]:
    versions = {}
    for name in ("langgraph", "torch", "transformers", "faiss-cpu"):
        try:
            from importlib.metadata import version

            versions[name] = version(name)
        except ImportError:
            versions[name] = "absent"
    return {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "load": [round(x, 1) for x in os.getloadavg()],
        **versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help="workloads, separated by commas", default=",".join(PROGRAMS))
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--programs", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--single", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--levels", default="0,1,2,3", help="of flowc, separated by commas")
    parser.add_argument("--no-peers", action="store_true", help="leave LangGraph out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(Path(folder) / "model", context=4096, vocab=4096, **SIZES[options.size])
        where = Path(folder) / "pydocs"
        index_bundle("pydocs", where, kind="ivf")
        levels = tuple(map(int, options.levels.split(",")))
        bench = Bench(model, flowc.open_index(where, name="pydocs"), options.concurrency, options.threads, levels)
        sets = question_sets(options.programs, options.repeat)
        result: dict[str, Any] = {"machine": machine(), "size": options.size, "programs": options.programs}
        result |= {"concurrency": options.concurrency, "repeat": options.repeat, "workloads": {}}
        for name in options.only.split(","):
            print(name, file=sys.stderr)
            wanted = () if options.no_peers else ("langgraph",)
            result["workloads"][name] = compare(name, bench, sets, wanted, options.single)
            if options.json is not None:  # what is measured is kept, whatever happens next
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    flowc.shutdown()
    if options.json is None:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
