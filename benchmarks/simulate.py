"""Program scheduling under Autellix's shapes, in virtual time; and how far a simulated run is from a real one.

    python benchmarks/simulate.py shapes [--machine cpu-2core] [--slots 4] [--programs N] [--loads 0.5,0.9]
    python benchmarks/simulate.py scale [--programs 100000]
    python benchmarks/simulate.py real [--programs 200]

`shapes`: chains like ShareGPT's (6.66 calls on average, at most 80; 256 prompt and 277 output tokens a call), chains
like BFCL's (10.75 calls; 735 and 34), trees like LATS's (160 calls in rounds of five candidates and five judgements;
467 and 72.6), and mixes: of equally many programs, and of equally many calls. Numbers of calls and tokens are lognormal
around these means; nine tenths of a prompt are shared within its program (Luo et al., "Autellix", 2025). Programs
arrive as a Poisson process; load 1 is the output tokens a second of a closed system that always has three programs for
each sequence that its model takes. Token latency is Autellix's measure: a program's latency over its output tokens.

`scale`: how long a simulation of many programs takes, and the memory at its end.

`real`: the same programs on the paged engine with a small random model and in the simulation, whose machine profile is
measured on the engine first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowc import LLM, Index, workflow
from flowc.backends.simulated.llm import Work, work_of
from flowc.backends.simulated.profiles import LLMProfile, Machine, load_machine
from flowc.runtime.plan import Plan
from flowc.runtime.protocols import GenerateRequest
from flowc.simulate import Arrivals, Job, simulate

llm, docs = LLM("default"), Index("docs")


# A prompt stands for its tokens: "program|shared|new|output#". `work` below reads it.
@workflow
def chat(turns: list[str]) -> str:
    """A conversation: every turn sees all turns before it."""
    answer = ""
    for turn in turns:
        answer = llm.generate(f"{turn}{answer}", max_tokens=4096)
    return answer


@workflow
def calls(turns: list[str]) -> str:
    """A row of function calls."""
    answer = ""
    for turn in turns:
        answer = llm.generate(f"{turn}{answer}", max_tokens=4096)
    return answer


@workflow
def search_tree(rounds: list[list[str]]) -> int:
    """Rounds of a tree search: candidates side by side, then a judgement of each."""
    found = 0
    for candidates in rounds:
        drafts = [llm.generate(c, max_tokens=4096) for c in candidates]
        judged = [llm.generate(f"{c}|judge{d}", max_tokens=4096) for c, d in zip(candidates, drafts, strict=True)]
        found += len(judged)
    return found


def work(request: GenerateRequest, seed: int) -> Work:
    """Reads what `Shapes` wrote into the prompt."""
    program, shared, new, output = request.prompt.partition("#")[0].split("|")[:4]
    prefix = int(shared)
    return Work(prefix + int(new), int(output), ((program, prefix),))


@dataclass(frozen=True, slots=True)
class Shape:
    """Mean calls of a program and tokens of a call; `spread` is the deviation of the logarithm of the calls."""

    plan: str
    calls: float
    prompt: float
    output: float
    spread: float
    most: int


SHAPES = {
    "sharegpt": Shape("chat", 6.66, 256, 277, 1.0, 80),
    "bfcl": Shape("calls", 10.75, 735, 34, 0.5, 60),
    "lats": Shape("search_tree", 160, 467, 72.6, 0.8, 1600),
}
MIXES = {name: {name: 1.0} for name in SHAPES} | {
    "mixed": dict.fromkeys(SHAPES, 1.0),  # equally many programs of each
    "mixed-calls": {name: 1.0 / shape.calls for name, shape in SHAPES.items()},  # equally many calls of each
}
TOKENS_SPREAD = 0.5
SHARED = 0.9  # of a prompt is what the program has sent before: "intra-program prefix hits are above 90 %"


def lognormal(draw: random.Random, mean: float, spread: float) -> float:
    return draw.lognormvariate(math.log(mean) - spread * spread / 2, spread)


class Programs:
    """`job(n)` is the n-th program of a mix of shapes, the same for a seed whatever the policy."""

    def __init__(self, mix: str, seed: int) -> None:
        self.mix = MIXES[mix]
        self.seed = seed
        self.plans: dict[str, Plan] = {w.name: w.compile(opt=2).plan for w in (chat, calls, search_tree)}

    def tokens(self, number: int) -> tuple[Shape, list[tuple[str, int]]]:
        """The shape, and for each call what its prompt begins with and its output tokens."""
        draw = random.Random(f"{self.seed} {number}")
        shape = SHAPES[draw.choices(list(self.mix), list(self.mix.values()))[0]]
        n = min(shape.most, max(1, round(lognormal(draw, shape.calls, shape.spread))))
        shared = int(SHARED * lognormal(draw, shape.prompt, TOKENS_SPREAD))
        return shape, [
            (
                f"{number}|{shared}|{1 + int((1 - SHARED) * lognormal(draw, shape.prompt, TOKENS_SPREAD))}",
                1 + int(lognormal(draw, shape.output, TOKENS_SPREAD)),
            )
            for _ in range(n)
        ]

    def job(self, number: int) -> Job:
        shape, tokens = self.tokens(number)
        args: list[Any] = [f"{prompt}|{output}#" for prompt, output in tokens]
        if shape.plan == "search_tree":  # five candidates a round, and a judgement of each
            args = [args[at : at + 10 : 2] for at in range(0, len(args), 10)]
        return Job(self.plans[shape.plan], (args,))

    def written(self, number: int) -> int:
        """Output tokens of one program."""
        shape, tokens = self.tokens(number)
        if shape.plan == "search_tree":  # a judgement is as long as its candidate
            return sum(2 * output for _, output in tokens[::2])
        return sum(output for _, output in tokens)


def peak(programs: Programs, count: int, machine: Machine, policy: str, seed: int) -> float:
    """Output tokens a second of a system that always has three programs for each sequence in a step."""
    always = Arrivals(closed=3 * machine.llm.max_sequences * machine.llm.workers)
    report = simulate(
        programs.job, programs=count, arrivals=always, machine=machine, policy=policy, seed=seed, work=work
    )
    assert report.loaded_tokens_per_s is not None
    return report.loaded_tokens_per_s


def shapes(args: argparse.Namespace) -> list[dict[str, Any]]:
    machine = load_machine(args.machine)
    if args.slots:
        machine = replace(machine, llm=replace(machine.llm, max_sequences=args.slots))
    rows = []
    for mix in args.mixes.split(","):
        programs = Programs(mix, args.seed)
        count = args.programs
        written = [programs.written(n) for n in range(count)]
        full = peak(programs, count, machine, "fcfs", args.seed)
        rate = full / (sum(written) / count)
        print(f"{mix}: peak {full:.1f} output tokens/s, {rate:.4f} programs/s", flush=True)
        for load in map(float, args.loads.split(",")):
            base = base_token = 0.0
            for policy in args.policies.split(","):
                start = time.process_time()
                per_token: list[float] = []
                report = simulate(
                    programs.job,
                    programs=count,
                    arrivals=Arrivals(rate=load * rate),
                    machine=machine,
                    policy=policy,
                    seed=args.seed,
                    work=work,
                    on_program=lambda p, s, to=per_token, of=written: to.append(s / of[p.id - 1]),  # type: ignore[misc]
                )
                cpu_s = time.process_time() - start
                token = sum(per_token) / len(per_token)
                base, base_token = base or report.latency.mean, base_token or token
                share = peak(programs, count, machine, policy, args.seed) / full if args.peaks else None
                row = {"mix": mix, "load": load, "policy": policy, "token_latency_s": token, "peak": share}
                rows.append(row | report.to_json())
                la, wr = report.latency, report.waiting_ratio
                print(
                    f"  load {load:.2f} {policy:<10} mean {la.mean:7.1f} s ({base / la.mean:4.2f}x)  "
                    f"a token {token * 1e3:6.1f} ms ({base_token / token:4.2f}x)  P99 {la.p99:7.1f}  "
                    f"waiting {report.waiting_share:3.0%}, over service P99 {wr.p99:5.1f} max {wr.max:5.1f}  "
                    + "  ".join(f"{k} {v.mean:.0f}" for k, v in report.latency_by.items())
                    + (f"  peak {share:.3f}" if share is not None else "")
                    + f"  [{cpu_s:.1f} s]",
                    flush=True,
                )
    return rows


def scale(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A search and a generation a program, and chains of ShareGPT's shape, at load 0.7 or so."""
    machine = load_machine(args.machine)
    rag_plan = rag.compile(opt=2).plan
    programs = Programs("sharegpt", args.seed)
    rows = []
    for name, job, rate, of in (
        ("rag", lambda n: Job(rag_plan, (f"What of number {n}?",)), 0.5, work_of),
        ("sharegpt", programs.job, 0.04, work),
    ):
        start = time.process_time(), time.perf_counter()
        report = simulate(
            job, programs=args.programs, arrivals=Arrivals(rate=rate), machine=machine, policy="atlas", work=of
        )
        row = {
            "what": name,
            "programs": report.programs,
            "cpu_s": round(time.process_time() - start[0], 1),
            "wall_s": round(time.perf_counter() - start[1], 1),
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
            "mean_latency_s": report.latency.mean,
            "busy": [lane["busy"] for lane in report.lanes.values()],
        }
        rows.append(row)
        print(row, flush=True)
    return rows


# -- the simulated run beside the real one


@workflow
def qa(question: str) -> str:
    """Two generations, the second over the first's text."""
    draft = llm.generate(f"Question: {question} Answer at length:", max_tokens=24)
    return llm.generate(f"Question: {question} Draft: {draft} Better:", max_tokens=16)


@workflow
def rag(question: str) -> str:
    return llm.generate(f"Context:\n{docs.search(question, k=4)}\n\nQuestion: {question}\nAnswer:", max_tokens=64)


def real(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same Poisson arrivals on the paged engine, by the clock, and in the simulation."""
    import tempfile

    from flowc.backends.llm.paged.backend import PagedBackend
    from flowc.backends.llm.tiny import write_tiny_model
    from flowc.runtime.engine import Runtime

    with tempfile.TemporaryDirectory() as folder:
        model = write_tiny_model(folder, hidden=384, layers=6, heads=6, kv_heads=2)
        backend = PagedBackend(str(model), threads=1, max_sequences=8)
    backend.max_batch = 1  # a wavefront's answers come together: here each should come when it is there
    backend.generate([GenerateRequest("warm up", max_tokens=4)])
    profile, prompts = measured(backend)
    print(f"measured: {profile}", flush=True)
    machine = replace(load_machine("cpu-2core"), name="this machine", llm=profile)
    plan = qa.compile(opt=1).plan
    words = "list dict tuple module string number path value object type".split()

    def job(n: int) -> Job:
        draw = random.Random(f"{args.seed} {n}")
        return Job(plan, (" ".join(draw.choices(words, k=draw.randint(4, 40))),))

    def tokens(request: GenerateRequest, seed: int) -> Work:
        return Work(prompts(request.prompt), request.max_tokens, text="x " * request.max_tokens)

    alone = simulate(job, programs=20, arrivals=Arrivals(closed=1), machine=machine, work=tokens).latency.mean
    full = simulate(job, programs=100, arrivals=Arrivals(closed=16), machine=machine, work=tokens)
    rows = []
    for load in map(float, args.loads.split(",")):
        coming = Arrivals(rate=load * full.throughput)
        found = simulate(job, programs=args.programs, arrivals=coming, machine=machine, seed=args.seed, work=tokens)

        async def run(coming: Arrivals = coming) -> list[float]:
            loop = asyncio.get_running_loop()
            latencies: list[float] = []
            start = loop.time()

            async def one(n: int, at_s: float) -> None:
                await asyncio.sleep(start + at_s - loop.time())
                before = loop.time()
                await runtime.run_async(plan, job(n).args)
                latencies.append(loop.time() - before)

            moments = zip(range(args.programs), coming.moments(args.seed), strict=False)
            await asyncio.gather(*(one(n, at_s) for n, at_s in moments))
            return latencies

        with Runtime(_Only(backend)) as runtime:
            seen = asyncio.run(run())
        mean = sum(seen) / len(seen)
        row = {
            "load": load,
            "programs": args.programs,
            "real_mean_s": round(mean, 4),
            "simulated_mean_s": round(found.latency.mean, 4),
            "difference": round(found.latency.mean / mean - 1, 3),
            "alone_s": round(alone, 4),
        }
        rows.append(row)
        print(row, flush=True)
    backend.close()
    return rows


class _Only:
    """One model under every name."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def llm(self, name: str) -> Any:
        return self.model

    def index(self, name: str) -> Any:
        raise LookupError(name)

    embedder = reranker = index


def measured(backend: Any) -> tuple[LLMProfile, Callable[[str], int]]:
    """A profile of an engine: a step's fixed cost and that of a sequence from batches of 1 and 8, that of a prompt
    token from prompts of two lengths; each the median of five. And how many tokens a text has.
    """
    text = " ".join(f"word{i}" for i in range(400))

    def seconds(batch: int, words: int, new: int) -> float:
        times = []
        for turn in range(5):
            prompts = [f"{turn} {batch} {words} {new} {i} {text[: words * 8]}" for i in range(batch)]
            start = time.perf_counter()
            backend.generate([GenerateRequest(p, max_tokens=new) for p in prompts])
            times.append(time.perf_counter() - start)
        return sorted(times)[2]

    def step(batch: int) -> float:
        return (seconds(batch, 4, 65) - seconds(batch, 4, 1)) / 64

    one, eight = step(1), step(8)
    sequence_s = max(0.0, (eight - one) / 7)
    few, many = backend.count_tokens(text[: 4 * 8]), backend.count_tokens(text[: 200 * 8])
    prompt_s = (seconds(1, 200, 1) - seconds(1, 4, 1)) / (many - few)
    engine = backend.engine
    profile = LLMProfile(
        step_s=one - sequence_s,
        sequence_s=sequence_s,
        prompt_s=prompt_s,
        context_s=0.0,
        max_sequences=8,
        max_step_tokens=256,
        kv_tokens=engine.capacity_tokens,
    )
    return profile, backend.count_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shapes", "scale", "real"))
    parser.add_argument("--machine", default="cpu-2core")
    parser.add_argument("--slots", type=int, help="sequences in a step; absent: the profile's")
    parser.add_argument("--programs", type=int, default=600)
    parser.add_argument("--mixes", default="mixed")
    parser.add_argument("--loads", default="0.9")
    parser.add_argument("--policies", default="fcfs,mlfq,plas,atlas,remaining")
    parser.add_argument("--peaks", action="store_true", help="also each policy's throughput in a full system")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {"shapes": shapes, "scale": scale, "real": real}[args.what](args)
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
