"""The engine beside transformers on one machine, same weights, same requests; and its cache policies beside Belady's.

    python benchmarks/engine.py speed [--json FILE] [--repeat N] [--size small|medium] [--new N]
    python benchmarks/engine.py cache [--json FILE] [--repeat N] [--size tiny|small|medium]

`speed`: 16 requests at once, greedy, float32, a Qwen2 shape with random weights. "decode": prompts of 30 to 90 tokens
of their own. "shared": half of the requests begin with the same 512 tokens, as prompts of one RAG program do. The
columns are `model.generate` one by one; one left-padded batch through `generate`; `generate_batch`, transformers' own
continuous batching, with the settings that suit a CPU (its defaults are several times slower); our engine with plain
and with packed linear layers. Variants are interleaved; wall and CPU seconds are medians with the quartiles. An engine
starts every round with an empty cache. Answers are compared with one-by-one `generate`, token by token.

`cache`: three workloads of agents with fixed prompts, in a pool that holds part of them: ten in turn, four of which
three come at once and one joins them, and eight workflows of four agents. For every policy the share of prompt tokens
that was found on the device, and CPU seconds; "Belady" is the optimum over the same requests with the future known.
Then what two switches of the engine do. "dedup": eight requests at once with a common context that nobody has computed
before. "prefetch": ten agents in turn with a pause between, as for a tool, in which announced prefixes come back from
the host; seconds to the first token. Shares and counts do not depend on the machine, seconds do; policies and switches
are interleaved, medians with the quartiles.

One thread (OMP_NUM_THREADS=1), nothing else running.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from flowc.backends.llm.paged.copies import Costs
from flowc.backends.llm.paged.engine import Engine
from flowc.backends.llm.paged.model import PagedModel
from flowc.backends.llm.paged.packed import pack_linears
from flowc.backends.llm.paged.sequence import Sequence as TokenSequence

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "small": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8},
    "medium": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14},
}
HEADS = {"tiny": (4, 2), "small": (7, 1), "medium": (12, 4)}
VOCAB = 16_384
REQUESTS = 16


def make_model(size: str) -> Any:
    """A Qwen2 model with random weights whose answers vary, the same each time."""
    torch.manual_seed(7)
    heads, kv_heads = HEADS[size]
    config = transformers.Qwen2Config(
        **SIZES[size],
        vocab_size=VOCAB if size != "tiny" else 512,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Taker:
    """Counts the tokens of one request to its limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tokens: list[int] = []

    def accept(self, sequence: TokenSequence, token: int) -> bool:
        self.tokens.append(token)
        return len(self.tokens) < self.limit

    def targets(self, sequence: TokenSequence) -> list[int]:
        raise AssertionError

    def is_wanted(self, sequence: TokenSequence) -> bool:
        return True

    def ended(self, sequence: TokenSequence, error: Exception | None) -> None:
        if error is not None:
            raise error


def drain(engine: Engine) -> None:
    """Steps until everything is done."""
    with torch.inference_mode():
        while engine.waiting or engine.running:
            if not engine.step():
                time.sleep(0.001)  # a copy is under way


@dataclass(frozen=True, slots=True)
class Work:
    """Prompts, and how many tokens each is continued by."""

    name: str
    prompts: list[list[int]]
    new: int


def works(new: int) -> list[Work]:
    rng = random.Random(1)

    def some(n: int) -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(n)]

    shared = some(512)
    decode = [some(rng.randint(30, 90)) for _ in range(REQUESTS)]
    rag = [(shared if i % 2 else some(512)) + some(rng.randint(16, 64)) for i in range(REQUESTS)]
    return [Work("decode", decode, new), Work("shared", rag, max(1, new // 4))]


Answers = list[list[int]]
Runner = Callable[[Work], Answers]


def one_by_one(model: Any) -> Runner:
    def run(work: Work) -> Answers:
        out = []
        for prompt in work.prompts:
            ids = torch.tensor([prompt])
            mask = torch.ones_like(ids)
            got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=work.new, do_sample=False)
            out.append(got[0, len(prompt) :].tolist())
        return out

    return run


def padded(model: Any) -> Runner:
    def run(work: Work) -> Answers:
        width = max(map(len, work.prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in work.prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in work.prompts])
        got = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=work.new, do_sample=False)
        return [row[width:].tolist() for row in got]

    return run


def continuous(model: Any) -> Runner:
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    def run(work: Work) -> Answers:
        blocks = sum(-(-(len(p) + work.new) // 32) + 1 for p in work.prompts)
        got = model.generate_batch(
            work.prompts,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=work.new, do_sample=False, eos_token_id=-1, pad_token_id=0
            ),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=32, num_blocks=blocks + 8, max_batch_tokens=256
            ),
        )
        if len(got) < len(work.prompts):
            raise RuntimeError(f"{len(got)} of {len(work.prompts)} requests were answered")
        by_prompt = {tuple(o.prompt_ids): o.generated_tokens for o in got.values()}
        return [list(by_prompt[tuple(p)]) for p in work.prompts]

    return run


def ours(model: Any, stats: dict[str, Any]) -> Runner:
    paged = PagedModel(model, "benchmark")

    def run(work: Work) -> Answers:
        blocks = sum(-(-(len(p) + work.new) // 16) for p in work.prompts) + 1
        engine = Engine(paged, blocks=blocks, max_step_tokens=256)
        takers = [Taker(work.new) for _ in work.prompts]
        engine.waiting += [
            TokenSequence(list(p), t, order=i) for i, (p, t) in enumerate(zip(work.prompts, takers, strict=True))
        ]
        drain(engine)
        stats[work.name] = {n: getattr(engine.stats, n) for n in engine.stats.__slots__}
        return [t.tokens for t in takers]

    return run


def speed(size: str, new: int, repeat: int) -> dict[str, Any]:
    """Wall and CPU seconds of every variant over every work, and what the engine computed and reused."""
    stats: dict[str, Any] = {}
    packed_model = make_model(size)
    pack_linears(packed_model)
    variants: dict[str, Runner] = {
        "generate, one by one": one_by_one(make_model(size)),
        "generate, padded batch": padded(make_model(size)),
        "generate_batch, tuned": continuous(make_model(size)),
        "engine": ours(make_model(size), stats),
        "engine, packed": ours(packed_model, {}),
    }
    found: list[dict[str, Any]] = []
    for work in works(new):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
        answers: dict[str, Answers] = {}
        failed: dict[str, str] = {}
        for turn in range(repeat + 1):
            for name, run in variants.items():
                if name in failed:
                    continue
                wall, cpu = time.perf_counter(), time.process_time()
                try:
                    answers[name] = run(work)
                except Exception as error:  # a peer that does not run here is named, not hidden
                    failed[name] = f"{type(error).__name__}: {error}"
                    continue
                if turn:  # the first turn warms up
                    times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        expected = answers["generate, one by one"]
        tokens = sum(map(len, expected))
        for name in variants:
            row: dict[str, Any] = {"work": work.name, "variant": name}
            if name in failed:
                row["failed"] = failed[name]
            else:
                row["wall_s"] = quartiles([w for w, _ in times[name]])
                row["cpu_s"] = quartiles([c for _, c in times[name]])
                row["tokens_per_cpu_s"] = round(tokens / row["cpu_s"][1], 1)
                same = sum(a == b for a, b in zip(answers[name], expected, strict=True))
                row["equal_answers"] = f"{same} of {len(expected)}"
            found.append(row)
            print(row, file=sys.stderr)
    prompt_tokens = {w.name: sum(map(len, w.prompts)) for w in works(new)}
    return {"size": size, "new_tokens": new, "prompt_tokens": prompt_tokens, "rows": found, "engine_counts": stats}


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile."""
    if len(values) < 2:
        return [round(values[0], 4)] * 3
    return [round(q, 4) for q in statistics.quantiles(values, n=4, method="inclusive")]


# -- the cache


@dataclass(frozen=True, slots=True)
class Turn:
    """One request of a workflow: its prompt, and what its program knows by then of the prompts to come."""

    prompt: list[int]
    announced: Sequence[tuple[Hashable, list[int], float]]  # (who, prefix, steps to its next use)


def agents(workflows: int, per_workflow: int, fixed: int, varying: int, rounds: int, fan_in: int = 1) -> list[Turn]:
    """Workflows that each go round their agents, taking turns; `fan_in` of a workflow's agents come at once."""
    rng = random.Random(5)
    prompts = [[[rng.randrange(2, 512) for _ in range(fixed)] for _ in range(per_workflow)] for _ in range(workflows)]
    turns: list[Turn] = []
    at = [0] * workflows
    for _ in range(rounds * per_workflow):
        for w in range(workflows):
            now = at[w]
            prompt = prompts[w][now] + [rng.randrange(2, 512) for _ in range(varying)]
            at[w] = (now + 1) % per_workflow
            coming = [((w, a), prompts[w][a], float((a - at[w]) % per_workflow // fan_in)) for a in range(per_workflow)]
            turns.append(Turn(prompt, coming))
    return turns


def played(paged: PagedModel, turns: Sequence[Turn], policy: str, blocks: int, host_blocks: int = 0) -> dict[str, Any]:
    """What the engine computed and reused over the turns, one at a time, and in how many CPU seconds."""
    engine = Engine(
        paged,
        blocks=blocks + 1,
        host_blocks=host_blocks,
        policy=policy,
        max_step_tokens=512,
        costs=Costs(load_s=1e-6, token_s=1.0),
    )
    began = time.process_time()
    for i, turn in enumerate(turns):
        engine.waiting.append(TokenSequence(list(turn.prompt), Taker(1), order=i))
        drain(engine)
        for key, prefix, steps in turn.announced:
            engine.hint(key, prefix, steps)
    cpu_s = time.process_time() - began
    engine.close()
    total = sum(len(t.prompt) for t in turns)
    return {"hit_rate": round(engine.stats.reused_tokens / total, 4), "cpu_s": cpu_s}


def belady(turns: Sequence[Turn], blocks: int, block_size: int = 16) -> float:
    """The share of prompt tokens that an optimal cache of so many blocks would find (Belady, 1966).

    Like the engine it must hold all blocks of the prompt that runs, and computes at least its last token.
    """
    reads: list[list[tuple[int, ...]]] = [
        [tuple(t.prompt[: at + block_size]) for at in range(0, len(t.prompt), block_size)] for t in turns
    ]
    uses: dict[tuple[int, ...], list[int]] = {}
    for n, read in enumerate(reads):
        for block in read:
            uses.setdefault(block, []).append(n)

    def next_use(block: tuple[int, ...]) -> tuple[float, int]:
        return (uses[block][0] if uses[block] else float("inf")), len(block)

    cached: set[tuple[int, ...]] = set()
    hits = 0
    for turn, read in zip(turns, reads, strict=True):
        for block in read[: (len(turn.prompt) - 1) // block_size]:
            if block not in cached:
                break
            hits += 1
        for block in read:
            uses[block].pop(0)
        others = cached.difference(read)
        while len(others) + len(read) > blocks:
            others.remove(max(others, key=next_use))
        cached = others.union(read)
    return round(hits * block_size / sum(len(t.prompt) for t in turns), 4)


POLICIES = ("workflow", "lru", "lfu", "slru", "pgdsf")


def policies(paged: PagedModel, repeat: int) -> list[dict[str, Any]]:
    """Hit rates and CPU seconds by policy and workload."""
    workloads = {
        "10 agents in turn, fixed 256, varying 32; room for 6": (agents(1, 10, 256, 32, 6), 6 * 18),
        "4 agents fan in, fixed 256, varying 32; room for 2": (agents(1, 4, 256, 32, 12, fan_in=3), 2 * 18 + 4),
        "8 workflows of 4 agents, fixed 128, varying 32; room for half": (agents(8, 4, 128, 32, 4), 16 * 10),
    }
    found: list[dict[str, Any]] = []
    for name, (turns, blocks) in workloads.items():
        best = belady(turns, blocks)
        runs: dict[str, list[dict[str, Any]]] = {p: [] for p in (*POLICIES, "workflow, host tier")}
        for _ in range(repeat):
            for policy, done in runs.items():
                host_blocks = 0 if policy in POLICIES else 4 * blocks
                done.append(played(paged, turns, policy.partition(",")[0], blocks, host_blocks))
        row: dict[str, Any] = {"work": name, "blocks": blocks, "belady": best}
        row |= {p: done[0]["hit_rate"] for p, done in runs.items()}
        row["workflow_of_belady"] = round(row["workflow"] / best, 3)
        row["cpu_s"] = {p: quartiles([d["cpu_s"] for d in done]) for p, done in runs.items()}
        found.append(row)
        print(row, file=sys.stderr)
    return found


def deduplicated(paged: PagedModel, dedup: bool) -> dict[str, Any]:
    """Eight requests at once over a common context of 256 tokens, six times over, in steps of 1,024 tokens.

    (In steps of 256 tokens, which suit a CPU, the first fills the step, and the others find its context cached.)
    """
    rng = random.Random(9)
    engine = Engine(paged, blocks=400, max_step_tokens=1024, dedup=dedup)
    began = time.process_time()
    for _ in range(6):
        context = [rng.randrange(2, 512) for _ in range(256)]
        engine.waiting += [
            TokenSequence(context + [rng.randrange(2, 512) for _ in range(16)], Taker(4), order=i, limit=4)
            for i in range(8)
        ]
        drain(engine)
    cpu_s = time.process_time() - began
    return {"prefill_tokens": engine.stats.prefill_tokens, "steps": engine.stats.steps, "cpu_s": cpu_s}


def prefetched(paged: PagedModel, host_blocks: int, prefetch_steps: float | None) -> dict[str, Any]:
    """Ten agents in turn with prompts of 512 fixed and 32 varying tokens, six rounds; between them 20 ms of a tool."""
    engine = Engine(
        paged, blocks=5 * 34 + 1, host_blocks=host_blocks, max_step_tokens=256, prefetch_steps=prefetch_steps
    )
    began = time.process_time()
    first_token: list[float] = []
    for i, turn in enumerate(agents(1, 10, 512, 32, 6)):
        asked = time.perf_counter()
        engine.waiting.append(TokenSequence(list(turn.prompt), Taker(1), order=i))
        drain(engine)
        if i >= 10:  # after the round that computes everything for the first time
            first_token.append(time.perf_counter() - asked)
        for key, prefix, steps in turn.announced:
            engine.hint(key, prefix, steps)
        with torch.inference_mode():
            while time.perf_counter() < asked + first_token[-1] + 0.02 if first_token else False:
                engine.step()  # looks at hints and at copies that ended
                time.sleep(0.001)
    cpu_s = time.process_time() - began
    engine.close()
    counts = {n: getattr(engine.stats, n) for n in ("prefill_tokens", "loaded_blocks", "waits_for_load")}
    return counts | {"first_token_s": quartiles(first_token)[1], "cpu_s": cpu_s}


def switches(paged: PagedModel, repeat: int) -> list[dict[str, Any]]:
    """In-flight deduplication and prefetch, on and off."""
    variants: dict[tuple[str, str], Callable[[], dict[str, Any]]] = {
        ("dedup", "on"): lambda: deduplicated(paged, True),
        ("dedup", "off"): lambda: deduplicated(paged, False),
        ("prefetch", "on"): lambda: prefetched(paged, 600, 1.0),
        ("prefetch", "off"): lambda: prefetched(paged, 600, None),
        ("prefetch", "no host tier"): lambda: prefetched(paged, 0, None),
    }
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {v: [] for v in variants}
    for _ in range(repeat):
        for variant, run in variants.items():
            runs[variant].append(run())
    found: list[dict[str, Any]] = []
    for (switch, value), done in runs.items():
        row = {"switch": switch, "value": value, **done[0]}
        for name in ("cpu_s", "first_token_s"):
            if name in row:
                row[name] = quartiles([d[name] for d in done])
        found.append(row)
        print(row, file=sys.stderr)
    return found


def cache(size: str, repeat: int) -> dict[str, Any]:
    """All of what the cache does, over one model."""
    paged = PagedModel(make_model(size), "benchmark")
    return {"size": size, "rows": policies(paged, repeat), "switches": switches(paged, repeat)}


def machine() -> dict[str, Any]:
    """Where and on what this was measured."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("speed", "cache"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", choices=("tiny", "small", "medium"), default="small")
    parser.add_argument("--new", type=int, default=64)
    options = parser.parse_args()
    before = machine()
    found = (
        cache(options.size, options.repeat)
        if options.what == "cache"
        else speed(options.size, options.new, options.repeat)
    )
    result = {"machine": before, "load_after": machine()["load"], "repeat": options.repeat, **found}
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
