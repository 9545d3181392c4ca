"""The engine's cache policies beside Belady's. Its speed beside others: see `engine_speed.py`.

    python benchmarks/engine.py cache [--json FILE] [--repeat N] [--size tiny|small|medium]

Three workloads of agents with fixed prompts, in a pool that holds part of them: ten in turn, four of which
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
from flowc.backends.llm.paged.sequence import Sequence as TokenSequence

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    "small": {"hidden_size": 448, "intermediate_size": 1216, "num_hidden_layers": 8},
    "medium": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 14},
}
HEADS = {"tiny": (4, 2), "small": (7, 1), "medium": (12, 4)}
VOCAB = 16_384


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
    parser.add_argument("what", choices=("cache",), nargs="?", help="speed is measured by engine_speed.py")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--size", choices=("tiny", "small", "medium"), default="small")
    options = parser.parse_args()
    before = machine()
    found = cache(options.size, options.repeat)
    result = {"machine": before, "load_after": machine()["load"], "repeat": options.repeat, **found}
    text = json.dumps(result, indent=1)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
